//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Train, look at and export attention mechanisms, from TOML recipes.
#[derive(Debug, Parser)]
#[command(
    name = "polyhead",
    version,
    arg_required_else_help = true,
    after_help = "\
Examples:
  polyhead train recipes/quickstart.toml
  polyhead train recipes/quickstart.toml training.steps=100 optimizer.adamw.lr=1e-3 --out checkpoints/try
  polyhead generate checkpoints/quickstart --prompt \"Ownership is\"
  polyhead export checkpoints/quickstart --to exported"
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// A recipe with overrides.
#[derive(Debug, Args)]
pub struct RecipeArgs {
    /// The recipe, a TOML file. `polyhead ls` lists those at hand.
    pub recipe: PathBuf,
    /// Changes, such as training.steps=100 or data.text.paths='["books/*.txt"]'.
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model, or go on with an interrupted run.
    ///
    /// The run is written to --out (default: checkpoints/<name of the recipe>): checkpoints, metrics.jsonl, TensorBoard
    /// files. The same command goes on where the run stopped; Ctrl-C saves first, a second Ctrl-C leaves at once.
    Train(TrainArgs),
    /// List the recipes at hand.
    Ls,
    /// Copy a recipe to edit it.
    Cp {
        /// Which recipe.
        recipe: PathBuf,
        /// Where to.
        to: PathBuf,
    },
    /// Print a recipe with every default filled in.
    Cat(RecipeArgs),
    /// Check a recipe: every key, every value.
    Validate(RecipeArgs),
    /// Tell what a recipe would cost: parameters, operations, cache, disk, tokens, memory, time.
    ///
    /// Sizes are computed. Time, speed and memory are measured: the model is trained for a few steps (about 3 seconds, after
    /// a warm-up step) on the recipe's data and device; nothing is saved.
    Plan {
        /// The recipe.
        #[command(flatten)]
        recipe: RecipeArgs,
        /// Only compute, do not train.
        #[arg(long)]
        no_probe: bool,
    },
    /// Show the tokens that a model would see, and which of them it learns to predict.
    ///
    /// On a terminal the text is shown in colour: green is what the model learns to predict, dim what it only reads.
    /// Elsewhere, with NO_COLOR=1 or with --table, each position is a line: its number, its document, the token, and what
    /// is to be predicted there.
    #[command(after_help = "\
Examples:
  polyhead preview recipes/quickstart.toml
  polyhead preview recipes/quickstart.toml loader.packing=documents --rows 8
  polyhead preview recipes/quickstart.toml --table | less
  CLICOLOR_FORCE=1 polyhead preview recipes/quickstart.toml | less -R")]
    Preview {
        /// The recipe.
        #[command(flatten)]
        recipe: RecipeArgs,
        /// Rows to show, from the first batches on.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
        rows: u32,
        /// One line per position, on a terminal too.
        #[arg(long)]
        table: bool,
    },
    /// Validate a trained model on its held-out data, or ask it questions about long texts (--task).
    ///
    /// With --task, problems are generated: what is asked for stands somewhere in filler, at 1, 2, 4 and 8 times the length
    /// that the model was trained with. An answer counts if every token of it is the model's first choice. A table goes to
    /// standard error, the numbers as JSON to standard output.
    ///
    /// --task eigenscore tells how far the answers to each prompt of a file lie apart inside the model (EigenScore, EES).
    /// --task facts asks a model that learnt [data.facts] everything: what it was taught, what it was taught in other words,
    /// and what it cannot know.
    #[command(after_help = "\
Examples:
  polyhead eval checkpoints/quickstart
  polyhead eval checkpoints/sft --task all --heatmap sft.svg
  polyhead eval checkpoints/sft --task needles_multi,multi_hop --lengths 1,2,4 --samples 50
  polyhead eval checkpoints/quickstart --task eigenscore --prompts questions.txt
  polyhead eval checkpoints/facts --task facts")]
    Eval(EvalArgs),
    /// Let a trained model write.
    Generate(GenerateArgs),
    /// Write a model in Hugging Face's format.
    Export {
        /// A checkpoint, a run folder, or a folder in Hugging Face's format.
        checkpoint: PathBuf,
        /// A folder that does not exist yet.
        #[arg(long)]
        to: PathBuf,
    },
    /// Write the logits of given tokens, for comparing with other software.
    Logits {
        /// A checkpoint, a run folder, or a folder in Hugging Face's format.
        checkpoint: PathBuf,
        /// Token ids, such as 1,2,3.
        #[arg(long, value_delimiter = ',', required = true)]
        tokens: Vec<u32>,
        /// The safetensors file to write: `tokens` [1, n] and `logits` [1, n, vocab].
        #[arg(long)]
        out: PathBuf,
    },
    /// Tell what this machine and this binary can do.
    Doctor,
    /// Train a tokenizer.
    #[command(subcommand)]
    Tokenizer(TokenizerCommand),
    /// Print completions for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the recipe reference: every key with its type and meaning, as Markdown.
    Reference,
}

