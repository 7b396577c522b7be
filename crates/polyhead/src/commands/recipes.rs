//! `polyhead ls`, `cp` and `cat`: the recipes at hand.

use std::path::{Path, PathBuf};

use polyhead_recipe::nearest::{is_recipe, recipes_below};
use polyhead_recipe::{self as recipe, Loaded};
use polyhead_runs::Failure;
use polyhead_runs::data::recipes_folder;
use polyhead_training::run_folder::atomic_write;

use super::must_not_exist;
use crate::console::{print, put};

/// The keys of which every recipe, every comparison and every run in stages has one.
const KEYS: [&str; 4] = ["extends", "model", "arm", "stage"];

/// Lists the recipes of a folder with the first sentence of the comment that each begins with. Without one: those here and in
/// the folder `recipes`, or else the project's.
pub fn ls(folder: Option<&Path>) -> Result<(), Failure> {
    let recipes = match folder {
        Some(folder) => {
            std::fs::read_dir(folder).map_err(|error| Failure::file("read", folder, error))?;
            recipes_below(folder)
        }
        None => {
            let is_one = |path: &PathBuf| {
                let layer = is_recipe(path).then(|| recipe::read_layer(path).ok()).flatten();
                layer.is_some_and(|layer| KEYS.iter().any(|key| layer.values().contains_key(*key)))
            };
            let mut here: Vec<_> = std::fs::read_dir(".")?.filter_map(|entry| Some(entry.ok()?.path())).collect();
            here.retain(is_one);
            here.sort();
            here.extend(recipes_below(Path::new("recipes")));
            if here.is_empty() { recipes_below(&recipes_folder()) } else { here }
        }
    };
    for path in recipes {
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
