//! `polyhead tune embedding`: what soft injection blends in.

use std::path::PathBuf;

use burn::tensor::{Int, Tensor, TensorData};
use clap::Args;
use polyhead_models::intervention::task_embedding;
use polyhead_models::weights::{Named, to_safetensors};
use polyhead_runs::Failure;
use polyhead_training::run_folder::atomic_write;

use super::plain;
use crate::commands::generate;
use crate::console::talk;

/// What an embedding is the mean of.
#[derive(Debug, Args)]
pub struct EmbeddingArgs {
    /// A checkpoint or a run folder.
    checkpoint: PathBuf,
    /// A file of prompts with examples, one a line; of a .jsonl file, the "prompt" of each row.
    #[arg(long, value_name = "FILE")]
    prompts: PathBuf,
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
    let tokenizer = trained.text_tokenizer()?;
    let prompts = generate::prompts(&args.prompts)?;
    let ids = prompts.iter().map(|text| tokenizer.encode_prompt(text)).collect::<Result<Vec<_>, _>>()?;
    // One after the other: prompts differ in length.
    let of_prompt = |ids: &Vec<u32>| {
        let data: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        let data = TensorData::new(data, [1, ids.len()]);
        task_embedding(&trained.model, Tensor::<2, Int>::from_data(data, &trained.model.device()))
    };
    let sum = ids.iter().filter(|ids| !ids.is_empty()).map(of_prompt).reduce(|a, b| a + b);
    let sum = sum.ok_or_else(|| Failure::Run(format!("{}: every prompt is empty", args.prompts.display())))?;
    let mean = sum / ids.iter().filter(|ids| !ids.is_empty()).count() as f64;
    let shape = mean.dims().to_vec();
    let named =
        Named { name: "embedding".into(), shape: shape.clone(), values: mean.into_data().iter::<f32>().collect() };
    let bytes = to_safetensors(&[named], &[("format", "polyhead".into())])?;
    atomic_write(&args.out, &bytes)?;
    talk!("wrote embedding {shape:?}, the mean of {} prompts, to {}", prompts.len(), args.out.display());
    Ok(())
}
