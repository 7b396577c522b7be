//! Low-rank pairs for the projections of a whole decoder, and LoRA (Hu et al. 2021, arXiv 2106.09685): such pairs as
//! parameters, which are learned while the weights stay as they are.
//!
//! As in the authors' code and PEFT: A is drawn from U(-1/sqrt(d_input), 1/sqrt(d_input)) (Kaiming's initialisation with
//! a = sqrt(5)), B is zero, and the product is scaled by alpha / rank. Left out: dropout, adapters on embeddings.

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use polyhead_attention::{Adapter, ConfigError, require, require_positive, require_range};
use polyhead_kernels::in_type;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::weights::{ParameterMapper, map_parameters};
use crate::{Decoder, Parameter, parameters};

/// Low-rank pairs: how large, and for which projections.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Channels between A and B. Default: 8.
    pub rank: usize,
    /// What is added is scaled by alpha / rank. Default: 16.
    pub alpha: f64,
    /// Projections that are added to, in every layer that has them. Default: ["q_proj", "v_proj"], as the paper.
    pub targets: Vec<String>,
    /// Parameters that are trained as a whole besides, by their names in a checkpoint, with * for any text: LongLoRA (arXiv 2309.12307)
    /// trains ["embedding.*", "*norm*"]. A checkpoint has all weights then. Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub train_whole: Vec<String>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { rank: 8, alpha: 16.0, targets: vec!["q_proj".into(), "v_proj".into()], train_whole: Vec::new() }
    }
}

impl LoraConfig {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        require_range("rank", self.rank, 1..=1 << 16)?;
        require_positive("alpha", self.alpha)?;
        require(!self.targets.is_empty(), "targets", || "targets is empty: name projections, such as \"q_proj\"".into())
    }
}

/// A projection of a layer.
struct Projection {
    layer: usize,
    name: String,
    /// Input and output channels.
    sizes: [usize; 2],
}

/// The projection that a parameter is the weight of: its layer and name. Mechanisms that have softmax attention inside (sinks,
/// gates) call its projections as it does.
fn projection_of(parameter: &str) -> Option<(usize, &str)> {
    let parts: Vec<&str> = parameter.strip_prefix("layers.")?.split('.').collect();
    match parts[..] {
        [layer, _, name, "weight"] | [layer, _, "softmax", name, "weight"] if name.ends_with("_proj") => {
            Some((layer.parse().ok()?, name))
        }
        _ => None,
    }
}

fn projections(model: &Decoder) -> Vec<Projection> {
    let projection = |parameter: Parameter| match (projection_of(&parameter.name), &parameter.shape[..]) {
        (Some((layer, name)), &[d_input, d_output]) => {
            Some(Projection { layer, name: name.to_owned(), sizes: [d_input, d_output] })
        }
        _ => None,
    };
    parameters(model).into_iter().filter_map(projection).collect()
}

/// A target that no layer has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("targets: the model has no projection \"{target}\"; it has {there}")]
pub struct NoSuchProjection {
    target: String,
    there: String,
}

/// Fresh pairs for the layers from `first_layer` on, for each layer of the model: on the model's inner device, a pure
/// function of the model's shape, `seed` and `stream`.
///
/// # Errors
/// If a target is no projection of these layers.
pub fn draw(
    model: &Decoder,
    config: &LoraConfig,
    first_layer: usize,
    (seed, stream): (u64, u64),
) -> Result<Vec<Vec<Adapter>>, NoSuchProjection> {
    let all = projections(model);
    let above = || all.iter().filter(|one| one.layer >= first_layer);
    if let Some(target) = config.targets.iter().find(|target| above().all(|one| one.name != **target)) {
        let mut there: Vec<&str> = above().map(|one| one.name.as_str()).collect();
        there.sort_unstable();
        there.dedup();
        return Err(NoSuchProjection { target: target.clone(), there: there.join(", ") });
    }
    let device = model.device().inner();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    let mut layers = vec![Vec::new(); model.layers.len()];
    for Projection { layer, name, sizes: [d_input, d_output] } in all {
        if layer < first_layer || !config.targets.contains(&name) {
            continue;
        }
        let bound = 1.0 / (d_input as f32).sqrt();
        let values: Vec<f32> = (0..d_input * config.rank).map(|_| rng.random_range(-bound..bound)).collect();
        layers[layer].push(Adapter {
            projection: name.into(),
            a: Tensor::from_data(TensorData::new(values, [d_input, config.rank]), &device),
            b: Tensor::zeros([config.rank, d_output], &device),
            scale: config.alpha / config.rank as f64,
        });
    }
    Ok(layers)
}

