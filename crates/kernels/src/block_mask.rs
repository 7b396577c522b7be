//! Block masks: which keys blocks of queries see. The one form of every sparse pattern, by which the tiled kernel skips what is
//! hidden.

use std::ops::Range;

use burn::tensor::{Bool, Device, Tensor, TensorData};

/// Neighbouring queries, and the keys that all of them see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryBlock {
    /// How many queries, at least 1.
    pub len: usize,
    /// Runs of keys, in any order; they may overlap.
    pub keys: Vec<Range<usize>>,
}

/// For every block of queries, the keys that it sees; all others are hidden. Blocks are counted in positions of the whole text: a
/// call whose first keys are cached reads the blocks of its own queries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockMask {
    /// Rows of the batch and heads, or 1 where all share one pattern.
    shape: [usize; 2],
    positions: usize,
    keys: usize,
    /// `[batch, heads]`
    patterns: Vec<Pattern>,
}

/// The blocks of one head in one row of the batch.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    /// The position behind each block, ascending.
    ends: Vec<usize>,
    /// Of each block, runs of keys that neither touch nor overlap, ascending.
    runs: Vec<Vec<Range<usize>>>,
}

/// Hidden keys between two runs that are computed rather than left out: another tile costs more. Chosen by us.
const GAP: usize = 16;

impl BlockMask {
    /// From the blocks of every row of the batch and head, `[batch or 1, heads or 1]`.
    ///
    /// # Panics
    /// If there are not as many lists, a block has no query, the lists have not as many queries, or a run is beyond `keys`.
    pub fn new([batch, heads]: [usize; 2], keys: usize, lists: Vec<Vec<QueryBlock>>) -> Self {
        assert!(lists.len() == batch * heads, "block mask: {} lists of blocks for [{batch}, {heads}]", lists.len());
        let patterns: Vec<Pattern> = lists.into_iter().map(|blocks| Pattern::new(blocks, keys)).collect();
        let positions = patterns.first().and_then(|first| first.ends.last().copied()).unwrap_or_default();
        let alike = patterns.iter().all(|pattern| pattern.ends.last() == Some(&positions));
        assert!(alike, "block mask: the blocks of all heads must have as many queries, at least 1");
        Self { shape: [batch, heads], positions, keys, patterns }
    }

    /// From one answer per block of queries and block of keys, true where it is seen; the last blocks may be shorter.
    ///
    /// # Shapes
    /// - seen: `[batch or 1, heads or 1, query blocks, key blocks]`
    /// - sizes: queries and keys in all; blocks: queries and keys of a block
    ///
    /// # Panics
    /// If there are not as many answers as blocks.
    pub fn of_blocks(seen: &[bool], heads: [usize; 2], sizes: [usize; 2], blocks: [usize; 2]) -> Self {
        let ([queries, keys], [height, width]) = (sizes, blocks);
        let [rows, columns] = [queries.div_ceil(height), keys.div_ceil(width)];
        let all = heads[0] * heads[1] * rows * columns;
        assert!(seen.len() == all, "block mask: {} answers for {heads:?} x [{rows}, {columns}] blocks", seen.len());
        let block = |(row, seen): (usize, &[bool])| {
            let columns = seen.iter().enumerate().filter(|(_, seen)| **seen).map(|(column, _)| column);
            let keys = columns.map(|column| column * width..((column + 1) * width).min(keys)).collect();
            QueryBlock { len: height.min(queries - row * height), keys }
        };
        let lists = seen.chunks(rows * columns).map(|head| head.chunks(columns).enumerate().map(block).collect());
        Self::new(heads, keys, lists.collect())
    }

