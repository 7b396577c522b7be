//! The tiles against the plain form, and the plain form against the definition.

use super::*;
use crate::BlockMask;
use crate::comparison::{Tolerance, assert_tensors_close};
use crate::testing::{agree, every_subset_of_gradients, normal, numbers};
use burn::tensor::Device;

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    normal(shape, &Device::flex())
}

fn close(a: Tensor<4>, b: Tensor<4>) {
    assert_tensors_close("attention", a, b, Tolerance::absolute(1e-6));
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
    let make = || normal([2, 1, 3, 4], &device).require_grad();
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
    let options = AttentionOptions { statistics: Measure::Weights, ..Default::default() };
    let seen = attention(q.clone(), q.clone(), q, &options).statistics.expect("asked for");
    let values = |t: Tensor<1>| t.into_data().iter::<f32>().collect::<Vec<_>>();
    assert!(values(seen.entropy).iter().all(|h| (h - 4f32.ln()).abs() < 1e-6));
    assert!(values(seen.first_key_mass).iter().all(|m| (m - 0.25).abs() < 1e-6));
    assert_eq!(values(seen.largest_score), [0.0, 0.0]);
    assert_eq!(seen.weights.expect("asked for").dims(), [2, 4, 4]);
}

#[test]
fn span_mass_is_the_sum_of_weights_on_a_set_of_keys() {
    let q = Tensor::<4>::zeros([1, 2, 4, 3], &Device::flex());
    let spans = Tensor::<3>::from_floats([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]], &Device::flex());
    let mask = Mask::causal();
    let options =
        AttentionOptions { mask: Some(&mask), statistics: Measure::Spans(spans.into()), ..Default::default() };
    let mass = attention(q.clone(), q.clone(), q, &options).statistics.and_then(|seen| seen.span_mass);
    let of_a_head = [1.0, 0.0, 0.5, 0.5, 1.0 / 3.0, 2.0 / 3.0, 0.25, 0.5];
    agree("span mass", &numbers(mass.expect("asked for")), &of_a_head.repeat(2));
}

/// What is attended to by what.
pub(super) struct Case {
    pub(super) batch: usize,
    pub(super) heads: usize,
    pub(super) key_heads: usize,
    pub(super) value_heads: usize,
    pub(super) queries: usize,
    pub(super) keys: usize,
    pub(super) width: usize,
    pub(super) value_width: usize,
}

pub(super) fn case(batch: usize, heads: usize, key_heads: usize, seq: usize, width: usize) -> Case {
    Case { batch, heads, key_heads, value_heads: key_heads, queries: seq, keys: seq, width, value_width: width }
}

/// A mask of every kind that tiles take.
pub(super) fn masks(batch: usize, seq: usize) -> [Mask; 11] {
    let ids: Vec<u32> = (0..batch * seq).map(|i| (i % seq / 50) as u32).collect();
    let pieces: Vec<u32> = (0..batch * seq).map(|i| (i % seq / 20 % 3) as u32).collect();
    let turns: Vec<bool> = (0..batch * seq).map(|i| i / 17 % 2 == 0).collect();
    let lengths: Vec<usize> = (0..batch).map(|b| (seq * b).div_ceil(2)).collect();
    [
        Mask::none(),
        Mask::causal(),
        Mask::none().with_lengths(&lengths),
        Mask::causal().with_documents(&ids),
        Mask::causal().with_documents(&pieces),
        Mask::turns(&turns, seq),
        Mask::causal().with_window(seq.div_ceil(3)),
        Mask::none().with_window(9).with_lengths(&lengths),
        Mask::causal().with_window(33).with_documents(&pieces),
        Mask::none().with_blocks(block_mask([1, 1], seq, [40, 24])),
        Mask::causal().with_documents(&ids).with_blocks(block_mask([batch, 1], seq, [16, 5])),
    ]
}

