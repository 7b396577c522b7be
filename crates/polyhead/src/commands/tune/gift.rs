//! `polyhead tune gift`: the tokens of a passage that a question begins to look at, looked at more while the answer is generated.

use clap::Args;
use polyhead_attention::QuerySite;
use polyhead_evaluation::lens::read;
use polyhead_models::intervention::gift::{Deviation, GazeConfig, content_words, gaze};
use polyhead_models::intervention::{ChangeConfig, EditConfig, InterventionConfig, RangeConfig, Span};
use polyhead_runs::Failure;
use polyhead_runs::intervention::decode;
use serde_json::json;

use super::on_prompt::{OnPrompt, Opened, part};
use super::refuse;
use crate::console::talk;
use crate::probe::choose;

/// How the gaze is found, and where it is shifted.
#[derive(Debug, Args)]
pub struct GiftArgs {
    #[command(flatten)]
    on: OnPrompt,
    /// The question of the prompt, to the letter.
    #[arg(long)]
    question: String,
    /// The exponent of the token that is looked at most: its weight is multiplied by e^alpha.
    #[arg(long, default_value_t = 5.0)]
    alpha: f64,
    /// Layers in which it is found, from 0. Default: the one a third of the way up, as published for 32 layers.
    #[arg(long, value_delimiter = ',', value_name = "LAYERS")]
    found_in: Vec<usize>,
    /// Layers in which it is shifted, from 0. Default: those behind that one up to two thirds of the way.
    #[arg(long, value_delimiter = ',')]
    layers: Vec<usize>,
}

/// Finds the gaze, and writes what was found.
pub fn gift(args: &GiftArgs) -> Result<(), Failure> {
    refuse(args.alpha.is_finite(), || format!("--alpha ({}) must be a finite number", args.alpha))?;
    let opened = args.on.open()?;
    let Opened { trained, tokens, passage, .. } = &opened;
    let (model, tokenizer) = (&trained.model, trained.text_tokenizer()?);
    let question = part(tokenizer, tokens, "--question", &args.question)?;
    refuse(passage.end <= question.start || question.end <= passage.start, || {
        "--question and --passage must be apart: one token of the prompt is in both".into()
    })?;
    let count = model.layers.len();
    let third = 11 * count / 32;
    let or = |option, named: &[usize], default: Vec<usize>| match named {
        [] => Ok(default),
        named => choose(option, named, count),
    };
    let found_in = or("--found-in", &args.found_in, vec![third])?;
    let layers = or(
        "--layers",
        &args.layers,
        (third + 1..=(22 * count / 32).max(third + 1)).filter(|&layer| layer < count).collect(),
    )?;
    refuse(!layers.is_empty(), || {
        "the model has one layer: the gaze is shifted behind the one that it is found in".into()
    })?;
    let site = QuerySite::Weights.into();
    for &layer in found_in.iter().chain(&layers) {
        let mechanism = model.config().mechanism(layer);
        let absent = mechanism.absent(site);
        refuse(absent.is_none(), || {
            format!("{} in layer {layer} has no map: {}", mechanism.name(), absent.unwrap_or_default())
        })?;
    }
    let taps = read(model, std::slice::from_ref(tokens), &[site]);
    let maps: Vec<Vec<Vec<Vec<f32>>>> = taps
        .iter()
        .filter(|tap| found_in.contains(&tap.layer))
        .map(|tap| {
            let numbers: Vec<f32> = tap.values.clone().into_data().iter::<f32>().collect();
            let seq = tokens.len();
            numbers.chunks(seq * seq).map(|map| map.chunks(seq).map(<[f32]>::to_vec).collect()).collect()
        })
        .collect();
    let content = content_words(&tokens[question.clone()], &decode(tokenizer));
    let found = gaze(&maps, (passage.clone(), question.clone()), &content, args.alpha, Deviation::Population);
    if found.multiplier.iter().all(|&factor| factor == 1.0) {
        talk!(
            "note: no content word looks at a token of the passage more than the token before it; the file changes nothing"
        );
    }
    let moved = |by: usize| {
        let places = passage.len();
        let multiplier = (0..places).map(|at| found.multiplier[(at + by) % places]).collect();
        let question = RangeConfig { from: question.start, to: question.end };
        let edit = EditConfig {
            layers: Some(layers.clone()),
            // Those that are generated; of a text that is measured, those of the answer.
            tokens: Span::Range(RangeConfig { from: tokens.len(), to: tokens.len() + trained.max_positions }),
            keys: Span::Range(RangeConfig { from: passage.start, to: passage.end }),
            ..EditConfig::new("weights", ChangeConfig::Gaze(GazeConfig { multiplier, question }))
        };
        InterventionConfig { edits: vec![edit], ..InterventionConfig::default() }
    };
    let words: Vec<String> = tokens[passage.clone()].iter().map(|&id| tokenizer.token_text(id)).collect();
    let result = json!({ "found_in": found_in, "layers": layers, "content": content, "passage": words, "multiplier": found.multiplier });
    args.on.write(&opened, &moved, result)
}
