//! What a recipe costs besides time, computed from its settings.

use std::collections::BTreeMap;

use polyhead_attention::Cost;
use polyhead_kernels::tokens_of_a_chunk;
use polyhead_models::weights::layer_of;
use polyhead_models::{ActivationCheckpointing, Parameter, Part, Sizes};
use polyhead_training::FreezeConfig;
use polyhead_training::config::OptimizerConfig;

use polyhead_recipe::{ModelConfig, Recipe};

use crate::intervention::trains_intervention;

/// What the data tells about the size of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// Ids that occur.
    Ids(usize),
    /// Inputs and classes.
    Examples(Sizes),
    /// Layers of the features, and numbers of each.
    Pairs([usize; 2]),
    /// Height and width of the images to learn from.
    Images([usize; 2]),
}

impl Known {
    /// What is counted while training: what a model reads one of.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Ids(_) => "token",
            Self::Examples(_) => "example",
            Self::Pairs(_) => "text",
            Self::Images(_) => "image",
        }
    }
}

/// What a recipe costs besides time.
pub struct Costs {
    /// Of the whole model.
    pub totals: Totals,
    /// Tokens (for classifiers: examples) of a step.
    pub tokens_per_step: u64,
    /// Tokens of the run.
    pub tokens: u64,
    /// What a forward pass keeps for its backward pass, roughly.
    pub activation_bytes: u64,
    working_bytes: u64,
    logits_bytes: u64,
    process_bytes: u64,
}

/// Costs of a model or a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Totals {
    /// Weights.
    pub parameters: u64,
    /// Operations of a forward pass per token, at the recipe's seq_len; for classifiers per example.
    pub flops_per_token: u64,
    /// Bytes kept per token while decoding, in f32; of a window, those of its tokens shared out over the recipe's seq_len.
    pub cached_bytes_per_token: u64,
    /// Bytes kept while decoding however many tokens there are, in f32: the states of recurrent mechanisms.
    pub state_bytes: u64,
}

/// The parts of the model that a recipe describes; none where the data does not fit it.
pub fn parts(recipe: &Recipe, known: Known) -> Vec<Part> {
    match (&recipe.model, known) {
        (ModelConfig::Decoder { config: Some(decoder), .. }, Known::Ids(vocab_size)) => decoder.parts(vocab_size),
        (ModelConfig::Classifier { config: classifier, .. }, Known::Examples(sizes)) => classifier.parts(sizes),
        (ModelConfig::Embedder(embedder), Known::Pairs([layers, dim])) => embedder.parts(layers, dim),
        (ModelConfig::SuperResolution(config), Known::Images(size)) => config.parts(size),
        _ => Vec::new(),
    }
}

impl Totals {
    /// At a length of sequence, under a causal mask.
    pub fn of(cost: &Cost, seq_len: u64) -> Self {
        Self {
            parameters: cost.parameters,
            flops_per_token: cost.causal_flops(seq_len),
            cached_bytes_per_token: cost.cached_per_token(seq_len).saturating_mul(4),
            state_bytes: cost.state_elements.saturating_mul(4),
        }
    }

    /// Of the whole model of a recipe.
    pub fn of_recipe(recipe: &Recipe, known: Known) -> Self {
        let parts = parts(recipe, known);
        let parts = parts.iter().map(|part| Self::of(&part.cost, recipe.training.seq_len as u64));
        parts.fold(Self::default(), |sum, part| Self {
            parameters: sum.parameters.saturating_add(part.parameters),
            flops_per_token: sum.flops_per_token.saturating_add(part.flops_per_token),
            cached_bytes_per_token: sum.cached_bytes_per_token.saturating_add(part.cached_bytes_per_token),
            state_bytes: sum.state_bytes.saturating_add(part.state_bytes),
        })
    }
}

/// What training takes of memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// The model's weights.
    pub weights: u64,
    /// Gradients of what is trained, as many as are there at once.
    pub gradients: u64,
    /// What the optimizer keeps of what is trained.
    pub moments: u64,
    /// What a forward pass keeps for its backward pass, roughly.
    pub activations: u64,
    /// What the loss takes while all activations are there: the logits of a chunk, and where it is trained the gradient of the output
    /// projection.
    loss: u64,
    /// Gradients of the forward passes of a step before the last; 0 where there is only one.
    summed: u64,
    /// What is left of activations when nearly all gradients are there: those of the layer at work.
    working: u64,
    /// What the process takes besides.
    process: u64,
}

/// The program and generated data, measured.
const PROGRAM: u64 = 30 << 20;
/// A tokenizer and the text that is read, measured with the Rust documentation and with 49 thousand ids.
const TEXT: u64 = 20 << 20;

impl Memory {
    /// Weights, gradients and moments.
    pub fn state(&self) -> u64 {
        self.weights.saturating_add(self.gradients).saturating_add(self.moments)
    }

    /// At the largest moment, the process included. Activations are freed while gradients come to be: there are never all of
    /// both.
    pub fn peak(&self) -> u64 {
        let begun = self.activations.saturating_add(self.loss);
        let nearly_done = self.gradients.saturating_add(self.working);
        let backward = begun.max(nearly_done);
        [self.weights, self.moments, self.summed, backward].into_iter().fold(self.process, u64::saturating_add)
    }
}

