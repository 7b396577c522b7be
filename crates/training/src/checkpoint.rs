//! The file side of checkpoints: what makes a saved step whole, and how a whole one is found again.
//!
//! A run folder holds one folder `step-00001000` per saved step. Saving goes
//! `.tmp-step-00001000` (files written, each synced) -> `manifest.json` with the length and the
//! BLAKE3 hash of every file, written last -> atomic rename -> sync of the run folder. So a
//! checkpoint that is not complete does not exist: a kill at any moment leaves the state before or
//! the state after. Replacing a step that exists sets the old folder aside as `.old-step-...` first;
//! for the moment between the two renames [`list`] counts the one set aside.
//!
//! One process writes at a time (see [`RunLock`](crate::run_folder::RunLock)); any number may read.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::run_folder::FileError;
use crate::run_folder::files::MANIFEST;

mod best;
mod draft;
mod retention;
mod verify;

pub(crate) use best::info;
pub use best::{Best, read_best, recover_best, write_best};
pub use draft::{Draft, now_utc};
pub use retention::{Hold, Whole, clean_leftovers, discard_after, hold, list, newest_good, newest_usable, prune};
pub use verify::{check_file, read_file, verify, verify_usable};

/// The version of the layout that this code writes; it reads no other.
pub const FORMAT_VERSION: u32 = 1;

/// What a checkpoint consists of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of the layout.
    pub format_version: u32,
    /// The training step after which it was saved.
    pub step: u64,
    /// When it was saved, in UTC: "2026-01-31T23:59:59Z".
    pub created: String,
    /// The version of Polyhead that saved it.
    pub polyhead_version: String,
    /// Whatever the caller wants to be readable without opening the other files.
    pub info: serde_json::Value,
    /// All files but the manifest, by name.
    pub files: Vec<FileEntry>,
}

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// The file's name inside the checkpoint.
    pub name: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its BLAKE3 hash, in lower-case hexadecimal digits.
    pub blake3: String,
}

/// Why a checkpoint cannot be written or must not be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused an operation.
    #[error(transparent)]
    File(#[from] FileError),
    /// The folder has no manifest.
    #[error("{} is no complete checkpoint: {MANIFEST} is missing", path.display())]
    NoManifest {
        /// The checkpoint's folder.
        path: PathBuf,
    },
    /// The manifest is not as it was written.
    #[error("{} is damaged: {reason}", path.display())]
    BadManifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Another version of Polyhead wrote it.
    #[error(
        "{} has format_version ({found}), this version of Polyhead reads {FORMAT_VERSION}: use the \
         version that wrote it",
        path.display()
    )]
    Format {
        /// The manifest.
        path: PathBuf,
        /// The version found.
        found: u64,
    },
    /// The folder's name and the manifest tell different steps.
    #[error("{} says step {found}: the folder was renamed", path.display())]
    WrongStep {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The step in the manifest.
        found: u64,
    },
    /// A file is gone.
    #[error("{} is missing", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file is shorter than it was.
    #[error("{} is truncated: {found} of {expected} bytes", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// The length in the manifest.
        expected: u64,
    },
    /// A file has other contents than it had.
    #[error("{} is altered: {reason}", path.display())]
    Altered {
        /// The file.
        path: PathBuf,
        /// What differs: its hash, or a length greater than the manifest's.
        reason: String,
    },
    /// The checkpoint has no such file.
    #[error("{} holds no file {name}; it holds {holds}", path.display())]
    NoSuchFile {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The name asked for.
        name: String,
        /// The names that there are.
        holds: String,
    },
    /// A name that a file of a checkpoint cannot have.
    #[error(
        "file name {name:?} must be a plain name without folders that does not begin with a dot \
         and is not {MANIFEST}"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// A loss by which nothing can be ranked.
    #[error("validation_loss ({found}) must be finite to be the best")]
    BadLoss {
        /// The loss.
        found: f64,
    },
    /// `best.json` is not as it was written.
    #[error("{} is damaged: {reason}; it is made again from the checkpoints", path.display())]
    BadBest {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// What starts the names of checkpoints in a run folder.
const PREFIX: &str = "step-";

/// Whether `path` is a folder that is named as a checkpoint in a run folder is, complete or not.
pub fn is_named_as_checkpoint(path: &Path) -> bool {
    path.is_dir() && path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX))
}

/// The name of the folder of a step.
pub fn folder_name(step: u64) -> String {
    format!("{PREFIX}{step:08}")
}

/// The step in a folder's name, if it is one that [`folder_name`] gives.
fn step_of(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    let step = name.strip_prefix(PREFIX)?.parse().ok()?;
    (folder_name(step) == name).then_some(step)
}

fn is_plain(name: &str) -> bool {
    let forbidden = |c: char| c.is_control() || matches!(c, '/' | '\\' | ':');
    !name.is_empty() && !name.starts_with('.') && name != MANIFEST && !name.contains(forbidden)
}

#[cfg(test)]
mod tests;
