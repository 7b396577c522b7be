//! Block masks without training, as the second version of DHSA makes them (Xiong et al. 2025, arXiv 2510.24606; the authors' code
//! `Block-Sparse-Attention/DHSA_patch.py`, commit cc8e9c7): each block of queries reads a few blocks of keys.
//!
//! ```text
//! s_ij = mean(q of block i) · mean(k of block j)            no scale: it only ranks
//! top_k                  the largest s_ij, of later blocks too
//! a_shape                the first block and the newest, and the largest s_ij between them
//! vertical_slash         the same, but ranked by what the last block of queries attends to: columns of tokens and distances
//! vertical_slash_blocks  the same ranked by s of the last block of queries: columns and distances of blocks
//! ```
//! The authors' forward calls top_k alone, which spends blocks on keys that causality hides: early queries may see nothing.
//! What differs: the last blocks may be shorter, where the code refuses them.

use burn::tensor::Tensor;
use polyhead_kernels::{AttentionOptions, BlockMask, Mask, attention_weights, in_parallel};
use serde::{Deserialize, Serialize};

use super::rectified::RectifiedConfig;
use super::{block_means, largest, numbers, repeated};
use crate::{ConfigError, require_range};

/// How blocks of keys are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// The blocks of the largest scores, whether or not they are in the past
    TopK,
    /// The first block and the newest, and those of the largest scores between them
    #[default]
    AShape,
    /// The same ranked by the columns and distances that the last queries attend to
    VerticalSlash,
    /// The same ranked by the scores of the last block of queries
    VerticalSlashBlocks,
}

/// Settings of attention to a few blocks of keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct BlocksConfig {
    /// How they are chosen: "a_shape" (default), "vertical_slash", "vertical_slash_blocks", or "top_k", which spends blocks on later keys.
    pub pattern: Pattern,
    /// Queries of a block. Default: 128.
    pub query_block: usize,
    /// Keys of a block. Default: 32.
    pub key_block: usize,
    /// Share of all blocks of keys that a block of queries reads. Default: 0.125, as the authors.
    pub density: f64,
    /// Share of columns in a vertical-slash pattern; the rest is distances. Default: 0.5.
    pub vertical_share: f64,
    /// Let the means of blocks stand for those that are not read, as Rectified SpaAttn. Default: false.
    pub rectify: bool,
}

impl Default for BlocksConfig {
    fn default() -> Self {
        let (pattern, query_block, key_block) = (Pattern::default(), 128, 32);
        Self { pattern, query_block, key_block, density: 0.125, vertical_share: 0.5, rectify: false }
    }
}

impl BlocksConfig {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        require_range("query_block", self.query_block, 1..=1 << 20)?;
        require_range("key_block", self.key_block, 1..=1 << 20)?;
        require_range("density", self.density, 0.0..=1.0)?;
        require_range("vertical_share", self.vertical_share, 0.0..=1.0)
    }

    pub(super) fn mask(&self, q: Tensor<4>, k: Tensor<4>) -> BlockMask {
        let Self { pattern, query_block, key_block, density, vertical_share, .. } = *self;
        let top_k = ((k.dims()[2].div_ceil(key_block) as f64 * density).round() as usize).max(1);
        BlockSelection { pattern, sizes: [query_block, key_block], top_k, vertical_share }.mask(q, k)
    }

    pub(super) fn rectified(&self) -> Option<RectifiedConfig> {
        self.rectify.then(|| RectifiedConfig { block_size: self.key_block, ..RectifiedConfig::default() })
    }
}

/// A choice of blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockSelection {
    /// How they are chosen.
    pub pattern: Pattern,
    /// Queries and keys of a block.
    pub sizes: [usize; 2],
    /// Blocks of keys for each block of queries.
    pub top_k: usize,
    /// Share of columns in what a vertical-slash pattern takes; the rest is distances.
    pub vertical_share: f64,
}

/// The blocks of one row of queries: what causality leaves, and what is always read.
struct Row {
    /// The newest block that any of its queries sees.
    newest: usize,
    /// Whether it reads all of them.
    dense: bool,
    /// The first block of keys at its own positions.
    own: usize,
}

impl BlockSelection {
    /// The mask of a layer's rotated queries, `[batch, n_heads, seq, width]`, and keys, `[batch, kv_heads, seq, width]`.
    pub fn mask(&self, q: Tensor<4>, k: Tensor<4>) -> BlockMask {
        let ([batch, heads, queries, _], keys) = (q.dims(), k.dims()[2]);
        BlockMask::of_blocks(&self.seen(q, k), [batch, heads], [queries, keys], self.sizes)
    }

