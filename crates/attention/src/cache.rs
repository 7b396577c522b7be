//! Keys and values of earlier tokens, kept while decoding.

use burn::tensor::Tensor;

/// One layer's keys and values: un-expanded heads, already rotated.
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    kept: Option<Kept>,
}

/// Room for more tokens than there are, so that appending one does not copy all others.
#[derive(Debug, Clone)]
struct Kept {
    /// `[batch, key heads, room, width]`
    keys: Tensor<4>,
    /// `[batch, value heads, room, value width]`
    values: Tensor<4>,
    /// Tokens so far.
    len: usize,
}

impl LayerCache {
    /// How many tokens are kept.
    pub fn len(&self) -> usize {
        self.kept.as_ref().map_or(0, |kept| kept.len)
    }

    /// Whether nothing has been kept yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many numbers are kept per token of a row of the batch.
    pub fn numbers_per_token(&self) -> usize {
        let numbers = |room: &Tensor<4>| room.dims()[1] * room.dims()[3];
        self.kept.as_ref().map_or(0, |kept| numbers(&kept.keys) + numbers(&kept.values))
    }

    /// Appends this call's keys and values and gives all of them back.
    ///
    /// # Shapes
    /// - keys: `[batch, key heads, new tokens, width]`, values: `[batch, value heads, new tokens, value width]`
    /// - output: the same with all tokens so far
    pub fn append(&mut self, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let old = self.len();
        let len = old + keys.dims()[2];
        let before = self.kept.take();
        let (old_keys, old_values) = before.map(|kept| (kept.keys, kept.values)).unzip();
        let keys = put(old_keys, old, keys);
        let values = put(old_values, old, values);
        let all = (keys.clone().narrow(2, 0, len), values.clone().narrow(2, 0, len));
        self.kept = Some(Kept { keys, values, len });
        all
    }
}

/// Writes `new` behind the first `len` tokens; room doubles where it is too small.
fn put(room: Option<Tensor<4>>, len: usize, new: Tensor<4>) -> Tensor<4> {
    let [batch, heads, count, width] = new.dims();
    let at = |from: usize, to: usize| [0..batch, 0..heads, from..to, 0..width];
    let room = match room {
        Some(room) if room.dims()[2] >= len + count => room,
        smaller => {
            let more =
                Tensor::zeros([batch, heads, (len + count).next_power_of_two(), width], (&new.device(), new.dtype()));
            match smaller {
                Some(smaller) => more.slice_assign(at(0, len), smaller.narrow(2, 0, len)),
                None => more,
            }
        }
    };
    room.slice_assign(at(len, len + count), new)
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
