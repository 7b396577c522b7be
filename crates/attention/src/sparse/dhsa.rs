//! Dynamic hierarchical sparse attention (DHSA; Xiong et al. 2025, arXiv 2510.24606; the authors' code `legacy/utils/helper.py`, commit
//! cc8e9c7): keys in chunks of their own lengths, and for each block of queries the tokens of the chunks that it scores highest.
//!
//! ```text
//! r_c = Σ k over the chunk / √length       (its mean with pooling = "mean")
//! r_i = Σ q over the block / block_size · √length
//! s_ic = r_i · r_c                         heads averaged, no scale: it only ranks
//! ```
//! A block of queries reads `budget` tokens: the newest `local_tokens`, and of the others those of the best chunks; `global_tokens`
//! first ones are read besides, and the last `instruction_tokens` queries read everything. Causality stays exact. Where a chunk is
//! taken in part, its first tokens are. Where the chunks begin is [`boundaries`](super::boundaries)' to say.
//!
//! The code keeps lists of indices, in which global tokens replace the first ones and may be counted twice; here a selection is a set.

use burn::tensor::Tensor;
use polyhead_kernels::{BlockMask, QueryBlock, in_parallel};
use serde::{Deserialize, Serialize};

use super::boundaries::{BoundaryPredictor, BoundarySelection, rows_of};
use super::rectified::RectifiedConfig;
use super::{in_blocks, numbers};
use crate::{ConfigError, require_range};

/// How the rows of a chunk become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ChunkPooling {
    /// Their mean
    Mean,
    /// Their mean times the root of their number, so that long chunks are no worse off
    #[default]
    MeanSqrt,
}

/// Settings of dynamic hierarchical sparse attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct DhsaConfig {
    /// Queries of a block. Default: 64.
    pub block_size: usize,
    /// Share of all tokens that a block of queries reads, besides the first and newest ones. Default: 0.25.
    pub density: f64,
    /// How the rows of a chunk become one: "mean_sqrt" (default) or "mean".
    pub pooling: ChunkPooling,
    /// First tokens that all queries read. Default: 128.
    pub global_tokens: usize,
    /// Newest tokens that a block of queries reads. Default: 128.
    pub local_tokens: usize,
    /// Last queries, the instruction, that read everything. Default: 64.
    pub instruction_tokens: usize,
    /// Boundaries of chunks at most, for each block of queries that there is. Default: 8.
    pub chunks_per_block: usize,
    /// Only logits above this are boundaries. Default: 0.
    pub threshold: f64,
    /// Boundaries are farther apart than so many tokens. Default: 8.
    pub min_distance: usize,
    /// Chunks of so many tokens each instead of those that the model's predictor finds. Default: the predictor's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunk_size: Option<usize>,
    /// Let the means of blocks of block_size tokens stand for those of which nothing is read, as Rectified SpaAttn. Default: false.
    pub rectify: bool,
}

impl Default for DhsaConfig {
    fn default() -> Self {
        Self {
            block_size: 64,
            density: 0.25,
            pooling: ChunkPooling::default(),
            global_tokens: 128,
            local_tokens: 128,
            instruction_tokens: 64,
            chunks_per_block: 8,
            threshold: 0.0,
            min_distance: 8,
            chunk_size: None,
            rectify: false,
        }
    }
}

impl DhsaConfig {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        require_range("block_size", self.block_size, 1..=1 << 20)?;
        require_range("density", self.density, 0.0..=1.0)?;
        require_range("chunks_per_block", self.chunks_per_block, 1..=1 << 20)?;
        require_range("threshold", self.threshold, -1e6..=1e6)?;
        require_range("chunk_size", self.chunk_size.unwrap_or(1), 1..=1 << 30)?;
        for (field, tokens) in [
            ("global_tokens", self.global_tokens),
            ("local_tokens", self.local_tokens),
            ("instruction_tokens", self.instruction_tokens),
            ("min_distance", self.min_distance),
        ] {
            require_range(field, tokens, 0..=1 << 30)?;
        }
        Ok(())
    }

    /// Where the chunks of each row of the batch begin, by rotated keys.
    fn starts(&self, k: &Tensor<4>, predictor: Option<&BoundaryPredictor>) -> Vec<Vec<usize>> {
        let [batch, _, seq, _] = k.dims();
        match (self.chunk_size, predictor) {
            (None, Some(predictor)) => {
                let select = BoundarySelection {
                    threshold: self.threshold,
                    most: self.chunks_per_block * seq.div_ceil(self.block_size),
                    min_distance: self.min_distance,
                    instruction_tokens: Some(self.instruction_tokens).filter(|tokens| (1..seq).contains(tokens)),
                };
                let logits = rows_of(predictor.logits(polyhead_kernels::in_type(k.clone(), burn::tensor::DType::F32)));
                logits.iter().map(|row| select.starts_of_logits(row, predictor.window(), false)).collect()
            }
            (size, _) => {
                let starts = (0..seq).step_by(size.unwrap_or(self.block_size)).chain([seq]).collect();
                vec![starts; batch]
            }
        }
    }

    pub(super) fn mask(&self, q: Tensor<4>, k: Tensor<4>, predictor: Option<&BoundaryPredictor>) -> BlockMask {
        let (starts, seq) = (self.starts(&k, predictor), k.dims()[2]);
        let select = TokenSelection {
            block_size: self.block_size,
            budget: ((seq as f64 * self.density) as usize).max(1),
            pooling: self.pooling,
            global_tokens: self.global_tokens,
            local_tokens: self.local_tokens,
            instruction_tokens: self.instruction_tokens.min(seq),
            sliding_window: None,
        };
        select.mask(q, k, &starts)
    }

    pub(super) fn rectified(&self) -> Option<RectifiedConfig> {
        self.rectify.then(|| RectifiedConfig { block_size: self.block_size, ..RectifiedConfig::default() })
    }
}

