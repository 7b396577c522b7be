//! Attention in blocks of queries, for any backend: nothing larger than some rows of the matrix exists, forward or backward.
//!
//! Written in the backend's own operations, with the softmax in f32 whatever the type of queries, keys and values. A block
//! reads only the keys between the first and the last that its mask leaves; the backward computes its weights again from
//! the log of their sum (Dao 2023, arXiv 2307.08691, section 3.1). It serves the backends that have no tiles of their own,
//! and on the CPU what the tiles do not take: dense masks, and biases of pairs of positions that are trained.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::{BoolTensor, FloatTensor, IntTensor};
use burn::backend::{
    Autodiff, Backend, Dispatch, Flex, Scalar, TensorMetadata, backend_extension, get_or_init_device_settings,
};
use burn::tensor::{Bool, DType, Int, Shape, Slice, Tensor, TensorData};

use super::{Attention, AttentionOptions, HIDDEN_SCORE, HeadMap, Statistics, plain};
use crate::differentiable::{InputGrads, Wanted, differentiable};
use crate::mask::Visible;
use crate::precision::cast;
use crate::{Mask, in_type};

/// Scores of a block at most: 256 MiB in f32. Chosen by us: few launches, little memory beside a model's.
const SCORES: usize = 1 << 26;

/// Queries of a block under a narrower window: few launches, and few keys that no query of the block sees. Chosen by us.
const WINDOW_ROWS: usize = 256;

/// See [`super::attention`].
pub(super) fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: &AttentionOptions<'_>) -> Attention {
    in_blocks(q, k, v, options, SCORES)
}

fn in_blocks(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: &AttentionOptions<'_>, scores: usize) -> Attention {
    let hidden = of_parts([&q, &k, &v], options, scores, |part, q, k, v| part.attend(q, k, v));
    Attention {
        hidden: options.of_selected(Tensor::cat(hidden, 2)),
        statistics: statistics_in_blocks([&q, &k, &v], options, scores),
    }
}

/// The statistics that are asked for, in blocks.
#[cfg(feature = "gpu")]
pub(super) fn statistics(inputs: [&Tensor<4>; 3], options: &AttentionOptions<'_>) -> Option<Statistics> {
    statistics_in_blocks(inputs, options, SCORES)
}

fn statistics_in_blocks(inputs: [&Tensor<4>; 3], options: &AttentionOptions<'_>, scores: usize) -> Option<Statistics> {
    if options.statistics.is_nothing() {
        return None;
    }
    join(of_parts(inputs, options, scores, |part, q, k, v| part.measure(q, k, v)))
}

/// What `of` gives for every block of queries.
fn of_parts<T>(
    [q, k, v]: [&Tensor<4>; 3],
    options: &AttentionOptions<'_>,
    scores: usize,
    of: impl Fn(&Part<'_>, &Tensor<4>, &Tensor<4>, &Tensor<4>) -> T,
) -> Vec<T> {
    let [batch, heads, queries, _] = q.dims();
    let keys = k.dims()[2];
    let (k, v) = (chosen(k.clone(), &options.keys), chosen(v.clone(), &options.values));
    let everything = Mask::none();
    let mask = options.mask.unwrap_or(&everything);
    let visible = mask.visible(batch, options.query_offset, queries, keys).filter(|visible| !visible.in_pieces());
    let rows = (scores / (batch * heads * keys).max(1)).clamp(1, queries.max(1));
    let rows = mask.window().map_or(rows, |window| rows.min(window.max(WINDOW_ROWS)));
    let parts = (0..queries).step_by(rows).map(|start| Part {
        start,
        rows: rows.min(queries - start),
        options,
        mask,
        visible: visible.as_deref(),
    });
    parts.map(|part| of(&part, q, &k, &v)).collect()
}

/// The heads that a map names; heads that are shared evenly stay as they are.
fn chosen(heads: Tensor<4>, map: &HeadMap) -> Tensor<4> {
    let HeadMap::Each(map) = map else { return heads };
    let ids: Vec<i32> = map.iter().map(|&head| head as i32).collect();
    let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [map.len()]), &heads.device());
    heads.select(1, ids)
}

