//! `polyhead ls`, `cp` and `cat`: the recipes at hand.

use std::path::Path;

use polyhead_recipe::nearest::recipes_below;
use polyhead_recipe::{self as recipe, Loaded};
use polyhead_runs::Failure;
use polyhead_runs::data::recipes_folder;
use polyhead_training::run_folder::atomic_write;

use super::must_not_exist;
use crate::console::{print, put};

/// Lists the recipes of a folder with the first sentence of the comment that each begins with. Without one: the folder
/// `recipes` here, or else the project's.
pub fn ls(folder: Option<&Path>) -> Result<(), Failure> {
    let folder = folder.map_or_else(recipes_folder, Path::to_owned);
    std::fs::read_dir(&folder).map_err(|error| Failure::file("read", &folder, error))?;
    for path in recipes_below(&folder) {
        put!("{:<44} {}", shown(&path).display(), about(&std::fs::read_to_string(&path)?))?;
    }
    Ok(())
}

/// The first sentence of the comment that a recipe begins with.
fn about(text: &str) -> String {
    let lines = text.lines().map_while(|line| line.strip_prefix("# "));
    let comment = lines.collect::<Vec<_>>().join(" ");
    let sentence = comment.split_inclusive(". ").next().unwrap_or_default();
    sentence.trim_end().to_owned()
}

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
    print(format_args!("{}", recipe::resolved(&loaded.recipe)?))
}

/// A path as a person would type it.
pub fn shown(path: &Path) -> &Path {
    path.strip_prefix("./").unwrap_or(path)
}
