//! Attention masks as descriptions.
//!
//! A mask is a description so that no `[queries, keys]` matrix need exist and whole blocks can be skipped. This file
//! is the only one that turns a description into numbers. One convention everywhere, Burn's: `true` means hidden.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

use crate::BlockMask;
use crate::shapes::spreads;

/// A description of what is hidden from whom; the parts add up (a key is hidden if any part hides it).
#[derive(Debug, Clone, Default)]
pub struct Mask {
    causal: bool,
    /// A query sees only keys that are fewer than so many positions away.
    window: Option<usize>,
    lengths: Option<Arc<[usize]>>,
    documents: Option<Arc<[u32]>>,
    /// Per token, the end of what it may see; and how many tokens a row has.
    turn_ends: Option<(Arc<[u32]>, usize)>,
    blocks: Option<Arc<BlockMask>>,
    dense: Option<Tensor<4, Bool>>,
    // Layers of one forward pass ask for the same numbers; they are made once.
    made: Arc<OnceLock<(Shape, Option<Tensor<4, Bool>>)>>,
    ranges: Arc<OnceLock<(Shape, Arc<Visible>)>>,
}

/// A mask as the tiled kernel reads it: for every query the first and last key that it may see.
#[derive(Debug)]
pub(crate) struct Visible {
    queries: usize,
    /// `[batch or 1, queries]`: where the visible keys begin and end.
    ranges: Vec<[u32; 2]>,
    /// Whether all rows of the batch share their ranges.
    shared: bool,
    /// Documents in pieces: what else is hidden inside a range. The number of keys and the offset of queries.
    pieces: Option<(Arc<[u32]>, usize, usize)>,
    /// Blocks: what else is hidden inside a range, head by head. The offset of queries.
    blocks: Option<(Arc<BlockMask>, usize)>,
}

impl Visible {
    /// The keys between the first and the last visible one; empty where nothing is visible.
    pub(crate) fn range(&self, batch: usize, query: usize) -> Range<usize> {
        let row = if self.shared { 0 } else { batch };
        let [from, to] = self.ranges[row * self.queries + query];
        from as usize..to as usize
    }

    /// Whether more is hidden than what is outside of the ranges.
    pub(crate) fn in_pieces(&self) -> bool {
        self.pieces.is_some() || self.blocks.is_some()
    }

    /// The queries of a head that are computed together, `size` at most: neighbours that blocks give the same keys, or a few blocks.
    pub(crate) fn cuts(&self, of: [usize; 2], size: usize) -> Vec<Range<usize>> {
        /// Fewer queries than these are no work for a product; chosen by us.
        const FEW: usize = 32;
        let Some((blocks, offset)) = &self.blocks else {
            return (0..self.queries).step_by(size).map(|from| from..(from + size).min(self.queries)).collect();
        };
        let (mut cuts, mut from) = (Vec::new(), 0);
        while from < self.queries {
            let mut to = from;
            while to < self.queries && to - from < FEW {
                to = (blocks.block_end(of, offset + to) - offset).min(self.queries);
            }
            to = to.min(from + size);
            cuts.push(from..to);
            from = to;
        }
        cuts
    }

    /// The keys in `reach` that any of these queries of a head sees, in spans with few others.
    pub(crate) fn spans(
        &self,
        of: [usize; 2],
        queries: impl Iterator<Item = usize>,
        reach: Range<usize>,
    ) -> Vec<Range<usize>> {
        match &self.blocks {
            Some((blocks, offset)) => blocks.spans(of, queries.map(|query| offset + query), reach),
            None => vec![reach],
        }
    }

    /// From the first to the last key that any of `queries` sees in any row of the batch; one key where nobody sees any.
    pub(crate) fn span(&self, queries: Range<usize>) -> Range<usize> {
        let seen = self.rows(queries).filter(|[from, to]| from < to);
        let [from, to] = seen.reduce(|[a, b], [from, to]| [a.min(from), b.max(to)]).unwrap_or([0, 1]);
        from as usize..to as usize
    }

