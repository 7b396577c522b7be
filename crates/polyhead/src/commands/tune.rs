//! `polyhead tune`: interventions that are found by measuring, written as files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Int, Tensor, TensorData};
use clap::{Args, Subcommand, ValueEnum};
use polyhead_models::intervention::gift::Deviation;
use polyhead_models::intervention::sink_search::{
    By, Each, FoundSink, Profiled, SinkScore, SinkSearch, scored_heads, sink_score,
};
use polyhead_models::intervention::vhr::{VhrConfig, Without, reinforce};
use polyhead_models::intervention::{
    AmountConfig, ChangeConfig, EditConfig, InterventionConfig, Span, SpanName, TextSpan, task_embedding,
};
use polyhead_models::weights::Named;
use polyhead_models::{Batch, IGNORE};
use polyhead_recipe::Problems;
use polyhead_runs::intervention::{decode, write};
use polyhead_runs::{Failure, Trained, open_trained};
use serde_json::{Value, json};

use super::must_not_exist;
use super::template_pairs::joined;
use crate::allowed::caller;
use crate::cli::at_least_one;
use crate::console::{progress, put, talk};

/// What is tuned.
#[derive(Debug, Subcommand)]
pub enum TuneCommand {
    /// ZeroTuning: find heads whose attention to the first token is better scaled, and the factor.
    ///
    /// Each head is scaled alone first, up and down, on held-out data of the model's recipe; those of the kind that has more heads
    /// are scaled together, by the best factor. What was found is measured on other held-out batches. The profile goes to
    /// standard output as JSON.
    #[command(after_help = "\
Examples:
  polyhead tune sink checkpoints/quickstart --out sink.toml
  polyhead tune sink checkpoints/quickstart --by entropy --each head --gammas 0.25,0.5,2,4 --out sink.toml
  polyhead tune sink HuggingFaceTB/SmolLM2-135M-Instruct --prompts reviews.jsonl --out sink.toml
  polyhead eval checkpoints/quickstart --intervention sink.toml")]
    Sink(SinkArgs),
    /// VHR: find the heads whose output changes most with a passage of a prompt, and make them louder.
    Vhr(VhrArgs),
    /// The task embedding of soft injection: mean head outputs at the last token of few-shot prompts, as a file of tensors.
    ///
    /// The file has `embedding` [layers, heads, head_dim], which a recipe's intervention blends in by gates that it trains
    /// (recipes/interventions/site.toml).
    Embedding(EmbeddingArgs),
}

/// How the first token's share is tuned.
#[derive(Debug, Args)]
pub struct SinkArgs {
    /// A checkpoint or a run folder.
    pub checkpoint: PathBuf,
    /// The intervention to write.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// By what a factor is better: accuracy, which needs answers, or the entropy of what is predicted.
    #[arg(long, value_enum, default_value = "accuracy")]
    pub by: ByName,
    /// What is scaled alone at first: all heads of one index, or one head of one layer.
    #[arg(long, value_enum, default_value = "index")]
    pub each: EachName,
    /// Factors that are tried.
    #[arg(long, value_delimiter = ',', default_values_t = [0.25, 0.5, 0.75, 1.5, 2.0, 4.0], value_name = "FACTOR")]
    pub gammas: Vec<f64>,
    /// The factor that heads are scaled by alone, and its inverse.
    #[arg(long, default_value_t = 2.0)]
    pub probe: f64,
    /// The largest share of heads that are scaled.
    #[arg(long, default_value_t = 0.5)]
    pub share: f64,
    /// Held-out batches that are searched on; as many others are measured on.
    #[arg(long, default_value_t = 8, value_parser = at_least_one)]
    pub batches: usize,
    /// Prompts with answers in the place of held-out data, a line of JSON each: {"prompt": "Sky is to blue as grass is to", "answer":
    /// " green"}. Every other one is searched on, the rest is measured on.
    #[arg(long, value_name = "FILE", conflicts_with = "batches")]
    pub prompts: Option<PathBuf>,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    pub device: Option<String>,
}

