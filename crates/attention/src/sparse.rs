//! Sparse attention: which keys queries read, where that is less than all that the mask leaves them.
//!
//! Every form makes one thing, a [`BlockMask`], whose hidden tiles the kernel never computes: [`shifted`] from positions alone,
//! [`blocks`], [`dhsa`] and [`sparsed`] from a layer's rotated queries and keys. [`rectified`] gives back what a block mask leaves
//! out, as far as the means of blocks know it. [`h2o`] is about keys that are kept while decoding.

pub mod blocks;
pub mod boundaries;
pub mod dhsa;
pub mod h2o;
pub mod rectified;
pub mod shifted;
pub mod sparsed;
#[cfg(test)]
mod tests;
mod texts;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use burn::tensor::{DType, Int, Tensor, TensorData};
use polyhead_kernels::{
    Attention, AttentionOptions, HeadMap, Mask, attention, attention_weights, in_parallel, in_type,
};
pub use polyhead_kernels::{BlockMask, QueryBlock};
use serde::{Deserialize, Serialize};

use crate::{AttentionConfig, ConfigError, KvCache, LayerCache, SoftmaxConfig, require};
use blocks::BlocksConfig;
use boundaries::BoundaryPredictor;
use dhsa::DhsaConfig;
use h2o::{H2oConfig, local_mask, with_recent};
use rectified::{RectifiedConfig, rectified_attention};
use shifted::ShiftedConfig;
use sparsed::{SparsedConfig, SparsedSelection};
use texts::Texts;

/// Which keys queries read, where that is not all that the mask leaves them: one of its tables.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum SparseConfig {
    /// Those of a query's chunk, in training alone: S2-Attn (LongLoRA) and SF-Attn (SinkLoRA).
    Shifted(ShiftedConfig),
    /// A few blocks of keys for each block of queries, chosen by their means; where a text is read at once, and not in training.
    Blocks(BlocksConfig),
    /// The tokens of the chunks that a block of queries scores highest (DHSA); where a text is read at once, and not in training.
    Dhsa(DhsaConfig),
    /// A few blocks exactly, the others by their means (Rectified SpaAttn); where a text is read at once, and not in training.
    Rectified(RectifiedConfig),
    /// While text is generated each head keeps the keys that were attended to most and the last ones (H2O); a text that is evaluated
    /// at once is masked alike.
    H2o(H2oConfig),
    /// The blocks that one step of a masked diffusion model's generation chooses, in all later ones (SparseD).
    Sparsed(SparsedConfig),
}

impl SparseConfig {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let checked = match self {
            Self::Shifted(config) => config.validate(),
            Self::Blocks(config) => config.validate(),
            Self::Dhsa(config) => config.validate(),
            Self::Rectified(config) => config.validate(),
            Self::H2o(config) => config.validate(),
            Self::Sparsed(config) => config.validate(),
        };
        checked.map_err(|error| error.within(self.name()))
    }

    /// The name of its table.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Shifted(_) => "shifted",
            Self::Blocks(_) => "blocks",
            Self::Dhsa(_) => "dhsa",
            Self::Rectified(_) => "rectified",
            Self::H2o(_) => "h2o",
            Self::Sparsed(_) => "sparsed",
        }
    }

    /// Refuses layers that it does not fit; `predicts` says whether the model has a predictor of boundaries.
    ///
    /// # Errors
    /// Names the mechanism and the way out.
    pub fn check_layer(&self, mechanism: &AttentionConfig, predicts: bool) -> Result<(), ConfigError> {
        let (name, own) = (self.name(), mechanism.name());
        let softmax: Option<&SoftmaxConfig> = mechanism.get();
        let keeps_keys = matches!(own, "softmax" | "sink" | "gated_attention");
        let windowed = mechanism.cost(&crate::Dims::example()).window.is_some();
        let rectifies = match self {
            Self::Rectified(_) => true,
            Self::Blocks(config) => config.rectify,
            Self::Dhsa(config) => config.rectify,
            Self::Shifted(_) | Self::H2o(_) | Self::Sparsed(_) => false,
        };
        require(!matches!(own, "hilo" | "gated_delta_net"), name, || {
            format!("{name} chooses keys of a softmax over the whole text, and layers of {own} have none")
        })?;
        let plain = softmax.is_some_and(|softmax| softmax.window.is_none() && softmax.softcap.is_none());
        require(!rectifies || plain, name, || {
            format!(
                "{name}: means of blocks stand for others in softmax attention without window and softcap, not in {own}"
            )
        })?;
        if let Self::H2o(_) = self {
            require(keeps_keys && !windowed, name, || {
                format!("{name} drops keys of softmax, sink and gated_attention without a window; a layer is {own}")
            })?;
        }
        if let Self::Dhsa(config) = self {
            require(keeps_keys, name, || {
                format!("{name} scores keys of softmax, sink and gated_attention, not of {own}")
            })?;
            require(predicts || config.chunk_size.is_some(), name, || {
                "dhsa: the model has no predictor of boundaries: train one with procedure.boundaries, or set dhsa.chunk_size".into()
            })?;
        }
        Ok(())
    }

    /// The cache of a layer, where it drops keys.
    pub fn cache(&self, mechanism: &AttentionConfig) -> LayerCache {
        let Self::H2o(config) = self else { return LayerCache::Empty };
        let cache = KvCache::evicting(*config);
        match mechanism {
            AttentionConfig::Softmax(_) => LayerCache::Softmax(cache),
            AttentionConfig::Sink(_) => LayerCache::Sink(cache),
            AttentionConfig::GatedAttention(_) => LayerCache::GatedAttention(cache),
            _ => LayerCache::Empty,
        }
    }
}

