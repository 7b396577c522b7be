//! muP, the maximal update parametrization (Yang et al. 2022, arXiv 2203.03466, tables 3 and 8): initial weights and learning
//! rates depend on the width so that activations and their updates have the same size at any width, and the learning rate that
//! is best at a narrow one is best at a wide one.
//!
//! With m = d_model / base_width, against the plain parametrization:
//!
//! | weights | initial deviation | AdamW's rate | Muon's rate |
//! |---|---|---|---|
//! | embedding, norms, biases, convolutions | 1 | 1 | (AdamW) |
//! | matrices of layers | m^-1/2 | 1/m | m^-1/2, 1/m where few numbers come out |
//! | output projection | 1/m | 1/m | (AdamW) |
//! | a last norm before tied embeddings | 1/m | 1/m | (AdamW) |
//!
//! Muon's updates have singular values of 0.2 lr sqrt(max(rows, columns)); what muP wants of them is sqrt(rows out / rows in).
//! Scores are scaled by 1 / sqrt(head_dim), as they are where wider models have more heads. Where they have wider heads muP wants
//! 1 / head_dim: base_head_dim says what to compare with, and queries begin smaller by sqrt(base_head_dim / head_dim), and learn
//! slower by as much, which is the same under AdamW (lemma J.1). So nothing of the forward pass differs, and trained weights are
//! weights like others. The decay of weights is not scaled: it stays lr * weight_decay.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::weights::{ParameterMapper, layer_of, map_parameters};
use crate::{ConfigError, Decoder, parameters, require};

/// How initial weights and learning rates depend on the width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Parametrization {
    /// They do not.
    #[default]
    Standard,
    /// As in muP.
    Mup,
}

/// What a model with muP is scaled from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mup {
    /// The width at which it is the plain model.
    pub base_width: usize,
    /// The channels of a head there; `None` where heads are as wide.
    pub base_head_dim: Option<usize>,
}

impl Mup {
    /// Checks the settings.
    ///
    /// # Errors
    /// Names the key, its value and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (key, size) in [("base_width", Some(self.base_width)), ("base_head_dim", self.base_head_dim)] {
            require(size != Some(0), key, || format!("{key} (0) must be at least 1"))?;
        }
        Ok(())
    }
}

/// What a parameter is multiplied by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scaling {
    /// Its first values.
    pub init: f64,
    /// Its learning rate under AdamW.
    pub adamw: f64,
    /// Its learning rate under Muon.
    pub muon: f64,
}

impl Scaling {
    /// Nothing changes.
    pub const NONE: Self = Self { init: 1.0, adamw: 1.0, muon: 1.0 };

    fn times(self, factor: f64) -> Self {
        Self { init: self.init * factor, adamw: self.adamw * factor, muon: self.muon * factor }
    }
}

/// What every parameter of a model is multiplied by; those that are not listed by nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scalings(BTreeMap<String, Scaling>);

/// Ends of the names of matrices that few numbers come out of, however wide the model is: one a head, or a latent.
const NARROW: [&str; 7] = [
    "router.routed.weight",
    "router.kinds.weight",
    "router.shared.weight",
    "ba_proj.weight",
    "lambda_proj.weight",
    "q_a_proj.weight",
    "kv_a_proj.weight",
];

impl Scalings {
    /// Those of a decoder.
    pub fn of(decoder: &Decoder, mup: Mup) -> Self {
        let config = decoder.config();
        let wider = config.d_model as f64 / mup.base_width as f64;
        let all = parameters(decoder);
        let exists = |name: &str| all.iter().any(|one| one.name == name);
        let head = Scaling { init: 1.0 / wider, adamw: 1.0 / wider, muon: 1.0 / wider };
        let of = |name: &str, dimensions: usize| {
            let Some(layer) = layer_of(name) else {
                let last_norm = config.tie_embeddings && name.starts_with("norm.");
                return if last_norm || name == "head.weight" { head } else { Scaling::NONE };
            };
            // Latents do not grow with the model: what reads them is as it is.
            let beside =
                |other: &str| name.rsplit_once("q_proj.").is_some_and(|(path, _)| exists(&format!("{path}{other}")));
            let reads_latent = name.ends_with("kv_b_proj.weight") || beside("q_a_proj.weight");
            let narrow = NARROW.iter().any(|end| name.ends_with(end));
            let matrix = dimensions == 2 && !reads_latent;
            let own = Scaling {
                init: if matrix { wider.powf(-0.5) } else { 1.0 },
                adamw: if matrix { 1.0 / wider } else { 1.0 },
                muon: if narrow {
                    1.0 / wider
                } else if matrix {
                    wider.powf(-0.5)
                } else {
                    1.0
                },
            };
            // Where queries are normed, the norm's weight decides how large they are.
            let queries = name.ends_with("q_norm.weight") || name.contains(".q_proj.") && !beside("q_norm.weight");
            let heads = mup.base_head_dim.filter(|_| queries);
            heads.map_or(own, |base| own.times((base as f64 / config.head_dim(layer) as f64).sqrt()))
        };
        let scalings = all.iter().map(|one| (one.name.clone(), of(&one.name, one.shape.len())));
        Self(scalings.filter(|(_, scaling)| *scaling != Scaling::NONE).collect())
    }

    /// What a parameter of this name is multiplied by.
    pub fn get(&self, name: &str) -> Scaling {
        self.0.get(name).copied().unwrap_or(Scaling::NONE)
    }

    /// Fresh weights, scaled.
    pub fn apply(&self, decoder: Decoder) -> Decoder {
        struct Scale<'a>(&'a Scalings);
        impl ParameterMapper for Scale<'_> {
            fn map<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                match self.0.get(&name).init {
                    1.0 => param,
                    // On the inner device: what is multiplied is no part of any tape.
                    factor => param.map(|value| match value.is_require_grad() {
                        true => Tensor::from_inner(value.inner() * factor).require_grad(),
                        false => value * factor,
                    }),
                }
            }
        }
        map_parameters(decoder, Scale(self)).0
    }
}

#[cfg(test)]
mod tests;
