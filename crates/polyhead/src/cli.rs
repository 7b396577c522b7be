//! The command line.

mod args;

use std::path::{Path, PathBuf};

use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use clap::{Arg, Args, Parser, Subcommand};
use polyhead_recipe::{DEVICES, device_name, parse_device};

pub use args::{ChatArgs, EvalArgs, GenerateArgs, JobsArgs, SamplingArgs, TrainArgs, at_least_one};

/// Train, inspect and export attention mechanisms, from TOML recipes.
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
  polyhead export checkpoints/quickstart --out exported"
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Print data as JSON, where it is printed as tables or text otherwise.
    #[arg(long, global = true)]
    pub json: bool,
    /// Say nothing on standard error but errors: no notes, no progress.
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Take trained weights that contain NaN or infinite numbers, which are an error otherwise.
    #[arg(long, global = true)]
    pub allow_nonfinite: bool,
    /// Fetch models that are named as on the Hugging Face hub (org/name) and are not in its cache yet.
    #[arg(long, global = true)]
    pub download: bool,
    /// The folder of the base model of a run with LoRA, where it is not where it was when the run was trained.
    #[arg(long, global = true, value_name = "DIR")]
    pub base: Option<PathBuf>,
    /// Train though the estimate of the memory that it takes is more than there is.
    #[arg(long, global = true)]
    pub ignore_memory: bool,
}

/// Reads the name of a device.
pub fn device() -> impl TypedValueParser<Value = String> {
    DeviceParser
}

/// Completions offer the kinds; any number of a kind is taken.
#[derive(Clone)]
struct DeviceParser;

impl TypedValueParser for DeviceParser {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<String, clap::Error> {
        let read = |name: String| {
            let name = device_name(&name).to_owned();
            parse_device(&name)?;
            Ok::<_, String>(name)
        };
        StringValueParser::new().try_map(read).parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(DEVICES.into_iter().map(PossibleValue::new)))
    }
}

/// Flags that have other names now: of which command, the old name, the new one. The old ones work for one version more.
const RENAMED: [(&str, &str, &str); 5] = [
    ("export", "--to", "--out"),
    ("eval", "--new-tokens", "--max-new-tokens"),
    ("eval", "--text", "--text-file"),
    ("convert", "--text", "--text-file"),
    ("heads", "--to", "--receivers"),
];

/// Warnings about flags among the arguments that have other names now.
pub fn renamed_flags(arguments: &[String]) -> Vec<String> {
    let is = |argument: &String, old: &str| {
        argument == old || argument.strip_prefix(old).is_some_and(|rest| rest.starts_with('='))
    };
    // Flags of every command may stand before it.
    let command = arguments.iter().skip(1).find(|argument| !argument.starts_with('-')).map(String::as_str);
    let used =
        RENAMED.iter().filter(|(of, old, _)| command == Some(of) && arguments.iter().any(|argument| is(argument, old)));
    used.map(|(_, old, new)| format!("warning: {old} is called {new} now; the old name will be refused")).collect()
}

