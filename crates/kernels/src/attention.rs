//! Scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762, eq. 1): the one place where scores meet a softmax.
//!
//! It runs with a backward of its own, and memory grows with the length of the sequence, not with its square: on the CPU
//! in tiles (`attention/tiles.rs`; those in which the mask hides everything are never computed), on GPUs in tiles of another kind
//! (`attention/gpu.rs`), on the other backends, and for dense masks and trained biases of pairs, in blocks of queries
//! (`attention/blocks.rs`). The plain form below, which makes the
//! whole matrix and leaves the backward to Burn, is what both are tested against.

use std::cell::RefCell;
use std::sync::Arc;

use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData, activation};

use crate::shapes::{assert_shapes, spreads};
use crate::{Mask, SelectedRows, cpu, in_type};

mod blocks;
#[cfg(feature = "gpu")]
mod gpu;
mod tiles;

#[cfg(test)]
mod tests;

/// Scores of hidden keys. Finite, so that a row without any visible key stays finite and can be set to zero.
const HIDDEN_SCORE: f32 = -1e30;

/// The key (or value) head that each query head reads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum HeadMap {
    /// Consecutive query heads share: head `h` of `n` reads head `h / (n / m)` of `m`. Covers MHA, GQA and MQA.
    #[default]
    Even,
    /// Query head `h` reads head `map[h]`.
    Each(Vec<usize>),
}

/// Settings of a call, besides q, k and v.
#[derive(Debug, Clone, Default)]
pub struct AttentionOptions<'a> {
    /// Factor of the scores; `None` means 1 / sqrt(width of a query head).
    pub scale: Option<f64>,
    /// Bound of the scaled scores, above 0: `softcap · tanh(score / softcap)`, before bias and mask (Gemma 2, arXiv
    /// 2408.00118); `None` leaves them as they are.
    pub softcap: Option<f64>,
    /// `[query heads]`: a logit per head that takes part in the denominator of every row and has no value (GPT-OSS, arXiv
    /// 2508.10925). Neither scaled nor capped; `None` leaves plain softmax, of which it is the limit towards -∞.
    pub sinks: Option<Tensor<1>>,
    /// The mask; `None` hides nothing.
    pub mask: Option<&'a Mask>,
    /// Position of the first query among the keys: the number of keys that were cached by earlier calls.
    pub query_offset: usize,
    /// `[batch or 1, query heads or 1, queries or 1, keys]`, added to the scaled scores.
    pub bias: Option<Tensor<4>>,
    /// The key head of each query head.
    pub keys: HeadMap,
    /// The value head of each query head.
    pub values: HeadMap,
    /// The selected queries of each head; `None` means all. Elsewhere the output and the gradient of the query
    /// are zero, and statistics leave it out.
    pub selected: Option<Arc<SelectedRows>>,
    /// The statistics to measure.
    pub statistics: Measure,
    /// Access to scores and weights, for which they are made as matrices.
    pub map: Option<&'a dyn MapAccess>,
}

/// Access to the scores and the weights of a call: both can be read, and what is given back is used. Hidden keys stay hidden,
/// whatever is given back for them.
///
/// # Shapes
/// - scores, weights: `[batch, query heads, queries, keys]`
/// - hidden: `[batch or 1, query heads or 1, queries, keys]`, true where a key is hidden
pub trait MapAccess: std::fmt::Debug {
    /// The scores before softmax: scaled, capped and biased.
    fn scores(&self, scores: Tensor<4>, hidden: Option<&Tensor<4, Bool>>) -> Tensor<4>;

    /// The weights after softmax, which those of a sink are no part of.
    fn weights(&self, weights: Tensor<4>, hidden: Option<&Tensor<4, Bool>>) -> Tensor<4>;
}