/// By what a factor is better.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum ByName {
    /// Accuracy, of equal ones the loss.
    Accuracy,
    /// Entropy of what is predicted.
    Entropy,
}

/// What is scaled alone.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum EachName {
    /// Heads of one index, in all layers.
    Index,
    /// One head of one layer.
    Head,
}

/// How heads are reinforced.
#[derive(Debug, Args)]
pub struct VhrArgs {
    /// A checkpoint or a run folder.
    pub checkpoint: PathBuf,
    /// The prompt.
    #[arg(long)]
    pub prompt: String,
    /// The passage of it, to the letter.
    #[arg(long)]
    pub passage: String,
    /// The intervention to write.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// What the heads are scaled by.
    #[arg(long, default_value_t = 2.0)]
    pub alpha: f64,
    /// Layers whose heads may be scaled, from 0. Default: all.
    #[arg(long, value_delimiter = ',')]
    pub layers: Vec<usize>,
    /// Cut the passage out instead of hiding it: positions behind it move up.
    #[arg(long)]
    pub cut: bool,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    pub device: Option<String>,
}

/// What an embedding is the mean of.
#[derive(Debug, Args)]
pub struct EmbeddingArgs {
    /// A checkpoint or a run folder.
    pub checkpoint: PathBuf,
    /// A file of prompts with examples, one a line; of a .jsonl file, the "prompt" of each row.
    #[arg(long, value_name = "FILE")]
    pub prompts: PathBuf,
    /// The safetensors file to write.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    pub device: Option<String>,
}

/// Tunes, and writes what was found.
pub fn tune(command: &TuneCommand) -> Result<(), Failure> {
    match command {
        TuneCommand::Sink(args) => sink(args),
        TuneCommand::Vhr(args) => vhr(args),
        TuneCommand::Embedding(args) => embedding(args),
    }
}

/// A model without an intervention of its own, which would be measured with what is found.
fn plain(checkpoint: &Path, device: Option<&str>, out: &Path) -> Result<Trained, Failure> {
    must_not_exist(out)?;
    Ok(open_trained(checkpoint, device, caller())?.unmasked(caller()))
}

fn sink(args: &SinkArgs) -> Result<(), Failure> {
    let positive = |value: f64| value.is_finite() && value > 0.0;
    let refuse = |holds: bool, problem: String| if holds { Ok(()) } else { Err(Problems::plain(problem)) };
    refuse(args.gammas.iter().all(|&gamma| positive(gamma)), format!("--gammas ({:?}) must be above 0", args.gammas))?;
    refuse(args.probe.is_finite() && args.probe > 1.0, format!("--probe ({}) must be above 1", args.probe))?;
    refuse(positive(args.share) && args.share <= 1.0, format!("--share ({}) must be above 0, up to 1", args.share))?;
    let trained = plain(&args.checkpoint, args.device.as_deref(), &args.out)?;
    let model = &trained.model;
    let told =
        |error: polyhead_models::ConfigError| Problems::plain(format!("{}: {}", trained.path.display(), error.problem));
    let sizes = scored_heads(model).map_err(told)?;
    let [calibration, others] = match &args.prompts {
        Some(file) => answered(&trained, file)?,
        None => held_out(&trained, args.batches as u64)?,
    };
    refuse(
        calibration.iter().any(|batch| batch.target_tokens() > 0),
        format!("{}: none of the held-out tokens is a target: there is nothing to measure", trained.path.display()),
    )?;
    let by = match args.by {
        ByName::Accuracy => By::Accuracy,
        ByName::Entropy => By::Entropy,
    };
    let each = match args.each {
        EachName::Index => Each::Index,
        EachName::Head => Each::Head,
    };
    let (gammas, probe, share) = (&args.gammas[..], args.probe, args.share);
    let search = SinkSearch { batches: &calibration, gammas, by, each, probe, share };
    let found = search.run(model, &mut |done, all| progress("tuning", done, all)).map_err(told)?;
    write(&args.out, sink_file(&found), &[])?;
    tell_sink(&found);
    let mut result = json!({ "checkpoint": trained.path, "batches": calibration.len(), "found": found });
    if !others.is_empty() {
        let score = |gamma: f64| {
            let found = FoundSink { gamma, ..found.clone() };
            sink_score(model, &others, &found.log_gamma(sizes, &model.device()))
        };
        let [before, after] = [1.0, found.gamma].map(score);
        line("other batches, without", &before);
        line(&format!("other batches, γ = {}", found.gamma), &after);
        result["other_batches"] = json!({ "plain": before, "tuned": after });
    }
    talk!("wrote {}", args.out.display());
    put!("{result:#}")
}

