//! `polyhead cp` and `cat`: a recipe to edit, and one with every default.

use std::path::Path;

use polyhead_recipe::{self as recipe, Loaded};
use polyhead_runs::Failure;
use polyhead_training::run_folder::atomic_write;
use serde_json::json;

use super::must_not_exist;
use crate::console::{print, put, wants_json};

/// Copies a recipe.
pub fn cp(from: &Path, to: &Path) -> Result<(), Failure> {
    must_not_exist(to)?;
    let text = recipe::read_file(from)?;
    if let Some(folder) = to.parent() {
        std::fs::create_dir_all(folder).map_err(|error| Failure::file("create", folder, error))?;
    }
    atomic_write(to, text.as_bytes())?;
    put!("{}", to.display())
}

/// Prints the resolved recipe.
pub fn cat(loaded: &Loaded) -> Result<(), Failure> {
    match wants_json() {
        true => put!("{:#}", json!(loaded.recipe)),
        false => print(format_args!("{}", recipe::resolved(&loaded.recipe)?)),
    }
}
