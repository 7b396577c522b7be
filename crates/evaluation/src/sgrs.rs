//! SGRS (arXiv 2601.20279): tokens are accepted by how much they follow from the output so far.
//!
//! ```text
//! accept a candidate whose saliency is ≥ τ = α · mean of the last W accepted ones; after R rejections take the most salient
//! ```
//! The saliency of a candidate is that of the output so far for it ([`Saliency::of_history`](crate::saliency::Saliency::of_history)), in
//! the row whose logits predict it. The released code reads another row, in which all saliencies are 0, and begins the output behind
//! the image; an empty output, which counts as 1 there, is no history here: the first token is drawn without a threshold.

use std::ops::{ControlFlow, Range};

use burn::module::Module;
use polyhead_attention::Mask;
use polyhead_models::{Decoder, Pass};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::lens::ids;
use crate::saliency::saliency;

/// The least length that a row of saliencies is divided by, as released.
const LEAST: f64 = 1e-9;

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

/// The layers whose saliency counts, as published for 32 of them: 6 to 8.
pub fn target_layers(n_layers: usize) -> Range<usize> {
    6 * n_layers / 32..8 * n_layers / 32 + 1
}

/// What is written, and in which layers it is measured.
#[derive(Debug, Clone, Copy)]
pub struct Writing<'a> {
    /// Layers with maps.
    pub layers: &'a [usize],
    /// Tokens at most.
    pub max_new_tokens: usize,
    /// Tokens that end it, which are accepted as all others.
    pub stops: &'a [u32],
    /// The same seed gives the same text.
    pub seed: u64,
}

impl SgrsConfig {
    /// Continues a prompt, which is not empty, with a model on a device with autodiff. Each token costs a pass over the whole text, and
    /// for each candidate another one and its gradients.
    pub fn write(
        &self,
        model: &Decoder,
        prompt: &[u32],
        how: Writing<'_>,
        on_token: &mut dyn FnMut(&Accepted) -> ControlFlow<()>,
    ) -> Vec<Accepted> {
        let plain = model.valid();
        let mut rng = ChaCha8Rng::seed_from_u64(how.seed);
        let (mut text, mut written, mut saliencies) = (prompt.to_vec(), Vec::new(), Vec::new());
        while written.len() < how.max_new_tokens {
            let seq = text.len();
            let hidden = plain.pass(ids(&plain, std::slice::from_ref(&text)), Pass::new(&Mask::causal())).hidden;
            let logits: Vec<f32> = plain.logits(hidden.narrow(1, seq - 1, 1)).into_data().iter::<f32>().collect();
            let of_candidate = |(token, _): (usize, f64)| {
                let with = [&text[..], &[token as u32]].concat();
                saliency(model, &with, seq).of_history(how.layers, prompt.len()..seq, seq - 1, LEAST)
            };
            let candidates = candidates(&logits, self.top_k).into_iter();
            let own: Vec<f64> = match written.is_empty() {
                true => candidates.map(|_| 0.0).collect(),
                false => candidates.map(of_candidate).collect(),
            };
            let uniform: Vec<f64> = (0..self.max_resample).map(|_| rng.random::<f64>()).collect();
            let accepted = self.choose(&logits, &own, &saliencies, &uniform);
            if !written.is_empty() {
                saliencies.push(accepted.saliency);
            }
            written.push(accepted);
            text.push(accepted.token as u32);
            if on_token(&accepted).is_break() || how.stops.contains(&(accepted.token as u32)) {
                break;
            }
        }
        written
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_kernels::seed_random;
    use polyhead_models::DecoderConfig;

    use super::*;

    #[test]
    fn without_a_threshold_the_first_draw_is_taken_and_above_all_the_most_salient() {
        let json = r#"{"d_model": 16, "n_layers": 2, "attention": {"softmax": {"n_heads": 2}}}"#;
        seed_random(5);
        let device = Device::flex().autodiff();
        let model = serde_json::from_str::<DecoderConfig>(json).unwrap().init(11, &device);
        let write = |alpha: f64, seed: u64, stops: &[u32]| {
            let how = Writing { layers: &[0, 1], max_new_tokens: 5, stops, seed };
            let config = SgrsConfig { alpha, ..SgrsConfig::default() };
            config.write(&model, &[1, 5, 3], how, &mut |_| ControlFlow::Continue(()))
        };
        let tokens = |written: &[Accepted]| written.iter().map(|own| own.token).collect::<Vec<_>>();
        let plain = write(0.0, 7, &[]);
        assert!(plain.len() == 5 && plain.iter().all(|own| own.passed && own.tries == 1), "{plain:?}");
        assert!(plain[0].saliency == 0.0 && plain[1..].iter().all(|own| own.saliency > 0.0), "{plain:?}");
        assert_eq!(tokens(&write(0.0, 7, &[])), tokens(&plain));
        let stop = plain[1].token as u32;
        let until = plain.iter().position(|own| own.token as u32 == stop).unwrap();
        assert_eq!(write(0.0, 7, &[stop]).len(), until + 1);
        // The first two have no threshold; then all candidates are rejected, and the most salient one is taken.
        let strict = write(1e6, 7, &[]);
        assert!(strict[0].passed && strict[1].passed && strict[1].tau == 0.0);
        for (at, own) in strict.iter().enumerate().skip(2) {
            assert!(!own.passed && own.tries == 3 && own.tau > own.saliency, "{own:?}");
            let text = [vec![1, 5, 3], tokens(&strict[..at]).iter().map(|&id| id as u32).collect()].concat();
            let seq = text.len();
            let of = |token: usize| {
                saliency(&model, &[&text[..], &[token as u32]].concat(), seq).of_history(
                    &[0, 1],
                    3..seq,
                    seq - 1,
                    LEAST,
                )
            };
            assert_eq!(of(own.token), own.saliency);
        }
        assert_eq!((target_layers(32), target_layers(2), target_layers(4)), (6..9, 0..1, 0..2));
    }
}
