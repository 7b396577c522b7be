//! Rectified sparse attention (Liu et al. 2025, arXiv 2511.19835; the authors' code `rectified_wan21_attn.py`, commit 4b0aa10): the
//! weight of what a block mask leaves out is known from the means of blocks, and given back as far as these can be trusted.
//!
//! ```text
//! P = softmax over blocks of pooled scores
//! C critical: the fewest blocks whose P add up to more than p, at least top_k
//! G gain:     |score of the means| > |what the rows of a block differ from their mean, in score|
//! o = R · attention over the tokens of C + Σ_{j ∉ C, j ∈ G} P_j mean(v_j)         R = Σ P over the others
//! ```
//! All weights add up to 1. Three kinds:
//! - [`Kind::Bidirectional`], the authors': queries are pooled too; a short last block is divided by the full size.
//! - [`Kind::CausalBlock`], the same with P over past blocks and the own one. The means of a block know its later tokens: not for
//!   language models.
//! - [`Kind::CausalToken`], for language models: every query for itself, P over its logits q · mean(k_j) / √d + ln(length) of past blocks
//!   and the sum over its own block up to itself. It looks at nothing later.

use std::ops::Range;

use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Device, Tensor, TensorData};
use polyhead_kernels::{Attention, AttentionOptions, BlockMask, Mask, attention};
use serde::{Deserialize, Serialize};

use super::texts::Texts;
use super::{as_column, block_lengths, block_means, in_blocks, largest, numbers, repeated};
use crate::{ConfigError, require_range};

/// What a query knows of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Means of all blocks.
    Bidirectional,
    /// Means of past blocks and of its own.
    CausalBlock,
    /// Means of past blocks.
    CausalToken,
}

/// Which blocks are critical, where no mask says so.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct RectifiedConfig {
    /// Tokens of a block. Default: 128, the authors'.
    pub block_size: usize,
    /// A query reads the blocks whose weights, from the largest on, first add up to more than this. Default: 0.3, as the authors' runner.
    pub prob_threshold: f64,
    /// Blocks that a query reads at least. Default: 1.
    pub top_k: usize,
    /// Read the first block always, where the attention sink is. Default: true.
    pub first_block: bool,
}

impl Default for RectifiedConfig {
    fn default() -> Self {
        Self { block_size: 128, prob_threshold: 0.3, top_k: 1, first_block: true }
    }
}

impl RectifiedConfig {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        require_range("block_size", self.block_size, 1..=1 << 20)?;
        require_range("prob_threshold", self.prob_threshold, 0.0..=1.0)?;
        require_range("top_k", self.top_k, 1..=1 << 20)
    }
}

/// What is read of the blocks.
#[derive(Debug, Clone)]
pub struct Pooled {
    kind: Kind,
    block_size: usize,
    seq: usize,
    /// `[batch, heads, rows, blocks]`: what share of the weight each block has; rows are blocks, or queries of [`Kind::CausalToken`].
    pub shares: Tensor<4>,
    /// `[batch, heads, blocks, width]`
    pub values: Tensor<4>,
    /// `[batch, heads, rows, blocks]`: the score of the means, and what it may be off by.
    pub gain_and_error: [Tensor<4>; 2],
}

/// What becomes of the blocks of a row.
#[derive(Debug, Clone)]
pub struct Rectified {
    /// `[batch, heads, seq, width]`
    pub hidden: Tensor<4>,
    /// `[batch, heads, rows]`: the weight of what is read.
    pub factor: Tensor<3>,
    /// `[batch, heads, rows, width]`: what is given back.
    pub compensation: Tensor<4>,
}

