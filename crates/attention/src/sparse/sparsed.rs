//! SparseD (Wang et al. 2025, arXiv 2509.24014; the authors' code, commit 52155b4): a masked-diffusion language model reads the same
//! text at every step of its denoising, and its heads attend to the same blocks throughout. The first steps are dense; the last of
//! them says which blocks each block of queries reads from then on.
//!
//! ```text
//! a_ij = mean of softmax(q kᵀ / √d) over block i x block j        zeros of a short last block counted
//! prompt blocks      those before the answer among the ⌊blocks · ratio⌋ + 1 largest of all
//! blocks of the answer   the ⌊blocks of the answer · ratio⌋ + 1 largest of a softmax over the answer alone
//! ```
//! The answer begins at the first block that lies wholly inside it. LLaDA's file divides these scores by the root of the number of
//! heads, Dream's by that of the channels, which is what is done here. At ratio = 1 the code raises; here that is dense attention.

use burn::tensor::Tensor;
use polyhead_kernels::{AttentionOptions, BlockMask, attention_weights};

use serde::{Deserialize, Serialize};

use super::{in_blocks, largest, numbers, repeated};
use crate::{ConfigError, require_range};

/// Settings of SparseD.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct SparsedConfig {
    /// Tokens of a block. Default: 32, the authors' for short texts; 128 for long ones.
    pub block_size: usize,
    /// Share of the blocks that a block of queries reads. Default: 0.5, the authors' for short texts; 0.3 for long ones.
    pub ratio: f64,
    /// Share of the steps that are dense, the first ones. Default: 0.2.
    pub skip: f64,
}

impl Default for SparsedConfig {
    fn default() -> Self {
        Self { block_size: 32, ratio: 0.5, skip: 0.2 }
    }
}

impl SparsedConfig {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        require_range("block_size", self.block_size, 1..=1 << 20)?;
        require_range("ratio", self.ratio, 0.0..=1.0)?;
        require_range("skip", self.skip, 0.0..=1.0)
    }
}

/// A choice of blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SparsedSelection {
    /// Tokens of a block, of queries and keys alike.
    pub block_size: usize,
    /// Share of the blocks that a block of queries reads.
    pub ratio: f64,
    /// Tokens of the answer, the last ones.
    pub answer: usize,
}

/// The step, from 0, that is the last dense one and chooses the blocks.
pub fn mask_step(steps: usize, skip: f64) -> usize {
    (steps as f64 * skip) as usize + 1
}

impl SparsedSelection {
    /// The first block of the answer: the first that lies wholly inside it, or the last.
    pub fn first_of_answer(&self, seq: usize) -> usize {
        let blocks = seq.div_ceil(self.block_size);
        seq.saturating_sub(self.answer).div_ceil(self.block_size).min(blocks.saturating_sub(1))
    }

    /// How many of so many blocks are read, before those of the prompt are told from the others.
    pub fn kept(&self, blocks: usize) -> usize {
        ((blocks as f64 * self.ratio) as usize + 1).min(blocks)
    }

    /// `[batch, n_heads, blocks, blocks]`: which are read, by rotated queries, `[batch, n_heads, seq, width]`, and keys, `[batch,
    /// kv_heads, seq, width]`; `scale` is the factor of the scores, by default 1 / √width.
    pub fn seen(&self, q: Tensor<4>, k: Tensor<4>, scale: Option<f64>) -> Vec<bool> {
        let [_, heads, seq, _] = q.dims();
        let (size, blocks, first) = (self.block_size, seq.div_ceil(self.block_size), self.first_of_answer(seq));
        let k = repeated(k, heads);
        let options = AttentionOptions { scale, ..AttentionOptions::default() };
        // `[batch, heads, keys' blocks]` for a block of queries, whose weights are the only ones there are.
        let importance = |q: &Tensor<4>, k: Tensor<4>| {
            let of_keys = attention_weights(q.clone(), k, &options).sum_dim(2).swap_dims(2, 3);
            numbers(in_blocks(of_keys, size).sum_dim(3))
        };
        let answer = k.clone().narrow(2, first * size, seq - first * size);
        let rows: Vec<Vec<Vec<bool>>> = (0..blocks)
            .map(|block| {
                let q = q.clone().narrow(2, block * size, size.min(seq - block * size));
                let (all, own) = (importance(&q, k.clone()), importance(&q, answer.clone()));
                let head = |(all, own): (&[f32], &[f32])| {
                    let mut seen = vec![false; blocks];
                    largest(all, self.kept(blocks)).into_iter().for_each(|at| seen[at] = true);
                    seen[first..].fill(false);
                    largest(own, self.kept(blocks - first)).into_iter().for_each(|at| seen[first + at] = true);
                    seen
                };
                all.chunks(blocks).zip(own.chunks(blocks - first)).map(head).collect()
            })
            .collect();
        let heads = rows.first().map_or(0, Vec::len);
        (0..heads).flat_map(|head| rows.iter().flat_map(move |row| row[head].clone())).collect()
    }

    /// The mask of a layer.
    pub fn mask(&self, q: Tensor<4>, k: Tensor<4>) -> BlockMask {
        let [batch, heads, seq, _] = q.dims();
        BlockMask::of_blocks(&self.seen(q, k, None), [batch, heads], [seq, seq], [self.block_size; 2])
    }
}
