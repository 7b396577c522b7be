//! Pooling: one vector from the tokens of a sequence, or of an image.
//!
//! | name | what |
//! |---|---|
//! | `mean` | mean over tokens |
//! | `class_token` | the first token, which the model puts in front for this |
//! | `last_token` | the last token that is no padding, wherever the padding is |
//! | `ggem` | generalised mean with an exponent per group of channels; one group is GeM (`pooling/generalized_mean.rs`) |
//! | `mltp` | trainable latents that attend to all layers or all tokens (`pooling/trainable.rs`) |
//!
//! All read the outputs of a model's layers, of which most only take the last. Padding (true in `hidden`, wherever it
//! stands) leaves no trace; every row needs a token that is none.

mod generalized_mean;
mod trainable;

use burn::module::Module;
use burn::tensor::{Bool, Device, Int, Tensor};
use polyhead_attention::ConfigError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use generalized_mean::{GeneralizedMean, GeneralizedMeanConfig};
pub use trainable::{PoolInput, TrainablePooling, TrainablePoolingConfig};
pub(crate) use trainable::{default_linear, unit};

/// How tokens become one vector: in a recipe, a name or a table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PoolingConfig {
    /// Mean over tokens.
    Mean,
    /// The first token.
    ClassToken,
    /// The last token that is no padding.
    LastToken,
    /// Group Generalized Mean: GGeM, and GeM with one group.
    Ggem(GeneralizedMeanConfig),
    /// Multi-Layers Trainable Pooling, and its variants on the last layer.
    Mltp(TrainablePoolingConfig),
}

impl PoolingConfig {
    /// Checks everything that a user can get wrong.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self, d_model: usize) -> Result<(), ConfigError> {
        match self {
            Self::Mean | Self::ClassToken | Self::LastToken => Ok(()),
            Self::Ggem(config) => config.validate(d_model).map_err(|error| error.within("ggem")),
            Self::Mltp(config) => config.validate(d_model).map_err(|error| error.within("mltp")),
        }
    }

    /// Weights of the pooling of a model with `n_layers` layers.
    pub fn parameters(&self, d_model: usize, n_layers: usize) -> u64 {
        match self {
            Self::Mean | Self::ClassToken | Self::LastToken => 0,
            Self::Ggem(config) => config.n_groups as u64,
            Self::Mltp(config) => config.parameters(d_model, n_layers),
        }
    }

    /// The pooling of a model with `n_layers` layers. Cannot fail after [`validate`](Self::validate).
    pub fn init(&self, d_model: usize, n_layers: usize, device: &Device) -> Pooling {
        match self {
            Self::Mean => Pooling::Mean(Plain),
            Self::ClassToken => Pooling::ClassToken(Plain),
            Self::LastToken => Pooling::LastToken(Plain),
            Self::Ggem(config) => Pooling::Ggem(config.init(device)),
            Self::Mltp(config) => Pooling::Mltp(config.init(d_model, n_layers, device)),
        }
    }
}

/// A pooling with its parameters, if it has any.
// A model has one: boxing would buy nothing.
#[allow(clippy::large_enum_variant)]
#[derive(Module, Debug)]
pub enum Pooling {
    /// See [`PoolingConfig::Mean`].
    Mean(Plain),
    /// See [`PoolingConfig::ClassToken`].
    ClassToken(Plain),
    /// See [`PoolingConfig::LastToken`].
    LastToken(Plain),
    /// See [`PoolingConfig::Ggem`].
    Ggem(GeneralizedMean),
    /// See [`PoolingConfig::Mltp`].
    Mltp(TrainablePooling),
}

/// A pooling without parameters.
#[derive(Module, Debug, Default)]
pub struct Plain;

impl Pooling {
    /// # Shapes
    /// - layers: the outputs of the layers, first to last, each `[batch, tokens, d_model]`; at least one
    /// - hidden: `[batch, tokens]`, true where a token is padding
    /// - output: `[batch, d_model]`
    pub fn forward(&self, layers: &[Tensor<3>], hidden: Option<&Tensor<2, Bool>>) -> Tensor<2> {
        let last = layers[layers.len() - 1].clone();
        match self {
            Self::Mean(_) => mean_of_tokens(last, hidden),
            Self::ClassToken(_) => last.narrow(1, 0, 1).squeeze_dim(1),
            Self::LastToken(_) => last_token(last, hidden),
            Self::Ggem(pooling) => pooling.forward(last, hidden),
            Self::Mltp(pooling) => pooling.forward(layers, hidden),
        }
    }
}

/// The mean of what is no padding: `[batch, tokens, d_model]` to `[batch, d_model]`.
pub(crate) fn mean_of_tokens(tokens: Tensor<3>, hidden: Option<&Tensor<2, Bool>>) -> Tensor<2> {
    let Some(hidden) = hidden else { return tokens.mean_dim(1).squeeze_dim(1) };
    let dims = tokens.dims();
    let kept = tokens.mask_fill(hidden.clone().unsqueeze_dim::<3>(2).expand(dims), 0.0);
    kept.sum_dim(1).squeeze_dim::<2>(1) / count(hidden)
}

/// `[batch, 1]`: tokens that are no padding; at least 1.
fn count(hidden: &Tensor<2, Bool>) -> Tensor<2> {
    hidden.clone().bool_not().float().sum_dim(1).clamp_min(1.0)
}

/// The last token that is no padding: `[batch, tokens, d_model]` to `[batch, d_model]`.
pub(crate) fn last_token(tokens: Tensor<3>, hidden: Option<&Tensor<2, Bool>>) -> Tensor<2> {
    let [batch, count, d_model] = tokens.dims();
    let Some(hidden) = hidden else { return tokens.narrow(1, count - 1, 1).squeeze_dim(1) };
    let positions = Tensor::<1, Int>::arange(0..count as i64, &tokens.device()).unsqueeze::<2>().expand([batch, count]);
    let last = positions.mask_fill(hidden.clone(), 0).max_dim(1); // [batch, 1]
    tokens.gather(1, last.unsqueeze_dim::<3>(2).expand([batch, 1, d_model])).squeeze_dim(1)
}

#[cfg(test)]
mod tests;
