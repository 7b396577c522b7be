//! `polyhead grow`: a larger model that computes the same, written as a checkpoint to train further.

use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::{Int, Tensor, TensorData};
use clap::Args;
use polyhead_attention::{Mask, Observe};
use polyhead_kernels::comparison::{Disagreement, difference, numbers};
use polyhead_models::Decoder;
use polyhead_models::surgery::{self, Growth};
use polyhead_recipe as recipe;
use polyhead_training::checkpoint::read_file;
use polyhead_training::state::Companions;
use serde_json::json;

use super::new_folder::{NewFolder, must_not_be_data};
use super::{check_memory, must_not_exist};
use crate::allowed::caller;
use crate::console::{put, talk, thousands, wants_json};
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use polyhead_runs::open_trained;
use polyhead_runs::resolve::begin_run;
use polyhead_training::run_folder::files;

/// What grows.
#[derive(Debug, Args)]
pub struct GrowArgs {
    /// A checkpoint or a run folder.
    pub checkpoint: PathBuf,
    /// The run folder to write: `model.pretrained`, train, eval, generate and export take it.
    #[arg(long)]
    pub out: PathBuf,
    /// How it grows.
    #[command(flatten)]
    pub growth: recipe::Growth,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    pub device: Option<String>,
}

/// What grown logits may differ by.
const UNCHANGED: f64 = 1e-4;
/// Tokens that logits are compared over, at most.
const COMPARED: usize = 256;

/// Writes the grown model, if it computes what its parent does.
pub fn grow(args: &GrowArgs) -> Result<(), Failure> {
    must_not_exist(&args.out)?;
    let parent = open_trained(&args.checkpoint, args.device.as_deref(), caller())?.unmasked(caller());
    let Some(trained_by) = &parent.recipe else {
        let problem = format!(
            "{}: only a checkpoint of ours can grow, because its recipe goes on; a run with model.pretrained = {:?}, \
             training.steps = 1 and optimizer.adamw.lr = 0 makes one",
            args.checkpoint.display(),
            args.checkpoint
        );
        return Err(Problems::plain(problem).into());
    };
    must_not_be_data(trained_by, &args.out)?;
    let recipe::Growth { signal_heads, width, depth, noise, seed } = args.growth;
    let growth = Growth { signal_heads, width, depth, noise, seed };
    let size = surgery::grown_config(parent.model.config(), &growth)?.costs(parent.model.vocab_size()).parameters;
    // The model as it is made, what is put into it, and what is written.
    check_memory("flex", size.saturating_mul(12), "the grown model", "smaller factors take less")?;
    let grown = surgery::grow(&parent.model, &growth)?;
    for (name, model) in [("parent", &parent.model), ("grown", &grown)] {
        let (config, parameters) = (model.config(), thousands(model.num_params() as u64));
        talk!("{name}: {parameters} parameters, {} layers of {} channels", config.n_layers, config.d_model);
    }
    let compared = COMPARED.min(trained_by.training.seq_len);
    let difference = largest_difference(&parent.model, &grown, compared);
    match &difference {
        Ok(most) => {
            talk!("logits: they differ by at most {most:.1e} over {compared} tokens (allowed: {UNCHANGED:.0e})")
        }
        Err(disagreement) => talk!("logits: {disagreement}"),
    }
    if difference.is_err() || difference.as_ref().is_ok_and(|most| *most > UNCHANGED) {
        let problem =
            "the grown model computes something else; nothing was written\n  hint: less --noise costs fewer digits";
        return Err(Failure::Run(problem.into()));
    }
    let mut companions = Companions::new();
    for name in [files::DATA, files::TOKENIZER, files::TOKENIZER_CONFIG] {
        if parent.path.join(name).exists() {
            companions.push((name.into(), read_file(&parent.path, name)?));
        }
    }
    let folder = NewFolder::begin(&args.out)?;
    let made = begin_run(folder.path(), &grown, trained_by.clone(), companions, caller())?;
    let checkpoint = args.out.join(made.file_name().unwrap_or_default());
    folder.finish()?;
    talk!("the optimiser starts afresh: its state belonged to the parent's weights");
    talk!("next: model.pretrained = {:?} in a recipe, or train {}", args.out, args.out.join(files::RECIPE).display());
    let sizes = [&parent.model, &grown].map(|model| model.num_params());
    match wants_json() {
        true => put!(
            "{:#}",
            json!({ "checkpoint": checkpoint, "parameters": sizes, "largest_difference": difference.ok() })
        ),
        false => put!("{}", checkpoint.display()),
    }
}

/// Over one row of tokens.
fn largest_difference(a: &Decoder, b: &Decoder, tokens: usize) -> Result<f64, Disagreement> {
    let ids: Vec<i32> = (0..tokens).map(|at| (at * 7919 % a.vocab_size()) as i32).collect();
    let logits = |model: &Decoder| {
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids.clone(), [1, tokens]), &model.device());
        model.logits(model.forward(ids, &Mask::causal(), None, Observe::Nothing).hidden)
    };
    // The maximum of a tensor may drop a NaN: numbers that cannot be compared are no agreement.
    difference(&numbers(logits(a)), &numbers(logits(b))).map(|difference| difference.worst)
}
