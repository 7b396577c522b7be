//! Mixture-of-Head attention from a trained softmax decoder (arXiv 2410.11842, section 4.3): the same heads and weights, and
//! a router that selects some of them.
//!
//! Heads keep their order and grouping: the first ones become the shared ones, as in the authors' LLaMA3. Routed by the norms
//! of the queries, heads that take part count as they did, so that little changes where a head with a short query
//! contributed little. A learned router begins with random weights and has to be trained.

use std::collections::BTreeMap;

use polyhead_attention::{GateNorm, MixtureOfHeadConfig, PerLayerCount, RouterConfig, SoftmaxConfig};

use super::SurgeryError;
use super::convert::{finished, per_layer, softmax_of, weights_of};
use crate::Decoder;
use crate::weights::{Named, load, named};

/// What a decoder becomes.
#[derive(Debug, Clone, PartialEq)]
pub struct Routed {
    /// Heads that take part at every position.
    pub shared_heads: usize,
    /// Of the others, those that take part at each position.
    pub top_k: usize,
    /// Who chooses.
    pub router: RouterConfig,
}

/// The converted model. A learned router's weights come from the device's random numbers: seed it first.
///
/// # Errors
/// If a layer is of another kind, or its heads do not allow it.
pub fn route_heads(parent: &Decoder, routed: &Routed) -> Result<Decoder, SurgeryError> {
    let mut config = parent.config().clone();
    let layers = (0..config.n_layers)
        .map(|layer| Ok(routed.config(softmax_of(parent, layer)?).into()))
        .collect::<Result<Vec<_>, SurgeryError>>()?;
    config.attention = per_layer(layers);
    if let RouterConfig::QueryNorm(_) = routed.router {
        return finished(parent, config, weights_of(parent));
    }
    config.validate().map_err(|error| SurgeryError::Refused(error.to_string()))?;
    let fresh = config.init(parent.vocab_size(), &parent.device());
    let by_name = |model: &Decoder| named(model).into_iter().map(|tensor| (tensor.name.clone(), tensor));
    let mut weights: BTreeMap<String, Named> =
        by_name(&fresh).filter(|(name, _)| name.contains(".attention.router.")).collect();
    weights.extend(by_name(parent));
    Ok(load(fresh, weights)?)
}

