//! Attention sinks by the residual stream: its sink channels (Kang et al. 2025, arXiv 2503.03321), and secondary sinks, tokens whose residual stream turns into the direction of the first one, over which layers
//! (JeffreyWong20/Secondary-Attention-Sinks; its functions are followed).
//!
//! The sink is the token with the largest norm among the first ones; it is on from the layer behind the largest rise of its norm up to
//! the layer behind the steepest fall. A later token is a member in the layers between in which |cos| to it is above 0.9.

use std::ops::Range;

use polyhead_attention::StreamSite;
use polyhead_models::Decoder;
use polyhead_models::intervention::visual_sinks::{EPS_PHI, phi};
use serde::Serialize;

use crate::lens::read;

/// What tokens are by how long they are sinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Never one.
    None,
    /// In few layers.
    Noise,
    /// In some.
    Secondary,
    /// In nearly all.
    Primary,
}

/// Where sinks are told apart. The authors' numbers are for 28 to 64 layers: primary from all but 15 layers on, noise up to 4.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SinkRule {
    /// |cos| that members are above.
    pub cosine: f64,
    /// Layers that a primary sink has at least.
    pub primary: usize,
    /// Layers that noise has at most.
    pub noise: usize,
}

impl SinkRule {
    /// The authors', for a model of so many layers.
    pub fn published(n_layers: usize) -> Self {
        Self { cosine: 0.9, primary: n_layers.saturating_sub(15), noise: 4 }
    }

    /// The same in shares of the layers for models of fewer than 28: primary from 60 % on, noise one layer; chosen by us.
    pub fn scaled(n_layers: usize) -> Self {
        match n_layers {
            28.. => Self::published(n_layers),
            _ => Self { primary: (3 * n_layers).div_ceil(5), noise: 1, ..Self::published(n_layers) },
        }
    }
}

/// The sinks of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Sinks {
    /// The position of the first sink.
    pub first: usize,
    /// The layers in which it is on.
    pub on: Range<usize>,
    /// `[layers][tokens]`: the cosine to the first sink.
    pub cosine: Vec<Vec<f64>>,
    /// `[layers][tokens]`: whether a token is a member.
    pub member: Vec<Vec<bool>>,
    /// `[tokens]`: the number of layers in which it is one.
    pub lifetime: Vec<usize>,
    /// `[tokens]`: the first of them.
    pub birth: Vec<Option<usize>>,
    /// `[tokens]`: what it is.
    pub kind: Vec<Kind>,
}

/// `[layers][tokens][d_model]`: the residual stream of a text at a site of every layer.
pub fn stream(model: &Decoder, tokens: &[u32], site: StreamSite) -> Vec<Vec<Vec<f32>>> {
    let of_layer = |values: Vec<f32>| values.chunks(model.config().d_model).map(<[f32]>::to_vec).collect();
    let taps = read(model, &[tokens.to_vec()], &[site.into()]).into_iter();
    taps.map(|tap| of_layer(tap.values.into_data().iter::<f32>().collect())).collect()
}

/// The first layer in whose input sinks are looked for: the third as published, or the last one of smaller models.
pub fn first_layer(n_layers: usize) -> usize {
    2.min(n_layers.saturating_sub(1))
}

/// `[layers][d_model]`: φ of the first token by each channel alone, the mean over texts; each of them is what layers read,
/// `[layers][tokens][d_model]`.
pub fn channel_sizes(texts: &[Vec<Vec<Vec<f32>>>]) -> Vec<Vec<f64>> {
    let first = |text: &Vec<Vec<Vec<f32>>>, layer: usize| -> Vec<f64> {
        let token = &text[layer][0];
        (0..token.len()).map(|channel| phi(token, &[channel], EPS_PHI)).collect()
    };
    let of_layer = |layer: usize| {
        let all: Vec<Vec<f64>> = texts.iter().map(|text| first(text, layer)).collect();
        let mean = |channel: usize| all.iter().map(|sizes| sizes[channel]).sum::<f64>() / all.len() as f64;
        (0..all.first().map_or(0, Vec::len)).map(mean).collect()
    };
    (0..texts.first().map_or(0, Vec::len)).map(of_layer).collect()
}