/// A form of sparse attention, as a layer is told.
#[derive(Debug, Clone)]
pub enum Sparse {
    /// As settings say; with the model's predictor of boundaries, where it has one.
    Config(SparseConfig, Option<Arc<BoundaryPredictor>>),
    /// The blocks that the first call chose, which is dense itself (SparseD).
    Kept(Arc<KeptBlocks>),
}

/// Blocks that are chosen once and read from then on.
#[derive(Debug)]
pub struct KeptBlocks {
    /// How they are chosen.
    pub selection: SparsedSelection,
    /// What was chosen.
    pub mask: OnceLock<Arc<BlockMask>>,
}

impl Sparse {
    /// [`attention`] of rotated queries, keys and values.
    pub fn attend(&self, [q, k, v]: [Tensor<4>; 3], options: &AttentionOptions<'_>) -> Attention {
        let ([batch, heads, seq, _], everything) = (q.dims(), Mask::none());
        let mask = options.mask.unwrap_or(&everything);
        let whole = options.query_offset == 0 && k.dims()[2] == seq && seq > 0;
        // As Burn's dropout, training is known by its tape.
        let (config, predictor) = match self {
            Self::Config(config, predictor)
                if whole && q.is_autodiff() == matches!(config, SparseConfig::Shifted(_)) =>
            {
                (config, predictor.as_deref())
            }
            Self::Kept(kept) if whole => return kept.attend([q, k, v], mask, options),
            _ => return attention(q, k, v, options),
        };
        // What is read of a text does not depend on others in its row.
        let in_one_piece = Texts::of(mask, batch, seq);
        let rectifies = in_one_piece.is_some() && mask.is_causal_in_documents();
        let texts = in_one_piece.unwrap_or_else(|| Texts::whole(batch, seq));
        let choose = |choice: &dyn Fn(Tensor<4>, Tensor<4>) -> BlockMask| {
            texts.joined_masks(texts.parts([&q, &k]).map(|[q, k]| choice(q, k)))
        };
        let (blocks, rectified) = match config {
            SparseConfig::Shifted(config) if config.leak => {
                let mask = mask.ordered_by(config.shift(seq, heads).leaking_mask(seq, heads));
                return attention(q, k, v, &AttentionOptions { mask: Some(&mask), ..options.clone() });
            }
            SparseConfig::Shifted(config) => (Some(config.shift(seq, heads).mask(seq, heads)), None),
            SparseConfig::Blocks(config) => {
                (Some(choose(&|q, k| config.mask(q, of_query_heads(&k, &options.keys)))), config.rectified())
            }
            SparseConfig::Dhsa(config) => (Some(choose(&|q, k| config.mask(q, k, predictor))), config.rectified()),
            SparseConfig::Rectified(config) => (None, Some(*config)),
            SparseConfig::H2o(config) => (Some(h2o_mask(&q, &k, config, &texts, options)), None),
            // Its steps are told by whoever generates or evaluates.
            SparseConfig::Sparsed(_) => (None, None),
        };
        match (blocks, rectified) {
            (blocks, Some(config)) if rectifies => rectified_attention([q, k, v], &config, blocks, options),
            // The means of blocks say nothing where queries see later keys, or texts are in pieces.
            (_, Some(_)) | (None, None) => attention(q, k, v, options),
            (Some(blocks), None) => under([q, k, v], mask, blocks, options),
        }
    }
}

impl KeptBlocks {
    fn attend(&self, [q, k, v]: [Tensor<4>; 3], mask: &Mask, options: &AttentionOptions<'_>) -> Attention {
        match self.mask.get() {
            Some(blocks) => under([q, k, v], mask, blocks.clone(), options),
            None => {
                let (keys, [batch, _, seq, _]) = (of_query_heads(&k, &options.keys), q.dims());
                let texts = Texts::of(mask, batch, seq).unwrap_or_else(|| Texts::whole(batch, seq));
                let choices = texts.parts([&q, &keys]).map(|[q, k]| self.selection.mask(q, k));
                self.mask.get_or_init(|| Arc::new(texts.joined_masks(choices)));
                attention(q, k, v, options)
            }
        }
    }
}

