//! `polyhead embed`: one vector for each text, and how well queries find their documents by them.

use std::collections::BTreeSet;
use std::path::PathBuf;

use burn::tensor::{Tensor, TensorData};
use clap::Args;
use polyhead_data::{DataError, open_features, open_labels};
use polyhead_evaluation::grouping::{Grouping, grouped};
use polyhead_models::weights::{Named, to_safetensors};
use polyhead_models::{Retrieval, Trainable};
use polyhead_training::run_folder::atomic_write;
use serde_json::{Value, json};

use super::must_not_exist;
use super::new_folder::sweep;
use crate::allowed::caller;
use crate::cli::at_least_one;
use crate::console::{progress, put, talk};
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use polyhead_runs::embedder::open_embedder;

/// What is embedded by what.
#[derive(Debug, Args)]
pub struct EmbedArgs {
    /// A run of model.embedder, or a checkpoint of one.
    pub checkpoint: PathBuf,
    /// What `polyhead features` made of texts, from the model whose features the embedder learned; with --pairs, retrieval is
    /// measured, with --walls, grouping.
    #[arg(long)]
    pub features: PathBuf,
    /// The safetensors file to write: `embeddings` [n, dim], of pairs [n, parts, dim]. Default: none, only measured.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// The texts are word puzzles of so many each, such as the walls of Only Connect with 16, labelled by their groups, which are of one
    /// size: they are grouped by their embeddings, and how near that is to the truth is measured.
    #[arg(long, value_name = "TEXTS", value_parser = at_least_one)]
    pub walls: Option<usize>,
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
    let measure = Measure::of(args, parts, n)?;
    let device = trained.model.device();
    let (texts, size) = (n * parts, layers * dim);
    let mut embeddings = Vec::with_capacity(texts * dim);
    for start in (0..texts).step_by(args.batch_size) {
        let end = texts.min(start + args.batch_size);
        let data = TensorData::new(features.floats(start * size..end * size)?, [end - start, layers, dim]);
        progress("embedding", start as u64, texts as u64);
        embeddings.extend(trained.model.embed(Tensor::from_data(data, &device)).into_data().iter::<f32>());
    }
    progress("embedding", texts as u64, texts as u64);
    if let Some(measure) = measure {
        let of_layer = |layer: usize| -> Result<Value, DataError> {
            let mut rows = Vec::with_capacity(texts * dim);
            for text in 0..texts {
                let start = text * size + layer * dim;
                rows.extend(unit(&features.floats(start..start + dim)?));
            }
            Ok(measure.of_embeddings(&rows, dim))
        };
        let plain = (0..layers).map(of_layer).collect::<Result<Vec<_>, _>>()?;
        let ((what, count), embedder) = (measure.counted(n), measure.of_embeddings(&embeddings, dim));
        let result = json!({ "checkpoint": trained.path, (what): count, "embedder": embedder, "layers": plain });
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

/// What embeddings are measured by.
enum Measure {
    /// How well queries find their documents, of rows of so many parts.
    Retrieval { parts: usize },
    /// How near groups by embeddings are to the true ones: the group of each text of each puzzle.
    Walls(Vec<Vec<usize>>),
}

impl Measure {
    fn of(args: &EmbedArgs, parts: usize, n: usize) -> Result<Option<Self>, Failure> {
        let Some(size) = args.walls else { return Ok((parts > 1).then_some(Self::Retrieval { parts })) };
        let file = args.features.display();
        let refuse = |problem: String| Failure::from(Problems::plain(format!("--walls {size}: {file} {problem}")));
        if parts > 1 || n == 0 || !n.is_multiple_of(size) {
            return Err(refuse(format!(
                "holds {n} rows of {parts} parts: texts with labels are needed, {size} a puzzle"
            )));
        }
        let labels: Vec<usize> = open_labels(&args.features)?.into_iter().map(|label| label as usize).collect();
        if labels.len() != n {
            return Err(refuse(format!("holds {} labels for {n} texts", labels.len())));
        }
        for (number, wall) in labels.chunks(size).enumerate() {
            let count = |label: &usize| wall.iter().filter(|other| *other == label).count();
            if wall.iter().any(|label| count(label) != count(&wall[0])) || count(&wall[0]) == size {
                return Err(refuse(format!("has groups of several sizes, or one alone, in puzzle {number} (from 0)")));
            }
        }
        Ok(Some(Self::Walls(labels.chunks(size).map(<[usize]>::to_vec).collect())))
    }

    /// What is counted, and how many there are in `n` rows.
    fn counted(&self, n: usize) -> (&'static str, usize) {
        match self {
            Self::Retrieval { .. } => ("pairs", n),
            Self::Walls(walls) => ("walls", walls.len()),
        }
    }

    fn of_embeddings(&self, embeddings: &[f32], dim: usize) -> Value {
        match self {
            Self::Retrieval { parts } => retrieval(embeddings, *parts, dim),
            Self::Walls(walls) => grouping(embeddings, walls, dim),
        }
    }
}

/// How near groups by embeddings are to those of the puzzles: means, and how many groups and puzzles were found whole.
fn grouping(embeddings: &[f32], walls: &[Vec<usize>], dim: usize) -> Value {
    let of_wall = |(wall, embeddings): (&Vec<usize>, &[f32])| {
        let groups = wall.iter().collect::<BTreeSet<_>>().len();
        Grouping::of(wall, &grouped(embeddings, dim, groups))
    };
    let scores: Vec<Grouping> = walls.iter().zip(embeddings.chunks(walls[0].len() * dim)).map(of_wall).collect();
    let mean = |of: fn(&Grouping) -> f64| scores.iter().map(of).sum::<f64>() / scores.len() as f64;
    json!({
        "solved": scores.iter().filter(|score| score.solved).count(),
        "groups": scores.iter().map(|score| score.groups).sum::<usize>(),
        "wasserstein": mean(|score| score.wasserstein),
        "fowlkes_mallows": mean(|score| score.fowlkes_mallows),
        "ari": mean(|score| score.ari),
        "ami": mean(|score| score.ami),
    })
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