    /// The masks of texts that follow one another in the rows of a batch, each `[1, heads]` with as many keys as positions: every query
    /// sees keys of its own text.
    ///
    /// # Panics
    /// If a mask is of several rows, has other heads or more keys than positions, or the rows have not as many positions.
    pub fn of_texts(rows: Vec<Vec<Self>>) -> Self {
        let (batch, first) = (rows.len(), rows.iter().flatten().next());
        let heads = first.map_or(1, |first| first.shape[1]);
        let length = |texts: &Vec<Self>| texts.iter().map(|text| text.positions).sum::<usize>();
        let positions = rows.first().map_or(0, length);
        let mut patterns = vec![Pattern { ends: Vec::new(), runs: Vec::new() }; batch * heads];
        for (texts, patterns) in rows.iter().zip(patterns.chunks_mut(heads)) {
            assert!(
                length(texts) == positions,
                "block mask: texts of {} and {positions} tokens in rows",
                length(texts)
            );
            let mut from = 0;
            for text in texts {
                let [rows, own, tokens, keys] = text.dims();
                assert!(
                    [rows, own, keys] == [1, heads, tokens],
                    "block mask: a text of {:?}, {heads} heads",
                    text.dims()
                );
                for (pattern, text) in patterns.iter_mut().zip(&text.patterns) {
                    pattern.ends.extend(text.ends.iter().map(|end| from + end));
                    let moved = |runs: &Vec<Range<usize>>| -> Vec<Range<usize>> {
                        runs.iter().map(|run| from + run.start..from + run.end).collect()
                    };
                    pattern.runs.extend(text.runs.iter().map(moved));
                }
                from += tokens;
            }
        }
        Self { shape: [batch, heads], positions, keys: positions, patterns }
    }

    /// `[batch or 1, heads or 1]`, positions and keys.
    pub(crate) fn dims(&self) -> [usize; 4] {
        [self.shape[0], self.shape[1], self.positions, self.keys]
    }

    fn pattern(&self, batch: usize, head: usize) -> &Pattern {
        let [rows, heads] = self.shape;
        &self.patterns[(if rows == 1 { 0 } else { batch }) * heads + if heads == 1 { 0 } else { head }]
    }

    /// The runs of keys that the query at `position` sees, in order and apart.
    ///
    /// # Panics
    /// If there is no such row, head or position.
    pub fn runs(&self, [batch, head]: [usize; 2], position: usize) -> &[Range<usize>] {
        self.pattern(batch, head).runs_at(position)
    }

    /// The position behind the block of queries that `position` is in.
    pub(crate) fn block_end(&self, [batch, head]: [usize; 2], position: usize) -> usize {
        let pattern = self.pattern(batch, head);
        pattern.ends[pattern.block_at(position)]
    }

    /// Spans within `reach` that have all keys which any query of `positions` (ascending) sees: few that nobody sees, ascending,
    /// apart.
    pub(crate) fn spans(
        &self,
        [batch, head]: [usize; 2],
        positions: impl Iterator<Item = usize>,
        reach: Range<usize>,
    ) -> Vec<Range<usize>> {
        let pattern = self.pattern(batch, head);
        let (mut spans, mut before) = (Vec::new(), usize::MAX);
        for block in positions.map(|position| pattern.block_at(position)) {
            if block != before {
                let within = pattern.runs[block].iter().map(|run| run.start.max(reach.start)..run.end.min(reach.end));
                spans.extend(within.filter(|run| !run.is_empty()));
            }
            before = block;
        }
        joined(spans, GAP)
    }

    /// Writes `value` over the scores of hidden keys among `keys`.
    pub(crate) fn hide(
        &self,
        [batch, head]: [usize; 2],
        position: usize,
        keys: Range<usize>,
        scores: &mut [f32],
        value: f32,
    ) {
        let runs = self.runs([batch, head], position);
        let mut from = keys.start;
        for run in &runs[runs.partition_point(|run| run.end <= keys.start)..] {
            if run.start >= keys.end {
                break;
            }
            scores[from - keys.start..run.start.max(from) - keys.start].fill(value);
            from = run.end.min(keys.end);
        }
        scores[from - keys.start..keys.len()].fill(value);
    }

    /// `[batch or 1, heads or 1, positions, keys]`, true where hidden, of some positions.
    pub(crate) fn hidden(&self, positions: Range<usize>, device: &Device) -> Tensor<4, Bool> {
        let shape = [self.shape[0], self.shape[1], positions.len(), self.keys];
        let mut hidden = Vec::with_capacity(shape.iter().product());
        for pattern in &self.patterns {
            for position in positions.clone() {
                let start = hidden.len();
                hidden.resize(start + self.keys, true);
                pattern.runs_at(position).iter().for_each(|run| hidden[start..][run.clone()].fill(false));
            }
        }
        Tensor::from_data(TensorData::new(hidden, shape), device)
    }
}

impl Pattern {
    fn new(blocks: Vec<QueryBlock>, keys: usize) -> Self {
        let (mut ends, mut runs) = (Vec::new(), Vec::new());
        for block in blocks {
            assert!(block.len > 0, "block mask: a block of no queries");
            assert!(block.keys.iter().all(|run| run.end <= keys), "block mask: {block:?} reads beyond {keys} keys");
            ends.push(ends.last().unwrap_or(&0) + block.len);
            runs.push(joined(block.keys.into_iter().filter(|run| !run.is_empty()).collect(), 0));
        }
        Self { ends, runs }
    }