/// The statistics that a call measures.
#[derive(Debug, Clone, Default)]
pub enum Measure {
    /// Nothing.
    #[default]
    Nothing,
    /// Numbers per head, which come out of the tiles.
    Numbers,
    /// Numbers, and what every query gives to sets of keys: `[batch, keys, sets]`, 1 where a key belongs to a set, else 0.
    Spans(Arc<Tensor<3>>),
    /// Numbers, and the weights of the first row of the batch as a matrix.
    Weights,
}

impl Measure {
    /// Whether nothing is asked for.
    fn is_nothing(&self) -> bool {
        matches!(self, Self::Nothing)
    }
}

/// The result of [`attention`].
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
    /// `[query heads]`, nats: entropy of a row, with the sink as one more outcome where there is one.
    pub entropy: Tensor<1>,
    /// `[query heads]`: weight on the first key, the usual attention sink.
    pub first_key_mass: Tensor<1>,
    /// `[query heads]`: the largest scaled score of a visible key; 0 where there is none.
    pub largest_score: Tensor<1>,
    /// `[query heads]`: weight on the sink; only where there are sinks.
    pub sink_mass: Option<Tensor<1>>,
    /// `[batch, query heads, queries, sets]`: the sum of a query's weights on each set of keys; only if asked for.
    pub span_mass: Option<Tensor<4>>,
    /// `[query heads, queries, keys]`: the weights of the first row of the batch; only if asked for.
    pub weights: Option<Tensor<3>>,
}

/// `softmax(scale · q kᵀ + bias, hidden keys left out) v`, with a cap and sinks where the options have them.
///
/// # Shapes
/// - q: `[batch, query heads, queries, width]`
/// - k: `[batch, key heads, keys, width]`
/// - v: `[batch, value heads, keys, value width]`; the value width may differ from the width of queries and keys
///
/// # Panics
/// If the head counts do not divide (with [`HeadMap::Even`]), a [`HeadMap::Each`] names a head that is not there, or shapes
/// disagree: callers check configurations first.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: &AttentionOptions<'_>) -> Attention {
    check(&q, &k, &v, options);
    let [batch, heads, queries, _] = q.dims();
    if [batch, heads, queries, k.dims()[2], v.dims()[3]].contains(&0) {
        return of_nothing(q, k, v, options);
    }
    let span_mass = match &options.statistics {
        Measure::Spans(spans) => {
            Some(span_mass(q.clone().detach(), k.clone().detach(), spans.as_ref().clone(), options))
        }
        _ => None,
    };
    let attention = forward(q, k, v, options);
    let statistics = attention.statistics.map(|seen| Statistics { span_mass, ..seen.settled() });
    Attention { statistics, ..attention }
}

/// The weights that [`attention`] gives to keys, as a matrix: for what ranks keys by them, and for short rows.
///
/// # Shapes
/// As in [`attention`]; output: `[batch, query heads, queries, keys]`
///
/// # Panics
/// As [`attention`].
pub fn attention_weights(q: Tensor<4>, k: Tensor<4>, options: &AttentionOptions<'_>) -> Tensor<4> {
    /// Keeps the weights, those of hidden keys as zeros.
    #[derive(Debug, Default)]
    struct Keep(RefCell<Option<Tensor<4>>>);
    impl MapAccess for Keep {
        fn scores(&self, scores: Tensor<4>, _: Option<&Tensor<4, Bool>>) -> Tensor<4> {
            scores
        }

        fn weights(&self, weights: Tensor<4>, hidden: Option<&Tensor<4, Bool>>) -> Tensor<4> {
            let full = weights.dims();
            let seen = match hidden {
                Some(hidden) => weights.clone().mask_fill(hidden.clone().expand(full), 0.0),
                None => weights.clone(),
            };
            self.0.replace(Some(seen));
            weights
        }
    }
    let ([batch, heads, queries, _], keys) = (q.dims(), k.dims()[2]);
    let nothing = Tensor::zeros([batch, 1, keys, 1], (&q.device(), q.dtype()));
    let empty = Tensor::zeros([batch, heads, queries, keys], (&q.device(), q.dtype()));
    let keep = Keep::default();
    attention(q, k, nothing, &AttentionOptions { map: Some(&keep), values: HeadMap::Even, ..options.clone() });
    keep.0.into_inner().unwrap_or(empty)
}