/// Which tokens a block of queries reads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenSelection {
    /// Queries of a block.
    pub block_size: usize,
    /// Tokens that a block reads, besides global ones.
    pub budget: usize,
    /// How the rows of a chunk become one.
    pub pooling: ChunkPooling,
    /// First tokens that all blocks read.
    pub global_tokens: usize,
    /// Newest tokens that a block reads whatever their scores.
    pub local_tokens: usize,
    /// Last queries that read everything.
    pub instruction_tokens: usize,
    /// Tokens behind a query that it can see, itself not counted; `None` for all.
    pub sliding_window: Option<usize>,
}

/// Chunks against blocks of queries.
#[derive(Debug, Clone)]
pub struct ChunkScores {
    /// `[batch, query blocks, width]`
    pub queries: Tensor<3>,
    /// `[batch, chunks, width]` of every row of the batch.
    pub chunks: Vec<Tensor<2>>,
    /// Of every row of the batch, `[query blocks, chunks]`.
    pub scores: Vec<Vec<f32>>,
}

/// What a block of queries reads. All tokens of a chunk score the same: of the last one that is taken, some may have to be left out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chosen {
    /// `[keys]`: tokens that are read in any case.
    pub must: Vec<bool>,
    /// `[keys]`: tokens of equal scores, of which only some may be read.
    pub tied: Vec<bool>,
    /// How many of those.
    pub from_tied: usize,
}

impl Chosen {
    /// `[keys]`: what is read; of equals the first ones.
    pub fn seen(&self) -> Vec<bool> {
        let mut left = self.from_tied;
        let mut take = |tied: bool| {
            let take = tied && left > 0;
            left -= usize::from(take);
            take
        };
        self.must.iter().zip(&self.tied).map(|(&must, &tied)| must || take(tied)).collect()
    }
}

/// The chunk of every token; chunks begin at `starts`, whose last is the number of tokens.
pub fn chunk_of_tokens(starts: &[usize]) -> Vec<usize> {
    starts.windows(2).enumerate().flat_map(|(chunk, ends)| std::iter::repeat_n(chunk, ends[1] - ends[0])).collect()
}

impl TokenSelection {
    /// Queries that are selected for.
    fn queries(&self, seq: usize) -> usize {
        seq.saturating_sub(self.instruction_tokens)
    }

    /// The scores of chunks, which begin at `starts` in each row of the batch.
    ///
    /// # Shapes
    /// - q: `[batch, n_heads, seq, width]`, k: `[batch, kv_heads, seq, width]`, rotated
    pub fn scores(&self, q: Tensor<4>, k: Tensor<4>, starts: &[Vec<usize>]) -> ChunkScores {
        let [_, _, seq, _] = q.dims();
        let (queries, size, device) = (self.queries(seq), self.block_size, q.device());
        let root = |rows: usize| if self.pooling == ChunkPooling::MeanSqrt { (rows as f32).sqrt() } else { 1.0 };
        let lengths: Vec<f32> = super::block_lengths(queries, size).into_iter().map(root).collect();
        let blocks = in_blocks(q.narrow(2, 0, queries).mean_dim(1), size).sum_dim(3).squeeze_dim::<4>(3);
        let of_queries = (blocks / size as f64 * super::as_column(&lengths, &device)).squeeze_dim::<3>(1);
        // Heads of keys are repeated alike: their mean is that of the query heads.
        let keys = polyhead_kernels::in_type(k, burn::tensor::DType::F32).mean_dim(1).squeeze_dim::<3>(1);
        let chunk = |(row, starts): (usize, &Vec<usize>)| {
            let of_chunk = |ends: &[usize]| {
                let rows = ends[1] - ends[0];
                let mean = keys.clone().slice([row..row + 1, ends[0]..ends[1]]).mean_dim(1).squeeze_dim::<2>(1);
                mean * f64::from(root(rows))
            };
            Tensor::cat(starts.windows(2).map(of_chunk).collect(), 0)
        };
        let chunks: Vec<Tensor<2>> = starts.iter().enumerate().map(chunk).collect();
        let score = |(row, chunks): (usize, &Tensor<2>)| {
            numbers(of_queries.clone().narrow(0, row, 1).squeeze_dim::<2>(0).matmul(chunks.clone().transpose()))
        };
        let scores = chunks.iter().enumerate().map(score).collect();
        ChunkScores { queries: of_queries, chunks, scores }
    }

