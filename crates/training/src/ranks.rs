//! The ranks of a run: processes that train one model together.
//!
//! All of them take the same steps in the same order, so that each call of [`Ranks`] is one on every rank. Pass `i` of a step is done by
//! rank `i mod size`, wherever the pass is; rank 0 alone writes files. What one of them meets (an error, a signal) is known to all before
//! any acts on it. How bytes go between them is a [`Communicator`]: none (one process), or MPI with the feature `mpi`.

use std::cell::Cell;
use std::fmt;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::config::{GradientReduction, OptimizerSharding, ParallelConfig, ParallelMode};

#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(test)]
pub(crate) mod threads;

/// How the ranks of a run reach each other. Every rank calls the same operations in the same order, from any of its threads, but one after
/// the other; what cannot be sent ends the job.
pub trait Communicator: Sync {
    /// The number of this rank, from 0.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// The machine that this rank runs on.
    fn host(&self) -> String;

    /// Sends each rank its bytes; gives what each rank sent to this one.
    fn exchange(&self, to_each: Vec<Vec<u8>>) -> Vec<Vec<u8>>;

    /// Sends all ranks the same; gives what each sent.
    fn gather(&self, bytes: Vec<u8>) -> Vec<Vec<u8>> {
        self.exchange(vec![bytes; self.size()])
    }

    /// Gives on every rank what `from` hands over.
    fn broadcast(&self, bytes: Vec<u8>, from: usize) -> Vec<u8> {
        self.gather(if self.rank() == from { bytes } else { Vec::new() }).swap_remove(from)
    }

    /// Waits until all ranks are here, whatever else some of them are in the middle of; at most for `patience`, where there is one.
    /// Whether they came.
    fn barrier(&self, patience: Option<Duration>) -> bool;

    /// Ends the processes of all ranks with an exit code.
    fn abort(&self, code: i32);
}

/// One process.
#[derive(Debug)]
struct Alone;

impl Communicator for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn host(&self) -> String {
        String::new()
    }

    fn exchange(&self, to_each: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        to_each
    }

    fn barrier(&self, _patience: Option<Duration>) -> bool {
        true
    }

    fn abort(&self, _code: i32) {}
}

/// The ranks of a run, and what is divided among them.
pub struct Ranks<'a> {
    communicator: &'a dyn Communicator,
    config: ParallelConfig,
    hosts: Vec<String>,
    waited: Cell<Duration>,
}

impl fmt::Debug for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {} ({:?})", self.rank(), self.size(), self.config)
    }
}

/// What a rank says about something that all ranks have done.
#[derive(Serialize, Deserialize)]
enum Said {
    Done,
    PutOff,
    Failed(String),
}

impl Ranks<'static> {
    /// One process.
    pub fn alone(config: ParallelConfig) -> Self {
        Ranks::new(&Alone, config)
    }
}

impl<'a> Ranks<'a> {
    /// All ranks that `communicator` reaches.
    pub fn new(communicator: &'a dyn Communicator, config: ParallelConfig) -> Self {
        let mut ranks = Self { communicator, config, hosts: Vec::new(), waited: Cell::default() };
        ranks.hosts = ranks.share(communicator.host());
        ranks
    }

    /// The number of this rank, from 0.
    pub fn rank(&self) -> usize {
        self.communicator.rank()
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.communicator.size()
    }

    /// Whether this is rank 0, which writes.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Whether the passes of a step are kept apart, in what they draw and in how their gradients are added up, so that nothing depends
    /// on how many ranks there are.
    pub(crate) fn divides_passes(&self) -> bool {
        self.config.mode == ParallelMode::Data
    }

    /// Which of a step's `passes`, counted from 0, are those of this rank.
    pub(crate) fn own(&self, passes: u64) -> impl Iterator<Item = u64> + use<> {
        (self.rank() as u64..passes).step_by(self.size())
    }

    /// Whether the gradients of every pass go to their owners by themselves.
    pub(crate) fn is_ordered(&self) -> bool {
        self.config.gradient_reduction == GradientReduction::Ordered
    }

    /// Whether gradients travel while the backward pass goes on.
    pub(crate) fn overlaps(&self) -> bool {
        self.config.overlap.unwrap_or(true)
    }

    /// Whether each rank keeps the optimizer's state of its own parameters alone.
    pub(crate) fn shards_optimizer(&self) -> bool {
        self.size() > 1 && self.config.optimizer_sharding == OptimizerSharding::Zero1
    }

    /// What every rank hands over, in their order.
    pub(crate) fn share<T: Serialize + DeserializeOwned>(&self, mine: T) -> Vec<T> {
        match self.size() {
            1 => vec![mine],
            _ => self.gather(encoded(&mine)).iter().map(|bytes| decoded(bytes)).collect(),
        }
    }

