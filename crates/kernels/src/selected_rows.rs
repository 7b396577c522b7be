//! The selected queries of each head: the choice of a router.

use std::mem::MaybeUninit;
use std::ops::Range;

use burn::tensor::{Bool, Device, Tensor, TensorData};

use crate::cpu::View;
use crate::matrix::Matrix;
use crate::scratch::write_rows;

/// For every head, the positions at which it takes part. Elsewhere nothing of it is computed: its output and the
/// gradient of its query are zero there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelectedRows {
    batch: usize,
    queries: usize,
    heads: usize,
    /// Rows of the batch laid behind each other (`row * queries + query`); head by head, ascending.
    tokens: Vec<u32>,
    /// `[heads * batch + 1]`: where the tokens of each head in each row of the batch begin.
    starts: Vec<usize>,
}

impl SelectedRows {
    /// From one answer per position and head.
    ///
    /// # Shapes
    /// - chosen: `[batch, queries, heads]`
    ///
    /// # Panics
    /// If there are not as many answers, or more than 2^32 positions.
    pub fn new(chosen: &[bool], [batch, queries, heads]: [usize; 3]) -> Self {
        assert!(
            chosen.len() == batch * queries * heads && u32::try_from(batch * queries).is_ok(),
            "selected rows: one answer per position and head; chosen [{}], shape {:?}",
            chosen.len(),
            [batch, queries, heads],
        );
        let mut tokens = Vec::with_capacity(chosen.iter().filter(|&&chosen| chosen).count());
        let mut starts = Vec::with_capacity(heads * batch + 1);
        for head in 0..heads {
            for row in 0..batch {
                starts.push(tokens.len());
                let of_row = row * queries..(row + 1) * queries;
                tokens.extend(of_row.filter(|token| chosen[token * heads + head]).map(|token| token as u32));
            }
        }
        starts.push(tokens.len());
        Self { batch, queries, heads, tokens, starts }
    }

    /// Every head everywhere.
    pub fn all(shape: [usize; 3]) -> Self {
        Self::new(&vec![true; shape.iter().product()], shape)
    }

    /// `[batch, queries, heads]`
    pub fn shape(&self) -> [usize; 3] {
        [self.batch, self.queries, self.heads]
    }

    /// The number of selected (position, head) pairs.
    pub fn count(&self) -> usize {
        self.tokens.len()
    }

    /// Positions at which a head takes part, over the whole batch.
    ///
    /// # Panics
    /// If there is no such head.
    pub fn of_head(&self, head: usize) -> &[u32] {
        assert!(head < self.heads, "selected rows: head {head} of {}", self.heads);
        &self.tokens[self.starts[head * self.batch]..self.starts[(head + 1) * self.batch]]
    }

    /// Those of [`Self::of_head`] in `tokens`.
    pub(crate) fn of_head_within(&self, head: usize, tokens: Range<usize>) -> &[u32] {
        let all = self.of_head(head);
        let before = |end: usize| all.partition_point(|&token| (token as usize) < end);
        &all[before(tokens.start)..before(tokens.end)]
    }

    /// Some of the queries of every row of the batch.
    pub(crate) fn of_queries(&self, queries: Range<usize>) -> Self {
        let mut chosen = vec![false; self.batch * queries.len() * self.heads];
        for head in 0..self.heads {
            for &token in self.of_head(head) {
                let (row, query) = (token as usize / self.queries, token as usize % self.queries);
                if queries.contains(&query) {
                    chosen[(row * queries.len() + query - queries.start) * self.heads + head] = true;
                }
            }
        }
        Self::new(&chosen, [self.batch, queries.len(), self.heads])
    }

    /// The number of leading heads that are selected everywhere.
    pub(crate) fn complete_heads(&self) -> usize {
        let everywhere = self.batch * self.queries;
        (0..self.heads).take_while(|&head| self.of_head(head).len() == everywhere).count()
    }

