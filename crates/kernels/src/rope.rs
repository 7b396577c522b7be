//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Which channels of a head form the pairs that are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum RopeLayout {
    /// Pairs (i, i + d/2): GPT-NeoX, LLaMA, everything in Hugging Face transformers.
    #[default]
    RotateHalf,
    /// Pairs (2i, 2i + 1): GPT-J, and the published code of the Differential Transformer.
    Interleaved,
}

/// Rotates pair `i` of every head by the angle of its position.
///
/// # Shapes
/// - x, output: `[batch, n_heads, seq, head_dim]`, head_dim even
/// - cos, sin: `[seq, head_dim / 2]`
pub fn rope(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>, layout: RopeLayout) -> Tensor<4> {
    let [batch, n_heads, seq, head_dim] = x.dims();
    let half = head_dim / 2;
    let (first, second) = match layout {
        RopeLayout::RotateHalf => (x.clone().narrow(3, 0, half), x.narrow(3, half, half)),
        RopeLayout::Interleaved => {
            let pairs = x.reshape([batch * n_heads, seq, half, 2]);
            let part = |i| pairs.clone().narrow(3, i, 1).reshape([batch, n_heads, seq, half]);
            (part(0), part(1))
        }
    };
    let cos = cos.unsqueeze::<4>(); // [1, 1, seq, half]
    let sin = sin.unsqueeze::<4>();
    let rotated_first = first.clone() * cos.clone() - second.clone() * sin.clone();
    let rotated_second = second * cos + first * sin;
    match layout {
        RopeLayout::RotateHalf => Tensor::cat(vec![rotated_first, rotated_second], 3),
        RopeLayout::Interleaved => {
            Tensor::stack::<5>(vec![rotated_first, rotated_second], 4).reshape([batch, n_heads, seq, head_dim])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Distribution, Tolerance};

    fn tables(seq: usize, half: usize, device: &Device) -> (Tensor<2>, Tensor<2>) {
        let angles: Vec<f32> = (0..seq * half).map(|i| (i / half) as f32 * 0.3 / (1 + i % half) as f32).collect();
        let angles = Tensor::<1>::from_floats(angles.as_slice(), device).reshape([seq, half]);
        (angles.clone().cos(), angles.sin())
    }

    #[test]
    fn layouts_differ_only_by_a_permutation_of_channels() {
        let device = Device::flex();
        let (cos, sin) = tables(5, 3, &device);
        let x = Tensor::<4>::random([2, 2, 5, 6], Distribution::Normal(0.0, 1.0), &device);
        let to_halves = Tensor::<1, burn::tensor::Int>::from_ints([0, 2, 4, 1, 3, 5], &device);
        let interleaved = rope(x.clone(), cos.clone(), sin.clone(), RopeLayout::Interleaved);
        let halves = rope(x.select(3, to_halves.clone()), cos, sin, RopeLayout::RotateHalf);
        interleaved
            .select(3, to_halves)
            .into_data()
            .assert_approx_eq::<f32>(&halves.into_data(), Tolerance::absolute(1e-6));
    }

    #[test]
    fn rotation_keeps_lengths_and_position_zero() {
        let device = Device::flex();
        let (cos, sin) = tables(4, 2, &device);
        let x = Tensor::<4>::random([1, 3, 4, 4], Distribution::Normal(0.0, 1.0), &device);
        let y = rope(x.clone(), cos, sin, RopeLayout::RotateHalf);
        let norm = |t: Tensor<4>| t.square().sum_dim(3).into_data();
        norm(y.clone()).assert_approx_eq::<f32>(&norm(x.clone()), Tolerance::absolute(1e-5));
        y.narrow(2, 0, 1).into_data().assert_eq(&x.narrow(2, 0, 1).into_data(), true);
    }
}
