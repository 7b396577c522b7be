//! Attention in tiles, forward and backward, on the CPU.
//!
//! After FlashAttention-2 (Dao 2023, arXiv 2307.08691), only one tile of scores exists at a time: `forward.rs` walks over
//! the keys with a running softmax, `backward.rs` computes the tiles again. How work is cut depends on shapes alone: the
//! same bits come out for any number of threads.

mod backward;
mod forward;

use std::ops::Range;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;

use self::backward::backward;
use self::forward::forward;
use super::{Attention, AttentionOptions, Measure, Statistics};
use crate::cpu::{View, row_major, values};
use crate::differentiable::{InputGrads, Wanted, differentiable};
use crate::mask::Visible;
use crate::selected_rows::{Rows, SelectedRows};
use crate::{in_type, simd};

/// Queries of a tile.
const QUERIES: usize = 128;
/// Keys of a tile; with [`QUERIES`] it makes 256 KiB, which fits into a core's second-level cache.
const KEYS: usize = 512;
/// Facts about a query that are kept: the log of its sum, and what statistics are made of.
const FACTS: usize = 5;
/// Index of the largest score among them.
const LARGEST: usize = 3;

/// The settings of a call, besides its tensors.
#[derive(Debug)]
pub(super) struct Plan {
    scale: f32,
    softcap: Option<f32>,
    /// Whether `sinks` are some.
    sunk: bool,
    /// Whether `bias` is one.
    biased: bool,
    key_of: Vec<usize>,
    value_of: Vec<usize>,
    /// Query heads that share key or value heads, directly or through others.
    families: Vec<Vec<usize>>,
    visible: Arc<Visible>,
    /// The selected queries of each head; `None` means all.
    selected: Option<Arc<SelectedRows>>,
    measure: bool,
}

impl Plan {
    /// The logits of the sinks, one per head; `None` where there are none.
    fn sinks<'a>(&self, tensor: &'a FlexTensor) -> Option<&'a [f32]> {
        self.sunk.then(|| values(tensor))
    }

    /// The bias; `None` where there is none.
    fn bias<'a>(&self, tensor: &'a FlexTensor) -> Option<View<'a>> {
        self.biased.then(|| View::new(tensor))
    }

    /// The blocks of queries that a head computes in a row of the batch.
    fn blocks(&self, b: usize, h: usize) -> Vec<Rows<'_>> {
        match &self.selected {
            Some(selected) => selected.blocks(b, h, QUERIES).collect(),
            None => {
                let cuts = self.visible.cuts([b, h], QUERIES).into_iter();
                cuts.map(|cut| Rows::Span { from: cut.start, len: cut.len() }).collect()
            }
        }
    }

    /// The keys of `within` that any of these queries of a head may see, in spans.
    fn spans(&self, of: [usize; 2], rows: Rows<'_>, within: Range<usize>) -> Vec<Range<usize>> {
        let reach = reach(&self.visible, of[0], rows);
        let reach = reach.start.max(within.start)..reach.end.min(within.end);
        if reach.is_empty() { Vec::new() } else { self.visible.spans(of, rows.queries(), reach) }
    }
}

