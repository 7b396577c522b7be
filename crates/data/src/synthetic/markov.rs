//! A Markov chain: the best possible loss is its entropy rate, and every position teaches.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Side, Task, open};
use crate::batches::Sample;
use crate::problem::{Problem, require, within};
use crate::{Data, DataError, Opening, Source, Tokenizer};

/// `[data.markov]`: tokens from a random Markov chain of order one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MarkovConfig {
    /// States, which are the token ids. Default: 16.
    pub states: usize,
    /// Small values give nearly deterministic chains, large ones nearly uniform chains: transition probabilities are
    /// proportional to u^(1 / concentration) with u uniform in (0, 1). Default: 0.3.
    pub concentration: f64,
}

impl Default for MarkovConfig {
    fn default() -> Self {
        Self { states: 16, concentration: 0.3 }
    }
}

impl Source for MarkovConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        let Self { states, concentration } = *self;
        within("states", states, 2..=4096)?;
        require(concentration.is_finite() && concentration >= 0.01, "concentration", || {
            format!("concentration ({concentration}) must be at least 0.01")
        })
    }

    fn vocab_size(&self, _tokenizer: &Tokenizer) -> usize {
        self.states
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        open(self.chain(opening.options.seed), opening)
    }
}

impl MarkovConfig {
    /// The chain that a seed chooses.
    pub fn chain(&self, seed: u64) -> Markov {
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x6D61_726B_6F76);
        let row = |rng: &mut ChaCha8Rng| {
            let draws: Vec<f64> =
                (0..self.states).map(|_| rng.random::<f64>().max(1e-12).powf(1.0 / self.concentration)).collect();
            let sum: f64 = draws.iter().sum();
            draws.into_iter().map(|draw| draw / sum).collect()
        };
        let transitions: Vec<Vec<f64>> = (0..self.states).map(|_| row(&mut rng)).collect();
        Markov { stationary: stationary(&transitions), transitions }
    }
}

/// A chain.
#[derive(Debug, Clone, PartialEq)]
pub struct Markov {
    transitions: Vec<Vec<f64>>,
    // Follows from the transitions, but takes far longer to find than a row takes to draw.
    stationary: Vec<f64>,
}

impl Markov {
    /// `[from][to]`: probabilities.
    pub fn transitions(&self) -> &[Vec<f64>] {
        &self.transitions
    }

    fn next(&self, from: usize, rng: &mut ChaCha8Rng) -> usize {
        draw(&self.transitions[from], rng)
    }
}

/// The share of time spent in each state, by power iteration.
fn stationary(transitions: &[Vec<f64>]) -> Vec<f64> {
    let states = transitions.len();
    let mut now = vec![1.0 / states as f64; states];
    for _ in 0..10_000 {
        // The half step keeps periodic chains from oscillating; it has the same fixed point.
        let mut next: Vec<f64> = now.iter().map(|p| 0.5 * p).collect();
        for (p, row) in now.iter().zip(transitions) {
            next.iter_mut().zip(row).for_each(|(next, t)| *next += 0.5 * p * t);
        }
        let moved: f64 = next.iter().zip(&now).map(|(a, b)| (a - b).abs()).sum();
        now = next;
        if moved < 1e-15 {
            break;
        }
    }
    now
}

fn draw(probabilities: &[f64], rng: &mut ChaCha8Rng) -> usize {
    let mut left = rng.random::<f64>();
    let hit = probabilities.iter().position(|p| {
        left -= p;
        left < 0.0
    });
    hit.unwrap_or(probabilities.len() - 1)
}

impl Task for Markov {
    fn n_ids(&self) -> usize {
        self.transitions.len()
    }

    /// The entropy rate.
    fn floor(&self) -> f64 {
        let entropy = |row: &Vec<f64>| row.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum::<f64>();
        self.stationary.iter().zip(&self.transitions).map(|(p, row)| p * entropy(row)).sum()
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, _: Side) -> Sample {
        // Starting from the stationary distribution makes every position equally hard.
        let mut state = draw(&self.stationary, rng);
        let mut chain = vec![state as u32];
        for _ in 0..seq_len {
            state = self.next(state, rng);
            chain.push(state as u32);
        }
        let targets = chain[1..].iter().map(|&id| i64::from(id)).collect();
        chain.truncate(seq_len);
        Sample { tokens: chain, targets, ..Sample::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::testing::rows;

    #[test]
    fn the_floor_is_the_loss_of_the_true_chain() {
        let chain = MarkovConfig { states: 8, concentration: 0.5 }.chain(1);
        let (mut loss, mut count) = (0.0, 0);
        for row in rows(chain.clone(), 2000) {
            for (&from, &to) in row.tokens.iter().zip(&row.targets) {
                loss -= chain.transitions[from as usize][to as usize].ln();
                count += 1;
            }
        }
        let measured = loss / f64::from(count);
        assert!((measured / chain.floor() - 1.0).abs() < 0.01, "{measured} against {}", chain.floor());
        assert!(chain.floor() < 0.95 * 8f64.ln());
    }
}
