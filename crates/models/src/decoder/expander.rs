//! MAD's decoder of compressed rows (Poli et al. 2024, arXiv 2403.17844; athms/mad-lab): what the last position holds is given
//! to every position with a fixed vector of its own, and decoded there.
//!
//! ```text
//! x = hidden[last] + sinusoid(position);  x = gelu(W1 norm(x) + b1);  x = gelu(W2 norm(x) + b2)
//! ```
//!
//! The decoder's last norm and output projection follow.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::activation::gelu;
use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::{INIT_STD, linear};

use crate::transformer::{Norm, NormKind};

/// Spreads the last position over all, and decodes each.
#[derive(Module, Debug)]
pub struct Expander {
    /// Before the first projection
    pub first_norm: Norm,
    /// `[d_model, d_model]`
    pub first: Linear,
    /// Before the second projection
    pub second_norm: Norm,
    /// `[d_model, d_model]`
    pub second: Linear,
}

impl Expander {
    pub(super) fn init(kind: NormKind, d_model: usize, device: &Device) -> Self {
        let project = || linear(d_model, d_model, true, INIT_STD, device);
        let norm = || Norm::init(kind, d_model, device);
        Self { first_norm: norm(), first: project(), second_norm: norm(), second: project() }
    }

    /// `[batch, seq, d_model]` of the same shape, of which the last position alone is read.
    pub(super) fn forward(&self, hidden: Tensor<3>, eps: f64) -> Tensor<3> {
        let [_, seq, d_model] = hidden.dims();
        let positions = sinusoids(seq, d_model, &hidden.device());
        let x = hidden.narrow(1, seq - 1, 1) + positions.unsqueeze::<3>();
        let x = gelu(self.first.forward(self.first_norm.forward(x, eps)));
        gelu(self.second.forward(self.second_norm.forward(x, eps)))
    }

    /// Its parameters.
    pub(super) fn parameters(kind: NormKind, d_model: u64) -> u64 {
        let vectors = if kind == NormKind::Layer { 2 } else { 1 };
        2 * (d_model * d_model + d_model) + 2 * vectors * d_model
    }
}

/// `[seq, d_model]`: sines, then cosines, of the frequencies `10000^(-i / (d_model / 2 - 1))`.
fn sinusoids(seq: usize, d_model: usize, device: &Device) -> Tensor<2> {
    let half = d_model / 2;
    let angle = |position: usize, i: usize| {
        position as f64 * 10_000f64.powf(-(i as f64) / (half.saturating_sub(1).max(1)) as f64)
    };
    let row = |position: usize| {
        let sines = (0..half).map(move |i| angle(position, i).sin());
        sines.chain((half..d_model).map(move |i| angle(position, i - half).cos()))
    };
    let values: Vec<f32> = (0..seq).flat_map(row).map(|value| value as f32).collect();
    Tensor::from_data(TensorData::new(values, [seq, d_model]), device)
}
