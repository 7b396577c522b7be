//! Samples into batches. A batch is a pure function of its position, so a run resumes from a number.

use std::error::Error;
use std::sync::Arc;

use burn_dataset::Dataset;
use polyhead_models::{Batch, IGNORE};

use crate::DataError;
use crate::order::{mix, permute};

/// One row of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Token ids, as many as the sequence is long.
    pub tokens: Vec<u32>,
    /// The id to be predicted at each position, or [`IGNORE`].
    pub targets: Vec<i64>,
    /// Which document each token belongs to, where rows hold several.
    pub documents: Option<Vec<u32>>,
}

/// A set of samples, possibly another one in every epoch.
pub trait Samples: Send + Sync {
    /// Samples of an epoch.
    fn per_epoch(&self) -> u64;

    /// Sample `index` of epoch `epoch`.
    ///
    /// # Errors
    /// If it cannot be read.
    fn sample(&self, epoch: u64, index: u64) -> Result<Sample, DataError>;
}

/// Any Burn dataset of samples, the same in every epoch.
pub struct FromDataset<E>(pub Arc<dyn Dataset<Sample, E>>);

impl<E: Error + Send + Sync + 'static> Samples for FromDataset<E> {
    fn per_epoch(&self) -> u64 {
        self.0.len() as u64
    }

    fn sample(&self, _epoch: u64, index: u64) -> Result<Sample, DataError> {
        self.0.get(index as usize).map_err(|cause| DataError::Unusable(cause.to_string()))
    }
}

/// How samples become batches.
#[derive(Debug, Clone, Copy)]
pub struct LoaderOptions {
    /// Rows of a batch.
    pub batch_size: usize,
    /// Decides the order.
    pub seed: u64,
    /// Another order in every epoch; otherwise samples come as they are.
    pub shuffle: bool,
}

/// Batches by position.
#[derive(Clone)]
pub struct Loader {
    samples: Arc<dyn Samples>,
    token_bytes: Option<Arc<[u32]>>,
    options: LoaderOptions,
}

impl Loader {
    /// A loader over `samples`; `token_bytes` says how many bytes of text each id stands for, where the data is text.
    pub fn new(samples: Arc<dyn Samples>, token_bytes: Option<Vec<u32>>, options: LoaderOptions) -> Self {
        Self { samples, token_bytes: token_bytes.map(Into::into), options }
    }

    /// Batches until every sample has come once.
    pub fn batches_per_epoch(&self) -> u64 {
        self.samples.per_epoch().div_ceil(self.options.batch_size as u64)
    }

    /// Batch number `position` since the start: row `r` is sample `position * batch_size + r`, counted through all
    /// epochs, so no sample is left out at an epoch's end.
    ///
    /// # Errors
    /// If a sample cannot be read.
    pub fn batch(&self, position: u64) -> Result<Batch, DataError> {
        let rows = self.options.batch_size as u64;
        let mut batch = Batch { batch: rows as usize, ..Batch::default() };
        for number in position * rows..(position + 1) * rows {
            let row = self.sample(number)?;
            batch.seq = row.tokens.len();
            batch.tokens.extend(row.tokens);
            batch.targets.extend(row.targets);
            if let Some(documents) = row.documents {
                batch.documents.get_or_insert_default().extend(documents);
            }
        }
        if let Some(bytes) = &self.token_bytes {
            let of = |&target: &i64| if target == IGNORE { 0 } else { u64::from(bytes[target as usize]) };
            batch.target_bytes = batch.targets.iter().map(of).sum();
        }
        Ok(batch)
    }

    fn sample(&self, number: u64) -> Result<Sample, DataError> {
        let n = self.samples.per_epoch();
        let (epoch, index) = (number / n, number % n);
        let index = if self.options.shuffle { permute(n, mix(self.options.seed, epoch), index) } else { index };
        self.samples.sample(epoch, index)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use burn_dataset::InMemDataset;

    fn loader(n: u32, batch_size: usize, shuffle: bool) -> Loader {
        let sample = |i| Sample { tokens: vec![i], targets: vec![i64::from(i)], documents: None };
        let set: Arc<dyn Dataset<Sample>> = Arc::new(InMemDataset::new((0..n).map(sample).collect()));
        Loader::new(Arc::new(FromDataset(set)), Some(vec![1; 100]), LoaderOptions { batch_size, seed: 5, shuffle })
    }

    #[test]
    fn an_epoch_holds_every_sample_once_even_across_batches() {
        let loader = loader(10, 4, true);
        let tokens: Vec<u32> = (0..5).flat_map(|p| loader.batch(p).unwrap().tokens).collect();
        for epoch in tokens.chunks(10) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(tokens[..10], tokens[10..]);
    }

    #[test]
    fn a_batch_depends_on_its_position_only() {
        let (a, b) = (loader(10, 4, true), loader(10, 4, true));
        let late = a.batch(7).unwrap();
        assert_eq!(late, b.batch(7).unwrap());
        assert_eq!(late.target_bytes, 4);
        assert_eq!(loader(10, 4, false).batch(0).unwrap().tokens, [0, 1, 2, 3]);
    }
}
