//! Labelled examples for classifiers: images, audio, texts and features, from files or generated.
//!
//! An example is a pure function of (seed, side, epoch, index), what augmentation draws included. Sources that read files
//! hand over [`Found`], those that generate implement [`Maker`].

mod audio;
mod class_folders;
mod classes;
mod feature_pairs;
mod feature_table;
mod features;
mod found;
mod generated;
mod images;
mod labelled_text;
mod layer_features;

pub use audio::{ChirpsConfig, WavFolderConfig};
pub use feature_pairs::{FeaturePairsConfig, open_features, open_labels};
pub use feature_table::FeatureTableConfig;
pub use features::{FeatureArray, FeaturesConfig, NewFeatures, NewPairs};
pub use images::{CifarConfig, CsvImagesConfig, IdxConfig, ImageFolderConfig, ShapesConfig};
pub use labelled_text::LabelledTextConfig;
pub use layer_features::LayerFeaturesConfig;

use found::Found;
pub(crate) use found::divide;
use generated::{Maker, generated};

/// The field of a row that holds its class, unless a recipe says another.
fn label() -> String {
    "label".into()
}

#[cfg(test)]
mod tests;