/// The channels whose sizes are above τ in more than half of the layers from [`first_layer`] on. Where the authors' channels of a model
/// come from is not published; this is ours.
pub fn sink_channels(sizes: &[Vec<f64>], tau: f64) -> Vec<usize> {
    let layers = &sizes[first_layer(sizes.len()).min(sizes.len())..];
    let often = |channel: &usize| 2 * layers.iter().filter(|sizes| sizes[*channel] > tau).count() > layers.len();
    (0..sizes.first().map_or(0, Vec::len)).filter(often).collect()
}

/// The sinks by what layers write, `[layers][tokens][d_model]`, the first one among `candidates`.
pub fn sinks(hidden: &[Vec<Vec<f32>>], candidates: &[usize], rule: SinkRule) -> Sinks {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let norm = |x: &[f32]| dot(x, x).sqrt();
    let mean_norm = |token: usize| hidden.iter().map(|layer| norm(&layer[token])).sum::<f64>();
    let first = candidates.iter().copied().max_by(|&a, &b| mean_norm(a).total_cmp(&mean_norm(b)).then(b.cmp(&a)));
    let first = first.unwrap_or_default();
    let norms: Vec<f64> = hidden.iter().map(|layer| norm(&layer[first])).collect();
    let steps: Vec<f64> = norms.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let largest = |from: usize, sign: f64| {
        let order = |a: &usize, b: &usize| (sign * steps[*a]).total_cmp(&(sign * steps[*b])).then(b.cmp(a));
        (from..steps.len()).max_by(order).map_or(hidden.len(), |step| step + 1)
    };
    let start = largest(0, 1.0);
    let on = start..largest(start, -1.0);
    let tokens = hidden.first().map_or(0, Vec::len);
    let cosine: Vec<Vec<f64>> = hidden
        .iter()
        .map(|layer| {
            let of = |token: usize| {
                dot(&layer[token], &layer[first]) / (norm(&layer[token]) * norm(&layer[first])).max(f64::MIN_POSITIVE)
            };
            (0..tokens).map(of).collect()
        })
        .collect();
    let belongs = |layer: usize, token: usize| {
        on.contains(&layer) && (token == first || (token > first && cosine[layer][token].abs() > rule.cosine))
    };
    let member: Vec<Vec<bool>> =
        (0..hidden.len()).map(|layer| (0..tokens).map(|token| belongs(layer, token)).collect()).collect();
    let lifetime: Vec<usize> = (0..tokens).map(|token| member.iter().filter(|layer| layer[token]).count()).collect();
    let birth = (0..tokens).map(|token| member.iter().position(|layer| layer[token])).collect();
    let kind = lifetime.iter().map(|&lifetime| match lifetime {
        0 => Kind::None,
        layers if layers >= rule.primary => Kind::Primary,
        layers if layers > rule.noise => Kind::Secondary,
        _ => Kind::Noise,
    });
    let kind = kind.collect();
    Sinks { first, on, cosine, member, lifetime, birth, kind }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_are_sinks_where_the_first_token_is_large_in_most_layers() {
        // Of four channels, the second one is large in three of the four layers that count, the last one in the first two alone.
        let token =
            |large: &[usize]| (0..4).map(|at| if large.contains(&at) { 30.0 } else { 0.1 }).collect::<Vec<f32>>();
        let text: Vec<Vec<Vec<f32>>> = [vec![3], vec![3], vec![1], vec![1], vec![0], vec![1]]
            .iter()
            .map(|large| vec![token(large), token(&[2])])
            .collect();
        let sizes = channel_sizes(&[text.clone(), text]);
        assert!((sizes[2][1] - 2.0).abs() < 1e-3 && sizes[2][0] < 0.01, "30 of a root mean square of 15: {sizes:?}");
        assert_eq!(sink_channels(&sizes, 1.5), [1]);
        assert_eq!(sink_channels(&sizes, 2.5), [] as [usize; 0]);
        assert_eq!((first_layer(1), first_layer(2), first_layer(30)), (0, 1, 2));
    }
}
