//! The Gaussian (Density) Adaptive Transformer (Ioannides, Chadha and Elkins 2024, arXiv 2401.11143; code of the experiments,
//! commit 093212b): classes from the features of all layers of a frozen encoder.
//!
//! ```text
//! features [layers, d_model], each the mean over time  ->  gate
//! every layer's features as a picture [height, width], layers as channels
//!   ->  conv 3x3 (layers -> d_conv), ReLU  ->  conv 3x3 (d_conv -> layers), ReLU  ->  linear (layers * d_model -> classes)
//! ```
//! The gate is [`GaussianAdaptive`]; the arms that it is compared with take its place ([`FeatureMixerConfig`]): nothing at all,
//! which the paper leaves out, and attention between layers. The paper's own baseline calls PyTorch's attention with the axes
//! the wrong way round, so that it attends *between the samples of the batch*, without a residual; that is here under its
//! true name, next to attention between layers with and without a residual. (PyTorch's attention has biases everywhere: `qkv_bias` and
//! `o_bias` of `softmax`.)

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Distribution, Tensor, activation, module};
use polyhead_attention::{
    Adapters, Attention, AttentionConfig, Call, ConfigError, Dims, GaussianAdaptive, GaussianAdaptiveConfig, Mask,
    Observe,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Side of the convolutions' kernels.
const KERNEL: usize = 3;

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
    /// Height and width that a layer's features are laid out in. Default: the most square, 32 x 32 for 1024 and 64 x 80 for 5120,
    /// as in the paper.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grid: Option<[usize; 2]>,
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
    /// Height and width with the default filled in.
    pub fn grid(&self, d_model: usize) -> [usize; 2] {
        self.grid.unwrap_or_else(|| {
            let height = (1..=d_model.isqrt()).rev().find(|side| d_model.is_multiple_of(*side)).unwrap_or(1);
            [height, d_model / height.max(1)]
        })
    }

    /// Checks everything that a user can get wrong.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self, sizes: FeatureSizes) -> Result<(), ConfigError> {
        let FeatureSizes { n_layers, d_model, .. } = sizes;
        if self.d_conv == 0 {
            return Err(ConfigError::new("d_conv", "d_conv (0) must be at least 1"));
        }
        let [height, width] = self.grid(d_model);
        if height * width != d_model {
            let problem =
                format!("grid ([{height}, {width}]) must hold the features of a layer ({d_model}), or be left out");
            return Err(ConfigError::new("grid", problem));
        }
        match &self.mixer {
            FeatureMixerConfig::Identity => Ok(()),
            FeatureMixerConfig::GaussianAdaptive(gate) => {
                gate.validate(&[n_layers, d_model]).map_err(|error| error.within("mixer.gaussian_adaptive"))
            }
            FeatureMixerConfig::Attention(attention) => {
                attention.mechanism.validate(&dims(d_model)).map_err(|error| error.within("mixer.attention.mechanism"))
            }
        }
    }

    /// A classifier with fresh weights. Cannot fail after [`validate`](Self::validate).
    pub fn init(&self, sizes: FeatureSizes, device: &Device) -> GaussianAdaptiveTransformer {
        let FeatureSizes { n_layers, d_model, n_classes } = sizes;
        let flat = n_layers * d_model;
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
            },
            conv1: Convolution::init(n_layers, self.d_conv, device),
            conv2: Convolution::init(self.d_conv, n_layers, device),
            head: Linear {
                weight: Param::from_tensor(xavier([flat, n_classes], flat, n_classes, device)),
                bias: Some(Param::from_tensor(uniform([n_classes], (flat as f64).powf(-0.5), device))),
            },
            grid: self.grid(d_model),
        }
    }
}

