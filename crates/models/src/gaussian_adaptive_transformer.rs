//! The Gaussian (Density) Adaptive Transformer (Ioannides, Chadha and Elkins 2024, arXiv 2401.11143; code of the experiments,
//! commit 093212b): classes from the features of all layers of a frozen encoder.
//!
//! ```text
//! features [layers, d_model], each the mean over time  ->  gate
//! every layer's features as an image [height, width], layers as channels
//!   ->  conv 3x3 (layers -> d_conv), ReLU  ->  conv 3x3 (d_conv -> layers), ReLU  ->  linear (layers * d_model -> classes)
//! ```
//! The gate is [`GaussianAdaptive`]; the arms that it is compared with take its place ([`FeatureMixerConfig`]): nothing at all,
//! which the paper leaves out, and attention between layers. The paper's own baseline calls PyTorch's attention with the axes
//! the wrong way round, so that it attends *between the samples of the batch*, without a residual; that is here under its
//! true name, next to attention between layers with and without a residual. (PyTorch's attention has biases everywhere: `qkv_bias` and
//! `o_bias` of `softmax`.) The paper's combination of gate and grouped-query attention is in `gqdaam.rs`.
//!
//! `layers` trains on some layers only: the paper's ablation takes those of high and of low
//! [importance](polyhead_attention::Importance).

mod costs;
mod gqdaam;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData, activation};
use polyhead_attention::{
    Attention, AttentionConfig, Call, ConfigError, Dims, GaussianAdaptive, GaussianAdaptiveConfig, Mask, require,
};
use polyhead_kernels::random;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::convolution::Convolution;

pub use gqdaam::{Gqdaam, GqdaamConfig};

/// Side of the convolutions' kernels.
const KERNEL: usize = 3;
/// Channels of a convolution at most; chosen by us.
const MOST_CHANNELS: usize = 1 << 16;

/// Settings of the classifier.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GaussianAdaptiveTransformerConfig {
    /// What is done to the features before the convolutions. Default: "identity".
    #[serde(default)]
    pub mixer: FeatureMixerConfig,
    /// Channels between the convolutions. Default: 512, the paper's.
    #[serde(default = "d_conv")]
    pub d_conv: usize,
    /// Height and width that a layer's features, as the mixer leaves them, are laid out in. Default: the most square, 32 x 32
    /// for 1024 and 64 x 80 for 5120, as in the paper.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grid: Option<[usize; 2]>,
    /// The layers that are read, counted from 0. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
}

fn d_conv() -> usize {
    512
}

/// What is done to the features of all layers.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FeatureMixerConfig {
    /// Nothing: the control.
    #[default]
    Identity,
    /// Gaussian adaptive gates.
    GaussianAdaptive(GaussianAdaptiveConfig),
    /// Attention between layers, or between samples.
    Attention(FeatureAttentionConfig),
    /// The paper's GQDAAM: a gate, then grouped-query attention between layers.
    Gqdaam(GqdaamConfig),
}

/// Attention over features.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FeatureAttentionConfig {
    /// The mechanism, without positions and mask.
    pub mechanism: AttentionConfig,
    /// Whether its output is added to its input or takes its place. Default: true.
    #[serde(default = "yes")]
    pub residual: bool,
    /// Who attends to whom. Default: "layers".
    #[serde(default)]
    pub between: Between,
}

fn yes() -> bool {
    true
}

/// Who attends to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Between {
    /// The layers of a sample.
    #[default]
    Layers,
    /// The samples of a batch, layer by layer: the published baseline. What a sample gets depends on its neighbours.
    Samples,
}

/// What the features are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeatureSizes {
    /// Layers of the encoder.
    pub n_layers: usize,
    /// Channels of a layer.
    pub d_model: usize,
    /// Classes to tell apart.
    pub n_classes: usize,
}

impl GaussianAdaptiveTransformerConfig {
    /// Channels of a layer behind the mixer.
    fn width(&self, d_model: usize) -> usize {
        match &self.mixer {
            FeatureMixerConfig::Gqdaam(config) => config.d_attention,
            _ => d_model,
        }
    }

    /// Height and width with the default filled in.
    fn grid(&self, d_model: usize) -> [usize; 2] {
        let width = self.width(d_model);
        self.grid.unwrap_or_else(|| {
            let height = (1..=width.isqrt()).rev().find(|side| width.is_multiple_of(*side)).unwrap_or(1);
            [height, width / height]
        })
    }

    /// How many layers are read.
    fn n_layers(&self, sizes: FeatureSizes) -> usize {
        self.layers.as_ref().map_or(sizes.n_layers, Vec::len)
    }

