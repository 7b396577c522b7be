//! Super-resolution: images of more pixels from images of fewer, by the network of CATANet (Liu et al., CVPR 2025, arXiv
//! 2503.06896; code of EquationWalker/CATANet, commit fd2222f).
//!
//! ```text
//! x = conv(low)                                                         3 x 3, as all that are not said to be otherwise
//! layers:  t = x + mixer(norm(x)),  t = t + mlp(norm(t))                over the whole image: token centres, or an attention
//!          t = t + local attention inside patches,  t = t + mlp(norm(t))
//!          x = x + conv(t)
//! x = x + conv(low);  enlarged: conv to scale² times the channels, pixel shuffle, leaky ReLU (4: twice by 2)
//! high = conv(x) + low enlarged bilinearly
//! ```
//! What it learns from are large images: each is reduced by a bicubic filter to steps of 1/255, as files hold it, and the loss is
//! the mean absolute difference. The mixer is what mechanisms are compared by: [`MixerConfig`].

mod learning;
mod local;
mod network;
mod parts;
mod quality;
mod token_centres;

use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::{
    AttentionConfig, ConfigError, Cost, Dims, PerLayerCount, UNKNOWN_GRID, broken, require, require_range,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Part, TrainBatch};

pub use learning::ImageTotals;
pub use local::{Axis, LocalAttention, Overlap};
pub use network::{Enlarged, Layer, Mixed, Mixer, SuperResolution};
pub use parts::{ConvMlp, Projections, Widths};
pub use quality::{Quality, quality, stored};
pub use token_centres::{Grouped, Phase, TokenCentres, TokenCentresConfig, order};

/// Colours of an image.
pub const COLOURS: usize = 3;
/// Inside the square root of the norms; the authors'.
const NORM_EPS: f64 = 1e-5;

/// `[model.super_resolution]`: enlarges images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SuperResolutionConfig {
    /// How many times as high and as wide images become: 2, 3 or 4.
    pub scale: usize,
    /// Channels. The authors': 40.
    pub d_model: usize,
    /// Layers. The authors': 8.
    pub n_layers: usize,
    /// Heads; they divide d_model and qk_dim. The authors': 4.
    pub n_heads: usize,
    /// Channels of queries and keys, of all heads together. The authors': 36.
    pub qk_dim: usize,
    /// Channels inside the feed-forward layers. The authors': 96.
    pub d_ff: usize,
    /// What mixes the whole image.
    pub mixer: MixerConfig,
    /// Side of the patches of local attention, in pixels of the small image: a number for all layers, or a list with one per layer.
    /// The authors': 16, 20, 24, 28, and again.
    pub local_patch: PerLayerCount,
    /// What becomes of pixels that several patches hold: "halved" (default) as in the authors' code, or "mean".
    #[serde(default)]
    pub local_overlap: Overlap,
}

/// What mixes the whole image: one of its tables.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(clippy::large_enum_variant)] // a model has one
pub enum MixerConfig {
    /// Tokens attend to those that resemble the same centre, and to all centres.
    TokenCentres(TokenCentresConfig),
    /// An attention mechanism over the pixels, both ways, such as hilo with alpha = 0: windows.
    Attention(AttentionConfig),
}

/// Images of one size.
#[derive(Debug, Clone, PartialEq)]
pub struct Images {
    /// `[n, 3, height, width]`, from 0 to 1.
    pub pixels: Vec<f32>,
    /// Pixels down.
    pub height: usize,
    /// Pixels across.
    pub width: usize,
}

impl Images {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.pixels.len() / (COLOURS * self.height * self.width)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.pixels.is_empty()
    }

    /// `[n, 3, height, width]`
    pub fn tensor(&self, device: &Device) -> Tensor<4> {
        let shape = [self.len(), COLOURS, self.height, self.width];
        Tensor::from_data(TensorData::new(self.pixels.clone(), shape), device)
    }
}

impl TrainBatch for Images {
    fn inputs(&self) -> u64 {
        self.len() as u64
    }

    fn targets(&self) -> u64 {
        self.len() as u64
    }
}

impl SuperResolutionConfig {
    fn widths(&self) -> Widths {
        let Self { d_model, qk_dim, n_heads, d_ff, .. } = *self;
        Widths { d_model, qk_dim, n_heads, d_ff }
    }

    fn dims(&self, layer: usize, grid: [usize; 2]) -> Dims {
        let Self { d_model, n_layers, .. } = *self;
        Dims { d_model, n_layers, layer, rope: false, norm_eps: NORM_EPS, grid: Some(grid) }
    }

