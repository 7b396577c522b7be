//! The network: layers over the whole image and inside patches, then convolutions that enlarge.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData, activation};
use polyhead_attention::{Attended, Attention, Call, Mask, Observation, Observe, UNKNOWN_GRID};

use super::local::LocalAttention;
use super::parts::{self, ConvMlp};
use super::token_centres::{Grouped, Phase, TokenCentres};
use super::{COLOURS, MixerConfig, NORM_EPS, SuperResolutionConfig};
use crate::convolution::Convolution;
use crate::resample::{Filter, resampled};
use crate::{Norm, NormKind};

/// Slope of the leaky ReLU below 0; the authors'.
const SLOPE: f64 = 0.1;

/// A network that enlarges images.
#[derive(Module, Debug)]
pub struct SuperResolution {
    /// From colours to channels
    pub input: Convolution,
    /// First to last
    pub layers: Vec<Layer>,
    /// From channels to those of several pixels, once or twice
    pub enlarge: Vec<Convolution>,
    /// From channels to colours
    pub output: Convolution,
    #[module(skip)]
    config: SuperResolutionConfig,
}

/// A layer.
#[derive(Module, Debug)]
pub struct Layer {
    /// Before the mixer
    pub norm: Norm,
    /// Over the whole image
    pub mixer: Mixer,
    /// Before the feed-forward layer
    pub mlp_norm: Norm,
    /// Behind the mixer
    pub mlp: ConvMlp,
    /// Inside patches
    pub local: LocalAttention,
    /// Before the second feed-forward layer
    pub local_mlp_norm: Norm,
    /// Behind local attention
    pub local_mlp: ConvMlp,
    /// Behind all
    pub conv: Convolution,
}

/// What mixes the whole image.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // a layer has one
pub enum Mixer {
    /// See [`MixerConfig::TokenCentres`].
    TokenCentres(TokenCentres),
    /// See [`MixerConfig::Attention`].
    Attention(Attention),
}

/// What a network made of images.
#[derive(Debug)]
pub struct Enlarged {
    /// `[batch, 3, scale * height, scale * width]`
    pub image: Tensor<4>,
    /// `[n_centres, d_model]` each: the centres of the layers with token centres, without gradients
    pub centres: Vec<Tensor<2>>,
    /// `[1]` each: the auxiliary losses of mechanisms that have one, unweighted
    pub penalties: Vec<Tensor<1>>,
    /// One per layer, if asked for
    pub seen: Vec<Observation>,
}

/// What a layer made of tokens over the whole image.
#[derive(Debug)]
pub struct Mixed {
    /// `[batch, rows * columns, d_model]`
    pub hidden: Tensor<3>,
    /// Of token centres: the centres of the pass, and the nearest one of each pixel.
    pub centred: Option<(Tensor<2>, Vec<usize>)>,
    /// `[1]`: the auxiliary loss of a mechanism that has one
    pub penalty: Option<Tensor<1>>,
    /// Only if asked for.
    pub seen: Option<Observation>,
}

impl SuperResolutionConfig {
    /// A network with fresh weights. Cannot fail after [`validate`](Self::validate).
    pub fn init(&self, device: &Device) -> SuperResolution {
        let (d_model, widths) = (self.d_model, self.widths());
        let conv = |from, to| Convolution::init([to, from, 3, 3], device);
        let norm = || Norm::init(NormKind::Layer, d_model, device);
        let layer = |(layer, patch)| Layer {
            norm: norm(),
            mixer: match &self.mixer {
                MixerConfig::TokenCentres(config) => Mixer::TokenCentres(config.init(layer, widths, device)),
                MixerConfig::Attention(config) => {
                    Mixer::Attention(config.init(&self.dims(layer, UNKNOWN_GRID), device))
                }
            },
            mlp_norm: norm(),
            mlp: ConvMlp::init(widths, device),
            local: LocalAttention::init(patch, self.local_overlap, widths, device),
            local_mlp_norm: norm(),
            local_mlp: ConvMlp::init(widths, device),
            conv: conv(d_model, d_model),
        };
        SuperResolution {
            input: conv(COLOURS, d_model),
            layers: self.patches().enumerate().map(layer).collect(),
            enlarge: self.enlargements().into_iter().map(|by| conv(d_model, by * by * d_model)).collect(),
            output: conv(d_model, COLOURS),
            config: self.clone(),
        }
    }
}

