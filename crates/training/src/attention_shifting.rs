//! Attention-shifting unlearning (arXiv 2510.17210): a model forgets some texts by no longer attending to what matters in them, and
//! keeps the others by attending to them as before. There is no public code.
//!
//! ```text
//! target[i, j] = a[i, j] f[j] / Σ_k a[i, k] f[k]     a: the frozen model's weights
//! f[j]         = 1 - lambda  for important tokens j of texts to forget
//!              = 1 + rho     for important tokens j of retained texts
//!              = 1           else
//! loss         = alpha KL_forget + (1 - alpha) KL_retain, means over queries, heads and layers
//! ```
//!
//! No token is predicted: what the model says follows from where it looks. What learns are low-rank pairs beside the projections of
//! queries and keys (`[lora]`); the frozen model is the same model without them.
//!
//! Left open by the paper and chosen here: the direction of the divergence (both are offered), rho, what "masked" means (both forms are
//! offered; a token's importance is the absolute change of entropy, averaged over positions), and a dynamic alpha, the share of the
//! forgetting loss in both losses, kept within 0.2 and 0.8. A text is a document of a row (`loader.packing = "documents"`), or the row.
//! Rows of queries all of whose keys are important carry no signal, the first ones of a text above all.

mod importance;
mod reference;
mod shift;

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use polyhead_attention::Mask;
use polyhead_models::{Batch, ConfigError, Decoder, Loss, TrainBatch, require, require_range};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use importance::{Masking, entropies, masked_entropies, most_important};
pub use shift::{Direction, divergence, factors, mean, shifted, weights};

use crate::TrainError;
use crate::config::TrainingConfig;
use crate::optimizer::Optimizer;
use crate::procedure::{Procedure, StepContext, StepReport};
use crate::update::{Step, Updater};
use reference::{Known, Reference, scores};

/// Bounds of a dynamic alpha; chosen by us, the ends of what the paper tries as fixed ones.
const ALPHA: [f64; 2] = [0.2, 0.8];

/// `[procedure.attention_shifting]`. Defaults are the paper's unless they say otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AttentionShiftingConfig {
    /// The source of the data whose texts are forgotten; those of all others are retained. Default: "forget", as data.facts calls the
    /// facts of data.facts.forget.
    pub forget: String,
    /// Share of its weight that an important token loses in texts that are forgotten. Default: 0.99.
    pub lambda: f64,
    /// Share of its weight that an important token wins in retained texts, before rows are distributions again. Default: 0.1 (chosen
    /// by us).
    pub rho: f64,
    /// "target_current" (default; chosen by us): KL(target || current); or "current_target".
    pub direction: Direction,
    /// Weight of forgetting against retaining, from 0 to 1. Default: dynamic, by the shares of both in the loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// What tells important tokens: { entropy = "attention" } (default): by the change of the predictions' entropy when no other
    /// token attends to them; { entropy = "token" }: when mask_id is in their place; "ids": a list.
    pub importance: Importance,
    /// The share of a text that is important, by entropy. Default: 0.6.
    pub fraction: f64,
    /// With importance { entropy = "token" }: the id that takes the place of a token. Default: 0.
    pub mask_id: u32,
    /// With importance "ids": the ids of important tokens.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<u32>,
    /// Memory for maps of the frozen model; those that do not fit are kept in a temporary file. Default: 1024 MiB (chosen by us).
    pub memory_mib: usize,
}

impl Default for AttentionShiftingConfig {
    fn default() -> Self {
        Self {
            forget: "forget".into(),
            lambda: 0.99,
            rho: 0.1,
            direction: Direction::TargetCurrent,
            alpha: None,
            importance: Importance::Entropy(Masking::Attention),
            fraction: 0.6,
            mask_id: 0,
            ids: Vec::new(),
            memory_mib: 1024,
        }
    }
}

/// What tells important tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Importance {
    /// The change of entropy when they are taken away in this way.
    Entropy(Masking),
    /// A list of ids.
    Ids,
}

