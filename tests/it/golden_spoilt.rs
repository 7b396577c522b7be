//! Whether the golden tests can be fooled: every file of golden numbers is spoilt in several ways, each in a copy by itself, and
//! the test that reads it has to fail there; the copy that is not spoilt has to pass.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;

use crate::world::project;

/// What is done to a file.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Spoil {
    /// Nothing.
    Whole,
    /// The first number that is expected is none.
    NotANumber,
    /// One gradient is 1 % larger, or one output where there are none.
    OnePercent,
    /// The tensor of this number is missing.
    Missing(usize),
    /// A tensor is there that the format does not have.
    TooMany,
    /// An option is there that nobody knows.
    UnknownOption,
}

/// A copy to make, and the test that reads it.
struct Trial {
    test: String,
    folder: String,
    /// What is copied, within the folder; the first one is spoilt.
    files: Vec<PathBuf>,
    spoil: Spoil,
}

#[test]
fn spoilt_golden_files_are_seen() {
    let trials = trials();
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(trial) = trials.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(problem) = run(trial) {
                        wrong.lock().unwrap().push(problem);
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    let spoilt = trials.iter().filter(|trial| trial.spoil != Spoil::Whole).count();
    let problems = wrong.len();
    println!("golden files: {spoilt} spoilt copies, {} whole ones, {problems} not told apart", trials.len() - spoilt);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn trials() -> Vec<Trial> {
    let root = project().join("tests/golden");
    let tests = tests();
    let mut trials = Vec::new();
    for folder in sorted(&root).into_iter().filter(|path| path.is_dir()) {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        // Models of other people's format are folders of their own, which are read as a whole.
        let models: Vec<PathBuf> = sorted(&folder).into_iter().filter(|path| path.is_dir()).collect();
        let units: Vec<Vec<PathBuf>> = if models.is_empty() {
            tensors(&folder).into_iter().map(|file| [vec![file.clone()], beside(&file)].concat()).collect()
        } else {
            models.iter().flat_map(|model| rotations(&tensors(model), &sorted(model))).collect()
        };
        if units.is_empty() {
            continue; // texts, which are compared as a whole by tests of their own
        }
        let test = tests.get(&name).unwrap_or_else(|| panic!("there is no test golden_{name}")).clone();
        for files in units {
            let mut ways = vec![Spoil::Whole, Spoil::NotANumber, Spoil::OnePercent, Spoil::TooMany];
            ways.extend((0..Content::read(&files[0]).tensors.len()).map(Spoil::Missing));
            if has_options(&files) {
                ways.push(Spoil::UnknownOption);
            }
            for spoil in ways {
                trials.push(Trial { test: test.clone(), folder: name.clone(), files: files.clone(), spoil });
            }
        }
    }
    trials
}

fn sorted(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

fn tensors(folder: &Path) -> Vec<PathBuf> {
    let is = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "safetensors");
    sorted(folder).into_iter().filter(is).collect()
}

fn beside(file: &Path) -> Vec<PathBuf> {
    let json = file.with_extension("json");
    json.exists().then_some(json).into_iter().collect()
}

/// For each of some files, itself and then all others of its folder.
fn rotations(some: &[PathBuf], all: &[PathBuf]) -> Vec<Vec<PathBuf>> {
    let of = |file: &PathBuf| {
        let others = all.iter().filter(|other| *other != file).cloned();
        std::iter::once(file.clone()).chain(others).collect()
    };
    some.iter().map(of).collect()
}

/// Whether a file says with which settings its numbers were made.
fn has_options(files: &[PathBuf]) -> bool {
    let json = files[0].with_extension("json");
    json.exists() || Content::read(&files[0]).metadata.get("config").is_some_and(|config| !config.contains("torch\":"))
}

/// The full names of the golden tests of this executable, by their folders.
fn tests() -> BTreeMap<String, String> {
    let listed = Command::new(std::env::current_exe().unwrap()).args(["golden_", "--list"]).output().unwrap();
    let text = String::from_utf8(listed.stdout).unwrap();
    let name = |line: &str| {
        let test = line.strip_suffix(": test")?;
        Some((test.rsplit("::").next()?.strip_prefix("golden_")?.to_owned(), test.to_owned()))
    };
    text.lines().filter_map(name).collect()
}

/// Runs the test on a copy.
fn run(trial: &Trial) -> Result<(), String> {
    let Trial { test, folder, files, spoil } = trial;
    let root = tempfile::tempdir().unwrap();
    let base = project().join("tests/golden").join(folder);
    for (index, file) in files.iter().enumerate() {
        let inside = file.strip_prefix(&base).unwrap();
        let to = root.path().join(folder).join(inside);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        let options_beside = files.len() == 2 && index == 1 && folder != "hf";
        match (index, spoil) {
            (0, Spoil::UnknownOption) if beside(file).is_empty() => std::fs::write(to, spoilt(file, *spoil)).unwrap(),
            (0, Spoil::NotANumber | Spoil::OnePercent | Spoil::Missing(_) | Spoil::TooMany) => {
                std::fs::write(to, spoilt(file, *spoil)).unwrap();
            }
            (_, Spoil::UnknownOption) if options_beside => {
                let mut json: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
                json["unknown"] = 1.into();
                std::fs::write(to, json.to_string()).unwrap();
            }
            _ => _ = std::fs::copy(file, to).unwrap(),
        }
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test.as_str(), "--exact", "--test-threads=1"])
        .env("POLYHEAD_GOLDEN", root.path())
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let name = files[0].strip_prefix(project().join("tests/golden")).unwrap().display();
    let wanted = if *spoil == Spoil::Whole { "1 passed; 0 failed" } else { "0 passed; 1 failed" };
    match told.contains(wanted) && output.status.success() == (*spoil == Spoil::Whole) {
        true => Ok(()),
        false => Err(format!("{test} with {name}, {spoil:?}: {}", told.trim().lines().last().unwrap_or_default())),
    }
}

/// Type, shape and bytes of a tensor.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

struct Content {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Stored>,
}

impl Content {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let stored = |(name, view): (String, TensorView<'_>)| {
            (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        };
        let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().map(stored).collect();
        Self { metadata, tensors }
    }

    fn write(&self) -> Vec<u8> {
        let views = self.tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize(views, Some(self.metadata.clone().into_iter().collect())).unwrap()
    }
}

/// A file's bytes once it is spoilt.
fn spoilt(path: &Path, spoil: Spoil) -> Vec<u8> {
    let mut content = Content::read(path);
    let names: Vec<String> = content.tensors.keys().cloned().collect();
    let middle = names[names.len() / 2].clone();
    match spoil {
        Spoil::Whole => {}
        Spoil::NotANumber => {
            let (dtype, _, bytes) = content.tensors.get_mut(&expected(&content.tensors)).unwrap();
            match dtype {
                Dtype::F64 => bytes[..8].copy_from_slice(&f64::NAN.to_le_bytes()),
                Dtype::F32 => bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
                _ => bytes[0] ^= 1, // a whole number is another one
            }
        }
        Spoil::OnePercent => {
            let (dtype, _, bytes) = content.tensors.get_mut(&gradient(&content.tensors)).unwrap();
            match dtype {
                Dtype::F64 => bytes.as_chunks_mut::<8>().0.iter_mut().for_each(|eight| {
                    *eight = (f64::from_le_bytes(*eight) * 1.01).to_le_bytes();
                }),
                Dtype::F32 => bytes.as_chunks_mut::<4>().0.iter_mut().for_each(|four| {
                    *four = (f32::from_le_bytes(*four) * 1.01).to_le_bytes();
                }),
                _ => bytes[0] ^= 1,
            }
        }
        Spoil::Missing(number) => _ = content.tensors.remove(&names[number]),
        Spoil::TooMany => {
            let one = content.tensors[&middle].clone();
            content.tensors.insert(format!("{middle}_more"), one);
        }
        Spoil::UnknownOption => {
            let mut config: Value = serde_json::from_str(&content.metadata["config"]).unwrap();
            config["unknown"] = 1.into();
            content.metadata.insert("config".into(), config.to_string());
        }
    }
    content.write()
}

/// Whether a result is in the tensor of this name. What a sampler reads beside numbers to draw with is none.
fn is_output(tensors: &BTreeMap<String, Stored>, name: &str) -> bool {
    if name == "logits" && tensors.contains_key("uniform") {
        return false;
    }
    let last = name.rsplit(['.', '/']).next().unwrap_or_default();
    ["out", "logits", "V_mean_over_samples", "alloc", "mean", "additive_f32"].contains(&last)
        || name.starts_with("after.")
}

/// The first tensor with a result, or where there is none, the first of all.
fn expected(tensors: &BTreeMap<String, Stored>) -> String {
    tensors.keys().find(|name| is_output(tensors, name)).or_else(|| tensors.keys().next()).unwrap().clone()
}

/// The gradient with the largest number, so that it is more than rounding; else the result with it.
fn gradient(tensors: &BTreeMap<String, Stored>) -> String {
    let largest = |(dtype, _, bytes): &Stored| {
        let values: Vec<f64> = match dtype {
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&four| f64::from(f32::from_le_bytes(four))).collect(),
            _ => bytes.as_chunks::<8>().0.iter().map(|&eight| f64::from_le_bytes(eight)).collect(),
        };
        values.into_iter().map(f64::abs).max_by(f64::total_cmp).unwrap_or_default()
    };
    let is_gradient = |name: &str| ["grad.", "grad/", "grad_in"].iter().any(|part| name.contains(part));
    let most = |is: &dyn Fn(&str) -> bool| {
        let found = tensors.iter().filter(|(name, _)| is(name));
        found.max_by(|a, b| largest(a.1).total_cmp(&largest(b.1))).map(|(name, _)| name.clone())
    };
    most(&is_gradient).or_else(|| most(&|name| is_output(tensors, name))).unwrap_or_else(|| expected(tensors))
}
