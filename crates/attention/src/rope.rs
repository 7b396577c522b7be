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

/// The turns a position of the pairs of a head that has `width` rotated channels: pair i turns by theta^(-2i / width).
pub fn frequencies(width: usize, theta: f64) -> Vec<f64> {
    (0..width / 2).map(|i| theta.powf(-2.0 * i as f64 / width as f64)).collect()
}

impl Rope {
    /// The angles of `positions` for heads of `head_dim` channels, all of which rotate.
    ///
    /// # Shapes
    /// The tables are `[positions, head_dim / 2]`.
    pub fn new(positions: Range<usize>, head_dim: usize, theta: f64, layout: RopeLayout, device: &Device) -> Self {
        Self::with_frequencies(positions, &frequencies(head_dim, theta), layout, device)
    }

    /// The angles of `positions` for pairs that turn by `frequencies` a position. Channels of a head beyond those pairs
    /// stay as they are. Computed in f64 and rounded once.
    ///
    /// # Shapes
    /// The tables are `[positions, frequencies]`.
    pub fn with_frequencies(positions: Range<usize>, frequencies: &[f64], layout: RopeLayout, device: &Device) -> Self {
        let angles = || positions.clone().flat_map(|position| frequencies.iter().map(move |f| position as f64 * f));
        let shape = [positions.len(), frequencies.len()];
        let table = |values: Vec<f32>| Tensor::from_data(TensorData::new(values, shape), device);
        Self {
            cos: table(angles().map(|angle| angle.cos() as f32).collect()),
            sin: table(angles().map(|angle| angle.sin() as f32).collect()),
            layout,
        }
    }

    /// Rotates every head of `x`, `[batch, n_heads, seq, head_dim]`.
    pub fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let (rotated, width) = (2 * self.cos.dims()[1], x.dims()[3]);
        let turn = |x| polyhead_kernels::rope(x, self.cos.clone(), self.sin.clone(), self.layout);
        if rotated == width {
            return turn(x);
        }
        let still = x.clone().narrow(3, rotated, width - rotated);
        Tensor::cat(vec![turn(x.narrow(3, 0, rotated)), still], 3)
    }
}

/// Rotates where the model has rotary positions, else leaves as it is.
pub(crate) fn rotate(rope: Option<&Rope>, x: Tensor<4>) -> Tensor<4> {
    match rope {
        Some(rope) => rope.rotate(x),
        None => x,
    }
}
