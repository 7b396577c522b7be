//! Which step had the smallest validation loss.
//!
//! Every checkpoint says it itself, in the `info` of its manifest: its own validation loss where it was validated, and the best
//! step so far. So a kill between a checkpoint and anything written after it loses nothing. `best.json` repeats it for people
//! and scripts, and is written anew from the checkpoints whenever a run goes on.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::verify::read_manifest;
use super::{CheckpointError, Manifest, folder_name, list};
use crate::run_folder::files::BEST;
use crate::run_folder::{At, atomic_write};

/// The step with the smallest validation loss so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step; its checkpoint is not pruned.
    pub step: u64,
    /// Its validation loss.
    pub validation_loss: f64,
}

/// How it is written. A decimal number need not come back to the last bit, and a resumed run must decide as the uninterrupted
/// one does: the bits decide, the number is for people.
#[derive(Serialize, Deserialize)]
struct Written {
    step: u64,
    validation_loss: f64,
    validation_loss_bits: u64,
}

impl Written {
    fn of(best: Best) -> Self {
        let Best { step, validation_loss } = best;
        Self { step, validation_loss, validation_loss_bits: validation_loss.to_bits() }
    }

    fn best(&self) -> Best {
        Best { step: self.step, validation_loss: f64::from_bits(self.validation_loss_bits) }
    }
}

/// The `info` of a checkpoint's manifest: targets so far, its own validation, the best one so far.
pub(crate) fn info(targets: u64, own: Option<Best>, best: Option<Best>) -> Value {
    let mut info = json!({ "targets": targets });
    for (key, score) in [("validation", own), ("best", best)] {
        if let Some(score) = score.filter(|score| score.validation_loss.is_finite()) {
            info[key] = json!(Written::of(score));
        }
    }
    info
}

fn score_in(manifest: &Manifest, key: &str) -> Option<Best> {
    let written = Written::deserialize(manifest.info.get(key)?).ok()?;
    Some(written.best()).filter(|best| best.validation_loss.is_finite())
}

/// The best step of a run that goes on from the checkpoint of `resumed`: what that checkpoint says. One that was written before
/// checkpoints said so leaves it to `best.json`; where the best checkpoint itself is gone, it is the best of those that are
/// there. `best.json` is put right. Gives besides what is to be told.
///
/// # Errors
/// If the run folder cannot be read.
pub fn recover_best(run_dir: &Path, resumed: u64) -> Result<(Option<Best>, Vec<String>), CheckpointError> {
    let there: BTreeMap<u64, Option<Manifest>> =
        list(run_dir)?.into_iter().map(|(step, path)| (step, read_manifest(&path).ok())).collect();
    let marker = read_best(run_dir);
    let mut notes: Vec<String> = marker.as_ref().err().map(ToString::to_string).into_iter().collect();
    let marker = marker.ok().flatten().filter(|best| best.step <= resumed);
    let of = |step: u64, key| there.get(&step)?.as_ref().and_then(|manifest| score_in(manifest, key));
    let said = of(resumed, "best").or(marker);
    let best = match said {
        Some(best) if !there.contains_key(&best.step) => {
            let scored = there.range(..=resumed).filter_map(|(step, _)| of(*step, "validation"));
            let next = scored.reduce(|a, b| if b.validation_loss < a.validation_loss { b } else { a });
            let gone = run_dir.join(folder_name(best.step));
            let now = next.map_or("no other was validated".to_owned(), |next| format!("now it is step {}", next.step));
            notes.push(format!("the best checkpoint, {}, is gone; {now}", gone.display()));
            next
        }
        said => said,
    };
    match best {
        Some(best) if marker != Some(best) => write_best(run_dir, &best)?,
        None if path_in(run_dir).exists() => fs::remove_file(path_in(run_dir)).at("remove", &path_in(run_dir))?,
        _ => {}
    }
    Ok((best, notes))
}

/// The steps that any of the checkpoints or `best.json` calls the best: pruning leaves all of them alone.
pub(super) fn called_best(run_dir: &Path, newest: Option<&Path>) -> Vec<u64> {
    let said = newest.and_then(|path| read_manifest(path).ok()).and_then(|manifest| score_in(&manifest, "best"));
    let marker = read_best(run_dir).ok().flatten();
    said.into_iter().chain(marker).map(|best| best.step).collect()
}

/// Notes the best step in `run_dir`, atomically.
///
/// # Errors
/// If the loss is not finite or the file cannot be written.
pub fn write_best(run_dir: &Path, best: &Best) -> Result<(), CheckpointError> {
    if !best.validation_loss.is_finite() {
        return Err(CheckpointError::BadLoss { found: best.validation_loss });
    }
    let text = format!("{:#}\n", json!(Written::of(*best)));
    Ok(atomic_write(&path_in(run_dir), text.as_bytes())?)
}

/// The best step noted in `run_dir`, if any.
///
/// # Errors
/// If the file is there but cannot be read or is damaged.
pub fn read_best(run_dir: &Path) -> Result<Option<Best>, CheckpointError> {
    let path = path_in(run_dir);
    let bytes = match fs::read(&path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.at("read", &path)?,
    };
    match serde_json::from_slice::<Written>(&bytes) {
        Ok(written) => Ok(Some(written.best())),
        Err(error) => Err(CheckpointError::BadBest { path, reason: error.to_string() }),
    }
}

fn path_in(run_dir: &Path) -> PathBuf {
    run_dir.join(BEST)
}
