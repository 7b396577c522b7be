//! FocuSFT's bilevel loop (arXiv 2605.09932), as the authors' code does it (github.com/JarvisPei/FocuSFT, c924c48).
//!
//! For every batch, fresh low-rank pairs φ ("fast weights") on projections of the upper layers take K steps of gradient
//! descent on the batch's own loss; then the ordinary loss, computed through weights θ and fast weights together, is
//! differentiated with respect to θ, and the fast weights are forgotten:
//!
//! ```text
//! φ_{k+1} = φ_k - inner_lr · clip(∂L(θ, φ_k)/∂φ)        K times, θ fixed
//! θ      <- AdamW(∂L(θ, φ_K)/∂θ)                         φ_K a constant: first order
//! ```
//!
//! Both passes see turns of context in both directions ([`ContextMask::Bidirectional`]). Fast weights are no parameters:
//! neither the optimiser nor a checkpoint can see them, and what is generated or validated is the plain, causal model.
//!
//! Ours: states of the layers below the first adapted one are computed once, not K times (the same numbers); several
//! conversations in a row; the mean of a step is over all its targets (the authors average the means of batches, which
//! differs where batches of an accumulated step have unequal numbers of targets); fast weights are f32; the true gradient
//! through the inner loop by finite differences (`second_order`).

use burn::module::Module;
use burn::optim::GradientsParams;
use polyhead_models::adapters::{self, LoraConfig};
use polyhead_models::{Batch, ConfigError, ContextMask, Decoder, Evaluated, Pass, require, require_range};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::config::{ParallelConfig, TrainingConfig};
use crate::engagement;
use crate::gradients::backward;
use crate::optimizer::Optimizer;
use crate::procedure::{HeldOut, Procedure, StepContext, StepReport};
use crate::ranks::Ranks;
use crate::update::{Step, Updater};

mod inner;
mod second_order;

pub use inner::{Adapted, FastWeights, InnerStep, adapt};

/// `[procedure.bilevel]`. The defaults are the authors' main configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BilevelConfig {
    /// Whether fast weights are adapted: "on" (default), or "off", which is plain training under the mask.
    pub inner: Inner,
    /// Steps of the fast weights, K. Default: 2.
    pub inner_steps: usize,
    /// Learning rate of the fast weights. Default: 1.
    pub inner_lr: f64,
    /// Gradients of fast weights are scaled down to this norm, each tensor by itself; 0 switches it off. Default: 1.
    pub inner_clip: f64,
    /// Clip by the norm over all fast weights together instead. Default: false.
    pub sync: bool,
    /// Channels between the two matrices of a fast weight. Default: 32.
    pub rank: usize,
    /// Fast weights are scaled by alpha / rank. Default: 64.
    pub alpha: f64,
    /// Projections with fast weights. Default: ["gate_proj", "up_proj", "down_proj"].
    pub targets: Vec<String>,
    /// Share of the layers with fast weights, from the top: from layer floor(n_layers (1 - fraction)) on. Default: 0.35.
    pub layer_fraction: f64,
    /// What tokens see of their own turn of context in both passes: "bidirectional" (default) or "causal".
    pub context_mask: ContextMask,
    /// Whether the fast weights' gradients count in the norm that the weights' gradients are clipped by, as they do in the
    /// authors' runs by an oversight. Default: false.
    pub clip_includes_fast: bool,
    /// Differentiate through the inner loop too: exact to about 1e-5, at two more passes for every inner step. Not the
    /// authors'. Default: false.
    pub second_order: bool,
}

impl Default for BilevelConfig {
    fn default() -> Self {
        Self {
            inner: Inner::On,
            inner_steps: 2,
            inner_lr: 1.0,
            inner_clip: 1.0,
            sync: false,
            rank: 32,
            alpha: 64.0,
            targets: ["gate_proj", "up_proj", "down_proj"].map(Into::into).into(),
            layer_fraction: 0.35,
            context_mask: ContextMask::Bidirectional,
            clip_includes_fast: false,
            second_order: false,
        }
    }
}

/// Whether there is an inner loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Inner {
    /// There is.
    On,
    /// There is none.
    Off,
}

impl BilevelConfig {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.pairs().validate()?;
        for (field, value) in [("inner_lr", self.inner_lr), ("inner_clip", self.inner_clip)] {
            require(value.is_finite() && value >= 0.0, field, || format!("{field} ({value}) must be 0 or more"))?;
        }
        require(self.inner_steps <= 1000, "inner_steps", || {
            format!("inner_steps ({}) must be at most 1000", self.inner_steps)
        })?;
        require_range("layer_fraction", self.layer_fraction, 0.0..=1.0)
    }

    /// The first layer with fast weights, in f64 as the authors compute it: of 10 layers, a fraction of 0.9 starts at 0.
    pub fn first_layer(&self, n_layers: usize) -> usize {
        (n_layers as f64 * (1.0 - self.layer_fraction)).floor().max(0.0) as usize
    }

    /// Inner steps that are taken.
    fn steps(&self) -> usize {
        if self.inner == Inner::On { self.inner_steps } else { 0 }
    }

    fn pairs(&self) -> LoraConfig {
        LoraConfig { rank: self.rank, alpha: self.alpha, targets: self.targets.clone(), ..LoraConfig::default() }
    }

    /// Fresh fast weights for the batch at `position`: none where nothing is adapted.
    ///
    /// # Errors
    /// If the adapted layers have no such projection.
    pub fn fresh(&self, model: &Decoder, seed: u64, position: u64) -> Result<FastWeights, TrainError> {
        let first = self.first_layer(model.layers.len());
        if self.steps() == 0 || first == model.layers.len() {
            return Ok(FastWeights::default());
        }
        adapters::draw(model, &self.pairs(), first, (seed, position))
            .map(FastWeights)
            .map_err(|error| TrainError::Setting(format!("procedure.bilevel.{error}")))
    }
}

