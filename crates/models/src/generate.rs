//! Text from a model, token by token, with cached keys and values.

use std::ops::ControlFlow;

use burn::tensor::{Int, Tensor, TensorData};
use polyhead_attention::{Cache, Mask, Observe};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Decoder;

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Tokens to generate at most. Default: 200.
    pub max_new_tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token. Default: 0.8.
    pub temperature: f64,
    /// Choose among the k likeliest tokens only; 0 among all. Default: 0.
    pub top_k: usize,
    /// Choose among the likeliest tokens whose probabilities add up to this. Default: 1, all of them.
    pub top_p: f64,
    /// The same seed gives the same text. Default: 0.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { max_new_tokens: 200, temperature: 0.8, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// Continues `prompt` (not empty), handing each new token to `on_token` as it comes; stops at `stop`, at
/// `max_new_tokens`, or when `on_token` says so. Call it on `model.valid()`.
///
/// Returns the new tokens, without the stop token.
pub fn generate(
    model: &Decoder,
    prompt: &[u32],
    sampling: &Sampling,
    stop: Option<u32>,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
    let mut cache = Cache::new(model.layers.len());
    let mut new = Vec::new();
    let mut next: Vec<u32> = prompt.to_vec();
    while new.len() < sampling.max_new_tokens {
        let logits = next_logits(model, &next, &mut cache);
        let token = choose(&logits, sampling, &mut rng);
        if Some(token) == stop {
            break;
        }
        new.push(token);
        if on_token(token).is_break() {
            break;
        }
        next = vec![token];
    }
    new
}

/// `[vocab]`: the logits after `tokens`, which continue what is cached.
fn next_logits(model: &Decoder, tokens: &[u32], cache: &mut Cache) -> Vec<f32> {
    let ids: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, tokens.len()]), &model.device());
    let hidden = model.forward(ids, &Mask::causal(), Some(cache), Observe::Nothing).hidden;
    let last = hidden.narrow(1, tokens.len() - 1, 1);
    model.logits(last).into_data().iter::<f32>().collect()
}

/// The index of the next token.
fn choose(logits: &[f32], sampling: &Sampling, rng: &mut ChaCha8Rng) -> u32 {
    let mut ranked: Vec<u32> = (0..logits.len() as u32).collect();
    // Ties go to the smaller id, so that the order never depends on the sort.
    ranked.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    if sampling.temperature == 0.0 {
        return ranked[0];
    }
    if sampling.top_k > 0 {
        ranked.truncate(sampling.top_k);
    }
    let best = f64::from(logits[ranked[0] as usize]);
    let weight = |&id: &u32| ((f64::from(logits[id as usize]) - best) / sampling.temperature).exp();
    let weights: Vec<f64> = ranked.iter().map(weight).collect();
    let all: f64 = weights.iter().sum();
    let mut kept = 0.0;
    let enough = weights.iter().position(|w| {
        kept += w;
        kept >= sampling.top_p * all
    });
    let count = enough.map_or(weights.len(), |last| last + 1);
    let mut left = rng.random::<f64>() * weights[..count].iter().sum::<f64>();
    let chosen = weights[..count].iter().position(|w| {
        left -= w;
        left < 0.0
    });
    ranked[chosen.unwrap_or(count - 1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(sampling: &Sampling) -> Vec<u32> {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let logits = [0.0, 2.0, 1.0, -1.0];
        (0..400).map(|_| choose(&logits, sampling, &mut rng)).collect()
    }

    #[test]
    fn limits_cut_the_unlikely() {
        let all = Sampling { temperature: 1.0, ..Sampling::default() };
        assert!((0..4).all(|id| draws(&all).contains(&id)));
        assert!(draws(&Sampling { top_k: 2, ..all.clone() }).iter().all(|&id| id == 1 || id == 2));
        // Probabilities are about 0.61 and 0.22 for the first two.
        assert!(draws(&Sampling { top_p: 0.5, ..all.clone() }).iter().all(|&id| id == 1));
        assert!(draws(&Sampling { top_p: 0.7, ..all.clone() }).iter().all(|&id| id == 1 || id == 2));
        assert!(draws(&Sampling { temperature: 0.0, ..all }).iter().all(|&id| id == 1));
    }
}
