//! Soft perturbed-attention guidance (Ahn et al. 2025, arXiv 2506.10978), for language models: the maps of some heads are pulled to
//! the identity, and the model is steered away from what it then says.
//!
//! ```text
//! A' = (1 - u) A + u I                                             of the chosen heads: each token attends to itself
//! score = (1 + w) log p - w log p'                                 over tokens with p ≥ plausibility · max p
//! ```
//! The paper is about diffusion models and its code could not be had; the transfer and the cut-off are ours. z' = (1 - u) A V + u V is the
//! same change of the head outputs.

use std::sync::Arc;

use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Int, Tensor};
use polyhead_attention::{At, Change, Edit, Place, QueryHead, QuerySite};

/// The change that pulls maps to the identity by `u`.
pub fn to_identity(u: f64) -> Change {
    let pulled = move |weights: Tensor<4>, Place { first, first_key }: Place| {
        let ([_, _, queries, keys], device) = (weights.dims(), weights.device());
        let positions =
            |from: usize, count: usize| Tensor::<1, Int>::arange(from as i64..(from + count) as i64, &device);
        let queries = positions(first, queries).reshape([1, 1, queries, 1]).expand([1, 1, queries, keys]);
        let keys = positions(first_key.unwrap_or(0), keys).reshape([1, 1, 1, keys]).expand(queries.dims());
        let identity = queries.equal(keys).float().cast(weights.dtype());
        weights * (1.0 - u) + identity * u
    };
    Change::With(Arc::new(pulled))
}

/// The changes that pull maps to the identity by `u`; heads are pairs of layer and query head.
pub fn soft_pag(heads: &[(usize, QueryHead)], u: f64) -> Vec<(usize, Edit)> {
    let change = to_identity(u);
    let of_head = |&(layer, head)| (layer, Edit::new(At::Query(QuerySite::Weights, vec![head]), change.clone()));
    heads.iter().map(of_head).collect()
}

/// What guidance makes of the logits after a prompt, each `[batch, vocab]`.
#[derive(Debug, Clone)]
pub struct Guided {
    /// 1 for tokens that are likely enough without guidance, else 0.
    pub plausible: Tensor<2>,
    /// `(1 + w) log p - w log p'`
    pub scores: Tensor<2>,
    /// The distribution over the plausible tokens.
    pub probabilities: Tensor<2>,
}

/// Steers away from `perturbed`, both `[batch, vocab]` logits.
pub fn guided(logits: Tensor<2>, perturbed: Tensor<2>, weight: f64, plausibility: f64) -> Guided {
    let (own, other) = (log_softmax(logits, 1), log_softmax(perturbed, 1));
    let probabilities = own.clone().exp();
    let least = probabilities.clone().max_dim(1) * plausibility;
    let implausible = probabilities.clone().lower(least.expand(probabilities.dims()));
    let scores = own * (1.0 + weight) - other * weight;
    let probabilities = softmax(scores.clone().mask_fill(implausible.clone(), f64::NEG_INFINITY), 1);
    Guided { plausible: implausible.bool_not().float(), scores, probabilities }
}
