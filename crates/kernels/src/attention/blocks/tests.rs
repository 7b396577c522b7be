//! The form in blocks against the plain one.

use super::super::Measure;
use super::super::tests::{Case, case, masks, sinks};
use super::*;
use crate::testing::{agree, agree_with_gradients, every_subset_of_gradients, leaf, normal, numbers};
use burn::tensor::Device;

fn sizes(batch: usize, heads: usize, key_heads: usize, seq: usize, width: usize) -> Case {
    Case { value_width: width + 3, ..case(batch, heads, key_heads, seq, width) }
}

/// Outputs and gradients are those of the plain form, in one block and in blocks of a few rows.
fn compare(sizes: &Case, bias: Option<[usize; 2]>, options: &AttentionOptions<'_>) {
    let Case { batch, heads, key_heads, value_heads, queries, keys, width, value_width } = *sizes;
    let bias_shape = bias.map(|[rows, of_heads]| [rows, of_heads, queries, keys]);
    let (q, k) = (leaf([batch * heads * queries * width]), leaf([batch * key_heads * keys * width]));
    let v = leaf([batch * value_heads * keys * value_width]);
    let bias = leaf([bias_shape.map_or(1, |shape| shape.iter().product())]);
    let sinks = options.sinks.clone().unwrap_or_else(|| leaf([1]));
    for scores in [SCORES, 40 * batch * heads * keys] {
        let run = |blocks: bool, [q, k, v, bias, sinks]: [Tensor<1>; 5]| {
            // By position, as projections leave them.
            let q = q.reshape([batch, queries, heads, width]).swap_dims(1, 2);
            let k = k.reshape([batch, key_heads, keys, width]);
            let v = v.reshape([batch, value_heads, keys, value_width]);
            let bias_here = bias_shape.map(|s| bias.clone().reshape(s));
            let sinks_here = options.sinks.is_some().then(|| sinks.clone());
            let options = AttentionOptions { bias: bias_here, sinks: sinks_here, ..options.clone() };
            let out = if blocks { in_blocks(q, k, v, &options, scores) } else { plain(q, k, v, &options) };
            // So that every input has a gradient, though it may be zero.
            out.hidden.reshape([-1]) + bias.sum() * 0.0 + sinks.sum() * 0.0
        };
        agree_with_gradients(&[&q, &k, &v, &bias, &sinks], |x| run(true, x), |x| run(false, x));
    }
}

#[test]
fn blocks_agree_over_awkward_shapes_and_masks() {
    for (batch, heads, key_heads, seq, width) in
        [(1usize, 1, 1, 1, 1), (3, 2, 1, 7, 5), (1, 4, 2, 63, 64), (3, 1, 1, 129, 80), (2, 6, 3, 100, 16)]
    {
        let dense = normal([1, heads, seq, seq], &Device::flex()).greater_elem(0.3);
        let with_dense = masks(batch, seq).into_iter().chain([Mask::causal().with_dense(dense)]);
        for (index, mask) in with_dense.enumerate() {
            let bias = [None, Some([batch, 1]), Some([1, heads])][index % 3];
            compare(
                &sizes(batch, heads, key_heads, seq, width),
                bias,
                &AttentionOptions { mask: Some(&mask), ..Default::default() },
            );
        }
    }
}

#[test]
fn blocks_agree_with_sinks_and_caps() {
    for (batch, heads, key_heads, seq, width) in [(1usize, 1, 1, 1, 1), (3, 2, 1, 7, 5), (2, 6, 3, 100, 16)] {
        let dense = normal([1, heads, seq, seq], &Device::flex()).greater_elem(0.3);
        let with_dense = masks(batch, seq).into_iter().chain([Mask::causal().with_window(5).with_dense(dense)]);
        for (index, mask) in with_dense.enumerate() {
            let (bias, softcap) = ([None, Some([1, heads])][index % 2], [None, None, Some(1.5)][index % 3]);
            let options =
                AttentionOptions { mask: Some(&mask), sinks: Some(sinks(heads)), softcap, ..Default::default() };
            compare(&sizes(batch, heads, key_heads, seq, width), bias, &options);
        }
    }
}

#[test]
fn blocks_agree_for_maps_scales_and_cached_keys() {
    let mask = Mask::causal();
    let options = AttentionOptions { mask: Some(&mask), scale: Some(0.11), ..Default::default() };
    let maps = AttentionOptions {
        keys: HeadMap::Each(vec![0, 0, 1, 3, 2, 3]),
        values: HeadMap::Each(vec![1, 0, 1, 0, 0, 0]),
        ..options.clone()
    };
    compare(&Case { value_heads: 2, ..sizes(2, 6, 4, 70, 12) }, Some([2, 6]), &maps);
    let cached = AttentionOptions { query_offset: 61, ..options };
    compare(&Case { queries: 90, keys: 151, ..sizes(2, 4, 2, 0, 8) }, None, &cached);
}

