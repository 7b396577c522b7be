//! The checkpoints of a run: finding the newest good one, removing old ones, tidying up.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::best::called_best;
use super::{CheckpointError, Manifest, folder_name, step_of, verify, verify_usable};
use crate::run_folder::files::MANIFEST;
use crate::run_folder::{At, FileError, Locked, TEMPORARY, sync_folder};

const OLD: &str = ".old-";
const TRASH: &str = ".trash-";

/// The checkpoints of a run with their steps, oldest first, good or not.
///
/// # Errors
/// If the folder cannot be read; a folder that does not exist has no checkpoints.
pub fn list(run_dir: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let mut found = BTreeMap::new();
    for path in entries(run_dir)? {
        if let Some(step) = step_of(&path).filter(|_| path.is_dir()) {
            found.insert(step, path);
        } else if let Some(step) = step_set_aside(&path) {
            // A kill came between the two renames of a replacement.
            found.entry(step).or_insert(path);
        }
    }
    Ok(found.into_iter().collect())
}

/// The folder of a checkpoint that was verified, and its manifest.
pub type Whole = (PathBuf, Manifest);

/// The newest checkpoint that is whole, and what is wrong with those newer than it.
///
/// # Errors
/// If the run folder cannot be read.
pub fn newest_good(run_dir: &Path) -> Result<(Option<Whole>, Vec<CheckpointError>), CheckpointError> {
    newest(run_dir, verify)
}

/// The newest checkpoint whose model can be used, as [`verify_usable`] sees it, and what is wrong with those newer than it.
///
/// # Errors
/// If the run folder cannot be read.
pub fn newest_usable(run_dir: &Path) -> Result<(Option<Whole>, Vec<CheckpointError>), CheckpointError> {
    newest(run_dir, verify_usable)
}

fn newest(
    run_dir: &Path,
    verify: fn(&Path) -> Result<Manifest, CheckpointError>,
) -> Result<(Option<Whole>, Vec<CheckpointError>), CheckpointError> {
    let mut skipped = Vec::new();
    for (_, path) in list(run_dir)?.into_iter().rev() {
        match verify(&path) {
            Ok(manifest) => return Ok((Some((path, manifest)), skipped)),
            Err(error) => skipped.push(error),
        }
    }
    Ok((None, skipped))
}

/// The right to read a checkpoint to the end: pruning leaves it alone until this is dropped, or its process has ended.
#[derive(Debug)]
pub struct Hold {
    _manifest: Locked,
}

/// Holds the checkpoint at `path`, whoever else reads it too; `None` where there is none, or the file system knows no locks.
pub fn hold(path: &Path) -> Option<Hold> {
    let manifest = File::open(path.join(MANIFEST)).ok()?;
    manifest.lock_shared().ok()?;
    Some(Hold { _manifest: Locked(manifest) })
}

fn is_held(path: &Path) -> bool {
    let Ok(manifest) = File::open(path.join(MANIFEST)) else { return false };
    matches!(Locked(manifest).0.try_lock(), Err(TryLockError::WouldBlock))
}

/// Removes all checkpoints but the newest `keep_latest_k`, those in `keep`, the best one, the newest good one, and those that
/// somebody holds; returns what was removed. `keep_latest_k = 0` keeps all, as torchtitan has it. `good`: the newest good one,
/// where the caller knows it (has written or verified it); else it is looked for, which reads whole checkpoints.
///
/// # Errors
/// If something cannot be read or removed.
pub fn prune(
    run_dir: &Path,
    keep_latest_k: usize,
    keep: &[PathBuf],
    good: Option<&Path>,
) -> Result<Vec<PathBuf>, CheckpointError> {
    let all = list(run_dir)?;
    if keep_latest_k == 0 || all.len() <= keep_latest_k {
        return Ok(Vec::new());
    }
    let best = called_best(run_dir, all.last().map(|(_, path)| path.as_path()));
    let keep: Vec<_> = keep.iter().map(|path| real(path)).collect();
    let old = &all[..all.len() - keep_latest_k];
    let mut unwanted: Vec<&PathBuf> = old
        .iter()
        .filter(|(step, path)| !best.contains(step) && !keep.contains(&real(path)) && !is_held(path))
        .map(|(_, path)| path)
        .collect();
    let good = match good {
        Some(good) => Some(good.to_owned()),
        None if unwanted.is_empty() => None,
        None => newest_good(run_dir)?.0.map(|(path, _)| path),
    };
    if let Some(good) = good {
        unwanted.retain(|path| real(path) != real(&good));
    }
    remove_all(unwanted)
}

