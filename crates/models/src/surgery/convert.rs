//! New models of trained ones: the same weights but for keys and values, whose heads are pooled, mixed or repeated.

use std::collections::{BTreeMap, BTreeSet};

use polyhead_attention::{AttentionConfig, DecoupledHeadConfig, SharedHeads, SoftmaxConfig};
use polyhead_kernels::without_drawing;
use rayon::prelude::*;

use super::heads::{Cell, Heads, Pool, labels_after};
use super::search::search;
use crate::weights::{Named, WeightsError, layer_of, load, named};
use crate::{Block, Decoder, DecoderConfig, PerLayer};

/// Why a model cannot be converted.
#[derive(Debug, thiserror::Error)]
pub enum SurgeryError {
    /// A setting or the model does not allow it: what, the rule, the way out.
    #[error("{0}")]
    Refused(String),
    /// The converted weights do not fit the converted model, which would be our mistake.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

/// Which query heads share their heads.
#[derive(Debug, Clone, PartialEq)]
pub enum Grouping {
    /// The same number of key and of value heads in all layers, each shared by neighbours.
    Contiguous(usize),
    /// The same number of key and of value heads in all layers, grouped by likeness.
    Ward(usize),
    /// This share of all key and value heads, given to layers by likeness.
    Budget(f64),
    /// These numbers of heads for the keys and the values of each layer, grouped by likeness: (layer 0, keys), (layer 0,
    /// values), (layer 1, keys), ...
    Each(Vec<usize>),
}

/// Weights by name, on their way from one model to another.
type Weights = BTreeMap<String, Named>;

/// The weights of a model's attention: all that a conversion touches.
pub(super) fn weights_of(model: &Decoder) -> Weights {
    let of_layer = |(layer, block): (usize, &Block)| {
        named(&block.attention).into_iter().map(move |tensor| {
            let name = format!("layers.{layer}.attention.{}", tensor.name);
            (name.clone(), Named { name, ..tensor })
        })
    };
    model.layers.iter().enumerate().flat_map(of_layer).collect()
}

pub(super) fn refused<T>(problem: String) -> Result<T, SurgeryError> {
    Err(SurgeryError::Refused(problem))
}

/// The parent with the attention of `config`, made of these weights; all else is shared with it.
pub(super) fn finished(parent: &Decoder, config: DecoderConfig, weights: Weights) -> Result<Decoder, SurgeryError> {
    config.validate().map_err(|error| SurgeryError::Refused(error.to_string()))?;
    let mut layers: Vec<Weights> = vec![Weights::new(); config.n_layers];
    for (name, tensor) in weights {
        let within = layer_of(&name).and_then(|layer| Some((layer, name.split_once(".attention.")?.1.to_owned())));
        let (layer, name) = within.unwrap_or_else(|| unreachable!("{name} belongs to no layer's attention"));
        layers[layer].insert(name, tensor);
    }
    let device = parent.device();
    let attention = |(layer, weights)| load(without_drawing(|| config.attention(layer, &device)), weights);
    let attention = layers.into_iter().enumerate().map(attention).collect::<Result<_, _>>()?;
    Ok(parent.clone().with_attention(config, attention))
}

/// The heads of a projection of a layer.
pub(super) fn take(weights: &Weights, layer: usize, projection: &str, n: usize) -> Heads {
    let at = |part: &str| weights.get(&format!("layers.{layer}.attention.{projection}.{part}"));
    Heads::of(at("weight").unwrap_or_else(|| unreachable!("every layer has a {projection}")), at("bias"), n)
}

pub(super) fn put(weights: &mut Weights, layer: usize, projection: &str, heads: &Heads) {
    let (weight, bias) = heads.projection();
    for (part, tensor) in [("weight", Some(weight)), ("bias", bias)] {
        if let Some(tensor) = tensor {
            let name = format!("layers.{layer}.attention.{projection}.{part}");
            weights.insert(name.clone(), Named { name, ..tensor });
        }
    }
}

/// The key heads or the value heads of each layer of a model with softmax attention.
///
/// # Errors
/// If a layer is of another kind.
pub fn heads_of_layers(model: &Decoder, cell: Cell) -> Result<Vec<Heads>, SurgeryError> {
    let kv_heads = (0..model.config().n_layers).map(|layer| Ok(any_softmax_of(model, layer)?.kv_heads()));
    let kv_heads = kv_heads.collect::<Result<Vec<usize>, SurgeryError>>()?;
    let weights = weights_of(model);
    Ok(kv_heads.into_iter().enumerate().map(|(layer, n)| take(&weights, layer, cell.projection(), n)).collect())
}

/// A layer's softmax attention, without settings that no other mechanism has; windows and norms of queries and keys some have.
pub(super) fn softmax_of(model: &Decoder, layer: usize) -> Result<&SoftmaxConfig, SurgeryError> {
    let softmax = any_softmax_of(model, layer)?;
    match [("softcap", softmax.softcap), ("scale", softmax.scale)].into_iter().find(|(_, set)| set.is_some()) {
        None => Ok(softmax),
        Some((setting, _)) => refused(format!(
            "layer {layer} has softmax attention with {setting}, which can be converted to: grouped_query, by neighbours; \
             without {setting}, to others"
        )),
    }
}

fn any_softmax_of(model: &Decoder, layer: usize) -> Result<&SoftmaxConfig, SurgeryError> {
    let mechanism = model.config().mechanism(layer);
    if let Some(softmax) = mechanism.get::<SoftmaxConfig>() {
        return Ok(softmax);
    }
    let name = mechanism.name();
    let targets: Vec<&str> =
        AttentionConfig::conversions().filter(|to| to.from.contains(&name)).map(|to| to.name).collect();
    refused(match targets.is_empty() {
        true => {
            format!(
                "layer {layer} has {name} attention, which no conversion takes; softmax attention can be converted (docs: Convert a checkpoint)"
            )
        }
        false => format!("layer {layer} has {name} attention, which can be converted to: {}", targets.join(", ")),
    })
}

/// GQA of softmax attention: `kv_heads` key/value heads, each made of those that its query heads read before. Where the
/// parent's groups are cut, a head counts in each new one by the query heads that come with it; heads of more groups than
/// there were are repeated, which changes nothing.
///
/// # Errors
/// If the layers are of another kind, or `kv_heads` does not divide their query heads.
pub fn group_queries(parent: &Decoder, kv_heads: usize, pool: Pool) -> Result<Decoder, SurgeryError> {
    let (mut config, mut weights) = (parent.config().clone(), weights_of(parent));
    let mut layers = Vec::new();
    for layer in 0..config.n_layers {
        let softmax = any_softmax_of(parent, layer)?;
        let (n_heads, before) = (softmax.n_heads, softmax.kv_heads());
        if kv_heads == 0 || !n_heads.is_multiple_of(kv_heads) {
            return refused(format!("--kv-heads ({kv_heads}) must divide the {n_heads} query heads of layer {layer}"));
        }
        // The fewest parts of which the old groups and the new ones can be put together.
        let parts = (1..=n_heads).find(|n| n.is_multiple_of(before) && n.is_multiple_of(kv_heads)).unwrap_or(n_heads);
        for cell in [Cell::Keys, Cell::Values] {
            let heads = take(&weights, layer, cell.projection(), before).reordered(&contiguous(parts, before));
            put(&mut weights, layer, cell.projection(), &heads.pooled(&contiguous(parts, kv_heads), pool));
        }
        layers.push(SoftmaxConfig { n_kv_heads: Some(kv_heads), ..softmax.clone() }.into());
    }
    config.attention = per_layer(layers);
    finished(parent, config, weights)
}

fn contiguous(n: usize, groups: usize) -> Vec<usize> {
    (0..n).map(|head| head / (n / groups)).collect()
}

/// One table where all layers are alike.
pub(crate) fn per_layer(layers: Vec<AttentionConfig>) -> PerLayer<AttentionConfig> {
    match layers.first() {
        Some(first) if layers.iter().all(|layer| layer == first) => PerLayer::Same(first.clone()),
        _ => PerLayer::Each(layers),
    }
}

/// For each layer, the groups of the parent's key heads and of its value heads. Where query heads share a head, it is one.
pub(super) fn groups(parent: &Decoder, grouping: &Grouping) -> Result<Vec<[Vec<usize>; 2]>, SurgeryError> {
    let (config, weights) = (parent.config(), weights_of(parent));
    let mut cells = Vec::new();
    for layer in 0..config.n_layers {
        let softmax = softmax_of(parent, layer)?;
        cells.extend(
            [Cell::Keys, Cell::Values].map(|cell| take(&weights, layer, cell.projection(), softmax.kv_heads())),
        );
    }
    let labels = labels(&cells, grouping)?;
    Ok(labels.chunks(2).map(|pair| [pair[0].clone(), pair[1].clone()]).collect())
}

/// For each cell, which of its heads become one.
fn labels(cells: &[Heads], grouping: &Grouping) -> Result<Vec<Vec<usize>>, SurgeryError> {
    let alike = |(heads, n): (&Heads, usize)| labels_after(heads.len(), &heads.agglomerate()[..heads.len() - n]);
    match grouping {
        Grouping::Contiguous(n) => match cells.iter().find(|heads| *n == 0 || !heads.len().is_multiple_of(*n)) {
            Some(heads) => {
                refused(format!("--kv-heads ({n}) must divide the {} key/value heads of every layer", heads.len()))
            }
            None => Ok(cells.iter().map(|heads| contiguous(heads.len(), *n)).collect()),
        },
        Grouping::Ward(n) => labels(cells, &Grouping::Each(vec![*n; cells.len()])),
        Grouping::Budget(share) => Ok(search(cells, budget(cells, *share)?)),
        Grouping::Each(counts) => match cells.iter().zip(counts).find(|(heads, n)| !(1..=heads.len()).contains(*n)) {
            Some((heads, n)) => {
                refused(format!("--kv-heads ({n}) must be 1 to {}, the key/value heads of every layer", heads.len()))
            }
            None => Ok(cells.par_iter().zip(counts.par_iter().copied()).map(alike).collect()),
        },
    }
}

/// How many heads a share of all is.
fn budget(cells: &[Heads], share: f64) -> Result<usize, SurgeryError> {
    heads_of_budget(share, cells.len(), cells.iter().map(Heads::len).sum())
}

/// How many of `all` heads a share of them is, where each of `cells` keeps one at least.
///
/// # Errors
/// If the share is too small or no share.
pub fn heads_of_budget(share: f64, cells: usize, all: usize) -> Result<usize, SurgeryError> {
    let heads = (share * all as f64).round() as usize;
    if !(share > 0.0 && share <= 1.0) || heads < cells {
        let least = cells as f64 / all as f64;
        return refused(format!("--kv-budget ({share}) must be {least:.4} (one head each) to 1"));
    }
    Ok(heads)
}

/// Decoupled heads of a layer whose key and value heads belong to these groups.
pub(super) fn decoupled_config(softmax: &SoftmaxConfig, groups: &[Vec<usize>; 2], fusing: bool) -> DecoupledHeadConfig {
    let SoftmaxConfig { n_heads, n_kv_heads, head_dim, qkv_bias, o_bias, qk_norm, .. } = *softmax;
    let (share, window) = (n_heads / softmax.kv_heads(), softmax.window.clone());
    let [key_map, value_map] = groups.each_ref().map(|groups| (0..n_heads).map(|head| groups[head / share]).collect());
    let n_kv_heads = n_kv_heads.filter(|&kv_heads| fusing && kv_heads != n_heads);
    DecoupledHeadConfig { n_heads, head_dim, key_map, value_map, qkv_bias, o_bias, qk_norm, window, fusing, n_kv_heads }
}

/// Decoupled heads of softmax attention, each pooled from a group. Budgets are shares of the parent's key and value heads.
///
/// # Errors
/// If a layer is of another kind, or the grouping does not fit.
pub fn decouple(parent: &Decoder, grouping: &Grouping, pool: Pool) -> Result<Decoder, SurgeryError> {
    let (mut config, mut weights) = (parent.config().clone(), weights_of(parent));
    let mut layers = Vec::new();
    for (layer, groups) in groups(parent, grouping)?.into_iter().enumerate() {
        let softmax = softmax_of(parent, layer)?;
        for (cell, labels) in [Cell::Keys, Cell::Values].into_iter().zip(&groups) {
            let heads = take(&weights, layer, cell.projection(), softmax.kv_heads());
            put(&mut weights, layer, cell.projection(), &heads.pooled(labels, pool));
        }
        layers.push(decoupled_config(softmax, &groups, false).into());
    }
    config.attention = per_layer(layers);
    finished(parent, config, weights)
}

/// The same function with a key and a value head for every query head: heads that are shared are repeated.
///
/// # Errors
/// If the heads of a layer are not shared by maps that stay, or are still being fused.
pub fn expanded(model: &Decoder) -> Result<Decoder, SurgeryError> {
    let (mut config, mut weights) = (model.config().clone(), weights_of(model));
    let mut layers = Vec::new();
    for layer in 0..config.n_layers {
        let SharedHeads { softmax, maps } = shared_heads(&config, layer)?;
        reorder(&mut weights, &config, layer, [&maps[0], &maps[1]]);
        layers.push(AttentionConfig::from(softmax));
    }
    config.attention = per_layer(layers);
    finished(model, config, weights)
}

/// How the query heads of a layer share key and value heads.
///
/// # Errors
/// If they do not.
pub(super) fn shared_heads(config: &DecoderConfig, layer: usize) -> Result<SharedHeads, SurgeryError> {
    let mechanism = config.mechanism(layer);
    mechanism.shared_heads().map_err(|problem| {
        SurgeryError::Refused(format!("layer {layer} has {} attention: {problem}", mechanism.name()))
    })
}

/// Puts these of a layer's key heads and of its value heads in the place of all of them.
pub(super) fn reorder(weights: &mut Weights, config: &DecoderConfig, layer: usize, heads: [&[usize]; 2]) {
    for (cell, order) in [Cell::Keys, Cell::Values].into_iter().zip(heads) {
        let weight = &weights[&format!("layers.{layer}.attention.{}.weight", cell.projection())];
        let there = weight.shape[1] / config.head_dim(layer);
        if !order.iter().copied().eq(0..there) {
            let all = take(weights, layer, cell.projection(), there);
            put(weights, layer, cell.projection(), &all.reordered(order));
        }
    }
}

/// The heads that a map names, in order, and the map by their places among them.
pub(super) fn renumbered(map: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let read: Vec<usize> = BTreeSet::from_iter(map.iter().copied()).into_iter().collect();
    let place = |head: &usize| read.partition_point(|other| other < head);
    (read.clone(), map.iter().map(place).collect())
}

/// The same function as standard GQA, its query heads reordered, where every layer shares its keys and its values by the same
/// map in equal groups; `None` where one does not, or all are softmax attention already.
///
/// # Errors
/// If the weights do not fit, which would be our mistake.
pub fn standard_grouped(model: &Decoder) -> Result<Option<Decoder>, SurgeryError> {
    let mut config = model.config().clone();
    let mut plans = Vec::new();
    for layer in 0..config.n_layers {
        let Ok(SharedHeads { softmax, maps: [keys, values] }) = shared_heads(&config, layer) else { return Ok(None) };
        let (read, map) = renumbered(&keys);
        let equal = |group| map.iter().filter(|&&label| label == group).count() * read.len() == softmax.n_heads;
        if keys != values || !(0..read.len()).all(equal) {
            return Ok(None);
        }
        let n_kv_heads = Some(read.len()).filter(|&kv_heads| kv_heads != softmax.n_heads);
        plans.push((read, map, AttentionConfig::from(SoftmaxConfig { n_kv_heads, ..softmax })));
    }
    if plans.iter().enumerate().all(|(layer, (.., new))| config.mechanism(layer).name() == new.name()) {
        return Ok(None);
    }
    let mut weights = weights_of(model);
    for (layer, (read, map, _)) in plans.iter().enumerate() {
        reorder(&mut weights, &config, layer, [read, read]);
        let n_heads = map.len();
        let mut order: Vec<usize> = (0..n_heads).collect();
        order.sort_by_key(|&head| (map[head], head));
        if order.is_sorted() {
            continue;
        }
        let queries = take(&weights, layer, "q_proj", n_heads);
        put(&mut weights, layer, "q_proj", &queries.reordered(&order));
        let name = format!("layers.{layer}.attention.o_proj.weight");
        if let Some(tensor) = weights.get_mut(&name) {
            let head = tensor.values.len() / n_heads;
            tensor.values =
                order.iter().flat_map(|&from| tensor.values[from * head..(from + 1) * head].to_vec()).collect();
        }
    }
    config.attention = per_layer(plans.into_iter().map(|(.., new)| new).collect());
    finished(model, config, weights).map(Some)
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::{Device, Int, Tensor};
    use polyhead_attention::{Mask, Observe};
    use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, largest_difference};

