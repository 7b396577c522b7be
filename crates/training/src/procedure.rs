//! The seam between the loop and what one step does.
//!
//! A procedure is a file with its settings and its step, a variant of [`ProcedureConfig`] and an arm where a [`Trainee`]
//! makes them. Most are for decoders only; what a step of the others does is [`Standard`].

use polyhead_models::{Classifier, ContextMask, Decoder, DecoderConfig, Embedder, Gate, Trainable};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::bilevel::{Bilevel, BilevelConfig};
use crate::config::TrainingConfig;
use crate::engagement;
use crate::evaluate::Batches;
use crate::fusion::{Fusion, FusionConfig};
use crate::neuron_dropout::{NeuronDropout, NeuronDropoutConfig};
use crate::optimizer::Optimizer;
use crate::picture::Png;
use crate::standard::{Standard, StandardConfig};

/// `[procedure]`: one of its tables, what a step of training does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProcedureConfig {
    /// Forward, backward, update.
    Standard(StandardConfig),
    /// FocuSFT: fast weights are adapted to each batch first, then thrown away (arXiv 2605.09932).
    Bilevel(BilevelConfig),
    /// Decoupled-Head Attention: the heads of each group are led together (arXiv 2406.06567).
    Fusion(FusionConfig),
    /// SenD: what moves most in a layer's output is dropped for a while.
    NeuronDropout(Box<NeuronDropoutConfig>),
}

impl Default for ProcedureConfig {
    fn default() -> Self {
        Self::Standard(StandardConfig::default())
    }
}

impl ProcedureConfig {
    /// Checks the numbers, against a run, and against a model where it is known: the fields, from the name of the table on,
    /// with the rules that they break.
    pub fn validate(&self, decoder: Option<&DecoderConfig>, training: &TrainingConfig) -> Vec<(String, String)> {
        let named = |(field, problem): (&str, String)| (field.to_owned(), problem);
        let problems: Vec<(String, String)> = match self {
            Self::Standard(_) => Vec::new(),
            Self::Bilevel(config) => config.validate().map_err(named).err().into_iter().collect(),
            Self::Fusion(config) => config.validate(decoder).err().into_iter().collect(),
            Self::NeuronDropout(config) => config.validate(decoder, training).into_iter().map(named).collect(),
        };
        problems.into_iter().map(|(field, problem)| (format!("{}.{field}", self.name()), problem)).collect()
    }

    /// The name of its table.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Standard(_) => "standard",
            Self::Bilevel(_) => "bilevel",
            Self::Fusion(_) => "fusion",
            Self::NeuronDropout(_) => "neuron_dropout",
        }
    }

    /// The share of the text, and the most texts, that are to be kept out of training to watch the model on.
    pub fn tracking(&self) -> Option<(f64, usize)> {
        match self {
            Self::Standard(_) | Self::Bilevel(_) | Self::Fusion(_) => None,
            Self::NeuronDropout(config) => Some((config.tracking_fraction, config.tracking_texts)),
        }
    }

    /// What stands between the layers of a trained model when it is used; `state` is its checkpoint's.
    ///
    /// # Errors
    /// If the state is not one of this procedure's.
    pub fn gate_at_eval(&self, state: &serde_json::Value, model: &Decoder) -> Result<Option<Gate>, TrainError> {
        match self {
            Self::Standard(_) | Self::Bilevel(_) | Self::Fusion(_) => Ok(None),
            Self::NeuronDropout(config) => config.gate_at_eval(state, model),
        }
    }
}

/// A model that there are procedures for.
pub trait Trainee: Trainable {
    /// The procedure, with `state` as [`Procedure::state`] gave it where a run is resumed. Plain training, where a kind of
    /// model has no other.
    ///
    /// # Errors
    /// If there is no such procedure for this kind of model, settings do not fit it or the data, or the state is not one of
    /// this procedure's.
    fn procedure(
        config: &ProcedureConfig,
        parts: Parts<'_, Self>,
        state: &serde_json::Value,
    ) -> Result<Box<dyn Procedure<Self>>, TrainError> {
        let _ = state;
        match config {
            ProcedureConfig::Standard(config) => Ok(Box::new(Standard::new(config, parts.optimizer, parts.training))),
            other => {
                let problem =
                    format!("procedure.{} is for decoders; other models are trained by standard", other.name());
                Err(TrainError::Setting(problem))
            }
        }
    }

    /// What plain training measures of attention with each validation, under names that begin with `prefix`.
    ///
    /// # Errors
    /// If the data cannot be read.
    fn engagement(
        &self,
        prefix: &str,
        held_out: HeldOut<'_, Self>,
        context: ContextMask,
    ) -> Result<Vec<(String, f64)>, TrainError> {
        let _ = (prefix, held_out, context);
        Ok(Vec::new())
    }
}