/// Whether a parameter of a decoder is a half of a low-rank pair.
pub fn is_pair(parameter: &str) -> bool {
    parameter.starts_with("lora.")
}

/// The pairs of a decoder, as parameters.
#[derive(Module, Debug)]
pub struct Lora {
    /// One per layer of the model
    pub layers: Vec<LoraLayer>,
}

/// The pairs of a layer.
#[derive(Module, Debug)]
pub struct LoraLayer {
    /// In the order of the layer's projections
    pub pairs: Vec<LoraPair>,
}

/// The pair of a projection.
#[derive(Module, Debug)]
pub struct LoraPair {
    /// `[d_input, rank]`
    pub a: Param<Tensor<2>>,
    /// `[rank, d_output]`
    pub b: Param<Tensor<2>>,
    scale: f64,
    #[module(skip)]
    projection: String,
}

impl LoraLayer {
    /// As a call is told.
    pub(crate) fn adapters(&self) -> impl Iterator<Item = Adapter> {
        self.pairs.iter().map(|pair| Adapter {
            projection: pair.projection.as_str().into(),
            a: pair.a.val(),
            b: pair.b.val(),
            scale: pair.scale,
        })
    }
}

/// The pairs of a decoder, each with the name of the weight that it is beside.
pub fn pairs_by_weight(model: &Decoder) -> Vec<(String, Adapter)> {
    let mut pairs: Vec<_> =
        model.lora.iter().flat_map(|lora| &lora.layers).map(|layer| layer.adapters().peekable()).collect();
    let of = |parameter: Parameter| {
        let (layer, name) = projection_of(&parameter.name)?;
        let pair = pairs.get_mut(layer)?.next_if(|pair| *pair.projection == *name)?;
        Some((parameter.name, pair))
    };
    parameters(model).into_iter().filter_map(of).collect()
}

impl Decoder {
    /// The decoder with fresh pairs, which change nothing yet; they are parameters like all others.
    ///
    /// # Errors
    /// If a target is no projection of the model.
    pub fn with_lora(mut self, config: &LoraConfig, seed: u64) -> Result<Self, NoSuchProjection> {
        let device = self.device();
        let lift = |x: Tensor<2>| match device.is_autodiff() {
            true => Param::from_tensor(Tensor::from_inner(x)),
            false => Param::from_tensor(x),
        };
        let layer = |adapters: Vec<Adapter>| {
            let pair = |Adapter { projection, a, b, scale }| LoraPair {
                a: lift(a),
                b: lift(b),
                scale,
                projection: projection.to_string(),
            };
            LoraLayer { pairs: adapters.into_iter().map(pair).collect() }
        };
        let layers = draw(&self, config, 0, (seed, 0))?.into_iter().map(layer).collect();
        self.lora = Some(Lora { layers });
        Ok(self)
    }