    /// `[batch or 1, queries, 2]`: the ranges of `queries`, counted from the start of `span`; `None` if all are the span.
    pub(crate) fn within(&self, queries: Range<usize>, span: &Range<usize>) -> Option<Vec<i32>> {
        let whole = [span.start as u32, span.end as u32];
        if self.rows(queries.clone()).all(|range| range == whole) {
            return None;
        }
        let inside =
            |[from, to]: [u32; 2]| if from < to { [from, to].map(|key| (key - whole[0]) as i32) } else { [0, 0] };
        Some(self.rows(queries).flat_map(inside).collect())
    }

    /// For every row of the batch that has ranges of its own: the span of each tile of queries, then the range of each query.
    #[cfg(feature = "gpu")]
    pub(crate) fn in_tiles(&self, tile: usize) -> impl Iterator<Item = i32> {
        let spans = |ranges: &[[u32; 2]]| {
            let seen = ranges.iter().copied().filter(|[from, to]| from < to);
            seen.reduce(|[a, b], [from, to]| [a.min(from), b.max(to)]).unwrap_or([0, 0])
        };
        let rows = self.ranges.chunks(self.queries.max(1));
        rows.flat_map(move |row| row.chunks(tile).map(spans).chain(row.iter().copied())).flatten().map(|key| key as i32)
    }

    /// Numbers of [`Self::in_tiles`] from one row of the batch to the next; 0 where all share them.
    #[cfg(feature = "gpu")]
    pub(crate) fn plan_row(&self, tile: usize) -> usize {
        if self.shared { 0 } else { 2 * (self.queries.div_ceil(tile) + self.queries) }
    }

    fn rows(&self, queries: Range<usize>) -> impl Iterator<Item = [u32; 2]> {
        self.ranges.chunks(self.queries.max(1)).flat_map(move |row| &row[queries.clone()]).copied()
    }

    /// Writes `value` over a head's scores of hidden keys inside `keys`, a part of the query's range.
    pub(crate) fn hide_inside(
        &self,
        [batch, head]: [usize; 2],
        query: usize,
        keys: Range<usize>,
        scores: &mut [f32],
        value: f32,
    ) {
        if let Some((blocks, offset)) = &self.blocks {
            blocks.hide([batch, head], offset + query, keys.clone(), scores, value);
        }
        let Some((documents, all, offset)) = &self.pieces else { return };
        let of = |key: usize| documents[batch * all + key];
        let own = of(offset + query);
        for (score, key) in scores.iter_mut().zip(keys) {
            if of(key) != own {
                *score = value;
            }
        }
    }
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

    /// A query sees only keys that are fewer than `window` positions away. With causality these are `window` keys, its own
    /// included (Mistral, arXiv 2310.06825; flash kernels count one more); without, as many again behind it.
    ///
    /// # Panics
    /// If the window is 0, in which nobody sees anything.
    pub fn with_window(self, window: usize) -> Self {
        assert!(window > 0, "mask: a window of 0 keys leaves nothing to see");
        Self { window: Some(self.window.map_or(window, |own| own.min(window))), ..self }.afresh()
    }

    /// Whether it says that queries see the keys of their own document up to their own position, and nothing else.
    pub fn is_causal_in_documents(&self) -> bool {
        let Self { causal, window, lengths, turn_ends, blocks, dense, .. } = self;
        let more = window.is_some() || lengths.is_some() || turn_ends.is_some();
        *causal && !more && blocks.is_none() && dense.is_none()
    }

    /// The documents of each row of `keys` tokens, one after the other: whole rows where there are none; `None` where a document is
    /// interrupted by another.
    pub fn texts(&self, batch: usize, keys: usize) -> Option<Vec<Vec<Range<usize>>>> {
        let Some(documents) = &self.documents else { return Some(vec![std::iter::once(0..keys).collect(); batch]) };
        let of_row = |ids: &[u32]| {
            let texts = ids.chunk_by(|a, b| a == b).scan(0, |from, text| {
                let range = *from..*from + text.len();
                *from = range.end;
                Some(range)
            });
            (!Spans::of(ids).in_pieces).then(|| texts.collect())
        };
        documents.chunks(keys.max(1)).map(of_row).collect()
    }

    /// Its window, where it has one.
    pub(crate) fn window(&self) -> Option<usize> {
        self.window
    }