    use super::*;

    /// Two layers of four heads with weights from a wave: the same in every run, and large enough to attend sharply.
    pub fn parent() -> Decoder {
        let attention = serde_json::json!({ "softmax": { "n_heads": 4, "qkv_bias": true } });
        let config = serde_json::json!({ "d_model": 16, "n_layers": 2, "attention": attention });
        wave(&serde_json::from_value(config).unwrap())
    }

    /// A decoder with weights from a wave.
    pub fn wave(config: &DecoderConfig) -> Decoder {
        let model = config.init(11, &Device::flex());
        let wave = |tensor: Named| {
            let seed = tensor.name.bytes().map(f32::from).sum::<f32>();
            let values = (0..tensor.values.len()).map(|at| 0.5 * (at as f32 * 1.7 + seed).sin()).collect();
            (tensor.name.clone(), Named { values, ..tensor })
        };
        load(model.clone(), named(&model).into_iter().map(wave).collect()).unwrap()
    }

    pub fn logits(model: &Decoder) -> Tensor<3> {
        let tokens = Tensor::<2, Int>::from_ints([[1, 2, 3, 4, 5, 6, 7]], &model.device());
        model.logits(model.forward(tokens, &Mask::causal(), None, Observe::Nothing).hidden)
    }

    pub fn same(a: &Decoder, b: &Decoder) {
        assert_tensors_close("logits", logits(a), logits(b), Tolerance::absolute(2e-5));
    }

