//! Head divergence and reinforcement (VHD and VHR: He et al. 2024, arXiv 2412.13949): heads whose output changes most with a span of the
//! prompt, and the same heads made louder. The span may be a retrieved passage instead of an image.
//!
//! ```text
//! VHD = ‖z - z_without‖₂ at the last position,  TA = ‖z_without‖²
//! VHD ← 0 where both VHD and TA are above mean + std of the layer;  heads above the layer's median: z ← α z
//! ```
//! The paper does not say which standard deviation, nor whether the span is hidden or cut out: both are choices here.

use std::ops::Range;

use burn::tensor::{Int, Tensor, TensorData};
use polyhead_attention::{Amount, At, Change, Edit, Mask, Positions, QueryHead, QuerySite};

use super::gift::{Deviation, mean_and_deviation};
use crate::sites::{SitePlan, Tap};
use crate::{Decoder, Pass};

/// How the heads of a layer diverge.
#[derive(Debug, Clone, PartialEq)]
pub struct Divergence {
    /// `[heads]`: ‖z - z_without‖₂
    pub vhd: Vec<f64>,
    /// `[heads]`: the same over ‖z‖₂.
    pub relative: Vec<f64>,
    /// `[heads]`: ‖z_without‖²
    pub text_activation: Vec<f64>,
    /// `[heads]`: whether a head surges without the span.
    pub outlier: Vec<bool>,
    /// `[heads]`: VHD, 0 for outliers.
    pub cleaned: Vec<f64>,
    /// Of the cleaned values.
    pub median: f64,
    /// `[heads]`: whether a head is above the median.
    pub selected: Vec<bool>,
}

/// The divergence of a layer from its head outputs at the last position, `[heads][head_dim]`, with and without the span.
pub fn divergence(with: &[Vec<f32>], without: &[Vec<f32>], deviation: Deviation) -> Divergence {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let each = |of: &dyn Fn(usize) -> f64| (0..with.len()).map(of).collect::<Vec<f64>>();
    let vhd =
        each(&|head| norm(&mut with[head].iter().zip(&without[head]).map(|(&a, &b)| f64::from(a) - f64::from(b))));
    let size = |z: &[Vec<f32>], head: usize| norm(&mut z[head].iter().map(|&value| f64::from(value)));
    let relative = each(&|head| vhd[head] / size(with, head).max(f64::MIN_POSITIVE));
    let text_activation = each(&|head| size(without, head).powi(2));
    let bound = |values: &[f64]| {
        let (mean, deviation) = mean_and_deviation(values, deviation);
        mean + deviation
    };
    let bounds = [bound(&vhd), bound(&text_activation)];
    let outlier: Vec<bool> =
        (0..with.len()).map(|head| vhd[head] > bounds[0] && text_activation[head] > bounds[1]).collect();
    let cleaned: Vec<f64> = vhd.iter().zip(&outlier).map(|(&vhd, &outlier)| if outlier { 0.0 } else { vhd }).collect();
    let median = median(&cleaned);
    let selected = cleaned.iter().map(|&value| value > median).collect();
    Divergence { vhd, relative, text_activation, outlier, cleaned, median, selected }
}

/// The middle value, or the mean of the middle two.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        count if count % 2 == 0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
        _ => sorted[middle],
    }
}

/// T-VHD: over layers, the sum of the `top_k` largest VHD of each.
pub fn total_divergence(layers: &[Divergence], top_k: usize) -> f64 {
    let of_layer = |layer: &Divergence| {
        let mut sorted = layer.vhd.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted.iter().take(top_k).sum::<f64>()
    };
    layers.iter().map(of_layer).sum()
}

/// How the prompt is without a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Without {
    /// No query sees it; positions stay.
    Masked,
    /// It is cut out; positions behind it move up.
    Removed,
}

/// How heads are reinforced.
#[derive(Debug, Clone, PartialEq)]
pub struct VhrConfig {
    /// The layers whose heads are scaled.
    pub layers: Vec<usize>,
    /// The factor; the paper's is 2.
    pub alpha: f64,
    /// How the prompt is without the span.
    pub without: Without,
    /// Whether heads are scaled in the pass without the span too.
    pub both: bool,
    /// Which standard deviation outliers are told by.
    pub deviation: Deviation,
}

/// What was found in a prompt.
#[derive(Debug, Clone)]
pub struct Reinforced {
    /// Of each layer, those below it being scaled already.
    pub layers: Vec<Divergence>,
    /// The changes, for the whole prompt and what is generated behind it.
    pub edits: Vec<(usize, Edit)>,
}

/// Finds the heads that diverge most in a prompt, layer by layer in one pass with the span and one without.
pub fn reinforce(model: &Decoder, tokens: &[u32], span: Range<usize>, config: &VhrConfig) -> Reinforced {
    let ids = |tokens: &[u32]| {
        let ids: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
        Tensor::<2, Int>::from_data(TensorData::new(ids, [1, tokens.len()]), &model.device())
    };
    let rest: Vec<u32> = match config.without {
        Without::Masked => tokens.to_vec(),
        Without::Removed => [&tokens[..span.start], &tokens[span.end..]].concat(),
    };
    // Far below any score, so that nothing of the span is left in the softmax.
    let blind = Edit {
        keys: Positions::Range(span),
        ..Edit::new(At::all(QuerySite::Scores.into()), Change::add(Amount::Number(-1e30)))
    };
    let blind: Vec<Edit> = (config.without == Without::Masked).then_some(blind).into_iter().collect();
    let mask = Mask::causal();
    let run = |layer: usize, hidden: &Tensor<3>, edits: Vec<Edit>| {
        let edits = edits.into_iter().map(|edit| (layer, edit)).collect();
        let sites = SitePlan { edits, taps: vec![(layer, QuerySite::Z.into())] };
        model.run_layers(layer..layer + 1, hidden.clone(), Pass { sites, ..Pass::new(&mask) })
    };
    let last = |taps: &[Tap]| -> Vec<Vec<f32>> {
        let z = &taps[0].values;
        let [_, heads, seq, width] = z.dims();
        let numbers: Vec<f32> = z.clone().narrow(2, seq - 1, 1).into_data().iter::<f32>().collect();
        (0..heads).map(|head| numbers[head * width..(head + 1) * width].to_vec()).collect()
    };
    let (mut with, mut without) = (model.embed(ids(tokens)), model.embed(ids(&rest)));
    let (mut layers, mut edits) = (Vec::new(), Vec::new());
    for layer in 0..model.layers.len() {
        let (own, other) = (run(layer, &with, Vec::new()), run(layer, &without, blind.clone()));
        let found = divergence(&last(&own.taps), &last(&other.taps), config.deviation);
        let heads: Vec<QueryHead> =
            found.selected.iter().enumerate().filter(|(_, selected)| **selected).map(|(at, _)| QueryHead(at)).collect();
        if config.layers.contains(&layer) && !heads.is_empty() {
            let louder = Edit::new(At::Query(QuerySite::Z, heads), Change::scale(config.alpha));
            with = run(layer, &with, vec![louder.clone()]).hidden;
            without = match config.both {
                true => run(layer, &without, [&blind[..], std::slice::from_ref(&louder)].concat()).hidden,
                false => other.hidden,
            };
            edits.push((layer, louder));
        } else {
            (with, without) = (own.hidden, other.hidden);
        }
        layers.push(found);
    }
    Reinforced { layers, edits }
}