fn under(
    [q, k, v]: [Tensor<4>; 3],
    mask: &Mask,
    blocks: impl Into<Arc<BlockMask>>,
    options: &AttentionOptions<'_>,
) -> Attention {
    let mask = mask.clone().with_blocks(blocks);
    attention(q, k, v, &AttentionOptions { mask: Some(&mask), ..options.clone() })
}

/// What each head would have kept, had each text been read token by token.
fn h2o_mask(
    q: &Tensor<4>,
    k: &Tensor<4>,
    config: &H2oConfig,
    texts: &Texts,
    options: &AttentionOptions<'_>,
) -> BlockMask {
    let ([batch, heads, seq, _], kv_heads) = (q.dims(), k.dims()[1]);
    let weights = attention_weights(q.clone(), k.clone(), options);
    let of_groups = weights.reshape([batch, kv_heads, heads / kv_heads, seq * seq]).sum_dim(2);
    let of_groups = of_groups.reshape([batch, kv_heads, seq, seq]);
    let of_text = |[rows, tokens]: &[Range<usize>; 2]| {
        let seq = tokens.len();
        let own = numbers(of_groups.clone().slice([rows.clone(), 0..kv_heads, tokens.clone(), tokens.clone()]));
        let seen = in_parallel(rows.len() * kv_heads, |at| {
            let own = local_mask(&own[at * seq * seq..(at + 1) * seq * seq], config.heavy);
            with_recent(|query, key| own[query * seq + key], seq, config.recent).repeat(heads / kv_heads)
        });
        BlockMask::of_blocks(&seen.concat(), [rows.len(), heads], [seq, seq], [1, 1])
    };
    texts.joined_masks(texts.places().map(of_text))
}

/// The indices of the `count` largest scores, those of the lower index first where they are equal.
fn largest(scores: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let before = |&a: &usize, &b: &usize| scores[b].total_cmp(&scores[a]).then(a.cmp(&b));
    if count < order.len() {
        order.select_nth_unstable_by(count, before);
        order.truncate(count);
    }
    order.sort_unstable_by(before);
    order
}

/// The key head of every query head, where a map says so; heads that are shared evenly stay as they are.
fn of_query_heads(keys: &Tensor<4>, map: &HeadMap) -> Tensor<4> {
    let HeadMap::Each(map) = map else { return keys.clone() };
    let ids: Vec<i32> = map.iter().map(|&head| head as i32).collect();
    keys.clone().select(1, Tensor::<1, Int>::from_data(TensorData::new(ids, [map.len()]), &keys.device()))
}

/// `[batch, n_heads, seq, width]`: each key/value head once for every query head that reads it.
fn repeated(heads: Tensor<4>, n_heads: usize) -> Tensor<4> {
    let [batch, kv_heads, seq, width] = heads.dims();
    if kv_heads == n_heads {
        return heads;
    }
    let each = heads.unsqueeze_dim::<5>(2).expand([batch, kv_heads, n_heads / kv_heads, seq, width]);
    each.reshape([batch, n_heads, seq, width])
}

/// `[batch, heads, blocks, size, width]` in f32: rows in blocks, the last one filled up with zeros.
fn in_blocks(x: Tensor<4>, size: usize) -> Tensor<5> {
    let [batch, heads, seq, width] = x.dims();
    let blocks = seq.div_ceil(size);
    let x = in_type(x, DType::F32);
    let missing = blocks * size - seq;
    let x = match missing {
        0 => x,
        _ => Tensor::cat(vec![x.clone(), Tensor::zeros([batch, heads, missing, width], &x.device())], 2),
    };
    x.reshape([batch, heads, blocks, size, width])
}

/// How many rows each block has.
fn block_lengths(seq: usize, size: usize) -> Vec<usize> {
    (0..seq.div_ceil(size)).map(|block| size.min(seq - block * size)).collect()
}

/// `[1, 1, blocks, 1]`
fn as_column(values: &[f32], device: &burn::tensor::Device) -> Tensor<4> {
    Tensor::<1>::from_floats(values, device).reshape([1, 1, values.len(), 1])
}

/// `[batch, heads, blocks, width]`: the mean of the rows of each block, of those that there are.
fn block_means(x: Tensor<4>, size: usize) -> Tensor<4> {
    let (seq, device) = (x.dims()[2], x.device());
    let lengths: Vec<f32> = block_lengths(seq, size).into_iter().map(|rows| rows as f32).collect();
    in_blocks(x, size).sum_dim(3).squeeze_dim::<4>(3) / as_column(&lengths, &device)
}

fn numbers<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().iter::<f32>().collect()
}
