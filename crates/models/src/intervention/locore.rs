//! LocoRE and SGRS (arXiv 2601.20279): attention to the newest tokens of the output is raised, and tokens are accepted by how much
//! they follow from the output so far.
//!
//! ```text
//! LocoRE:  a_j ← (1 + β) a_j for output tokens j with 0 ≤ P - j ≤ w, rows normalised again
//! SGRS:    accept a candidate whose saliency is ≥ τ = α · mean of the last W accepted ones; after R rejections take the most salient
//! ```
//! The text does not say whether P is the query, which are w + 1 tokens, or the position that it predicts, which are w. Whether rows are
//! normalised again neither; they are here, as ln(1 + β) on the scores. Saliency itself needs gradients (`evaluation/saliency.rs`).

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

/// How candidates are accepted; the defaults are the authors'.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgrsConfig {
    /// Candidates: the most probable tokens. Default: 5.
    pub top_k: usize,
    /// Candidates that are rejected at most. Default: 3.
    pub max_resample: usize,
    /// Accepted saliencies that the threshold is the mean of. Default: 5.
    pub window: usize,
    /// What the mean is multiplied by. Default: 0.6.
    pub alpha: f64,
}

impl Default for SgrsConfig {
    fn default() -> Self {
        Self { top_k: 5, max_resample: 3, window: 5, alpha: 0.6 }
    }
}

/// A token that was chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Accepted {
    /// Its id.
    pub token: usize,
    /// Candidates that were drawn.
    pub tries: usize,
    /// Whether it passed the threshold, rather than being the most salient one of all.
    pub passed: bool,
    /// Its saliency.
    pub saliency: f64,
    /// The threshold.
    pub tau: f64,
}

/// The ids of the most probable tokens, with their probabilities, in falling order.
pub fn candidates(logits: &[f32], top_k: usize) -> Vec<(usize, f64)> {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |id: usize| f64::from(logits[id] - best).exp();
    let all: f64 = (0..logits.len()).map(weight).sum();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.into_iter().take(top_k).map(|id| (id, weight(id) / all)).collect()
}

impl SgrsConfig {
    /// Chooses among the candidates of a step, by the saliency of each, the saliencies accepted so far, and a uniform number for each
    /// try.
    pub fn choose(&self, logits: &[f32], saliency: &[f64], accepted: &[f64], uniform: &[f64]) -> Accepted {
        let candidates = candidates(logits, self.top_k);
        let last = &accepted[accepted.len().saturating_sub(self.window)..];
        let tau = if last.is_empty() { 0.0 } else { self.alpha * last.iter().sum::<f64>() / last.len() as f64 };
        let mut left: Vec<usize> = (0..candidates.len()).collect();
        let of = |at: usize, tries: usize, passed: bool| Accepted {
            token: candidates[at].0,
            tries,
            passed,
            saliency: saliency[at],
            tau,
        };
        let tries = self.max_resample.min(uniform.len()).min(candidates.len());
        for (drawn, &uniform) in (1..).zip(&uniform[..tries]) {
            let all: f64 = left.iter().map(|&at| candidates[at].1).sum();
            let mut sum = 0.0;
            let found = left.iter().position(|&at| {
                sum += candidates[at].1 / all;
                sum > uniform
            });
            let at = left.remove(found.unwrap_or(left.len() - 1));
            if saliency[at] >= tau {
                return of(at, drawn, true);
            }
        }
        let most = (0..candidates.len()).max_by(|&a, &b| saliency[a].total_cmp(&saliency[b]).then(b.cmp(&a)));
        of(most.unwrap_or_default(), tries, false)
    }
}
