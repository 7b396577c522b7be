//! Key-driven grouping (arXiv 2408.08454) of a trained decoder: its keys are measured once, on text, and the allocation that
//! they call for is frozen.
//!
//! The heads stay where they are, so that query heads change partners where a group's size changes: a converted model has to
//! be trained on.

use polyhead_attention::key_driven::{AllocationConfig, FixedConfig, allocation, key_norms};
use polyhead_attention::{KeyDrivenConfig, SharedHeads, Softmax, SoftmaxConfig};
use polyhead_kernels::linear;

use super::SurgeryError;
use super::convert::{
    decoupled_config, finished, per_layer, refused, renumbered, reorder, shared_heads, softmax_of, weights_of,
};
use crate::{Batch, ContextMask, Decoder, Pass};

/// How norms of keys become numbers of query heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllocationRule {
    /// KDGQA's: by how far they are above the smallest one, whose head nobody reads.
    Range,
    /// DGQA's: in proportion.
    Proportion,
}

/// Adds to `sums` what each layer's keys measure on a batch: `[layers][n_kv_heads]`, all zeros at first or empty. `passed` is
/// called behind each layer.
///
/// # Errors
/// If a layer is no softmax attention, or makes all keys equally long.
pub fn measure_keys(
    model: &Decoder,
    batch: &Batch,
    sums: &mut Vec<Vec<f64>>,
    passed: &mut dyn FnMut(),
) -> Result<(), SurgeryError> {
    let config = model.config();
    let mask = batch.mask(ContextMask::Causal);
    let mut hidden = model.embed(model.tokens(batch));
    sums.resize(config.n_layers, Vec::new());
    for (index, sums) in sums.iter_mut().enumerate() {
        let softmax = softmax_of(model, index)?;
        if softmax.window.is_some() {
            let problem = "has windows, and key-driven groups have none; decoupled_head and mixture_of_head have";
            return refused(format!("layer {index} {problem}"));
        }
        let (Some(attention), false) = (model.layers[index].attention.get::<Softmax>(), softmax.qk_norm) else {
            return refused(format!("layer {index} normalises its keys (qk_norm): their norms say nothing"));
        };
        let read = model.layers[index].attention_norm.forward(hidden.clone(), config.norm_eps);
        let bias = attention.k_proj.bias.as_ref().map(|bias| bias.val());
        let keys = linear(read, attention.k_proj.weight.val(), bias);
        let ([batch, seq, channels], heads) = (keys.dims(), softmax.kv_heads());
        let keys = keys.reshape([batch, seq, heads, channels / heads]).swap_dims(1, 2);
        sums.resize(heads, 0.0);
        sums.iter_mut().zip(key_norms(keys, &mask, 0)).for_each(|(sum, norm)| *sum += norm);
        hidden = model.run_layers(index..index + 1, hidden, Pass::new(&mask)).hidden;
        passed();
    }
    Ok(())
}

/// The same weights, with groups of query heads as large as `norms` (`[layers][n_kv_heads]`) say.
///
/// # Errors
/// If a layer is no softmax attention.
pub fn drive_by_keys(parent: &Decoder, norms: &[Vec<f64>], rule: AllocationRule) -> Result<Decoder, SurgeryError> {
    let mut config = parent.config().clone();
    let mut layers = Vec::new();
    for (layer, norms) in norms.iter().enumerate() {
        let SoftmaxConfig { n_heads, head_dim, qkv_bias, o_bias, .. } = *softmax_of(parent, layer)?;
        let query_heads = match rule {
            AllocationRule::Range => allocation::by_range(norms, n_heads),
            AllocationRule::Proportion => allocation::in_proportion(norms, n_heads),
        };
        let allocation = AllocationConfig::Fixed(FixedConfig { query_heads });
        let n_kv_heads = norms.len();
        layers.push(
            KeyDrivenConfig { n_heads, n_kv_heads, head_dim, qkv_bias, o_bias, allocation, perturb: false }.into(),
        );
    }
    config.attention = per_layer(layers);
    finished(parent, config, weights_of(parent))
}

/// The same function with decoupled heads, where key-driven layers are: key/value heads that nobody reads are dropped.
///
/// # Errors
/// If an allocation is not frozen.
pub fn decouple_key_driven(model: &Decoder) -> Result<Decoder, SurgeryError> {
    let (mut config, mut weights) = (model.config().clone(), weights_of(model));
    let mut layers = Vec::new();
    for layer in 0..config.n_layers {
        if config.mechanism(layer).get::<KeyDrivenConfig>().is_none() {
            layers.push(config.mechanism(layer).clone());
            continue;
        }
        let SharedHeads { softmax, maps } = shared_heads(&config, layer)?;
        let [(keys, key_map), (values, value_map)] = maps.map(|map| renumbered(&map));
        reorder(&mut weights, &config, layer, [&keys, &values]);
        layers.push(decoupled_config(&softmax, &[key_map, value_map], false).into());
    }
    config.attention = per_layer(layers);
    finished(model, config, weights)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use polyhead_attention::HeadCounts;

    use crate::surgery::convert::tests::{parent, same};
    use crate::surgery::{Pool, expanded, group_queries};

    #[test]
    fn frozen_groups_are_decoupled_heads_without_those_that_nobody_reads() {
        let grouped = group_queries(&parent(), 2, Pool::Mean).unwrap();
        let batch = Batch { batch: 2, seq: 5, tokens: (0..10).collect(), ..Batch::default() };
        let mut norms = Vec::new();
        let mut passed = 0;
        measure_keys(&grouped, &batch, &mut norms, &mut || passed += 1).unwrap();
        let once = norms.clone();
        measure_keys(&grouped, &batch, &mut norms, &mut || passed += 1).unwrap();
        assert_eq!(passed, 4, "two layers, twice");
        assert!(
            norms.len() == 2 && norms.iter().flatten().zip(once.iter().flatten()).all(|(two, one)| *two == 2.0 * one)
        );

        let driven = drive_by_keys(&grouped, &norms, AllocationRule::Range).unwrap();
        let lean = decouple_key_driven(&driven).unwrap();
        same(&driven, &lean);
        same(&driven, &expanded(&lean).unwrap());
        let counts = lean.config().mechanism(0).head_counts(0);
        assert_eq!(counts, Some(HeadCounts::KeysAndValues([1, 1])), "of two norms, the smaller one has no query heads");

        let even = drive_by_keys(&grouped, &[vec![1.0, 1.0], vec![1.0, 1.0]], AllocationRule::Proportion).unwrap();
        same(&even, &grouped);
    }
}
