//! Grown models compute what their parents do, and their replicas go ways of their own.

#![allow(clippy::unwrap_used)]

use burn::tensor::{Device, Int, Tensor};
use polyhead_attention::{Mask, Observe};
use polyhead_kernels::comparison::difference;
use serde_json::{Value, json};

use super::*;
use crate::weights::{load, named};

/// As the command promises.
const UNCHANGED: f64 = 1e-4;

fn parent(attention: Value, more: Value, device: &Device) -> Decoder {
    let mut config = json!({ "d_model": 16, "n_layers": 3, "d_ff": 24, "attention": attention });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let config: DecoderConfig = serde_json::from_value(config).unwrap();
    config.validate().unwrap();
    // Large weights, so that every part matters; the same in every run.
    let fresh = config.init(11, device);
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut louder = |tensor: Named| {
        let lambda = tensor.name.contains("lambda");
        let mut value = || match tensor.shape.len() {
            2 => 0.3 * normal(&mut rng),
            _ if lambda => 0.1 * normal(&mut rng),
            _ => 1.0 + 0.1 * normal(&mut rng),
        };
        let values = tensor.values.iter().map(|_| value() as f32).collect();
        (tensor.name.clone(), Named { values, ..tensor })
    };
    load(fresh.clone(), named(&fresh).into_iter().map(&mut louder).collect()).unwrap()
}

fn differential(device: &Device) -> Decoder {
    let attention = json!({ "grouped_differential": { "n_heads": 4, "n_noise_heads": 2, "head_dim": 4 } });
    parent(attention, json!({}), device)
}

fn logits(model: &Decoder) -> Vec<f32> {
    let tokens = Tensor::<2, Int>::from_ints([[1, 2, 3, 10, 5, 6, 7, 3], [4, 4, 9, 0, 2, 8, 1, 1]], &model.device());
    let hidden = model.forward(tokens, &Mask::causal(), None, Observe::Nothing).hidden;
    model.logits(hidden).into_data().iter::<f32>().collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f64 {
    difference(a, b).unwrap().worst
}

#[test]
fn the_function_stays() {
    let device = Device::flex();
    let qwen = json!({ "softmax": { "n_heads": 4, "n_kv_heads": 2, "qkv_bias": true, "qk_norm": true } });
    let neox = json!({ "norm": "layer", "mlp": "gelu", "parallel_residual": true, "tie_embeddings": false });
    let softmax = json!({ "softmax": { "n_heads": 4, "o_bias": true } });
    let windows = json!([0, 3, 2]);
    let windowed = json!({ "softmax": { "n_heads": 4, "window": windows } });
    let differential = json!({ "grouped_differential": { "n_heads": 4, "n_noise_heads": 2, "head_dim": 4,
        "window": windows } });
    let mixed = json!([differential, windowed, differential]);
    for (attention, more, signal_heads) in [
        (json!({ "grouped_differential": { "n_heads": 4, "n_noise_heads": 2, "head_dim": 4 } }), json!({}), 4),
        (
            json!({ "grouped_differential": { "n_heads": 6, "n_noise_heads": 2, "n_kv_heads": 2, "head_dim": 4,
                "lambda_init": "motif" } }),
            json!({ "tie_embeddings": false }),
            3,
        ),
        (qwen, json!({}), 1),
        (softmax, neox, 1),
        (windowed, json!({}), 1),
        (differential, json!({}), 2),
        (mixed, json!({}), 1),
    ] {
        let parent = parent(attention, more, &device);
        let (before, mut grew) = (logits(&parent), 0);
        for (signal_heads, width, depth) in
            [(signal_heads, 1, None), (1, 2, None), (1, 1, Some(5)), (signal_heads, 3, Some(7))]
        {
            if signal_heads == 1 && width == 1 && depth.is_none() {
                continue;
            }
            let grown = grow(&parent, &Growth { signal_heads, width, depth, ..Growth::default() }).unwrap();
            let difference = largest_difference(&before, &logits(&grown));
            let largest = largest_difference(&before, &vec![0.0; before.len()]);
            assert!(difference < UNCHANGED, "x{signal_heads} x{width} {depth:?}: {difference} of {largest}");
            assert_eq!(grown.layers.len(), depth.unwrap_or(3));
            grew += 1;
        }
        assert!(grew >= 3);
    }
}

#[test]
fn lambdas_stay_with_their_layers() {
    let parent = differential(&Device::flex());
    let grown = grow(&parent, &Growth { depth: Some(5), ..Growth::default() }).unwrap();
    let of = |model: &Decoder, layer: usize| match model.config().mechanism(layer) {
        AttentionConfig::GroupedDifferential(config) => config.lambda_init.of_layer(layer),
        _ => unreachable!(),
    };
    let before: Vec<f64> = (0..3).map(|layer| of(&parent, layer)).collect();
    let after: Vec<f64> = (0..5).map(|layer| of(&grown, layer)).collect();
    assert_eq!(after, [before[0], before[1], before[1], before[2], before[2]]);
    // What depth alone would have made of it.
    let forgotten = DecoderConfig { n_layers: 5, ..parent.config().clone() };
    let weights = named(&grown).into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
    let wrong = load(forgotten.init(11, &Device::flex()), weights).unwrap();
    assert!(largest_difference(&logits(&wrong), &logits(&parent)) > 100.0 * UNCHANGED);
}

/// The queries of the signal heads of a group after some steps of gradient descent, from replicas of one head.
fn queries_after_training(noise: f64) -> Vec<Vec<f32>> {
    let device = Device::flex().autodiff();
    let growth = Growth { signal_heads: 2, noise, ..Growth::default() };
    let mut model = grow(&differential(&device), &growth).unwrap();
    let batch = crate::Batch {
        batch: 2,
        seq: 6,
        tokens: vec![1, 2, 3, 4, 5, 6, 9, 8, 7, 1, 0, 2],
        targets: vec![2, 3, 4, 5, 6, 7, 8, 7, 1, 0, 2, 5],
        ..Default::default()
    };
    for _ in 0..5 {
        let loss = model.loss(&batch, Observe::Nothing).cross_entropy / 12.0;
        let grads = loss.backward();
        model = burn::module::Module::map(model, &mut Descend(&grads));
    }
    let weight = named(&model).into_iter().find(|tensor| tensor.name == "layers.1.attention.q_proj.weight").unwrap();
    let columns = weight.shape[1];
    // Two replicas and the noise head, four channels each, make a group.
    let head = |head: usize| {
        let of_row = |row: usize| weight.values[row * columns + head * 4..row * columns + head * 4 + 4].to_vec();
        (0..weight.shape[0]).flat_map(of_row).collect()
    };
    vec![head(0), head(1)]
}

struct Descend<'a>(&'a burn::tensor::Gradients);

