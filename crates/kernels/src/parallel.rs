//! Work on the host that falls into parts which know nothing of each other.

use rayon::prelude::*;

/// What `part` gives for each of `0..count`, in order, on all threads of the pool.
pub fn in_parallel<T: Send>(count: usize, part: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
    (0..count).into_par_iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_in_order_on_any_number_of_threads() {
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            assert_eq!(pool.install(|| in_parallel(100, |at| at * at)), (0..100).map(|at| at * at).collect::<Vec<_>>());
        }
        assert!(in_parallel(0, |at| at).is_empty());
    }
}