/// Held-out batches to search on, and as many others to measure on where there are.
fn held_out(trained: &Trained, count: u64) -> Result<[Vec<Batch>; 2], Failure> {
    let held_out = trained.data()?.validation;
    let there = held_out.batches_per_epoch();
    let count = count.min(there.div_ceil(2));
    let read = |range: std::ops::Range<u64>| range.map(|at| held_out.batch(at)).collect::<Result<Vec<Batch>, _>>();
    Ok([read(0..count)?, read(count..(2 * count).min(there))?])
}

/// Prompts with their answers, a batch each whose targets are the answer's tokens: every other one to search on, the rest to measure on.
fn answered(trained: &Trained, file: &Path) -> Result<[Vec<Batch>; 2], Failure> {
    let tokenizer = trained.text_tokenizer()?;
    let text = std::fs::read_to_string(file).map_err(|error| Failure::file("read", file, error))?;
    let row = |(line, text): (usize, &str)| {
        let wrong = |problem: String| Failure::Run(format!("{}:{line}: {problem}", file.display()));
        let row: Value = serde_json::from_str(text).map_err(|error| wrong(format!("invalid JSON: {error}")))?;
        let field = |key: &str| {
            let text = row[key].as_str().filter(|text| !text.trim().is_empty());
            text.ok_or_else(|| wrong(format!("needs \"{key}\", a text")))
        };
        let (tokens, first) = joined(tokenizer, field("prompt")?, field("answer")?)?;
        if tokens.len() > trained.max_positions {
            let (long, most) = (tokens.len(), trained.max_positions);
            return Err(wrong(format!("{long} tokens, and the model was made for {most}")));
        }
        let mut batch = Batch::text(tokens);
        // A token is the target of the one before it.
        batch.targets[..first.saturating_sub(1)].fill(IGNORE);
        Ok(batch)
    };
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let rows = lines.map(row).collect::<Result<Vec<Batch>, Failure>>()?;
    if rows.len() < 2 {
        let problem = format!("{}: {} prompts, and half of them are to be measured on", file.display(), rows.len());
        return Err(Failure::Run(problem));
    }
    let half = |odd: usize| rows.iter().skip(odd).step_by(2).cloned().collect();
    Ok([half(0), half(1)])
}

fn line(name: &str, score: &SinkScore) {
    talk!("{name:<32} {:>9.4} {:>9.4} {:>9.4}", score.loss, score.accuracy, score.entropy);
}

fn tell_sink(found: &FoundSink) {
    talk!("{:<32} {:>9} {:>9} {:>9}", "", "loss", "accuracy", "entropy");
    line("without", &found.plain);
    let chosen = found.profile.iter().filter(|own| own.chosen).count();
    found
        .sweep
        .iter()
        .for_each(|(gamma, score)| line(&format!("{chosen} of {}, γ = {gamma}", found.profile.len()), score));
    if found.gamma == 1.0 {
        talk!("note: no factor is better than none; the file changes nothing");
    }
}