impl Trainee for Decoder {
    fn procedure(
        config: &ProcedureConfig,
        parts: Parts<'_>,
        state: &serde_json::Value,
    ) -> Result<Box<dyn Procedure>, TrainError> {
        match config {
            ProcedureConfig::Standard(config) => Ok(Box::new(Standard::new(config, parts.optimizer, parts.training))),
            ProcedureConfig::Bilevel(config) => {
                Ok(Box::new(Bilevel::new(config.clone(), parts.optimizer, parts.training)))
            }
            ProcedureConfig::Fusion(config) => Ok(Box::new(Fusion::new(config.clone(), parts, state)?)),
            ProcedureConfig::NeuronDropout(config) => {
                Ok(Box::new(NeuronDropout::new((**config).clone(), parts, state)?))
            }
        }
    }

    fn engagement(
        &self,
        prefix: &str,
        held_out: HeldOut<'_>,
        context: ContextMask,
    ) -> Result<Vec<(String, f64)>, TrainError> {
        engagement::of_first_batch(prefix, self, held_out, context, &[])
    }
}

impl Trainee for Classifier {}
impl Trainee for Embedder {}

/// What a procedure is made of.
pub struct Parts<'a, M: Trainable = Decoder> {
    /// Fresh, or with the state of an earlier session.
    pub optimizer: Optimizer,
    /// The loop's settings.
    pub training: &'a TrainingConfig,
    /// The model before the next step.
    pub model: &'a M,
    /// Texts that are kept out of training, a row each, for procedures that watch the model on some.
    pub tracking: &'a [M::Batch],
    /// Batches until everything has been learned from once.
    pub batches_per_epoch: u64,
}

/// One step of training: forward, backward, update.
pub trait Procedure<M: Trainable = Decoder> {
    /// The model after a step over `batches` (one per forward pass).
    ///
    /// # Errors
    /// If the model or the data does not fit the procedure.
    fn step(&mut self, model: M, batches: &[M::Batch], context: &StepContext) -> Result<(M, StepReport), TrainError>;

    /// The optimiser, whose state goes into checkpoints.
    fn optimizer(&self) -> &Optimizer;

    /// Whatever beyond model and optimiser must survive a restart. Asked for when the run is saved.
    fn state(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// What is measured with each validation beside the loss of the plain, causal model: names and values.
    ///
    /// # Errors
    /// If the data cannot be read, or the model does not fit the procedure.
    fn measure(&self, model: &M, held_out: HeldOut<'_, M>) -> Result<Vec<(String, f64)>, TrainError> {
        let _ = (model, held_out);
        Ok(Vec::new())
    }

    /// Why the run has ended before its last step, in words, where it has.
    fn ended(&self) -> Option<String> {
        None
    }
}

/// What a procedure may measure with.
pub struct HeldOut<'a, M: Trainable = Decoder> {
    /// The batches.
    pub batches: &'a dyn Batches<M::Batch>,
    /// How many of them were validated on, from the first on.
    pub count: u64,
    /// The run's seed.
    pub seed: u64,
    /// Whether attention is looked at too.
    pub observe: bool,
}

// Derived, these would ask the model to be `Copy`.
impl<M: Trainable> Clone for HeldOut<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M: Trainable> Copy for HeldOut<'_, M> {}

/// What a procedure is told about a step.
#[derive(Debug, Clone, Copy)]
pub struct StepContext {
    /// The step, from 1.
    pub step: u64,
    /// The learning rate.
    pub lr: f64,
    /// The run's seed: what a procedure draws is a function of it and the position.
    pub seed: u64,
    /// Where in the data the step's first batch stands.
    pub position: u64,
}

/// What a step tells.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepReport {
    /// Mean cross-entropy in nats over the step's targets, before the update.
    pub loss: f64,
    /// Mean auxiliary loss, where the mechanism has one.
    pub penalty: Option<f64>,
    /// Global norm of the gradients, before clipping.
    pub grad_norm: f64,
    /// Targets of the step.
    pub targets: u64,
    /// Whether the step was left out because something was not finite.
    pub skipped: bool,
    /// Whether it is to end the run besides: then nothing of the procedure has moved either.
    pub refused: bool,
    /// Further numbers of the procedure, by their names in the logs: `bilevel/inner_loss`, ...
    pub measured: Vec<(String, f64)>,
    /// Further things to see, by their names in TensorBoard.
    pub shown: Vec<(String, Shown)>,
    /// Write this step to the logs, whatever the interval.
    pub log: bool,
}

/// What TensorBoard shows besides numbers.
#[derive(Debug, Clone, PartialEq)]
pub enum Shown {
    /// The spread of these values.
    Histogram(Vec<f32>),
    /// A picture.
    Picture(Png),
}
