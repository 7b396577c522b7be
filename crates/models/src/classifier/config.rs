//! Settings of the bidirectional transformers, and what both come down to.

use polyhead_attention::{AttentionConfig, ConfigError, Dims, GaussianAdaptiveConfig, HiLoConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::MixerConfig;
use crate::decoder::{MlpKind, NormKind, check_sizes};
use crate::{InputShape, PerLayer, PoolingConfig};

/// `[model.classifier.vision_transformer]`: ViT (Dosovitskiy et al. 2020, arXiv 2010.11929).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VisionTransformerConfig {
    /// Side of a patch, in pixels; divides height and width of the pictures.
    pub patch_size: usize,
    /// Channels of the residual stream.
    pub d_model: usize,
    /// Layers.
    pub n_layers: usize,
    /// Channels inside the feed-forward layers. Default: 4 d_model, as in ViT.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub d_ff: Option<usize>,
    /// The kind of norms: "rms" or "layer". Default: "layer", as in ViT.
    #[serde(default = "layer_norm")]
    pub norm: NormKind,
    /// Inside the square root of the norms. Default: 1e-6, as in ViT.
    #[serde(default = "norm_eps")]
    pub norm_eps: f64,
    /// The kind of feed-forward layers: "swiglu" or "gelu". Default: "gelu", as in ViT.
    #[serde(default = "gelu")]
    pub mlp: MlpKind,
    /// What mixes the patches, both ways: one table for all layers, or a list with one per layer. Any mechanism of decoders,
    /// or hilo.
    pub attention: PerLayer<MixerConfig>,
    /// Gaussian adaptive gates on what attention writes in every layer: axis 1 is the patches (behind a class token), 2 the
    /// channels. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_gate: Option<GaussianAdaptiveConfig>,
    /// How patches become one vector: "mean", "class_token", "last_token", or a table, ggem or mltp. Default: "mean".
    #[serde(default = "mean")]
    pub pooling: PoolingConfig,
}

/// `[model.classifier.text_encoder]`: a transformer over tokens that see each other both ways, as BERT's do (Devlin et al.
/// 2018, arXiv 1810.04805), but pre-norm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextEncoderConfig {
    /// Channels of the residual stream.
    pub d_model: usize,
    /// Layers.
    pub n_layers: usize,
    /// Channels inside the feed-forward layers. Default: 4 d_model, as in BERT.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub d_ff: Option<usize>,
    /// The kind of norms: "rms" or "layer". Default: "layer".
    #[serde(default = "layer_norm")]
    pub norm: NormKind,
    /// Inside the square root of the norms. Default: 1e-6.
    #[serde(default = "norm_eps")]
    pub norm_eps: f64,
    /// The kind of feed-forward layers: "swiglu" or "gelu". Default: "gelu".
    #[serde(default = "gelu")]
    pub mlp: MlpKind,
    /// The attention mechanism, both ways: one table for all layers, or a list with one per layer.
    pub attention: PerLayer<AttentionConfig>,
    /// Gaussian adaptive gates on what attention writes in every layer; along the channels, axis = -1. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_gate: Option<GaussianAdaptiveConfig>,
    /// How tokens become one vector: "mean", "class_token", "last_token", or a table, ggem or mltp. Default: "mean".
    #[serde(default = "mean")]
    pub pooling: PoolingConfig,
}

fn layer_norm() -> NormKind {
    NormKind::Layer
}

fn norm_eps() -> f64 {
    1e-6
}

fn gelu() -> MlpKind {
    MlpKind::Gelu
}

fn mean() -> PoolingConfig {
    PoolingConfig::Mean
}

/// What an encoder reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// Patches of `side` x `side` pixels, `grid` of them down and across.
    Patches { channels: usize, side: usize, grid: [usize; 2] },
    /// Token ids.
    Tokens { vocab_size: usize, seq_len: usize },
}

impl Source {
    /// Positions, without a class token.
    pub(super) fn positions(self) -> usize {
        match self {
            Self::Patches { grid: [rows, columns], .. } => rows * columns,
            Self::Tokens { seq_len, .. } => seq_len,
        }
    }
}

/// A bidirectional transformer, whatever it reads.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Blueprint {
    pub source: Source,
    pub d_model: usize,
    pub n_layers: usize,
    pub d_ff: usize,
    pub norm: NormKind,
    pub norm_eps: f64,
    pub mlp: MlpKind,
    pub attention: PerLayer<MixerConfig>,
    pub attention_gate: Option<GaussianAdaptiveConfig>,
    pub pooling: PoolingConfig,
}

impl Blueprint {
    /// Positions and channels, as gates on what attention writes are told.
    pub(super) fn gated(&self) -> [usize; 2] {
        [self.source.positions() + usize::from(self.has_class_token()), self.d_model]
    }

    pub(super) fn dims(&self, layer: usize) -> Dims {
        Dims { d_model: self.d_model, n_layers: self.n_layers, layer, rope: false, norm_eps: self.norm_eps }
    }

    pub(super) fn mixer(&self, layer: usize) -> &MixerConfig {
        self.attention.of_layer(layer).expect("validate: one mechanism per layer")
    }

    pub(super) fn has_class_token(&self) -> bool {
        self.pooling == PoolingConfig::ClassToken
    }

