//! The base model of a checkpoint that has only what was trained beside the weights (LoRA's pairs, an intervention's tensors):
//! which it is, and where it was.

use std::path::{Component, Path, PathBuf};

use polyhead_models::hf;
use polyhead_training::checkpoint::read_file;
use polyhead_training::run_folder::files::BASE;
use serde::{Deserialize, Serialize};

use crate::Caller;
use crate::error::Failure;
use crate::hub::{MAIN, Reference};

/// `base.json` of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// As the recipe names it.
    model: PathBuf,
    /// Its folder, from the root on.
    folder: PathBuf,
    /// The same from the run's folder on, so that both may be moved together.
    from_run: PathBuf,
    /// The BLAKE3 hash of its weights.
    blake3: String,
}

impl Base {
    /// The model in a folder, whose weights have this hash, as the base of a run in `run_dir`, which is there already.
    ///
    /// # Errors
    /// If a folder cannot be found.
    pub fn of(folder: &Path, blake3: &str, named: &Path, run_dir: &Path) -> Result<Self, Failure> {
        let real = |path: &Path| path.canonicalize().map_err(|error| Failure::file("find", path, error));
        let (folder, run) = (real(folder)?, real(run_dir)?);
        let from_run = relative(&run, &folder);
        Ok(Self { model: named.to_owned(), folder, from_run, blake3: blake3.to_owned() })
    }

    /// As a file of a checkpoint.
    pub fn file(&self) -> (String, Vec<u8>) {
        (BASE.to_owned(), format!("{:#}\n", serde_json::json!(self)).into_bytes())
    }

    /// That of a checkpoint; `None` where all weights are in it.
    ///
    /// # Errors
    /// If it is altered.
    pub fn read(checkpoint: &Path) -> Result<Option<Self>, Failure> {
        let path = checkpoint.join(BASE);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = read_file(checkpoint, BASE)?;
        let read = serde_json::from_slice(&bytes);
        read.map(Some).map_err(|error| Failure::Run(format!("{}: {error}", path.display())))
    }

    /// As PEFT finds it: by its name on the hub, where it was named so, else by its folder.
    pub fn name(&self) -> hf::BaseName {
        let named = self.model.to_str().and_then(Reference::parse).filter(|_| !self.model.exists());
        match named {
            Some(Reference { name, revision }) => {
                hf::BaseName { name, revision: Some(revision).filter(|it| it != MAIN) }
            }
            None => hf::BaseName { name: self.folder.display().to_string(), revision: None },
        }
    }

    /// Whether weights with this hash are its own.
    pub fn has(&self, blake3: &str) -> bool {
        self.blake3 == blake3
    }

    /// Where it may be, for a checkpoint: what the caller names, where it was, beside the run, by its name.
    pub fn places(&self, checkpoint: &Path, caller: Caller) -> Vec<PathBuf> {
        let beside = checkpoint.parent().map(|run| run.join(&self.from_run));
        let named = caller.base.map(Path::to_owned);
        [named, Some(self.folder.clone()), beside, Some(self.model.clone())].into_iter().flatten().collect()
    }

    /// As the recipe names it.
    pub fn named(&self) -> &Path {
        &self.model
    }
}

/// The way from one folder to another, both from the root on.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let same = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(same).map(|_| Component::ParentDir);
    up.chain(to.components().skip(same)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_from_a_run_to_its_base() {
        let way = |from: &str, to: &str| relative(Path::new(from), Path::new(to));
        assert_eq!(way("/a/runs/lora", "/a/runs/base/step-00000004"), Path::new("../base/step-00000004"));
        assert_eq!(way("/a/lora", "/b"), Path::new("../../b"));
    }
}
