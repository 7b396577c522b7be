//! `best.json`: which step had the smallest validation loss.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::CheckpointError;
use crate::run_folder::{At, atomic_write};

/// The step with the smallest validation loss so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Best {
    /// The step; its checkpoint is not pruned.
    pub step: u64,
    /// Its validation loss.
    pub validation_loss: f64,
}

/// What stands in the file. A decimal number need not come back to the last bit, and a resumed run
/// must decide as the uninterrupted one does: the bits decide, the number is for people.
#[derive(Serialize, Deserialize)]
struct Written {
    step: u64,
    validation_loss: f64,
    validation_loss_bits: u64,
}

/// Notes the best step in `run_dir`, atomically.
///
/// # Errors
/// If the loss is not finite or the file cannot be written.
pub fn write_best(run_dir: &Path, best: &Best) -> Result<(), CheckpointError> {
    if !best.validation_loss.is_finite() {
        return Err(CheckpointError::BadLoss { found: best.validation_loss });
    }
    let written = Written {
        step: best.step,
        validation_loss: best.validation_loss,
        validation_loss_bits: best.validation_loss.to_bits(),
    };
    let text = format!("{:#}\n", serde_json::json!(written));
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
        Ok(written) => {
            Ok(Some(Best { step: written.step, validation_loss: f64::from_bits(written.validation_loss_bits) }))
        }
        Err(error) => Err(CheckpointError::BadBest { path, reason: error.to_string() }),
    }
}

fn path_in(run_dir: &Path) -> PathBuf {
    run_dir.join("best.json")
}
