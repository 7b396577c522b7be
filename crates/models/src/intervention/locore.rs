//! LocoRE (arXiv 2601.20279): attention to the newest tokens of the output is raised.
//!
//! ```text
//! a_j ← (1 + β) a_j for output tokens j with 0 ≤ P - j ≤ w, rows normalised again
//! ```
//! The text does not say whether P is the query, which are w + 1 tokens, or the position that it predicts, which are w. Whether rows are
//! normalised again neither; they are here, as ln(1 + β) on the scores. The acceptance of tokens that goes with it is
//! `evaluation/sgrs.rs`.

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use polyhead_attention::{Change, ConfigError, Place, require};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// LocoRE: scores of the newest tokens, raised for the query that comes behind them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RecentConfig {
    /// How many tokens, the query's own among them.
    pub newest: usize,
    /// Their weights are multiplied by 1 + beta before rows are normalised again. Default: 0.15, the authors' for LLaVA-1.5.
    #[serde(default = "published_beta")]
    pub beta: f64,
}

fn published_beta() -> f64 {
    0.15
}

impl RecentConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let Self { newest, beta } = *self;
        require(newest > 0, "newest", || "newest (0) must be 1 or more: the query's own token is the first".into())?;
        let rule = beta.is_finite() && beta > -1.0;
        require(rule, "beta", || format!("beta ({beta}) must be a finite number above -1"))
    }

    /// The change of scores.
    pub fn change(&self) -> Change {
        let Self { newest, beta } = *self;
        let raised = move |scores: Tensor<4>, Place { first, first_key }: Place| {
            let [_, _, queries, keys] = scores.dims();
            let first_key = first_key.unwrap_or(0);
            let bias = |query: usize, key: usize| match (first + query).checked_sub(first_key + key) {
                Some(back) if back < newest => beta.ln_1p() as f32,
                _ => 0.0,
            };
            let bias: Vec<f32> = (0..queries * keys).map(|at| bias(at / keys, at % keys)).collect();
            let bias = Tensor::<4>::from_data(TensorData::new(bias, [1, 1, queries, keys]), &scores.device());
            scores.clone() + bias.cast(scores.dtype())
        };
        Change::With(Arc::new(raised))
    }
}