/// About a third of all blocks; some queries see nothing.
fn block_mask(heads: [usize; 2], seq: usize, blocks: [usize; 2]) -> BlockMask {
    let count = heads[0] * heads[1] * seq.div_ceil(blocks[0]) * seq.div_ceil(blocks[1]);
    let seen: Vec<bool> = (0..count).map(|at| at * at * 7 % 13 < 4).collect();
    BlockMask::of_blocks(&seen, heads, [seq, seq], blocks)
}

/// Leaves in the memory layout of projections: by position, not by head.
fn leaf(batch: usize, heads: usize, seq: usize, width: usize) -> Tensor<4> {
    let device = Device::flex().autodiff();
    let x = normal([batch, seq, heads, width], &device) * 1.5;
    x.swap_dims(1, 2).detach().require_grad()
}

/// Output, statistics and all gradients of the tiles are those of the plain form.
fn compare(case: &Case, options: &AttentionOptions<'_>) {
    let Case { batch, heads, key_heads, value_heads, queries, keys, width, value_width } = *case;
    let q = leaf(batch, heads, queries, width);
    let k = leaf(batch, key_heads, keys, width);
    let v = leaf(batch, value_heads, keys, value_width);
    let options = AttentionOptions { statistics: Measure::Weights, ..options.clone() };
    let cotangent = random([batch, heads, queries, value_width]);
    let run = |form: fn(Tensor<4>, Tensor<4>, Tensor<4>, &AttentionOptions<'_>) -> Attention| {
        let out = form(q.clone(), k.clone(), v.clone(), &options);
        let grads = (out.hidden.clone() * Tensor::from_inner(cotangent.clone())).sum().backward();
        let leaves: Vec<Vec<f32>> = [&q, &k, &v].map(|leaf| numbers(leaf.grad(&grads).expect("gradient"))).into();
        let of_sinks = options.sinks.iter().map(|leaf| numbers(leaf.grad(&grads).expect("gradient")));
        let of_bias = options.bias.iter().map(|leaf| numbers(leaf.grad(&grads).expect("gradient")));
        let grads: Vec<Vec<f32>> = leaves.into_iter().chain(of_bias).chain(of_sinks).collect();
        let seen = out.statistics.expect("asked for").settled();
        let (sink_mass, weights) = (seen.sink_mass, numbers(seen.weights.expect("asked for")));
        let sink_mass = sink_mass.unwrap_or_else(|| Tensor::zeros([1], &Device::flex()));
        let seen = [seen.entropy, seen.first_key_mass, seen.largest_score, sink_mass].map(numbers);
        (numbers(out.hidden), grads, seen, weights)
    };
    let (got, want) = (run(super::attention), run(plain));
    agree("hidden", &got.0, &want.0);
    let names = ["q", "k", "v"].into_iter().chain(options.bias.is_some().then_some("bias")).chain(["sinks"]);
    for (name, (got, want)) in names.zip(got.1.iter().zip(&want.1)) {
        agree(&format!("gradient of {name}"), got, want);
    }
    for (index, name) in ["entropy", "first_key_mass", "largest_score", "sink_mass"].into_iter().enumerate() {
        agree(name, &got.2[index], &want.2[index]);
    }
    agree("weights", &got.3, &want.3);
    let spans = Tensor::from_inner(random([batch, keys, 2]).greater_elem(0.0).float());
    let spanned = AttentionOptions { statistics: Measure::Spans(spans.clone().into()), ..options.clone() };
    let [q, k, v] = [q, k, v].map(Tensor::inner);
    let seen = attention(q.clone(), k.clone(), v, &spanned).statistics.expect("asked for");
    // A value that says whether its key is in a set comes out as the weight on the set.
    let options = AttentionOptions { values: HeadMap::Each(vec![0; heads]), bias: spanned.bias, ..options };
    let summed = plain(q, k, spans.inner().unsqueeze_dim(1), &options).hidden;
    agree("span mass", &numbers(seen.span_mass.expect("asked for")), &numbers(summed));
}