/// The tiles as an operation of Burn's dispatching backend.
#[backend_extension(Flex, Autodiff)]
pub(super) trait TiledAttention: Backend {
    /// The output, and `[FACTS, batch, heads, queries]` (only the first of them where nothing is measured). Sinks and a bias
    /// that are none are a single number.
    fn tiled_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        plan: Arc<Plan>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// Whether tiles take this bias: one row for all queries, or one that has no gradient, which would be a matrix for every head.
pub(super) fn take(bias: &Tensor<4>) -> bool {
    bias.dims()[2] == 1 || !bias.is_autodiff()
}

/// See [`super::attention`].
pub(super) fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    visible: Arc<Visible>,
    options: &AttentionOptions<'_>,
) -> Attention {
    let [batch, heads, queries, _] = q.dims();
    let (key_of, value_of) = (options.keys.of(heads, k.dims()[1]), options.values.of(heads, v.dims()[1]));
    let [k, v] = [k, v].map(|x| in_type(x, DType::F32));
    let plan = Plan {
        scale: options.scale_for(&q) as f32,
        softcap: options.softcap.map(|cap| cap as f32),
        sunk: options.sinks.is_some(),
        biased: options.bias.is_some(),
        families: families(&key_of, &value_of),
        key_of,
        value_of,
        visible,
        selected: options.selected.clone(),
        measure: !options.statistics.is_nothing(),
    };
    // The maps of one row are needed for images only: they are made beside the tiles.
    let weights = matches!(options.statistics, Measure::Weights).then(|| {
        let first = |x: &Tensor<4>| x.clone().narrow(0, 0, 1).detach();
        let sinks = options.sinks.as_ref().map(|sinks| sinks.to_data().iter::<f32>().collect::<Vec<f32>>());
        let bias = options.bias.as_ref().map(first);
        weights_of_first_row([first(&q), first(&k)], bias, sinks.as_deref(), &plan)
    });
    let sinks = options.sinks.clone().map(|sinks| in_type(sinks, DType::F32));
    let sinks = sinks.unwrap_or_else(|| Tensor::zeros([1], &q.device()));
    let bias = options.bias.clone().map(|bias| in_type(bias, DType::F32));
    let bias = bias.unwrap_or_else(|| Tensor::zeros([1; 4], &q.device()));
    let (measure, counted) = (plan.measure, options.counted(q.dims(), &q.device()).clamp_min(1.0));
    let (hidden, facts) = Dispatch::tiled_attention(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        sinks.into_dispatch(),
        bias.into_dispatch(),
        Arc::new(plan),
    );
    let statistics = measure.then(|| {
        let facts = Tensor::<4>::from_dispatch(facts).swap_dims(1, 2); // [FACTS, heads, batch, queries]
        let fact = |index| facts.clone().narrow(0, index, 1).reshape([heads, batch * queries]);
        Statistics {
            entropy: fact(1).sum_dim(1).squeeze_dim::<1>(1) / counted.clone(),
            first_key_mass: fact(2).sum_dim(1).squeeze_dim::<1>(1) / counted.clone(),
            largest_score: fact(LARGEST).max_dim(1).squeeze_dim::<1>(1),
            sink_mass: options.sinks.is_some().then(|| fact(4).sum_dim(1).squeeze_dim::<1>(1) / counted),
            span_mass: None,
            weights,
        }
    });
    Attention { hidden: Tensor::from_dispatch(hidden), statistics }
}

/// Groups query heads that share a key or value head.
fn families(key_of: &[usize], value_of: &[usize]) -> Vec<Vec<usize>> {
    let mut families: Vec<Vec<usize>> = Vec::new();
    for head in 0..key_of.len() {
        let shares = |&other: &usize| key_of[other] == key_of[head] || value_of[other] == value_of[head];
        let (related, others): (Vec<_>, Vec<_>) = families.into_iter().partition(|family| family.iter().any(shares));
        families = others;
        let mut family: Vec<usize> = related.into_iter().flatten().chain([head]).collect();
        family.sort_unstable();
        families.push(family);
    }
    families
}

/// `[heads, queries, keys]`, with zeros where keys are hidden and where queries are not computed.
fn weights_of_first_row(
    [q, k]: [Tensor<4>; 2],
    bias: Option<Tensor<4>>,
    sinks: Option<&[f32]>,
    plan: &Plan,
) -> Tensor<3> {
    let [_, heads, queries, _] = q.dims();
    let (keys, device) = (k.dims()[2], q.device());
    let bias = bias.map(|bias| bias.expand([1, heads, queries, keys]));
    let all: Vec<f32> = (0..heads)
        .flat_map(|head| {
            let own = |x: &Tensor<4>, head| x.clone().narrow(1, head, 1).squeeze_dims::<2>(&[0, 1]);
            let scores = own(&q, head).matmul(own(&k, plan.key_of[head]).transpose()) * f64::from(plan.scale);
            let mut scores: Vec<f32> = scores.into_data().iter::<f32>().collect();
            if let Some(cap) = plan.softcap {
                soften(&mut scores, cap);
            }
            if let Some(bias) = &bias {
                simd::add(&mut scores, &own(bias, head).into_data().iter::<f32>().collect::<Vec<_>>());
            }
            let mut weights = vec![0.0; queries * keys];
            for query in plan.blocks(0, head).into_iter().flat_map(Rows::queries) {
                let of_query = query * keys..(query + 1) * keys;
                let sink = sinks.map(|sinks| sinks[head]);
                softmax_of_visible(&mut scores[of_query.clone()], &plan.visible, [head, query], sink);
                weights[of_query.clone()].copy_from_slice(&scores[of_query]);
            }
            weights
        })
        .collect();
    Tensor::<1>::from_floats(all.as_slice(), &device).reshape([heads, queries, keys])
}

