//! `polyhead convert`: a leaner model made of a trained one, compared with it and written as a checkpoint.

use polyhead_kernels::seed_random;
use std::path::{Path, PathBuf};

use clap::Args;
use polyhead_data::{DataConfig, Loader, Syntax, TextConfig};
use polyhead_models::{Batch, Decoder};

use super::must_not_exist;
use super::new_folder::{NewFolder, must_not_be_data};
use crate::allowed::caller;
use crate::console::{Progress, put, talk, wants_json};
use polyhead_recipe::Conversion;
use polyhead_recipe::Problems;
use polyhead_recipe::Recipe;
use polyhead_runs::Calibration;
use polyhead_runs::Failure;
use polyhead_runs::data::{TrainingData, open_tokens, options, project_root, record_text};
use polyhead_runs::pretrained::tokenizer_files;
use polyhead_runs::resolve::begin_run;
use polyhead_runs::{Trained, open_trained};
use polyhead_training::run_folder::files;
use serde_json::Value;

mod summary;

pub use summary::{Measured, cached_bytes};

/// What is converted, into what, and where to.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// A checkpoint, a run folder, or a folder in Hugging Face's format.
    pub checkpoint: PathBuf,
    /// What it is turned into.
    #[command(flatten)]
    pub conversion: Conversion,
    /// The run folder to write: `model.pretrained`, eval, generate and export take it.
    #[arg(long)]
    pub out: PathBuf,
    /// Compare on the text of these files, from its beginning, instead of what is held out of the data that the model's recipe
    /// names. key_driven measures keys on it too, but for its last part.
    #[arg(long, alias = "text")]
    pub text_file: Vec<String>,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    pub device: Option<String>,
    /// Batches to compare on, and to measure keys on, at most; 0 takes all.
    #[arg(long, default_value_t = BATCHES)]
    pub batches: u64,
}

/// What a model and what becomes of it are compared on.
#[derive(Debug, Clone, Copy)]
pub struct On {
    /// The whole of a text that was named for it, instead of what is held out of a recipe's data.
    pub text: bool,
    /// Batches at most; 0 takes all.
    pub batches: u64,
}

/// Batches to compare on; chosen by us.
pub const BATCHES: u64 = 20;

/// Converts a model, prints what that did, and writes it.
pub fn convert(args: &ConvertArgs) -> Result<(), Failure> {
    must_not_exist(&args.out)?;
    args.conversion.check().map_err(Problems::plain)?;
    let parent = open_trained(&args.checkpoint, args.device.as_deref(), caller())?.unmasked(caller());
    let recipe = recipe_for(args, &parent)?;
    must_not_be_data(&recipe, &args.out)?;
    let folder = NewFolder::begin(&args.out)?;
    let on = On { text: !args.text_file.is_empty(), batches: args.batches };
    let (_, summary) = perform(&args.conversion, &parent, recipe, (folder.path(), on))?;
    folder.finish()?;
    if wants_json() {
        put!("{summary:#}")?;
    }
    talk!("wrote {0}; next: model.pretrained = \"{0}\" in a recipe, or eval, generate, export", args.out.display());
    Ok(())
}

/// Converts a model, prints what that did to it on the data of `recipe`, and writes it to a folder: its `conversion.json`
/// last, which says that all is there, and which is given too.
///
/// # Errors
/// If the model cannot become what is asked for, or something cannot be read or written.
pub fn perform(
    conversion: &Conversion,
    parent: &Trained,
    recipe: Recipe,
    (out, on): (&Path, On),
) -> Result<(Measured, Value), Failure> {
    // A fresh router's weights are a function of the recipe's seed.
    seed_random(recipe.debug.seed);
    let opened = open_tokens(&recipe, parent.tokenizer.as_ref())?;
    opened.notes.iter().for_each(|note| talk!("note: {note}"));
    let child = child_of(parent, conversion, &opened.train, on.batches)?;
    let held_out = match (on.text, &parent.tokenizer) {
        (true, Some(tokenizer)) => {
            let documents = recipe.data.documents(&project_root())?;
            let (rows, description) = documents.in_order(tokenizer, &options(&recipe))?;
            talk!("compared on: {description}, from the beginning");
            rows
        }
        _ => {
            talk!("compared on: what is kept for validation of {}", opened.description);
            opened.validation.clone()
        }
    };
    let models = [&parent.model, &child];
    let measured = Measured::on(models, &held_out, on.batches)?;
    if !wants_json() {
        summary::print(&measured, models, opened.vocab_size)?;
    }

    let recipe = parent.recipe.clone().unwrap_or(recipe);
    let mut companions = vec![(files::DATA.to_owned(), record_text(&opened.record()))];
    if let Some(tokenizer) = &parent.tokenizer {
        companions.extend(tokenizer_files(tokenizer));
    }
    begin_run(out, &child, recipe, companions, caller())?;
    summary::draw(out, models)?;
    let summary = summary::summarize(out, conversion, models, &measured)?;
    Ok((measured, summary))
}

/// The converted model; keys are measured on batches of `train`, where the conversion asks for it.
fn child_of(parent: &Trained, conversion: &Conversion, train: &Loader, batches: u64) -> Result<Decoder, Failure> {
    let (count, layers) = (batch_count(train, batches), parent.model.layers.len() as u64);
    let mut progress = Progress::new("norms of keys", count * layers);
    let mut passed = || progress.step(|at| summary::pass_of(at, [1, layers, count]));
    let calibration = Calibration { batches: &mut batches_of(train, batches), passed: &mut passed };
    polyhead_runs::convert(conversion, parent, calibration, caller())
}

/// At most this many batches of the first epoch; 0 gives all.
fn batch_count(loader: &Loader, batches: u64) -> u64 {
    let all = loader.batches_per_epoch().max(1);
    if batches == 0 { all } else { batches.min(all) }
}

fn batches_of(loader: &Loader, batches: u64) -> impl Iterator<Item = Result<Batch, Failure>> {
    (0..batch_count(loader, batches)).map(|position| Ok(loader.batch(position)?))
}

/// The recipe whose data both models are compared on.
fn recipe_for(args: &ConvertArgs, parent: &Trained) -> Result<Recipe, Failure> {
    let text = (!args.text_file.is_empty()).then(|| {
        DataConfig::Text(TextConfig {
            paths: args.text_file.clone(),
            validation_paths: Vec::new(),
            syntax: Syntax::Prose,
        })
    });
    let mut recipe = match (&parent.recipe, &text) {
        (Some(recipe), _) => recipe.clone(),
        (None, Some(_)) => {
            let seq_len = parent.max_positions.min(512);
            let minimal = format!(
                "[model]\npretrained = \".\"\n[data.rust_docs]\n[training]\nsteps = 1\nseq_len = {seq_len}\nbatch_size = 4\n"
            );
            toml::from_str(&minimal).map_err(|error| Failure::Run(error.to_string()))?
        }
        (None, None) => {
            let problem = format!("{} says nothing about data: name a text with --text-file", parent.path.display());
            return Err(Problems::plain(problem).into());
        }
    };
    if let Some(text) = text {
        if parent.tokenizer.is_none() {
            let problem = format!("--text-file: {} has no tokenizer", parent.path.display());
            return Err(Problems::plain(problem).into());
        }
        recipe.data = text;
    }
    Ok(recipe)
}
