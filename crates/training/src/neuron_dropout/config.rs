//! Settings.

use polyhead_models::{ConfigError, ContextMask, DecoderConfig, MlpKind, broken, require};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::TrainingConfig;
use polyhead_evaluation::ees::EesConfig;
use polyhead_evaluation::sensitivity::{Embedding, Pool};

/// What is wrong with counting epochs of generated data.
pub const NO_EPOCHS: &str = "unit \"epochs\": generated data has no epochs; set unit = \"steps\"";

/// More batches than any epoch of a text has: generated data comes without end.
const ENDLESS: u64 = 1 << 32;

/// `[procedure.neuron_dropout]`: SenD. Defaults are the paper's unless they say otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NeuronDropoutConfig {
    /// The layer whose output is watched and masked, from 0; negative ones count from the end. Default: -2, the last but one.
    pub layer: i64,
    /// Share of the layer's coordinates that is dropped, at least one of them. Default: 0.2 (the paper's for 1B parameters; 0.3 for 8B).
    pub k: f64,
    /// Measurements that V looks back over. Default: 3.
    pub window: usize,
    /// Length of an interval, at whose end is measured, in units. Default: 100 (chosen by us; the paper's is one epoch).
    pub interval: u64,
    /// "steps" (default, ours) or "epochs" (the paper's).
    pub unit: Unit,
    /// Intervals between two choices of what is dropped. Default: 3.
    pub refresh: u64,
    /// How a text becomes one vector: "mean_last" (default), "last", "second_last" (as published).
    pub embedding: Embedding,
    /// How texts are put together: "mean_v" (default, chosen by us) or "v_of_mean".
    pub pool: Pool,
    /// What is dropped: "sensitive" (default); for comparison "random" (as many, drawn anew at each choice),
    /// "variance_matched" (others of nearly the same variance across texts), "dropout" (ordinary dropout at rate k in the
    /// same place) or "none" (measure only).
    pub select: Select,
    /// "activation" (default): outputs are masked. "weights_compat": as the authors' code, which sets weights of
    /// feed-forward neurons with these indices to 0 at the start of every interval.
    pub mode: Mode,
    /// Mask when validating, generating and evaluating too; not with select "dropout" or "none", which leave no mask. Never
    /// when measuring. Default: false.
    pub mask_at_eval: bool,
    /// What tokens of a conversation see of their own turn of context, while training: "causal" (default) or
    /// "bidirectional".
    pub context_mask: ContextMask,
    /// Share of the text kept out of training to be tracked. Default: 0.1, as published.
    pub tracking_fraction: f64,
    /// Texts that are tracked at most, each up to training.seq_len tokens. Default: 32 (chosen by us).
    pub tracking_texts: usize,
    /// With delta: the run ends early, and for good, once the mean loss of an interval is below this and EES below delta. Default: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epsilon: Option<f64>,
    /// See epsilon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<f64>,
    /// How EES is computed with every measurement.
    pub ees: EesConfig,
    /// Tracked texts whose beginnings (up to the first answer; of plain text, the first half) are continued to compute EES
    /// over the continuations; 0 (default) computes it over the
    /// texts themselves, without sampling.
    pub ees_prompts: usize,
    /// Continuations of each. Default: 10, as published.
    pub ees_samples: usize,
    /// Tokens of each continuation. Default: 32 (published: 128).
    pub ees_new_tokens: usize,
}

impl Default for NeuronDropoutConfig {
    fn default() -> Self {
        Self {
            layer: -2,
            k: 0.2,
            window: 3,
            interval: 100,
            unit: Unit::Steps,
            refresh: 3,
            embedding: Embedding::MeanLast,
            pool: Pool::MeanV,
            select: Select::Sensitive,
            mode: Mode::Activation,
            mask_at_eval: false,
            context_mask: ContextMask::Causal,
            tracking_fraction: 0.1,
            tracking_texts: 32,
            epsilon: None,
            delta: None,
            ees: EesConfig::default(),
            ees_prompts: 0,
            ees_samples: 10,
            ees_new_tokens: 32,
        }
    }
}