/// One row of the first row of the batch, in place.
fn softmax_of_visible(row: &mut [f32], visible: &Visible, [head, query]: [usize; 2], sink: Option<f32>) {
    let range = visible.range(0, query);
    row[..range.start].fill(0.0);
    row[range.end..].fill(0.0);
    let seen = &mut row[range.clone()];
    visible.hide_inside([0, head], query, range.clone(), seen, f32::NEG_INFINITY);
    let largest = simd::max(seen).max(sink.unwrap_or(f32::NEG_INFINITY));
    if seen.iter().all(|score| *score == f32::NEG_INFINITY) {
        return seen.fill(0.0);
    }
    let total = simd::exp_shifted(seen, largest) + sink.map_or(0.0, |sink| simd::exp(sink - largest));
    visible.hide_inside([0, head], query, range, seen, 0.0);
    simd::scale(seen, 1.0 / total);
}

/// `cap · tanh(score / cap)` of every score.
fn soften(scores: &mut [f32], cap: f32) {
    for score in scores {
        *score = cap * (*score / cap).tanh();
    }
}

impl TiledAttention for Flex {
    fn tiled_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        sinks: FlexTensor,
        bias: FlexTensor,
        plan: Arc<Plan>,
    ) -> (FlexTensor, FlexTensor) {
        let [q, k, v, sinks, bias] = [q, k, v, sinks, bias].map(row_major);
        forward([&q, &k, &v].map(View::new), plan.sinks(&sinks), plan.bias(&bias), &plan)
    }
}

impl<C: CheckpointStrategy> TiledAttention for Autodiff<Flex, C> {
    fn tiled_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        plan: Arc<Plan>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let run = |inputs: [FlexTensor; 5], _: Wanted<5>| {
            let [q, k, v, sinks, bias] = inputs.map(row_major);
            let views = [&q, &k, &v].map(View::new);
            let (output, facts) = forward(views, plan.sinks(&sinks), plan.bias(&bias), &plan);
            (output.clone(), ([q, k, v, sinks, bias, output, facts.clone()], plan), facts)
        };
        let back = |(kept, plan): ([FlexTensor; 7], Arc<Plan>), output_grad: FlexTensor, wanted: Wanted<5>| {
            let ([q, k, v, sinks, bias, output, facts], output_grad) = (kept, row_major(output_grad));
            let views = [&q, &k, &v, &output, &output_grad].map(View::new);
            let (sinks, bias) = (plan.sinks(&sinks), plan.bias(&bias));
            backward(views, sinks, bias, values(&facts), &plan, wanted) as InputGrads<Flex, 5>
        };
        let (output, facts) = differentiable::<Flex, C, _, _, 5>([q, k, v, sinks, bias], run, back);
        (output, <Self as AutodiffBackend>::from_inner(facts))
    }
}

/// The keys that any of these queries may see.
fn reach(visible: &Visible, batch: usize, rows: Rows<'_>) -> Range<usize> {
    let (mut from, mut to) = (usize::MAX, 0);
    for range in rows.queries().map(|query| visible.range(batch, query)).filter(|range| !range.is_empty()) {
        (from, to) = (from.min(range.start), to.max(range.end));
    }
    from.min(to)..to
}

/// The part of `range` inside the block `keys`, counted from the block's first key.
fn inside(range: Range<usize>, keys: &Range<usize>) -> Range<usize> {
    let from = range.start.clamp(keys.start, keys.end);
    let to = range.end.clamp(from, keys.end);
    from - keys.start..to - keys.start
}
