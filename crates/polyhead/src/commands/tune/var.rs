//! `polyhead tune var`: the sinks of a prompt by the channels of the residual stream, and attention taken from them for a passage.

use std::collections::BTreeSet;

use clap::Args;
use polyhead_attention::StreamSite;
use polyhead_evaluation::sinks::{channel_sizes, first_layer, sink_channels, stream};
use polyhead_models::intervention::visual_sinks::{EPS_PHI, TAU, VarConfig, phi};
use polyhead_models::intervention::{ChangeConfig, EditConfig, InterventionConfig, RangeConfig, Span};
use polyhead_runs::Failure;
use serde_json::json;

use super::on_prompt::{OnPrompt, Opened};
use super::refuse;

/// How sinks are found, and how much is taken from them.
#[derive(Debug, Args)]
pub struct VarArgs {
    #[command(flatten)]
    on: OnPrompt,
    /// The sink channels. Default: those above --tau at the first token in more than half of the layers.
    #[arg(long, value_delimiter = ',')]
    channels: Vec<usize>,
    /// What the size of a sink channel is above at a sink; it is never above √d_model.
    #[arg(long, default_value_t = TAU)]
    tau: f64,
    /// What is left of the weight on sinks.
    #[arg(long, default_value_t = VarConfig::default().p)]
    p: f64,
    /// The largest share of the passage's weight that may be on sinks.
    #[arg(long, default_value_t = VarConfig::default().rho)]
    rho: f64,
    /// The least weight on the passage.
    #[arg(long, default_value_t = VarConfig::default().least_mass)]
    least_mass: f64,
}

/// Finds the sinks, and writes what was found.
pub fn var(args: &VarArgs) -> Result<(), Failure> {
    let VarArgs { tau, p, rho, least_mass, .. } = *args;
    refuse(tau.is_finite() && tau > 0.0, || format!("--tau ({tau}) must be above 0"))?;
    for (option, value) in [("--p", p), ("--rho", rho), ("--least-mass", least_mass)] {
        refuse((0.0..=1.0).contains(&value), || format!("{option} ({value}) must be 0 to 1"))?;
    }
    let opened = args.on.open()?;
    let Opened { trained, tokens, passage, .. } = &opened;
    let (layers, d_model) = (trained.model.layers.len(), trained.model.config().d_model);
    if let Some(channel) = args.channels.iter().find(|&&channel| channel >= d_model) {
        refuse(false, || format!("--channels: {channel} is not below {d_model}, how many there are"))?;
    }
    let text = [stream(&trained.model, tokens, StreamSite::ResidPre)];
    let sizes = channel_sizes(&text);
    let channels = if args.channels.is_empty() { sink_channels(&sizes, tau) } else { args.channels.clone() };
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    if channels.is_empty() {
        let most = largest(&mut sizes[first_layer(layers)..].iter().flatten().copied());
        return Err(Failure::Run(format!(
            "no channel of the residual stream is above --tau ({tau}) at the first token in most layers, the largest is {most:.1}: name \
             --channels (`inspect --sinks` shows the largest), or a lower --tau"
        )));
    }
    let size = |layer: usize, at: usize| phi(&text[0][layer][at], &channels, EPS_PHI);
    let found: Vec<(usize, BTreeSet<usize>)> = (first_layer(layers)..layers)
        .map(|layer| (layer, (0..tokens.len()).filter(|&at| size(layer, at) > tau).collect::<BTreeSet<_>>()))
        .filter(|(_, sinks)| sinks.iter().any(|sink| passage.contains(sink)))
        .collect();
    if found.is_empty() {
        let all = (first_layer(layers)..layers).flat_map(|layer| passage.clone().map(move |at| (layer, at)));
        let most = largest(&mut all.map(|(layer, at)| size(layer, at)));
        return Err(Failure::Run(format!(
            "no token of the passage is a sink: the largest size there is {most:.1}, and --tau {tau}; where the passage has no sink, \
             attention stays as it is"
        )));
    }
    let moved = |by: usize| {
        let edit = |(layer, sinks): &(usize, BTreeSet<usize>)| {
            let place = |&sink: &usize| shifted(sink, by, passage, tokens.len());
            let sinks = sinks.iter().map(place).collect::<BTreeSet<usize>>();
            let sinks = sinks.into_iter().map(|at| Span::Range(RangeConfig { from: at, to: at + 1 })).collect();
            let how = VarConfig { sinks, rho, least_mass, p, ..VarConfig::default() };
            EditConfig {
                layers: Some(vec![*layer]),
                keys: Span::Range(RangeConfig { from: passage.start, to: passage.end }),
                ..EditConfig::new("weights", ChangeConfig::Redistribute(how))
            }
        };
        InterventionConfig { edits: found.iter().map(edit).collect(), ..InterventionConfig::default() }
    };
    let of_layer = |(layer, sinks): &(usize, BTreeSet<usize>)| json!({ "layer": layer, "sinks": sinks });
    let result = json!({ "tau": tau, "channels": channels, "layers": found.iter().map(of_layer).collect::<Vec<_>>() });
    args.on.write(&opened, &moved, result)
}

/// A place further on, going round: inside of the passage one of it, outside of it one that is not.
fn shifted(at: usize, by: usize, passage: &std::ops::Range<usize>, tokens: usize) -> usize {
    if passage.contains(&at) {
        return passage.start + (at - passage.start + by) % passage.len();
    }
    let outside = tokens - passage.len();
    let place = |at: usize| if at < passage.start { at } else { at - passage.len() };
    let moved = (place(at) + by) % outside;
    if moved < passage.start { moved } else { moved + passage.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_move_within_their_side_of_the_passage() {
        let all = |by: usize| (0..8).map(|at| shifted(at, by, &(2..5), 8)).collect::<Vec<_>>();
        assert_eq!(all(0), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(all(1), [1, 5, 3, 4, 2, 6, 7, 0]);
    }
}
