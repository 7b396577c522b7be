//! The settings of a run: the tables of a recipe.

use std::path::{Path, PathBuf};

use polyhead_data::{AugmentConfig, DataConfig, Packing, TokenizerConfig};
use polyhead_models::adapters::LoraConfig;
use polyhead_models::intervention::InterventionConfig;
use polyhead_models::mup::{Mup, Parametrization};
use polyhead_models::weights::FrozenDtype;
use polyhead_models::{
    ClassifierConfig, DecoderConfig, EmbedderConfig, LossConfig, RopeScaling, Sampling, SuperResolutionConfig,
};
use polyhead_training::config::{
    CheckpointConfig, DebugConfig, LrSchedulerConfig, MetricsConfig, OptimizerConfig, ParallelConfig, TrainingConfig,
    ValidationConfig,
};
use polyhead_training::{FreezeConfig, ProcedureConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One complete run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The model to train.
    pub model: ModelConfig,
    /// How text becomes tokens; not used by generated data. Default: that of model.pretrained, else bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<TokenizerConfig>,
    /// The training data.
    pub data: DataConfig,
    /// How tokens become rows.
    #[serde(default)]
    pub loader: LoaderConfig,
    /// Changes to images while a classifier is trained on them. Default: nothing.
    #[serde(default, skip_serializing_if = "AugmentConfig::is_nothing")]
    pub augmentation: AugmentConfig,
    /// Steps, batch size, precision and device.
    pub training: TrainingConfig,
    /// Training on several ranks. Default: one.
    #[serde(default, skip_serializing_if = "ParallelConfig::is_default")]
    pub parallel: ParallelConfig,
    /// The loss of a classifier. Default: cross-entropy.
    #[serde(default, skip_serializing_if = "LossConfig::is_plain")]
    pub loss: LossConfig,
    /// What a training step does. Default: standard.
    #[serde(default)]
    pub procedure: ProcedureConfig,
    /// Frozen layers and parameters. Default: none.
    #[serde(default)]
    pub freeze: FreezeConfig,
    /// Train low-rank pairs beside projections, and nothing else. Default: all weights are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// Changes to the decoder's forward on its way, while it is trained and wherever it is used. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intervention: Option<InterventionConfig>,
    /// Optimizer settings. Default: adamw.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// The learning rate over the steps.
    #[serde(default)]
    pub lr_scheduler: LrSchedulerConfig,
    /// Evaluation on held-out data.
    #[serde(default)]
    pub validation: ValidationConfig,
    /// When checkpoints are saved, and how many are kept.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// Logging: what, and how often.
    #[serde(default)]
    pub metrics: MetricsConfig,
    /// The sample of text at the end.
    #[serde(default)]
    pub generation: GenerationConfig,
    /// Randomness.
    #[serde(default)]
    pub debug: DebugConfig,
}

impl Recipe {
    /// Whether the weights that a run begins with stay as they are: what it trains is beside them.
    pub fn keeps_weights(&self) -> bool {
        let Self { lora, intervention, procedure, .. } = self;
        let beside = lora.is_some() || intervention.as_ref().is_some_and(|own| !own.train.is_empty());
        // Fusing changes weights beside what it trains.
        let whole = lora.as_ref().is_none_or(|lora| lora.train_whole.is_empty());
        beside && whole && !matches!(procedure, ProcedureConfig::Fusion(_))
    }
}

/// `[model]`: one kind of model, with fresh weights or those of a trained one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "ModelTables", into = "ModelTables")]
#[allow(clippy::large_enum_variant)] // a recipe has one
pub enum ModelConfig {
    /// A decoder language model.
    Decoder {
        /// Where its first weights come from.
        pretrained: Option<PathBuf>,
        /// What it is; `None` until the folder of the weights has been read.
        config: Option<DecoderConfig>,
        /// How initial weights and learning rates depend on the width; `None` where they do not.
        mup: Option<Mup>,
        /// How rotary frequencies are stretched from here on; `None` where they stay as they were trained.
        rope_scaling: Option<RopeScaling>,
        /// The type in which weights are kept that are not trained.
        pretrained_dtype: FrozenDtype,
    },
    /// A classifier.
    Classifier {
        /// Where its first weights come from.
        pretrained: Option<PathBuf>,
        /// What it is.
        config: ClassifierConfig,
    },
    /// An embedder of texts.
    Embedder(EmbedderConfig),
    /// A network that enlarges images.
    SuperResolution(SuperResolutionConfig),
}