    fn validate(&self) -> Result<(), ConfigError> {
        check_sizes([self.d_model, self.n_layers, self.d_ff])?;
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            let problem = format!("norm_eps ({}) must be a positive number", self.norm_eps);
            return Err(ConfigError::new("norm_eps", problem));
        }
        if let PerLayer::Each(list) = &self.attention
            && list.len() != self.n_layers
        {
            let (listed, n_layers) = (list.len(), self.n_layers);
            let problem = format!("attention lists {listed} mechanisms for n_layers ({n_layers}): give one per layer");
            return Err(ConfigError::new("attention", problem));
        }
        for layer in 0..self.n_layers {
            let table = match &self.attention {
                PerLayer::Same(_) => "attention".to_owned(),
                PerLayer::Each(_) => format!("attention.{layer}"),
            };
            if matches!(self.mixer(layer), MixerConfig::HiLo(_)) && self.has_class_token() {
                let problem = "hilo mixes a grid, in which a class token has no place: choose another pooling";
                return Err(ConfigError::new("pooling", problem));
            }
            self.mixer(layer).validate(&self.dims(layer)).map_err(|error| error.within(&table))?;
        }
        self.pooling.validate(self.d_model).map_err(|error| error.within("pooling"))
    }
}

impl VisionTransformerConfig {
    pub(super) fn validate(&self, input: Option<InputShape>) -> Result<(), ConfigError> {
        if self.patch_size == 0 {
            return Err(ConfigError::new("patch_size", "patch_size (0) must be at least 1"));
        }
        check_sizes([self.d_model, self.n_layers, self.d_ff.unwrap_or(1)])?;
        match input {
            Some(InputShape::Images { height, width, .. }) => {
                let side = self.patch_size;
                if !height.is_multiple_of(side) || !width.is_multiple_of(side) {
                    let problem = format!("patch_size ({side}) must divide the pictures, {height} x {width} pixels");
                    return Err(ConfigError::new("patch_size", problem));
                }
                let (rows, columns) = (height / side, width / side);
                for layer in 0..self.n_layers {
                    let Some(MixerConfig::HiLo(HiLoConfig { window, .. })) = self.attention.of_layer(layer) else {
                        continue;
                    };
                    if *window > rows.max(columns) {
                        let problem =
                            format!("hilo.window ({window}) must not be larger than the {rows} x {columns} patches");
                        return Err(ConfigError::new("attention.hilo.window", problem));
                    }
                }
                if let Some(gate) = &self.attention_gate {
                    let sizes = self.blueprint(InputShape::Images { channels: 1, height, width }).gated();
                    gate.validate(&sizes).map_err(|error| error.within("attention_gate"))?;
                }
            }
            Some(other) => {
                let problem = format!("vision_transformer reads images, and the data is {}", other.kind());
                return Err(ConfigError::new("", problem));
            }
            None => {}
        }
        let any = InputShape::Images { channels: 1, height: self.patch_size, width: self.patch_size };
        self.blueprint(any).validate()
    }

    pub(super) fn mixers(&self) -> Vec<&'static str> {
        (0..self.n_layers).filter_map(|layer| self.attention.of_layer(layer)).map(MixerConfig::name).collect()
    }

    pub(super) fn blueprint(&self, input: InputShape) -> Blueprint {
        let InputShape::Images { channels, height, width } = input else { panic!("validate: images") };
        let side = self.patch_size;
        Blueprint {
            source: Source::Patches { channels, side, grid: [height / side, width / side] },
            d_model: self.d_model,
            n_layers: self.n_layers,
            d_ff: self.d_ff.unwrap_or(self.d_model.saturating_mul(4)),
            norm: self.norm,
            norm_eps: self.norm_eps,
            mlp: self.mlp,
            attention: self.attention.clone(),
            attention_gate: self.attention_gate.clone(),
            pooling: self.pooling.clone(),
        }
    }
}

impl TextEncoderConfig {
    pub(super) fn validate(&self, input: Option<InputShape>) -> Result<(), ConfigError> {
        if let Some(other) = input.filter(|input| !matches!(input, InputShape::Tokens { .. })) {
            let problem = format!("text_encoder reads text, and the data is {}", other.kind());
            return Err(ConfigError::new("", problem));
        }
        if let Some(gate) = &self.attention_gate {
            let checked = gate.validate_channels(self.d_model, "texts differ in length");
            checked.map_err(|error| error.within("attention_gate"))?;
        }
        self.blueprint(InputShape::Tokens { vocab_size: 1, seq_len: 1 }).validate()
    }

    pub(super) fn mixers(&self) -> Vec<&'static str> {
        (0..self.n_layers).filter_map(|layer| self.attention.of_layer(layer)).map(AttentionConfig::name).collect()
    }

    pub(super) fn blueprint(&self, input: InputShape) -> Blueprint {
        let InputShape::Tokens { vocab_size, seq_len } = input else { panic!("validate: text") };
        Blueprint {
            source: Source::Tokens { vocab_size, seq_len },
            d_model: self.d_model,
            n_layers: self.n_layers,
            d_ff: self.d_ff.unwrap_or(self.d_model.saturating_mul(4)),
            norm: self.norm,
            norm_eps: self.norm_eps,
            mlp: self.mlp,
            attention: self.attention.clone().map(MixerConfig::Mechanism),
            attention_gate: self.attention_gate.clone(),
            pooling: self.pooling.clone(),
        }
    }
}