    fn patches(&self) -> impl Iterator<Item = usize> {
        (0..self.n_layers).map(|layer| self.local_patch.of_layer(layer).expect("validate: one per layer"))
    }

    /// Checks everything that a user can get wrong; the images to learn from have this height and width.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self, size: Option<[usize; 2]>) -> Result<(), ConfigError> {
        let Self { scale, d_model, n_layers, n_heads, qk_dim, d_ff, .. } = *self;
        require([2, 3, 4].contains(&scale), "scale", || format!("scale ({scale}) must be 2, 3 or 4"))?;
        for (field, value, most) in [
            ("d_model", d_model, 4096),
            ("n_layers", n_layers, 1024),
            ("qk_dim", qk_dim, 4096),
            ("d_ff", d_ff, 1 << 14),
        ] {
            require_range(field, value, 1..=most)?;
        }
        require(n_heads > 0 && d_model.is_multiple_of(n_heads) && qk_dim.is_multiple_of(n_heads), "n_heads", || {
            format!("n_heads ({n_heads}) must be at least 1 and divide d_model ({d_model}) and qk_dim ({qk_dim})")
        })?;
        let dims = self.dims(0, UNKNOWN_GRID);
        self.local_patch.check("local_patch", &dims)?;
        for patch in self.patches() {
            require((3..=1024).contains(&patch), "local_patch", || {
                format!("local_patch ({patch}) must be from 3 to 1024: patches share 2 pixels")
            })?;
        }
        let grid = match size {
            Some(size) => self.reduced(size)?,
            None => UNKNOWN_GRID,
        };
        self.mixer.validate(&|layer| self.dims(layer, grid), n_layers).map_err(|error| error.within("mixer"))
    }

    /// Height and width of what images to learn from are reduced to.
    fn reduced(&self, [height, width]: [usize; 2]) -> Result<[usize; 2], ConfigError> {
        let (scale, least) = (self.scale, quality::WINDOW + 2 * self.scale);
        require(height.is_multiple_of(scale) && width.is_multiple_of(scale), "scale", || {
            format!("scale ({scale}) must divide the images to learn from, {height} x {width} pixels")
        })?;
        require(height.min(width) >= least, "scale", || {
            format!(
                "scale ({scale}) takes images to learn from of {least} x {least} pixels at least, which SSIM is measured on; they are {height} x {width}"
            )
        })?;
        let small = [height / scale, width / scale];
        self.check_image(small).map_err(|problem| ConfigError::new("local_patch", problem)).map(|()| small)
    }

    /// Checks that an image of this height and width can be enlarged.
    ///
    /// # Errors
    /// Why not.
    pub fn check_image(&self, [height, width]: [usize; 2]) -> Result<(), String> {
        let largest = self.patches().max().unwrap_or(0);
        match height.min(width) >= largest {
            true => Ok(()),
            false => Err(format!(
                "local_patch ({largest}) must not be larger than the image that is enlarged, {height} x {width} pixels"
            )),
        }
    }

    /// What mixes the whole image, as a recipe names it.
    pub fn mixer_name(&self) -> &'static str {
        match &self.mixer {
            MixerConfig::TokenCentres(_) => "token_centres",
            MixerConfig::Attention(config) => config.name(),
        }
    }

    /// Channels behind each convolution that enlarges, and by how much it does.
    fn enlargements(&self) -> Vec<usize> {
        if self.scale == 4 { vec![2, 2] } else { vec![self.scale] }
    }

    /// Parameters and costs by part; operations are those of a whole image of this height and width.
    pub fn parts(&self, [height, width]: [usize; 2]) -> Vec<Part> {
        let (layers, grid) = (self.n_layers as u64, [height / self.scale, width / self.scale]);
        let pixels = (grid[0] * grid[1]) as u64;
        let [d, qk] = [self.d_model, self.qk_dim].map(|width| width as u64);
        let conv = |from: u64, to: u64| 9 * from * to;
        let [mlp, of_mlp] = ConvMlp::costs(self.widths());
        let mixer = (0..self.n_layers).map(|layer| self.mixer.cost(&self.dims(layer, grid), [d, qk], pixels));
        let mixer = mixer.fold(Cost::default(), |sum, cost| sum + cost);
        let projections = 2 * d * qk + 2 * d * d;
        let local = self.patches().map(|patch| 2 * pixels * (projections + (patch * patch) as u64 * (d + qk))).sum();
        let (mut at, mut enlarging) = (pixels, [0, 0]);
        for by in self.enlargements().into_iter().map(|by| by as u64) {
            let products = conv(d, by * by * d);
            enlarging = [enlarging[0] + products + by * by * d, enlarging[1] + 2 * at * products];
            at *= by * by;
        }
        let colours = COLOURS as u64;
        vec![
            Part::new("input", conv(colours, d) + d, 2 * pixels * conv(colours, d)),
            Part { name: format!("mixer: {}", self.mixer_name()), cost: mixer },
            Part::new("local attention", layers * projections, local),
            Part::new("feed-forward", 2 * layers * mlp, 4 * layers * pixels * of_mlp),
            Part::new("norms", 8 * layers * d, 0),
            Part::new("convolutions", layers * (conv(d, d) + d), 2 * layers * pixels * conv(d, d)),
            Part::new("enlarging", enlarging[0], enlarging[1]),
            Part::new("output", conv(d, colours) + colours, 2 * at * conv(d, colours)),
        ]
    }

    /// Numbers that a forward pass keeps of an image of this height and width for its backward pass, roughly.
    pub fn kept_numbers(&self, [height, width]: [usize; 2]) -> usize {
        self.numbers([height / self.scale, width / self.scale], self.n_layers)
    }

    /// Numbers that are there at once while an image of this height and width is enlarged, roughly.
    pub fn working_numbers(&self, size: [usize; 2]) -> u64 {
        self.numbers(size, 1) as u64
    }

    /// What so many layers keep, and what enlarging does.
    fn numbers(&self, [height, width]: [usize; 2], layers: usize) -> usize {
        let Self { d_model, qk_dim, d_ff, scale, .. } = *self;
        let centres = match &self.mixer {
            MixerConfig::TokenCentres(config) => config.n_centres.of_layer(0).unwrap_or(0),
            MixerConfig::Attention(_) => 0,
        };
        let of_layer = 16 * d_model + 4 * qk_dim + 10 * d_ff + centres;
        height.saturating_mul(width).saturating_mul(layers * of_layer + 4 * scale * scale * d_model)
    }
}

