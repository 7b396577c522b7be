//! What a recipe costs besides time, computed from its settings.

use polyhead_attention::Cost;
use polyhead_models::DecoderConfig;

use crate::recipe::Recipe;

/// What a recipe costs besides time.
pub struct Costs {
    /// Of the whole model.
    pub totals: Totals,
    /// Tokens of a step.
    pub tokens_per_step: u64,
    /// Tokens of the run.
    pub tokens: u64,
    /// What a forward pass keeps for its backward pass, roughly.
    pub activation_bytes: u64,
}

/// Costs of a model or a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Weights.
    pub parameters: u64,
    /// Operations of a forward pass per token, at the recipe's seq_len.
    pub flops_per_token: u64,
    /// Bytes kept per token while decoding, in f32.
    pub cached_bytes_per_token: u64,
}

impl Totals {
    /// At a length of sequence: under a causal mask a query sees (seq_len + 1) / 2 keys on average.
    pub fn of(cost: &Cost, seq_len: u64) -> Self {
        Self {
            parameters: cost.parameters,
            flops_per_token: cost.flops_per_token + cost.flops_per_pair * (seq_len + 1) / 2,
            cached_bytes_per_token: 4 * cost.cached_numbers_per_token,
        }
    }

    /// Of a whole model.
    pub fn of_model(decoder: &DecoderConfig, vocab_size: usize, seq_len: u64) -> Self {
        let parts = decoder.parts(vocab_size);
        let parts = parts.iter().map(|part| Self::of(&part.cost, seq_len));
        parts.fold(Self::default(), |sum, part| Self {
            parameters: sum.parameters + part.parameters,
            flops_per_token: sum.flops_per_token + part.flops_per_token,
            cached_bytes_per_token: sum.cached_bytes_per_token + part.cached_bytes_per_token,
        })
    }
}

impl Costs {
    /// Of a recipe whose data has so many ids.
    pub fn of(recipe: &Recipe, decoder: &DecoderConfig, vocab_size: usize) -> Self {
        let training = &recipe.training;
        let tokens_per_step = (training.seq_len * training.batch_size * training.gradient_accumulation_steps) as u64;
        Self {
            totals: Totals::of_model(decoder, vocab_size, training.seq_len as u64),
            tokens_per_step,
            tokens: tokens_per_step.saturating_mul(training.steps),
            activation_bytes: activation_bytes(recipe, decoder),
        }
    }

    /// Weights, gradients and two moments, in f32.
    pub fn state_bytes(&self) -> u64 {
        16 * self.totals.parameters
    }

    /// Operations of the whole training.
    pub fn training_flops(&self) -> f64 {
        3.0 * self.totals.flops_per_token as f64 * self.tokens as f64
    }
}

/// Fitted by us to peaks on the CPU (grouped differential attention, 4 and 8 layers, d_model 128 and 256, seq_len 128 and
/// 1024), which it meets within a tenth.
fn activation_bytes(recipe: &Recipe, decoder: &DecoderConfig) -> u64 {
    let training = &recipe.training;
    let numbers_per_token = decoder.n_layers * (10 * decoder.d_model + 4 * decoder.feed_forward());
    (4 * training.batch_size * training.seq_len).saturating_mul(numbers_per_token) as u64
}