/// Some of the queries.
struct Part<'a> {
    start: usize,
    rows: usize,
    options: &'a AttentionOptions<'a>,
    mask: &'a Mask,
    visible: Option<&'a Visible>,
}

impl Part<'_> {
    /// `[batch or 1, heads or 1, rows or 1, keys]`
    fn bias(&self) -> Option<Tensor<4>> {
        let bias = self.options.bias.clone()?;
        Some(if bias.dims()[2] == 1 { bias } else { bias.narrow(2, self.start, self.rows) })
    }

    /// `[batch, heads, rows, value width]`
    fn attend(&self, q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>) -> Tensor<4> {
        let (batch, keys, device) = (q.dims()[0], k.dims()[2], q.device());
        let Self { start, rows, options, .. } = *self;
        let span = self.visible.map_or(0..keys, |visible| visible.span(start..start + rows));
        let own = |x: &Tensor<4>| x.clone().narrow(2, span.start, span.len());
        let bias = self.bias().map(|bias| bias.narrow(3, span.start, span.len()));
        let ranges = self.visible.and_then(|visible| visible.within(start..start + rows, &span));
        let hidden = match self.visible {
            Some(_) => None,
            None => self.mask.of_queries(start..start + rows).hidden(
                batch,
                options.query_offset + start,
                rows,
                keys,
                &device,
            ),
        };
        let block = Block {
            scale: options.scale_for(q),
            softcap: options.softcap,
            sunk: options.sinks.is_some(),
            biased: bias.is_some(),
            ranged: ranges.is_some(),
            masked: hidden.is_some(),
        };
        // What a block does not use is a single number.
        let ranges = ranges.unwrap_or_else(|| vec![0]);
        let shape = if block.ranged { [ranges.len() / (2 * rows), 1, rows, 2] } else { [1; 4] };
        let ranges = Tensor::<4, Int>::from_data(TensorData::new(ranges, shape), &device);
        let hidden = hidden.unwrap_or_else(|| Tensor::<4, Bool>::from_data([[[[false]]]], &device));
        let bias = bias.unwrap_or_else(|| Tensor::zeros([1; 4], &device));
        let sinks = options.sinks.clone().map(|sinks| in_type(sinks, DType::F32).reshape([1, -1, 1, 1]));
        let sinks: Tensor<4> = sinks.unwrap_or_else(|| Tensor::zeros([1; 4], &device));
        Tensor::from_dispatch(Dispatch::block_attention(
            q.clone().narrow(2, start, rows).into_dispatch(),
            own(k).into_dispatch(),
            own(v).into_dispatch(),
            bias.into_dispatch(),
            sinks.into_dispatch(),
            ranges.into_dispatch(),
            hidden.into_dispatch(),
            block,
        ))
    }

    /// Statistics are asked for seldom: the plain form makes these rows of the matrix again. `[heads]`: of how many queries
    /// they are the mean.
    fn measure(&self, q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>) -> Option<(Tensor<1>, Statistics)> {
        let Self { start, rows, options, .. } = *self;
        let mask = self.mask.of_queries(start..start + rows);
        let options = AttentionOptions {
            mask: Some(&mask),
            query_offset: options.query_offset + start,
            bias: self.bias().map(Tensor::detach),
            keys: HeadMap::Even,
            values: HeadMap::Even,
            sinks: options.sinks.clone().map(Tensor::detach),
            selected: options.selected.as_ref().map(|selected| Arc::new(selected.of_queries(start..start + rows))),
            ..options.clone()
        };
        let constant = |x: &Tensor<4>| x.clone().detach();
        let q = constant(q).narrow(2, start, rows);
        let counted = options.counted(q.dims(), &q.device());
        Some((counted, plain(q, constant(k), constant(v), &options).statistics?))
    }
}