/// Panics where a call makes no sense, so that no form has to ask again.
fn check(q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>, options: &AttentionOptions<'_>) {
    let ([batch, heads, queries, width], [_, key_heads, keys, _], [_, value_heads, ..]) =
        (q.dims(), k.dims(), v.dims());
    assert_shapes!("attention", q, k, v;
        "q, k and v must have one batch": k.dims()[0] == batch && v.dims()[0] == batch,
        "k must be as wide as q": k.dims()[3] == width,
        "k and v must have as many keys": v.dims()[2] == keys,
    );
    options.keys.of(heads, key_heads);
    options.values.of(heads, value_heads);
    let full = [batch, heads, queries, keys];
    if let Some(bias) = &options.bias {
        assert_shapes!("attention", q, k, bias;
            "bias must be [batch or 1, query heads or 1, queries or 1, keys]": spreads(bias.dims(), full)
                || spreads(bias.dims(), [batch, heads, 1, keys]));
    }
    if let Some(mask) = options.mask {
        mask.check(full, options.query_offset);
    }
    if let Some(sinks) = &options.sinks {
        assert_shapes!("attention", q, sinks; "sinks must be [query heads]": sinks.dims() == [heads]);
    }
    if let Some(softcap) = options.softcap {
        assert!(softcap > 0.0, "attention: softcap ({softcap}) must be above 0");
    }
    if let Some(selected) = &options.selected {
        assert_shapes!("attention", q, selected;
            "selected rows must be [batch, queries, query heads]": selected.shape() == [batch, queries, heads]);
    }
    if let Measure::Spans(spans) = &options.statistics {
        assert_shapes!("attention", k, spans;
            "spans must be [batch, keys, sets]": spans.dims()[..2] == [batch, keys]);
    }
}

/// The result of an empty call: zeros, connected to the inputs in the autodiff graph.
fn of_nothing(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: &AttentionOptions<'_>) -> Attention {
    let ([batch, heads, queries, _], keys, device) = (q.dims(), k.dims()[2], q.device());
    let hidden = Tensor::<4>::zeros([batch, heads, queries, v.dims()[3]], (&device, q.dtype()));
    let statistics = (!options.statistics.is_nothing()).then(|| Statistics {
        entropy: Tensor::zeros([heads], &device),
        first_key_mass: Tensor::zeros([heads], &device),
        largest_score: Tensor::zeros([heads], &device),
        sink_mass: options.sinks.as_ref().map(|_| Tensor::zeros([heads], &device)),
        span_mass: match &options.statistics {
            Measure::Spans(spans) => Some(Tensor::zeros([batch, heads, queries, spans.dims()[2]], &device)),
            _ => None,
        },
        weights: matches!(options.statistics, Measure::Weights).then(|| Tensor::zeros([heads, queries, keys], &device)),
    });
    let dtype = q.dtype();
    let sum = q.sum() + k.sum() + v.sum();
    let sum = options.sinks.iter().fold(sum, |sum, sinks| sum + in_type(sinks.clone().sum(), dtype));
    let everywhere = Tensor::<1, Bool>::from_data([true], &device);
    let nothing = sum.mask_fill(everywhere, 0.0).reshape([1, 1, 1, 1]);
    Attention { hidden: hidden + nothing, statistics }
}

