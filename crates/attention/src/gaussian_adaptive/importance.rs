//! The Importance Factor of the paper: which rows (layers of an encoder) and features gates let through. The published code
//! does not contain it.
//!
//! ```text
//! IF = (DA - min DA) / (max DA - min DA),   DA = mean of the gates over all samples
//! ```
//! It is high where values are near the (shifted) mean of their head's rows: for what does not surprise, not for what is large.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// The mean of gates over samples, added up batch by batch.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct GateMean {
    /// `[rows, features]`; in f64, so that it does not matter how batches are cut.
    sum: Vec<f64>,
    features: usize,
    samples: u64,
}

impl GateMean {
    /// Adds the gates of a batch, `[batch, rows, features]`.
    ///
    /// # Panics
    /// If they are of another shape than those before.
    pub fn add(&mut self, gates: Tensor<3>) {
        let [batch, rows, features] = gates.dims();
        let mut sum = vec![0.0; rows * features];
        let values = gates.into_data();
        values.iter::<f64>().enumerate().for_each(|(at, value)| sum[at % (rows * features)] += value);
        self.merge(Self { sum, features, samples: batch as u64 });
    }

    /// Adds what was added to another one.
    ///
    /// # Panics
    /// If that is of another shape.
    pub fn merge(&mut self, other: Self) {
        if self.samples == 0 {
            *self = other;
        } else if other.samples > 0 {
            assert_eq!((self.sum.len(), self.features), (other.sum.len(), other.features), "gates of two shapes");
            self.sum.iter_mut().zip(other.sum).for_each(|(sum, more)| *sum += more);
            self.samples += other.samples;
        }
    }

    /// The Importance Factor; `None` before the first sample.
    pub fn importance(&self) -> Option<Importance> {
        if self.samples == 0 {
            return None;
        }
        let mean: Vec<f64> = self.sum.iter().map(|sum| sum / self.samples as f64).collect();
        let least = mean.iter().copied().fold(f64::INFINITY, f64::min);
        let range = mean.iter().copied().fold(f64::NEG_INFINITY, f64::max) - least;
        // Where all gates are alike nothing is more important: zeros. A gate that is not a number stays one that is not.
        let factor = |mean: f64| if range > 0.0 || mean.is_nan() { ((mean - least) / range) as f32 } else { 0.0 };
        Some(Importance { factor: mean.into_iter().map(factor).collect(), features: self.features })
    }
}

/// The Importance Factor of rows and features.
#[derive(Debug, Clone, PartialEq)]
pub struct Importance {
    /// `[rows, features]` row-major: 0 to 1 over the whole map.
    pub factor: Vec<f32>,
    /// Features of a row.
    pub features: usize,
}

impl Importance {
    /// `[rows]`: each row's share of the whole importance, as the paper's figures of layers seem to show it; zeros where there
    /// is none.
    pub fn shares(&self) -> Vec<f32> {
        let rows: Vec<f32> = self.factor.chunks(self.features).map(|row| row.iter().sum()).collect();
        let total: f32 = rows.iter().sum();
        rows.into_iter().map(|row| if total > 0.0 || total.is_nan() { row / total } else { 0.0 }).collect()
    }
}