    /// What the ranks hand over about their passes or batches, in the order of the data.
    pub(crate) fn in_order<T: Serialize + DeserializeOwned>(&self, mine: Vec<T>) -> Vec<T> {
        let all = self.share(mine);
        let rounds = all.iter().map(Vec::len).max().unwrap_or(0);
        let (mut all, mut ordered) = (Vec::from_iter(all.into_iter().map(Vec::into_iter)), Vec::new());
        for _ in 0..rounds {
            ordered.extend(all.iter_mut().filter_map(Iterator::next));
        }
        ordered
    }

    /// What `make` gives on rank 0, where alone it is called.
    ///
    /// # Errors
    /// Its error, on every rank.
    pub fn from_first<T, E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<T, E>
    where
        T: Serialize + DeserializeOwned,
        E: From<TrainError> + fmt::Display,
    {
        let made = self.is_first().then(make);
        if self.size() == 1 {
            return made.expect("made on rank 0");
        }
        let told = made.as_ref().map(|made| encoded(&made.as_ref().map_err(ToString::to_string)));
        let bytes = self.timed(|communicator| communicator.broadcast(told.unwrap_or_default(), 0));
        made.unwrap_or_else(|| decoded::<Result<T, String>>(&bytes).map_err(|problem| self.failed(0, problem).into()))
    }

    /// What `run` gives on this rank, which runs it once rank 0 has: what that leaves in a cache need not be made again.
    ///
    /// # Errors
    /// Its own.
    pub fn first_before_others<T, E>(&self, run: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        if !self.is_first() {
            self.share(());
        }
        let result = run()?;
        if self.is_first() {
            self.share(());
        }
        Ok(result)
    }

    /// What rank 0 alone does; the others wait for it with nothing in their hands.
    ///
    /// # Errors
    /// As [`agree`](Self::agree).
    pub(crate) fn on_first<T: Default>(&self, run: impl FnOnce() -> Result<T, TrainError>) -> Result<T, TrainError> {
        self.agree(if self.is_first() { run() } else { Ok(T::default()) })
    }

    /// What this rank has, once every rank has its own.
    ///
    /// # Errors
    /// Where any rank failed: its own error, or else that of the first that failed.
    pub(crate) fn agree<T>(&self, mine: Result<T, TrainError>) -> Result<T, TrainError> {
        if self.size() == 1 {
            return mine;
        }
        let all = self.share(match &mine {
            Ok(_) => Said::Done,
            Err(TrainError::PutOff) => Said::PutOff,
            Err(error) => Said::Failed(error.to_string()),
        });
        let put_off = all.iter().any(|said| matches!(said, Said::PutOff));
        let failed = all.into_iter().enumerate().find_map(|(rank, said)| match said {
            Said::Failed(problem) => Some(self.failed(rank, problem)),
            Said::Done | Said::PutOff => None,
        });
        match (mine, failed) {
            (Ok(_) | Err(TrainError::PutOff), Some(failed)) => Err(failed),
            (Ok(_), None) if put_off => Err(TrainError::PutOff),
            (mine, _) => mine,
        }
    }

    /// Refuses to go on where `identity` is another one on another rank.
    pub(crate) fn check_same(&self, identity: String) -> Result<(), TrainError> {
        let all = self.share(identity);
        match all.iter().position(|other| *other != all[0]) {
            None => Ok(()),
            Some(rank) => Err(self.failed(
                rank,
                "its recipe, data or weights are not those of rank 0: all ranks need the same program and files".into(),
            )),
        }
    }

    fn failed(&self, rank: usize, problem: String) -> TrainError {
        TrainError::OtherRank { rank, host: self.hosts[rank].clone(), problem }
    }

    /// See [`Communicator::exchange`].
    pub(crate) fn exchange(&self, to_each: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        self.timed(|communicator| communicator.exchange(to_each))
    }

    /// See [`Communicator::gather`].
    pub(crate) fn gather(&self, bytes: Vec<u8>) -> Vec<Vec<u8>> {
        self.timed(|communicator| communicator.gather(bytes))
    }

    /// How the ranks reach each other, for a thread that talks to them alone.
    pub(crate) fn communicator(&self) -> &'a dyn Communicator {
        self.communicator
    }

    /// Time spent waiting for communication, and so for other ranks, since this was asked last; not what goes on meanwhile.
    pub(crate) fn take_waited(&self) -> Duration {
        self.waited.take()
    }

    /// Waits for communication.
    pub(crate) fn timed<T>(&self, communicate: impl FnOnce(&dyn Communicator) -> T) -> T {
        let _span = tracing::info_span!("communication").entered();
        let began = Instant::now();
        let result = communicate(self.communicator);
        self.waited.set(self.waited.get() + began.elapsed());
        result
    }
}

fn encoded(value: &impl Serialize) -> Vec<u8> {
    rmp_serde::to_vec(value).expect("numbers and texts can be written")
}

fn decoded<T: DeserializeOwned>(bytes: &[u8]) -> T {
    rmp_serde::from_slice(bytes).expect("what the same program has written")
}

#[cfg(test)]
mod tests;
