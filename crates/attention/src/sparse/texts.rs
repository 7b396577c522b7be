//! Texts that follow one another in packed rows: what is read of each is chosen as if it were a row of its own.

use std::ops::Range;

use burn::tensor::Tensor;
use polyhead_kernels::{BlockMask, Mask};

/// Where the texts of a batch are.
#[derive(Debug, Clone)]
pub(super) struct Texts {
    batch: usize,
    /// Rows of the batch and tokens: all rows together where each is a single text, else text after text, row after row.
    places: Vec<[Range<usize>; 2]>,
}

impl Texts {
    /// Each row a text.
    pub(super) fn whole(batch: usize, seq: usize) -> Self {
        Self { batch, places: vec![[0..batch, 0..seq]] }
    }

    /// The documents of a mask; `None` where one is in pieces.
    pub(super) fn of(mask: &Mask, batch: usize, seq: usize) -> Option<Self> {
        let rows = mask.texts(batch, seq)?;
        if rows.iter().all(|texts| texts.len() == 1) {
            return Some(Self::whole(batch, seq));
        }
        let row = |(row, texts): (usize, Vec<Range<usize>>)| texts.into_iter().map(move |text| [row..row + 1, text]);
        Some(Self { batch, places: rows.into_iter().enumerate().flat_map(row).collect() })
    }

    /// Rows of the batch and tokens of each text, or of all rows together.
    pub(super) fn places(&self) -> impl Iterator<Item = &[Range<usize>; 2]> {
        self.places.iter()
    }

    /// `[rows, heads, tokens, width]` of each place, of `[batch, heads, seq, width]`.
    pub(super) fn parts<const N: usize>(&self, of: [&Tensor<4>; N]) -> impl Iterator<Item = [Tensor<4>; N]> {
        let whole = self.places.len() == 1;
        self.places.iter().map(move |[rows, tokens]| {
            of.map(|x| match whole {
                true => x.clone(),
                false => x.clone().slice([rows.clone(), 0..x.dims()[1], tokens.clone(), 0..x.dims()[3]]),
            })
        })
    }

    /// `[batch, heads, seq, width]`: the parts in their places.
    pub(super) fn joined(&self, parts: impl Iterator<Item = Tensor<4>>) -> Tensor<4> {
        let rows = self.in_rows(parts).into_iter().map(|texts| Tensor::cat(texts, 2));
        Tensor::cat(rows.collect(), 0)
    }

    /// The mask of rows whose texts have these.
    pub(super) fn joined_masks(&self, mut parts: impl Iterator<Item = BlockMask>) -> BlockMask {
        match self.places.len() {
            1 => parts.next().expect("a mask of each place"),
            _ => BlockMask::of_texts(self.in_rows(parts)),
        }
    }

    /// What belongs to places, row by row; one row where the rows are together.
    fn in_rows<T>(&self, parts: impl Iterator<Item = T>) -> Vec<Vec<T>> {
        let mut rows: Vec<Vec<T>> =
            (0..if self.places.len() == 1 { 1 } else { self.batch }).map(|_| Vec::new()).collect();
        self.places.iter().zip(parts).for_each(|([row, _], part)| rows[row.start].push(part));
        rows
    }
}
