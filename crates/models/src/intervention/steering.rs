//! Attention steering (PASTA: Zhang et al. 2023, arXiv 2311.02262), in the form that excludes: every key of the prompt outside of the
//! emphasised spans loses weight, ln α on its score in all heads and layers. Tokens that are generated keep their full weight.
//!
//! Three forms, of which the first is to be used. The released code of arXiv 2411.02688 adds ln α once for every span that a key is
//! outside of (`Once`), so that several spans weaken each other; and with all heads it changes the mask that layers share in place,
//! so that layer l adds l + 1 times as much (`Accumulated`).

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::{Amount, At, Change, Edit, QuerySite};

/// How often a key outside of spans loses weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exclusion {
    /// Once, where it is outside of all spans.
    Union,
    /// Once for each span that it is outside of.
    Once,
    /// The same, layer l (from 0) l + 1 times as much.
    Accumulated,
}

/// `[rows, prompt]`: what is added to the score of each key of the first layer; `spans` has those of each row.
pub fn exclusion_bias(spans: &[Vec<Range<usize>>], prompt: usize, alpha: f64, form: Exclusion) -> Vec<Vec<f32>> {
    let of_key = |spans: &[Range<usize>], key: usize| {
        let outside = spans.iter().filter(|span| !span.contains(&key)).count();
        let times = match form {
            Exclusion::Union => usize::from(outside == spans.len()),
            Exclusion::Once | Exclusion::Accumulated => outside,
        };
        (times as f64 * alpha.ln()) as f32
    };
    spans.iter().map(|spans| (0..prompt).map(|key| of_key(spans, key)).collect()).collect()
}

/// The changes that steer attention to the spans of each row of a batch.
pub fn steering(
    spans: &[Vec<Range<usize>>],
    (layers, prompt): (usize, usize),
    alpha: f64,
    form: Exclusion,
    device: &Device,
) -> Vec<(usize, Edit)> {
    let bias = exclusion_bias(spans, prompt, alpha, form).concat();
    let bias = Tensor::<4>::from_data(TensorData::new(bias, [spans.len(), 1, 1, prompt]), device);
    let of_layer = |layer: usize| {
        let times = if form == Exclusion::Accumulated { layer as f64 + 1.0 } else { 1.0 };
        let change = Change::add(Amount::Each(bias.clone() * times));
        (layer, Edit::new(At::all(QuerySite::Scores.into()), change))
    };
    (0..layers).map(of_layer).collect()
}
