//! Ranks as processes of an MPI job.

use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::{Universe, initialize_with_threading, processor_name};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator as _, CommunicatorCollectives};

use super::Communicator;

/// Bytes that a rank sends at a time, to all others together: MPI counts them in 31 bits.
const PIECE: usize = 1 << 30;

/// Between two looks whether all ranks have come; chosen by us.
const LOOK: Duration = Duration::from_millis(5);

/// The job that this process is a rank of. Dropped, it leaves the job, once all ranks do.
pub struct Mpi {
    /// Of its own, because a rank may wait here while others are in the middle of something else. Before `universe`: it goes first.
    barriers: SimpleCommunicator,
    world: SimpleCommunicator,
    _universe: Universe,
}

impl Mpi {
    /// Joins the job; `None` where this process has done so before.
    pub fn join() -> Option<Self> {
        // One thread at a time talks to MPI, and any may end the job.
        let (universe, _) = initialize_with_threading(Threading::Serialized)?;
        let world = universe.world();
        Some(Self { barriers: world.duplicate(), world, _universe: universe })
    }
}

// SAFETY: what a communicator holds is a handle, which any thread may use under `Threading::Serialized`, one at a time: this is what
// `Communicator` asks of its callers.
unsafe impl Sync for Mpi {}

/// Ends the processes of all ranks; from any thread.
pub fn abort_job(code: i32) -> ! {
    SimpleCommunicator::world().abort(code)
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn host(&self) -> String {
        processor_name().unwrap_or_else(|_| "a machine whose name is not UTF-8".into())
    }

    fn exchange(&self, to_each: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let size = self.size();
        let sent: Vec<u64> = to_each.iter().map(|bytes| bytes.len() as u64).collect();
        let mut lengths = vec![0u64; size];
        self.world.all_to_all_into(&sent[..], &mut lengths[..]);
        let mut longest = vec![0u64; size];
        self.world.all_gather_into(&sent.into_iter().max().unwrap_or(0), &mut longest[..]);
        let longest = longest.into_iter().max().unwrap_or(0) as usize;
        let mut received: Vec<Vec<u8>> = lengths.iter().map(|length| Vec::with_capacity(*length as usize)).collect();
        let piece = PIECE / size;
        for start in (0..longest).step_by(piece) {
            let part = |length: usize| length.saturating_sub(start).min(piece);
            let parts: Vec<&[u8]> =
                to_each.iter().map(|bytes| &bytes[start.min(bytes.len())..][..part(bytes.len())]).collect();
            let (counts, starts) = layout(parts.iter().map(|part| part.len()));
            let (their_counts, their_starts) = layout(lengths.iter().map(|length| part(*length as usize)));
            let out = parts.concat();
            let mut into = buffer(&their_counts);
            self.world.all_to_all_varcount_into(
                &Partition::new(not_in_place(&out), counts, starts),
                &mut PartitionMut::new(&mut into[..], &their_counts[..], their_starts),
            );
            hand_out(&into, &their_counts, &mut received);
        }
        received
    }

    fn gather(&self, bytes: Vec<u8>) -> Vec<Vec<u8>> {
        let size = self.size();
        let mut lengths = vec![0u64; size];
        self.world.all_gather_into(&(bytes.len() as u64), &mut lengths[..]);
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut received: Vec<Vec<u8>> = lengths.iter().map(|length| Vec::with_capacity(*length as usize)).collect();
        let piece = PIECE / size;
        for start in (0..longest).step_by(piece) {
            let part = |length: usize| length.saturating_sub(start).min(piece);
            let (counts, starts) = layout(lengths.iter().map(|length| part(*length as usize)));
            let mut into = buffer(&counts);
            self.world.all_gather_varcount_into(
                not_in_place(&bytes[start.min(bytes.len())..][..part(bytes.len())]),
                &mut PartitionMut::new(&mut into[..], &counts[..], starts),
            );
            hand_out(&into, &counts, &mut received);
        }
        received
    }

    fn barrier(&self, patience: Option<Duration>) -> bool {
        let began = Instant::now();
        let mut waiting = self.barriers.immediate_barrier();
        loop {
            match waiting.test() {
                Ok(_) => return true,
                Err(still) if patience.is_some_and(|patience| began.elapsed() > patience) => {
                    std::mem::forget(still); // dropped, it would wait
                    return false;
                }
                Err(still) => waiting = still,
            }
            std::thread::sleep(LOOK);
        }
    }

    fn abort(&self, code: i32) {
        abort_job(code)
    }
}

/// How many bytes of each rank there are, one after the other, and where they start.
fn layout(counts: impl Iterator<Item = usize>) -> (Vec<i32>, Vec<i32>) {
    let counts: Vec<i32> = counts.map(|count| count as i32).collect();
    let starts = counts.iter().scan(0, |at, count| Some(std::mem::replace(at, *at + count))).collect();
    (counts, starts)
}

/// The address of an empty vector is 1, which in Open MPI is that of `MPI_IN_PLACE`.
fn not_in_place(bytes: &[u8]) -> &[u8] {
    static NOTHING: [u8; 1] = [0];
    if bytes.is_empty() { &NOTHING[..0] } else { bytes }
}

/// Room for so many bytes; never empty, as with [`not_in_place`].
fn buffer(counts: &[i32]) -> Vec<u8> {
    vec![0; counts.iter().sum::<i32>().max(1) as usize]
}

/// Adds to what each rank has sent so far.
fn hand_out(mut bytes: &[u8], counts: &[i32], received: &mut [Vec<u8>]) {
    for (count, of_rank) in counts.iter().zip(received) {
        let (part, rest) = bytes.split_at(*count as usize);
        of_rank.extend_from_slice(part);
        bytes = rest;
    }
}