    /// Row `b` of the batch has `lengths[b]` keys; those behind are padding and hidden.
    pub fn with_lengths(self, lengths: &[usize]) -> Self {
        Self { lengths: Some(lengths.into()), ..self }.afresh()
    }

    /// `documents[b * keys + j]` is the document of key `j` in row `b`; a query sees only keys of its own document.
    pub fn with_documents(self, documents: &[u32]) -> Self {
        Self { documents: Some(documents.into()), ..self }.afresh()
    }

    /// The last resort: `hidden`, `[batch or 1, heads or 1, queries, keys]`, true where hidden.
    pub fn with_dense(self, hidden: Tensor<4, Bool>) -> Self {
        Self { dense: Some(hidden), ..self }.afresh()
    }

    /// A query sees only keys that its block sees.
    ///
    /// # Panics
    /// If there are blocks already.
    pub fn with_blocks(self, blocks: impl Into<Arc<BlockMask>>) -> Self {
        assert!(self.blocks.is_none(), "mask: there are blocks already");
        Self { blocks: Some(blocks.into()), ..self }.afresh()
    }

    /// The same with blocks in the place of causality: they say what a query sees of later keys.
    ///
    /// # Panics
    /// If there are blocks already.
    pub fn ordered_by(&self, blocks: impl Into<Arc<BlockMask>>) -> Self {
        Self { causal: false, ..self.clone() }.with_blocks(blocks)
    }

    /// Turns of a conversation (FocuSFT's mask): everybody sees all earlier turns; inside a turn of context everybody
    /// sees everybody, inside a turn of the assistant a query sees the keys up to its own position.
    ///
    /// `assistant[b * seq + j]` says whose token `j` of row `b` is; a turn ends where that changes. Takes the place of
    /// causality; documents and lengths add to it.
    ///
    /// # Panics
    /// If there are not whole rows of `seq` tokens.
    pub fn turns(assistant: &[bool], seq: usize) -> Self {
        assert!(assistant.len().is_multiple_of(seq), "mask: {} tokens are no rows of {seq}", assistant.len());
        let mut ends = Vec::with_capacity(assistant.len());
        for row in assistant.chunks(seq.max(1)) {
            for (index, &own) in row.iter().enumerate() {
                let turn = row[index..].iter().take_while(|&&other| other == own).count();
                ends.push((index + if own { 1 } else { turn }) as u32);
            }
        }
        Self { turn_ends: Some((ends.into(), seq)), ..Self::default() }
    }

    fn afresh(self) -> Self {
        Self { made: Arc::default(), ranges: Arc::default(), ..self }
    }

    /// Whether a query could be left without a single key to see.
    pub fn may_hide_whole_rows(&self) -> bool {
        self.lengths.is_some() || self.dense.is_some() || self.blocks.is_some()
    }

    /// The document of each key, row by row, where there are documents.
    pub fn documents(&self) -> Option<&[u32]> {
        self.documents.as_deref()
    }

    /// `[batch, queries]`, row by row: whether a query is no padding. `None` where none is.
    pub fn real_queries(&self, batch: usize, offset: usize, queries: usize) -> Option<Vec<bool>> {
        let lengths = self.lengths.as_ref()?;
        self.assert_lengths(batch);
        Some(lengths.iter().flat_map(|&length| (0..queries).map(move |query| offset + query < length)).collect())
    }

    /// The mask in numbers: `[batch or 1, heads or 1, queries, keys]`, true where hidden; `None` where nothing is.
    ///
    /// `offset` is the position of the first query among the keys (the number of cached keys while decoding).
    ///
    /// # Panics
    /// If lengths, document ids, turns or a dense mask were described for another batch or number of keys.
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

    /// The mask of some of the queries that this one was described for.
    pub(crate) fn of_queries(&self, queries: Range<usize>) -> Self {
        let dense = self.dense.clone().map(|dense| dense.narrow(2, queries.start, queries.len()));
        Self { dense, ..self.clone() }.afresh()
    }

    /// The mask as ranges of keys; `None` where only numbers can say it.
    pub(crate) fn visible(&self, batch: usize, offset: usize, queries: usize, keys: usize) -> Option<Arc<Visible>> {
        if self.dense.is_some() {
            return None;
        }
        let shape = Shape { batch, offset, queries, keys };
        let (made_for, made) = self.ranges.get_or_init(|| (shape, Arc::new(self.ranges_of(shape))));
        Some(if *made_for == shape { made.clone() } else { Arc::new(self.ranges_of(shape)) })
    }