impl burn::module::ModuleMapper for Descend<'_> {
    fn map_float<const D: usize>(&mut self, param: burn::module::Param<Tensor<D>>) -> burn::module::Param<Tensor<D>> {
        let grad = param.val().grad(self.0).unwrap();
        param.map(|value| Tensor::from_inner(value.inner() - grad * 0.01).require_grad())
    }
}

#[test]
fn only_noise_separates_replicas() {
    let exact = queries_after_training(0.0);
    assert_eq!(exact[0], exact[1], "exact replicas get the same gradients for ever");
    let noisy = queries_after_training(Growth::NOISE);
    assert!(largest_difference(&noisy[0], &noisy[1]) > 1e-4, "replicas go ways of their own");
}

#[test]
fn what_cannot_grow_is_refused() {
    let device = Device::flex();
    let softmax = parent(json!({ "softmax": { "n_heads": 4 } }), json!({}), &device);
    let problem = |model: &Decoder, growth: Growth| grow(model, &growth).unwrap_err().to_string();
    assert!(problem(&softmax, Growth { signal_heads: 2, ..Growth::default() }).contains("no signal heads"));
    assert!(problem(&softmax, Growth::default()).contains("nothing grows"));
    assert!(problem(&softmax, Growth { depth: Some(2), ..Growth::default() }).contains("n_layers (3)"));
    let sinks = parent(json!({ "sink": { "n_heads": 4 } }), json!({}), &device);
    let told = problem(&sinks, Growth { width: 2, ..Growth::default() });
    assert_eq!(told, "layer 0 has sink attention, which cannot grow; softmax and grouped_differential can");
    for growth in [
        Growth { signal_heads: usize::MAX, ..Growth::default() },
        Growth { width: usize::MAX / 2, ..Growth::default() },
        Growth { depth: Some(1 << 60), ..Growth::default() },
    ] {
        assert!(problem(&softmax, growth).contains("must be at most 1048576"));
    }
    let wide = problem(&softmax, Growth { width: 1 << 20, ..Growth::default() });
    assert!(wide.contains("must be at most 1048576"), "{wide}");
}

#[test]
fn new_layers_are_spread_behind_those_they_copy() {
    use Source::{Copy, Kept};
    assert_eq!(sources(3, 5), [Kept(0), Kept(1), Copy(1), Kept(2), Copy(2)]);
    assert_eq!(sources(2, 5), [Kept(0), Copy(0), Kept(1), Copy(1), Copy(1)]);
    assert_eq!(sources(2, 2), [Kept(0), Kept(1)]);
}