impl MixerConfig {
    fn validate(&self, dims: &dyn Fn(usize) -> Dims, n_layers: usize) -> Result<(), ConfigError> {
        match self {
            Self::TokenCentres(config) => config.validate(&dims(0)).map_err(|error| error.within("token_centres")),
            Self::Attention(config) => {
                let checked = (0..n_layers).try_for_each(|layer| config.validate(&dims(layer)));
                let checked = checked.and_then(|()| config.check_bidirectional());
                checked.map_err(|error| error.within("attention"))
            }
        }
    }

    /// Costs of a layer, operations over all pixels.
    fn cost(&self, dims: &Dims, [d, qk]: [u64; 2], pixels: u64) -> Cost {
        let (parameters, flops_per_token) = match self {
            Self::TokenCentres(config) => {
                let [centres, group] = [&config.n_centres, &config.group_size]
                    .map(|each| each.of_layer(dims.layer).expect("validate: one per layer") as u64);
                let of_centres = d * qk + d * d;
                let of_pixel = 2 * d * qk + 3 * d * d;
                let read = (2 * group.min(pixels) + centres) * (d + qk) + centres * d;
                (of_centres + of_pixel + centres * d + 1, 2 * (pixels * (of_pixel + read) + centres * of_centres))
            }
            Self::Attention(config) => (config.cost(dims).parameters, config.encoder_flops(dims, pixels)),
        };
        Cost { parameters, flops_per_token, ..Cost::default() }
    }
}

impl TokenCentresConfig {
    fn validate(&self, dims: &Dims) -> Result<(), ConfigError> {
        for (field, counts) in [("n_centres", &self.n_centres), ("group_size", &self.group_size)] {
            counts.check(field, dims)?;
            for layer in 0..dims.n_layers {
                require_range(field, counts.of_layer(layer).unwrap_or(0), 1..=1 << 16)?;
            }
        }
        let rules = [
            (
                (1..=1000).contains(&self.iterations),
                "iterations",
                format!("iterations ({}) must be from 1 to 1000", self.iterations),
            ),
            ((0.0..=1.0).contains(&self.decay), "decay", format!("decay ({}) must be from 0 to 1", self.decay)),
        ];
        broken(rules).into_iter().next().map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests;