/// Removes the checkpoints of steps greater than `step`, for a run that is resumed from an earlier
/// one; returns what was removed. Else a later automatic resume would go on with the abandoned end.
///
/// # Errors
/// If something cannot be read or removed.
pub fn discard_after(run_dir: &Path, step: u64) -> Result<Vec<PathBuf>, CheckpointError> {
    let all = list(run_dir)?;
    let later = all.iter().filter(|(found, _)| *found > step);
    remove_all(later.map(|(_, path)| path))
}

/// Removes what killed processes left unfinished, and puts back a checkpoint that was set aside for
/// one that never came. Returns what was removed. To be called once the run is locked and before
/// [`newest_good`], whose answer may be such a folder.
///
/// # Errors
/// If something cannot be read, renamed or removed.
pub fn clean_leftovers(run_dir: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let mut removed = Vec::new();
    for path in entries(run_dir)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if let Some(step) = step_set_aside(&path) {
            let target = run_dir.join(folder_name(step));
            if target.exists() {
                discard(&path)?;
                removed.push(path);
            } else {
                fs::rename(&path, &target).at("rename", &path)?;
                sync_folder(run_dir)?;
            }
        } else if name.starts_with(TEMPORARY) || name.starts_with(TRASH) {
            if path.is_dir() {
                fs::remove_dir_all(&path).at("remove", &path)?;
            } else {
                fs::remove_file(&path).at("remove", &path)?;
            }
            removed.push(path);
        }
    }
    Ok(removed)
}

/// Renames the checkpoint at `path`, if there is one, out of the way of its replacement.
pub(super) fn set_aside(path: &Path) -> Result<Option<PathBuf>, FileError> {
    if !path.exists() {
        return Ok(None);
    }
    let aside = renamed(path, OLD);
    if aside.exists() {
        discard(&aside)?;
    }
    fs::rename(path, &aside).at("rename", path)?;
    Ok(Some(aside))
}

/// Removes a folder. It is renamed first: half of a checkpoint must never look like one.
pub(super) fn discard(path: &Path) -> Result<(), FileError> {
    let trash = renamed(path, TRASH);
    if trash.exists() {
        fs::remove_dir_all(&trash).at("remove", &trash)?;
    }
    fs::rename(path, &trash).at("rename", path)?;
    fs::remove_dir_all(&trash).at("remove", &trash)
}

fn remove_all<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Result<Vec<PathBuf>, CheckpointError> {
    let mut removed = Vec::new();
    for path in paths {
        discard(path)?;
        removed.push(path.clone());
    }
    Ok(removed)
}

fn renamed(path: &Path, prefix: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let bare = name.strip_prefix(OLD).unwrap_or(&name);
    path.with_file_name(format!("{prefix}{bare}"))
}

fn step_set_aside(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    step_of(Path::new(name.strip_prefix(OLD)?)).filter(|_| path.is_dir())
}

fn entries(run_dir: &Path) -> Result<Vec<PathBuf>, FileError> {
    let entries = match fs::read_dir(run_dir) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read.at("read", run_dir)?,
    };
    entries.map(|entry| Ok(entry.at("read", run_dir)?.path())).collect()
}

/// One name per folder, however the path to it was written.
fn real(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf())
}