    fn ranges_of(&self, shape: Shape) -> Visible {
        let Shape { batch, offset, queries, keys } = shape;
        self.check_rows(shape);
        let shared = self.lengths.is_none() && self.documents.is_none() && self.turn_ends.is_none();
        let mut ranges = Vec::with_capacity(if shared { queries } else { batch * queries });
        let mut in_pieces = false;
        for row in 0..if shared { 1 } else { batch } {
            let documents = self.documents.as_ref().map(|ids| Spans::of(&ids[row * keys..(row + 1) * keys]));
            in_pieces |= documents.as_ref().is_some_and(|spans| spans.in_pieces);
            let length = self.lengths.as_ref().map_or(keys, |lengths| lengths[row].min(keys));
            for query in 0..queries {
                let own = offset + query;
                let mut to = if self.causal { (own + 1).min(length) } else { length };
                if let Some((ends, _)) = &self.turn_ends {
                    to = to.min(ends[row * keys + own] as usize);
                }
                let mut from = 0;
                if let Some(spans) = &documents {
                    let [first, end] = spans.of_key[own];
                    (from, to) = (first as usize, to.min(end as usize));
                }
                if let Some(window) = self.window {
                    (from, to) = (from.max((own + 1).saturating_sub(window)), to.min(own.saturating_add(window)));
                }
                ranges.push(if from < to { [from as u32, to as u32] } else { [0, 0] });
            }
        }
        let pieces = self.documents.clone().filter(|_| in_pieces).map(|documents| (documents, keys, offset));
        let blocks = self.blocks.clone().map(|blocks| (blocks, offset));
        Visible { queries, ranges, shared, pieces, blocks }
    }

    /// Panics if this mask was not described for queries of `[batch, heads, queries, keys]`.
    pub(crate) fn check(&self, [batch, heads, queries, keys]: [usize; 4], offset: usize) {
        self.check_rows(Shape { batch, offset, queries, keys });
        if let Some(dense) = &self.dense {
            let (sizes, full) = (dense.dims(), [batch, heads, queries, keys]);
            assert!(
                spreads(sizes, full),
                "mask: a dense mask must be [batch or 1, heads or 1, queries, keys]; dense {sizes:?}, [batch, heads, queries, keys] {full:?}"
            );
        }
        if let Some(blocks) = &self.blocks {
            let [rows, shared, positions, seen] = blocks.dims();
            let fits = spreads([rows, shared, 1, seen], [batch, heads, 1, keys]) && offset + queries <= positions;
            assert!(
                fits,
                "mask: a block mask of [batch or 1, heads or 1, positions, keys] {:?} for [batch, heads, queries, keys] \
                 {:?} behind {offset} keys",
                blocks.dims(),
                [batch, heads, queries, keys]
            );
        }
    }

    fn check_rows(&self, Shape { batch, offset, queries, keys }: Shape) {
        self.assert_lengths(batch);
        if let Some(documents) = &self.documents {
            let found = documents.len();
            assert!(
                found == batch * keys,
                "mask: one document id per key; documents [{found}], batch {batch}, keys {keys}"
            );
        }
        if let Some((ends, seq)) = &self.turn_ends {
            let found = [ends.len() / seq.max(&1), *seq];
            assert!(found == [batch, keys], "mask: one turn per key; turns {found:?}, batch {batch}, keys {keys}");
        }
        // Each query is looked up among the keys.
        let inside = (self.documents.is_none() && self.turn_ends.is_none()) || offset + queries <= keys;
        assert!(
            inside,
            "mask: documents and turns need every query among the keys; query_offset {offset}, queries {queries}, keys {keys}"
        );
    }

    fn assert_lengths(&self, batch: usize) {
        if let Some(lengths) = &self.lengths {
            let found = lengths.len();
            assert!(found == batch, "mask: one length per row of the batch; lengths [{found}], batch {batch}");
        }
    }

