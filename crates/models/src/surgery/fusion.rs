//! Fusing decoupled heads (arXiv 2406.06567), before and after training: operators that are the identity, what is left to
//! fuse, and groups that become single heads.

use burn::tensor::{Tensor, TensorData};
use polyhead_attention::{DecoupledHead, DecoupledHeadConfig, Fusion, Softmax, energy};

use super::convert::{decoupled_config, finished, groups, per_layer, put, refused, softmax_of, take, weights_of};
use super::{Cell, Grouping, SurgeryError};
use crate::weights::{Named, named};
use crate::{Block, Decoder, DecoderConfig};

/// What is left to fuse of the keys and of the values of each layer, in the order of the layers; `None` where nothing is
/// being fused.
pub fn scatter(model: &Decoder) -> Option<Vec<f64>> {
    let cells = model.layers.iter().filter_map(|layer| layer.attention.scatter());
    let cells: Vec<f64> = cells.flatten().map(|cell| f64::from(cell.into_scalar::<f32>())).collect();
    (!cells.is_empty()).then_some(cells)
}

/// The mean of [`scatter`] over all cells.
pub fn mean_scatter(model: &Decoder) -> Option<f64> {
    let cells = scatter(model)?;
    Some(cells.iter().sum::<f64>() / cells.len() as f64)
}

/// The parent with operators that are the identity: the same function to the bit, ready to be fused. Of a parent with grouped
/// queries, heads are those that its groups share.
///
/// # Errors
/// As [`decouple`](super::decouple).
pub fn begin_fusion(parent: &Decoder, grouping: &Grouping) -> Result<Decoder, SurgeryError> {
    let (mut config, mut weights) = (parent.config().clone(), weights_of(parent));
    let mut layers = Vec::new();
    for (layer, groups) in groups(parent, grouping)?.into_iter().enumerate() {
        let softmax = softmax_of(parent, layer)?;
        layers.push(decoupled_config(softmax, &groups, true).into());
        let Some(attention) = parent.layers[layer].attention.get::<Softmax>() else { continue };
        let energy = [&attention.k_proj, &attention.v_proj].map(energy);
        let fusion = Fusion::identity(softmax.kv_heads(), Tensor::cat(energy.to_vec(), 0));
        for tensor in named(&fusion) {
            let name = format!("layers.{layer}.attention.fusion.{}", tensor.name);
            weights.insert(name.clone(), Named { name, ..tensor });
        }
    }
    config.attention = per_layer(layers);
    finished(parent, config, weights)
}

/// A layer of decoupled heads, and its settings.
fn decoupled<'a>(
    config: &'a DecoderConfig,
    layer: usize,
    block: &'a Block,
) -> Option<(&'a DecoupledHeadConfig, &'a DecoupledHead)> {
    config.mechanism(layer).get().zip(block.attention.get())
}

/// The parent of a model that [`begin_fusion`] made, as long as nothing has been fused; any other model stays as it is.
///
/// # Errors
/// If operators have moved, so that its weights are not the parent's any more.
pub fn unfused(model: &Decoder) -> Result<Decoder, SurgeryError> {
    let (mut config, mut weights) = (model.config().clone(), weights_of(model));
    let mut layers = Vec::new();
    for (layer, block) in model.layers.iter().enumerate() {
        let Some((old, attention)) = decoupled(&config, layer, block) else {
            layers.push(config.mechanism(layer).clone());
            continue;
        };
        let Some(operators) = attention.operators() else {
            return refused(format!("the heads of layer {layer} are fused already"));
        };
        let identity: TensorData = Tensor::<2>::eye(old.heads_to_fuse(), &model.device()).into_data();
        if operators.into_iter().any(|operator| operator.into_data() != identity) {
            return refused(format!("the heads of layer {layer} have begun to fuse: their weights have moved"));
        }
        weights.retain(|name, _| !name.starts_with(&format!("layers.{layer}.attention.fusion.")));
        layers.push(old.before_fusion().into());
    }
    config.attention = per_layer(layers);
    finished(model, config, weights)
}

/// The model with every group fused into one head by the mean of its operators' rows. Nothing changes where the scatter is
/// 0.
///
/// # Errors
/// If nothing is being fused.
pub fn collapse(fused: &Decoder) -> Result<Decoder, SurgeryError> {
    let (mut config, mut weights) = (fused.config().clone(), weights_of(fused));
    let mut layers = Vec::new();
    for (layer, block) in fused.layers.iter().enumerate() {
        let Some((old, attention)) = decoupled(&config, layer, block) else {
            return refused(format!(
                "layer {layer} has {} attention: nothing is fused",
                config.mechanism(layer).name()
            ));
        };
        let Some(operators) = attention.operators() else {
            return refused(format!("the heads of layer {layer} are fused already"));
        };
        for ((cell, labels), operator) in [Cell::Keys, Cell::Values].into_iter().zip(old.groups()).zip(operators) {
            let operator: Vec<f64> = operator.into_data().iter::<f64>().collect();
            let heads = take(&weights, layer, cell.projection(), old.heads_to_fuse());
            put(&mut weights, layer, cell.projection(), &heads.collapsed(&labels, &operator));
        }
        weights.retain(|name, _| !name.starts_with(&format!("layers.{layer}.attention.fusion.")));
        layers.push(DecoupledHeadConfig { fusing: false, n_kv_heads: None, ..old.clone() }.into());
    }
    config.attention = per_layer(layers);
    finished(fused, config, weights)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::surgery::convert::tests::{logits, parent, same};
    use crate::surgery::{Pool, decouple};

    #[test]
    fn fusion_begins_as_the_parent_and_collapses_without_a_change() {
        let parent = parent();
        let grouping = Grouping::Budget(0.4);
        let mut fusing = begin_fusion(&parent, &grouping).unwrap();
        logits(&fusing).into_data().assert_eq(&logits(&parent).into_data(), true);
        assert_eq!(named(&unfused(&fusing).unwrap()), named(&parent));
        assert!(scatter(&fusing).unwrap().len() == 4 && scatter(&parent).is_none());
        fusing.layers.iter_mut().for_each(|layer| layer.attention.set_anneal(1.0));
        assert!(scatter(&fusing).unwrap().into_iter().all(|cell| cell < 1e-9));
        assert!(unfused(&fusing).is_err(), "operators that average are not the identity");
        let collapsed = collapse(&fusing).unwrap();
        same(&collapsed, &fusing);
        // What averaging operators that are the identity leaves is the mean of the heads.
        same(&collapsed, &decouple(&parent, &grouping, Pool::Mean).unwrap());
        assert!(collapse(&collapsed).is_err());
    }
}
