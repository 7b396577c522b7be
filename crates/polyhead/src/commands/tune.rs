//! `polyhead tune`: interventions that are found by measuring, written as files.

mod embedding;
mod gift;
mod guidance;
mod on_prompt;
mod sink;
mod var;
mod vhr;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use polyhead_models::intervention::answer_score::{AnswerScore, By};
use polyhead_models::{Batch, ConfigError, IGNORE};
use polyhead_recipe::Problems;
use polyhead_runs::{Failure, Trained, open_trained};
use serde_json::Value;

use super::must_not_exist;
use super::template_pairs::joined;
use crate::allowed::caller;
use crate::cli::at_least_one;
use crate::console::talk;

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
    Sink(sink::SinkArgs),
    /// VHR: find the heads whose output changes most with a passage of a prompt, and make them louder.
    Vhr(vhr::VhrArgs),
    /// VAR: find the sinks of a prompt by channels of the residual stream, and give the passage what they lose.
    Var(var::VarArgs),
    /// GIFT: find the tokens of a passage that the question begins to look at, and look at them more in the answer.
    Gift(gift::GiftArgs),
    /// SoftPAG: find heads whose maps, pulled to the identity, make a weak model that predictions are better steered away from.
    ///
    /// Round by round the best heads are added, on held-out data of the model's recipe. What was found is measured on other held-out
    /// batches, beside as many random heads. The rounds go to standard output as JSON.
    Guidance(guidance::GuidanceArgs),
    /// The task embedding of soft injection: mean head outputs at the last token of few-shot prompts, as a file of tensors.
    ///
    /// The file has `embedding` [layers, heads, head_dim], which a recipe's intervention blends in by gates that it trains
    /// (recipes/interventions/site.toml).
    Embedding(embedding::EmbeddingArgs),
}

/// What a search measures on.
#[derive(Debug, Args)]
struct MeasuredOn {
    /// By what predictions are better: accuracy, which needs answers, or the entropy of what is predicted.
    #[arg(long, value_enum, default_value = "accuracy")]
    by: ByName,
    /// Held-out batches that are searched on; as many others are measured on.
    #[arg(long, default_value_t = 8, value_parser = at_least_one)]
    batches: usize,
    /// Prompts with answers in the place of held-out data, a line of JSON each: {"prompt": "Sky is to blue as grass is to", "answer":
    /// " green"}. Every other one is searched on, the rest is measured on.
    #[arg(long, value_name = "FILE", conflicts_with = "batches")]
    prompts: Option<PathBuf>,
}

/// By what predictions are better.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum ByName {
    /// Accuracy, of equal ones the loss.
    Accuracy,
    /// Entropy of what is predicted.
    Entropy,
}

/// Tunes, and writes what was found.
pub fn tune(command: &TuneCommand) -> Result<(), Failure> {
    match command {
        TuneCommand::Sink(args) => sink::sink(args),
        TuneCommand::Vhr(args) => vhr::vhr(args),
        TuneCommand::Var(args) => var::var(args),
        TuneCommand::Gift(args) => gift::gift(args),
        TuneCommand::Guidance(args) => guidance::guidance(args),
        TuneCommand::Embedding(args) => embedding::embedding(args),
    }
}

/// A model without an intervention of its own, which would be measured with what is found.
fn plain(checkpoint: &Path, device: Option<&str>, out: &Path) -> Result<Trained, Failure> {
    must_not_exist(out)?;
    Ok(open_trained(checkpoint, device, caller())?.unmasked(caller()))
}

/// Refuses what a rule does not allow.
fn refuse(holds: bool, problem: impl FnOnce() -> String) -> Result<(), Problems> {
    if holds { Ok(()) } else { Err(Problems::plain(problem())) }
}

/// What is wrong with a model.
fn about(trained: &Trained, error: &ConfigError) -> Problems {
    Problems::plain(format!("{}: {}", trained.path.display(), error.problem))
}

impl MeasuredOn {
    fn by(&self) -> By {
        match self.by {
            ByName::Accuracy => By::Accuracy,
            ByName::Entropy => By::Entropy,
        }
    }

    /// What is searched on, with a target at least, and what is measured on.
    fn batches(&self, trained: &Trained) -> Result<[Vec<Batch>; 2], Failure> {
        let [calibration, others] = match &self.prompts {
            Some(file) => answered(trained, file)?,
            None => held_out(trained, self.batches as u64)?,
        };
        refuse(calibration.iter().any(|batch| batch.target_tokens() > 0), || {
            format!("{}: none of the held-out tokens is a target: there is nothing to measure", trained.path.display())
        })?;
        Ok([calibration, others])
    }
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

fn head_line() {
    talk!("{:<32} {:>9} {:>9} {:>9}", "", "loss", "accuracy", "entropy");
}

fn line(name: &str, score: &AnswerScore) {
    talk!("{name:<32} {:>9.4} {:>9.4} {:>9.4}", score.loss, score.accuracy, score.entropy);
}
