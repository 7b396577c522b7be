//! How data is opened, whatever it is.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::augment::AugmentConfig;

/// Everything about data besides what it is.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Tokens per row.
    pub seq_len: usize,
    /// Rows per batch.
    pub batch_size: usize,
    /// Decides order and generated samples.
    pub seed: u64,
    /// Whether tokens of a row attend across documents.
    pub packing: Packing,
    /// How images are augmented in training.
    pub augmentation: AugmentConfig,
    /// Share of a text kept for validation.
    pub validation_fraction: f64,
    /// What is kept out of training to track a model on it, where anybody does.
    pub tracking: Option<Tracking>,
    /// Validation samples of a generated set.
    pub validation_samples: u64,
    /// Where token files are kept.
    pub cache_dir: PathBuf,
    /// The project's folder, for its own text.
    pub project_root: PathBuf,
}

/// Texts that are neither trained nor validated on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tracking {
    /// Share of a text.
    pub fraction: f64,
    /// How many texts at most, each of up to `seq_len` tokens.
    pub texts: usize,
}

/// Whether tokens of a row see documents before their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// They do: a plain stream, cut anywhere.
    #[default]
    Stream,
    /// They do not: attention stays inside documents, and nothing is predicted across their ends.
    Documents,
}
