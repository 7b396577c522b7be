//! What a run is asked for from outside while it works, and how what takes long hears of it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::TrainError;
use crate::evaluate::Batches;

/// What is asked of a run: by signals, or by keys of a dashboard.
#[derive(Debug, Default)]
pub struct Requests {
    /// Not 0 once the run is to be saved and left: the number of the signal.
    pub stop: AtomicUsize,
    /// Whether the run is to be saved, and to go on.
    pub save: AtomicBool,
}

impl Requests {
    /// Whether anything is asked for.
    pub fn any(&self) -> bool {
        self.stop.load(Ordering::SeqCst) != 0 || self.save.load(Ordering::SeqCst)
    }

    /// What is asked for: the signal to leave with, and whether to save. To be saved is asked for once.
    pub(super) fn take(&self) -> (usize, bool) {
        (self.stop.load(Ordering::SeqCst), self.save.swap(false, Ordering::SeqCst))
    }
}

/// Batches of what takes long and can be put off: none comes once something is asked for.
pub(super) struct PuttingOff<'a, B> {
    pub batches: &'a dyn Batches<B>,
    pub requests: &'a Requests,
}

impl<B> Batches<B> for PuttingOff<'_, B> {
    fn batch(&self, position: u64) -> Result<B, TrainError> {
        match self.requests.any() {
            true => Err(TrainError::PutOff),
            false => self.batches.batch(position),
        }
    }

    fn per_epoch(&self) -> u64 {
        self.batches.per_epoch()
    }
}