    #[test]
    fn the_whole_budget_is_the_parent_and_neighbours_are_gqa() {
        let parent = parent();
        same(&decouple(&parent, &Grouping::Budget(1.0), Pool::Mean).unwrap(), &parent);
        let grouped = group_queries(&parent, 2, Pool::NormRestoring).unwrap();
        let decoupled = decouple(&parent, &Grouping::Contiguous(2), Pool::NormRestoring).unwrap();
        same(&grouped, &decoupled);
        same(&standard_grouped(&decoupled).unwrap().unwrap(), &grouped);
        assert!(largest_difference(logits(&grouped), logits(&parent)) > 1e-2, "pooling must be visible");
    }

    #[test]
    fn groups_that_are_no_neighbours_become_gqa_in_another_order() {
        let parent = parent();
        let grouped = decouple(&parent, &Grouping::Contiguous(2), Pool::Mean).unwrap();
        // Heads 0 and 3 share, 1 and 2 share: labels by hand.
        let (mut config, weights) = (grouped.config().clone(), weights_of(&grouped));
        let AttentionConfig::DecoupledHead(mut heads) = config.mechanism(0).clone() else { panic!() };
        (heads.key_map, heads.value_map) = (vec![0, 1, 1, 0], vec![0, 1, 1, 0]);
        config.attention = PerLayer::Same(AttentionConfig::DecoupledHead(heads));
        let shuffled = finished(&grouped, config, weights).unwrap();
        same(&standard_grouped(&shuffled).unwrap().unwrap(), &shuffled);
        same(&expanded(&shuffled).unwrap(), &shuffled);
    }

    #[test]
    fn budgets_are_kept_and_maps_that_differ_are_no_gqa() {
        let parent = parent();
        let lean = decouple(&parent, &Grouping::Budget(0.4), Pool::Mean).unwrap();
        let heads = |layer| match lean.config().mechanism(layer) {
            AttentionConfig::DecoupledHead(heads) => heads.fused_heads().iter().sum::<usize>(),
            _ => 0,
        };
        assert_eq!(heads(0) + heads(1), 6);
        assert!(standard_grouped(&lean).unwrap().is_none());
        same(&expanded(&lean).unwrap(), &lean);
        assert!(decouple(&lean, &Grouping::Budget(0.4), Pool::Mean).is_err());
    }
}
