//! DGQA's memory of the keys while it trains.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::allocation::{even, in_proportion};

/// Weight of what was remembered in the paper's average, and of what is new in the authors' code.
const BETA: f64 = 0.9;

/// Settings of an allocation that evolves in training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct EvolvingConfig {
    /// "average" (default; DGQA-EMA): how large keys are; "difference" (DGQA-diff): how much that changed.
    pub by: Measured,
    /// "code" (default): as the authors' code computes, where evaluation allocates by each batch; "paper": as the paper
    /// describes it, where evaluation keeps what training left.
    pub form: Form,
    /// Steps from one allocation to the next. Default: 300, the authors' best.
    pub window: u64,
}

impl Default for EvolvingConfig {
    fn default() -> Self {
        Self { by: Measured::Average, form: Form::Code, window: 300 }
    }
}

/// The measure that query heads are allocated by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Measured {
    /// The norms of the keys.
    #[default]
    Average,
    /// The change of the norms.
    Difference,
}

/// Whose DGQA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// The authors' code's.
    #[default]
    Code,
    /// The paper's.
    Paper,
}

/// A layer's memory of its keys. Parameters, so that checkpoints hold them; not learned.
#[derive(Module, Debug)]
pub struct Memory {
    /// `[n_kv_heads]`: magnitudes of keys; the authors' `cache`
    pub magnitudes: Param<Tensor<1>>,
    /// `[n_kv_heads]`: query heads of each key/value head; the authors' `splits`, which they do not save
    pub query_heads: Param<Tensor<1>>,
}

impl Memory {
    /// Nothing is known yet: all heads are alike.
    pub(super) fn begin(kv_heads: usize, n_heads: usize, device: &Device) -> Self {
        let counts = even(kv_heads, n_heads).into_iter().map(|count| count as f64).collect();
        Self { magnitudes: kept(vec![0.0; kv_heads], device), query_heads: kept(counts, device) }
    }

    /// For each key/value head, how many query heads read it.
    pub fn query_heads(&self) -> Vec<usize> {
        read(&self.query_heads).into_iter().map(|count| count as usize).collect()
    }

    /// The allocation for keys of these norms.
    pub(super) fn at_call(&self, config: &EvolvingConfig, norms: &[f64], n_heads: usize) -> Vec<usize> {
        in_proportion(&self.moved(config, norms).0, n_heads)
    }

    /// Allocates anew, and remembers.
    pub(super) fn update(&mut self, config: &EvolvingConfig, norms: &[f64], n_heads: usize) {
        let (weights, magnitudes) = self.moved(config, norms);
        let counts = in_proportion(&weights, n_heads).into_iter().map(|count| count as f64).collect();
        let device = self.magnitudes.val().device();
        *self = Self { magnitudes: kept(magnitudes, &device), query_heads: kept(counts, &device) };
    }

    /// What heads are allocated in proportion to, and what is remembered afterwards.
    fn moved(&self, config: &EvolvingConfig, norms: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let each = |of: &dyn Fn(f64, f64) -> f64| -> Vec<f64> {
            read(&self.magnitudes).into_iter().zip(norms).map(|(cached, &norm)| of(cached, norm)).collect()
        };
        let window = config.window as f64;
        let averaged = || each(&|cached, norm| (cached + norm) / window);
        let difference = || each(&|cached, norm| (cached - norm).abs());
        match (config.form, config.by) {
            (Form::Code, Measured::Average) => (each(&|cached, norm| BETA * norm + (1.0 - BETA) * cached), averaged()),
            (Form::Code, Measured::Difference) => (difference(), averaged()),
            (Form::Paper, Measured::Average) => {
                let smooth = each(&|cached, norm| BETA * cached + (1.0 - BETA) * norm);
                (smooth.clone(), smooth)
            }
            (Form::Paper, Measured::Difference) => (difference(), norms.to_vec()),
        }
    }
}

fn kept(values: Vec<f64>, device: &Device) -> Param<Tensor<1>> {
    let n = values.len();
    let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
    Param::from_tensor(Tensor::from_data(TensorData::new(values, [n]), device)).set_require_grad(false)
}

fn read(param: &Param<Tensor<1>>) -> Vec<f64> {
    param.val().into_data().iter::<f64>().collect()
}
