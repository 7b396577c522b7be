//! `polyhead embed`: one vector for each text, and how well queries find their documents by them.

use std::path::PathBuf;

use burn::tensor::{Tensor, TensorData};
use clap::Args;
use polyhead_data::{DataError, open_features};
use polyhead_models::weights::{Named, to_safetensors};
use polyhead_models::{Retrieval, Trainable};
use polyhead_training::run_folder::atomic_write;
use serde_json::{Value, json};

use super::must_not_exist;
use super::new_folder::sweep;
use crate::allowed::caller;
use crate::cli::at_least_one;
use crate::console::{put, talk};
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use polyhead_runs::embedder::open_embedder;

/// What is embedded by what.
#[derive(Debug, Args)]
pub struct EmbedArgs {
    /// A run of model.embedder, or a checkpoint of one.
    pub checkpoint: PathBuf,
    /// What `polyhead features` made of texts, from the model whose features the embedder learned; with --pairs, retrieval is
    /// measured.
    #[arg(long)]
    pub features: PathBuf,
    /// The safetensors file to write: `embeddings` [n, dim], of pairs [n, parts, dim]. Default: none, only measured.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Texts at a time.
    #[arg(long, default_value_t = 256, value_parser = at_least_one)]
    pub batch_size: usize,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    pub device: Option<String>,
}

/// Embeds features, writes the embeddings and prints what they find.
pub fn embed(args: &EmbedArgs) -> Result<(), Failure> {
    args.out.as_deref().map_or(Ok(()), must_not_exist)?;
    let Some(trained) = open_embedder(&args.checkpoint, args.device.as_deref(), caller())? else {
        let problem = format!("{}: a run of model.embedder is needed", args.checkpoint.display());
        return Err(Problems::plain(problem).into());
    };
    let features = open_features(&args.features)?;
    let (n, parts, layers, dim) = match features.shape()[..] {
        [n, layers, dim] => (n, 1, layers, dim),
        [n, parts, layers, dim] => (n, parts, layers, dim),
        ref shape => {
            let problem = format!("{}: {shape:?} are not features of texts", args.features.display());
            return Err(Problems::plain(problem).into());
        }
    };
    if [layers, dim] != trained.input {
        let problem = format!(
            "{} holds features of {layers} layers of {dim} numbers; {} learned {} of {}",
            args.features.display(),
            trained.path.display(),
            trained.input[0],
            trained.input[1]
        );
        return Err(Problems::plain(problem).into());
    }
    let device = trained.model.device();
    let (texts, size) = (n * parts, layers * dim);
    let mut embeddings = Vec::with_capacity(texts * dim);
    for start in (0..texts).step_by(args.batch_size) {
        let end = texts.min(start + args.batch_size);
        let data = TensorData::new(features.floats(start * size..end * size)?, [end - start, layers, dim]);
        embeddings.extend(trained.model.embed(Tensor::from_data(data, &device)).into_data().iter::<f32>());
    }
    if parts > 1 {
        let measured = |embeddings: &[f32]| retrieval(embeddings, parts, dim);
        let of_layer = |layer: usize| -> Result<Value, DataError> {
            let mut rows = Vec::with_capacity(texts * dim);
            for text in 0..texts {
                let start = text * size + layer * dim;
                rows.extend(unit(&features.floats(start..start + dim)?));
            }
            Ok(measured(&rows))
        };
        let plain = (0..layers).map(of_layer).collect::<Result<Vec<_>, _>>()?;
        let result = json!({
            "checkpoint": trained.path, "pairs": n, "embedder": measured(&embeddings), "layers": plain,
        });
        put!("{result:#}")?;
    }
    let Some(out) = &args.out else { return Ok(()) };
    let shape = if parts == 1 { vec![n, dim] } else { vec![n, parts, dim] };
    let named = Named { name: "embeddings".into(), shape, values: embeddings };
    sweep(out.parent().unwrap_or(std::path::Path::new("")))?;
    atomic_write(out, &to_safetensors(&[named], &[])?)?;
    talk!("wrote {texts} embeddings of {dim} numbers to {}", out.display());
    Ok(())
}

/// How well queries find their documents among all documents, those that belong to none included.
fn retrieval(embeddings: &[f32], parts: usize, dim: usize) -> Value {
    let part =
        |part: usize| embeddings.chunks(parts * dim).flat_map(move |row| row[part * dim..(part + 1) * dim].to_vec());
    let documents: Vec<f32> = (1..parts).flat_map(part).collect();
    let numbers = Retrieval::of(&part(0).collect::<Vec<f32>>(), &documents, dim).numbers();
    Value::Object(numbers.into_iter().map(|(name, value)| (name, json!(value))).collect())
}

/// The same direction with length 1.
fn unit(row: &[f32]) -> Vec<f32> {
    let length = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
    row.iter().map(|x| x / length).collect()
}