    /// Checks everything that a user can get wrong.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self, sizes: FeatureSizes) -> Result<(), ConfigError> {
        let d_model = sizes.d_model;
        require(self.d_conv > 0, "d_conv", || "d_conv (0) must be at least 1".into())?;
        require(self.d_conv <= MOST_CHANNELS, "d_conv", || {
            format!("d_conv ({}) must be at most {MOST_CHANNELS}", self.d_conv)
        })?;
        self.check_layers(sizes.n_layers)?;
        let read = [self.n_layers(sizes), d_model];
        match &self.mixer {
            FeatureMixerConfig::Identity => {}
            FeatureMixerConfig::GaussianAdaptive(gate) => {
                gate.validate(&read).map_err(|error| error.within("mixer.gaussian_adaptive"))?;
            }
            FeatureMixerConfig::Attention(FeatureAttentionConfig { mechanism, .. }) => {
                let checked = mechanism.validate(&dims(d_model)).and_then(|()| mechanism.check_bidirectional());
                checked.map_err(|error| error.within("mixer.attention.mechanism"))?;
            }
            FeatureMixerConfig::Gqdaam(config) => {
                config.validate(&read).map_err(|error| error.within("mixer.gqdaam"))?;
            }
        }
        let ([height, width], behind) = (self.grid(d_model), self.width(d_model));
        require(height.checked_mul(width) == Some(behind), "grid", || {
            format!("grid ([{height}, {width}]) must hold the features of a layer ({behind}), or be left out")
        })
    }

    fn check_layers(&self, n_layers: usize) -> Result<(), ConfigError> {
        let Some(layers) = &self.layers else { return Ok(()) };
        let problem = match layers.iter().enumerate().find(|(at, layer)| layers[..*at].contains(layer)) {
            _ if layers.is_empty() => "layers is empty: name at least one, or leave it out for all".to_owned(),
            Some((_, twice)) => format!("layers names {twice} twice"),
            None => match layers.iter().find(|layer| **layer >= n_layers) {
                Some(layer) => format!("layers names {layer}, but there are {n_layers}, counted from 0"),
                None => return Ok(()),
            },
        };
        Err(ConfigError::new("layers", problem))
    }

    /// What is done to the features, as a recipe names it.
    pub fn mixer_name(&self) -> &'static str {
        match &self.mixer {
            FeatureMixerConfig::Identity => "identity",
            FeatureMixerConfig::GaussianAdaptive(_) => "gaussian_adaptive",
            FeatureMixerConfig::Attention(_) => "attention",
            FeatureMixerConfig::Gqdaam(_) => "gqdaam",
        }
    }

    /// A classifier with fresh weights. Cannot fail after [`validate`](Self::validate).
    pub fn init(&self, sizes: FeatureSizes, device: &Device) -> GaussianAdaptiveTransformer {
        let FeatureSizes { d_model, n_classes, .. } = sizes;
        let n_layers = self.n_layers(sizes);
        let flat = n_layers * self.width(d_model);
        GaussianAdaptiveTransformer {
            mixer: match &self.mixer {
                FeatureMixerConfig::Identity => None,
                FeatureMixerConfig::GaussianAdaptive(gate) => {
                    Some(FeatureMixer::GaussianAdaptive(gate.init(&[n_layers, d_model], device)))
                }
                FeatureMixerConfig::Attention(FeatureAttentionConfig { mechanism, residual, between }) => {
                    let attention = mechanism.init(&dims(d_model), device);
                    let (residual, between) = (*residual, *between);
                    Some(FeatureMixer::Attention(FeatureAttention { attention, residual, between }))
                }
                FeatureMixerConfig::Gqdaam(config) => {
                    Some(FeatureMixer::Gqdaam(config.init(&[n_layers, d_model], device)))
                }
            },
            conv1: convolution(n_layers, self.d_conv, device),
            conv2: convolution(self.d_conv, n_layers, device),
            head: Linear {
                weight: Param::from_tensor(xavier([flat, n_classes], flat, n_classes, device)),
                bias: Some(Param::from_tensor(uniform([n_classes], (flat as f64).powf(-0.5), device))),
            },
            grid: self.grid(d_model),
            layers: self.layers.clone(),
        }
    }
}

/// Attention over features stands alone and knows no positions.
fn dims(d_model: usize) -> Dims {
    Dims { d_model, n_layers: 1, layer: 0, rope: false, norm_eps: 1e-5, grid: None }
}

/// The classifier.
#[derive(Module, Debug)]
pub struct GaussianAdaptiveTransformer {
    /// `None` for the identity.
    pub mixer: Option<FeatureMixer>,
    /// From layers to d_conv channels.
    pub conv1: Convolution,
    /// And back.
    pub conv2: Convolution,
    /// `[layers * channels behind the mixer, classes]`
    pub head: Linear,
    grid: [usize; 2],
    #[module(skip)]
    layers: Option<Vec<usize>>,
}