/// Attention over features stands alone and knows no positions.
fn dims(d_model: usize) -> Dims {
    Dims { d_model, n_layers: 1, layer: 0, rope: false, norm_eps: 1e-5 }
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
    /// `[layers * d_model, classes]`
    pub head: Linear,
    grid: [usize; 2],
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

/// A 3 x 3 convolution that keeps the size of its input.
#[derive(Module, Debug)]
pub struct Convolution {
    /// `[out, in, 3, 3]`
    pub weight: Param<Tensor<4>>,
    /// `[out]`
    pub bias: Param<Tensor<1>>,
}

/// What the classifier gives back.
#[derive(Debug)]
pub struct Classified {
    /// `[batch, classes]`
    pub logits: Tensor<2>,
    /// `[batch, layers, d_model]` per gate: what the features were multiplied by; empty without gates. For the
    /// [importance](polyhead_attention::importance_factor) of layers and features.
    pub gates: Vec<Tensor<3>>,
}

impl GaussianAdaptiveTransformer {
    /// Scores of the classes for features `[batch, layers, d_model]`.
    pub fn forward(&self, features: Tensor<3>) -> Classified {
        let [batch, n_layers, d_model] = features.dims();
        let (mixed, gates) = self.mix(features);
        let [height, width] = self.grid;
        let picture = mixed.reshape([batch, n_layers, height, width]);
        let hidden = activation::relu(self.conv1.forward(picture));
        let flat = activation::relu(self.conv2.forward(hidden)).reshape([batch, n_layers * d_model]);
        let bias = self.head.bias.as_ref().map(Param::val);
        Classified { logits: polyhead_kernels::linear(flat, self.head.weight.val(), bias), gates }
    }

    /// The features behind the mixer, and the gates.
    pub fn mix(&self, features: Tensor<3>) -> (Tensor<3>, Vec<Tensor<3>>) {
        match &self.mixer {
            None => (features, Vec::new()),
            Some(FeatureMixer::GaussianAdaptive(gates)) => gates.forward(features, None),
            Some(FeatureMixer::Attention(attention)) => (attention.forward(features), Vec::new()),
        }
    }
}

impl FeatureAttention {
    fn forward(&self, features: Tensor<3>) -> Tensor<3> {
        let turn = |x: Tensor<3>| match self.between {
            Between::Layers => x,
            Between::Samples => x.swap_dims(0, 1),
        };
        let call = Call {
            rope: None,
            mask: &Mask::none(),
            bias: None,
            cache: None,
            observe: Observe::Nothing,
            adapters: Adapters::default(),
        };
        let mixed = turn(self.attention.forward(turn(features.clone()), call).hidden);
        if self.residual { features + mixed } else { mixed }
    }
}

impl Convolution {
    /// Weights by Xavier (Glorot and Bengio 2010), biases as PyTorch's convolutions begin, as in the authors' code.
    fn init(d_input: usize, d_output: usize, device: &Device) -> Self {
        let (fan_in, fan_out) = (d_input * KERNEL * KERNEL, d_output * KERNEL * KERNEL);
        let weight = xavier([d_output, d_input, KERNEL, KERNEL], fan_in, fan_out, device);
        let bias = uniform([d_output], (fan_in as f64).powf(-0.5), device);
        Self { weight: Param::from_tensor(weight), bias: Param::from_tensor(bias) }
    }

    /// `[batch, in, height, width]` to `[batch, out, height, width]`.
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let around = [KERNEL / 2; 2];
        module::conv2d(x, self.weight.val(), Some(self.bias.val()), ConvOptions::new([1, 1], around, [1, 1], 1))
    }
}

fn xavier<const D: usize>(shape: [usize; D], fan_in: usize, fan_out: usize, device: &Device) -> Tensor<D> {
    uniform(shape, (6.0 / (fan_in + fan_out) as f64).sqrt(), device)
}