/// `[model]` as it is written.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ModelTables {
    /// Start from these weights: a run folder, a checkpoint, or a folder in Hugging Face's format. The model's settings and
    /// its tokenizer come from there too; model.decoder beside it, as in the recipe that a run keeps, has to say the same.
    /// With model.classifier, which has to say the same as the recipe of a trained classifier: its weights; where the classes are
    /// others, the head is newly initialized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pretrained: Option<PathBuf>,
    /// With model.pretrained: stretch the decoder's rotary frequencies from here on, for a longer context, as `linear = { factor = 4.0 }`
    /// does by dividing all positions. Default: they stay as they were trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rope_scaling: Option<RopeScaling>,
    /// With model.pretrained, where its weights stay as they are (lora, intervention.train): the type in which those of products
    /// are kept. Products compute in f32 whatever it is, and bf16 takes half of the memory. "file" (default): bf16 where the folder
    /// has bf16, which changes no number; "f32"; "bf16": rounded to the nearest.
    #[serde(default, skip_serializing_if = "is_as_in_file")]
    pretrained_dtype: FrozenDtype,
    /// How initial weights and learning rates of a decoder depend on its width: "standard" (default): they do not; "mup": by the
    /// maximal update parametrization, in which the best learning rate is the same at every width.
    #[serde(default, skip_serializing_if = "is_standard")]
    parametrization: Parametrization,
    /// With parametrization = "mup": the d_model at which it is the plain model, where learning rates are sought.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base_width: Option<usize>,
    /// With parametrization = "mup": the channels of a head at base_width, where wider models have wider heads. Default: those of
    /// this model, as where wider models have more heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base_head_dim: Option<usize>,
    /// A decoder language model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    decoder: Option<DecoderConfig>,
    /// A classifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    classifier: Option<ClassifierConfig>,
    /// An embedder of texts, over the features of a decoder that stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    embedder: Option<EmbedderConfig>,
    /// A network that enlarges images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    super_resolution: Option<SuperResolutionConfig>,
}

fn is_as_in_file(dtype: &FrozenDtype) -> bool {
    *dtype == FrozenDtype::File
}

fn is_standard(parametrization: &Parametrization) -> bool {
    *parametrization == Parametrization::Standard
}

impl ModelTables {
    /// What the model is scaled from, where it is.
    fn mup(&self) -> Result<Option<Mup>, &'static str> {
        let Self { parametrization, base_width, base_head_dim, .. } = self;
        let Self { classifier, embedder, super_resolution, .. } = self;
        match (parametrization, *base_width) {
            (Parametrization::Mup, _) if classifier.is_some() || embedder.is_some() || super_resolution.is_some() => {
                Err("model.parametrization = \"mup\" is for model.decoder: leave it out")
            }
            (Parametrization::Mup, None) => {
                Err("model.parametrization = \"mup\" takes model.base_width, the d_model at which the \
                                                 learning rate was found")
            }
            (Parametrization::Mup, Some(base_width)) => Ok(Some(Mup { base_width, base_head_dim: *base_head_dim })),
            (Parametrization::Standard, None) if base_head_dim.is_none() => Ok(None),
            (Parametrization::Standard, _) => Err(
                "model.base_width and model.base_head_dim are for model.parametrization = \"mup\": leave them out, or set it",
            ),
        }
    }
}

impl TryFrom<ModelTables> for ModelConfig {
    type Error = &'static str;

