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