impl AttentionShiftingConfig {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let below_one = (0.0..1.0).contains(&self.lambda);
        require(below_one, "lambda", || {
            format!(
                "lambda ({}) must be 0 or more and below 1: at 1, rows whose keys are all important have no target",
                self.lambda
            )
        })?;
        require_range("rho", self.rho, 0.0..=100.0)?;
        self.alpha.map_or(Ok(()), |alpha| require_range("alpha", alpha, 0.0..=1.0))?;
        let some = self.fraction > 0.0 && self.fraction <= 1.0;
        require(some, "fraction", || format!("fraction ({}) must be above 0, up to 1", self.fraction))?;
        let listed = self.importance == Importance::Ids;
        require(listed != self.ids.is_empty(), "ids", || match listed {
            true => "ids is empty: importance = \"ids\" takes the ids of important tokens".into(),
            false => "ids is for importance = \"ids\": set it, or leave ids out".into(),
        })
    }

    /// The targets that `[lora]` may have: pairs beside values cannot change a map of their own layer.
    pub fn check_targets(targets: Option<&[String]>) -> Result<(), String> {
        let known = ["q_proj", "k_proj"];
        match targets {
            None => {
                Err("procedure.attention_shifting trains low-rank pairs: write lora.targets = [\"q_proj\", \"k_proj\"]"
                    .into())
            }
            Some(targets) => match targets.iter().find(|target| !known.contains(&target.as_str())) {
                Some(other) => Err(format!(
                    "lora.targets: \"{other}\" does not shift the attention of its own layer; procedure.attention_shifting takes \
                     \"q_proj\" and \"k_proj\""
                )),
                None => Ok(()),
            },
        }
    }

    /// Checks the ids of tokens against a vocabulary of this size.
    fn check_ids(&self, vocab_size: usize) -> Result<(), String> {
        let (key, ids) = match self.importance {
            Importance::Ids => ("ids", &self.ids[..]),
            Importance::Entropy(Masking::Token) => ("mask_id", std::slice::from_ref(&self.mask_id)),
            Importance::Entropy(Masking::Attention) => return Ok(()),
        };
        match ids.iter().find(|id| **id as usize >= vocab_size) {
            Some(id) => Err(format!(
                "procedure.attention_shifting.{key}: {id} is no token of the model: ids must be below the vocabulary size ({vocab_size})"
            )),
            None => Ok(()),
        }
    }

    /// How much forgetting counts where both losses are known.
    fn alpha(&self, [forget, retain]: [f64; 2]) -> f64 {
        let dynamic = || (forget / (forget + retain).max(f64::MIN_POSITIVE)).clamp(ALPHA[0], ALPHA[1]);
        self.alpha.unwrap_or_else(dynamic)
    }
}

/// A text of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Text {
    tokens: Vec<u32>,
    forget: bool,
}

/// The texts of a batch: its documents, without padding.
fn texts(batch: &Batch, forget: &str) -> Result<Vec<Text>, TrainError> {
    let missing = || {
        TrainError::Setting(format!(
            "procedure.attention_shifting.forget: the data has no source \"{forget}\"; data.facts has one with data.facts.forget above \
             0, a mixture those of its [[data.source]] tables"
        ))
    };
    let sources = batch.sources.as_ref().ok_or_else(missing)?;
    let number = sources.names.iter().position(|name| name == forget).ok_or_else(missing)?;
    let mut texts: BTreeMap<(usize, u32), Text> = BTreeMap::new();
    for (at, &id) in batch.tokens.iter().enumerate() {
        if batch.roles.as_ref().is_some_and(|roles| roles[at] == polyhead_models::Role::Padding) {
            continue;
        }
        let document = batch.documents.as_ref().map_or(0, |documents| documents[at]);
        let own = texts
            .entry((at / batch.seq, document))
            .or_insert_with(|| Text { tokens: Vec::new(), forget: usize::from(sources.of[at]) == number });
        own.tokens.push(id);
    }
    Ok(texts.into_values().collect())
}

/// The model without what it learns here.
fn frozen(model: &Decoder) -> Decoder {
    let mut frozen = model.valid();
    frozen.lora = None;
    frozen
}

/// Unlearning by shifted attention.
#[derive(Debug)]
pub struct AttentionShifting {
    config: AttentionShiftingConfig,
    updater: Updater,
    reference: Reference,
}

impl AttentionShifting {
    /// A loop body around an optimiser, fresh or with the state of an earlier session. What the frozen model does is computed again
    /// where a run is resumed, and is the same.
    ///
    /// # Errors
    /// If the model has no low-rank pairs to train, a layer without a map to shift, or lacks a token of the settings.
    pub fn new(
        config: AttentionShiftingConfig,
        optimizer: Optimizer,
        training: &TrainingConfig,
        model: &Decoder,
    ) -> Result<Self, TrainError> {
        if model.lora.is_none() {
            AttentionShiftingConfig::check_targets(None).map_err(TrainError::Setting)?;
        }
        config.check_ids(model.vocab_size()).map_err(TrainError::Setting)?;
        scores(&frozen(model), &[vec![0]], &Mask::causal())?;
        Ok(Self { reference: Reference::new(config.clone()), updater: Updater::new(optimizer, training), config })
    }

