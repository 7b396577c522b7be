//! The Importance Factor of the paper: which rows (layers of an encoder) and features a gate lets through. The published code
//! does not contain it.
//!
//! ```text
//! IF = (DA - min DA) / (max DA - min DA),   DA = mean of the gates over all samples
//! ```
//! It is high where values lie near the (shifted) mean of their head's rows: for what does not surprise, not for what is large.

use burn::tensor::Tensor;

/// The mean of gates over samples, added up batch by batch.
#[derive(Debug, Clone, Default)]
pub struct GateMean {
    sum: Option<Tensor<2>>,
    samples: usize,
}

impl GateMean {
    /// Adds the gates of a batch, `[batch, rows, features]`.
    pub fn add(&mut self, gates: Tensor<3>) {
        let batch = gates.dims()[0];
        let sum = gates.detach().sum_dim(0).squeeze_dim::<2>(0);
        self.sum = Some(match self.sum.take() {
            Some(before) => before + sum,
            None => sum,
        });
        self.samples += batch;
    }

    /// `[rows, features]`: the mean, DA; `None` before the first sample.
    pub fn mean(&self) -> Option<Tensor<2>> {
        self.sum.clone().map(|sum| sum / self.samples as f64)
    }
}

/// `[rows, features]`: the mean gates, stretched to 0..1 over the whole map; zeros where all are the same.
pub fn importance_factor(mean_gates: Tensor<2>) -> Tensor<2> {
    let dims = mean_gates.dims();
    let least = mean_gates.clone().min().reshape([1, 1]);
    let above = mean_gates - least;
    let range = above.clone().max().reshape([1, 1]).expand(dims);
    let flat = range.clone().equal_elem(0.0);
    above / range.mask_fill(flat, 1.0)
}

/// `[rows]`: each row's share of the whole importance, as the paper's figures of layers seem to show it; zeros where there is
/// none.
pub fn importance_of_layers(importance: Tensor<2>) -> Tensor<1> {
    let rows = importance.sum_dim(1).squeeze_dim::<1>(1);
    let total = rows.clone().sum();
    let none = total.clone().equal_elem(0.0);
    rows / total.mask_fill(none, 1.0)
}