/// What is done to the features.
// A model has one at most: boxing would buy nothing.
#[allow(clippy::large_enum_variant)]
#[derive(Module, Debug)]
pub enum FeatureMixer {
    /// See [`FeatureMixerConfig::GaussianAdaptive`].
    GaussianAdaptive(GaussianAdaptive),
    /// See [`FeatureMixerConfig::Attention`].
    Attention(FeatureAttention),
    /// See [`FeatureMixerConfig::Gqdaam`].
    Gqdaam(Gqdaam),
}

/// Attention over features.
#[derive(Module, Debug)]
pub struct FeatureAttention {
    /// The mechanism.
    pub attention: Attention,
    residual: bool,
    #[module(skip)]
    between: Between,
}

/// What the classifier gives back.
#[derive(Debug)]
pub struct Classified {
    /// `[batch, classes]`
    pub logits: Tensor<2>,
    /// `[batch, layers, d_model]` per gate: what the features of the layers that are read were multiplied by; empty without
    /// gates.
    pub gates: Vec<Tensor<3>>,
    /// `[batch, layers, d_model]`: what all gates together multiplied the features by; `None` without gates.
    pub factor: Option<Tensor<3>>,
}

impl GaussianAdaptiveTransformer {
    /// Scores of the classes for features `[batch, layers, d_model]`.
    pub fn forward(&self, features: Tensor<3>) -> Classified {
        let (mixed, gates) = self.mix(features);
        let factor = match &self.mixer {
            Some(FeatureMixer::GaussianAdaptive(stack)) => stack.factor(gates.clone()),
            Some(FeatureMixer::Gqdaam(mixer)) => mixer.gate.factor(gates.clone()),
            Some(FeatureMixer::Attention(_)) | None => None,
        };
        let ([batch, n_layers, channels], [height, width]) = (mixed.dims(), self.grid);
        let image = mixed.reshape([batch, n_layers, height, width]);
        let hidden = activation::relu(self.conv1.forward(image));
        let flat = activation::relu(self.conv2.forward(hidden)).reshape([batch, n_layers * channels]);
        let bias = self.head.bias.as_ref().map(Param::val);
        Classified { logits: polyhead_kernels::linear(flat, self.head.weight.val(), bias), gates, factor }
    }

    /// The features behind the mixer, and the gates.
    pub fn mix(&self, features: Tensor<3>) -> (Tensor<3>, Vec<Tensor<3>>) {
        let features = match &self.layers {
            None => features,
            Some(layers) => {
                let layers: Vec<i32> = layers.iter().map(|layer| *layer as i32).collect();
                let count = layers.len();
                let chosen = Tensor::<1, Int>::from_data(TensorData::new(layers, [count]), &features.device());
                features.select(1, chosen)
            }
        };
        match &self.mixer {
            None => (features, Vec::new()),
            Some(FeatureMixer::GaussianAdaptive(gates)) => gates.forward(features, None),
            Some(FeatureMixer::Attention(attention)) => (attention.forward(features), Vec::new()),
            Some(FeatureMixer::Gqdaam(mixer)) => mixer.forward(features),
        }
    }
}

impl FeatureAttention {
    fn forward(&self, features: Tensor<3>) -> Tensor<3> {
        let turn = |x: Tensor<3>| match self.between {
            Between::Layers => x,
            Between::Samples => x.swap_dims(0, 1),
        };
        let mixed = turn(self.attention.forward(turn(features.clone()), Call::new(&Mask::none())).hidden);
        if self.residual { features + mixed } else { mixed }
    }
}

/// A convolution with weights by Xavier (Glorot and Bengio 2010) and biases as PyTorch's begin, as in the authors' code.
fn convolution(d_input: usize, d_output: usize, device: &Device) -> Convolution {
    let (fan_in, fan_out) = (d_input * KERNEL * KERNEL, d_output * KERNEL * KERNEL);
    let weight = xavier([d_output, d_input, KERNEL, KERNEL], fan_in, fan_out, device);
    let bias = uniform([d_output], (fan_in as f64).powf(-0.5), device);
    Convolution { weight: Param::from_tensor(weight), bias: Param::from_tensor(bias) }
}

fn xavier<const D: usize>(shape: [usize; D], fan_in: usize, fan_out: usize, device: &Device) -> Tensor<D> {
    uniform(shape, (6.0 / (fan_in + fan_out) as f64).sqrt(), device)
}

fn uniform<const D: usize>(shape: [usize; D], bound: f64, device: &Device) -> Tensor<D> {
    random(shape, Distribution::Uniform(-bound, bound), device)
}

#[cfg(test)]
mod tests;
