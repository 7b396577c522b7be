//! Keys and values of earlier tokens, kept while decoding.

use burn::tensor::Tensor;

/// One layer's keys and values: un-expanded heads, already rotated.
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    kept: Option<(Tensor<4>, Tensor<4>)>,
}

impl LayerCache {
    /// How many tokens are kept.
    pub fn len(&self) -> usize {
        self.kept.as_ref().map_or(0, |(keys, _)| keys.dims()[2])
    }

    /// Whether nothing has been kept yet.
    pub fn is_empty(&self) -> bool {
        self.kept.is_none()
    }

    /// Appends this call's keys and values and gives all of them back.
    ///
    /// # Shapes
    /// - keys: `[batch, key heads, new tokens, width]`, values: `[batch, value heads, new tokens, value width]`
    /// - output: the same with all tokens so far
    pub fn append(&mut self, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let all = match self.kept.take() {
            None => (keys, values),
            Some((old_keys, old_values)) => {
                (Tensor::cat(vec![old_keys, keys], 2), Tensor::cat(vec![old_values, values], 2))
            }
        };
        self.kept = Some(all.clone());
        all
    }
}

/// The caches of all layers of a model.
#[derive(Debug, Clone, Default)]
pub struct Cache {
    /// One per layer.
    pub layers: Vec<LayerCache>,
}

impl Cache {
    /// An empty cache for a model of `n_layers` layers.
    pub fn new(n_layers: usize) -> Self {
        Self { layers: vec![LayerCache::default(); n_layers] }
    }

    /// How many tokens are kept.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, LayerCache::len)
    }

    /// Whether nothing has been kept yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