impl Mixer {
    /// Over the whole image: `[batch, rows * columns, d_model]`, row by row, normalised.
    fn forward(&self, normed: Tensor<3>, grid: [usize; 2], phase: Phase, observe: &Observe) -> Mixed {
        match self {
            Self::TokenCentres(mixer) => {
                let Grouped { hidden, centres, nearest } = mixer.forward(normed, phase);
                let maps = matches!(observe, Observe::Maps).then(|| map_of(&nearest, grid, &hidden.device()));
                let seen = observe.wanted().then(|| Observation { maps, ..Observation::default() });
                Mixed { hidden, centred: Some((centres, nearest)), penalty: None, seen }
            }
            Self::Attention(mixer) => {
                let mask = Mask::none();
                let call = Call { grid: Some(grid), observe: observe.clone(), ..Call::new(&mask) };
                let Attended { hidden, penalty, seen } = mixer.forward(normed, call);
                Mixed { hidden, centred: None, penalty, seen }
            }
        }
    }
}

/// `[1, rows, columns]`: which centre each pixel of the first image is nearest to.
fn map_of(nearest: &[usize], [rows, columns]: [usize; 2], device: &Device) -> Tensor<3> {
    let nearest: Vec<f32> = nearest[..rows * columns].iter().map(|&centre| centre as f32).collect();
    Tensor::from_data(TensorData::new(nearest, [1, rows, columns]), device)
}

impl Layer {
    /// Over the whole image: `[batch, rows * columns, d_model]`, row by row.
    pub fn mix(&self, t: Tensor<3>, grid: [usize; 2], phase: Phase, observe: &Observe) -> Mixed {
        let mixed = self.mixer.forward(self.norm.forward(t.clone(), NORM_EPS), grid, phase, observe);
        let t = t + mixed.hidden;
        let hidden = t.clone() + self.mlp.forward(self.mlp_norm.forward(t, NORM_EPS), grid);
        Mixed { hidden, ..mixed }
    }

    /// Inside patches, shaped as in [`mix`](Self::mix).
    pub fn refine(&self, t: Tensor<3>, grid: [usize; 2]) -> Tensor<3> {
        let t = self.local.forward(t, grid, NORM_EPS);
        t.clone() + self.local_mlp.forward(self.local_mlp_norm.forward(t, NORM_EPS), grid)
    }

    /// The layer's output `[batch, d_model, rows, columns]`, from its input and what [`mix`](Self::mix) made of that.
    pub(super) fn finish(&self, x: Tensor<4>, mixed: Tensor<3>) -> Tensor<4> {
        let [_, _, rows, columns] = x.dims();
        let grid = [rows, columns];
        x + self.conv.forward(parts::image(self.refine(mixed, grid), grid))
    }
}

impl SuperResolution {
    /// The settings that it was made from.
    pub fn config(&self) -> &SuperResolutionConfig {
        &self.config
    }

    /// Images enlarged.
    ///
    /// # Shapes
    /// - low: `[batch, 3, height, width]`, from 0 to 1
    ///
    /// # Panics
    /// If they are smaller than [`check_image`](SuperResolutionConfig::check_image) allows.
    pub fn forward(&self, low: Tensor<4>, phase: Phase, observe: &Observe) -> Enlarged {
        let first = self.input.forward(low.clone());
        let ([_, _, rows, columns], mut x) = (low.dims(), first.clone());
        let (mut centres, mut penalties, mut seen) = (Vec::new(), Vec::new(), Vec::new());
        for layer in &self.layers {
            let mixed = layer.mix(parts::tokens(x.clone()), [rows, columns], phase, observe);
            x = layer.finish(x, mixed.hidden);
            centres.extend(mixed.centred.map(|(centres, _)| centres));
            penalties.extend(mixed.penalty);
            seen.extend(mixed.seen);
        }
        x = x + first;
        for (conv, by) in self.enlarge.iter().zip(self.config.enlargements()) {
            x = activation::leaky_relu(shuffled(conv.forward(x), by), SLOPE);
        }
        let [_, _, height, width] = x.dims();
        let image = self.output.forward(x) + resampled(low, [height, width], Filter::Bilinear);
        Enlarged { image, centres, penalties, seen }
    }
}

/// `[batch, by² * channels, height, width]` to `[batch, channels, by * height, by * width]`.
fn shuffled(x: Tensor<4>, by: usize) -> Tensor<4> {
    let [batch, channels, height, width] = x.dims();
    let channels = channels / (by * by);
    let x = x.reshape([batch, channels, by, by, height, width]).permute([0, 1, 4, 2, 5, 3]);
    x.reshape([batch, channels, height * by, width * by])
}