#[test]
fn tiles_agree_over_awkward_shapes_and_masks() {
    for (batch, heads, key_heads, seq, width) in [
        (1usize, 1, 1, 1, 1),
        (3, 2, 1, 7, 5),
        (1, 4, 2, 63, 64),
        (3, 1, 1, 129, 80),
        (1, 1, 1, 1030, 8),
        (2, 6, 3, 300, 16),
    ] {
        for mask in masks(batch, seq) {
            let options = AttentionOptions { mask: Some(&mask), ..Default::default() };
            compare(&case(batch, heads, key_heads, seq, width), &options);
        }
    }
}

#[test]
fn blocks_of_every_head_with_sinks_selected_rows_and_cached_keys() {
    let mask = Mask::causal().with_blocks(block_mask([2, 6], 300, [130, 32]));
    let selected = Some(Arc::new(SelectedRows::new(&choices(2, 300, 6), [2, 300, 6])));
    for selected in [None, selected] {
        let options = AttentionOptions { mask: Some(&mask), sinks: Some(sinks(6)), selected, ..Default::default() };
        compare(&case(2, 6, 3, 300, 8), &options);
    }
    for (queries, cached) in [(1, 299), (140, 160)] {
        let case = Case { queries, keys: 300, ..case(2, 6, 2, 0, 8) };
        compare(&case, &AttentionOptions { mask: Some(&mask), query_offset: cached, ..Default::default() });
    }
}

/// What no block shows is not a number here: nobody reads it.
#[test]
fn hidden_blocks_are_never_read() {
    let blocks = BlockMask::of_blocks(&[true, false, true, false, false, true], [1, 1], [256, 600], [128, 200]);
    let mask = Mask::none().with_blocks(blocks);
    let options = AttentionOptions { mask: Some(&mask), ..Default::default() };
    let (q, k, v) = (leaf(1, 2, 256, 8), leaf(1, 1, 600, 8), leaf(1, 1, 600, 8));
    let run = |elsewhere: f32| {
        // The second block of keys is hidden from all queries.
        let with = |x: &Tensor<4>| {
            let middle = Tensor::full([1, 1, 200, 8], elsewhere, &x.device().inner());
            Tensor::from_inner(x.clone().inner().slice_assign([0..1, 0..1, 200..400, 0..8], middle)).require_grad()
        };
        let (k, v) = (with(&k), with(&v));
        let out = attention(q.clone(), k.clone(), v.clone(), &options).hidden;
        let grads = out.clone().square().sum().backward();
        (numbers(out), [&q, &k, &v].map(|leaf| numbers(leaf.grad(&grads).expect("gradient"))))
    };
    assert!(run(0.0) == run(f32::NAN));
}

/// Logits of sinks from far below the scores to far above, as a leaf.
pub(super) fn sinks(heads: usize) -> Tensor<1> {
    let logits: Vec<f32> = (0..heads).map(|head| [0.5, -3.0, 4.0, -1e4, 1.5][head % 5]).collect();
    Tensor::<1>::from_floats(logits.as_slice(), &Device::flex().autodiff()).require_grad()
}

#[test]
fn tiles_agree_with_sinks_and_caps() {
    for (batch, heads, key_heads, seq, width) in
        [(1usize, 1, 1, 1, 1), (3, 2, 1, 7, 5), (1, 4, 2, 129, 16), (2, 6, 3, 300, 16), (1, 1, 1, 1030, 8)]
    {
        let selected = Some(Arc::new(SelectedRows::new(&choices(batch, seq, heads), [batch, seq, heads])));
        for (index, mask) in masks(batch, seq).iter().enumerate() {
            let (softcap, selected) = ([None, Some(2.0)][index % 2], selected.clone().filter(|_| index % 4 == 3));
            let sinks = (index != 1).then(|| sinks(heads));
            let options = AttentionOptions { mask: Some(mask), sinks, softcap, selected, ..Default::default() };
            compare(&case(batch, heads, key_heads, seq, width), &options);
        }
    }
}

/// Biases of keys: the same for all, of each row of the batch, of each head, of both.
fn key_bias(index: usize, [batch, heads, keys]: [usize; 3]) -> Option<Tensor<4>> {
    let shape = [[1, 1], [batch, 1], [1, heads], [batch, heads]][index % 4];
    let shape = [shape[0], shape[1], 1, keys];
    Some((normal(shape, &Device::flex().autodiff()) * 2.0).require_grad())
}

