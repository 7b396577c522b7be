//! What the folder of a run in stages records: what each finished stage did.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Failure;
use polyhead_training::run_folder::files::STAGES;

/// What a finished stage did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    /// Its name.
    pub name: String,
    /// Its run folder, inside the folder of the whole run.
    pub folder: String,
    /// Steps of training; `None` of a conversion.
    pub steps: Option<u64>,
    /// Weights of the model.
    pub parameters: u64,
    /// Bytes in f32 that decoding keeps per token.
    pub kv_bytes_per_token: u64,
    /// Nats per held-out target before; `None` where there was no model yet.
    pub loss_before: Option<f64>,
    /// Nats per held-out target after.
    pub loss: f64,
    /// Nats per target: how far predictions are from those before.
    pub divergence: Option<f64>,
}

/// The folder of the last finished stage, if `path` is the folder of a run in stages.
///
/// # Errors
/// If its record cannot be read.
pub fn last_finished(path: &Path) -> Result<Option<PathBuf>, Failure> {
    let records = read_records(path)?;
    Ok(records.last().map(|record| path.join(&record.folder)))
}

/// What the finished stages of a run did; nothing where there are none.
///
/// # Errors
/// If the record cannot be read.
pub fn read_records(out: &Path) -> Result<Vec<StageRecord>, Failure> {
    let file = out.join(STAGES);
    match std::fs::read(&file) {
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            Ok(Vec::new())
        }
        Err(error) => Err(Failure::file("read", &file, error)),
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map_err(|error| Failure::Run(format!("{}: {error}", file.display())))
        }
    }
}