/// What intervals are counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Steps of the optimiser.
    #[default]
    Steps,
    /// Passes through the training text.
    Epochs,
}

/// What is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Select {
    /// What moved most.
    #[default]
    Sensitive,
    /// As many at random.
    Random,
    /// As many others of nearly the same variance across texts.
    VarianceMatched,
    /// Single numbers at the same rate (ordinary dropout).
    Dropout,
    /// Nothing.
    None,
}

impl Select {
    /// As it is written in a recipe.
    fn name(self) -> &'static str {
        match self {
            Self::Sensitive => "sensitive",
            Self::Random => "random",
            Self::VarianceMatched => "variance_matched",
            Self::Dropout => "dropout",
            Self::None => "none",
        }
    }
}

/// Where is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Coordinates of the layer's output.
    #[default]
    Activation,
    /// Feed-forward neurons of the layer, by their weights, as the authors' code does: it takes an index into the output
    /// for a number of a neuron, ranks across texts, and lets the optimiser move the weights again.
    WeightsCompat,
}

impl NeuronDropoutConfig {
    /// Checks the settings, against a run, and against a model where it is known: all that is wrong.
    pub fn validate(&self, decoder: Option<&DecoderConfig>, training: &TrainingConfig) -> Vec<ConfigError> {
        let mut problems = Vec::new();
        let mut rule = |holds: bool, field: &str, problem: String| {
            problems.extend(require(holds, field, || problem).err());
        };
        let Self { k, window, interval, refresh, tracking_fraction, tracking_texts, .. } = *self;
        let select = self.select.name();
        rule((0.0..=0.9).contains(&k), "k", format!("k ({k}) must be 0 to 0.9"));
        rule(self.select != Select::VarianceMatched || k <= 0.5 || k > 0.9, "k", {
            format!("k ({k}) must be at most 0.5 with select = \"{select}\", which drops as many others as were chosen")
        });
        rule((2..=1000).contains(&window), "window", format!("window ({window}) must be 2 to 1000"));
        rule(interval >= 1, "interval", format!("interval ({interval}) must be at least 1"));
        rule(refresh >= 1, "refresh", format!("refresh ({refresh}) must be at least 1"));
        rule((1e-9..=0.5).contains(&tracking_fraction), "tracking_fraction", {
            format!("tracking_fraction ({tracking_fraction}) must be above 0, up to 0.5")
        });
        rule((1..=100_000).contains(&tracking_texts), "tracking_texts", {
            format!("tracking_texts ({tracking_texts}) must be 1 to 100000")
        });
        let (least, why) = self.least_texts();
        rule(tracking_texts >= least || tracking_texts == 0, "tracking_texts", {
            format!("tracking_texts ({tracking_texts}) must be at least {least}: {why}")
        });
        let no_mlp = decoder.is_some_and(|decoder| decoder.mlp == MlpKind::Identity);
        rule(!no_mlp || self.mode != Mode::WeightsCompat, "mode", {
            "mode = \"weights_compat\" sets weights of a feed-forward layer to 0, and model.decoder.mlp = \"identity\" has none"
                .into()
        });
        rule(self.epsilon.is_some() == self.delta.is_some(), "epsilon", {
            "epsilon and delta belong together: give both or neither".into()
        });
        rule(self.ees_prompts <= tracking_texts, "ees_prompts", {
            format!("ees_prompts ({}) must be at most tracking_texts ({tracking_texts})", self.ees_prompts)
        });
        rule((2..=1000).contains(&self.ees_samples), "ees_samples", {
            format!("ees_samples ({}) must be 2 to 1000", self.ees_samples)
        });
        rule(self.ees_new_tokens >= 1, "ees_new_tokens", "ees_new_tokens (0) must be at least 1".into());
        rule(self.mode == Mode::Activation || self.select != Select::Dropout, "select", {
            "select \"dropout\" drops outputs, not weights: set mode = \"activation\"".into()
        });
        let masks = self.mode == Mode::Activation && !matches!(self.select, Select::Dropout | Select::None);
        rule(masks || !self.mask_at_eval, "mask_at_eval", {
            let (key, value) = match self.mode {
                Mode::Activation => ("select", select),
                Mode::WeightsCompat => ("mode", "weights_compat"),
            };
            format!("mask_at_eval keeps the last mask, which {key} = \"{value}\" has none of: leave it out")
        });
        problems.extend(self.ees.validate().into_iter().map(|error| error.within("ees")));
        if problems.is_empty() && self.unit == Unit::Steps {
            problems.extend(self.drops_in_time(interval, training.steps, "steps").err());
        }
        problems.extend(decoder.into_iter().flat_map(|decoder| self.problems_of(decoder)));
        problems
    }