#[test]
fn tiles_agree_with_biases_of_keys() {
    for (batch, heads, key_heads, seq, width) in
        [(1usize, 1, 1, 1, 1), (3, 2, 1, 7, 5), (2, 6, 3, 300, 16), (1, 2, 1, 1030, 8)]
    {
        let selected = Some(Arc::new(SelectedRows::new(&choices(batch, seq, heads), [batch, seq, heads])));
        for (index, mask) in masks(batch, seq).iter().enumerate() {
            let (softcap, selected) = ([None, Some(2.0)][index / 2 % 2], selected.clone().filter(|_| index % 4 == 3));
            let (bias, sinks) = (key_bias(index, [batch, heads, seq]), (index % 3 == 0).then(|| sinks(heads)));
            let options = AttentionOptions { mask: Some(mask), bias, sinks, softcap, selected, ..Default::default() };
            compare(&case(batch, heads, key_heads, seq, width), &options);
        }
    }
    let mask = Mask::causal();
    for (queries, cached) in [(1, 700), (140, 600)] {
        let (case, bias) =
            (Case { queries, keys: cached + queries, ..case(2, 6, 2, 0, 16) }, key_bias(3, [2, 6, cached + queries]));
        compare(&case, &AttentionOptions { mask: Some(&mask), bias, query_offset: cached, ..Default::default() });
    }
}

#[test]
fn tiles_agree_with_biases_of_pairs_that_are_not_trained() {
    let (q, k, v) = (random([2, 4, 200, 8]), random([2, 2, 200, 8]), random([2, 2, 200, 5]));
    let mask = Mask::causal();
    for (rows, heads) in [(1, 1), (2, 1), (1, 4), (2, 4)] {
        let bias = Some(random([rows, heads, 200, 200]));
        let options = AttentionOptions { mask: Some(&mask), bias, statistics: Measure::Weights, ..Default::default() };
        let run = |form: fn(Tensor<4>, Tensor<4>, Tensor<4>, &AttentionOptions<'_>) -> Attention| {
            let out = form(q.clone(), k.clone(), v.clone(), &options);
            let seen = out.statistics.expect("asked for").settled();
            [numbers(out.hidden), numbers(seen.entropy), numbers(seen.weights.expect("asked for"))]
        };
        for (got, want) in run(super::attention).iter().zip(&run(plain)) {
            agree("under a bias", got, want);
        }
    }
}

#[test]
fn sinks_and_windows_with_maps_wide_values_and_cached_keys() {
    let mask = Mask::causal().with_window(50);
    let keys = HeadMap::Each(vec![0, 0, 1, 2, 2, 3]);
    let options = AttentionOptions { mask: Some(&mask), keys, sinks: Some(sinks(6)), ..Default::default() };
    compare(&Case { value_heads: 2, value_width: 24, ..case(2, 6, 4, 70, 12) }, &options);
    for (queries, cached) in [(1, 700), (5, 30), (140, 600)] {
        let case = Case { queries, keys: cached + queries, ..case(2, 6, 2, 0, 16) };
        let options = AttentionOptions { query_offset: cached, keys: HeadMap::Even, ..options.clone() };
        compare(&case, &options);
    }
}

#[test]
fn a_sink_takes_its_share_of_the_sum() {
    // Three keys of score 0 beside a sink of ln 3: half of the weight is on the sink.
    let q = Tensor::<4>::zeros([1, 1, 3, 2], &Device::flex());
    let v = Tensor::<4>::ones([1, 1, 3, 2], &Device::flex());
    let with = |sink: f32| AttentionOptions {
        sinks: Some(Tensor::from_floats([sink], &Device::flex())),
        statistics: Measure::Weights,
        ..Default::default()
    };
    let half = attention(q.clone(), q.clone(), v.clone(), &with(3f32.ln()));
    agree("hidden", &numbers(half.hidden), &[0.5; 6]);
    let seen = half.statistics.expect("asked for");
    agree("sink mass", &numbers(seen.sink_mass.expect("a sink")), &[0.5]);
    agree("entropy", &numbers(seen.entropy), &[0.5 * 2f32.ln() + 0.5 * 6f32.ln()]);
    let none = numbers(attention(q.clone(), q.clone(), v.clone(), &with(-1e4)).hidden);
    assert_eq!(none, numbers(attention(q.clone(), q.clone(), v.clone(), &AttentionOptions::default()).hidden));
    let all = attention(q.clone(), q, v, &with(1e4));
    assert!(numbers(all.hidden).iter().all(|value| (0.0..1e-30).contains(value)));
}

