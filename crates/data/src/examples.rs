//! Labelled examples for classifiers: images, audio, texts and features, from files or generated.
//!
//! An example is a pure function of (seed, side, epoch, index), what augmentation draws included. Sources that read files
//! hand over [`Found`], those that generate implement [`Maker`].

mod audio;
mod class_folders;
mod classes;
mod feature_pairs;
mod features;
mod found;
mod generated;
mod images;
mod labelled_text;
mod layer_features;
mod loader;

use polyhead_models::InputShape;

use crate::{DataError, Tokenizer};

pub use audio::{ChirpsConfig, WavFolderConfig};
pub use feature_pairs::{FeaturePairsConfig, PairLoader, Paired, read_features};
pub use features::{FeaturesConfig, NewFeatures, NewPairs};
pub use images::{AugmentConfig, CifarConfig, CsvImagesConfig, IdxConfig, ImageFolderConfig, ShapesConfig};
pub use labelled_text::LabelledTextConfig;
pub use layer_features::LayerFeaturesConfig;
pub use loader::ExampleLoader;

use found::{Found, divide};
use generated::{Maker, generated};

/// An example with its class.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Example {
    /// What is classified.
    pub content: Content,
    /// Its class.
    pub label: u32,
    /// Its group; 0 where the data has none.
    pub group: u32,
}

/// What is classified: of the shape that its set tells.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Content {
    /// Pixels, or features.
    Numbers(Vec<f32>),
    /// Token ids, not padded.
    Tokens(Vec<u32>),
}

/// A set of examples of one shape.
pub(crate) trait ExampleSet: Send + Sync {
    /// The shape of an input.
    fn shape(&self) -> InputShape;

    /// Examples of an epoch.
    fn per_epoch(&self) -> u64;

    /// Example `index` of any epoch, before augmentation.
    ///
    /// # Errors
    /// If it cannot be read.
    fn example(&self, index: u64) -> Result<Example, DataError>;
}

/// Labelled data, ready to use.
pub struct Labelled {
    /// Batches to train on, without end.
    pub train: ExampleLoader,
    /// Batches to validate on.
    pub validation: ExampleLoader,
    /// The names of the classes.
    pub classes: Vec<String>,
    /// Training examples of each class; where they are generated without end, equally many.
    pub counts: Vec<u64>,
    /// The names of the groups by which a model is asked to be equally good; none where the data has none.
    pub groups: Vec<String>,
    /// For text.
    pub tokenizer: Option<Tokenizer>,
    /// What the data is, in words.
    pub description: String,
    /// What was left out, changed or guessed, with counts.
    pub notes: Vec<String>,
    /// For files: a hash of what was read, which tells whether they have changed.
    pub text_hash: Option<String>,
}

#[cfg(test)]
mod tests;