    /// What block `block` of queries reads of `seq` tokens, by the scores of their chunks.
    pub fn choose(&self, block: usize, scores: &[f32], chunk_of: &[usize]) -> Chosen {
        let seq = chunk_of.len();
        let end = (block + 1) * self.block_size;
        let allowed = self.sliding_window.map_or(0, |window| end.saturating_sub(window)).min(seq)..end.min(seq);
        let budget = self.sliding_window.map_or(self.budget, |window| self.budget.min(window)).min(allowed.len());
        let local = allowed.end - self.local_tokens.min(budget)..allowed.end;
        let mut chosen = Chosen { must: vec![false; seq], tied: vec![false; seq], from_tied: 0 };
        chosen.must[local.clone()].fill(true);
        // Chunks, as far as they are among the others, from the best: the last one of which anything is left has the lowest score.
        let others = chunk_of[allowed.start..local.start].chunk_by(|a, b| a == b);
        let others: Vec<(f32, usize)> = others.map(|run| (scores[run[0]], run.len())).collect();
        let mut best = others.clone();
        best.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut left = budget - local.len();
        let mut taken = Vec::new();
        for (score, tokens) in best {
            let some = tokens.min(left);
            left -= some;
            taken.extend((some > 0).then_some((score, some)));
        }
        let Some(&(lowest, _)) = taken.last() else { return chosen };
        let mut at = allowed.start;
        for (score, tokens) in others {
            chosen.must[at..at + tokens].fill(score > lowest);
            chosen.tied[at..at + tokens].fill(score == lowest);
            at += tokens;
        }
        chosen.from_tied = taken.iter().filter(|(score, _)| *score == lowest).map(|(_, tokens)| tokens).sum();
        chosen
    }

    /// The first tokens that a block reads whatever their scores.
    pub fn global(&self, block: usize, seq: usize) -> std::ops::Range<usize> {
        let start = block * self.block_size;
        let from = self.sliding_window.map_or(0, |window| start.saturating_sub(window));
        from..(from + self.global_tokens).min(start + self.block_size).min(seq)
    }

    /// What a layer's queries read, besides causality and the window; chunks begin at `starts` in each row of the batch.
    pub fn mask(&self, q: Tensor<4>, k: Tensor<4>, starts: &[Vec<usize>]) -> BlockMask {
        let seq = q.dims()[2];
        let queries = self.queries(seq);
        let scores = match queries {
            0 => vec![Vec::new(); starts.len()],
            _ => self.scores(q, k, starts).scores,
        };
        let row = |(starts, scores): (&Vec<usize>, Vec<f32>)| {
            let (chunk_of, chunks) = (chunk_of_tokens(starts), starts.len() - 1);
            let lengths = super::block_lengths(queries, self.block_size);
            let block = |block: usize| {
                let len = lengths[block];
                let own = &scores[block * chunks..(block + 1) * chunks];
                let seen = self.choose(block, own, &chunk_of).seen();
                QueryBlock { len, keys: runs(&seen).into_iter().chain([self.global(block, seq)]).collect() }
            };
            let last =
                (queries < seq).then(|| QueryBlock { len: seq - queries, keys: std::iter::once(0..seq).collect() });
            in_parallel(lengths.len(), block).into_iter().chain(last).collect()
        };
        BlockMask::new([starts.len(), 1], seq, starts.iter().zip(scores).map(row).collect())
    }
}

/// The runs of what is true.
fn runs(seen: &[bool]) -> Vec<std::ops::Range<usize>> {
    let mut at = 0;
    let mut runs = Vec::new();
    for run in seen.chunk_by(|a, b| a == b) {
        if run[0] {
            runs.push(at..at + run.len());
        }
        at += run.len();
    }
    runs
}
