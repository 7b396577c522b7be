//! `polyhead tune vhr`: heads whose output changes most with a passage of a prompt, made louder.

use std::path::PathBuf;

use clap::Args;
use polyhead_models::intervention::gift::Deviation;
use polyhead_models::intervention::vhr::{VhrConfig, Without, reinforce};
use polyhead_models::intervention::{AmountConfig, ChangeConfig, EditConfig, InterventionConfig, Span, TextSpan};
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use polyhead_runs::intervention::{decode, write};
use serde_json::json;

use super::plain;
use crate::console::{put, talk};

/// How heads are reinforced.
#[derive(Debug, Args)]
pub struct VhrArgs {
    /// A checkpoint or a run folder.
    checkpoint: PathBuf,
    /// The prompt.
    #[arg(long)]
    prompt: String,
    /// The passage of it, to the letter.
    #[arg(long)]
    passage: String,
    /// The intervention to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// What the heads are scaled by.
    #[arg(long, default_value_t = 2.0)]
    alpha: f64,
    /// Layers whose heads may be scaled, from 0. Default: all.
    #[arg(long, value_delimiter = ',')]
    layers: Vec<usize>,
    /// Cut the passage out instead of hiding it: positions behind it move up.
    #[arg(long)]
    cut: bool,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    device: Option<String>,
}

/// Finds the heads, and writes what was found.
pub fn vhr(args: &VhrArgs) -> Result<(), Failure> {
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
