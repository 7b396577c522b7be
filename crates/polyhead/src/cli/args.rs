//! What the commands that train, evaluate and generate take.

use std::path::PathBuf;

use clap::Args;
use polyhead_experiments::launcher::Launcher;
use polyhead_experiments::processes::Share;

use super::{RecipeArgs, device, typed_text};
use crate::allowed::flags;

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
    #[arg(long, value_parser = device())]
    pub device: Option<String>,
    /// Show a dashboard with curves instead of a progress bar; for binaries that were built with --features tui.
    ///
    /// Arrow keys switch curves. q offers ways to stop: all of them save first, as Ctrl-C does.
    #[arg(long)]
    pub tui: bool,
    /// Write down what the time is spent on, as a trace that ui.perfetto.dev and chrome://tracing open: about 2 KB a step.
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
}

/// How runs are started, each as a process of its own.
#[derive(Debug, Args)]
pub struct JobsArgs {
    /// Runs at a time; without --launcher, the cores are divided among them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub jobs: u32,
    /// Start every run as a job on a cluster: slurm (srun --ntasks=1 --exclusive), mpirun (mpirun -n 1 --bind-to none), or another
    /// command that is put before that of a run and starts it once, such as "srun --ntasks=1 --gpus=1 --time=4:00:00".
    #[arg(long, value_name = "COMMAND", value_parser = Launcher::parse)]
    pub launcher: Option<Launcher>,
}

impl JobsArgs {
    /// What the processes share.
    pub fn share(&self) -> Share {
        Share::of(self.jobs as usize, self.launcher.clone(), flags())
    }
}

/// How to evaluate.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// A checkpoint or a run folder.
    pub checkpoint: PathBuf,
    /// The templates of template_pairs: rows with "template" (with the place {}), two "attributes" and two "options".
    #[arg(requires = "task")]
    pub file: Option<PathBuf>,
    /// Batches of held-out data at most; 0 takes all.
    #[arg(long, default_value_t = 0, conflicts_with = "task")]
    pub batches: u64,
    /// Text files, folders or patterns to measure the loss on, instead of the data of the model's recipe.
    #[arg(long, alias = "text", num_args = 1.., value_name = "PATH", conflicts_with_all = ["task", "batches"])]
    pub text_file: Vec<String>,
    /// Tokens that are read at a time. Default: as many as the model was made for, 1024 at most.
    #[arg(long, requires = "text_file", value_parser = at_least_one)]
    pub window: Option<usize>,
    /// Tokens from one window to the next. Default: half a window. A smaller one gives every prediction more context, and takes
    /// longer.
    #[arg(long, requires = "text_file", value_parser = at_least_one)]
    pub stride: Option<usize>,
    /// What is asked, instead of validating.
    #[arg(long, value_delimiter = ',', value_parser = TASKS)]
    pub task: Vec<String>,
    /// Lengths of the texts, in units. Default: 1,2,4,8.
    #[arg(long, value_delimiter = ',', requires = "task", value_parser = at_least_one)]
    pub lengths: Vec<usize>,
    /// Tokens of length 1. Default: the length that the model was trained with.
    #[arg(long, requires = "task", value_parser = at_least_one)]
    pub unit: Option<usize>,
    /// Problems for each task, length and fifth of the text; answers to each prompt of eigenscore and facts, 2 at least.
    #[arg(long, default_value_t = 10, requires = "task", value_parser = at_least_one)]
    pub samples: usize,
    /// Prompts of eigenscore, one a line.
    #[arg(long, requires = "task")]
    pub prompts: Option<PathBuf>,
    /// Tokens of each answer of eigenscore at most.
    #[arg(long, alias = "new-tokens", default_value_t = 128, requires = "task", value_parser = at_least_one)]
    pub max_new_tokens: usize,
    /// The layer whose output eigenscore and facts look at, from 0; negative ones count from the end.
    #[arg(long, default_value_t = -2, allow_negative_numbers = true, requires = "task")]
    pub layer: i64,
    /// How eigenscore and facts compute EES; "official" is the published code, which approximates nothing. Default: shifted.
    #[arg(long, requires = "task", value_parser = ["shifted", "dual", "exact", "official"])]
    pub ees_mode: Option<String>,
    /// What EES is estimated with: all unit vectors ("exact"), or random vectors. Default: exact; of "official" gaussian, as
    /// published.
    #[arg(long, requires = "task", value_parser = ["exact", "rademacher", "gaussian"])]
    pub ees_probes: Option<String>,
    /// Random vectors. Default: 20, as published.
    #[arg(long, requires = "task", value_parser = at_least_one)]
    pub ees_n_probes: Option<usize>,
    /// Decides the problems, and the resamples of template_pairs.
    #[arg(long, default_value_t = 0, requires = "task")]
    pub seed: u64,
    /// Draw accuracy by length and depth into this SVG file.
    #[arg(long, requires = "task")]
    pub heatmap: Option<PathBuf>,
    /// A file of changes that are made to the model's forward on its way.
    #[arg(long, value_name = "FILE")]
    pub intervention: Option<PathBuf>,
    /// Default: the recipe's.
    #[arg(long, value_parser = device())]
    pub device: Option<String>,
}

/// What `--task` takes.
const TASKS: [&str; 9] = [
    "key_value",
    "needles_multi",
    "variable_tracking",
    "common_words",
    "multi_hop",
    "all",
    "eigenscore",
    "facts",
    "template_pairs",
];

pub fn at_least_one(text: &str) -> Result<usize, String> {
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
    /// What the text starts with; - reads it from standard input.
    #[arg(long, default_value = "", conflicts_with = "prompts", value_parser = typed_text)]
    pub prompt: String,
    /// A file of prompts, one a line; of a .jsonl file, the "prompt" of each row.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Take the prompt as what a user says, and let the model answer: the chat template that it was fine-tuned with is
    /// written around it.
    #[arg(long)]
    pub chat: bool,
    /// Instructions that come before, with --chat.
    #[arg(long, requires = "chat")]
    pub system: Option<String>,
    /// A file of changes that are made to the model's forward on its way.
    #[arg(long, value_name = "FILE")]
    pub intervention: Option<PathBuf>,
    /// Accept tokens by how much they follow from what was written so far (SGRS): of the five likeliest one is drawn whose saliency is at
    /// least ALPHA times the mean of the last five, 0.6 as published; 0 draws without a threshold. Many times slower.
    #[arg(
        long,
        value_name = "ALPHA",
        allow_negative_numbers = true,
        conflicts_with_all = ["prompts", "intervention", "temperature", "top_k", "top_p", "diffusion_steps", "block_length", "stop"]
    )]
    pub sgrs: Option<f64>,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// How to talk.
#[derive(Debug, Args)]
pub struct ChatArgs {
    /// A checkpoint, a run folder, or a folder in Hugging Face's format.
    pub checkpoint: PathBuf,
    /// Instructions that come before.
    #[arg(long)]
    pub system: Option<String>,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// How tokens are chosen.
#[derive(Debug, Args)]
pub struct SamplingArgs {
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
    /// Steps in which a masked diffusion model fills in its masks. Default: one for each new token.
    #[arg(long, value_name = "STEPS")]
    pub diffusion_steps: Option<usize>,
    /// Tokens of a block of a masked diffusion model, which fills in one after the other. Default: all are one block.
    #[arg(long, value_name = "TOKENS")]
    pub block_length: Option<usize>,
    /// End before this string; may be given several times.
    #[arg(long, value_name = "STRING")]
    pub stop: Vec<String>,
    /// Default: the recipe's.
    #[arg(long, value_parser = device())]
    pub device: Option<String>,
}