/// The form that this device and mask ask for.
fn forward(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: &AttentionOptions<'_>) -> Attention {
    let [batch, _, queries, _] = q.dims();
    let keys = k.dims()[2];
    let everything = Mask::none();
    let visible = options.mask.unwrap_or(&everything).visible(batch, options.query_offset, queries, keys);
    match visible {
        _ if options.map.is_some() => plain(q, k, v, options),
        Some(visible) if cpu::fuses(&q) && options.bias.as_ref().is_none_or(tiles::take) => {
            tiles::attention(q, k, v, visible, options)
        }
        #[cfg(feature = "gpu")]
        Some(visible) if gpu::takes([&q, &k, &v], &visible, options) => {
            let statistics = blocks::statistics([&q, &k, &v], options);
            let hidden = gpu::attention([q, k, v], &visible, options);
            Attention { hidden: options.of_selected(hidden), statistics }
        }
        _ => blocks::attention(q, k, v, options),
    }
}

/// `[batch, query heads, queries, sets]`: attention whose values tell which set a key belongs to is a sum of weights.
fn span_mass(q: Tensor<4>, k: Tensor<4>, spans: Tensor<3>, options: &AttentionOptions<'_>) -> Tensor<4> {
    let values = in_type(spans.unsqueeze_dim(1), q.dtype()); // one value head, which all heads read
    let sinks = options.sinks.clone().map(Tensor::detach);
    let options = AttentionOptions { values: HeadMap::Even, statistics: Measure::Nothing, sinks, ..options.clone() };
    in_type(forward(q, k, values, &options).hidden, DType::F32)
}

/// The definition in tensor operations, with the whole matrix of weights.
fn plain(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: &AttentionOptions<'_>) -> Attention {
    let [batch, heads, queries, _] = q.dims();
    let keys = k.dims()[2];
    let device = q.device();
    let hidden = options.mask.and_then(|mask| mask.hidden(batch, options.query_offset, queries, keys, &device));
    let scale = options.scale_for(&q);
    let mut scores = grouped_matmul(q * scale, k.swap_dims(2, 3), &options.keys); // [batch, heads, queries, keys]
    if let Some(cap) = options.softcap {
        scores = (scores / cap).tanh() * cap;
    }
    if let Some(bias) = &options.bias {
        scores = scores + bias.clone();
    }
    if let Some(map) = options.map {
        scores = map.scores(scores, hidden.as_ref());
    }
    let full = [batch, heads, queries, keys];
    if let Some(hidden) = &hidden {
        scores = scores.mask_fill(hidden.clone().expand(full), HIDDEN_SCORE);
    }
    let inactive = options.selected.as_ref().map(|selected| selected.hidden(&device).expand(full));
    let measured = (!options.statistics.is_nothing()).then(|| match &inactive {
        Some(inactive) => scores.clone().detach().mask_fill(inactive.clone(), HIDDEN_SCORE),
        None => scores.clone().detach(),
    });
    // The sink of a head is one more column, which no value belongs to.
    let columns = match &options.sinks {
        Some(sinks) => {
            let column = in_type(sinks.clone(), scores.dtype()).reshape([1, heads, 1, 1]);
            Tensor::cat(vec![scores, column.expand([batch, heads, queries, 1])], 3)
        }
        None => scores,
    };
    let columns = activation::softmax(columns, 3);
    let sink = options.sinks.is_some().then(|| columns.clone().narrow(3, keys, 1));
    let mut weights = columns.narrow(3, 0, keys);
    if let Some(map) = options.map {
        weights = map.weights(weights, hidden.as_ref());
    }
    if let Some(hidden) = hidden
        && (options.map.is_some() || options.mask.is_some_and(Mask::may_hide_whole_rows))
    {
        weights = weights.mask_fill(hidden.expand(full), 0.0);
    }
    let of_selected = |weights: Tensor<4>| match &inactive {
        Some(inactive) => weights.clone().mask_fill(inactive.clone().narrow(3, 0, weights.dims()[3]), 0.0),
        None => weights,
    };
    let (weights, sink) = (of_selected(weights), sink.map(of_selected));
    let statistics =
        measured.map(|scores| measure(scores, weights.clone().detach(), sink.map(Tensor::detach), options));
    Attention { hidden: grouped_matmul(weights, v, &options.values), statistics }
}

