//! Which tokens of a text are important: those without which the model's predictions are the least like themselves, by the change
//! of the entropy of its next-token distributions, or those of a list.

use std::ops::Range;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use polyhead_attention::{Amount, At, Change, Edit, Mask, QuerySite};
use polyhead_models::sites::SitePlan;
use polyhead_models::{Decoder, Pass};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Added to a score whose key is hidden.
const HIDDEN: f32 = -1e9;
/// Numbers that copies of a text have at once, at most: logits, or the scores of a layer, taken to have 32 heads. Chosen by us:
/// 256 MiB.
const AT_ONCE: usize = 1 << 26;

/// How a token is taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Masking {
    /// No other token attends to it, in any layer.
    Attention,
    /// Another token is in its place.
    Token,
}

/// `[tokens]`, nats: the entropy of what is predicted behind each token of a text.
pub fn entropies(model: &Decoder, tokens: &[u32]) -> Vec<f64> {
    entropies_of(model, vec![tokens.to_vec()], SitePlan::default()).swap_remove(0)
}

/// `[tokens][tokens]`: the same once the token of the first index is taken away; `mask_id` is what takes its place.
pub fn masked_entropies(model: &Decoder, tokens: &[u32], masking: Masking, mask_id: u32) -> Vec<Vec<f64>> {
    let count = tokens.len();
    let copies = (AT_ONCE / (count * model.vocab_size().max(32 * count)).max(1)).max(1);
    let without = |first: usize| entropies_without(model, tokens, first..count.min(first + copies), (masking, mask_id));
    (0..count).step_by(copies).flat_map(without).collect()
}

/// The same for some of the tokens, in a copy of the text each.
pub(super) fn entropies_without(
    model: &Decoder,
    tokens: &[u32],
    taken: Range<usize>,
    (masking, mask_id): (Masking, u32),
) -> Vec<Vec<f64>> {
    let (count, copies) = (tokens.len(), vec![tokens.to_vec(); taken.len()]);
    match masking {
        Masking::Attention => {
            let hidden = |at: usize, query: usize, key: usize| if key == at && query != at { HIDDEN } else { 0.0 };
            let of = |at: usize| (0..count).flat_map(move |query| (0..count).map(move |key| hidden(at, query, key)));
            let shape = [taken.len(), 1, count, count];
            let bias: Vec<f32> = taken.flat_map(of).collect();
            let bias = Tensor::from_data(TensorData::new(bias, shape), &model.device());
            let edit = Edit::new(At::all(QuerySite::Scores.into()), Change::add(Amount::Each(bias)));
            let edits = (0..model.layers.len()).map(|layer| (layer, edit.clone())).collect();
            entropies_of(model, copies, SitePlan { edits, taps: Vec::new() })
        }
        Masking::Token => {
            let replaced = |(at, mut copy): (usize, Vec<u32>)| {
                copy[at] = mask_id;
                copy
            };
            entropies_of(model, taken.zip(copies).map(replaced).collect(), SitePlan::default())
        }
    }
}

/// The share of a text, rounded up, whose taking away changes the entropy the most, averaged over positions, in either direction.
pub fn most_important(full: &[f64], masked: &[Vec<f64>], fraction: f64) -> Vec<bool> {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let changes: Vec<f64> = masked.iter().map(|masked| (mean(masked) - mean(full)).abs()).collect();
    let mut order: Vec<usize> = (0..changes.len()).collect();
    order.sort_by(|&a, &b| changes[b].total_cmp(&changes[a]));
    let count = (fraction * changes.len() as f64).ceil() as usize;
    let mut important = vec![false; changes.len()];
    order.into_iter().take(count).for_each(|at| important[at] = true);
    important
}

fn entropies_of(model: &Decoder, rows: Vec<Vec<u32>>, sites: SitePlan) -> Vec<Vec<f64>> {
    let (count, seq) = (rows.len(), rows[0].len());
    let tokens = ids(&rows, &model.device());
    let mask = Mask::causal();
    let logits = model.logits(model.pass(tokens, Pass { sites, ..Pass::new(&mask) }).hidden);
    let logarithms = log_softmax(logits, 2);
    let entropy = -(logarithms.clone().exp() * logarithms).sum_dim(2);
    let values: Vec<f64> = entropy.into_data().iter::<f64>().collect();
    debug_assert_eq!(values.len(), count * seq);
    values.chunks(seq).map(<[f64]>::to_vec).collect()
}

/// `[rows, seq]` ids.
fn ids(rows: &[Vec<u32>], device: &Device) -> Tensor<2, Int> {
    let all: Vec<i32> = rows.iter().flatten().map(|&id| id as i32).collect();
    Tensor::from_data(TensorData::new(all, [rows.len(), rows[0].len()]), device)
}
