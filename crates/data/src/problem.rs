//! Rules for settings, each with the field that breaks it.

use std::path::PathBuf;

pub(crate) use polyhead_models::{require, require_range as within};

/// A setting that breaks a rule.
pub type Problem = polyhead_models::ConfigError;

/// Checks the height and width of images.
pub(crate) fn image_size(size: [usize; 2]) -> Result<(), Problem> {
    let problem = || format!("size ({size:?}) must be height and width, each from 1 to 4096");
    require(size.iter().all(|side| (1..=4096).contains(side)), "size", problem)
}

/// Refuses an empty list of paths.
pub(crate) fn some_path<T>(paths: &[T]) -> Result<(), Problem> {
    require(!paths.is_empty(), "paths", || "paths is empty: name at least one file, folder or pattern".into())
}

/// Whether a setting is as it is without being set: recipes that are written say only what differs.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Paths as text.
pub(crate) fn shown<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Vec<String> {
    paths.into_iter().map(|path| path.display().to_string()).collect()
}
