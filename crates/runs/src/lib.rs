//! Runs: from a recipe to its parts (data, model, device) and from a run folder back to a trained model; what a run costs, and
//! what its folder contains.

pub mod answer;
pub mod base;
pub mod classifier;
mod convert;
pub mod costs;
pub mod data;
pub mod decoder;
pub mod device;
pub mod embedder;
mod error;
pub mod hub;
pub mod intervention;
pub mod kind;
pub mod peft;
pub mod pretrained;
pub mod probe;
pub mod resolve;
pub mod result;
pub mod stages;
pub mod super_resolution;
pub mod text;
pub mod trained;

use std::path::{Path, PathBuf};

use polyhead_models::weights::{FrozenDtype, NonFinite, Reading};

pub use convert::{Calibration, convert};
pub use error::Failure;
pub use resolve::Resolved;
pub use trained::{Trained, open_decoder, open_trained};

/// What the caller of a library allows, and where its notes and warnings go.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// Whether weights may be NaN or infinite.
    pub nonfinite: NonFinite,
    /// The type in which weights are kept that are read to be used alone.
    pub frozen: FrozenDtype,
    /// Takes notes and warnings, a line each.
    pub tell: fn(&str),
    /// Takes what is being done that may be long, how much of it is done, and how much there is.
    pub progress: fn(&'static str, u64, u64),
    /// Where the base model is of a checkpoint that has only what LoRA learned, if it is not where it was.
    pub base: Option<&'static Path>,
    /// The folder of a model that is not named by a path, such as `org/name` of a hub; `None` where the name can only be one.
    pub hub: fn(&Path) -> Result<Option<PathBuf>, Failure>,
    /// The cache that it looks into, which messages name.
    pub hub_cache: fn() -> PathBuf,
}

impl Caller {
    /// How weights are read.
    fn reading(self) -> Reading {
        Reading { nonfinite: self.nonfinite, frozen: self.frozen }
    }

    /// Tells how far the reading of a model is.
    fn loading(self) -> impl FnMut(u64, u64) {
        move |done, all| (self.progress)("loading", done, all)
    }

    /// Where a model is that a person names: what is there by that path, else by the hub.
    ///
    /// # Errors
    /// If the hub knows such names, but not this model.
    pub fn locate(&self, name: &Path) -> Result<PathBuf, Failure> {
        let found = if name.exists() { None } else { (self.hub)(name)? };
        Ok(found.unwrap_or_else(|| name.to_owned()))
    }
}