impl Statistics {
    /// A head that saw no key at all has no largest score: until all is known it is that of hidden keys, then 0.
    fn settled(self) -> Self {
        let nothing = self.largest_score.clone().lower_equal_elem(HIDDEN_SCORE);
        Self { largest_score: self.largest_score.mask_fill(nothing, 0.0), ..self }
    }
}

impl AttentionOptions<'_> {
    /// The factor of the scores of these queries.
    pub(crate) fn scale_for(&self, q: &Tensor<4>) -> f64 {
        // Without channels all scores are 0, whatever the factor; but it has to be a number.
        self.scale.unwrap_or_else(|| (q.dims()[3].max(1) as f64).powf(-0.5))
    }

    /// `[batch, query heads, queries, width]`: zeros for queries that are not selected.
    fn of_selected(&self, hidden: Tensor<4>) -> Tensor<4> {
        let Some(selected) = &self.selected else { return hidden };
        let full = hidden.dims();
        let inactive = selected.hidden(&hidden.device());
        hidden.mask_fill(inactive.expand(full), 0.0)
    }

    /// `[heads]`: of how many queries statistics are the mean.
    fn counted(&self, [batch, heads, queries, _]: [usize; 4], device: &Device) -> Tensor<1> {
        let of = |head: usize| self.selected.as_ref().map_or(batch * queries, |selected| selected.of_head(head).len());
        let counts: Vec<f32> = (0..heads).map(|head| of(head) as f32).collect();
        Tensor::from_data(TensorData::new(counts, [heads]), device)
    }
}

impl HeadMap {
    /// The head, of `n`, of each of `heads` query heads.
    pub(crate) fn of(&self, heads: usize, n: usize) -> Vec<usize> {
        match self {
            Self::Even => {
                assert!(heads.is_multiple_of(n), "attention: {heads} query heads cannot share {n} heads evenly");
                (0..heads).map(|head| head / (heads / n)).collect()
            }
            Self::Each(map) => {
                assert!(map.len() == heads, "attention: a map of {} entries for {heads} query heads", map.len());
                if let Some(head) = map.iter().position(|&of| of >= n) {
                    panic!("attention: query head {head} is to read head {} of {n}", map[head]);
                }
                map.clone()
            }
        }
    }
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

fn measure(
    scores: Tensor<4>,
    weights: Tensor<4>,
    sink: Option<Tensor<4>>,
    options: &AttentionOptions<'_>,
) -> Statistics {
    let (scores, weights) = (in_type(scores, DType::F32), in_type(weights, DType::F32));
    let [batch, heads, queries, keys] = weights.dims();
    let counted = options.counted(weights.dims(), &weights.device()).clamp_min(1.0);
    let per_head = |x: Tensor<4>| x.swap_dims(0, 1).reshape([heads, batch * queries]).sum_dim(1).squeeze_dim::<1>(1);
    let of_outcomes = |weights: Tensor<4>| (weights.clone() * weights.clamp_min(1e-30).log()).sum_dim(3).neg();
    let sink = sink.map(|sink| in_type(sink, DType::F32));
    let entropy = of_outcomes(weights.clone());
    let entropy = sink.iter().cloned().fold(entropy, |entropy, sink| entropy + of_outcomes(sink));
    let largest = scores.swap_dims(0, 1).reshape([heads, batch * queries * keys]).max_dim(1).squeeze_dim::<1>(1);
    Statistics {
        entropy: per_head(entropy) / counted.clone(),
        first_key_mass: per_head(weights.clone().narrow(3, 0, 1)) / counted.clone(),
        sink_mass: sink.map(|sink| per_head(sink) / counted),
        largest_score: largest,
        span_mass: None,
        weights: matches!(options.statistics, Measure::Weights).then(|| weights.narrow(0, 0, 1).squeeze_dim::<3>(0)),
    }
}
