//! Ranks as threads of one process, for tests.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::{Communicator, Ranks};
use crate::config::ParallelConfig;

/// One of several threads; a channel from each to each.
struct Thread<'a> {
    rank: usize,
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Mutex<Receiver<Vec<u8>>>>,
    /// Bytes from any rank to another.
    sent: &'a AtomicU64,
}

impl Communicator for Thread<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn host(&self) -> String {
        format!("thread-{}", self.rank)
    }

    fn exchange(&self, to_each: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        assert_eq!(to_each.len(), self.size());
        let to_others = to_each.iter().enumerate().filter(|(to, _)| *to != self.rank);
        self.sent.fetch_add(to_others.map(|(_, bytes)| bytes.len() as u64).sum(), Ordering::Relaxed);
        self.to.iter().zip(to_each).for_each(|(to, bytes)| to.send(bytes).expect("the other rank lives"));
        let receive = |from: &Mutex<Receiver<_>>| from.try_lock().expect("one thread at a time").recv();
        self.from.iter().map(|from| receive(from).expect("the other rank lives")).collect()
    }

    fn barrier(&self, _patience: Option<Duration>) -> bool {
        self.gather(Vec::new());
        true
    }

    fn abort(&self, code: i32) {
        panic!("rank {} ends all with {code}", self.rank);
    }
}

/// What `run` gives on each of `size` ranks.
pub(crate) fn on_ranks<T: Send>(size: usize, config: ParallelConfig, run: impl Fn(&Ranks<'_>) -> T + Sync) -> Vec<T> {
    counted(size, config, run).0
}

/// The same, and how many bytes they have sent to each other.
pub(crate) fn counted<T: Send>(
    size: usize,
    config: ParallelConfig,
    run: impl Fn(&Ranks<'_>) -> T + Sync,
) -> (Vec<T>, u64) {
    let sent = AtomicU64::new(0);
    let thread = |rank| Thread { rank, to: Vec::new(), from: Vec::new(), sent: &sent };
    let mut threads: Vec<Thread<'_>> = (0..size).map(thread).collect();
    for from in 0..size {
        for to in 0..size {
            let (sender, receiver) = channel();
            threads[from].to.push(sender);
            threads[to].from.push(Mutex::new(receiver));
        }
    }
    let given = std::thread::scope(|scope| {
        let run = &run;
        let running: Vec<_> =
            threads.into_iter().map(|thread| scope.spawn(move || run(&Ranks::new(&thread, config)))).collect();
        running.into_iter().map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    (given, sent.into_inner())
}