/// Statistics are those of the plain form too.
fn compare_statistics(options: &AttentionOptions<'_>) {
    let make = |heads| normal([2, heads, 50, 8], &Device::flex());
    let (q, k, v) = (make(4), make(2), make(2));
    let options = AttentionOptions { statistics: Measure::Weights, ..options.clone() };
    let read = |seen: Option<Statistics>| {
        let seen = seen.expect("asked for").settled();
        let sink_mass = seen.sink_mass.unwrap_or_else(|| Tensor::zeros([1], &Device::flex()));
        let [a, b, c, d] = [seen.entropy, seen.first_key_mass, seen.largest_score, sink_mass].map(numbers);
        [a, b, c, d, numbers(seen.weights.expect("asked for"))]
    };
    let got = read(in_blocks(q.clone(), k.clone(), v.clone(), &options, 7 * 2 * 4 * 50).statistics);
    let want = read(plain(q, k, v, &options).statistics);
    for (got, want) in got.iter().zip(&want) {
        agree("statistics", got, want);
    }
}

#[test]
fn statistics_of_parts_are_those_of_the_whole() {
    let mask = Mask::causal();
    let options = AttentionOptions { mask: Some(&mask), ..Default::default() };
    compare_statistics(&options);
    compare_statistics(&AttentionOptions { sinks: Some(sinks(4)), softcap: Some(2.0), ..options });
}

#[test]
fn blocks_agree_where_only_some_queries_of_a_head_are_active() {
    let mask = Mask::causal();
    // The first head everywhere, the last one nowhere, and in the first block of queries only half of the others.
    let chosen: Vec<bool> = (0..2 * 50 * 4)
        .map(|index| match index % 4 {
            0 => true,
            3 => false,
            head => (index / 4 * 7 + head * 5) % 5 < 2 && (index / 4 % 50 > 12 || head == 1),
        })
        .collect();
    let selected = Some(Arc::new(crate::SelectedRows::new(&chosen, [2, 50, 4])));
    let options = AttentionOptions { mask: Some(&mask), selected, ..Default::default() };
    compare(&sizes(2, 4, 2, 50, 8), Some([1, 4]), &options);
    compare_statistics(&options);
}

#[test]
fn bf16_stays_within_its_precision() {
    let make = |heads| normal([2, heads, 33, 16], &Device::flex().autodiff());
    let inputs = [make(4), make(2), make(2)];
    let mask = Mask::causal();
    let run = |dtype: DType| {
        let leaves = inputs.clone().map(|x| x.require_grad());
        let [q, k, v] = leaves.clone().map(|x| x.cast(dtype));
        let options = AttentionOptions { mask: Some(&mask), ..Default::default() };
        let out = attention(q, k, v, &options).hidden;
        assert_eq!(out.dtype(), dtype);
        let out = out.cast(DType::F32);
        let grads = out.clone().sin().sum().backward();
        let mut all = vec![numbers(out)];
        all.extend(leaves.iter().map(|leaf| numbers(leaf.grad(&grads).expect("gradient"))));
        all
    };
    for (got, want) in run(DType::BF16).iter().zip(&run(DType::F32)) {
        let norm = |x: &[f32]| x.iter().map(|v| v * v).sum::<f32>().sqrt();
        let difference: Vec<f32> = got.iter().zip(want).map(|(a, b)| a - b).collect();
        assert!(norm(&difference) < 2e-2 * norm(want), "{} of {}", norm(&difference), norm(want));
    }
}

#[test]
fn gradients_are_the_same_whichever_are_asked_for() {
    let mask = Mask::causal();
    let shapes: [&[usize]; 5] = [&[2, 4, 30, 8], &[2, 2, 30, 8], &[2, 2, 30, 5], &[1, 4, 30, 30], &[4]];
    every_subset_of_gradients(&shapes, |[q, k, v, bias, sinks]| {
        let (bias, sinks) = (Some(bias.reshape([1, 4, 30, 30])), Some(sinks));
        let options = AttentionOptions { mask: Some(&mask), bias, sinks, ..Default::default() };
        let (k, v) = (k.reshape([2, 2, 30, 8]), v.reshape([2, 2, 30, 5]));
        in_blocks(q.reshape([2, 4, 30, 8]), k, v, &options, 7 * 2 * 4 * 30).hidden.reshape([-1])
    });
}