    /// The queries of a head in a row of the batch, cut into blocks.
    pub(crate) fn blocks(&self, row: usize, head: usize, size: usize) -> impl Iterator<Item = Rows<'_>> {
        let at = head * self.batch + row;
        let tokens = &self.tokens[self.starts[at]..self.starts[at + 1]];
        let first = row * self.queries;
        let neighbours = tokens.len() == self.queries;
        tokens.chunks(size).map(move |block| match neighbours {
            true => Rows::Span { from: block[0] as usize - first, len: block.len() },
            false => Rows::Listed { tokens: block, first },
        })
    }

    /// `[batch, heads, queries, 1]`, true where nothing takes part: for forms in tensor operations.
    pub(crate) fn hidden(&self, device: &Device) -> Tensor<4, Bool> {
        let mut hidden = vec![true; self.batch * self.queries * self.heads];
        for head in 0..self.heads {
            for &token in self.of_head(head) {
                let (row, query) = (token as usize / self.queries, token as usize % self.queries);
                hidden[(row * self.heads + head) * self.queries + query] = false;
            }
        }
        Tensor::from_data(TensorData::new(hidden, [self.batch, self.heads, self.queries, 1]), device)
    }
}

/// Queries that are computed together.
#[derive(Clone, Copy)]
pub(crate) enum Rows<'a> {
    /// Neighbours.
    Span {
        /// The first query.
        from: usize,
        /// The number of queries.
        len: usize,
    },
    /// Those of a list.
    Listed {
        /// As in [`SelectedRows`].
        tokens: &'a [u32],
        /// The token that is the first query of its row of the batch.
        first: usize,
    },
}

impl Rows<'_> {
    pub(crate) fn len(self) -> usize {
        match self {
            Self::Span { len, .. } => len,
            Self::Listed { tokens, .. } => tokens.len(),
        }
    }

    /// The query in place `r`.
    pub(crate) fn query(self, r: usize) -> usize {
        match self {
            Self::Span { from, .. } => from + r,
            Self::Listed { tokens, first } => tokens[r] as usize - first,
        }
    }

    /// All queries, in order.
    pub(crate) fn queries(self) -> impl Iterator<Item = usize> {
        (0..self.len()).map(move |r| self.query(r))
    }

    /// These rows of a head as a matrix: a view where they are neighbours, else copied into `buffer`.
    pub(crate) fn matrix<'a>(
        self,
        all: View<'a>,
        [b, h]: [usize; 2],
        buffer: &'a mut [MaybeUninit<f32>],
    ) -> Matrix<'a> {
        let width = all.shape[3];
        match self {
            Self::Span { from, len } => all.rows(b, h, from..from + len),
            Self::Listed { .. } => {
                let part = &mut buffer[..self.len() * width];
                let copy = write_rows(part, width, |r, row| row.write_copy_of_slice(all.row(b, h, self.query(r))));
                Matrix::by_rows(copy, [self.len(), width])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_by_head_and_ascending() {
        // Two rows of three positions, two heads.
        let chosen = [true, false, true, true, true, false, true, true, true, false, true, false];
        let selected = SelectedRows::new(&chosen, [2, 3, 2]);
        assert_eq!(selected.of_head(0), [0, 1, 2, 3, 4, 5]);
        assert_eq!(selected.of_head(1), [1, 3]);
        assert_eq!(selected.of_head_within(1, 2..6), [3]);
        assert_eq!((selected.count(), selected.complete_heads()), (8, 1));
        let blocks = |row, head| -> Vec<Vec<usize>> {
            selected.blocks(row, head, 2).map(|block| block.queries().collect()).collect()
        };
        assert_eq!(blocks(1, 0), [vec![0, 1], vec![2]]);
        assert_eq!(blocks(1, 1), [vec![0]]);
        let hidden: Vec<bool> = selected.hidden(&Device::flex()).into_data().iter::<bool>().collect();
        assert_eq!(hidden, [[false; 3], [true, false, true], [false; 3], [false, true, true]].concat());
    }
}
