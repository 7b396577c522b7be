//! Saliency of attention: how much every weight of every map matters to a token, |A ⊙ ∂L/∂A| with L = -log p(token) (arXiv 2601.20279).
//!
//! A gate of ones on every map has the gradient A ⊙ ∂L/∂A, so that nothing but the gate needs one, and every mechanism with a map has
//! it. The row that matters is that of the query whose logits predict the token: the authors' released code reads the row of the token
//! itself, which by causality has no gradient, so that all its scores are 0.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Gradients, Tensor};
use polyhead_attention::{Amount, At, Change, Edit, Mask, QuerySite};
use polyhead_models::sites::SitePlan;
use polyhead_models::{Decoder, Pass};

use crate::lens::ids;

/// What every weight matters to a token.
#[derive(Debug, Clone)]
pub struct Saliency {
    /// -log p(token)
    pub loss: f64,
    /// `[heads, queries, keys]` of each layer that has a map.
    pub maps: Vec<(usize, Tensor<3>)>,
}

/// The saliency of the token at `position` of a text, for a model on a device with autodiff.
pub fn saliency(model: &Decoder, tokens: &[u32], position: usize) -> Saliency {
    let device = model.device();
    let with_map = |layer: &usize| model.config().mechanism(*layer).absent(QuerySite::Weights.into()).is_none();
    let layers: Vec<usize> = (0..model.layers.len()).filter(with_map).collect();
    // The number of heads is that of the gate's own reading.
    let plain = model.valid();
    let sites =
        SitePlan { edits: Vec::new(), taps: layers.iter().map(|&layer| (layer, QuerySite::Attended.into())).collect() };
    let rows = [tokens.to_vec()];
    let taps = plain.pass(ids(&plain, &rows), Pass { sites, ..Pass::new(&Mask::causal()) }).taps;
    let gates: Vec<Tensor<4>> = taps
        .iter()
        .map(|tap| Tensor::ones([1, tap.values.dims()[1], tokens.len(), tokens.len()], &device).require_grad())
        .collect();
    let gated = |(&layer, gate): (&usize, &Tensor<4>)| {
        let change = Change::Affine { gate: Amount::Each(gate.clone()), value: Amount::Number(0.0) };
        (layer, Edit::new(At::all(QuerySite::Weights.into()), change))
    };
    let sites = SitePlan { edits: layers.iter().zip(&gates).map(gated).collect(), taps: Vec::new() };
    let hidden = model.pass(ids(model, &rows), Pass { sites, ..Pass::new(&Mask::causal()) }).hidden;
    let logits = model.logits(hidden.narrow(1, position - 1, 1)).squeeze_dim::<2>(1);
    let loss = log_softmax(logits, 1).narrow(1, tokens[position] as usize, 1).neg();
    let grads = loss.backward();
    let size = |gate: &Tensor<4>, grads: &Gradients| {
        let found = gate.grad(grads).map(|grad| grad.abs());
        let dims = gate.dims();
        found.unwrap_or_else(|| Tensor::zeros(dims, &device.clone().inner())).squeeze_dim::<3>(0)
    };
    let maps = layers.iter().zip(&gates).map(|(&layer, gate)| (layer, size(gate, &grads))).collect();
    Saliency { loss: f64::from(loss.into_scalar::<f32>()), maps }
}

impl Saliency {
    /// `[queries, keys]`: the mean over the heads of a layer, each row divided by its length (at least `least`).
    pub fn rows(map: &Tensor<3>, least: f64) -> Tensor<2> {
        let mean = map.clone().mean_dim(0).squeeze_dim::<2>(0);
        let length = mean.clone().square().sum_dim(1).sqrt().clamp_min(least);
        mean / length
    }

    /// The mean over some layers and over the keys `history` of those rows, for the query at `query`.
    pub fn of_history(&self, layers: &[usize], history: Range<usize>, query: usize, least: f64) -> f64 {
        let chosen = self.maps.iter().filter(|(layer, _)| layers.contains(layer));
        let means: Vec<f64> = chosen
            .map(|(_, map)| {
                let row = Self::rows(map, least).narrow(0, query, 1).narrow(1, history.start, history.len());
                row.into_data().iter::<f64>().sum::<f64>() / history.len().max(1) as f64
            })
            .collect();
        means.iter().sum::<f64>() / means.len().max(1) as f64
    }
}