#[test]
fn a_window_of_one_key_gives_its_value_and_a_wide_one_everything() {
    let (q, k, v) = (random([2, 4, 300, 8]), random([2, 2, 300, 8]), random([2, 4, 300, 5]));
    let run = |mask: &Mask| {
        let options = AttentionOptions { mask: Some(mask), ..Default::default() };
        numbers(attention(q.clone(), k.clone(), v.clone(), &options).hidden)
    };
    agree("its own value", &run(&Mask::causal().with_window(1)), &numbers(v.clone()));
    assert!(run(&Mask::causal().with_window(300)) == run(&Mask::causal()));
}

#[test]
fn tiles_agree_for_maps_wide_values_cached_keys_and_scales() {
    let mask = Mask::causal();
    // Signal and noise heads of differential attention: keys of their own, values shared.
    let striped = Case { value_heads: 2, value_width: 24, ..case(2, 6, 4, 70, 12) };
    let keys = HeadMap::Each(vec![0, 0, 1, 2, 2, 3]);
    let options = AttentionOptions { mask: Some(&mask), keys, scale: Some(0.11), ..Default::default() };
    compare(&striped, &options);
    for (queries, cached) in [(1, 700), (5, 30), (140, 600)] {
        let case = Case { queries, keys: cached + queries, ..case(2, 4, 2, 0, 16) };
        compare(&case, &AttentionOptions { mask: Some(&mask), query_offset: cached, ..Default::default() });
    }
}

#[test]
fn heads_that_nobody_reads_have_gradients_of_zero() {
    let keys = HeadMap::Each(vec![0, 0, 3, 0]);
    let values = HeadMap::Each(vec![1, 1, 1, 1]);
    compare(&case(2, 4, 4, 70, 12), &AttentionOptions { keys, values, ..Default::default() });
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let (q, k, v) = (leaf(1, 2, 700, 16), leaf(1, 1, 700, 16), leaf(1, 1, 700, 16));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| {
            let mask = Mask::causal();
            let options = AttentionOptions { mask: Some(&mask), ..Default::default() };
            let hidden = attention(q.clone(), k.clone(), v.clone(), &options).hidden;
            let grads = hidden.clone().square().sum().backward();
            let grads = [&q, &k, &v].map(|leaf| numbers(leaf.grad(&grads).expect("gradient")));
            (numbers(hidden), grads)
        })
    };
    assert!(run(1) == run(5));
}

#[test]
fn gradients_agree_with_finite_differences() {
    let (q, k, v) = (leaf(1, 2, 6, 4), leaf(1, 1, 6, 4), leaf(1, 1, 6, 3));
    let mask = Mask::causal();
    let options = AttentionOptions { mask: Some(&mask), ..Default::default() };
    let value = |q: Tensor<4>, k: Tensor<4>, v: Tensor<4>| attention(q, k, v, &options).hidden.sin().sum();
    let grads = value(q.clone(), k.clone(), v.clone()).backward();
    let at = |t: f32| value(q.clone() + t, k.clone() * (1.0 + t), v.clone() + t).into_scalar::<f32>();
    let slope = (numbers(q.grad(&grads).expect("q").sum())[0])
        + numbers((k.grad(&grads).expect("k") * k.clone().inner()).sum())[0]
        + numbers(v.grad(&grads).expect("v").sum())[0];
    let central = |h: f32| (at(h) - at(-h)) / (2.0 * h);
    let difference = (4.0 * central(5e-3) - central(1e-2)) / 3.0;
    assert!((slope - difference).abs() < 5e-3 * (1.0 + slope.abs()), "slope {slope}, difference {difference}");
}