/// The statistics of all queries from those of their parts, each with the numbers of queries that it is the mean of.
fn join(parts: Vec<Option<(Tensor<1>, Statistics)>>) -> Option<Statistics> {
    let parts: Vec<(Tensor<1>, Statistics)> = parts.into_iter().collect::<Option<_>>()?;
    let weights: Option<Vec<_>> = parts.iter().map(|(_, seen)| seen.weights.clone()).collect();
    let weights = weights.filter(|all| !all.is_empty()).map(|all| Tensor::cat(all, 1));
    let sum = |of: fn(&Statistics) -> Option<&Tensor<1>>| {
        let sums = parts.iter().map(|(counted, seen)| Some(of(seen)?.clone() * counted.clone()));
        sums.collect::<Option<Vec<_>>>()?.into_iter().reduce(|a, b| a + b)
    };
    let counted = parts.iter().map(|(counted, _)| counted.clone()).reduce(|a, b| a + b)?.clamp_min(1.0);
    Some(Statistics {
        entropy: sum(|seen| Some(&seen.entropy))? / counted.clone(),
        first_key_mass: sum(|seen| Some(&seen.first_key_mass))? / counted.clone(),
        largest_score: parts.iter().map(|(_, seen)| seen.largest_score.clone()).reduce(Tensor::max_pair)?,
        sink_mass: sum(|seen| seen.sink_mass.as_ref()).map(|mass| mass / counted),
        span_mass: None,
        weights,
    })
}

/// The settings of a block.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Block {
    scale: f64,
    softcap: Option<f64>,
    /// Whether `sinks` are some.
    sunk: bool,
    /// Whether `bias` is one.
    biased: bool,
    /// Whether `ranges` hide keys.
    ranged: bool,
    /// Whether `hidden` hides keys.
    masked: bool,
}

/// One block as an operation of Burn's dispatching backend.
// Burn passes the tensors of an operation on one by one.
#[allow(clippy::too_many_arguments)]
#[backend_extension(Flex, NdArray: cfg(feature = "ndarray"), Cube: cfg(feature = "gpu"), Autodiff)]
trait BlockAttention: Backend {
    /// `softmax(scale q kᵀ + bias) v`
    ///
    /// # Shapes
    /// - q: `[batch, heads, rows, width]`, k: `[batch, key heads, keys, width]`, v: `[batch, value heads, keys, value width]`
    /// - bias: `[batch or 1, heads or 1, rows or 1, keys]`, sinks: `[1, heads, 1, 1]` in f32
    /// - ranges: `[batch or 1, 1, rows, 2]`, the first visible key and the one behind the last
    /// - hidden: `[batch or 1, heads or 1, rows, keys]`
    fn block_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        hidden: BoolTensor<Self>,
        block: Block,
    ) -> FloatTensor<Self> {
        forward::<Self>(&Inputs { q, k, v, bias, sinks, ranges, hidden, block }).0
    }
}

impl BlockAttention for Flex {}

#[cfg(feature = "ndarray")]
impl BlockAttention for burn::backend::NdArray {}

#[cfg(feature = "gpu")]
impl BlockAttention for burn::backend::Cube {}

impl<B: BlockAttention, C: CheckpointStrategy> BlockAttention for Autodiff<B, C> {
    fn block_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        hidden: BoolTensor<Self>,
        block: Block,
    ) -> FloatTensor<Self> {
        let run = |[q, k, v, bias, sinks]: [FloatTensor<B>; 5], _: Wanted<5>| {
            let inputs = Inputs::<B> { q, k, v, bias, sinks, ranges, hidden, block };
            let (out, log_sum) = forward::<B>(&inputs);
            (out, (inputs, log_sum), ())
        };
        differentiable::<B, C, _, _, 5>([q, k, v, bias, sinks], run, backward::<B>).0
    }
}

/// The inputs of a block.
#[derive(Debug, Clone)]
struct Inputs<B: Backend> {
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    bias: FloatTensor<B>,
    sinks: FloatTensor<B>,
    ranges: IntTensor<B>,
    hidden: BoolTensor<B>,
    block: Block,
}