/// How to train.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// The run folder. Default: checkpoints/<name of the recipe>.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// auto goes on with the run in the folder if there is one, never starts afresh, a path goes on from that checkpoint.
    #[arg(long, default_value = "auto", value_name = "auto|never|PATH")]
    pub resume: String,
    /// The same as training.device=...
    #[arg(long, value_parser = crate::device::NAMES)]
    pub device: Option<String>,
    /// Show a dashboard with curves instead of a progress bar; for binaries that were built with --features tui.
    ///
    /// Arrow keys switch curves. q offers ways to stop: all of them save first, as Ctrl-C does.
    #[arg(long)]
    pub tui: bool,
}

/// How to evaluate.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// A checkpoint or a run folder.
    pub checkpoint: PathBuf,
    /// Batches of held-out data at most; 0 takes all.
    #[arg(long, default_value_t = 0, conflicts_with = "task")]
    pub batches: u64,
    /// What is asked, instead of validating.
    #[arg(long, value_delimiter = ',', value_parser = TASKS)]
    pub task: Vec<String>,
    /// Lengths of the texts, in units.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8", requires = "task", value_parser = at_least_one)]
    pub lengths: Vec<usize>,
    /// Tokens of length 1. Default: the length that the model was trained with.
    #[arg(long, requires = "task", value_parser = at_least_one)]
    pub unit: Option<usize>,
    /// Problems for each task, length and fifth of the text; answers to each prompt of eigenscore and facts.
    #[arg(long, default_value_t = 10, requires = "task", value_parser = at_least_one)]
    pub samples: usize,
    /// Prompts of eigenscore, one a line.
    #[arg(long, requires = "task")]
    pub prompts: Option<PathBuf>,
    /// Tokens of each answer of eigenscore at most.
    #[arg(long, default_value_t = 128, requires = "task", value_parser = at_least_one)]
    pub new_tokens: usize,
    /// The layer whose output eigenscore and facts look at, from 0; negative ones count from the end.
    #[arg(long, default_value_t = -2, allow_negative_numbers = true, requires = "task")]
    pub layer: i64,
    /// Decides the problems.
    #[arg(long, default_value_t = 0, requires = "task")]
    pub seed: u64,
    /// Draw accuracy by length and depth into this SVG file.
    #[arg(long, requires = "task")]
    pub heatmap: Option<PathBuf>,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::device::NAMES)]
    pub device: Option<String>,
}

/// What `--task` takes.
const TASKS: [&str; 7] =
    ["needles_multi", "variable_tracking", "common_words", "multi_hop", "all", "eigenscore", "facts"];

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

/// How to generate.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// A checkpoint, a run folder, or a folder in Hugging Face's format.
    pub checkpoint: PathBuf,
    /// What the text starts with.
    #[arg(long, default_value = "")]
    pub prompt: String,
    /// Take the prompt as what a user says, and let the model answer: the chat template that it was fine-tuned with is
    /// written around it.
    #[arg(long)]
    pub chat: bool,
    /// Tokens at most.
    #[arg(long, default_value_t = 200)]
    pub max_new_tokens: usize,
    /// 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.8, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Choose among the k likeliest; 0 among all.
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Choose among the likeliest whose probabilities add up to this.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub top_p: f64,
    /// The same seed gives the same text.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::device::NAMES)]
    pub device: Option<String>,
}

/// What to do with tokenizers.
#[derive(Debug, Subcommand)]
pub enum TokenizerCommand {
    /// Learn a byte-level BPE from the text of a recipe.
    Train {
        /// The recipe whose data is learnt from.
        #[command(flatten)]
        recipe: RecipeArgs,
        /// Ids, the 256 bytes and 2 special tokens included.
        #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(258..))]
        vocab_size: u32,
        /// The tokenizer.json to write.
        #[arg(long)]
        out: PathBuf,
    },
}