#[test]
fn not_a_number_is_not_hidden() {
    let q = random([1, 1, 3, 4]) * f32::NAN;
    let mask = Mask::causal();
    let options = AttentionOptions { mask: Some(&mask), ..Default::default() };
    let out = numbers(attention(q, random([1, 1, 3, 4]), random([1, 1, 3, 4]), &options).hidden);
    assert!(out.iter().all(|value| value.is_nan()));
}

/// Choices as routing makes them: the first head everywhere, the last one nowhere, the others here and there.
fn choices(batch: usize, queries: usize, heads: usize) -> Vec<bool> {
    let chosen = |index: usize| match index % heads {
        0 => true,
        head if head + 1 == heads => false,
        head => (index / heads * 7 + head * 5 + index / heads / 3) % 5 < 2,
    };
    (0..batch * queries * heads).map(chosen).collect()
}

#[test]
fn tiles_agree_where_only_some_queries_of_a_head_are_active() {
    for (batch, heads, key_heads, seq, width) in
        [(1usize, 2, 1, 1, 1), (3, 4, 2, 7, 5), (2, 6, 3, 300, 16), (1, 3, 3, 1030, 8)]
    {
        let ids: Vec<u32> = (0..batch * seq).map(|i| (i % seq / 50) as u32).collect();
        let pieces: Vec<u32> = (0..batch * seq).map(|i| (i % seq / 20 % 3) as u32).collect();
        let turns: Vec<bool> = (0..batch * seq).map(|i| i / 17 % 2 == 0).collect();
        let lengths: Vec<usize> = (0..batch).map(|b| (seq * b).div_ceil(2)).collect();
        let selected = Some(Arc::new(SelectedRows::new(&choices(batch, seq, heads), [batch, seq, heads])));
        for mask in [
            Mask::none(),
            Mask::causal(),
            Mask::causal().with_lengths(&lengths),
            Mask::none().with_documents(&ids),
            Mask::causal().with_documents(&pieces),
            Mask::turns(&turns, seq),
        ] {
            let options = AttentionOptions { mask: Some(&mask), selected: selected.clone(), ..Default::default() };
            compare(&case(batch, heads, key_heads, seq, width), &options);
        }
    }
}

#[test]
fn active_queries_with_maps_wide_values_and_cached_keys() {
    let mask = Mask::causal();
    let selected = |queries| Some(Arc::new(SelectedRows::new(&choices(2, queries, 6), [2, queries, 6])));
    let keys = HeadMap::Each(vec![0, 0, 1, 2, 2, 3]);
    let options = AttentionOptions { mask: Some(&mask), keys, selected: selected(70), ..Default::default() };
    compare(&Case { value_heads: 2, value_width: 24, ..case(2, 6, 4, 70, 12) }, &options);
    for (queries, cached) in [(1, 700), (140, 600)] {
        let case = Case { queries, keys: cached + queries, ..case(2, 6, 2, 0, 16) };
        let options = AttentionOptions { selected: selected(queries), query_offset: cached, ..options.clone() };
        compare(&case, &AttentionOptions { keys: HeadMap::Even, ..options });
    }
}

/// `[batch, heads, queries, 1]`, 1 where selected.
fn ones_where(selected: &SelectedRows) -> Tensor<4> {
    selected.hidden(&Device::flex()).bool_not().float()
}

