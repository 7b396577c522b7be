//! `polyhead ls`, `cp` and `cat`: the recipes at hand.

use std::path::{Path, PathBuf};

use polyhead_recipe::{self as recipe, Loaded};
use polyhead_runs::Failure;
use polyhead_runs::data::project_root;
use polyhead_training::run_folder::atomic_write;

use super::must_not_exist;
use crate::console::{print, put};

/// Lists recipes with the comment that each begins with.
pub fn ls() -> Result<(), Failure> {
    let folder = project_root().join("recipes");
    let mut found = Vec::new();
    collect(&folder, &mut found)?;
    found.sort();
    for path in found {
        let text = std::fs::read_to_string(&path)?;
        let about = text.lines().next().and_then(|line| line.strip_prefix("# ")).unwrap_or_default();
        put!("{:<44} {about}", shown(&path).display())?;
    }
    Ok(())
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) -> Result<(), Failure> {
    for entry in std::fs::read_dir(folder).map_err(|error| Failure::file("read", folder, error))? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, found)?;
        } else if path.extension().is_some_and(|ending| ending == "toml") {
            found.push(path);
        }
    }
    Ok(())
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