    fn spell_out(&self, shape: Shape, device: &Device) -> Option<Tensor<4, Bool>> {
        let Shape { batch, offset, queries, keys } = shape;
        self.check_rows(shape);
        let mut parts: Vec<Tensor<4, Bool>> = Vec::new();
        // A single query at the end of the keys sees all of them.
        if self.causal && offset + 1 < keys {
            parts.push(Tensor::<2, Bool>::tril_mask([queries, keys], offset as i64, device).unsqueeze::<4>());
        }
        // True above a diagonal, counted from the key at the position of the query.
        let above = |diagonal: i64| {
            Tensor::<2, Bool>::tril_mask([queries, keys], offset as i64 + diagonal, device).unsqueeze::<4>()
        };
        if let Some(window) = self.window.filter(|&window| window < offset + queries) {
            parts.push(above(-(window as i64)).bool_not());
        }
        if let Some(window) = self.window.filter(|&window| !self.causal && offset.saturating_add(window) < keys) {
            parts.push(above(window as i64 - 1));
        }
        let key_index = || Tensor::<1, Int>::arange(0..keys as i64, device).reshape([1, 1, 1, keys]);
        if let Some(lengths) = &self.lengths {
            let lengths: Vec<i32> = lengths.iter().map(|&n| n as i32).collect();
            let lengths = Tensor::<1, Int>::from_data(TensorData::new(lengths, [batch]), device);
            let rows = key_index()
                .expand([batch, 1, 1, keys])
                .greater_equal(lengths.reshape([batch, 1, 1, 1]).expand([batch, 1, 1, keys]));
            parts.push(rows.expand([batch, 1, queries, keys]));
        }
        if let Some(documents) = &self.documents {
            let ids: Vec<i32> = documents.iter().map(|&id| id as i32).collect();
            let ids =
                Tensor::<1, Int>::from_data(TensorData::new(ids, [batch * keys]), device).reshape([batch, 1, 1, keys]);
            let of_queries = ids.clone().narrow(3, offset, queries).swap_dims(2, 3);
            let full = [batch, 1, queries, keys];
            parts.push(of_queries.expand(full).not_equal(ids.expand(full)));
        }
        if let Some((ends, _)) = &self.turn_ends {
            let ends: Vec<i32> = ends.iter().map(|&end| end as i32).collect();
            let ends =
                Tensor::<1, Int>::from_data(TensorData::new(ends, [batch * keys]), device).reshape([batch, 1, keys, 1]);
            let full = [batch, 1, queries, keys];
            parts.push(key_index().expand(full).greater_equal(ends.narrow(2, offset, queries).expand(full)));
        }
        parts.extend(self.blocks.iter().map(|blocks| blocks.hidden(offset..offset + queries, device)));
        parts.extend(self.dense.clone());
        let [_, heads] = parts.iter().map(|part| part.dims()).fold([1, 1], |[b, h], d| [b.max(d[0]), h.max(d[1])]);
        let rows = parts.iter().map(|part| part.dims()[0]).max().unwrap_or(1);
        parts.into_iter().map(|part| part.expand([rows, heads, queries, keys])).reduce(|a, b| a.bool_or(b))
    }
}

/// The documents of a row.
struct Spans {
    /// For every key: the first key of its document, and the one behind the last.
    of_key: Vec<[u32; 2]>,
    /// Whether a document is interrupted by another.
    in_pieces: bool,
}

