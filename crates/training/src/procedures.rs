//! The procedures there are.
//!
//! A procedure is a file with its settings and its step, a variant of [`ProcedureConfig`] and an arm where a [`TrainableModel`]
//! makes them. Most are for decoders only; what a step of the others does is [`Standard`].

use polyhead_attention::AttentionConfig;
use polyhead_models::{
    Classifier, ConfigError, ContextMask, Decoder, DecoderConfig, Embedder, Gate, SuperResolution, require,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::attention_shifting::{AttentionShifting, AttentionShiftingConfig};
use crate::bilevel::{Bilevel, BilevelConfig};
use crate::boundaries::{Boundaries, BoundariesConfig};
use crate::config::TrainingConfig;
use crate::engagement::WatchesAttention;
use crate::fusion::{Fusion, FusionConfig};
use crate::neuron_dropout::{NeuronDropout, NeuronDropoutConfig};
use crate::procedure::{Parts, Procedure};
use crate::standard::{Standard, StandardConfig};

/// `[procedure]`: one of its tables, what a step of training does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProcedureConfig {
    /// Forward, backward, update.
    Standard(StandardConfig),
    /// FocuSFT: fast weights are adapted to each batch first, then thrown away (arXiv 2605.09932).
    Bilevel(BilevelConfig),
    /// Decoupled-Head Attention: the heads of each group are fused (arXiv 2406.06567).
    Fusion(FusionConfig),
    /// DHSA: a predictor of the boundaries of chunks is trained for the keys of a model that stays as it is (arXiv 2510.24606).
    Boundaries(BoundariesConfig),
    /// SenD: the most sensitive hidden units of a layer are dropped for a while.
    NeuronDropout(Box<NeuronDropoutConfig>),
    /// Unlearning: attention to what matters in some texts is shifted away (arXiv 2510.17210).
    AttentionShifting(AttentionShiftingConfig),
}

impl Default for ProcedureConfig {
    fn default() -> Self {
        Self::Standard(StandardConfig::default())
    }
}

impl ProcedureConfig {
    /// Checks the numbers, against a run, and against a model where it is known: the fields, from the name of the table on,
    /// with the rules that they break.
    pub fn validate(&self, decoder: Option<&DecoderConfig>, training: &TrainingConfig) -> Vec<ConfigError> {
        let mut problems = match self {
            Self::Standard(_) => Vec::new(),
            Self::Bilevel(config) => Vec::from_iter(config.validate().err()),
            Self::Fusion(config) => Vec::from_iter(config.validate(decoder).err()),
            Self::Boundaries(config) => Vec::from_iter(config.validate(decoder, training).err()),
            Self::NeuronDropout(config) => config.validate(decoder, training),
            Self::AttentionShifting(config) => Vec::from_iter(config.validate().err()),
        };
        problems.extend(decoder.and_then(|decoder| self.check_context_mask(decoder).err()));
        problems.into_iter().map(|error| error.within(self.name())).collect()
    }

    /// Refuses layers that read tokens one after the other where those of a turn of context see each other.
    fn check_context_mask(&self, decoder: &DecoderConfig) -> Result<(), ConfigError> {
        let context_mask = match self {
            Self::Standard(config) => config.context_mask,
            Self::Bilevel(config) => config.context_mask,
            Self::NeuronDropout(config) => config.context_mask,
            Self::Fusion(_) | Self::Boundaries(_) | Self::AttentionShifting(_) => ContextMask::Causal,
        };
        let mut mechanisms = decoder.attention.written().iter();
        let ordered = mechanisms.find(|mechanism| mechanism.check_bidirectional().is_err()).map(AttentionConfig::name);
        let ordered = ordered.filter(|_| context_mask == ContextMask::Bidirectional);
        require(ordered.is_none(), "context_mask", || {
            format!(
                "context_mask (\"bidirectional\") lets tokens of a turn see later ones, which {} reads one after the other: take \
                 \"causal\"",
                ordered.unwrap_or_default()
            )
        })
    }

    /// The name of its table.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Standard(_) => "standard",
            Self::Bilevel(_) => "bilevel",
            Self::Fusion(_) => "fusion",
            Self::Boundaries(_) => "boundaries",
            Self::NeuronDropout(_) => "neuron_dropout",
            Self::AttentionShifting(_) => "attention_shifting",
        }
    }

    /// The share of the text, and the most texts, that are to be kept out of training to watch the model on.
    pub fn tracking(&self) -> Option<(f64, usize)> {
        match self {
            Self::Standard(_)
            | Self::Bilevel(_)
            | Self::Fusion(_)
            | Self::Boundaries(_)
            | Self::AttentionShifting(_) => None,
            Self::NeuronDropout(config) => Some((config.tracking_fraction, config.tracking_texts)),
        }
    }

    /// What stands between the layers of a trained model when it is used; `state` is its checkpoint's.
    ///
    /// # Errors
    /// If the state is not one of this procedure's.
    pub fn gate_at_eval(&self, state: &serde_json::Value, model: &Decoder) -> Result<Option<Gate>, TrainError> {
        match self {
            Self::Standard(_)
            | Self::Bilevel(_)
            | Self::Fusion(_)
            | Self::Boundaries(_)
            | Self::AttentionShifting(_) => Ok(None),
            Self::NeuronDropout(config) => config.gate_at_eval(state, model),
        }
    }
}

/// A model that there are procedures for.
pub trait TrainableModel: WatchesAttention {
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
}

impl TrainableModel for Decoder {
    fn procedure(
        config: &ProcedureConfig,
        parts: Parts<'_>,
        state: &serde_json::Value,
    ) -> Result<Box<dyn Procedure>, TrainError> {
        let setting = |error: ConfigError| TrainError::Setting(format!("procedure.{}.{error}", config.name()));
        config.check_context_mask(parts.model.config()).map_err(setting)?;
        match config {
            ProcedureConfig::Standard(config) => Ok(Box::new(Standard::new(config, parts.optimizer, parts.training))),
            ProcedureConfig::Bilevel(config) => {
                Ok(Box::new(Bilevel::new(config.clone(), parts.optimizer, parts.training)))
            }
            ProcedureConfig::Fusion(config) => Ok(Box::new(Fusion::new(config.clone(), parts, state)?)),
            ProcedureConfig::Boundaries(config) => {
                Ok(Box::new(Boundaries::new(config.clone(), parts.optimizer, parts.training)))
            }
            ProcedureConfig::NeuronDropout(config) => {
                Ok(Box::new(NeuronDropout::new((**config).clone(), parts, state)?))
            }
            ProcedureConfig::AttentionShifting(config) => {
                let Parts { optimizer, training, model, .. } = parts;
                Ok(Box::new(AttentionShifting::new(config.clone(), optimizer, training, model)?))
            }
        }
    }
}

impl TrainableModel for Classifier {}
impl TrainableModel for Embedder {}
impl TrainableModel for SuperResolution {}
