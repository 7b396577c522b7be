//! Rules for settings, each with the field that breaks it.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;

/// A setting that breaks a rule: the field, and the problem in words.
pub type Problem = (&'static str, String);

/// `Ok` if `rule` holds.
pub(crate) fn require(rule: bool, field: &'static str, problem: impl FnOnce() -> String) -> Result<(), Problem> {
    if rule { Ok(()) } else { Err((field, problem())) }
}

/// `Ok` if a value is in a range.
pub(crate) fn within<T: PartialOrd + Display>(
    field: &'static str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<(), Problem> {
    let rule = || format!("{field} ({value}) must be {} to {}", range.start(), range.end());
    require(range.contains(&value), field, rule)
}

/// Checks the height and width of images.
pub(crate) fn image_size(size: [usize; 2]) -> Result<(), Problem> {
    let problem = || format!("size ({size:?}) must be height and width, each from 1 to 4096");
    require(size.iter().all(|side| (1..=4096).contains(side)), "size", problem)
}

/// Refuses an empty list of paths.
pub(crate) fn some_path<T>(paths: &[T]) -> Result<(), Problem> {
    require(!paths.is_empty(), "paths", || "paths is empty: name at least one file, folder or pattern".into())
}

/// Paths as text.
pub(crate) fn shown<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Vec<String> {
    paths.into_iter().map(|path| path.display().to_string()).collect()
}