impl Routed {
    fn config(&self, softmax: &SoftmaxConfig) -> MixtureOfHeadConfig {
        let SoftmaxConfig { n_heads, n_kv_heads, head_dim, qkv_bias, o_bias, qk_norm, .. } = *softmax;
        MixtureOfHeadConfig {
            n_heads,
            n_kv_heads,
            head_dim,
            qkv_bias,
            o_bias,
            qk_norm,
            shared_heads: PerLayerCount::Same(self.shared_heads),
            top_k: PerLayerCount::Same(self.top_k),
            router: self.router,
            penalty_norm: GateNorm::Code,
            window: softmax.window.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::{Device, Int, Tensor};
    use polyhead_attention::{LearnedRouterConfig, Mask, Observe, QueryNormConfig};
    use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, largest_difference};
    use serde_json::json;

    use super::*;
    use crate::DecoderConfig;

    fn parent(softmax: serde_json::Value) -> Decoder {
        let config = json!({ "d_model": 16, "n_layers": 2, "d_ff": 24, "attention": { "softmax": softmax } });
        let config: DecoderConfig = serde_json::from_value(config).unwrap();
        let fresh = config.init(11, &Device::flex());
        let louder = |tensor: Named| {
            let wave = |(at, value): (usize, &f32)| match tensor.shape.len() {
                2 => 0.3 * ((at * 37 + tensor.values.len()) as f32).sin(),
                _ => value + 0.1 * (at as f32).sin(),
            };
            let values = tensor.values.iter().enumerate().map(wave).collect();
            (tensor.name.clone(), Named { values, ..tensor })
        };
        load(fresh.clone(), named(&fresh).into_iter().map(louder).collect()).unwrap()
    }

    fn logits(model: &Decoder) -> Tensor<3> {
        let tokens = Tensor::<2, Int>::from_ints([[1, 2, 3, 10, 5, 6, 7, 3]], &model.device());
        model.logits(model.forward(tokens, &Mask::causal(), None, Observe::Nothing).hidden)
    }

    fn by_norm(shared_heads: usize, top_k: usize) -> Routed {
        Routed { shared_heads, top_k, router: RouterConfig::QueryNorm(QueryNormConfig::default()) }
    }

    #[test]
    fn where_all_heads_take_part_nothing_changes() {
        let parent = parent(json!({ "n_heads": 4, "n_kv_heads": 2, "qkv_bias": true, "o_bias": true }));
        let same = route_heads(&parent, &by_norm(2, 2)).unwrap();
        assert_tensors_close("logits", logits(&same), logits(&parent), Tolerance::absolute(1e-5));
        let fewer = route_heads(&parent, &by_norm(2, 1)).unwrap();
        let difference = largest_difference(logits(&fewer), logits(&parent));
        assert!(difference > 1e-3, "a head is inactive at every position: {difference}");
    }

    #[test]
    fn windows_and_norms_of_the_parent_are_kept() {
        let window = json!([3, 0]);
        let parent_of = |more: serde_json::Value| {
            let mut softmax = json!({ "n_heads": 4, "n_kv_heads": 2, "window": window });
            softmax.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            parent(softmax)
        };
        let windows = parent_of(json!({}));
        let same = route_heads(&windows, &by_norm(2, 2)).unwrap();
        assert_tensors_close("logits", logits(&same), logits(&windows), Tolerance::absolute(1e-5));
        let normed = parent_of(json!({ "qk_norm": true }));
        assert!(largest_difference(logits(&normed), logits(&windows)) > 1e-3, "norms must be visible");
        // All heads shared, each with the same share of the whole: what is left is the parent.
        let mut routed =
            Routed { shared_heads: 4, top_k: 0, router: RouterConfig::Learned(LearnedRouterConfig::default()) };
        let mut shared = route_heads(&normed, &routed).unwrap();
        shared = load(shared.clone(), named(&shared).into_iter().map(even).collect()).unwrap();
        assert_tensors_close("logits", logits(&shared), logits(&normed), Tolerance::absolute(1e-5));
        routed.router = by_norm(0, 0).router;
        let problem = route_heads(&normed, &routed).unwrap_err().to_string();
        assert!(problem.contains("qk_norm makes all queries equally long"), "{problem}");
    }

    /// A router that finds all heads alike; other weights as they are.
    fn even(tensor: Named) -> (String, Named) {
        let router = tensor.name.contains(".router.");
        let values = tensor.values.iter().map(|value| if router { 0.0 } else { *value }).collect();
        (tensor.name.clone(), Named { values, ..tensor })
    }

    #[test]
    fn a_learned_router_is_new_and_all_else_is_the_parents() {
        let parent = parent(json!({ "n_heads": 4 }));
        let router = RouterConfig::Learned(LearnedRouterConfig::default());
        let routed = route_heads(&parent, &Routed { shared_heads: 2, top_k: 1, router }).unwrap();
        let (old, new) = (named(&parent), named(&routed));
        let kept = |tensor: &&Named| !tensor.name.contains(".router.");
        assert_eq!(new.iter().filter(kept).count(), old.len());
        assert_eq!(new.len(), old.len() + 2 * 3);
        for tensor in new.iter().filter(kept) {
            assert!(old.contains(tensor), "{}", tensor.name);
        }
    }

    #[test]
    fn what_cannot_be_routed_is_refused() {
        let problem = |softmax, routed: Routed| route_heads(&parent(softmax), &routed).unwrap_err().to_string();
        assert!(problem(json!({ "n_heads": 4, "qk_norm": true }), by_norm(2, 1)).contains("qk_norm"));
        assert!(problem(json!({ "n_heads": 4 }), by_norm(2, 3)).contains("top_k (3)"));
        assert!(problem(json!({ "n_heads": 4 }), by_norm(3, 1)).contains("query_norm"));
    }
}