    fn try_from(tables: ModelTables) -> Result<Self, Self::Error> {
        let (mup, rope_scaling) = (tables.mup()?, tables.rope_scaling);
        if rope_scaling.is_some() && (tables.pretrained.is_none() || tables.classifier.is_some()) {
            return Err(
                "model.rope_scaling is for a decoder in model.pretrained: a fresh one has model.decoder.rope_scaling",
            );
        }
        let pretrained_dtype = tables.pretrained_dtype;
        if !is_as_in_file(&pretrained_dtype) && (tables.pretrained.is_none() || tables.classifier.is_some()) {
            return Err("model.pretrained_dtype is for a decoder in model.pretrained: leave it out");
        }
        let ModelTables { pretrained, decoder, classifier, embedder, super_resolution, .. } = tables;
        match (pretrained, decoder, classifier, embedder, super_resolution) {
            (None, None, None, None, None) => {
                Err("model is empty: describe a fresh one in model.decoder, model.classifier, model.embedder or \
                 model.super_resolution, or name a folder with trained weights in model.pretrained")
            }
            (pretrained, config, None, None, None) => {
                Ok(Self::Decoder { pretrained, config, mup, rope_scaling, pretrained_dtype })
            }
            (pretrained, None, Some(config), None, None) => Ok(Self::Classifier { pretrained, config }),
            (None, None, None, Some(config), None) => Ok(Self::Embedder(config)),
            (None, None, None, None, Some(config)) => Ok(Self::SuperResolution(config)),
            (_, _, _, _, Some(_)) => Err("model.super_resolution stands alone: it begins with fresh weights"),
            (_, _, Some(_), _, _) => {
                Err("model.decoder and model.embedder cannot stand beside model.classifier: choose one")
            }
            _ => {
                Err("model.embedder stands alone: it reads the features of another model, made by `polyhead features`")
            }
        }
    }
}

impl From<ModelConfig> for ModelTables {
    fn from(model: ModelConfig) -> Self {
        match model {
            ModelConfig::Decoder { pretrained, config, mup, rope_scaling, pretrained_dtype } => Self {
                pretrained,
                pretrained_dtype,
                rope_scaling,
                decoder: config,
                parametrization: if mup.is_some() { Parametrization::Mup } else { Parametrization::Standard },
                base_width: mup.map(|mup| mup.base_width),
                base_head_dim: mup.and_then(|mup| mup.base_head_dim),
                ..Self::default()
            },
            ModelConfig::Classifier { pretrained, config } => {
                Self { pretrained, classifier: Some(config), ..Self::default() }
            }
            ModelConfig::Embedder(config) => Self { embedder: Some(config), ..Self::default() },
            ModelConfig::SuperResolution(config) => Self { super_resolution: Some(config), ..Self::default() },
        }
    }
}

impl ModelConfig {
    /// A decoder whose weights are at hand.
    pub fn decoder_of(config: DecoderConfig) -> Self {
        Self::Decoder {
            pretrained: None,
            config: Some(config),
            mup: None,
            rope_scaling: None,
            pretrained_dtype: FrozenDtype::default(),
        }
    }

    /// The settings of a decoder, where they are known.
    pub fn decoder(&self) -> Option<&DecoderConfig> {
        match self {
            Self::Decoder { config, .. } => config.as_ref(),
            _ => None,
        }
    }

    /// How initial weights and learning rates depend on the width, where they do.
    pub fn mup(&self) -> Option<Mup> {
        match self {
            Self::Decoder { mup, .. } => *mup,
            _ => None,
        }
    }

    /// How the rotary frequencies of a decoder are stretched from here on, where they are.
    pub fn rope_scaling(&self) -> Option<RopeScaling> {
        match self {
            Self::Decoder { rope_scaling, .. } => *rope_scaling,
            _ => None,
        }
    }

    /// The type in which weights are kept that are not trained.
    pub fn pretrained_dtype(&self) -> FrozenDtype {
        match self {
            Self::Decoder { pretrained_dtype, .. } => *pretrained_dtype,
            _ => FrozenDtype::F32,
        }
    }

    /// Where the first weights come from, where they are not drawn.
    pub fn pretrained(&self) -> Option<&Path> {
        match self {
            Self::Decoder { pretrained, .. } | Self::Classifier { pretrained, .. } => pretrained.as_deref(),
            Self::Embedder(_) | Self::SuperResolution(_) => None,
        }
    }

    /// Layers, where they are known.
    pub fn n_layers(&self) -> Option<usize> {
        match self {
            Self::Decoder { config, .. } => config.as_ref().map(|config| config.n_layers),
            Self::Classifier { config, .. } => Some(config.n_layers()),
            Self::SuperResolution(config) => Some(config.n_layers),
            Self::Embedder(_) => None,
        }
    }
}

/// `[loader]`: how tokens become rows.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoaderConfig {
    /// "stream" (default): documents follow each other; "documents": attention stays inside each document.
    pub packing: Packing,
}

/// `[generation]`: the sample of text at the end of a run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GenerationConfig {
    /// What the sample starts with; of a model that learns conversations, what a user says. Default: the end-of-text token; "Hello!".
    pub prompt: String,
    /// How tokens are chosen.
    pub sampling: Sampling,
}
