//! `result.json`: what a finished run reached and what it took, in one small file.
//!
//! Written by `train` at the end of a run, read by `compare` and `diff`.

use std::path::Path;

use polyhead_models::{ClassScore, ClassTotals, EvalTotals, ImageRows, Trainable};
use polyhead_training::evaluate::{Batches, evaluate_range};
use polyhead_training::image::{Sheet, sheet};
use polyhead_training::peak_memory_bytes;
use polyhead_training::run::Outcome;
use polyhead_training::run_folder::{atomic_write, files, read_metrics};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use polyhead_evaluation::sets::SetScore;

use crate::costs::Costs;
use crate::error::Failure;

/// What a finished run reached and what it took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RunResult {
    /// See [`id`].
    pub id: String,
    /// What was learned from, in words.
    pub data: String,
    /// Optimiser steps.
    pub steps: u64,
    /// Steps left out because something was not finite.
    pub skipped: u64,
    /// What a model reads one of: "token", or for classifiers "example"; everything "per token" is per example then.
    #[serde(default = "token")]
    pub unit: String,
    /// Input tokens.
    pub tokens: u64,
    /// Targets learned from.
    pub targets: u64,
    /// Weights of the model.
    pub parameters: u64,
    /// Operations of a forward pass per token.
    pub flops_per_token: u64,
    /// Bytes kept per token while decoding, in f32.
    pub kv_bytes_per_token: u64,
    /// The last weights on the held-out batches.
    pub validation: Score,
    /// The same on the first half of these batches, for choosing among settings; `None` where there is only one batch.
    pub selection: Option<Score>,
    /// The same on the other half, for telling how good the chosen one is.
    pub reporting: Option<Score>,
    /// The score on each test set, where the data has several or names its one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sets: Vec<SetScore>,
    /// For classifiers: how well each class is told, on all held-out batches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classes: Option<ClassTable>,
    /// Time spent in steps, over all sessions; without validation and saving.
    pub seconds: f64,
    /// Input tokens per second of that time.
    pub tokens_per_second: f64,
    /// Median over logged intervals of the time of a step.
    pub median_step_seconds: Option<f64>,
    /// The largest resident set of any session.
    pub peak_memory_bytes: Option<u64>,
    /// Where it ran.
    pub environment: Environment,
}

/// How well a model does on some batches.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Score {
    /// Nats per target.
    pub loss: f64,
    /// Where the data is text.
    pub bits_per_byte: Option<f64>,
    /// Share of targets that were the first choice.
    pub accuracy: f64,
    /// Targets.
    pub targets: u64,
    /// For classifiers: the mean F1 over the classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub macro_f1: Option<f64>,
    /// For classifiers: the least share of a class that was told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst_recall: Option<f64>,
    /// For classifiers of data that tells groups: the accuracy of the group with the least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst_group_accuracy: Option<f64>,
    /// For classifiers: how far apart confidence and accuracy are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration_error: Option<f64>,
}

fn token() -> String {
    "token".into()
}

/// How well each class is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ClassTable {
    /// Each class's name and numbers.
    pub scores: Vec<NamedScore>,
    /// `[truth][answer]`: how many; empty where there are more than 1000 classes.
    #[serde(default)]
    pub confusion: Vec<Vec<u64>>,
    /// Each group's name and accuracy, where data tells groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<GroupScore>,
}

/// How well the examples of a group are told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GroupScore {
    /// Its name.
    pub name: String,
    /// Examples of the group.
    pub examples: u64,
    /// Share of them that were told.
    pub accuracy: f64,
}

/// A class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct NamedScore {
    /// Its name.
    pub name: String,
    /// How well it is told.
    #[serde(flatten)]
    pub score: ClassScore,
}

impl ClassTable {
    /// Of an evaluation, with the names of classes and groups.
    pub fn of(sums: &ClassTotals, names: &[String], groups: &[String]) -> Self {
        let group = |(name, group): (&String, u32)| {
            let count = sums.groups().get(&group).copied().unwrap_or_default();
            GroupScore { name: name.clone(), examples: count.examples, accuracy: count.accuracy() }
        };
        let named = |(name, score): (&String, ClassScore)| NamedScore { name: name.clone(), score };
        Self {
            scores: names.iter().zip(sums.classes()).map(named).collect(),
            confusion: sums
                .confusion()
                .map_or(Vec::new(), |matrix| matrix.chunks(names.len().max(1)).map(<[u64]>::to_vec).collect()),
            groups: groups.iter().zip(0..).map(group).collect(),
        }
    }
}

/// The schema of the file.
pub fn schema() -> Value {
    schemars::schema_for!(RunResult).to_value()
}

/// Where a run ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Environment {
    /// Of Polyhead.
    pub version: String,
    /// `training.device`.
    pub device: String,
    /// Threads that this run computed with.
    pub threads: usize,
    /// Of the processor, as the kernels use it.
    pub instruction_set: String,
    /// The processor's name, where the system tells it.
    pub processor: Option<String>,
    /// The operating system and architecture.
    pub system: String,
    /// Whether it was an optimised build.
    pub release_build: bool,
}

impl Environment {
    /// This process.
    pub fn here(device: &str) -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            device: device.into(),
            threads: polyhead_kernels::threads(),
            instruction_set: polyhead_kernels::instruction_set().into(),
            processor: processor.map(|(_, name)| name.trim().to_owned()),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            release_build: !cfg!(debug_assertions),
        }
    }
}

/// What is known about a run before it starts.
pub struct About {
    /// See [`id`].
    pub id: String,
    /// What is learned from, in words.
    pub data: String,
    /// What is counted: see [`RunResult::unit`].
    pub unit: &'static str,
    /// What it costs.
    pub costs: Costs,
    /// Where it runs.
    pub environment: Environment,
    /// The score of the last weights on each test set.
    pub sets: Vec<SetScore>,
}

