//! The loss of a model over a set of batches.

use std::ops::Range;

use burn::module::Module;
use polyhead_models::{Batch, Decoder, Evaluated};

use crate::TrainError;

/// Where batches come from: a pure function of their position.
pub trait Batches {
    /// Batch number `position`.
    ///
    /// # Errors
    /// If the data cannot be read.
    fn batch(&self, position: u64) -> Result<Batch, TrainError>;

    /// Batches until everything has been seen once.
    fn per_epoch(&self) -> u64;
}

/// How many batches an evaluation takes of those that there are: `limit`, or all for 0.
pub(crate) fn count(data: &dyn Batches, limit: u64) -> u64 {
    let all = data.per_epoch().max(1);
    if limit == 0 { all } else { limit.min(all) }
}

/// Sums over the first `limit` batches (0: one epoch), on the inner device, where no tape grows.
///
/// # Errors
/// If the data cannot be read.
pub fn evaluate(model: &Decoder, data: &dyn Batches, limit: u64) -> Result<Evaluated, TrainError> {
    evaluate_range(model, data, 0..count(data, limit))
}

/// Sums over the batches at these positions.
///
/// # Errors
/// If the data cannot be read.
pub fn evaluate_range(model: &Decoder, data: &dyn Batches, positions: Range<u64>) -> Result<Evaluated, TrainError> {
    let model = model.valid();
    let mut sums = Evaluated::default();
    for position in positions {
        sums.add(model.evaluate(&data.batch(position)?));
    }
    Ok(sums)
}
