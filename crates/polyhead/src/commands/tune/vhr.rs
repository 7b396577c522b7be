//! `polyhead tune vhr`: heads whose output changes most with a passage of a prompt, made louder.

use clap::Args;
use polyhead_models::intervention::gift::Deviation;
use polyhead_models::intervention::vhr::{VhrConfig, Without, reinforce};
use polyhead_models::intervention::{AmountConfig, ChangeConfig, EditConfig, InterventionConfig};
use polyhead_runs::Failure;
use serde_json::json;

use super::on_prompt::{OnPrompt, Opened};
use super::refuse;
use crate::probe::choose;

/// How heads are reinforced.
#[derive(Debug, Args)]
pub struct VhrArgs {
    #[command(flatten)]
    on: OnPrompt,
    /// What the heads are scaled by.
    #[arg(long, default_value_t = 2.0)]
    alpha: f64,
    /// Layers whose heads may be scaled, from 0. Default: all.
    #[arg(long, value_delimiter = ',')]
    layers: Vec<usize>,
    /// Cut the passage out instead of hiding it: positions behind it move up.
    #[arg(long)]
    cut: bool,
}

/// Finds the heads, and writes what was found.
pub fn vhr(args: &VhrArgs) -> Result<(), Failure> {
    refuse(args.alpha.is_finite(), || format!("--alpha ({}) must be a finite number", args.alpha))?;
    let opened = args.on.open()?;
    let Opened { trained, tokens, passage, .. } = &opened;
    let layers = choose("--layers", &args.layers, trained.model.layers.len())?;
    let without = if args.cut { Without::Removed } else { Without::Masked };
    let how = VhrConfig { layers, alpha: args.alpha, without, both: true, deviation: Deviation::Population };
    let found = reinforce(&trained.model, tokens, passage.clone(), &how);
    let chosen: Vec<usize> = found.edits.iter().map(|(layer, _)| *layer).collect();
    if chosen.is_empty() {
        return Err(Failure::Run("no head changes more with the passage than the others of its layer".into()));
    }
    let moved = |by: usize| {
        let edit = |&layer: &usize| {
            let selected = &found.layers[layer].selected;
            let count = selected.len();
            EditConfig {
                layers: Some(vec![layer]),
                heads: Some((0..count).filter(|head| selected[(head + by) % count]).collect()),
                ..EditConfig::new("z", ChangeConfig::Scale(AmountConfig::Number(args.alpha)))
            }
        };
        InterventionConfig { edits: chosen.iter().map(edit).collect(), ..InterventionConfig::default() }
    };
    let layers =
        found.layers.iter().map(|own| json!({ "vhd": own.vhd, "relative": own.relative, "selected": own.selected }));
    args.on.write(&opened, &moved, json!({ "layers": layers.collect::<Vec<_>>() }))
}