    /// What does not fit a model.
    fn problems_of(&self, decoder: &DecoderConfig) -> Vec<ConfigError> {
        let (layers, layer) = (decoder.n_layers as i64, self.layer);
        let (d_model, d_ff) = (decoder.d_model, decoder.feed_forward());
        let (k, least) = (self.k, (1e4 / d_model.max(1) as f64).ceil() / 1e4);
        let rules = [
            ((-layers..layers).contains(&layer), "layer", {
                format!("layer ({layer}) must be {} to {} for n_layers ({layers})", -layers, layers - 1)
            }),
            (self.mode == Mode::Activation || d_ff >= d_model, "mode", {
                format!("mode \"weights_compat\" takes indices below d_model ({d_model}) for neurons of d_ff ({d_ff})")
            }),
            (self.count(d_model) >= 1 || !(0.0..=0.9).contains(&k), "k", {
                format!("k ({k}) of d_model ({d_model}) is less than one coordinate: make it at least {least}")
            }),
        ];
        broken(rules)
    }

    /// How many texts the settings ask for, and what for.
    pub(super) fn least_texts(&self) -> (usize, &'static str) {
        match self {
            Self { mode: Mode::WeightsCompat, .. } => (3, "mode \"weights_compat\" ranks by how texts differ"),
            Self { select: Select::VarianceMatched, .. } => {
                (2, "select \"variance_matched\" takes the variance across texts")
            }
            Self { ees_prompts: 0, .. } => {
                (2, "EES is taken across texts, unless ees_prompts has some of them continued")
            }
            _ => (1, "there must be something to watch"),
        }
    }

    /// Whether anything is ever dropped in a run of `length` steps or batches, with intervals of `period`.
    fn drops_in_time(&self, period: u64, length: u64, what: &str) -> Result<(), ConfigError> {
        let Self { window, refresh, interval, .. } = *self;
        let first = (window as u64).checked_next_multiple_of(refresh).unwrap_or(u64::MAX);
        let chosen = first.saturating_mul(period);
        if self.select == Select::None || chosen < length {
            return Ok(());
        }
        let problem = format!(
            "window ({window}): what is dropped is first chosen at measurement {first} (refresh is {refresh}), after \
             {chosen} {what}, and the run has {length}, so that nothing is ever dropped: make interval ({interval}) shorter, \
             give more training.steps, or only measure with select = \"none\""
        );
        Err(ConfigError::new("window", problem))
    }

    /// The layer, from 0.
    pub fn layer_of(&self, n_layers: usize) -> usize {
        let counted = if self.layer < 0 { n_layers as i64 + self.layer } else { self.layer };
        counted.max(0) as usize
    }

    /// How many coordinates are dropped, rounded down as published.
    pub fn count(&self, d_model: usize) -> usize {
        (self.k * d_model as f64) as usize
    }

    /// Steps or batches of an interval.
    ///
    /// # Errors
    /// If epochs are counted that never end, or too long for anything to be dropped.
    pub(super) fn period(&self, batches_per_epoch: u64, training: &TrainingConfig) -> Result<u64, ConfigError> {
        match self.unit {
            Unit::Steps => Ok(self.interval),
            Unit::Epochs if batches_per_epoch >= ENDLESS => Err(ConfigError::new("unit", NO_EPOCHS)),
            Unit::Epochs => {
                let period = self.interval.saturating_mul(batches_per_epoch.max(1));
                let batches = training.steps.saturating_mul(training.gradient_accumulation_steps as u64);
                self.drops_in_time(period, batches, "batches").map(|()| period)
            }
        }
    }
}
