//! Work on the host that falls into parts which know nothing of each other.

use burn::tensor::Device;
use rayon::prelude::*;

use crate::cpu;

/// What `part` gives for each of `0..count`, in order, on all threads of the pool.
pub fn in_parallel<T: Send>(count: usize, part: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
    (0..count).into_par_iter().map(part).collect()
}

/// What `run` gives, run on a thread of the pool where `device` is the CPU: the many small operations inside of it begin where they
/// are called, and are not handed from a thread to the pool and back one by one. It must not wait for another thread that
/// uses the pool.
pub fn on_the_pool<T: Send>(device: &Device, run: impl FnOnce() -> T + Send) -> T {
    if cpu::is_flex(device) { rayon::scope(|_| run()) } else { run() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_the_cpu_work_runs_on_a_thread_of_the_pool() {
        assert!(rayon::current_thread_index().is_none(), "a test has a thread of its own");
        assert!(on_the_pool(&Device::flex(), rayon::current_thread_index).is_some());
    }

    #[test]
    fn parts_come_in_order_on_any_number_of_threads() {
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            assert_eq!(pool.install(|| in_parallel(100, |at| at * at)), (0..100).map(|at| at * at).collect::<Vec<_>>());
        }
        assert!(in_parallel(0, |at| at).is_empty());
    }
}
