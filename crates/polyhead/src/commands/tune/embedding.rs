//! `polyhead tune embedding`: what soft injection blends in.

use std::path::{Path, PathBuf};

use clap::Args;
use polyhead_models::Batch;
use polyhead_models::intervention::{random_embedding, task_embedding};
use polyhead_models::weights::{Named, to_safetensors};
use polyhead_recipe::layers::parse_layer;
use polyhead_recipe::{from_layers, override_layers, resolved};
use polyhead_runs::data::open_tokens;
use polyhead_runs::{Failure, Trained};
use polyhead_training::run_folder::atomic_write;

use super::plain;
use crate::cli::at_least_one;
use crate::commands::generate;
use crate::console::talk;

/// What an embedding is the mean of.
#[derive(Debug, Args)]
pub struct EmbeddingArgs {
    /// A checkpoint or a run folder.
    checkpoint: PathBuf,
    /// Changes of the model's recipe, whose held-out rows are the prompts, such as data.in_context.task=0.
    #[arg(value_name = "KEY=VALUE", conflicts_with = "prompts")]
    overrides: Vec<String>,
    /// A file of prompts with examples, one a line, in the place of held-out rows; of a .jsonl file, the "prompt" of each row.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Held-out batches at most.
    #[arg(long, default_value_t = 8, conflicts_with = "prompts", value_parser = at_least_one)]
    batches: usize,
    /// Write random directions of the same lengths in its place, to compare with; the number decides which.
    #[arg(long, value_name = "SEED")]
    random: Option<u64>,
    /// The safetensors file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    device: Option<String>,
}

/// Writes the embedding.
pub fn embedding(args: &EmbeddingArgs) -> Result<(), Failure> {
    let trained = plain(&args.checkpoint, args.device.as_deref(), &args.out)?;
    let batches = match &args.prompts {
        Some(file) => typed(&trained, file)?,
        None => held_out(&trained, args)?,
    };
    let prompts = batches.iter().map(|batch| batch.batch).sum::<usize>();
    let mean = task_embedding(&trained.model, &batches);
    let written = match args.random {
        Some(seed) => random_embedding(&mean, seed),
        None => mean,
    };
    let shape = written.dims().to_vec();
    let named =
        Named { name: "embedding".into(), shape: shape.clone(), values: written.into_data().iter::<f32>().collect() };
    let bytes = to_safetensors(&[named], &[("format", "polyhead".into())])?;
    atomic_write(&args.out, &bytes)?;
    let what = if args.random.is_some() { "as long as the mean" } else { "the mean" };
    talk!("wrote embedding {shape:?}, {what} of {prompts} prompts, to {}", args.out.display());
    Ok(())
}

/// Prompts of a file, a batch each: they differ in length.
fn typed(trained: &Trained, file: &Path) -> Result<Vec<Batch>, Failure> {
    let tokenizer = trained.text_tokenizer()?;
    let prompts = generate::prompts(file)?;
    let ids = prompts.iter().map(|text| tokenizer.encode_prompt(text)).collect::<Result<Vec<_>, _>>()?;
    let batches: Vec<Batch> = ids.into_iter().filter(|ids| !ids.is_empty()).map(Batch::text).collect();
    match batches.is_empty() {
        true => Err(Failure::Run(format!("{}: every prompt is empty", file.display()))),
        false => Ok(batches),
    }
}

/// Held-out rows of the model's recipe with the changes.
fn held_out(trained: &Trained, args: &EmbeddingArgs) -> Result<Vec<Batch>, Failure> {
    let Some(recipe) = &trained.recipe else {
        let path = trained.path.display();
        return Err(Failure::Run(format!("{path} says nothing about data: give prompts, one a line, with --prompts")));
    };
    let own = parse_layer(&format!("the recipe of {}", trained.path.display()), &resolved(recipe)?)?;
    let layers = [own].into_iter().chain(override_layers(&args.overrides)?).collect();
    let held_out = open_tokens(&from_layers(layers)?.recipe, trained.tokenizer.as_ref())?.validation;
    let count = held_out.batches_per_epoch().min(args.batches as u64);
    Ok((0..count).map(|at| held_out.batch(at)).collect::<Result<_, _>>()?)
}