impl Pooled {
    /// From rotated queries, `[batch, heads, seq, width]`, keys and values, `[batch, kv_heads, seq, width]`; `scale` is the factor of
    /// the scores.
    pub fn new(kind: Kind, [q, k, v]: [Tensor<4>; 3], block_size: usize, scale: f64) -> Self {
        let ([_, heads, seq, _], device) = (q.dims(), q.device());
        let [k, v] = [k, v].map(|x| repeated(x, heads));
        let means = |x: &Tensor<4>| match kind {
            Kind::Bidirectional => in_blocks(x.clone(), block_size).sum_dim(3).squeeze_dim::<4>(3) / block_size as f64,
            _ => block_means(x.clone(), block_size),
        };
        let [k_means, v_means] = [&k, &v].map(means);
        let queries = if kind == Kind::CausalToken { q.clone() } else { means(&q) };
        let products = |q: &Tensor<4>, k: &Tensor<4>| q.clone().matmul(k.clone().swap_dims(2, 3));
        let scores = products(&queries, &k_means);
        let logits = match kind {
            Kind::Bidirectional => scores.clone() * scale,
            Kind::CausalBlock => scores.clone() * scale + hidden_blocks(scores.dims()[3], 1, scores.dims()[2], &device),
            Kind::CausalToken => own_blocks(&q, &k, scores.clone() * scale, block_size, scale),
        };
        let spread =
            |x: &Tensor<4>, means: &Tensor<4>| spread(x.clone().detach(), means.clone().detach(), kind, block_size);
        let of_keys = products(&queries, &spread(&k, &k_means)).abs();
        let error = match kind {
            Kind::CausalToken => of_keys,
            _ => of_keys + products(&spread(&q, &queries), &k_means).abs(),
        };
        // The authors multiply both sides by the pairs of a block, which changes no comparison.
        let pairs = (block_size * block_size) as f64;
        let gain_and_error = [scores.abs(), error].map(|x| (x * pairs).detach());
        Self { kind, block_size, seq, shares: softmax(logits, 3), values: v_means, gain_and_error }
    }

    /// `[batch, heads, rows, blocks]`: the fewest blocks whose shares first add up to more than the threshold, and those that are always
    /// read: `always` says of a row's own block and another one.
    pub fn critical(&self, threshold: f64, top_k: usize, always: &dyn Fn(usize, usize) -> bool) -> Vec<bool> {
        let [_, _, rows, blocks] = self.shares.dims();
        let shares = numbers(self.shares.clone().detach());
        let mut critical = vec![false; shares.len()];
        for (at, (shares, critical)) in shares.chunks(blocks).zip(critical.chunks_mut(blocks)).enumerate() {
            let (own, order) = (self.own_block(at % rows), largest(shares, blocks));
            let mut sum = 0.0;
            let enough = order.iter().position(|&block| {
                sum += f64::from(shares[block]);
                sum > threshold
            });
            let count = enough.map_or(blocks, |last| last + 1).max(top_k).min(blocks);
            order[..count].iter().for_each(|&block| critical[block] = self.may_see(own, block));
            for (block, critical) in critical.iter_mut().enumerate() {
                let own = (self.kind != Kind::Bidirectional && block == own) || always(own, block);
                *critical |= own && self.may_see(self.own_block(at % rows), block);
            }
        }
        critical
    }

    /// `[batch, heads, rows, blocks]`: whose means are worth more than they may be off by.
    pub fn gain(&self) -> Vec<bool> {
        let [_, _, rows, blocks] = self.shares.dims();
        let [gain, error] = self.gain_and_error.clone().map(numbers);
        let mut worth = Vec::with_capacity(gain.len());
        for (at, (gain, error)) in gain.chunks(blocks).zip(error.chunks(blocks)).enumerate() {
            let own = self.own_block(at % rows);
            let known = match self.kind {
                Kind::Bidirectional => blocks,
                Kind::CausalBlock => (own + 1).min(blocks),
                Kind::CausalToken => own,
            };
            worth.extend(gain[..known].iter().zip(error).map(|(gain, error)| gain > error));
            worth.resize((at + 1) * blocks, false);
        }
        worth
    }

    fn own_block(&self, row: usize) -> usize {
        if self.kind == Kind::CausalToken { row / self.block_size } else { row }
    }

    fn may_see(&self, own: usize, block: usize) -> bool {
        self.kind == Kind::Bidirectional || block <= own
    }

    /// The critical blocks as a mask.
    pub fn mask(&self, critical: &[bool]) -> BlockMask {
        let [batch, heads, ..] = self.shares.dims();
        let height = if self.kind == Kind::CausalToken { 1 } else { self.block_size };
        BlockMask::of_blocks(critical, [batch, heads], [self.seq, self.seq], [height, self.block_size])
    }