    /// `[batch, n_heads, query blocks, key blocks]`: which are read.
    pub fn seen(&self, q: Tensor<4>, k: Tensor<4>) -> Vec<bool> {
        let ([batch, heads, queries, width], [_, kv_heads, keys, _]) = (q.dims(), k.dims());
        let [rows, columns] = [queries.div_ceil(self.sizes[0]), keys.div_ceil(self.sizes[1])];
        let scores = || {
            let (q, k) = (block_means(q.clone(), self.sizes[0]), block_means(k.clone(), self.sizes[1]));
            numbers(q.matmul(repeated(k, heads).swap_dims(2, 3)))
        };
        let last = queries.min(self.sizes[0]).min(keys);
        // Of one head at a time: the weights of all of them are many.
        let weights = |row: usize, head: usize| {
            let mask = Mask::causal();
            let options =
                AttentionOptions { mask: Some(&mask), query_offset: keys - last, ..AttentionOptions::default() };
            let key_head = head / (heads / kv_heads);
            let q = q.clone().slice([row..row + 1, head..head + 1, queries - last..queries, 0..width]);
            let k = k.clone().slice([row..row + 1, key_head..key_head + 1, 0..keys, 0..width]);
            numbers(attention_weights(q, k, &options))
        };
        let size = rows * columns;
        let seen = match self.pattern {
            Pattern::TopK | Pattern::AShape => {
                let scores = scores();
                in_parallel(batch * heads, |at| {
                    let scores = &scores[at * size..(at + 1) * size];
                    self.head([rows, columns], &|row, _| scores[row * columns..(row + 1) * columns].to_vec())
                })
            }
            Pattern::VerticalSlash => in_parallel(batch * heads, |at| {
                let lines = self.lines(&weights(at / heads, at % heads), keys);
                self.head([rows, columns], &|row, newest| self.lines_in_row(&lines, (row, newest), keys))
            }),
            Pattern::VerticalSlashBlocks => {
                let (scores, scale) = (scores(), (width as f32).powf(-0.5));
                in_parallel(batch * heads, |at| {
                    let last = &scores[(at + 1) * size - columns..(at + 1) * size];
                    let last: Vec<f32> = last.iter().map(|score| score * scale).collect();
                    self.head([rows, columns], &|row, newest| {
                        let own = (row * self.sizes[0] / self.sizes[1]).min(columns - 1);
                        self.block_lines_in_row(&last, [own, newest])
                    })
                })
            }
        };
        seen.concat()
    }

    /// `[rows, columns]`: the blocks of one head, ranked by what `ranking` gives for a row and its newest block.
    fn head(&self, [rows, columns]: [usize; 2], ranking: &dyn Fn(usize, usize) -> Vec<f32>) -> Vec<bool> {
        let mut seen = vec![false; rows * columns];
        for (row, seen) in seen.chunks_mut(columns).enumerate() {
            let top_k = self.top_k.min(columns);
            if self.pattern == Pattern::TopK {
                largest(&ranking(row, columns - 1), top_k).into_iter().for_each(|block| seen[block] = true);
                continue;
            }
            let Row { newest, dense, own } = self.row(row, [rows, columns]);
            if dense {
                seen[..=newest].fill(true);
                continue;
            }
            seen[0] = true;
            seen[own..=newest].fill(true);
            let forced = newest - own + 1 + usize::from(own > 0);
            let ranked = largest(&ranking(row, newest)[1.min(newest)..newest], top_k.saturating_sub(forced));
            ranked.into_iter().for_each(|block| seen[block + 1] = true);
        }
        seen
    }

    fn row(&self, row: usize, [rows, columns]: [usize; 2]) -> Row {
        let [height, width] = self.sizes;
        let newest = (((row + 1) * height - 1) / width).min(columns - 1);
        let top_k = self.top_k.min(columns);
        let lines = matches!(self.pattern, Pattern::VerticalSlash | Pattern::VerticalSlashBlocks);
        // As many first rows as the budget of tokens fills, and the last, whose weights are known, are dense.
        let dense = newest < top_k || lines && (row < (top_k * width).div_ceil(height) || row + 1 == rows);
        let band = self.pattern == Pattern::VerticalSlashBlocks;
        Row { newest, dense, own: if band { (row * height / width).min(columns - 1) } else { newest } }
    }

    /// The columns of tokens that the last queries, with `[queries, keys]` these weights, attend to most, as a number for each
    /// block of keys; and the distances, each with its number.
    fn lines(&self, weights: &[f32], keys: usize) -> (Vec<f32>, Vec<(usize, f32)>) {
        let (width, rows) = (self.sizes[1], weights.len() / keys);
        let budget = (self.top_k.min(keys.div_ceil(width)) * width).min(keys);
        let vertical = (budget as f64 * self.vertical_share) as usize;
        let (mut columns, mut slashes) = (vec![0.0; keys], vec![0.0; keys]);
        for (row, weights) in weights.chunks(keys).enumerate() {
            columns.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += weight);
            let upto_own = &weights[..=keys - rows + row];
            slashes.iter_mut().zip(upto_own.iter().rev()).for_each(|(sum, weight)| *sum += weight);
        }
        let mut blocks = vec![0.0; keys.div_ceil(width)];
        largest(&columns, vertical).into_iter().for_each(|key| blocks[key / width] += columns[key]);
        (blocks, largest(&slashes, budget - vertical).into_iter().map(|at| (at, slashes[at])).collect())
    }

    /// A number for each block of keys: the column's, and those of the distances that touch it.
    fn lines_in_row(
        &self,
        (columns, slashes): &(Vec<f32>, Vec<(usize, f32)>),
        (row, newest): (usize, usize),
        keys: usize,
    ) -> Vec<f32> {
        let ([height, width], mut ranking) = (self.sizes, columns.clone());
        for &(distance, weight) in slashes {
            let Some(last) = ((row + 1) * height - 1).checked_sub(distance) else { continue };
            let first = (row * height).saturating_sub(distance);
            let touched = first.min(keys - 1) / width..=(last.min(keys - 1) / width).min(newest);
            touched.for_each(|block| ranking[block] += weight);
        }
        ranking
    }

    /// The same of blocks, by the scores of the last block of queries.
    fn block_lines_in_row(&self, last: &[f32], [own, newest]: [usize; 2]) -> Vec<f32> {
        let top_k = self.top_k.min(last.len());
        let vertical = (top_k as f64 * self.vertical_share) as usize;
        let mut ranking = vec![0.0; last.len()];
        largest(last, vertical).into_iter().for_each(|block| ranking[block] += last[block]);
        for block in largest(last, top_k - vertical) {
            let distance = last.len() - 1 - block;
            let touched = (own.max(distance)..=newest).map(|at| at - distance).filter(|at| (1..newest).contains(at));
            touched.for_each(|at| ranking[at] += last[block]);
        }
        ranking
    }
}