/// Edits that scale the attention of the chosen heads to the first token: those of one layer are one edit.
fn sink_file(found: &FoundSink) -> InterventionConfig {
    let mut layers: BTreeMap<Option<usize>, Vec<usize>> = BTreeMap::new();
    for Profiled { layer, head, .. } in found.profile.iter().filter(|own| own.chosen) {
        layers.entry(*layer).or_default().push(*head);
    }
    let edit = |(layer, heads): (Option<usize>, Vec<usize>)| EditConfig {
        layers: layer.map(|layer| vec![layer]),
        heads: Some(heads),
        keys: Span::Named(SpanName::First),
        ..EditConfig::new("scores", ChangeConfig::Add(AmountConfig::Number(found.gamma.ln())))
    };
    InterventionConfig { edits: layers.into_iter().map(edit).collect(), ..InterventionConfig::default() }
}

fn vhr(args: &VhrArgs) -> Result<(), Failure> {
    if !args.alpha.is_finite() {
        return Err(Problems::plain(format!("--alpha ({}) must be a finite number", args.alpha)).into());
    }
    let trained = plain(&args.checkpoint, args.device.as_deref(), &args.out)?;
    let (model, tokenizer) = (&trained.model, trained.text_tokenizer()?);
    let count = model.layers.len();
    if let Some(layer) = args.layers.iter().find(|&&layer| layer >= count) {
        return Err(Problems::plain(format!("--layers names layer {layer}, and the model has {count}, from 0")).into());
    }
    let tokens = tokenizer.encode_prompt(&args.prompt)?;
    let span = Span::Text(TextSpan { text: args.passage.clone() });
    let inside = span.of_text(&tokens, &decode(tokenizer));
    let places: Vec<usize> = (0..tokens.len()).filter(|&at| inside[at]).collect();
    let (Some(&first), Some(&last)) = (places.first(), places.last()) else {
        return Err(Problems::plain(format!(
            "--passage ({:?}) is nowhere in the prompt: it is searched to the letter",
            args.passage
        ))
        .into());
    };
    if places.len() != last + 1 - first || places.len() == tokens.len() {
        let problem = "--passage must be in the prompt once, and be a part of it";
        return Err(Problems::plain(problem.into()).into());
    }
    let layers = if args.layers.is_empty() { (0..count).collect() } else { args.layers.clone() };
    let without = if args.cut { Without::Removed } else { Without::Masked };
    let how = VhrConfig { layers, alpha: args.alpha, without, both: true, deviation: Deviation::Population };
    let found = reinforce(model, &tokens, first..last + 1, &how);
    let heads =
        |layer: usize| (0..).zip(&found.layers[layer].selected).filter(|(_, is)| **is).map(|(head, _)| head).collect();
    let edit = |&layer: &usize| EditConfig {
        layers: Some(vec![layer]),
        heads: Some(heads(layer)),
        ..EditConfig::new("z", ChangeConfig::Scale(AmountConfig::Number(args.alpha)))
    };
    let chosen: Vec<usize> = found.edits.iter().map(|(layer, _)| *layer).collect();
    if chosen.is_empty() {
        return Err(Failure::Run("no head changes more with the passage than the others of its layer".into()));
    }
    let edits = chosen.iter().map(edit).collect();
    write(&args.out, InterventionConfig { edits, ..InterventionConfig::default() }, &[])?;
    talk!("wrote {}", args.out.display());
    let layers =
        found.layers.iter().map(|own| json!({ "vhd": own.vhd, "relative": own.relative, "selected": own.selected }));
    put!("{:#}", json!({ "checkpoint": trained.path, "layers": layers.collect::<Vec<_>>() }))
}

fn embedding(args: &EmbeddingArgs) -> Result<(), Failure> {
    let trained = plain(&args.checkpoint, args.device.as_deref(), &args.out)?;
    let tokenizer = trained.text_tokenizer()?;
    let prompts = super::generate::prompts(&args.prompts)?;
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
    let bytes = polyhead_models::weights::to_safetensors(&[named], &[("format", "polyhead".into())])?;
    polyhead_training::run_folder::atomic_write(&args.out, &bytes)?;
    talk!("wrote embedding {shape:?}, the mean of {} prompts, to {}", prompts.len(), args.out.display());
    Ok(())
}