    /// Makes of `attended`, attention over the critical blocks alone, `[batch, heads, seq, width]`, what stands for all of them.
    /// Gradients go through shares and values; the sets are constants.
    pub fn rectify(&self, attended: Tensor<4>, critical: &[bool], gain: &[bool]) -> Rectified {
        let (dims, device) = (self.shares.dims(), self.shares.device());
        let given: Vec<bool> = critical.iter().zip(gain).map(|(critical, gain)| !critical && *gain).collect();
        let given = Tensor::<4, Bool>::from_data(TensorData::new(given, dims), &device);
        let factor = self.shares.clone().mask_fill(given.clone(), 0.0).sum_dim(3); // [batch, heads, rows, 1]
        let compensation = self.shares.clone().mask_fill(given.bool_not(), 0.0).matmul(self.values.clone());
        let of_queries = |rows: Tensor<4>| {
            let [batch, heads, rows_there, width] = rows.dims();
            if self.kind == Kind::CausalToken {
                return rows;
            }
            let each = rows.unsqueeze_dim::<5>(3).expand([batch, heads, rows_there, self.block_size, width]);
            each.reshape([batch, heads, rows_there * self.block_size, width]).narrow(2, 0, self.seq)
        };
        let attended = polyhead_kernels::in_type(attended, burn::tensor::DType::F32);
        let hidden = attended * of_queries(factor.clone()) + of_queries(compensation.clone());
        Rectified { hidden, factor: factor.squeeze_dim::<3>(3), compensation }
    }
}

/// Attention of a decoder in which every query reads few blocks of its text exactly and knows the others by their means; strictly
/// causal. The critical blocks are those of `mask`, or where there is none, those that the settings choose for each query.
///
/// # Panics
/// If the mask of the options hides more than later keys and those of other documents, or a document is in pieces.
pub fn rectified_attention(
    [q, k, v]: [Tensor<4>; 3],
    config: &RectifiedConfig,
    mask: Option<BlockMask>,
    options: &AttentionOptions<'_>,
) -> Attention {
    let (causal, [batch, _, seq, width]) = (options.mask.cloned().unwrap_or_else(Mask::causal), q.dims());
    assert!(causal.is_causal_in_documents(), "rectified attention: {causal:?} hides more than what is later");
    let texts = Texts::of(&causal, batch, seq).expect("rectified attention: documents in one piece");
    let (size, scale, dtype) =
        (config.block_size, options.scale.unwrap_or_else(|| (width as f64).powf(-0.5)), q.dtype());
    let pooled = texts.parts([&q, &k, &v]).map(|inputs| Pooled::new(Kind::CausalToken, inputs, size, scale));
    let pooled: Vec<Pooled> = pooled.collect();
    let critical: Vec<Vec<bool>> = match &mask {
        Some(mask) => texts.places().zip(&pooled).map(|(place, pooled)| whole_blocks(mask, place, pooled)).collect(),
        None => {
            let always = |_: usize, block: usize| config.first_block && block == 0;
            pooled.iter().map(|pooled| pooled.critical(config.prob_threshold, config.top_k, &always)).collect()
        }
    };
    let chosen = || texts.joined_masks(pooled.iter().zip(&critical).map(|(pooled, critical)| pooled.mask(critical)));
    let mask = causal.with_blocks(mask.unwrap_or_else(chosen));
    let attended = attention(q, k, v, &AttentionOptions { mask: Some(&mask), ..options.clone() });
    let parts = texts.parts([&attended.hidden]).zip(pooled.iter().zip(&critical));
    let hidden =
        texts.joined(parts.map(|([part], (pooled, critical))| pooled.rectify(part, critical, &pooled.gain()).hidden));
    Attention { hidden: polyhead_kernels::in_type(hidden, dtype), ..attended }
}