/// The output, and per row the log of the sum of its exponentials, `[batch, heads, rows, 1]`.
fn forward<B: Backend>(inputs: &Inputs<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let scores = scores(inputs);
    let mut largest = B::float_max_dim(scores.clone(), 3);
    if inputs.block.sunk {
        // The larger of the two, for every row: `sink + relu(largest - sink)`.
        let above = B::float_clamp_min(B::float_sub(largest, inputs.sinks.clone()), number(0.0));
        largest = B::float_add(above, inputs.sinks.clone());
    }
    // Where a row sees nothing, its largest score is that of hidden keys: all its exponentials are made zero below.
    let exponentials = hide(B::float_exp(B::float_sub(scores, largest.clone())), inputs, 0.0);
    let mut sum = B::float_sum_dim(exponentials.clone(), 3);
    if inputs.block.sunk {
        sum = B::float_add(sum, B::float_exp(B::float_sub(inputs.sinks.clone(), largest.clone())));
    }
    let sum = B::float_clamp_min(sum, number(f64::from(f32::MIN_POSITIVE)));
    let weights = B::float_div(exponentials, sum.clone());
    let log_sum = B::float_add(largest, B::float_log(sum));
    (matmul_shared::<B>(cast::<B>(weights, inputs.v.dtype()), inputs.v.clone()), log_sum)
}

/// Gradients of q, k, v and, where there are some, of bias and sinks; from the inputs and the log of the sums.
fn backward<B: Backend>(
    (inputs, log_sum): (Inputs<B>, FloatTensor<B>),
    out_grad: FloatTensor<B>,
    [of_q, of_k, of_v, of_bias, of_sinks]: Wanted<5>,
) -> InputGrads<B, 5> {
    let dtype = inputs.q.dtype();
    let weights = hide(B::float_exp(B::float_sub(scores(&inputs), log_sum.clone())), &inputs, 0.0);
    let v_grad = of_v.then(|| gather_shared::<B>(cast::<B>(weights.clone(), dtype), out_grad.clone(), &inputs.v));
    if !(of_q || of_k || of_bias || of_sinks) {
        return [None, None, v_grad, None, None];
    }
    let weight_grad = cast::<B>(matmul_shared::<B>(out_grad, B::float_swap_dims(inputs.v, 2, 3)), DType::F32);
    // Of the weights rather than of the output: where a row has one key, its scores get no gradient at all.
    let row_sum = B::float_sum_dim(B::float_mul(weights.clone(), weight_grad.clone()), 3);
    let sink_grad = (of_sinks && inputs.block.sunk).then(|| {
        let weight = B::float_exp(B::float_sub(inputs.sinks.clone(), log_sum));
        let of_rows = B::float_neg(B::float_mul(weight, row_sum.clone()));
        reduce_to::<B>(of_rows, inputs.sinks.shape())
    });
    let score_grad = B::float_mul(weights, B::float_sub(weight_grad, row_sum));
    let bias_grad = (of_bias && inputs.block.biased).then(|| {
        let grad = reduce_to::<B>(score_grad.clone(), inputs.bias.shape());
        cast::<B>(grad, inputs.bias.dtype())
    });
    let score_grad = match inputs.block.softcap {
        Some(cap) => {
            let relative =
                B::float_div_scalar(capped::<B>(inputs.q.clone(), inputs.k.clone(), inputs.block), number(cap));
            B::float_sub(score_grad.clone(), B::float_mul(score_grad, B::float_mul(relative.clone(), relative)))
        }
        None => score_grad,
    };
    let score_grad = cast::<B>(B::float_mul_scalar(score_grad, number(inputs.block.scale)), dtype);
    let k_grad = of_k.then(|| gather_shared::<B>(score_grad.clone(), inputs.q, &inputs.k));
    let q_grad = of_q.then(|| matmul_shared::<B>(score_grad, inputs.k));
    [q_grad, k_grad, v_grad, bias_grad, sink_grad]
}

