//! Recipes: what a person wrote (layers of TOML), and what it means (typed tables).
//!
//! A recipe is read in layers: the file that `extends` names, the file itself, `key=value` from the command line. Every
//! problem is reported with the layer, line and column of the key it is about. Nothing here opens data or a device.

pub mod conversion;
mod device;
mod differences;
pub mod flags;
mod growth;
mod intervention;
pub mod layers;
mod load;
pub mod nearest;
mod problem;
pub mod reference;
mod rules;
pub mod schema;
mod settings;
pub mod stages;

pub use conversion::Conversion;
pub use device::{DEVICE_NAMES, DEVICES, Which, device_name, has_own_memory, parse_device};
pub use differences::{Difference, MAY_CHANGE, all_differences, differences, differences_of, hyperparameters};
pub use growth::Growth;
pub use intervention::StatedIntervention;
pub use layers::{Layer, read_file, read_layer};
pub use load::{Loaded, from_layers, load, override_layers, read_layers, resolved, with_base};
pub use problem::{Problem, Problems, in_words};
pub use settings::{GenerationConfig, LoaderConfig, ModelConfig, Recipe};

/// A name as part of a folder's name: lower-case letters, digits and single hyphens.
pub fn folder_name(name: &str) -> String {
    let plain: String = name.chars().map(|sign| if sign.is_alphanumeric() { sign } else { ' ' }).collect();
    plain.to_lowercase().split_whitespace().collect::<Vec<_>>().join("-")
}