/// `[rows, heads, tokens, blocks]`: which blocks of its text a query reads anything of.
fn whole_blocks(mask: &BlockMask, [rows, tokens]: &[Range<usize>; 2], pooled: &Pooled) -> Vec<bool> {
    let (size, [_, heads, _, blocks]) = (pooled.block_size, pooled.shares.dims());
    let mut critical = Vec::with_capacity(rows.len() * heads * tokens.len() * blocks);
    for row in rows.clone() {
        for head in 0..heads {
            for query in tokens.clone() {
                let start = critical.len();
                critical.resize(start + blocks, false);
                for run in mask.runs([row, head], query) {
                    let own = run.start.max(tokens.start)..run.end.min(tokens.end);
                    if !own.is_empty() {
                        let [from, to] = [own.start, own.end].map(|key| key - tokens.start);
                        critical[start + from / size..start + to.div_ceil(size)].fill(true);
                    }
                }
            }
        }
    }
    critical
}

/// `[1, 1, rows, blocks]`: far below 0 where a block is later than that of a row, of which `height` rows are in one.
fn hidden_blocks(blocks: usize, height: usize, rows: usize, device: &Device) -> Tensor<4> {
    let later = (0..rows).flat_map(|row| (0..blocks).map(move |block| if block > row / height { -1e30 } else { 0.0 }));
    Tensor::from_data(TensorData::new(later.collect::<Vec<f32>>(), [1, 1, rows, blocks]), device)
}

/// `[batch, heads, seq, blocks]`: of past blocks the logit of the mean and the logarithm of the length, of the own one the logarithm of
/// the sum over its keys up to the query.
fn own_blocks(q: &Tensor<4>, k: &Tensor<4>, scores: Tensor<4>, size: usize, scale: f64) -> Tensor<4> {
    let ([batch, heads, seq, blocks], device) = (scores.dims(), scores.device());
    let lengths: Vec<f32> = block_lengths(seq, size).into_iter().map(|rows| (rows as f32).ln()).collect();
    let lengths = as_column(&lengths, &device).swap_dims(2, 3);
    // `[batch, heads, blocks, size, size]`; rows beyond the end are cut off below, and no query sees keys there.
    let own = in_blocks(q.clone(), size).matmul(in_blocks(k.clone(), size).swap_dims(3, 4)) * scale;
    let later = Tensor::<2, Bool>::tril_mask([size, size], 0, &device).unsqueeze::<5>().expand(own.dims());
    let own = own.mask_fill(later, -1e30);
    let largest = own.clone().detach().max_dim(4);
    let own = (own - largest.clone()).exp().sum_dim(4).log() + largest;
    let own = own.reshape([batch, heads, blocks * size, 1]).narrow(2, 0, seq);
    let is_own: Vec<bool> = (0..seq).flat_map(|query| (0..blocks).map(move |block| block == query / size)).collect();
    let is_own = Tensor::<4, Bool>::from_data(TensorData::new(is_own, [1, 1, seq, blocks]), &device);
    let full = [batch, heads, seq, blocks];
    let past = scores + lengths + hidden_blocks(blocks, size, seq, &device);
    past.mask_where(is_own.expand(full), own.expand(full))
}

/// `[batch, heads, blocks, width]`: how far the rows of a block are from their mean, channel by channel.
fn spread(x: Tensor<4>, means: Tensor<4>, kind: Kind, size: usize) -> Tensor<4> {
    let (seq, device) = (x.dims()[2], x.device());
    let apart = (in_blocks(x, size) - means.unsqueeze_dim::<5>(3)).abs();
    if kind == Kind::Bidirectional {
        return apart.mean_dim(3).squeeze_dim::<4>(3);
    }
    let lengths = block_lengths(seq, size);
    let (blocks, full) = (lengths.len(), apart.dims());
    let beyond: Vec<bool> = lengths.iter().flat_map(|&rows| (0..size).map(move |row| row >= rows)).collect();
    let beyond = Tensor::<5, Bool>::from_data(TensorData::new(beyond, [1, 1, blocks, size, 1]), &device);
    let lengths: Vec<f32> = lengths.into_iter().map(|rows| rows as f32).collect();
    apart.mask_fill(beyond.expand(full), 0.0).sum_dim(3).squeeze_dim::<4>(3) / as_column(&lengths, &device)
}
