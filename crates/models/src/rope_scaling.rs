//! Scaling of rotary frequencies for contexts longer than those of pretraining.

use std::f64::consts::TAU;

use polyhead_attention::{ConfigError, require};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `rope_scaling`: one of its tables.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    /// All positions are divided by a factor (Chen et al. 2023, arXiv 2306.15595).
    Linear(LinearScaling),
    /// Low frequencies are scaled by a factor, high ones stay as they are (Llama 3.1).
    Llama3(Llama3Scaling),
}

/// Settings of linear stretching.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinearScaling {
    /// Scaling factor of the context.
    pub factor: f64,
}

/// Settings of Llama 3.1's stretching.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Llama3Scaling {
    /// Scaling factor of the low-frequency dimensions.
    pub factor: f64,
    /// Dimensions with fewer rotations than this within the original context are scaled fully.
    pub low_freq_factor: f64,
    /// Dimensions with more rotations than this within the original context stay as they are.
    pub high_freq_factor: f64,
    /// The original context, in tokens.
    pub original_max_position_embeddings: usize,
}

impl RopeScaling {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let at_least_one = |field: &str, factor: f64| {
            let rule = factor.is_finite() && factor >= 1.0;
            require(rule, field, || format!("factor ({factor}) must be at least 1"))
        };
        match self {
            Self::Linear(linear) => at_least_one("linear.factor", linear.factor),
            Self::Llama3(Llama3Scaling { factor, low_freq_factor: low, high_freq_factor: high, .. }) => {
                at_least_one("llama3.factor", *factor)?;
                require(*low > 0.0 && high > low, "llama3.high_freq_factor", || {
                    format!("high_freq_factor ({high}) must be above low_freq_factor ({low}), and both above 0")
                })
            }
        }
    }

    /// The frequencies after stretching.
    pub fn stretch(&self, frequencies: Vec<f64>) -> Vec<f64> {
        let stretched = |frequency: f64| match *self {
            Self::Linear(LinearScaling { factor }) => frequency / factor,
            Self::Llama3(Llama3Scaling {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings,
            }) => {
                let rounds = original_max_position_embeddings as f64 * frequency / TAU;
                let kept = ((rounds - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - kept) * frequency / factor + kept * frequency
            }
        };
        frequencies.into_iter().map(stretched).collect()
    }
}
