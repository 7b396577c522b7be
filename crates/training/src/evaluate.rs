//! The loss of a model over a set of batches.

use std::ops::Range;

use polyhead_models::{Batch, EvalTotals, Trainable};

use crate::TrainError;

/// Where batches come from: a pure function of their position.
pub trait Batches<B = Batch> {
    /// Batch number `position`.
    ///
    /// # Errors
    /// If the data cannot be read.
    fn batch(&self, position: u64) -> Result<B, TrainError>;

    /// Batches until everything has been seen once.
    fn per_epoch(&self) -> u64;
}

/// How many batches an evaluation takes of those that there are: `limit`, or all for 0.
pub(crate) fn count<B>(data: &dyn Batches<B>, limit: u64) -> u64 {
    let all = data.per_epoch().max(1);
    if limit == 0 { all } else { limit.min(all) }
}

/// EvalTotals over the first `limit` batches (0: one epoch), on the inner device, where no tape grows.
///
/// # Errors
/// If the data cannot be read.
pub fn evaluate<M: Trainable>(model: &M, data: &dyn Batches<M::Batch>, limit: u64) -> Result<M::Totals, TrainError> {
    evaluate_range(model, data, 0..count(data, limit))
}

/// EvalTotals over the batches at these positions.
///
/// # Errors
/// If the data cannot be read.
pub fn evaluate_range<M: Trainable>(
    model: &M,
    data: &dyn Batches<M::Batch>,
    positions: Range<u64>,
) -> Result<M::Totals, TrainError> {
    let model = model.valid();
    let mut sums = M::Totals::default();
    for position in positions {
        sums.add(model.totals(&data.batch(position)?));
    }
    Ok(sums)
}