    fn block_at(&self, position: usize) -> usize {
        self.ends.partition_point(|&end| end <= position)
    }

    fn runs_at(&self, position: usize) -> &[Range<usize>] {
        &self.runs[self.block_at(position)]
    }
}

/// The runs in order, joined where no more than `gap` keys are between them.
fn joined(mut runs: Vec<Range<usize>>, gap: usize) -> Vec<Range<usize>> {
    runs.sort_unstable_by_key(|run| run.start);
    let mut joined: Vec<Range<usize>> = Vec::with_capacity(runs.len());
    for run in runs {
        match joined.last_mut() {
            Some(last) if run.start <= last.end + gap => last.end = last.end.max(run.end),
            _ => joined.push(run),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the first key of each run and the one behind it.
    fn block(len: usize, keys: &[(usize, usize)]) -> QueryBlock {
        QueryBlock { len, keys: keys.iter().map(|&(from, to)| from..to).collect() }
    }

    /// Two heads of five queries and six keys.
    fn mask() -> BlockMask {
        let first = vec![block(2, &[(4, 6), (0, 1), (1, 2)]), block(3, &[])];
        BlockMask::new([1, 2], 6, vec![first, vec![block(5, &[(1, 3)])]])
    }

    #[test]
    fn runs_are_what_is_seen() {
        let mask = mask();
        let bits: Vec<bool> = mask.hidden(1..3, &Device::flex()).into_data().iter::<bool>().collect();
        let rows: Vec<String> =
            bits.chunks(6).map(|row| row.iter().map(|&hidden| if hidden { '#' } else { '.' }).collect()).collect();
        assert_eq!(rows, ["..##..", "######", "#..###", "#..###"]);
        for (head, position, row) in [(0, 1, 0), (0, 2, 1), (1, 4, 3)] {
            for keys in [0..6, 1..5, 2..3, 5..6] {
                let mut scores = vec![0.0; keys.len()];
                mask.hide([0, head], position, keys.clone(), &mut scores, 1.0);
                let want: Vec<f32> = keys.map(|key| f32::from(u8::from(bits[row * 6 + key]))).collect();
                assert_eq!(scores, want);
            }
        }
    }

    #[test]
    fn spans_join_what_is_near() {
        let blocks = vec![block(2, &[(0, 4), (20, 30), (90, 99)]), block(1, &[(50, 60)])];
        let mask = BlockMask::new([1, 1], 100, vec![blocks]);
        assert_eq!(mask.spans([0, 0], 0..2, 2..95), [2..30, 90..95]);
        assert_eq!(mask.spans([3, 7], 1..3, 0..100), [0..30, 50..60, 90..99]);
        assert!(mask.spans([0, 0], 2..3, 0..40).is_empty());
        assert_eq!((mask.block_end([0, 0], 1), mask.block_end([0, 0], 2)), (2, 3));
    }

    #[test]
    fn texts_in_a_row_see_keys_of_their_own() {
        let text = |keys: usize, blocks: Vec<QueryBlock>| BlockMask::new([1, 1], keys, vec![blocks]);
        let (long, short) =
            (text(3, vec![block(2, &[(0, 1)]), block(1, &[(1, 3)])]), text(2, vec![block(2, &[(0, 2)])]));
        let mask = BlockMask::of_texts(vec![vec![long.clone(), short.clone()], vec![short, long]]);
        let first = vec![block(2, &[(0, 1)]), block(1, &[(1, 3)]), block(2, &[(3, 5)])];
        let second = vec![block(2, &[(0, 2)]), block(2, &[(2, 3)]), block(1, &[(3, 5)])];
        assert_eq!(mask, BlockMask::new([2, 1], 5, vec![first, second]));
    }

    #[test]
    fn blocks_at_the_ends_are_shorter() {
        let seen = [true, false, true, true, true, false];
        let mask = BlockMask::of_blocks(&seen, [1, 1], [5, 7], [3, 3]);
        let blocks = vec![block(3, &[(0, 3), (6, 7)]), block(2, &[(0, 6)])];
        assert_eq!(mask, BlockMask::new([1, 1], 7, vec![blocks]));
    }
}
