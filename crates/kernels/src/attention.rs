//! Scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762, eq. 1): the one place where scores meet a softmax.

use burn::tensor::{Int, Tensor, TensorData, activation};

use crate::Mask;

/// Scores of hidden keys. Finite, so that a row without any visible key stays finite and can be set to zero.
const HIDDEN_SCORE: f32 = -1e30;

/// From which key (or value) head a query head reads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum HeadMap {
    /// Consecutive query heads share: head `h` of `n` reads head `h / (n / m)` of `m`. Covers MHA, GQA and MQA.
    #[default]
    Even,
    /// Query head `h` reads head `map[h]`.
    Each(Vec<usize>),
}

/// Everything about a call besides q, k and v.
#[derive(Debug, Clone, Default)]
pub struct AttentionOptions<'a> {
    /// Factor of the scores; `None` means 1 / sqrt(width of a query head).
    pub scale: Option<f64>,
    /// Which keys are hidden; `None` hides nothing.
    pub mask: Option<&'a Mask>,
    /// Position of the first query among the keys: the number of keys that were cached by earlier calls.
    pub query_offset: usize,
    /// `[batch or 1, query heads or 1, queries, keys]`, added to the scaled scores.
    pub bias: Option<Tensor<4>>,
    /// Which key head each query head reads.
    pub keys: HeadMap,
    /// Which value head each query head reads.
    pub values: HeadMap,
    /// Measure [`Statistics`] on the way.
    pub statistics: bool,
}

/// What [`attention`] returns.
#[derive(Debug, Clone)]
pub struct Attention {
    /// `[batch, query heads, queries, value width]`; zeros in rows that see no key.
    pub hidden: Tensor<4>,
    /// Only if asked for; without gradients.
    pub statistics: Option<Statistics>,
}

/// Facts about the attention weights, per query head, averaged over batch and queries.
#[derive(Debug, Clone)]
pub struct Statistics {
    /// `[query heads]`, nats: entropy of a row.
    pub entropy: Tensor<1>,
    /// `[query heads]`: weight on the first key, the usual attention sink.
    pub first_key_mass: Tensor<1>,
    /// `[query heads]`: the largest scaled score of a visible key.
    pub largest_score: Tensor<1>,
    /// `[query heads, queries, keys]`: the weights of the first row of the batch.
    pub weights: Tensor<3>,
}

/// `softmax(scale · q kᵀ + bias, hidden keys left out) v`
///
/// # Shapes
/// - q: `[batch, query heads, queries, width]`
/// - k: `[batch, key heads, keys, width]`
/// - v: `[batch, value heads, keys, value width]`; the value width may differ from the width of queries and keys
///
/// # Panics
/// If the head counts do not divide (with [`HeadMap::Even`]) or shapes disagree: callers check configurations first.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: &AttentionOptions<'_>) -> Attention {
    let [batch, heads, queries, width] = q.dims();
    let keys = k.dims()[2];
    let scale = options.scale.unwrap_or_else(|| (width as f64).powf(-0.5));
    let device = q.device();
    let hidden = options.mask.and_then(|mask| mask.hidden(batch, options.query_offset, queries, keys, &device));

    let mut scores = grouped_matmul(q * scale, k.swap_dims(2, 3), &options.keys); // [batch, heads, queries, keys]
    if let Some(bias) = &options.bias {
        scores = scores + bias.clone();
    }
    let full = [batch, heads, queries, keys];
    if let Some(hidden) = &hidden {
        scores = scores.mask_fill(hidden.clone().expand(full), HIDDEN_SCORE);
    }
    let largest_score = options.statistics.then(|| scores.clone().detach());
    let mut weights = activation::softmax(scores, 3);
    if let Some(hidden) = hidden
        && options.mask.is_some_and(Mask::may_hide_whole_rows)
    {
        weights = weights.mask_fill(hidden.expand(full), 0.0);
    }
    let statistics = largest_score.map(|scores| measure(scores, weights.clone().detach()));
    Attention { hidden: grouped_matmul(weights, v, &options.values), statistics }
}

/// `left[b, h] · right[b, map(h)]`; sharing heads costs no copy where the map is even.
///
/// # Shapes
/// - left: `[batch, heads, rows, inner]`, right: `[batch, right heads, inner, columns]`
fn grouped_matmul(left: Tensor<4>, right: Tensor<4>, map: &HeadMap) -> Tensor<4> {
    let [batch, heads, rows, inner] = left.dims();
    let [_, right_heads, _, columns] = right.dims();
    match map {
        HeadMap::Even if heads == right_heads => left.matmul(right),
        HeadMap::Even => {
            assert!(heads.is_multiple_of(right_heads), "{heads} query heads over {right_heads} heads");
            let stacked = left.reshape([batch, right_heads, heads / right_heads * rows, inner]);
            stacked.matmul(right).reshape([batch, heads, rows, columns])
        }
        HeadMap::Each(map) => {
            assert_eq!(map.len(), heads, "one entry per query head");
            let ids: Vec<i32> = map.iter().map(|&head| head as i32).collect();
            let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [heads]), &right.device());
            left.matmul(right.select(1, ids))
        }
    }
}

