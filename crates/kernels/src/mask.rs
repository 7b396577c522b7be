//! Which keys a query may see: described, not spelled out.
//!
//! A mask is a description so that no `[queries, keys]` matrix need exist and whole blocks can be skipped. This file
//! is the only one that turns a description into numbers. One convention everywhere, Burn's: `true` means hidden.

use std::sync::{Arc, OnceLock};

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

/// A description of what is hidden from whom; the parts add up (a key is hidden if any part hides it).
#[derive(Debug, Clone, Default)]
pub struct Mask {
    causal: bool,
    lengths: Option<Arc<[usize]>>,
    documents: Option<Arc<[u32]>>,
    dense: Option<Tensor<4, Bool>>,
    // Layers of one forward pass ask for the same numbers; they are made once.
    made: Arc<OnceLock<(Shape, Option<Tensor<4, Bool>>)>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    batch: usize,
    offset: usize,
    queries: usize,
    keys: usize,
}

impl Mask {
    /// Everybody sees everything.
    pub fn none() -> Self {
        Self::default()
    }

    /// A query sees the keys up to its own position.
    pub fn causal() -> Self {
        Self { causal: true, ..Self::default() }
    }

    /// Row `b` of the batch has `lengths[b]` keys; those behind are padding and hidden.
    pub fn with_lengths(self, lengths: &[usize]) -> Self {
        Self { lengths: Some(lengths.into()), made: Arc::default(), ..self }
    }

    /// `documents[b * keys + j]` is the document of key `j` in row `b`; a query sees only keys of its own document.
    pub fn with_documents(self, documents: &[u32]) -> Self {
        Self { documents: Some(documents.into()), made: Arc::default(), ..self }
    }

    /// The last resort: `hidden`, `[batch or 1, heads or 1, queries, keys]`, true where hidden.
    pub fn with_dense(self, hidden: Tensor<4, Bool>) -> Self {
        Self { dense: Some(hidden), made: Arc::default(), ..self }
    }

    /// Whether a query could be left without a single key to see.
    pub fn may_hide_whole_rows(&self) -> bool {
        self.lengths.is_some() || self.dense.is_some()
    }

    /// The mask in numbers: `[batch or 1, heads or 1, queries, keys]`, true where hidden; `None` where nothing is.
    ///
    /// `offset` is the position of the first query among the keys (the number of cached keys while decoding).
    ///
    /// # Panics
    /// If lengths or document ids were described for another batch or number of keys.
    pub fn hidden(
        &self,
        batch: usize,
        offset: usize,
        queries: usize,
        keys: usize,
        device: &Device,
    ) -> Option<Tensor<4, Bool>> {
        let shape = Shape { batch, offset, queries, keys };
        let (made_for, made) = self.made.get_or_init(|| (shape, self.spell_out(shape, device)));
        if *made_for == shape { made.clone() } else { self.spell_out(shape, device) }
    }

    fn spell_out(&self, shape: Shape, device: &Device) -> Option<Tensor<4, Bool>> {
        let Shape { batch, offset, queries, keys } = shape;
        let mut parts: Vec<Tensor<4, Bool>> = Vec::new();
        // A single query at the end of the keys sees all of them.
        if self.causal && offset + 1 < keys {
            parts.push(Tensor::<2, Bool>::tril_mask([queries, keys], offset as i64, device).unsqueeze::<4>());
        }
        let key_index = || Tensor::<1, Int>::arange(0..keys as i64, device).reshape([1, 1, 1, keys]);
        if let Some(lengths) = &self.lengths {
            assert_eq!(lengths.len(), batch, "one length per row of the batch");
            let lengths: Vec<i32> = lengths.iter().map(|&n| n as i32).collect();
            let lengths = Tensor::<1, Int>::from_data(TensorData::new(lengths, [batch]), device);
            let rows = key_index()
                .expand([batch, 1, 1, keys])
                .greater_equal(lengths.reshape([batch, 1, 1, 1]).expand([batch, 1, 1, keys]));
            parts.push(rows.expand([batch, 1, queries, keys]));
        }
        if let Some(documents) = &self.documents {
            assert_eq!(documents.len(), batch * keys, "one document id per key");
            let ids: Vec<i32> = documents.iter().map(|&id| id as i32).collect();
            let ids =
                Tensor::<1, Int>::from_data(TensorData::new(ids, [batch * keys]), device).reshape([batch, 1, 1, keys]);
            let of_queries = ids.clone().narrow(3, offset, queries).swap_dims(2, 3);
            let full = [batch, 1, queries, keys];
            parts.push(of_queries.expand(full).not_equal(ids.expand(full)));
        }
        parts.extend(self.dense.clone());
        let [_, heads] = parts.iter().map(|part| part.dims()).fold([1, 1], |[b, h], d| [b.max(d[0]), h.max(d[1])]);
        let rows = parts.iter().map(|part| part.dims()[0]).max().unwrap_or(1);
        parts.into_iter().map(|part| part.expand([rows, heads, queries, keys])).reduce(|a, b| a.bool_or(b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(mask: &Mask, batch: usize, offset: usize, queries: usize, keys: usize) -> Vec<String> {
        let hidden = mask.hidden(batch, offset, queries, keys, &Device::flex()).expect("hides something");
        let bits: Vec<bool> = hidden.into_data().iter::<bool>().collect();
        bits.chunks(keys).map(|row| row.iter().map(|&hidden| if hidden { '#' } else { '.' }).collect()).collect()
    }

    #[test]
    fn causal_counts_cached_keys() {
        assert_eq!(rows(&Mask::causal(), 1, 0, 3, 3), [".##", "..#", "..."]);
        assert_eq!(rows(&Mask::causal(), 1, 2, 2, 4), ["...#", "...."]);
        assert!(Mask::causal().hidden(1, 3, 1, 4, &Device::flex()).is_none());
    }

    #[test]
    fn documents_and_lengths_add_to_causality() {
        let documents = Mask::causal().with_documents(&[0, 0, 1, 1]);
        assert_eq!(rows(&documents, 1, 0, 4, 4), [".###", "..##", "##.#", "##.."]);
        let lengths = Mask::none().with_lengths(&[1, 3]);
        assert_eq!(rows(&lengths, 2, 0, 2, 3), [".##", ".##", "...", "..."]);
    }

    #[test]
    fn another_shape_is_made_afresh() {
        let mask = Mask::causal();
        assert_eq!(rows(&mask, 1, 0, 2, 2), [".#", ".."]);
        assert_eq!(rows(&mask, 1, 1, 2, 3), ["..#", "..."]);
    }
}
