//! The routed maps against their plain forms, and both against maps of all heads.

use super::*;
use crate::testing::{agree, agree_with_gradients, every_subset_of_gradients, leaf, normal, numbers};
use burn::tensor::Device;

/// The first `shared` heads everywhere, the last one nowhere, the others here and there.
fn selected(batch: usize, seq: usize, heads: usize, shared: usize) -> Arc<SelectedRows> {
    let chosen = |index: usize| match index % heads {
        head if head < shared => true,
        head if head + 1 == heads => false,
        head => (index / heads * 7 + head * 5 + index / heads / 3) % 5 < 2,
    };
    let chosen: Vec<bool> = (0..batch * seq * heads).map(chosen).collect();
    Arc::new(SelectedRows::new(&chosen, [batch, seq, heads]))
}

const SHAPES: [[usize; 6]; 6] = [
    // batch, seq, heads, shared, d_model, width
    [1, 1, 1, 1, 1, 1],
    [3, 7, 4, 0, 5, 2],
    [3, 7, 4, 2, 5, 3],
    [2, 300, 5, 2, 24, 8],
    [1, 600, 3, 1, 300, 16],
    [2, 40, 3, 3, 12, 4],
];

#[test]
fn into_heads_agrees_with_the_plain_form() {
    for [batch, seq, heads, shared, d_model, width] in SHAPES {
        let selected = selected(batch, seq, heads, shared);
        let (x, weight) = (leaf([batch * seq * d_model]), leaf([d_model * heads * width]));
        for transposed in [false, true] {
            let shaped = |[x, weight]: [Tensor<1>; 2]| {
                let weight = match transposed {
                    false => weight.reshape([d_model, heads * width]),
                    true => weight.reshape([heads * width, d_model]).transpose(),
                };
                (x.reshape([seq, batch, d_model]).swap_dims(0, 1), weight)
            };
            agree_with_gradients(
                &[&x, &weight],
                |inputs| {
                    let (x, weight) = shaped(inputs);
                    linear_into_heads(x, weight, &selected).reshape([-1])
                },
                |inputs| {
                    let (x, weight) = shaped(inputs);
                    into_heads_plain(x, weight, &selected).reshape([-1])
                },
            );
        }
    }
}

#[test]
fn out_of_heads_agrees_with_the_plain_form() {
    for [batch, seq, heads, shared, d_model, width] in SHAPES {
        let selected = selected(batch, seq, heads, shared);
        let (x, gates) = (leaf([batch * seq * heads * width]), leaf([batch * seq * heads]));
        let weight = leaf([heads * width * d_model]);
        let shaped = |[x, gates, weight]: [Tensor<1>; 3]| {
            let x = x.reshape([batch, heads, seq, width]).swap_dims(1, 2).reshape([batch, seq, heads * width]);
            (x, gates.reshape([batch, seq, heads]), weight.reshape([heads * width, d_model]))
        };
        agree_with_gradients(
            &[&x, &gates, &weight],
            |inputs| {
                let (x, gates, weight) = shaped(inputs);
                linear_out_of_heads(x, gates, weight, &selected).reshape([-1])
            },
            |inputs| {
                let (x, gates, weight) = shaped(inputs);
                out_of_heads_plain(x, gates, weight, &selected).reshape([-1])
            },
        );
    }
}

#[test]
fn rows_of_unselected_heads_are_never_read() {
    let device = Device::flex().autodiff();
    let selected = selected(2, 30, 4, 1);
    let hidden = selected.hidden(&device).swap_dims(1, 2).expand([2, 30, 4, 3]); // [batch, seq, heads, width]
    let (weight, gates) = (leaf([12, 8]), leaf([2, 30, 4]));
    let (heads, cotangent) = (normal([2, 30, 4, 3], &device), normal([2, 30, 8], &device));
    let run = |elsewhere: f32| {
        let heads = heads.clone().mask_fill(hidden.clone(), elsewhere).reshape([2, 30, 12]).detach().require_grad();
        let out = linear_out_of_heads(heads.clone(), gates.clone(), weight.clone(), &selected);
        let grads = (out.clone() * cotangent.clone()).sum().backward();
        let all = [heads.grad(&grads).map(numbers), gates.grad(&grads).map(numbers), weight.grad(&grads).map(numbers)];
        (numbers(out), all.map(|grad| grad.expect("gradient")))
    };
    assert!(run(0.0) == run(f32::NAN));
}

#[test]
fn a_head_everywhere_is_a_plain_map() {
    let all = Arc::new(SelectedRows::all([2, 9, 4]));
    let (x, weight) = (leaf([2, 9, 6]), leaf([6, 12]));
    let got = linear_into_heads(x.clone(), weight.clone(), &all);
    agree("into heads", &numbers(got), &numbers(linear(x, weight, None)));
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let selected = selected(2, 700, 6, 2);
    let (x, gates) = (leaf([2, 700, 40]), leaf([2, 700, 6]));
    let (into, out) = (leaf([40, 48]), leaf([48, 40]));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| {
            let heads = linear_into_heads(x.clone(), into.clone(), &selected);
            let y = linear_out_of_heads(heads, gates.clone(), out.clone(), &selected);
            let grads = y.clone().square().sum().backward();
            let inputs = [&x, &gates].map(|leaf| numbers(leaf.grad(&grads).expect("gradient")));
            let weights = [&into, &out].map(|leaf| numbers(leaf.grad(&grads).expect("gradient")));
            (numbers(y), inputs, weights)
        })
    };
    assert!(run(1) == run(5));
}

#[test]
fn gradients_are_the_same_whichever_are_asked_for() {
    let selected = selected(2, 300, 5, 2);
    every_subset_of_gradients(&[&[2, 300, 24], &[24, 40]], |[x, weight]| {
        linear_into_heads(x.reshape([2, 300, 24]), weight.reshape([24, 40]), &selected).reshape([-1])
    });
    every_subset_of_gradients(&[&[2, 300, 40], &[2, 300, 5], &[40, 24]], |[heads, gates, weight]| {
        let (heads, gates) = (heads.reshape([2, 300, 40]), gates.reshape([2, 300, 5]));
        linear_out_of_heads(heads, gates, weight.reshape([40, 24]), &selected).reshape([-1])
    });
}
