//! Rows of tokens cut from a stream of documents.

use std::ops::Range;
use std::sync::Arc;

use polyhead_models::IGNORE;

use super::tokens::TokenFile;
use crate::DataError;
use crate::batches::{Sample, Samples};
use crate::options::Packing;
use crate::random::mix;

/// Rows of `seq_len` tokens, cut one after the other from the concatenated ranges.
pub struct Windows {
    files: Vec<Arc<TokenFile>>,
    // The number of the file, and the tokens of it.
    ranges: Vec<(u16, Range<u64>)>,
    // What the files are called, where each is a source of a mixture.
    names: Arc<[String]>,
    // Where each range starts in the stream; the stream's length last.
    starts: Vec<u64>,
    seq_len: u64,
    packing: Packing,
    seed: Option<u64>,
}

/// A part of the stream.
#[derive(Default)]
struct Part {
    ids: Vec<u32>,
    /// Whether a document starts at the token.
    fresh: Vec<bool>,
    /// The number of the token's file.
    sources: Vec<u16>,
}

impl Windows {
    /// With a seed, the first cut differs between epochs, so that rows do; without, it is at the first token.
    ///
    /// # Errors
    /// If `seq_len` is 0, or there is too little text for one row.
    pub fn new(
        file: Arc<TokenFile>,
        ranges: Vec<Range<u64>>,
        seq_len: usize,
        packing: Packing,
        seed: Option<u64>,
    ) -> Result<Self, DataError> {
        let ranges = ranges.into_iter().map(|range| (0, range)).collect();
        Self::of_mixture(vec![file], ranges, Arc::default(), (seq_len, packing, seed))
    }

    /// The same for ranges of several files, each with the number of its file; `names` are those of the sources that the files are.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of_mixture(
        files: Vec<Arc<TokenFile>>,
        ranges: Vec<(u16, Range<u64>)>,
        names: Arc<[String]>,
        (seq_len, packing, seed): (usize, Packing, Option<u64>),
    ) -> Result<Self, DataError> {
        if seq_len == 0 {
            return Err(unusable!("training.seq_len (0) must be at least 1"));
        }
        let mut starts = vec![0];
        for (_, range) in &ranges {
            starts.push(starts[starts.len() - 1] + range.end - range.start);
        }
        let total = starts[starts.len() - 1];
        if total < seq_len as u64 + 1 {
            return Err(unusable!(
                "a side of the split has {total} tokens, but a row takes training.seq_len + 1 = {}: give more text, a \
                 smaller seq_len or another validation.fraction",
                seq_len + 1
            ));
        }
        Ok(Self { files, ranges, names, starts, seq_len: seq_len as u64, packing, seed })
    }

    fn total(&self) -> u64 {
        self.starts[self.starts.len() - 1]
    }

    /// Tokens of each of `count` files.
    pub fn tokens_by_source(&self, count: usize) -> Vec<u64> {
        let mut tokens = vec![0; count];
        self.ranges.iter().for_each(|(file, range)| tokens[usize::from(*file)] += range.end - range.start);
        tokens
    }

    /// Reads a part of the stream.
    fn read(&self, part: Range<u64>) -> Result<Part, DataError> {
        let Part { mut ids, mut fresh, mut sources } = Part::default();
        let mut index = self.starts.partition_point(|&start| start <= part.start) - 1;
        let mut at = part.start;
        while at < part.end {
            let skipped = at - self.starts[index];
            let length = (self.starts[index + 1] - at).min(part.end - at);
            let (source, range) = &self.ranges[index];
            let (file, first) = (&self.files[usize::from(*source)], range.start + skipped);
            file.read(first..first + length, &mut ids)?;
            // The first token of a range starts a document even where the split has cut one in two.
            let starts = |token: u64| token == range.start || file.starts_document(token);
            fresh.extend((first..first + length).map(starts));
            sources.resize(ids.len(), *source);
            at += length;
            index += 1;
        }
        Ok(Part { ids, fresh, sources })
    }
}

impl Samples for Windows {
    fn per_epoch(&self) -> u64 {
        // One row less when cuts move, so that every offset fits.
        let movable = if self.seed.is_some() { self.seq_len - 1 } else { 0 };
        ((self.total() - 1).saturating_sub(movable) / self.seq_len).max(1)
    }

