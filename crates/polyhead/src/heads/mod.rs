//! `polyhead heads`: which heads a behaviour needs, by switching them off, by putting in what they write elsewhere or where another
//! model's heads look, and over the checkpoints of a run.

mod ablate;
mod decisions;
mod edges;
mod history;
mod overlap;
mod pairs;
mod patch;
mod repair;
mod resume_log;
mod swap;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use polyhead_data::read_prompt_pairs;
use polyhead_models::PromptPair;
use polyhead_runs::{Failure, Trained};

use crate::console::talk;
use crate::probe::{self, folder};

/// What to find out.
#[derive(Debug, Subcommand)]
pub enum HeadsCommand {
    /// Switch off every head, one at a time: loss, KL and accuracy without it, beside the gradient of a gate on it.
    ///
    /// A head is zeroed, replaced by its mean over all positions, and by what it writes in another text. Texts are held-out rows of
    /// the model's data, or those of --text.
    Ablate(ablate::AblateArgs),
    /// Put into every head what it writes after a prompt that differs, one head at a time: which of them carry the answer.
    ///
    /// PAIRS is a file of rows with clean, corrupt, right and wrong; `heads pairs` makes some. An effect is 0 where the difference
    /// of the logits of right and wrong stays as after clean, 1 where it becomes what it is after corrupt. A killed command goes on
    /// where it was when it is typed again.
    Patch(patch::PatchArgs),
    /// Score the edges between all heads and feed-forward layers, and run the largest alone: how much they keep of the behaviour.
    Edges(edges::EdgesArgs),
    /// Find the tokens inside of prompts that the model was unsure of, patch every head there, and switch off the largest.
    Decisions(decisions::DecisionsArgs),
    /// Switch off named heads, and show which parts behind them make up for it (self-repair).
    Repair(repair::RepairArgs),
    /// Compare the heads of two results of `heads`: how many their largest have in common.
    Overlap(overlap::OverlapArgs),
    /// Read with the maps of another model, layer by layer: how much of what a model can do is in where its heads look.
    ///
    /// Both have as many layers, heads and ids: two runs of one recipe, two checkpoints of a run, a model and its fine-tuning. Beside
    /// the donor's maps are controls: the receiver's own maps, the donor's of another text, and those of the head before.
    Swap(swap::SwapArgs),
    /// Follow heads over the checkpoints of a run: which matter, which are new, which no longer matter.
    History(history::HistoryArgs),
    /// Write pairs of prompts for a behaviour, out of words that are one token of the model's tokenizer.
    Pairs(pairs::PairsArgs),
}

/// Does what was asked.
///
/// # Errors
/// If it cannot be done.
pub fn run(command: HeadsCommand) -> Result<(), Failure> {
    match command {
        HeadsCommand::Ablate(args) => ablate::ablate(&args),
        HeadsCommand::Patch(args) => patch::patch(&args),
        HeadsCommand::Edges(args) => edges::edges(&args),
        HeadsCommand::Decisions(args) => decisions::decisions(&args),
        HeadsCommand::Repair(args) => repair::repair(&args),
        HeadsCommand::Overlap(args) => overlap::overlap(&args),
        HeadsCommand::Swap(args) => swap::swap(&args),
        HeadsCommand::History(args) => history::history(&args),
        HeadsCommand::Pairs(args) => pairs::pairs(&args),
    }
}

/// A model, pairs of prompts, and where the result goes.
#[derive(Debug, Args)]
pub struct OnPairs {
    /// A checkpoint, a run folder, or a folder in Hugging Face's format.
    checkpoint: PathBuf,
    /// Rows of clean, corrupt, right and wrong: texts, or lists of token ids.
    pairs: PathBuf,
    /// Where the result is written. Default: a folder `heads` beside the checkpoint.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    device: Option<String>,
}

/// What [`OnPairs`] names.
struct Opened {
    trained: Trained,
    pairs: Vec<PromptPair>,
    out: PathBuf,
}

impl OnPairs {
    /// Opens model and pairs, and makes the folder.
    fn open(&self) -> Result<Opened, Failure> {
        let trained = probe::open(&self.checkpoint, self.device.as_deref())?;
        let (paths, vocab) = ([self.pairs.display().to_string()], trained.model.vocab_size());
        let read = read_prompt_pairs(&paths, trained.tokenizer.as_ref(), vocab)?;
        read.notes.iter().for_each(|note| talk!("note: {note}"));
        Ok(Opened { out: folder(self.out.as_deref(), &trained.path, "heads")?, trained, pairs: read.items })
    }
}

/// The mean of numbers of pairs.
fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// A head as it is written: layer and head, each from 0.
pub fn named((layer, head): (usize, usize)) -> String {
    format!("{layer}.{head}")
}

/// The mean differences of logits after clean and corrupt prompts, which pairs have to tell apart.
fn told_apart([clean, corrupt]: [f64; 2]) -> Result<[f64; 2], Failure> {
    match (clean - corrupt).abs() > 1e-6 {
        true => Ok([clean, corrupt]),
        false => Err(Failure::Run(format!(
            "the difference of the logits of right and wrong is the same after clean and after corrupt prompts ({clean:.6}): the pairs \
             tell the model nothing"
        ))),
    }
}
