//! Shifted attention: what maps are to become, and how far they are from it.

use burn::tensor::activation::log_softmax;
use burn::tensor::{Tensor, TensorData};
use polyhead_kernels::total;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A score that no key has; its weight is 0.
const HIDDEN: f32 = -1e9;
/// The least weight whose logarithm is taken.
const LEAST: f32 = 1e-30;

/// Which distribution a divergence is an expectation over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// KL(target || current).
    #[default]
    TargetCurrent,
    /// KL(current || target).
    CurrentTarget,
}

/// What the weights of keys are multiplied by: `important` ones by `factor`, the others by 1. `[batch, 1, 1, keys]`
pub fn factors(important: &[Vec<bool>], factor: &[f64], device: &burn::tensor::Device) -> Tensor<4> {
    let keys = important.first().map_or(0, Vec::len);
    let of = |(flags, factor): (&Vec<bool>, &f64)| {
        flags.iter().map(|&flag| if flag { *factor as f32 } else { 1.0 }).collect::<Vec<f32>>()
    };
    let values: Vec<f32> = important.iter().zip(factor).flat_map(of).collect();
    Tensor::from_data(TensorData::new(values, [important.len(), 1, 1, keys]), device)
}

/// `[batch, heads, queries, keys]`: weights of the reference times the factors, each row a distribution again. Rows without a key
/// stay 0.
pub fn shifted(reference: Tensor<4>, factors: Tensor<4>) -> Tensor<4> {
    let moved = reference * factors;
    let sum = moved.clone().sum_dim(3);
    let none = sum.clone().equal_elem(0.0);
    moved / sum.mask_fill(none, 1.0)
}

/// `[batch, heads, queries, keys]`: the weights of scores, which are negative infinity where keys are hidden.
pub fn weights(scores: Tensor<4>) -> Tensor<4> {
    let (hidden, logarithms) = logarithms(scores);
    logarithms.exp().mask_fill(hidden, 0.0)
}

fn logarithms(scores: Tensor<4>) -> (Tensor<4, burn::tensor::Bool>, Tensor<4>) {
    let hidden = scores.clone().lower_elem(HIDDEN);
    (hidden.clone(), log_softmax(scores.mask_fill(hidden, HIDDEN), 3))
}

/// `[batch, heads, queries]`, nats: how far the weights of `scores` are from their target. Rows without a key mean nothing.
pub fn divergence(scores: Tensor<4>, target: Tensor<4>, direction: Direction) -> Tensor<3> {
    let (hidden, current) = logarithms(scores);
    let aim = target.clone().clamp_min(LEAST).log();
    let (over, apart) = match direction {
        Direction::TargetCurrent => (target, aim - current),
        Direction::CurrentTarget => (current.clone().exp(), current - aim),
    };
    (over * apart).mask_fill(hidden, 0.0).sum_dim(3).squeeze_dim::<3>(3)
}

/// `[1]`, nats: the mean of rows over the queries that count, `[batch][queries]`, over heads and layers. Layers may differ in their
/// heads. 0 where no query counts.
pub fn mean(layers: &[Tensor<3>], counted: &[Vec<bool>]) -> Option<Tensor<1>> {
    let first = layers.first()?;
    let [batch, _, queries] = first.dims();
    let flags: Vec<f32> = counted.iter().flatten().map(|&flag| f32::from(u8::from(flag))).collect();
    let rows = counted.iter().flatten().filter(|flag| **flag).count();
    let heads: usize = layers.iter().map(|layer| layer.dims()[1]).sum();
    let flags = Tensor::<3>::from_data(TensorData::new(flags, [batch, 1, queries]), &first.device());
    let sum = layers.iter().map(|layer| total(layer.clone() * flags.clone())).reduce(|a, b| a + b)?;
    (rows > 0).then(|| sum / (rows * heads) as f64)
}
