//! Settings of the bidirectional transformers, and what both come down to.

use polyhead_attention::{AttentionConfig, ConfigError, GaussianAdaptiveConfig, UNKNOWN_GRID, require};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::transformer::{MlpKind, NormKind, TransformerConfig};
use crate::{InputShape, PerLayer, PoolingConfig};

/// Declares the settings of an encoder: its own, then those that both have. What is given last are ends of their meanings: where
/// defaults come from, what is pooled, and what gates are along.
macro_rules! encoder_settings {
    (
        $(#[$meta:meta])* $Name:ident { $($own:tt)* }
        d_ff: $d_ff:literal, defaults: $defaults:literal, pooled: $pooled:literal, gates: $gates:literal
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $Name {
            $($own)*
            /// Channels of the residual stream.
            pub d_model: usize,
            /// Layers.
            pub n_layers: usize,
            #[doc = concat!("Channels inside the feed-forward layers. Default: 4 d_model", $d_ff, ".")]
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub d_ff: Option<usize>,
            #[doc = concat!("The kind of norms: \"rms\" or \"layer\". Default: \"layer\"", $defaults, ".")]
            #[serde(default = "layer_norm")]
            pub norm: NormKind,
            #[doc = concat!("Inside the square root of the norms. Default: 1e-6", $defaults, ".")]
            #[serde(default = "norm_eps")]
            pub norm_eps: f64,
            #[doc = concat!("The kind of feed-forward layers: \"swiglu\" or \"gelu\". Default: \"gelu\"", $defaults, ".")]
            #[serde(default = "gelu")]
            pub mlp: MlpKind,
            /// The attention mechanism, both ways: one table for all layers, or a list with one per layer.
            pub attention: PerLayer<AttentionConfig>,
            #[doc = concat!("Gaussian adaptive gates on what attention writes in every layer", $gates, ". Default: none.")]
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub attention_gate: Option<GaussianAdaptiveConfig>,
            #[doc = concat!("How ", $pooled, " become one vector: \"mean\", \"class_token\", \"last_token\", or a table, ggem or \
                mltp. Default: \"mean\".")]
            #[serde(default = "mean")]
            pub pooling: PoolingConfig,
        }

        impl $Name {
            pub(super) fn mechanisms(&self) -> Vec<&'static str> {
                let of_layer = |layer| self.attention.of_layer(layer).map(AttentionConfig::name);
                (0..self.n_layers).filter_map(of_layer).collect()
            }

            /// The encoder for `positions`, a class token left out, which form a grid or none.
            fn encoder_of(&self, source: Source, grid: Option<[usize; 2]>) -> EncoderConfig {
                let class_token = self.pooling == PoolingConfig::ClassToken;
                EncoderConfig {
                    source,
                    transformer: TransformerConfig {
                        d_model: self.d_model,
                        n_layers: self.n_layers,
                        d_ff: self.d_ff.unwrap_or(self.d_model.saturating_mul(4)),
                        norm: self.norm,
                        norm_eps: self.norm_eps,
                        mlp: self.mlp,
                        rope: false,
                        parallel_residual: false,
                        attention: self.attention.clone(),
                        attention_gate: self.attention_gate.clone(),
                        gated: [source.positions() + usize::from(class_token), self.d_model],
                        // A class token has no place in the grid.
                        grid: grid.filter(|_| !class_token),
                    },
                    pooling: self.pooling.clone(),
                }
            }
        }
    };
}

encoder_settings! {
    /// `[model.classifier.vision_transformer]`: ViT (Dosovitskiy et al. 2020, arXiv 2010.11929).
    VisionTransformerConfig {
        /// Side of a patch, in pixels; divides height and width of the images.
        pub patch_size: usize,
    }
    d_ff: ", as in ViT",
    defaults: ", as in ViT",
    pooled: "patches",
    gates: ": axis 1 is the patches (behind a class token), 2 the channels"
}

encoder_settings! {
    /// `[model.classifier.text_encoder]`: a transformer over tokens that see each other both ways, as BERT's do (Devlin et al.
    /// 2018, arXiv 1810.04805), but pre-norm.
    TextEncoderConfig {}
    d_ff: ", as in BERT",
    defaults: "",
    pooled: "tokens",
    gates: "; along the channels, axis = -1"
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
pub(super) struct EncoderConfig {
    pub source: Source,
    pub transformer: TransformerConfig,
    pub pooling: PoolingConfig,
}

impl EncoderConfig {
    pub(super) fn has_class_token(&self) -> bool {
        self.pooling == PoolingConfig::ClassToken
    }

    fn validate(&self) -> Result<(), ConfigError> {
        self.transformer.validate(|_, mechanism| mechanism.check_bidirectional())?;
        self.pooling.validate(self.transformer.d_model).map_err(|error| error.within("pooling"))
    }
}

impl VisionTransformerConfig {
    pub(super) fn validate(&self, input: Option<InputShape>) -> Result<(), ConfigError> {
        let side = self.patch_size;
        require(side > 0, "patch_size", || "patch_size (0) must be at least 1".into())?;
        let Some(input) = input else {
            let mut any = self.encoder(InputShape::Images { channels: 1, height: side, width: side });
            any.transformer.grid = any.transformer.grid.map(|_| UNKNOWN_GRID);
            return any.validate();
        };
        let InputShape::Images { height, width, .. } = input else {
            let problem = format!("vision_transformer reads images, and the data is {}", input.kind());
            return Err(ConfigError::new("", problem));
        };
        require(height.is_multiple_of(side) && width.is_multiple_of(side), "patch_size", || {
            format!("patch_size ({side}) must divide the images, {height} x {width} pixels")
        })?;
        let encoder = self.encoder(input);
        if let Some(gate) = &self.attention_gate {
            gate.validate(&encoder.transformer.gated).map_err(|error| error.within("attention_gate"))?;
        }
        encoder.validate()
    }

    pub(super) fn encoder(&self, input: InputShape) -> EncoderConfig {
        let InputShape::Images { channels, height, width } = input else { panic!("validate: images") };
        let side = self.patch_size;
        let grid = [height / side, width / side];
        self.encoder_of(Source::Patches { channels, side, grid }, Some(grid))
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
        self.encoder(InputShape::Tokens { vocab_size: 1, seq_len: 1 }).validate()
    }

    pub(super) fn encoder(&self, input: InputShape) -> EncoderConfig {
        let InputShape::Tokens { vocab_size, seq_len } = input else { panic!("validate: text") };
        self.encoder_of(Source::Tokens { vocab_size, seq_len }, None)
    }
}
