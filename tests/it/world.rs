//! The binary in a temporary folder.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use polyhead_training::tensorboard::{Event, read_events};

/// The project's folder.
pub fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A small run on generated data: quick, and without any file.
pub const SMALL: &str = r#"
[model.decoder]
d_model = 16
n_layers = 2
[model.decoder.attention.grouped_differential]
n_heads = 4
n_noise_heads = 2
[data.markov]
states = 6
[training]
steps = 12
seq_len = 16
batch_size = 4
gradient_accumulation_steps = 2
[metrics]
log_freq = 1
[validation]
interval = 4
batches = 2
[checkpoint]
interval = 4
"#;

/// A temporary folder with a recipe in it.
pub struct World {
    /// The folder; removed at the end.
    pub dir: tempfile::TempDir,
}

impl World {
    /// A folder with `recipe.toml`.
    pub fn new(recipe: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("recipe.toml"), recipe).unwrap();
        Self { dir }
    }

    /// The command, to be run in the folder. Where the tests run on another machine than that which built them, POLYHEAD says where it is.
    pub fn command(&self, args: &[&str]) -> Command {
        let built = || env!("CARGO_BIN_EXE_polyhead").into();
        let mut command = Command::new(std::env::var_os("POLYHEAD").unwrap_or_else(built));
        command.args(args).current_dir(self.dir.path());
        command
    }

    /// All TensorBoard events of a run.
    pub fn events(&self, run: &str) -> Vec<Event> {
        let mut files: Vec<_> =
            std::fs::read_dir(self.dir.path().join(run)).unwrap().map(|file| file.unwrap().path()).collect();
        files.retain(|file| file.file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents."));
        files.sort();
        files.iter().flat_map(|file| read_events(file).unwrap()).collect()
    }

    /// Runs to the end.
    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs to the end and expects success; gives both outputs.
    pub fn succeeds(&self, args: &[&str]) -> (String, String) {
        let output = self.run(args);
        let (out, err) = texts(&output);
        assert!(output.status.success(), "{args:?} failed: {err}");
        (out, err)
    }

    /// Runs and expects this exit code; gives standard error.
    pub fn fails(&self, code: i32, args: &[&str]) -> String {
        let output = self.run(args);
        let (_, err) = texts(&output);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {err}");
        assert!(!err.contains("panicked"), "{err}");
        err
    }

    /// A file's bytes.
    pub fn read(&self, path: &str) -> Vec<u8> {
        std::fs::read(self.dir.path().join(path)).unwrap()
    }
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}
