//! The caches of layers while decoding: each mechanism its own kind ([`MechanismCache`]), most of them
//! keys and values ([`KvCache`]).

use burn::tensor::{Int, Tensor, TensorData};
use polyhead_kernels::{AttentionOptions, attention_weights};

use crate::LayerCache;
use crate::sparse::h2o::{H2oConfig, HeavyHitters};

/// A mechanism's cache of earlier tokens.
pub trait MechanismCache: Clone + std::fmt::Debug + Default {
    /// Tokens so far.
    fn len(&self) -> usize;

    /// Whether there have been no tokens yet.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements kept for one row of the batch.
    fn elements(&self) -> usize;
}

/// The cache of a mechanism that cannot decode, because every position reads all others.
#[derive(Debug, Clone, Default)]
pub struct NoCache;

impl MechanismCache for NoCache {
    fn len(&self) -> usize {
        0
    }

    fn elements(&self) -> usize {
        0
    }
}

/// One layer's keys and values: un-expanded heads, already rotated.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    /// Tokens so far, of which a window keeps the last ones.
    tokens: usize,
    kept: Option<Kept>,
    eviction: Option<Eviction>,
}

/// Which keys are dropped, head by head.
#[derive(Debug, Clone)]
struct Eviction {
    config: H2oConfig,
    /// `[batch, key heads]`; empty before the first call
    heads: Vec<HeavyHitters>,
}

/// Buffers with space for more tokens than there are, so that appending one does not copy all others.
#[derive(Debug, Clone)]
struct Kept {
    /// `[batch, key heads, capacity, width]`
    keys: Tensor<4>,
    /// `[batch, value heads, capacity, value width]`
    values: Tensor<4>,
    /// Tokens that are kept.
    len: usize,
}

impl MechanismCache for KvCache {
    fn len(&self) -> usize {
        self.tokens
    }

    fn elements(&self) -> usize {
        let per_token = |buffer: &Tensor<4>| buffer.dims()[1] * buffer.dims()[3];
        self.kept.as_ref().map_or(0, |kept| kept.len * (per_token(&kept.keys) + per_token(&kept.values)))
    }
}

impl KvCache {
    /// Appends this call's keys and values and gives all of them back.
    ///
    /// # Shapes
    /// - keys: `[batch, key heads, new tokens, width]`, values: `[batch, value heads, new tokens, value width]`
    /// - output: the same with all tokens so far
    pub fn append(&mut self, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let before = self.kept.take();
        let old = before.as_ref().map_or(0, |kept| kept.len);
        self.tokens += keys.dims()[2];
        let len = old + keys.dims()[2];
        let (old_keys, old_values) = before.map(|kept| (kept.keys, kept.values)).unzip();
        let keys = put(old_keys, old, keys);
        let values = put(old_values, old, values);
        let all = (keys.clone().narrow(2, 0, len), values.clone().narrow(2, 0, len));
        self.kept = Some(Kept { keys, values, len });
        all
    }

    /// Appends this call's keys and values and gives them back behind the `window - 1` tokens before the call; keeps no more
    /// than a later token can see.
    ///
    /// # Shapes
    /// As in [`append`](Self::append).
    pub fn append_within(&mut self, window: usize, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        self.tokens += keys.dims()[2];
        let (keys, values) = match self.kept() {
            Some([old_keys, old_values]) => {
                (Tensor::cat(vec![old_keys, keys], 2), Tensor::cat(vec![old_values, values], 2))
            }
            None => (keys, values),
        };
        let all = keys.dims()[2];
        let len = all.min(window - 1);
        let last = |x: &Tensor<4>| x.clone().narrow(2, all - len, len);
        self.kept = (len > 0).then(|| Kept { keys: last(&keys), values: last(&values), len });
        (keys, values)
    }

    /// A cache whose heads drop keys, each its own: see `sparse/h2o.rs`.
    pub fn evicting(config: H2oConfig) -> Self {
        Self { eviction: Some(Eviction { config, heads: Vec::new() }), ..Self::default() }
    }