/// `[batch, heads, rows, keys]` in f32, those of hidden keys out of reach.
fn scores<B: Backend>(inputs: &Inputs<B>) -> FloatTensor<B> {
    let mut scores = capped::<B>(inputs.q.clone(), inputs.k.clone(), inputs.block);
    if inputs.block.biased {
        scores = B::float_add(scores, cast::<B>(inputs.bias.clone(), DType::F32));
    }
    hide(scores, inputs, f64::from(HIDDEN_SCORE))
}

/// `[batch, heads, rows, keys]` in f32: scaled and, where there is a cap, softly bounded by it.
fn capped<B: Backend>(q: FloatTensor<B>, k: FloatTensor<B>, block: Block) -> FloatTensor<B> {
    let products = matmul_shared::<B>(q, B::float_swap_dims(k, 2, 3));
    let scores = B::float_mul_scalar(cast::<B>(products, DType::F32), number(block.scale));
    match block.softcap {
        Some(cap) => B::float_mul_scalar(B::float_tanh(B::float_div_scalar(scores, number(cap))), number(cap)),
        None => scores,
    }
}

/// `x`, `[batch, heads, rows, keys]`, with `value` where keys are hidden.
fn hide<B: Backend>(mut x: FloatTensor<B>, inputs: &Inputs<B>, value: f64) -> FloatTensor<B> {
    let (full, device) = (x.shape(), x.device());
    let settings = get_or_init_device_settings::<B>(&device);
    if inputs.block.ranged {
        let (rows, keys) = (full[2], full[3]);
        let index = B::int_arange(0..keys as i64, &device, settings.int_dtype);
        let index = B::int_expand(B::int_reshape(index, Shape::new([1, 1, 1, keys])), full.clone());
        let bound = |column: usize| {
            let all = inputs.ranges.shape();
            let slices = [0..all[0], 0..1, 0..rows, column..column + 1].map(Slice::from);
            B::int_expand(B::int_slice(inputs.ranges.clone(), &slices), full.clone())
        };
        let before = B::int_lower(index.clone(), bound(0), settings.bool_dtype);
        let behind = B::int_greater_equal(index, bound(1), settings.bool_dtype);
        x = B::float_mask_fill(x, B::bool_or(before, behind), number(value));
    }
    if inputs.block.masked {
        x = B::float_mask_fill(x, B::bool_expand(inputs.hidden.clone(), full), number(value));
    }
    x
}

/// `left[b, h] right[b, h / (heads / right heads)]`
fn matmul_shared<B: Backend>(left: FloatTensor<B>, right: FloatTensor<B>) -> FloatTensor<B> {
    let [batch, heads, rows, inner] = left.shape().dims::<4>();
    let [_, right_heads, _, columns] = right.shape().dims::<4>();
    if heads == right_heads {
        return B::float_matmul(left, right);
    }
    let stacked = B::float_reshape(left, Shape::new([batch, right_heads, heads / right_heads * rows, inner]));
    B::float_reshape(B::float_matmul(stacked, right), Shape::new([batch, heads, rows, columns]))
}

/// `leftᵀ right` per head, `[batch, heads, rows, ..]` both, summed over the heads that share one of `of`.
fn gather_shared<B: Backend>(left: FloatTensor<B>, right: FloatTensor<B>, of: &FloatTensor<B>) -> FloatTensor<B> {
    let shared = of.shape()[1];
    let stack = |x: FloatTensor<B>| {
        let [batch, heads, rows, width] = x.shape().dims::<4>();
        B::float_reshape(x, Shape::new([batch, shared, heads / shared * rows, width]))
    };
    B::float_matmul(B::float_swap_dims(stack(left), 2, 3), stack(right))
}

/// The sum over the dimensions in which `shape` has size 1.
fn reduce_to<B: Backend>(x: FloatTensor<B>, shape: Shape) -> FloatTensor<B> {
    (0..4).filter(|&axis| shape[axis] == 1).fold(x, |x, axis| B::float_sum_dim(x, axis))
}

fn number(value: f64) -> Scalar {
    Scalar::from(value)
}

#[cfg(test)]
mod tests;