#[test]
fn active_queries_have_the_numbers_of_the_masked_form() {
    let (q, k, v) = (leaf(2, 4, 150, 8), leaf(2, 2, 150, 8), leaf(2, 2, 150, 8));
    let selected = Arc::new(SelectedRows::new(&choices(2, 150, 4), [2, 150, 4]));
    let (mask, cotangent) = (Mask::causal(), random([2, 4, 150, 8]));
    let run = |out: Tensor<4>| {
        let grads = (out.clone() * Tensor::from_inner(cotangent.clone())).sum().backward();
        (numbers(out), [&q, &k, &v].map(|leaf| numbers(leaf.grad(&grads).expect("gradient"))))
    };
    let everywhere = AttentionOptions { mask: Some(&mask), ..Default::default() };
    let some = AttentionOptions { selected: Some(selected.clone()), ..everywhere.clone() };
    let got = run(attention(q.clone(), k.clone(), v.clone(), &some).hidden);
    let masked = attention(q.clone(), k.clone(), v.clone(), &everywhere).hidden;
    let want = run(masked * Tensor::from_inner(ones_where(&selected)));
    agree("hidden", &got.0, &want.0);
    for (got, want) in got.1.iter().zip(&want.1) {
        agree("gradient", got, want);
    }
}

#[test]
fn inactive_queries_are_never_read() {
    let selected = Arc::new(SelectedRows::new(&choices(2, 150, 4), [2, 150, 4]));
    let (q, k, v) = (random([2, 4, 150, 8]), leaf(2, 2, 150, 8), leaf(2, 2, 150, 8));
    let cotangent = random([2, 4, 150, 8]);
    let mask = Mask::causal();
    let run = |elsewhere: f32| {
        let with =
            |x: &Tensor<4>| x.clone().mask_fill(selected.hidden(&Device::flex()).expand([2, 4, 150, 8]), elsewhere);
        let q = Tensor::from_inner(with(&q)).require_grad();
        let options = AttentionOptions { mask: Some(&mask), selected: Some(selected.clone()), ..Default::default() };
        let out = attention(q.clone(), k.clone(), v.clone(), &options).hidden;
        let grads = (out.clone() * Tensor::from_inner(with(&cotangent))).sum().backward();
        (numbers(out), [&q, &k, &v].map(|leaf| numbers(leaf.grad(&grads).expect("gradient"))))
    };
    assert!(run(0.0) == run(f32::NAN));
}

#[test]
fn gradients_are_the_same_whichever_are_asked_for() {
    let mask = Mask::causal();
    let selected = Arc::new(SelectedRows::new(&choices(2, 300, 4), [2, 300, 4]));
    for selected in [None, Some(selected)] {
        let options = AttentionOptions { mask: Some(&mask), selected, ..Default::default() };
        let shapes: [&[usize]; 5] = [&[2, 4, 300, 8], &[2, 2, 300, 8], &[2, 1, 300, 5], &[4], &[2, 300]];
        every_subset_of_gradients(&shapes, |[q, k, v, sinks, bias]| {
            let (k, v) = (k.reshape([2, 2, 300, 8]), v.reshape([2, 1, 300, 5]));
            let bias = Some(bias.reshape([2, 1, 1, 300]));
            let options = AttentionOptions { sinks: Some(sinks), bias, ..options.clone() };
            attention(q.reshape([2, 4, 300, 8]), k, v, &options).hidden.reshape([-1])
        });
    }
}

#[test]
fn calls_with_nothing_to_compute_give_zeros_on_every_form() {
    let bias = Tensor::<4>::zeros([2, 1, 3, 0], &Device::flex());
    for (queries, keys, bias) in [(0, 3, None), (3, 0, None), (3, 0, Some(bias))] {
        let device = Device::flex().autodiff();
        let of = |heads, rows, width| normal([2, heads, rows, width], &device).require_grad();
        let (q, k, v) = (of(4, queries, 6), of(2, keys, 6), of(1, keys, 5));
        let options = AttentionOptions { bias, statistics: Measure::Weights, ..Default::default() };
        let out = attention(q.clone(), k.clone(), v.clone(), &options);
        assert_eq!(out.hidden.dims(), [2, 4, queries, 5]);
        assert!(numbers(out.hidden.clone()).iter().all(|&value| value == 0.0));
        assert_eq!(out.statistics.and_then(|seen| seen.weights).expect("asked for").dims(), [4, queries, keys]);
        let grads = out.hidden.sum().backward();
        for leaf in [q, k, v] {
            assert!(numbers(leaf.grad(&grads).expect("gradient")).iter().all(|&value| value == 0.0));
        }
    }
}
