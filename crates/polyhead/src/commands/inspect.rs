//! Verbs that look without training: `ls`, `cp`, `cat`, `plan`, `doctor`, `tokenizer train`.

use std::path::{Path, PathBuf};

use polyhead_data::train_bpe;

use super::must_not_exist;
use crate::assemble;
use crate::console::{bytes, print, put, talk, thousands};
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

/// Prints what a recipe costs.
pub fn plan(loaded: &Loaded) -> Result<(), Failure> {
    let recipe = &loaded.recipe;
    let opened = assemble::data(recipe, &mut |_, _| {})?;
    let (training, seq_len) = (&recipe.training, recipe.training.seq_len as u64);
    let parts = recipe.model.decoder().parts(opened.vocab_size);
    put!("{:<34} {:>14} {:>18} {:>16}", "part", "parameters", "FLOPs per token", "KV B per token")?;
    let (mut parameters, mut flops, mut cached) = (0, 0, 0);
    for part in &parts {
        // Under a causal mask a query sees (seq_len + 1) / 2 keys on average.
        let part_flops = part.cost.flops_per_token + part.cost.flops_per_pair * (seq_len + 1) / 2;
        let part_cached = 4 * part.cost.cached_numbers_per_token;
        let (a, b, c) = (thousands(part.cost.parameters), thousands(part_flops), thousands(part_cached));
        put!("{:<34} {a:>14} {b:>18} {c:>16}", part.name)?;
        parameters += part.cost.parameters;
        flops += part_flops;
        cached += part_cached;
    }
    put!("{:<34} {:>14} {:>18} {:>16}", "all", thousands(parameters), thousands(flops), thousands(cached))?;
    let per_step = seq_len * (training.batch_size * training.gradient_accumulation_steps) as u64;
    let tokens = per_step * training.steps;
    put!("\nFLOPs are of a forward pass at seq_len {seq_len}; training takes about three times as many.")?;
    put!("steps      {} of {} tokens: {} in all", thousands(training.steps), thousands(per_step), thousands(tokens))?;
    put!("data       {}", opened.description)?;
    put!(
        "           one epoch is {} steps",
        thousands(opened.train.batches_per_epoch() / training.gradient_accumulation_steps as u64)
    )?;
    put!("compute    {:.2e} FLOPs", 3.0 * flops as f64 * tokens as f64)?;
    put!("memory     {} for weights, gradients and optimiser; activations come on top", bytes(16 * parameters))?;
    let kept = recipe.checkpoint.keep_latest_k.max(1) as u64 + 1;
    put!("disk       {} for {kept} checkpoints", bytes(12 * parameters * kept))?;
    Ok(())
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