fn measure(scores: Tensor<4>, weights: Tensor<4>) -> Statistics {
    let [batch, heads, queries, keys] = weights.dims();
    let per_head = |x: Tensor<4>| x.swap_dims(0, 1).reshape([heads, batch * queries]).mean_dim(1).squeeze_dim::<1>(1);
    let entropy = (weights.clone() * weights.clone().clamp_min(1e-30).log()).sum_dim(3).neg();
    Statistics {
        entropy: per_head(entropy),
        first_key_mass: per_head(weights.clone().narrow(3, 0, 1)),
        largest_score: scores.swap_dims(0, 1).reshape([heads, batch * queries * keys]).max_dim(1).squeeze_dim::<1>(1),
        weights: weights.narrow(0, 0, 1).squeeze_dim::<3>(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Distribution, Tolerance};

    fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
    }

    fn close(a: Tensor<4>, b: Tensor<4>) {
        a.into_data().assert_approx_eq::<f32>(&b.into_data(), Tolerance::absolute(1e-6));
    }

    /// The definition, element by element, in f64.
    fn by_hand(
        q: &Tensor<4>,
        k: &Tensor<4>,
        v: &Tensor<4>,
        key_of: &[usize],
        value_of: &[usize],
        causal: bool,
    ) -> Tensor<4> {
        let [batch, heads, queries, width] = q.dims();
        let [_, key_heads, keys, _] = k.dims();
        let [_, value_heads, _, value_width] = v.dims();
        let data = |t: &Tensor<4>| t.to_data().iter::<f64>().collect::<Vec<_>>();
        let (q, k, v) = (data(q), data(k), data(v));
        let mut out = Vec::new();
        for b in 0..batch {
            for h in 0..heads {
                for i in 0..queries {
                    let visible = if causal { i + keys - queries + 1 } else { keys };
                    let score = |j: usize| {
                        let dot: f64 = (0..width)
                            .map(|c| {
                                q[((b * heads + h) * queries + i) * width + c]
                                    * k[((b * key_heads + key_of[h]) * keys + j) * width + c]
                            })
                            .sum();
                        (dot / (width as f64).sqrt()).exp()
                    };
                    let total: f64 = (0..visible).map(score).sum();
                    out.extend((0..value_width).map(|c| {
                        let sum: f64 = (0..visible)
                            .map(|j| score(j) * v[((b * value_heads + value_of[h]) * keys + j) * value_width + c])
                            .sum();
                        (sum / total) as f32
                    }));
                }
            }
        }
        Tensor::from_data(TensorData::new(out, [batch, heads, queries, value_width]), &Device::flex())
    }

    #[test]
    fn follows_the_definition_for_shared_heads_and_wide_values() {
        let (q, k, v) = (random([2, 4, 5, 6]), random([2, 2, 7, 6]), random([2, 1, 7, 3]));
        let mask = Mask::causal();
        let options = AttentionOptions { mask: Some(&mask), query_offset: 2, ..Default::default() };
        let got = attention(q.clone(), k.clone(), v.clone(), &options).hidden;
        close(got, by_hand(&q, &k, &v, &[0, 0, 1, 1], &[0, 0, 0, 0], true));
    }

    #[test]
    fn explicit_maps_choose_heads() {
        let (q, k, v) = (random([1, 3, 4, 2]), random([1, 2, 4, 2]), random([1, 3, 4, 5]));
        let options = AttentionOptions {
            keys: HeadMap::Each(vec![1, 0, 1]),
            values: HeadMap::Each(vec![2, 2, 0]),
            ..Default::default()
        };
        let got = attention(q.clone(), k.clone(), v.clone(), &options).hidden;
        close(got, by_hand(&q, &k, &v, &[1, 0, 1], &[2, 2, 0], false));
    }

    #[test]
    fn a_row_that_sees_nothing_gives_zeros_and_finite_gradients() {
        let device = Device::flex().autodiff();
        let make = || Tensor::<4>::random([2, 1, 3, 4], Distribution::Normal(0.0, 1.0), &device).require_grad();
        let (q, k, v) = (make(), make(), make());
        let mask = Mask::none().with_lengths(&[0, 2]);
        let options = AttentionOptions { mask: Some(&mask), ..Default::default() };
        let out = attention(q.clone(), k.clone(), v.clone(), &options).hidden;
        assert_eq!(out.clone().narrow(0, 0, 1).abs().sum().into_scalar::<f32>(), 0.0);
        let grads = out.sum().backward();
        for tensor in [&q, &k, &v] {
            let grad = tensor.grad(&grads).expect("gradient");
            assert!(grad.into_data().iter::<f32>().all(f32::is_finite));
        }
    }

    #[test]
    fn a_bias_is_added_to_the_scores() {
        let (q, k, v) = (random([1, 2, 3, 4]), random([1, 2, 3, 4]), random([1, 2, 3, 4]));
        let bias = Tensor::<2, burn::tensor::Bool>::tril_mask([3, 3], 0, &Device::flex()).float().mul_scalar(-1e30);
        let biased = AttentionOptions { bias: Some(bias.unsqueeze::<4>()), ..Default::default() };
        let mask = Mask::causal();
        let masked = AttentionOptions { mask: Some(&mask), ..Default::default() };
        let run = |options| attention(q.clone(), k.clone(), v.clone(), options).hidden;
        close(run(&biased), run(&masked));
    }

    #[test]
    fn statistics_of_uniform_weights() {
        let q = Tensor::<4>::zeros([2, 2, 4, 3], &Device::flex());
        let options = AttentionOptions { statistics: true, ..Default::default() };
        let seen = attention(q.clone(), q.clone(), q, &options).statistics.expect("asked for");
        let values = |t: Tensor<1>| t.into_data().iter::<f32>().collect::<Vec<_>>();
        assert!(values(seen.entropy).iter().all(|h| (h - 4f32.ln()).abs() < 1e-6));
        assert!(values(seen.first_key_mass).iter().all(|m| (m - 0.25).abs() < 1e-6));
        assert_eq!(values(seen.largest_score), [0.0, 0.0]);
        assert_eq!(seen.weights.dims(), [2, 4, 4]);
    }
}