/// Reads a text that is typed. A file's name with its ending is a mistake: it would be taken for the text itself.
pub fn typed_text(text: &str) -> Result<String, String> {
    let path = Path::new(text);
    match path.extension().is_some() && path.is_file() {
        true => Err(format!(
            "this is a file, and the text itself is taken here: \"$(cat {text})\" hands over what is in it"
        )),
        false => Ok(text.to_owned()),
    }
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

impl RecipeArgs {
    /// Lets a device that was named take the place of the recipe's.
    pub fn on(&mut self, device: Option<&str>) {
        self.overrides.extend(device.map(|device| format!("training.device={device}")));
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model, or go on with an interrupted run.
    ///
    /// The run is written to --out (default: checkpoints/<name of the recipe>): checkpoints, metrics.jsonl, TensorBoard
    /// files. The same command goes on where the run stopped; Ctrl-C (SIGINT), SIGTERM and SIGHUP save first, a second one leaves
    /// at once; SIGUSR1 saves and goes on.
    ///
    /// A recipe with [[stage]] tables is run stage after stage, each from the weights of the one before, into 1-<name>,
    /// 2-<name>, ... there.
    Train(TrainArgs),
    /// Make a project: a folder with a recipe, a comparison and a text to replace with your own.
    #[command(after_help = "\
Example:
  polyhead new mine && cd mine && polyhead train pretrain.toml --out run")]
    New {
        /// The folder, which must not exist.
        folder: PathBuf,
    },
    /// List recipes: those here and in the folder `recipes`, or else those that come with Polyhead.
    Ls {
        /// Another folder.
        folder: Option<PathBuf>,
    },
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
    /// Show what a recipe would cost: parameters, operations, cache, disk, tokens, memory, time.
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
        /// The same as training.device=...
        #[arg(long, value_parser = device())]
        device: Option<String>,
    },
    /// Show the tokens that a model reads, and which of them it learns to predict; of images, a sheet.
    ///
    /// Images and audio are written to --out as one PNG file, as the model gets them, augmented; their classes go to
    /// standard output, row by row.
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
        /// Where images are written, 8 in a row.
        #[arg(long, default_value = "preview.png")]
        out: PathBuf,
    },
    /// Train several arms with several seeds at the same budget, and show which differ by more than chance.
    ///
    /// A comparison is a TOML file: a base recipe (`extends`), `[[arm]]` tables with what each changes, `seeds`, and what is
    /// made equal (`match`). Every run is a process of its own; finished ones are kept, so that the same command goes on
    /// where it stopped. The report (report.html, report.md) is written to --out.
    #[command(after_help = "\
Examples:
  polyhead compare recipes/compare/attention-zoo.toml --dry-run
  polyhead compare recipes/compare/attention-zoo.toml --jobs 2
  polyhead compare recipes/compare/attention-zoo.toml --jobs 15 --launcher slurm")]
    Compare(crate::commands::compare::CompareArgs),
    /// Run a published suite of tasks under its published settings, and report as its paper does.
    ///
    /// A suite is a list of trainings; of those that differ in optimiser settings alone, the best is reported. Every training is a
    /// process of its own; finished ones are kept, so that the same command goes on where it stopped. The table goes to standard
    /// output; result.json and result.md are written to --out. Suites that end in -small take minutes, the others hours to days.
    #[command(after_help = "\
Examples:
  polyhead suite --list
  polyhead suite mqar-zoology-v1-small --dry-run
  polyhead suite mqar-zoology-v1-small --only \"64 tokens\"
  polyhead suite mqar-zoology-v1-small 'model.decoder.attention={gated_delta_net={n_heads=1}}' --out checkpoints/suite/gdn
  polyhead suite --check")]
    Suite(crate::commands::suite::SuiteArgs),
    /// Show two runs side by side: their recipes, where they ran, what they reached.
    Diff {
        /// The folders of two runs.
        #[arg(num_args = 2, required = true, value_name = "RUN")]
        runs: Vec<PathBuf>,
    },
    /// Show what the heads of a trained model look at, and how much each of them matters.
    ///
    /// A table of heads goes to standard output: entropy of their weights, weight on the first key, mean distance, and
    /// importance (|gate x gradient|). Maps are written as PNG images and into one page, inspect.html.
    ///
    /// With --copying, what their weights do with the tokens that they read: copy them, or suppress copies (McDougall et al. 2023).
    ///
    /// Of a classifier with a Gaussian adaptive gate, the importance of the layers whose features it reads, over all held-out
    /// examples.
    #[command(after_help = "\
Examples:
  polyhead inspect checkpoints/quickstart --text \"Ownership is a set of rules\"
  polyhead inspect checkpoints/quickstart --layers 0,3 --out heads")]
    Inspect(crate::inspect::InspectArgs),
    /// Find out which heads a behaviour needs: switch them off, put in what they write elsewhere, follow them over a run.
    ///
    /// Every subcommand writes a page and a JSON file, and prints a line a head.
    #[command(subcommand)]
    #[command(after_help = "\
Examples:
  polyhead heads ablate checkpoints/quickstart
  polyhead heads pairs checkpoints/quickstart --task induction --out pairs.jsonl
  polyhead heads patch checkpoints/quickstart pairs.jsonl
  polyhead heads edges checkpoints/quickstart pairs.jsonl --top 20,100
  polyhead heads history checkpoints/quickstart")]
    Heads(crate::heads::HeadsCommand),
    /// Print the replications: what papers claim and what we measured, from recipes/results.
    Results,
    /// Measure a trained model: on its held-out data, on a text (--text-file), or with questions about long texts (--task).
    ///
    /// With --text-file, loss (nats per token), perplexity and bits per byte of the files, for any checkpoint or folder in Hugging
    /// Face's format. They are read in windows that overlap; every token is predicted once, with at least window - stride tokens
    /// before it.
    ///
    /// With --task, problems are generated: what is asked for is somewhere in filler, at 1, 2, 4 and 8 times the length
    /// that the model was trained with. An answer counts if every token of it is the model's first choice. A table goes to
    /// standard error, the numbers as JSON to standard output.
    ///
    /// --task eigenscore measures how far apart the answers to each prompt of a file are inside the model (EigenScore, EES).
    /// --task facts asks a model that learned [data.facts] everything: what it was taught, what it was taught in other words,
    /// and what it cannot know.
    #[command(after_help = "\
Examples:
  polyhead eval checkpoints/quickstart
  polyhead eval llama-folder --text-file book.txt --window 2048 --stride 512
  polyhead eval checkpoints/sft --task all --heatmap sft.svg
  polyhead eval checkpoints/sft --task needles_multi,multi_hop --lengths 1,2,4 --samples 50
  polyhead eval checkpoints/quickstart --task eigenscore --prompts questions.txt
  polyhead eval checkpoints/facts --task facts")]
    Eval(EvalArgs),
    /// Generate text from a trained model.
    ///
    /// The text goes to standard output as it is written. With --prompts, every prompt of a file is continued, and each gives a
    /// line of JSON: prompt, text, number of tokens, and whether it ended by itself (stop) or at --max-new-tokens (length).
    #[command(after_help = "\
Examples:
  polyhead generate checkpoints/quickstart --prompt \"Ownership is\" --temperature 0
  polyhead generate checkpoints/sft --chat --system \"Answer in one word.\" --prompt \"What is a crate?\"
  polyhead generate checkpoints/quickstart --prompts prompts.txt --stop \"\\n\" > answers.jsonl
  git diff | polyhead generate llama-folder --prompt -")]
    Generate(GenerateArgs),
    /// Talk with a model that was fine-tuned on conversations.
    ///
    /// Each line of standard input is a message; the model answers in its own chat template and remembers what was said.
    Chat(ChatArgs),
    /// Serve a model over HTTP, as OpenAI's clients and lm-eval ask for one.
    ///
    /// POST /v1/completions (with echo and logprobs) and /v1/chat/completions, both also streamed; GET /v1/models. Requests that
    /// wait are answered together. What a request has that is not known is refused.
    #[command(after_help = "\
Examples:
  polyhead serve checkpoints/sft
  curl http://127.0.0.1:8080/v1/completions -d '{\"prompt\": \"Ownership is\", \"max_tokens\": 20}'
  lm_eval --model local-completions --tasks lambada_openai \\
    --model_args model=DIR,tokenizer=DIR,base_url=http://127.0.0.1:8080/v1/completions,tokenizer_backend=huggingface")]
    Serve(crate::serve::ServeArgs),
    /// Write a model in Hugging Face's format.
    Export {
        /// A checkpoint, a run folder, or a folder in Hugging Face's format.
        checkpoint: PathBuf,
        /// The folder to write, which does not exist yet.
        #[arg(long, alias = "to")]
        out: PathBuf,
        /// Repeat decoupled heads, so that any software that knows LLaMA loads the same function; nothing is saved then.
        #[arg(long)]
        expanded: bool,
        /// Write a class of transformers' own or nothing: the Differential Transformer (one signal head per noise head) becomes
        /// DiffLlama, which needs no code beside the weights.
        #[arg(long)]
        native: bool,
        /// Write what LoRA learned alone, as an adapter of PEFT (adapter_config.json, adapter_model.safetensors) that names the base
        /// model, which is in Hugging Face's format.
        #[arg(long, conflicts_with_all = ["expanded", "native"])]
        adapter: bool,
        /// Leave out a mask that the model is evaluated with (procedure.neuron_dropout.mask_at_eval), which the format has no
        /// place for: what is written computes something else then.
        #[arg(long)]
        without_mask: bool,
        /// Where the weights are read; what is written is the same. Default: flex, the CPU.
        #[arg(long, value_parser = device())]
        device: Option<String>,
    },
    /// Turn a trained model into a leaner one, without training.
    ///
    /// Prints parameters, bytes of cache per token, loss, perplexity and divergence before and after, and writes a run folder
    /// that `model.pretrained` of a recipe goes on from.
    #[command(after_help = "\
Examples:
  polyhead convert checkpoints/run --to grouped_query --kv-heads 2 --out checkpoints/gqa
  polyhead convert checkpoints/run --to decoupled_head --kv-budget 0.25 --out checkpoints/dha
  polyhead convert checkpoints/lagrangian --to decoupled_head --search dynamic --fusing --out checkpoints/again
  polyhead convert checkpoints/run --to key_driven --kv-heads 4 --out checkpoints/driven
  polyhead convert checkpoints/run --to mixture_of_head --shared 8 --top-k 4 --out checkpoints/moh
  polyhead convert llama-folder --to grouped_query --kv-heads 4 --pool norm_restoring --text-file book.txt --out checkpoints/gqa")]
    Convert(crate::commands::convert::ConvertArgs),
    /// Make a trained model larger without changing what it computes.
    ///
    /// Signal heads, channels and layers are repeated so that the logits stay, which is checked and reported; noise that sums to
    /// zero separates the replicas as soon as they are trained. The state of the optimiser is not kept.
    #[command(after_help = "\
Examples:
  polyhead grow checkpoints/run --signal-heads x4 --out checkpoints/grown
  polyhead grow checkpoints/run --width x2 --depth 8 --out checkpoints/grown")]
    Grow(crate::commands::grow::GrowArgs),
    /// Write what every layer of a decoder makes of labelled texts, for a classifier to learn from.
    ///
    /// The texts go through the model as it is; the residual stream behind each layer is pooled over their tokens. The file
    /// holds `features` [texts, layers, d_model], `labels` [texts] and the names of the classes; [data.features] of a recipe
    /// reads it.
    #[command(after_help = "\
Examples:
  polyhead features checkpoints/quickstart --data reviews.jsonl --out reviews.safetensors
  polyhead features llama-folder --data train.jsonl --label-field topic --pool last --out train.safetensors
  polyhead train recipes/classify/features.toml data.features.paths='[\"reviews.safetensors\"]'")]
    Features(crate::commands::features::FeaturesArgs),
    /// Make one vector of each text, with an embedder that was trained on pairs, and measure how well queries find their documents.
    ///
    /// Reads what `polyhead features` made of the texts. Of pairs, recall among the first 1, 5 and 10 and the mean reciprocal
    /// rank are printed as JSON: for the embedder, and for the plain features of each layer.
    #[command(after_help = "\
Examples:
  polyhead features checkpoints/quickstart --pairs --data pairs.jsonl --out pairs.safetensors
  polyhead train recipes/embed/mltp.toml data.feature_pairs.paths='[\"pairs.safetensors\"]'
  polyhead embed checkpoints/mltp --features new.safetensors --out embeddings.safetensors")]
    Embed(crate::commands::embed::EmbedArgs),
    /// Enlarge an image, with a network that was trained for it.
    #[command(after_help = "\
Examples:
  polyhead train recipes/super_resolution/patterns.toml
  polyhead upscale small.png --model checkpoints/patterns --out large.png")]
    Upscale(crate::commands::upscale::UpscaleArgs),
    /// Write the logits of given tokens or of a text, for comparing with other software.
    Logits {
        /// A checkpoint, a run folder, or a folder in Hugging Face's format.
        checkpoint: PathBuf,
        /// Token ids, such as 1,2,3.
        #[arg(long, value_delimiter = ',', required_unless_present = "text", conflicts_with = "text")]
        tokens: Vec<u32>,
        /// A text instead, behind the token that begins texts where the tokenizer puts one.
        #[arg(long, value_parser = typed_text)]
        text: Option<String>,
        /// The safetensors file to write: `tokens` [1, n] and `logits` [1, n, vocab].
        #[arg(long)]
        out: PathBuf,
        /// A file of changes that are made to the model's forward on its way.
        #[arg(long, value_name = "FILE")]
        intervention: Option<PathBuf>,
        /// Default: the recipe's.
        #[arg(long, value_parser = device())]
        device: Option<String>,
    },
    /// Find an intervention by measuring, and write it as a file.
    #[command(subcommand)]
    Tune(crate::commands::tune::TuneCommand),
    /// Score how much each answer of a file of conversations depends on what came before it, a line of JSON each.
    ///
    /// The score is the mean over the tokens of an answer of the largest share that a head of one layer gives to the user's tokens
    /// (arXiv 2411.02688).
    #[command(after_help = "\
Examples:
  polyhead score-context checkpoints/2_sft --data datasets/chat_example.jsonl
  polyhead score-context checkpoints/2_sft --data chats.jsonl --indicator '[IND]' > scores.jsonl")]
    ScoreContext(crate::commands::score_context::ScoreContextArgs),
    /// Show what this machine and this binary can do.
    Doctor,
    /// Train a tokenizer.
    #[command(subcommand)]
    Tokenizer(TokenizerCommand),
    /// Write the manual pages, one a command: polyhead.1, polyhead-train.1, ...
    Man {
        /// The folder to write, which is made if it does not exist.
        #[arg(long)]
        out: PathBuf,
    },
    /// Print completions for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the recipe reference: every key with its type and meaning, as Markdown.
    ///
    /// With --out, write the generated pages of the documentation into a folder: recipe keys, comparison keys, the numbers
    /// that layers log, the command line, the replications, and the JSON Schemas of recipes, comparisons and results.
    Reference {
        /// The folder to write, docs/src/reference in the project's own.
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Print the JSON Schema of a kind of file, with which editors complete and programs check it.
    Schema {
        /// Which kind.
        kind: SchemaKind,
    },
}

/// A kind of file.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum SchemaKind {
    /// A recipe, with or without stages.
    Recipe,
    /// A comparison.
    Comparison,
    /// What a suite reached: its result.json.
    Suite,
    /// What a run reached: its result.json.
    Result,
    /// What a comparison measured: recipes/results/NAME.json.
    Record,
}

/// What to do with tokenizers.
#[derive(Debug, Subcommand)]
pub enum TokenizerCommand {
    /// Learn a byte-level BPE from the text of a recipe.
    Train {
        /// The recipe whose data is learned from.
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