    /// The decoder with its pairs folded into the weights; the same where there are none.
    pub fn merged(mut self) -> Self {
        struct Fold<'a>(&'a [LoraLayer]);
        impl ParameterMapper for Fold<'_> {
            fn map<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let Some((layer, name)) = projection_of(&name) else { return param };
                let pairs = self.0[layer].adapters().filter(|pair| &*pair.projection == name);
                pairs.fold(param, |param, Adapter { a, b, scale, .. }| {
                    let product = (a.matmul(b) * scale).detach();
                    param.map(|weight| {
                        let learned = weight.is_require_grad();
                        let shape = weight.dims();
                        (in_type(weight.detach(), product.dtype()) + product.reshape(shape))
                            .detach()
                            .set_require_grad(learned)
                    })
                })
            }
        }
        match self.lora.take() {
            Some(lora) => map_parameters(self, Fold(&lora.layers)).0,
            None => self,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::module::ModuleMapper;
    use burn::tensor::{Device, Distribution, Int};
    use polyhead_attention::Mask;
    use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, largest_difference};
    use polyhead_kernels::random;

    use super::*;
    use crate::{DecoderConfig, Pass, train_only};

    fn model(attention: &str) -> Decoder {
        let json = format!(r#"{{"d_model":16,"n_layers":2,"attention":{attention}}}"#);
        let config: DecoderConfig = serde_json::from_str(&json).unwrap();
        config.init(11, &Device::flex().autodiff())
    }

    fn logits(model: &Decoder) -> Tensor<3> {
        let tokens = Tensor::<2, Int>::from_ints([[1, 2, 3, 4, 5, 6, 7]], &model.device());
        model.logits(model.pass(tokens, Pass::new(&Mask::causal())).hidden)
    }

    /// B away from zero, so that pairs do something.
    struct Grow;

    impl ModuleMapper for Grow {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|x| (x.clone() + random(x.dims(), Distribution::Normal(0.0, 0.3), &x.device())).detach())
        }
    }

    #[test]
    fn fresh_pairs_change_nothing_and_merged_ones_compute_the_same() {
        for (attention, targets) in [
            (r#"{"softmax":{"n_heads":4,"qkv_bias":true}}"#, vec!["q_proj", "o_proj", "down_proj", "gate_proj"]),
            (r#"{"grouped_differential":{"n_heads":4,"n_noise_heads":1}}"#, vec!["k_proj", "v_proj", "up_proj"]),
            (r#"{"sink":{"n_heads":4,"n_kv_heads":2}}"#, vec!["q_proj", "k_proj", "v_proj", "o_proj"]),
            (r#"{"gated_attention":{"n_heads":4}}"#, vec!["q_proj", "k_proj", "v_proj", "o_proj", "g_proj"]),
        ] {
            let plain = model(attention);
            let config = LoraConfig {
                rank: 3,
                alpha: 5.0,
                targets: targets.iter().map(|&t| t.into()).collect(),
                ..LoraConfig::default()
            };
            let with = plain.clone().with_lora(&config, 3).unwrap();
            logits(&with).into_data().assert_eq(&logits(&plain).into_data(), true);
            let pairs: Vec<usize> = with.lora.as_ref().unwrap().layers.iter().map(|layer| layer.pairs.len()).collect();
            assert_eq!(pairs, [targets.len(); 2]);
            let grown = with.map(&mut Grow);
            let (apart, merged) = (logits(&grown), logits(&grown.clone().merged()));
            assert!(largest_difference(apart.clone(), logits(&plain)) > 1e-2);
            assert_tensors_close("logits", merged, apart, Tolerance::relative(1e-5).of_at_least(1.0));
            assert_eq!(grown.merged().num_params(), plain.num_params());
        }
    }

    #[test]
    fn only_pairs_learn_where_they_are_told_to() {
        let with = model(r#"{"softmax":{"n_heads":4}}"#).with_lora(&LoraConfig::default(), 3).unwrap();
        let only = train_only(with, |name| name.starts_with("lora."));
        let grads = logits(&only).sum().backward();
        let pair = &only.lora.as_ref().unwrap().layers[1].pairs[0];
        assert!(pair.b.val().grad(&grads).is_some());
        assert!(only.embedding.weight.val().grad(&grads).is_none());
        assert!(only.layers[1].mlp.as_ref().unwrap().up_proj.weight.val().grad(&grads).is_none());
    }

    #[test]
    fn a_target_that_is_not_there_is_told_with_those_that_are() {
        let config = LoraConfig { targets: vec!["qkv_proj".into()], ..LoraConfig::default() };
        let told = model(r#"{"softmax":{"n_heads":4}}"#).with_lora(&config, 3).err().unwrap().to_string();
        assert!(told.contains("\"qkv_proj\"") && told.contains("gate_proj, k_proj"), "{told}");
        assert_eq!(LoraConfig { rank: 0, ..LoraConfig::default() }.validate().unwrap_err().field, "rank");
    }
}
