//! LocoRE and SGRS (arXiv 2601.20279): attention to the newest tokens of the output is raised, and tokens are accepted by how much
//! they follow from the output so far.
//!
//! ```text
//! LocoRE:  a_j ← (1 + β) a_j for output tokens j with 0 ≤ P - j ≤ w, rows normalised again
//! SGRS:    accept a candidate whose saliency is ≥ τ = α · mean of the last W accepted ones; after R rejections take the most salient
//! ```
//! The text does not say whether P is the query or the position that it predicts: both can be asked for. Whether rows are normalised
//! again neither; they are here, as ln(1 + β) on the scores. Saliency itself needs gradients (`evaluation/saliency.rs`).

use polyhead_attention::{Amount, At, Change, Edit, Positions, QuerySite};

/// The changes that raise attention of the query at `query` to tokens from `output_start` on, `window` of them before `newest`.
pub fn locore(
    layers: usize,
    beta: f64,
    (output_start, window): (usize, usize),
    newest: usize,
    query: usize,
) -> Vec<(usize, Edit)> {
    let keys = Positions::Range(output_start.max(newest.saturating_sub(window))..newest + 1);
    let change = Change::add(Amount::Number(beta.ln_1p()));
    let edit = Edit { positions: Positions::only(query), keys, ..Edit::new(At::all(QuerySite::Scores.into()), change) };
    (0..layers).map(|layer| (layer, edit.clone())).collect()
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
