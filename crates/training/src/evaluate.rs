//! The loss of a model over a set of batches.

use std::ops::Range;

use polyhead_models::{Batch, EvalTotals, Trainable};

use crate::TrainError;
use crate::ranks::Ranks;

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

/// [`evaluate`] by all ranks together: in each round a batch on every rank, added up in the order of the data.
///
/// # Errors
/// If the data of any rank cannot be read.
pub(crate) fn evaluate_on_ranks<M: Trainable>(
    model: &M,
    data: &dyn Batches<M::Batch>,
    limit: u64,
    ranks: &Ranks<'_>,
) -> Result<M::Totals, TrainError> {
    let (model, count) = (model.valid(), count(data, limit));
    let mut sums = M::Totals::default();
    for round in (0..count).step_by(ranks.size()) {
        let position = round + ranks.rank() as u64;
        let batch = ranks.agree((position < count).then(|| data.batch(position)).transpose())?;
        let totals = ranks.share(batch.map(|batch| model.totals(&batch)));
        totals.into_iter().flatten().for_each(|totals| sums.add(totals));
    }
    Ok(sums)
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
