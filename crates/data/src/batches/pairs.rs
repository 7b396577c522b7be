//! Batches of pairs, for embedders.

use std::sync::Arc;

use polyhead_models::Pairs;

use super::{LoaderOptions, Samples, Stream};
use crate::DataError;

/// Batches of pairs by position.
#[derive(Clone)]
pub struct PairLoader {
    stream: Stream<Vec<f32>>,
    shape: [usize; 3],
}

impl PairLoader {
    /// A loader over features of `shape`, `[parts, layers, dim]`.
    pub(crate) fn new(pairs: Arc<dyn Samples<Vec<f32>>>, shape: [usize; 3], options: LoaderOptions) -> Self {
        Self { stream: Stream { samples: pairs, options }, shape }
    }

    /// Batches until every pair has come once.
    pub fn batches_per_epoch(&self) -> u64 {
        self.stream.batches_per_epoch()
    }

    /// `[parts, layers, dim]`
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Batch number `position` since the start; where pairs come as they are, the last batch of an epoch is as short as what is
    /// left.
    ///
    /// # Errors
    /// If the file is shorter by now.
    pub fn batch(&self, position: u64) -> Result<Pairs, DataError> {
        let [parts, layers, dim] = self.shape;
        Ok(Pairs { values: self.stream.batch(position)?.concat(), parts, layers, dim })
    }
}

/// Pairs, ready to use.
pub struct Paired {
    /// Batches to train on, without end.
    pub train: PairLoader,
    /// Batches to validate on.
    pub validation: PairLoader,
    /// What the data is, in words.
    pub description: String,
    /// A hash of what was read.
    pub text_hash: String,
}
