//! `polyhead heads pairs`: pairs of prompts for a behaviour.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use polyhead_data::{PairTask, generate_pairs};
use polyhead_runs::Failure;
use polyhead_runs::pretrained::Pretrained;
use polyhead_training::run_folder::atomic_write;

use crate::allowed::caller;
use crate::cli::at_least_one;
use crate::console::{print, talk};

/// Which pairs.
#[derive(Debug, Args)]
pub struct PairsArgs {
    /// The model whose tokenizer counts: a checkpoint, a run folder, or a folder in Hugging Face's format.
    checkpoint: PathBuf,
    /// The behaviour.
    #[arg(long, value_enum)]
    task: Task,
    /// Pairs.
    #[arg(long, default_value_t = 32, value_parser = at_least_one)]
    count: usize,
    /// Decides the words.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The JSONL file to write. Default: standard output.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// A behaviour.
#[derive(Debug, Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Task {
    /// Random words, then one of them again: what followed it.
    Induction,
    /// Two people go somewhere, one gives something: to the other.
    IndirectObject,
    /// From one year to another: to a later one.
    GreaterThan,
}

/// Writes the pairs.
pub fn pairs(args: &PairsArgs) -> Result<(), Failure> {
    let task = match args.task {
        Task::Induction => PairTask::Induction,
        Task::IndirectObject => PairTask::IndirectObject,
        Task::GreaterThan => PairTask::GreaterThan,
    };
    let model = Pretrained::open(&args.checkpoint, caller())?;
    let pairs = generate_pairs(task, args.count, args.seed, (model.tokenizer.as_ref(), model.vocab_size))?;
    let line = |pair| serde_json::to_string(pair).map(|line| line + "\n");
    let lines = pairs.iter().map(line).collect::<Result<String, _>>();
    let lines = lines.map_err(|error| Failure::Run(error.to_string()))?;
    match &args.out {
        None => print(format_args!("{lines}")),
        Some(out) => {
            atomic_write(out, lines.as_bytes())?;
            talk!("wrote {} pairs of {} to {}", pairs.len(), task.name(), out.display());
            Ok(())
        }
    }
}