    fn sample(&self, epoch: u64, index: u64) -> Result<Sample, DataError> {
        let room = self.total() - 1 - self.per_epoch() * self.seq_len;
        let offset = self.seed.map_or(0, |seed| mix(seed, epoch) % self.seq_len.min(room + 1));
        let start = offset + index * self.seq_len;
        let Part { ids, fresh, sources } = self.read(start..start + self.seq_len + 1)?;
        let length = self.seq_len as usize;
        let mut targets: Vec<i64> = ids[1..].iter().map(|&id| i64::from(id)).collect();
        let documents = (self.packing == Packing::Documents).then(|| {
            for (target, fresh) in targets.iter_mut().zip(&fresh[1..]) {
                if *fresh {
                    *target = IGNORE;
                }
            }
            let count = |document: &mut u32, fresh: &bool| {
                *document += u32::from(*fresh);
                Some(*document)
            };
            fresh[..length].iter().scan(0, count).collect()
        });
        let sources = (!self.names.is_empty()).then(|| sources[1..].to_vec());
        Ok(Sample { tokens: ids[..length].to_vec(), targets, documents, sources, ..Sample::default() })
    }

    fn sources(&self) -> Arc<[String]> {
        self.names.clone()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]
    use super::*;
    use crate::Tokenizer;
    use crate::texts::{Documents, TextDocument};

    fn file(texts: &[&str]) -> Arc<TokenFile> {
        let dir = tempfile::tempdir().unwrap();
        let documents: Vec<_> =
            texts.iter().map(|&text| TextDocument { name: String::new(), text: text.into() }).collect();
        let documents = Documents::described("texts", documents);
        TokenFile::open_or_build(&documents, &Tokenizer::bytes(), dir.path(), &mut |_, _| {}).unwrap().file
    }

    #[test]
    fn rows_follow_each_other_and_targets_are_one_ahead() {
        let file = file(&["abcdefghi"]); // 10 tokens with the end
        let windows = Windows::new(file, vec![0..10], 4, Packing::Stream, None).unwrap();
        assert_eq!(windows.per_epoch(), 2);
        let row = windows.sample(0, 1).unwrap();
        assert_eq!(row.tokens, [101, 102, 103, 104]);
        assert_eq!(row.targets, [102, 103, 104, 105]);
    }

    #[test]
    fn cuts_move_between_epochs_and_always_fit() {
        let text = "abcdefghijklmnopqrstuvwxyz".repeat(3);
        let file = file(&[&text]);
        let windows = Windows::new(file, vec![0..79], 8, Packing::Stream, Some(3)).unwrap();
        let firsts: std::collections::BTreeSet<u32> =
            (0..40).map(|epoch| windows.sample(epoch, 0).unwrap().tokens[0]).collect();
        assert!(firsts.len() > 4);
        for epoch in 0..40 {
            assert_eq!(windows.sample(epoch, windows.per_epoch() - 1).unwrap().tokens.len(), 8);
        }
    }

    #[test]
    fn packed_documents_neither_see_nor_predict_each_other() {
        let file = file(&["ab", "cd", "efgh"]); // a b . c d . e f g h .
        let windows = Windows::new(file, vec![0..3, 6..11], 6, Packing::Documents, None).unwrap();
        let row = windows.sample(0, 0).unwrap();
        assert_eq!(row.tokens, [97, 98, 256, 101, 102, 103]);
        assert_eq!(row.targets, [98, 256, IGNORE, 102, 103, 104]);
        assert_eq!(row.documents.unwrap(), [1, 1, 1, 2, 2, 2]);
    }

    #[test]
    fn too_little_text_says_how_much_is_needed() {
        let error = Windows::new(file(&["abc"]), vec![0..4], 8, Packing::Stream, None).err().unwrap().to_string();
        assert!(error.contains("4 tokens") && error.contains('9'), "{error}");
        let error = Windows::new(file(&["abc"]), vec![0..4], 0, Packing::Stream, None).err().unwrap().to_string();
        assert!(error.contains("seq_len"), "{error}");
    }
}
