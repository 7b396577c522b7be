//! Sliding windows, which the mechanisms with a softmax share as a setting: a query sees the last `window` keys, itself included
//! (Mistral 7B, arXiv 2310.06825), and in an encoder as many again behind it. Positions stay absolute; a layer's cache keeps
//! the `window - 1` tokens that the next one can see.

use std::borrow::Cow;

use burn::tensor::Tensor;

use crate::cache::{KvCache, extended};
use crate::config::{PerLayerCount, require};
use crate::{ConfigError, Dims, Mask, MechanismCache};

/// `Ok` if the setting `window` can be used.
///
/// # Errors
/// Where a list does not fit the layers, or a window of 0 for all layers would mean no window.
pub(crate) fn check_window(window: Option<&PerLayerCount>, dims: &Dims) -> Result<(), ConfigError> {
    let Some(window) = window else { return Ok(()) };
    window.check("window", dims)?;
    require(*window != PerLayerCount::Same(0), "window", || {
        "window (0) must be at least 1: leave it out for full attention, or list one per layer, with 0 for full ones"
            .into()
    })
}

/// The window of a layer; `None` for full attention.
pub(crate) fn window_of(window: Option<&PerLayerCount>, layer: usize) -> Option<usize> {
    window.and_then(|window| window.of_layer(layer)).filter(|&window| window > 0)
}

/// The setting in a model whose layers are `sources` of this one's; of a single layer, its own.
pub(crate) fn moved_window(window: Option<PerLayerCount>, sources: &[usize]) -> Option<PerLayerCount> {
    window.map(|window| window.moved(sources)).filter(|window| *window != PerLayerCount::Same(0))
}

/// The keys and values that a call attends to, with their mask.
pub(crate) struct Within<'a> {
    /// `[batch, key heads, keys, width]`
    pub keys: Tensor<4>,
    /// `[batch, value heads, keys, value width]`
    pub values: Tensor<4>,
    /// The mask, with the window.
    pub mask: Cow<'a, Mask>,
    /// Keys before the first of this call.
    pub query_offset: usize,
}

/// A call's keys and values behind those of earlier tokens that its window reaches, where a cache keeps them.
pub(crate) fn within<'a>(
    window: Option<usize>,
    mask: &'a Mask,
    cache: Option<&mut KvCache>,
    [keys, values]: [Tensor<4>; 2],
) -> Within<'a> {
    let new = keys.dims()[2];
    let (keys, values) = match (window, cache) {
        (None, cache) => extended(cache, keys, values),
        (Some(_), None) => (keys, values),
        (Some(window), Some(cache)) => {
            let (tokens, (keys, values)) = (cache.len(), cache.append_within(window, keys, values));
            let dropped = tokens + new > keys.dims()[2];
            assert!(!dropped || !mask.may_hide_whole_rows(), "padding counts from keys that a window has dropped");
            (keys, values)
        }
    };
    let query_offset = keys.dims()[2] - new;
    let mask = window.map_or(Cow::Borrowed(mask), |window| Cow::Owned(mask.clone().with_window(window)));
    Within { keys, values, mask, query_offset }
}

#[cfg(test)]
mod tests {
    use burn::module::Module;
    use burn::tensor::Device;
    use polyhead_kernels::comparison::largest_difference;

    use super::*;
    use crate::laws::draw;
    use crate::{Call, Cost, Mechanism, MechanismConfig, SoftmaxConfig};

    #[test]
    fn a_query_reads_exactly_the_keys_of_its_window() {
        let (device, dims, seq, window) = (Device::flex().autodiff(), Dims::example(), 9, 4);
        let config =
            SoftmaxConfig { n_heads: 4, window: Some(PerLayerCount::Same(window)), ..SoftmaxConfig::default() };
        let layer = config.init(&dims, &device).map(&mut crate::laws::Spread);
        let x: Tensor<3> = draw([1, seq, dims.d_model], [0.0, 1.0], &device);
        let run = |x: &Tensor<3>, mask: &Mask| layer.forward(x.clone(), Call::new(mask)).hidden;
        for changed in 0..seq {
            let new = draw([1, 1, dims.d_model], [0.0, 1.0], &device);
            let other = x.clone().slice_assign([0..1, changed..changed + 1, 0..dims.d_model], new);
            for (mask, behind) in [(Mask::causal(), 0), (Mask::none(), window - 1)] {
                let (a, b) = (run(&x, &mask), run(&other, &mask));
                for query in 0..seq {
                    let at = |out: &Tensor<3>| out.clone().narrow(1, query, 1);
                    let difference = largest_difference(at(&a), at(&b));
                    let reads = changed + window > query && changed <= query + behind;
                    assert!((difference > 1e-6) == reads, "{mask:?}: token {changed}, query {query}: {difference}");
                }
            }
        }
    }

    #[test]
    fn costs_are_those_of_the_keys_that_are_seen() {
        for (seq_len, window) in [(1, 1), (7, 3), (7, 7), (7, 9), (1024, 128)] {
            let cost = Cost {
                flops_per_token: 5,
                flops_per_pair: 12,
                kv_cache_elements_per_token: 64,
                window: Some(window),
                ..Cost::default()
            };
            let pairs: u64 = (1..=seq_len).map(|query: u64| query.min(window)).sum();
            assert_eq!(cost.causal_flops(seq_len), 5 + 12 * pairs / seq_len, "{seq_len}, {window}");
            assert_eq!(cost.cached_per_token(seq_len), 64 * seq_len.min(window) / seq_len, "{seq_len}, {window}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let field = |window: PerLayerCount| {
            let config = SoftmaxConfig { n_heads: 4, window: Some(window), ..SoftmaxConfig::default() };
            config.validate(&Dims::example()).map_err(|error| error.field)
        };
        assert_eq!(field(PerLayerCount::Same(1)), Ok(()));
        assert_eq!(field(PerLayerCount::Each(vec![0, 1, 0, 0])), Ok(()));
        assert_eq!(field(PerLayerCount::Same(0)), Err("window".into()));
        assert_eq!(field(PerLayerCount::Each(vec![3])), Err("window".into()));
    }
}