impl Spans {
    fn of(documents: &[u32]) -> Self {
        let mut spans: std::collections::HashMap<u32, [u32; 2]> = std::collections::HashMap::new();
        let mut pieces = 0;
        for (key, id) in documents.iter().enumerate() {
            pieces += usize::from(key == 0 || documents[key - 1] != *id);
            let key = key as u32;
            spans.entry(*id).and_modify(|span| span[1] = key + 1).or_insert([key, key + 1]);
        }
        let in_pieces = pieces > spans.len();
        Self { of_key: documents.iter().map(|id| spans[id]).collect(), in_pieces }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the ranges say, in the same picture as the numbers.
    fn from_ranges(mask: &Mask, batch: usize, offset: usize, queries: usize, keys: usize) -> Vec<String> {
        let visible = mask.visible(batch, offset, queries, keys).expect("not dense");
        let line = |b: usize, i: usize| {
            let range = visible.range(b, i);
            let mut scores = vec![0.0; range.len()];
            visible.hide_inside([b, 0], i, range.clone(), &mut scores, f32::NEG_INFINITY);
            let seen = |key: usize| range.contains(&key) && scores[key - range.start] == 0.0;
            (0..keys).map(|key| if seen(key) { '.' } else { '#' }).collect()
        };
        (0..batch).flat_map(|b| (0..queries).map(move |i| (b, i))).map(|(b, i)| line(b, i)).collect()
    }

    #[test]
    fn ranges_say_the_same_as_numbers() {
        let ids = [0, 0, 1, 1, 2, 0, 0, 1, 0, 1];
        let turns = [false, false, true, true, false, true, false, false, false, true];
        for mask in [
            Mask::causal(),
            Mask::causal().with_lengths(&[2, 4]),
            Mask::none().with_lengths(&[0, 5]),
            Mask::causal().with_documents(&ids),
            Mask::none().with_documents(&ids).with_lengths(&[3, 5]),
            Mask::turns(&turns, 5),
            Mask::turns(&turns, 5).with_documents(&ids),
            Mask::causal().with_window(1),
            Mask::causal().with_window(3).with_window(4),
            Mask::causal().with_window(9),
            Mask::none().with_window(2),
            Mask::none().with_window(2).with_lengths(&[2, 4]),
            Mask::causal().with_window(2).with_documents(&ids),
            Mask::turns(&turns, 5).with_window(2),
            Mask::causal().with_documents(&ids).with_blocks(BlockMask::of_blocks(
                &[true, false, true, false, true, true],
                [1, 1],
                [5, 5],
                [2, 3],
            )),
        ] {
            for (offset, queries) in [(0, 5), (2, 3), (4, 1)] {
                let spelt = match mask.hidden(2, offset, queries, 5, &Device::flex()) {
                    Some(hidden) => {
                        let full = hidden.expand([2, 1, queries, 5]).into_data();
                        let bits: Vec<bool> = full.iter::<bool>().collect();
                        bits.chunks(5).map(|row| row.iter().map(|&h| if h { '#' } else { '.' }).collect()).collect()
                    }
                    None => vec![".....".to_owned(); 2 * queries],
                };
                assert_eq!(from_ranges(&mask, 2, offset, queries, 5), spelt, "{mask:?}");
            }
        }
    }

    #[test]
    fn turns_follow_the_definition() {
        // Context, context, assistant, assistant, context.
        let mask = Mask::turns(&[false, false, true, true, false], 5);
        assert_eq!(rows(&mask, 1, 0, 5, 5), ["..###", "..###", "...##", "....#", "....."]);
    }

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
    fn texts_are_documents_in_one_piece() {
        // As rows and where their texts end.
        let ends = |mask: Mask| -> Option<Vec<Vec<usize>>> {
            let of_row = |row: Vec<Range<usize>>| row.into_iter().map(|text| text.end).collect();
            mask.texts(2, 4).map(|rows| rows.into_iter().map(of_row).collect())
        };
        assert_eq!(ends(Mask::causal()), Some(vec![vec![4], vec![4]]));
        let documents = |ids: [u32; 8]| ends(Mask::causal().with_documents(&ids));
        assert_eq!(documents([7, 7, 7, 2, 1, 1, 1, 1]), Some(vec![vec![3, 4], vec![4]]));
        assert_eq!(documents([7, 7, 7, 7, 1, 2, 1, 1]), None);
    }

    #[test]
    fn windows_count_the_query_itself() {
        let causal = Mask::causal().with_window(2);
        assert_eq!(rows(&causal, 1, 0, 4, 4), [".###", "..##", "#..#", "##.."]);
        assert_eq!(rows(&causal, 1, 2, 2, 4), ["#..#", "##.."]);
        assert_eq!(rows(&Mask::none().with_window(2), 1, 0, 4, 4), ["..##", "...#", "#...", "##.."]);
    }

    #[test]
    fn another_shape_is_made_afresh() {
        let mask = Mask::causal();
        assert_eq!(rows(&mask, 1, 0, 2, 2), [".#", ".."]);
        assert_eq!(rows(&mask, 1, 1, 2, 3), ["..#", "..."]);
    }
}
