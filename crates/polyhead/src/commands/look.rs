//! Verbs that look without training: `ls`, `cp`, `cat`, `doctor`, `tokenizer train`.

use std::path::{Path, PathBuf};

use polyhead_data::train_bpe;
use polyhead_training::available_memory_bytes;
use polyhead_training::run_folder::atomic_write;

use super::must_not_exist;
use crate::console::{bytes, print, put, talk};
use polyhead_recipe::{self as recipe, Loaded};
use polyhead_runs::Failure;
use polyhead_runs::data::project_root;
use polyhead_runs::device;

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

/// Prints what this machine and this binary can do, and what to do about the rest.
pub fn doctor() -> Result<(), Failure> {
    let slow = if cfg!(debug_assertions) { " (a debug build, which is slow: use cargo build --release)" } else { "" };
    put!("polyhead   {}{slow}", env!("CARGO_PKG_VERSION"))?;
    put!("devices    {}", device::usable().join(", "))?;
    for problem in polyhead_recipe::DEVICES.iter().filter_map(|name| device::open(name).err()) {
        put!("           {problem}")?;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (threads, set) = (polyhead_kernels::threads(), polyhead_kernels::instruction_set());
    put!("CPU        {cores} cores; {threads} threads (RAYON_NUM_THREADS sets them); instruction set: {set}")?;
    if let Some(memory) = available_memory_bytes() {
        put!("memory     {} available", bytes(memory))?;
    }
    let rust_docs = polyhead_data::DataConfig::RustDocs(polyhead_data::RustDocsConfig {});
    match rust_docs.documents(&project_root()) {
        Ok(found) => put!("text       {}", found.description)?,
        Err(error) => put!("text       {error}")?,
    }
    let recipes = project_root().join("recipes");
    match recipes.is_dir() {
        true => put!("recipes    {} (`polyhead ls`)", shown(&recipes).display())?,
        false => put!("recipes    none in {}; `polyhead reference` tells what one may say", recipes.display())?,
    }
    for (name, folder, way_out) in [
        ("runs", "checkpoints", "train with --out DIR"),
        ("tokens", "datasets/cache", "text is turned into tokens anew each time"),
    ] {
        match try_writing(Path::new(folder)) {
            Ok(()) => put!("{name:<10} {folder} can be written")?,
            Err(problem) => put!("{name:<10} {folder} cannot be written ({problem}): {way_out}")?,
        }
    }
    Ok(())
}

/// Writes and removes a file in a folder, or in the nearest one above that exists.
fn try_writing(folder: &Path) -> std::io::Result<()> {
    let exists = folder.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
    let probe = exists.join(format!(".polyhead-doctor-{}", std::process::id()));
    std::fs::write(&probe, b"")?;
    std::fs::remove_file(&probe)
}

/// A path as a person would type it.
fn shown(path: &Path) -> &Path {
    path.strip_prefix("./").unwrap_or(path)
}

/// Learns a tokenizer from the text of a recipe.
pub fn train_tokenizer(loaded: &Loaded, vocab_size: usize, out: &Path) -> Result<(), Failure> {
    must_not_exist(out)?;
    let found = loaded.recipe.data.documents(&project_root())?;
    talk!("learning {vocab_size} tokens from {}", found.description);
    found.notes.iter().for_each(|note| talk!("note: {note}"));
    let learned = train_bpe(found.texts.into_iter().map(|document| document.text), vocab_size, out)?;
    talk!("wrote {learned} tokens to {}", out.display());
    talk!("next: tokenizer.huggingface.path={}", out.display());
    Ok(())
}