/// The bilevel loop.
#[derive(Debug)]
pub struct Bilevel {
    config: BilevelConfig,
    updater: Updater,
}

impl Bilevel {
    /// A loop body around an optimiser, fresh or with the state of an earlier session.
    pub fn new(config: BilevelConfig, optimizer: Optimizer, training: &TrainingConfig) -> Self {
        Self { config, updater: Updater::new(optimizer, training) }
    }

    /// What one batch alone gives to a step: the gradients of the weights, and those of its fast weights where they count.
    pub fn gradients(&self, model: &Decoder, batch: &Batch, adapted: &Adapted) -> (GradientsParams, FastWeights) {
        let ranks = Ranks::alone(ParallelConfig::default());
        let targets = batch.target_tokens();
        let context = StepContext { step: 1, lr: 0.0, seed: 0, position: 0, passes: 1, targets, ranks: &ranks };
        let mut step = Step::new(&context);
        let beside = self.batch(model, batch, adapted, &mut step);
        (step.gradients(model), beside)
    }

    /// Forward and backward of one batch: adds its gradients to `step`; gives the fast weights' own where they count.
    fn batch(&self, model: &Decoder, batch: &Batch, adapted: &Adapted, step: &mut Step<'_>) -> FastWeights {
        let BilevelConfig { clip_includes_fast, second_order, context_mask, .. } = self.config;
        let fast = adapted.last().lifted(clip_includes_fast || second_order);
        let mask = batch.mask(context_mask);
        let loss = model.loss_of_pass(batch, Pass { adapters: &fast, ..Pass::new(&mask) });
        let grads = backward(step.objective(loss, batch, self.updater.penalty_weight));
        let mut beside = FastWeights::default();
        if !adapted.last().is_empty() && (clip_includes_fast || second_order) {
            let slopes = inner::slopes(&fast, &grads);
            if clip_includes_fast {
                beside = slopes.clone();
            }
            if second_order {
                second_order::correct(model, batch, &self.config, adapted, slopes, step);
            }
        }
        step.add(grads, model);
        beside
    }
}

impl Procedure for Bilevel {
    fn step(
        &mut self,
        model: Decoder,
        batches: &[Batch],
        context: &StepContext<'_>,
    ) -> Result<(Decoder, StepReport), TrainError> {
        let StepContext { seed, position, passes, ranks, .. } = *context;
        let mut step = Step::new(context);
        let (mut of_passes, mut beside) = (Vec::new(), FastWeights::default());
        for (pass, batch) in ranks.own(passes).zip(batches) {
            step.begin_pass(&model);
            let fresh = self.config.fresh(&model, seed, position + pass)?;
            let adapted = adapt(&model, batch, &self.config, fresh);
            beside = self.batch(&model, batch, &adapted, &mut step);
            let losses: Vec<f64> = adapted.steps.iter().map(|inner| inner.loss).collect();
            of_passes.push((losses, beside.numbers()));
        }
        step.end_passes(&model);
        let (mut losses, mut slopes) = (vec![0.0; self.config.steps()], Vec::new());
        for (of_pass, numbers) in ranks.in_order(of_passes) {
            losses.iter_mut().zip(of_pass).for_each(|(sum, loss)| *sum += loss / passes as f64);
            slopes.push(beside.with(numbers));
        }
        let square = slopes.into_iter().reduce(|sum, more| sum.zip(&more, |a, b| a + b)).and_then(|sum| sum.square());
        step.square_beside = square.map_or(0.0, |sum| f64::from(sum.into_scalar::<f32>()));
        let named = losses.iter().enumerate().map(|(k, &loss)| (format!("bilevel/inner_loss_{k}"), loss));
        step.measured.extend(named);
        self.updater.finish(model, step)
    }

    /// Under `adapted/`: with fast weights that have learned the very answers, under the mask of training; a model as it is
    /// generated with is never that good. Under `plain/` without fast weights, causal, as the validation loss is.
    fn measure(&self, model: &Decoder, held_out: HeldOut<'_>) -> Result<Vec<(String, f64)>, TrainError> {
        let plain = model.valid();
        // Dropout would depend on what was drawn last.
        let learning = model.clone().with_dropout(0.0).with_embedding_dropout(None);
        let (mut sums, mut first) = (Evaluated::default(), FastWeights::default());
        for position in 0..held_out.count {
            let batch = held_out.batches.batch(position)?;
            // Counted from the other end, so that no batch of training draws the same.
            let fresh = self.config.fresh(model, held_out.seed, u64::MAX - position)?;
            let adapted = adapt(&learning, &batch, &self.config, fresh);
            let mask = batch.mask(self.config.context_mask);
            sums.add(plain.evaluate_pass(&batch, Pass { adapters: &adapted.last().0, ..Pass::new(&mask) }));
            if position == 0 {
                first = adapted.last().clone();
            }
        }
        let mut measured = vec![
            ("adapted/validation_loss".to_owned(), sums.mean_loss()),
            ("adapted/validation_accuracy".to_owned(), sums.accuracy()),
        ];
        let of = |prefix, context, fast| engagement::of_first_batch(prefix, model, held_out, context, fast);
        measured.extend(of("adapted", self.config.context_mask, &first.0)?);
        measured.extend(of("plain", ContextMask::Causal, &[])?);
        Ok(measured)
    }

    fn optimizer(&self) -> &Optimizer {
        &self.updater.optimizer
    }
}

#[cfg(test)]
mod tests;
