//! Shifted sparse attention, for training on long rows: S2-Attn (LongLoRA, Chen et al. 2023, arXiv 2309.12307) and SF-Attn (SinkLoRA,
//! Zhang 2024, arXiv 2406.05678).
//!
//! A row of T tokens is cut into chunks of G, and a query attends within its chunk; those of the last heads begin half a chunk
//! later, so that information flows from one chunk to the next. SF-Attn shifts fewer heads and lets every query see the first g
//! tokens besides:
//!
//! ```text
//! head h: i sees j  if  j <= i and (chunk_h(i) = chunk_h(j) or j < g)
//! chunk_h(t) = ⌊t / G⌋ of the first heads, ⌊(t + ⌊G/2⌋) / G⌋ of the shifted ones
//! ```
//! LongLoRA's first code rolls the sequence instead, so that the first half chunk sees the end of the row (`leak`); its later code
//! does not, and that is the default here. SinkLoRA's code has no SF-Attn: this is its text, read so that nothing looks ahead.

use std::ops::Range;

use polyhead_kernels::{BlockMask, QueryBlock};
use serde::{Deserialize, Serialize};

use crate::{ConfigError, require, require_range};

/// Settings of shifted sparse attention.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct ShiftedConfig {
    /// Chunks of a row; a query attends within its chunk. Default: 4, as LongLoRA.
    pub chunks: usize,
    /// Tokens of a chunk, in the place of a number of chunks. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunk_size: Option<usize>,
    /// Share of the heads, the last ones, whose chunks begin half a chunk later; rounded down. Default: 0.5 (S2-Attn); SF-Attn has
    /// 0.25.
    pub shift_fraction: f64,
    /// First tokens that all queries see. Default: 0 (S2-Attn); SF-Attn has 4.
    pub sinks: usize,
    /// Shift as LongLoRA's first code did: the first half chunk of a shifted head sees the end of the row, so that training losses
    /// are too low. Default: false.
    pub leak: bool,
}

impl Default for ShiftedConfig {
    fn default() -> Self {
        Self { chunks: 4, chunk_size: None, shift_fraction: 0.5, sinks: 0, leak: false }
    }
}

impl ShiftedConfig {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        require_range("chunks", self.chunks, 1..=1 << 20)?;
        require_range("chunk_size", self.chunk_size.unwrap_or(1), 1..=1 << 30)?;
        require_range("shift_fraction", self.shift_fraction, 0.0..=1.0)?;
        require_range("sinks", self.sinks, 0..=1 << 20)?;
        require(!self.leak || self.sinks == 0, "leak", || {
            format!(
                "leak is LongLoRA's first form, which has no sinks ({}): set sinks = 0 or leave leak out",
                self.sinks
            )
        })
    }

    /// What rows of `seq` tokens are cut into for `n_heads` heads.
    pub fn shift(&self, seq: usize, n_heads: usize) -> Shift {
        let shifted_heads = (n_heads as f64 * self.shift_fraction) as usize;
        let group = self.chunk_size.unwrap_or_else(|| seq.div_ceil(self.chunks).max(1));
        Shift { group, shifted_heads, sinks: self.sinks }
    }
}

/// The chunks of rows of one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shift {
    /// Tokens of a chunk; the last one may be shorter.
    pub group: usize,
    /// Heads whose chunks begin half a chunk later, the last ones.
    pub shifted_heads: usize,
    /// First tokens that all queries see.
    pub sinks: usize,
}

impl Shift {
    /// What `n_heads` heads see of `seq` tokens, besides causality.
    pub fn mask(&self, seq: usize, n_heads: usize) -> BlockMask {
        let chunk = |range: Range<usize>| QueryBlock { len: range.len(), keys: vec![0..self.sinks.min(seq), range] };
        let head = |head: usize| self.chunks(seq, self.is_shifted(head, n_heads)).map(chunk).collect();
        BlockMask::new([1, n_heads], seq, (0..n_heads).map(head).collect())
    }

    /// The same as LongLoRA's first code has it, causality included: the last chunk of a shifted head goes on at the beginning of
    /// the row. Sinks have no part in it.
    pub fn leaking_mask(&self, seq: usize, n_heads: usize) -> BlockMask {
        let half = self.group / 2;
        let query = |shifted: bool, at: usize| {
            let start = if shifted { half } else { 0 };
            // The chunk that is rolled over the end, and the tokens that it goes on with.
            let (rolled, own) = match at < start {
                true => (seq - (self.group - half).min(seq)..seq, 0),
                false => (0..0, (at - start) / self.group * self.group + start),
            };
            QueryBlock { len: 1, keys: vec![rolled, own..at + 1] }
        };
        let head = |head: usize| (0..seq).map(|at| query(self.is_shifted(head, n_heads), at)).collect();
        BlockMask::new([1, n_heads], seq, (0..n_heads).map(head).collect())
    }

    fn is_shifted(&self, head: usize, n_heads: usize) -> bool {
        head + self.shifted_heads >= n_heads
    }

    fn chunks(&self, seq: usize, shifted: bool) -> impl Iterator<Item = Range<usize>> {
        let (group, before) = (self.group, if shifted { self.group / 2 } else { 0 });
        (0..(seq + before).div_ceil(group))
            .map(move |chunk| (chunk * group).saturating_sub(before)..((chunk + 1) * group - before).min(seq))
            .filter(|chunk| !chunk.is_empty())
    }
}