    /// `[1]` each: the losses of forgetting and of retaining; `None` without such texts.
    fn losses(&mut self, model: &Decoder, texts: &[Text]) -> Result<[Option<Tensor<1>>; 2], TrainError> {
        let frozen = frozen(model);
        let known: Vec<Known> =
            texts.iter().map(|text| self.reference.of(&frozen, &text.tokens)).collect::<Result<_, _>>()?;
        let longest = texts.iter().map(|text| text.tokens.len()).max().unwrap_or(0);
        let filled = |flags: &[bool]| (0..longest).map(|at| flags.get(at).copied().unwrap_or(false)).collect();
        let important: Vec<Vec<bool>> = known.iter().map(|known| filled(&known.important)).collect();
        let factor: Vec<f64> = texts
            .iter()
            .map(|text| if text.forget { 1.0 - self.config.lambda } else { 1.0 + self.config.rho })
            .collect();
        let rows: Vec<Vec<u32>> = texts
            .iter()
            .map(|text| text.tokens.iter().copied().chain(std::iter::repeat(0)).take(longest).collect())
            .collect();
        let lengths: Vec<usize> = texts.iter().map(|text| text.tokens.len()).collect();
        let scores = scores(model, &rows, &Mask::causal())?;
        let device = model.device();
        let (mut before, mut layers) = (vec![0; texts.len()], Vec::new());
        for scores in scores {
            let heads = scores.dims()[1];
            let reference = padded_maps(&known, &lengths, &mut before, (heads, longest));
            let shape = [texts.len(), heads, longest, longest];
            let reference = Tensor::from_data(TensorData::new(reference, shape), &device);
            let target = shifted(reference, factors(&important, &factor, &device));
            layers.push(divergence(scores, target, self.config.direction));
        }
        let of = |forget: bool| {
            let counted =
                |text: &Text| (0..longest).map(|at| text.forget == forget && at < text.tokens.len()).collect();
            mean(&layers, &texts.iter().map(counted).collect::<Vec<Vec<bool>>>())
        };
        Ok([of(true), of(false)])
    }
}

/// The maps of a layer, `[texts, heads, longest, longest]`, taken from behind `before` of each text's.
fn padded_maps(known: &[Known], lengths: &[usize], before: &mut [usize], (heads, longest): (usize, usize)) -> Vec<f32> {
    let mut all = vec![0.0; known.len() * heads * longest * longest];
    for (text, ((known, &length), before)) in known.iter().zip(lengths).zip(before).enumerate() {
        let own = &known.maps[*before..*before + heads * length * length];
        *before += own.len();
        for (row, weights) in own.chunks(length).enumerate() {
            let (head, query) = (row / length, row % length);
            let at = ((text * heads + head) * longest + query) * longest;
            all[at..at + length].copy_from_slice(weights);
        }
    }
    all
}

impl Procedure for AttentionShifting {
    fn step(
        &mut self,
        model: Decoder,
        batches: &[Batch],
        context: &StepContext<'_>,
    ) -> Result<(Decoder, StepReport), TrainError> {
        let mut step = Step::new(context);
        let (targets, count) = (batches.iter().map(TrainBatch::targets).sum::<u64>() as f64, batches.len() as f64);
        let (mut both, mut alphas) = ([0.0; 2], 0.0);
        for batch in batches {
            let losses = self.losses(&model, &texts(batch, &self.config.forget)?)?;
            let value =
                |loss: &Option<Tensor<1>>| loss.clone().map_or(0.0, |loss| f64::from(loss.into_scalar::<f32>()));
            let values = [value(&losses[0]), value(&losses[1])];
            let alpha = self.config.alpha(values);
            let weighed = losses.into_iter().zip([alpha, 1.0 - alpha]).filter_map(|(loss, share)| Some(loss? * share));
            let Some(loss) = weighed.reduce(|a, b| a + b) else { continue };
            both = [both[0] + values[0] / count, both[1] + values[1] / count];
            alphas += alpha / count;
            // A step divides by its targets, which this loss does not count.
            let loss = Loss::of(loss * (targets / count));
            let objective = step.objective(loss, batch, 0.0);
            step.add_backward(objective, &model);
        }
        let names = ["forget_loss", "retain_loss", "alpha"].map(|name| format!("attention_shifting/{name}"));
        step.measured.extend(names.into_iter().zip([both[0], both[1], alphas]));
        self.updater.finish(model, step)
    }

    fn optimizer(&self) -> &Optimizer {
        &self.updater.optimizer
    }
}

#[cfg(test)]
mod tests;
