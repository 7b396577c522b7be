//! Samples into batches. A batch is a pure function of its position, so a run resumes from a number.

mod examples;
mod images;
mod pairs;
mod rows;

use std::ops::Range;
use std::sync::Arc;

use crate::DataError;
use crate::options::OpenOptions;
use crate::random::{mix, permute};

pub(crate) use examples::{Content, Example};
pub use examples::{ExampleLoader, Labelled};
pub use images::{ImageLoader, ImageSet};
pub use pairs::{PairLoader, Paired};
pub(crate) use rows::first_rows;
pub use rows::{Loader, Opened, Sample};

/// A set of samples, possibly another one in every epoch.
pub trait Samples<T = Sample>: Send + Sync {
    /// Samples of an epoch.
    fn per_epoch(&self) -> u64;

    /// Sample `index` of epoch `epoch`.
    ///
    /// # Errors
    /// If it cannot be read.
    fn sample(&self, epoch: u64, index: u64) -> Result<T, DataError>;

    /// Its parts, one behind the other: a name and how many samples. Batches of [`Order::Parts`] and [`Order::Once`] end where a
    /// part does.
    fn parts(&self) -> Vec<(String, u64)> {
        vec![(String::new(), self.per_epoch())]
    }

    /// What the sources of a mixture are called; empty where samples are of none.
    fn sources(&self) -> Arc<[String]> {
        Arc::default()
    }
}

/// How samples become batches.
#[derive(Debug, Clone, Copy)]
pub struct LoaderOptions {
    /// Rows of a batch.
    pub batch_size: usize,
    /// Decides the order.
    pub seed: u64,
    /// In which order.
    pub order: Order,
}

/// The order of samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Another one in every epoch; epochs follow each other without a seam.
    Shuffled,
    /// As they come, epoch after epoch without a seam.
    Endless,
    /// As they come, epoch after epoch; the last batch of each part is as short as what is left of it.
    Parts,
    /// As they come, always the same; the last batch is as short as what is left, so that none counts twice.
    Once,
}

impl LoaderOptions {
    /// Batches of the size and the seed that data is opened with.
    pub(crate) fn of(options: &OpenOptions, order: Order) -> Self {
        Self { batch_size: options.batch_size, seed: options.seed, order }
    }

    /// Batches of each part.
    fn batches(&self, parts: &[(String, u64)]) -> Vec<u64> {
        parts.iter().map(|(_, samples)| samples.div_ceil(self.batch_size.max(1) as u64)).collect()
    }

    /// The numbers since the start of the rows of batch `position`, of a set of these parts.
    fn rows(&self, parts: &[(String, u64)], position: u64) -> Range<u64> {
        let rows = self.batch_size as u64;
        if matches!(self.order, Order::Shuffled | Order::Endless) {
            return position * rows..(position + 1) * rows;
        }
        let batches = self.batches(parts);
        let per_epoch = batches.iter().sum::<u64>().max(1);
        let (epoch, mut at) = (position / per_epoch, position % per_epoch);
        let mut first = match self.order {
            Order::Parts => epoch * parts.iter().map(|(_, samples)| samples).sum::<u64>(),
            _ => 0,
        };
        for ((_, samples), batches) in parts.iter().zip(batches) {
            if at < batches {
                return first + at * rows..first + ((at + 1) * rows).min(*samples);
            }
            (at, first) = (at - batches, first + samples);
        }
        first..first
    }

    /// Epoch and index of a sample, from its number since the start, of a set of `n`.
    fn place(&self, n: u64, number: u64) -> (u64, u64) {
        let (epoch, index) = (number / n, number % n);
        (epoch, if self.order == Order::Shuffled { permute(n, mix(self.seed, epoch), index) } else { index })
    }
}

/// Samples in the order of training, batch by batch.
#[derive(Clone)]
struct Stream<T> {
    samples: Arc<dyn Samples<T>>,
    options: LoaderOptions,
}

impl<T> Stream<T> {
    /// Batches until every sample has come once.
    fn batches_per_epoch(&self) -> u64 {
        self.options.batches(&self.samples.parts()).iter().sum()
    }

    /// The samples of batch `position` since the start, counted through all epochs, so that none is left out at an epoch's end.
    ///
    /// # Errors
    /// If a sample cannot be read, or there are none.
    fn batch(&self, position: u64) -> Result<Vec<T>, DataError> {
        let n = self.samples.per_epoch();
        if self.options.batch_size == 0 {
            return Err(unusable!("training.batch_size (0) must be at least 1"));
        }
        if n == 0 {
            return Err(unusable!("the data set is empty: give at least one sample"));
        }
        let sample = |number| {
            let (epoch, index) = self.options.place(n, number);
            self.samples.sample(epoch, index)
        };
        self.options.rows(&self.samples.parts(), position).map(sample).collect()
    }
}