fn uniform<const D: usize>(shape: [usize; D], bound: f64, device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Uniform(-bound, bound), device)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::reach_every_parameter;

    const SIZES: FeatureSizes = FeatureSizes { n_layers: 9, d_model: 12, n_classes: 4 };

    fn model(mixer: &str) -> GaussianAdaptiveTransformer {
        let json = format!(r#"{{"d_conv": 5, "mixer": {mixer}}}"#);
        let config: GaussianAdaptiveTransformerConfig = serde_json::from_str(&json).unwrap();
        config.validate(SIZES).unwrap();
        config.init(SIZES, &Device::flex().autodiff())
    }

    fn features(batch: usize) -> Tensor<3> {
        Tensor::random([batch, 9, 12], Distribution::Normal(0.0, 1.0), &Device::flex().autodiff())
    }

    fn attention(settings: &str) -> String {
        format!(r#"{{"attention": {{"mechanism": {{"softmax": {{"n_heads": 3}}}}{settings}}}}}"#)
    }

    const GATE: &str = r#"{"gaussian_adaptive": {"gates": [{"paper": {"n_heads": 3}}]}}"#;

    #[test]
    fn gradients_reach_every_parameter_of_every_arm() {
        let block = r#"{"gaussian_adaptive": {"residual": true, "gates": [
            {"product": {"n_heads": 3, "n_gaussians": 2}}, {"mixture": {"axis": 2, "n_heads": 4, "n_gaussians": 2}}]}}"#;
        let (plain, across) = (attention(""), attention(r#", "residual": false, "between": "samples""#));
        for (mixer, gates) in [("\"identity\"", 0), (GATE, 1), (block, 2), (&plain, 0), (&across, 0)] {
            let model = model(mixer);
            let out = model.forward(features(4));
            assert_eq!((out.logits.dims(), out.gates.len()), ([4, 4], gates));
            let cotangent = out.logits.random_like(Distribution::Normal(0.0, 1.0)).detach();
            let reached = reach_every_parameter(&model, &(out.logits * cotangent).sum().backward());
            assert!(reached >= 6, "{mixer}");
        }
    }

    #[test]
    fn only_the_published_baseline_lets_samples_see_each_other() {
        let felt = |mixer: &str| {
            let (model, x) = (model(mixer), features(3));
            let other = Tensor::cat(vec![x.clone().narrow(0, 0, 1), features(2)], 0);
            let [a, b] = [x, other].map(|x| model.mix(x).0.narrow(0, 0, 1));
            (a - b).abs().max().into_scalar::<f32>() > 1e-7
        };
        assert!(!felt("\"identity\"") && !felt(GATE) && !felt(&attention("")));
        assert!(felt(&attention(r#", "residual": false, "between": "samples""#)));
    }

    #[test]
    fn parameters_are_as_many_as_in_the_paper() {
        // Speech: 24 layers of 1024; the scripts count 336,412 with 8 heads and 322,076 with 1, and 4 classes.
        let sizes = FeatureSizes { n_layers: 24, d_model: 1024, n_classes: 4 };
        let count = |heads: usize| {
            let mixer =
                format!(r#"{{"mixer": {{"gaussian_adaptive": {{"gates": [{{"paper": {{"n_heads": {heads}}}}}]}}}}}}"#);
            let config: GaussianAdaptiveTransformerConfig = serde_json::from_str(&mixer).unwrap();
            config.validate(sizes).unwrap();
            assert_eq!(config.grid(1024), [32, 32]);
            assert_eq!(config.grid(5120), [64, 80]);
            config.init(sizes, &Device::flex()).num_params()
        };
        assert_eq!((count(8), count(1)), (336_412, 322_076));
    }

    #[test]
    fn mistakes_are_told_by_name() {
        let field = |json: &str| {
            let config: GaussianAdaptiveTransformerConfig = serde_json::from_str(json).unwrap();
            config.validate(SIZES).unwrap_err().field
        };
        assert_eq!(field(r#"{"d_conv": 0}"#), "d_conv");
        assert_eq!(field(r#"{"grid": [3, 3]}"#), "grid");
        let gate = r#"{"mixer": {"gaussian_adaptive": {"gates": [{"paper": {"n_heads": 4}}]}}}"#;
        assert_eq!(field(gate), "mixer.gaussian_adaptive.gates[0].paper.n_heads");
        let mechanism = r#"{"mixer": {"attention": {"mechanism": {"softmax": {"n_heads": 5}}}}}"#;
        assert_eq!(field(mechanism), "mixer.attention.mechanism.softmax.n_heads");
    }
}