impl Costs {
    /// Of a recipe whose model is filled in.
    pub fn of(recipe: &Recipe, known: Known) -> Self {
        let tokens_per_step = tokens_per_step(recipe);
        Self {
            totals: Totals::of_recipe(recipe, known),
            tokens_per_step,
            tokens: tokens_per_step.saturating_mul(recipe.training.steps),
            activation_bytes: {
                let checkpointing = recipe.training.activation_checkpointing;
                activation_bytes(recipe, known, checkpointing == ActivationCheckpointing::Block)
            },
            working_bytes: activation_bytes(recipe, known, true),
            logits_bytes: logits_bytes(recipe, known),
            process_bytes: if matches!(recipe.model, ModelConfig::Decoder { .. }) { PROGRAM + TEXT } else { PROGRAM },
        }
    }

    /// Memory of the training of a model with these parameters.
    pub fn memory(&self, recipe: &Recipe, parameters: &[Parameter]) -> Memory {
        let bytes = |numbers: usize| 4 * numbers as u64;
        let trained = || parameters.iter().filter(|one| one.trainable);
        // Muon keeps one moment of the layers' matrices, and the vectors beside them are small.
        let moments = |one: &Parameter| match recipe.optimizer {
            OptimizerConfig::Muon(_) if layer_of(&one.name).is_some() => bytes(one.elements()),
            _ => 2 * bytes(one.elements()),
        };
        let gradients = gradients_at_once(recipe, trained().map(|one| (layer_of(&one.name), bytes(one.elements()))));
        // A tied one is the embedding.
        let head = ["head.weight", "embedding.weight"].map(|name| parameters.iter().find(|one| one.name == name));
        let head = head.into_iter().flatten().next().filter(|one| one.trainable);
        Memory {
            weights: parameters.iter().map(|one| one.bytes() as u64).sum(),
            gradients,
            moments: trained().map(moments).sum(),
            activations: self.activation_bytes,
            loss: self.logits_bytes.saturating_add(head.map_or(0, |one| bytes(one.elements()))),
            summed: if recipe.training.gradient_accumulation_steps > 1 { gradients } else { 0 },
            working: self.working_bytes,
            process: self.process_bytes,
        }
    }

    /// [`memory`](Self::memory) where all is trained, for a model that is too large to be made.
    pub fn memory_of_all(&self) -> Memory {
        let weights = self.totals.parameters.saturating_mul(4);
        let (moments, activations) = (weights.saturating_mul(2), self.activation_bytes);
        let (loss, working, process) = (self.logits_bytes, self.working_bytes, self.process_bytes);
        Memory { weights, gradients: weights, moments, activations, loss, summed: 0, working, process }
    }

    /// What training takes at least, by estimate: of what is not trained (`lora`, `freeze`, `intervention.train`) the weights alone.
    pub fn least_bytes(&self, recipe: &Recipe) -> u64 {
        let part = recipe.lora.is_some() || trains_intervention(recipe) || recipe.freeze != FreezeConfig::default();
        let moments = if matches!(recipe.optimizer, OptimizerConfig::Muon(_)) { 1 } else { 2 };
        let gradients = if recipe.training.optimizer_in_backward { 0 } else { 1 };
        let numbers = if part { 1 } else { 1 + gradients + moments };
        self.totals.parameters.saturating_mul(4 * numbers).saturating_add(self.activation_bytes)
    }

    /// Operations of the whole training.
    pub fn training_flops(&self) -> f64 {
        3.0 * self.totals.flops_per_token as f64 * self.tokens as f64
    }
}

/// Of these gradients, by layer, the bytes of those that are there at once: all, or those of no layer and of the largest one.
fn gradients_at_once(recipe: &Recipe, all: impl Iterator<Item = (Option<usize>, u64)>) -> u64 {
    let mut by_layer = BTreeMap::<Option<usize>, u64>::new();
    for (layer, bytes) in all {
        *by_layer.entry(layer).or_default() += bytes;
    }
    if !recipe.training.optimizer_in_backward {
        return by_layer.into_values().sum();
    }
    let of_no_layer = by_layer.remove(&None).unwrap_or(0);
    of_no_layer + by_layer.into_values().max().unwrap_or(0)
}

/// Tokens (for classifiers: examples) of a step.
pub fn tokens_per_step(recipe: &Recipe) -> u64 {
    let training = &recipe.training;
    let row = if matches!(recipe.model, ModelConfig::Decoder { .. }) { training.seq_len } else { 1 };
    row.saturating_mul(training.batch_size).saturating_mul(training.gradient_accumulation_steps) as u64
}

/// The logits of a decoder that are there at once.
fn logits_bytes(recipe: &Recipe, known: Known) -> u64 {
    let (training, Known::Ids(vocab)) = (&recipe.training, known) else { return 0 };
    let tokens = tokens_of_a_chunk(training.seq_len.saturating_mul(training.batch_size), vocab);
    tokens.saturating_mul(vocab).saturating_mul(4) as u64
}

/// What a forward pass keeps of a batch, with the gradients of the layer that is at work.
fn activation_bytes(recipe: &Recipe, known: Known, checkpointed: bool) -> u64 {
    let training = &recipe.training;
    let numbers_per_row = match (&recipe.model, known) {
        (ModelConfig::Classifier { config: classifier, .. }, Known::Examples(sizes)) => {
            classifier.kept_numbers(sizes, checkpointed)
        }
        (ModelConfig::SuperResolution(config), Known::Images(size)) => config.kept_numbers(size),
        (ModelConfig::Decoder { config: Some(decoder), .. }, _) => {
            training.seq_len.saturating_mul(decoder.kept_elements(checkpointed))
        }
        _ => 0,
    };
    training.batch_size.saturating_mul(4).saturating_mul(numbers_per_row) as u64
}