    /// Drops keys, where they are dropped, once `q`, `[batch, n_heads, new tokens, width]`, has attended to `keys`, all that
    /// [`append`](Self::append) gave, under these options. Says whether this is such a cache.
    pub fn evict(&mut self, q: &Tensor<4>, keys: &Tensor<4>, options: &AttentionOptions<'_>) -> bool {
        /// Queries whose weights are there at a time; chosen by us.
        const ROWS: usize = 256;
        let (Some(Eviction { config, heads }), Some(kept)) = (&mut self.eviction, &mut self.kept) else {
            return false;
        };
        let ([batch, n_heads, new, _], [_, kv_heads, all, _]) = (q.dims(), keys.dims());
        let part = |from: usize| {
            let options = AttentionOptions { query_offset: options.query_offset + from, ..options.clone() };
            attention_weights(q.clone().narrow(2, from, ROWS.min(new - from)), keys.clone(), &options).sum_dim(2)
        };
        let weights = (0..new).step_by(ROWS).map(part).reduce(|a, b| a + b);
        let Some(weights) = weights else { return true };
        let of_groups = weights.reshape([batch, kv_heads, n_heads / kv_heads, all]).sum_dim(2);
        let weights: Vec<f32> = of_groups.into_data().iter::<f32>().collect();
        heads.resize_with(batch * kv_heads, HeavyHitters::default);
        let each = heads.iter_mut().zip(weights.chunks(all));
        let stay: Vec<_> = each.map(|(head, weights)| head.update(config, weights, new)).collect();
        // All heads have as many keys, so that either all drop some or none does.
        let Some(stay) = stay.into_iter().collect::<Option<Vec<_>>>() else { return true };
        let len = config.heavy + config.recent;
        let ids: Vec<i32> = stay.into_iter().flatten().map(|key| key as i32).collect();
        let ids = Tensor::<4, Int>::from_data(TensorData::new(ids, [batch, kv_heads, len, 1]), &q.device());
        let of = |x: &Tensor<4>| {
            let width = x.dims()[3];
            x.clone().narrow(2, 0, all).gather(2, ids.clone().expand([batch, kv_heads, len, width]))
        };
        *kept = Kept { keys: of(&kept.keys), values: of(&kept.values), len };
        true
    }

    /// What each head keeps, row by row of the batch; empty where nothing is dropped.
    pub fn heavy_hitters(&self) -> &[HeavyHitters] {
        self.eviction.as_ref().map_or(&[], |eviction| &eviction.heads)
    }

    /// The keys and values that are kept, `[batch, heads, tokens, width]`; `None` where there are none.
    pub fn kept(&self) -> Option<[Tensor<4>; 2]> {
        self.kept.as_ref().map(|kept| [&kept.keys, &kept.values].map(|x| x.clone().narrow(2, 0, kept.len)))
    }
}

/// A call's keys and values behind those of earlier tokens, where a cache keeps them.
pub(crate) fn extended(cache: Option<&mut KvCache>, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    match cache {
        Some(cache) => cache.append(keys, values),
        None => (keys, values),
    }
}

/// Writes `new` behind the first `len` tokens; the capacity doubles where it is too small.
pub(crate) fn put(buffer: Option<Tensor<4>>, len: usize, new: Tensor<4>) -> Tensor<4> {
    let [batch, heads, count, width] = new.dims();
    let at = |from: usize, to: usize| [0..batch, 0..heads, from..to, 0..width];
    let buffer = match buffer {
        Some(buffer) if buffer.dims()[2] >= len + count => buffer,
        smaller => {
            let larger =
                Tensor::zeros([batch, heads, (len + count).next_power_of_two(), width], (&new.device(), new.dtype()));
            match smaller {
                Some(smaller) => larger.slice_assign(at(0, len), smaller.narrow(2, 0, len)),
                None => larger,
            }
        }
    };
    buffer.slice_assign(at(len, len + count), new)
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

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, LayerCache::len)
    }

    /// Whether nothing has been kept yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
