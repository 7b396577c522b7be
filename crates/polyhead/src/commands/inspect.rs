//! Verbs that look without training: `ls`, `cp`, `cat`, `doctor`, `tokenizer train`.

use std::path::{Path, PathBuf};

use polyhead_data::train_bpe;

use super::must_not_exist;
use crate::assemble;
use crate::console::{print, put, talk};
use crate::device;
use crate::recipe::{self, Loaded};
use crate::report::Failure;

/// Lists recipes with the comment that each begins with.
pub fn ls() -> Result<(), Failure> {
    let folder = assemble::project_root().join("recipes");
    let mut found = Vec::new();
    collect(&folder, &mut found)?;
    found.sort();
    for path in found {
        let text = std::fs::read_to_string(&path)?;
        let about = text.lines().next().and_then(|line| line.strip_prefix("# ")).unwrap_or_default();
        let path = path.strip_prefix("./").unwrap_or(&path);
        put!("{:<44} {about}", path.display())?;
    }
    Ok(())
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) -> Result<(), Failure> {
    for entry in std::fs::read_dir(folder)? {
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
    let text = std::fs::read_to_string(from).map_err(|e| Failure::Run(format!("{}: {e}", from.display())))?;
    std::fs::write(to, text).map_err(|e| Failure::Run(format!("{}: {e}", to.display())))?;
    put!("{}", to.display())?;
    Ok(())
}

/// Prints the resolved recipe.
pub fn cat(loaded: &Loaded) -> Result<(), Failure> {
    print(format_args!("{}", recipe::resolved(&loaded.recipe)?))
}

/// Prints what this machine and this binary can do.
pub fn doctor() -> Result<(), Failure> {
    put!("polyhead   {}", env!("CARGO_PKG_VERSION"))?;
    put!("devices    {}", device::usable().join(", "))?;
    for name in device::NAMES {
        if let Err(problem) = device::open(name) {
            put!("           {problem}")?;
        }
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    put!("cores      {cores}")?;
    let docs = polyhead_data::documents(
        &polyhead_data::DataConfig::RustDocs(polyhead_data::RustDocsConfig {}),
        &assemble::project_root(),
    );
    match docs {
        Ok((_, words)) => put!("text       {words}")?,
        Err(error) => put!("text       {error}")?,
    }
    let writable = tempfile_in_place();
    put!(
        "folder     {}",
        if writable { "checkpoints can be written here" } else { "this folder cannot be written to; use --out" }
    )?;
    Ok(())
}

fn tempfile_in_place() -> bool {
    let probe = Path::new(".polyhead-doctor");
    let written = std::fs::write(probe, b"").is_ok();
    let _ = std::fs::remove_file(probe);
    written
}

/// Learns a tokenizer from the text of a recipe.
pub fn train_tokenizer(loaded: &Loaded, vocab_size: usize, out: &Path) -> Result<(), Failure> {
    must_not_exist(out)?;
    let (documents, words) = polyhead_data::documents(&loaded.recipe.data, &assemble::project_root())?;
    talk!("learning {vocab_size} tokens from {words}");
    let learnt = train_bpe(documents.into_iter().map(|document| document.text), vocab_size, out)?;
    talk!("wrote {learnt} tokens to {}", out.display());
    talk!("next: tokenizer.huggingface.path={}", out.display());
    Ok(())
}
