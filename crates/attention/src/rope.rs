//! Rotary positions: the tables of angles that the kernel rotates by.

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};
use polyhead_kernels::RopeLayout;

/// Cosines and sines of the positions of one call.
#[derive(Debug, Clone)]
pub struct Rope {
    cos: Tensor<2>,
    sin: Tensor<2>,
    layout: RopeLayout,
}

impl Rope {
    /// The angles of `positions` for heads of `head_dim` channels: pair i turns by theta^(-2i / head_dim) a position.
    /// Computed in f64 and rounded once.
    ///
    /// # Shapes
    /// The tables are `[positions, head_dim / 2]`.
    pub fn new(positions: Range<usize>, head_dim: usize, theta: f64, layout: RopeLayout, device: &Device) -> Self {
        let half = head_dim / 2;
        let frequencies: Vec<f64> = (0..half).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        let angles = || positions.clone().flat_map(|position| frequencies.iter().map(move |f| position as f64 * f));
        let table = |values: Vec<f32>| Tensor::from_data(TensorData::new(values, [positions.len(), half]), device);
        Self {
            cos: table(angles().map(|angle| angle.cos() as f32).collect()),
            sin: table(angles().map(|angle| angle.sin() as f32).collect()),
            layout,
        }
    }

    /// Rotates every head of `x`, `[batch, n_heads, seq, head_dim]`.
    pub fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        polyhead_kernels::rope(x, self.cos.clone(), self.sin.clone(), self.layout)
    }
}

/// Rotates where the model has rotary positions, else leaves as it is.
pub(crate) fn rotate(rope: Option<&Rope>, x: Tensor<4>) -> Tensor<4> {
    match rope {
        Some(rope) => rope.rotate(x),
        None => x,
    }
}