/// A run's identity: a hash of its resolved recipe and, for text, of what it learns from.
pub fn id(recipe: &str, text_hash: Option<&str>) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(recipe.as_bytes());
    hasher.update(&[0]);
    hasher.update(text_hash.unwrap_or_default().as_bytes());
    hasher.finalize().to_hex()[..16].to_owned()
}

/// Evaluates the last weights and writes the file.
///
/// # Errors
/// If the data cannot be read or the file cannot be written.
pub fn write<M: Trainable>(
    run_dir: &Path,
    about: About,
    outcome: &Outcome<M>,
    (held_out, batches): (&dyn Batches<M::Batch>, u64),
    classes: &dyn Fn(&M::Totals) -> Option<ClassTable>,
    tell: fn(&str),
) -> Result<(), Failure> {
    let all = held_out.per_epoch().max(1);
    let count = if batches == 0 { all } else { batches.min(all) };
    let mut validation = M::Totals::default();
    let mut halves = [M::Totals::default(), M::Totals::default()];
    for (half, range) in halves.iter_mut().zip([0..count / 2, count / 2..count]) {
        *half = evaluate_range(&outcome.model, held_out, range)?;
        validation.add(half.clone());
    }
    let score = Score::of(&validation);
    if !score.loss.is_finite() {
        return Err(Failure::Run(format!(
            "the loss on the held-out data is {} after the last step, which is no result; the weights are saved in {}\n  hint: a \
             lower learning rate helps most often",
            score.loss,
            outcome.checkpoint.display()
        )));
    }
    let [selection, reporting] = halves.map(|half| (count > 1).then(|| Score::of(&half)));
    let history = history(run_dir, tell)?;
    let Costs { totals, tokens_per_step, .. } = about.costs;
    let progress = &outcome.progress;
    let (seconds, tokens) = (progress.microseconds as f64 * 1e-6, progress.step * tokens_per_step);
    let peak = history.iter().filter_map(|line| line["memory"].as_u64()).chain(peak_memory_bytes()).max();
    let result = RunResult {
        id: about.id,
        data: about.data,
        steps: progress.step,
        skipped: progress.skipped,
        unit: about.unit.into(),
        tokens,
        targets: progress.targets,
        parameters: totals.parameters,
        flops_per_token: totals.flops_per_token,
        kv_bytes_per_token: totals.cached_bytes_per_token,
        validation: score,
        selection,
        reporting,
        sets: about.sets,
        classes: classes(&validation),
        seconds,
        tokens_per_second: tokens as f64 / seconds.max(1e-9),
        median_step_seconds: median_step(&history, tokens_per_step),
        peak_memory_bytes: peak,
        environment: about.environment,
    };
    if let Some(ImageRows { images, height, width, across }) = outcome.model.valid().images(&held_out.batch(0)?) {
        let images: Vec<&[f32]> = images.iter().map(Vec::as_slice).collect();
        let png = sheet(&images, Sheet { channels: 3, height, width, across });
        let png = png.map_err(|error| Failure::Run(error.to_string()))?;
        atomic_write(&run_dir.join(files::IMAGES), &png.bytes)?;
    }
    let text = serde_json::to_string_pretty(&result).map_err(|error| Failure::Run(error.to_string()))?;
    Ok(atomic_write(&run_dir.join(files::RESULT), text.as_bytes())?)
}

impl RunResult {
    /// The measures of each test set by name, `NAME: MEASURE`.
    pub fn set_measures(&self) -> Vec<(String, f64)> {
        let of = |set: &SetScore| {
            set.measures().map(|(measure, value)| (format!("{}: {}", set.name, measure.replace('_', " ")), value))
        };
        self.sets.iter().flat_map(of).collect()
    }
}

impl Score {
    /// Of an evaluation.
    pub fn of(sums: &impl EvalTotals) -> Self {
        let (told, numbers) = (sums.evaluated(), sums.numbers());
        let number = |name: &str| numbers.iter().find(|(tag, _)| tag.starts_with(name)).map(|(_, value)| *value);
        Self {
            loss: told.mean_loss(),
            bits_per_byte: told.bits_per_byte(),
            accuracy: told.accuracy(),
            targets: told.targets,
            macro_f1: number("macro_f1/"),
            worst_recall: number("worst_recall/"),
            worst_group_accuracy: number("worst_group_accuracy/"),
            calibration_error: number("calibration_error/"),
        }
    }
}

/// The result of a run, if it has finished.
///
/// # Errors
/// If there is one that cannot be read.
pub fn read(run_dir: &Path) -> Result<Option<RunResult>, Failure> {
    let path = run_dir.join(files::RESULT);
    match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::file("read", &path, error)),
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Failure::Run(format!("{}: {error}", path.display()))),
    }
}

/// The lines of a run's `metrics.jsonl`; none where there is no such file. A half-written last line is left out; damaged ones
/// are told.
///
/// # Errors
/// If it cannot be read.
pub fn history(run_dir: &Path, tell: fn(&str)) -> Result<Vec<Value>, Failure> {
    let (lines, damaged) = read_metrics(run_dir)?;
    for line in damaged {
        tell(&format!("warning: {}:{line}: damaged, so it is left out", run_dir.join(files::METRICS).display()));
    }
    Ok(lines)
}

fn median_step(history: &[Value], tokens_per_step: u64) -> Option<f64> {
    // The first step allocates what the others use again.
    let logged = history.iter().filter(|line| line["step"].as_u64() != Some(1));
    let mut seconds: Vec<f64> =
        logged.filter_map(|line| Some(tokens_per_step as f64 / line["tokens_per_second"].as_f64()?)).collect();
    seconds.sort_unstable_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied()
}
