//! Random tensors: their numbers are a function of a seed, and of nothing else.
//!
//! Burn's generators belong to the process, so that threads that draw take numbers from each other, and they differ
//! between backends. The stream here belongs to the thread and is drawn on the host: a seed means the same model on a CPU
//! and on a GPU, whatever else goes on beside it.

use std::cell::{Cell, RefCell};

use burn::tensor::{Device, Distribution, Tensor, TensorData};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;

thread_local! {
    static STREAM: RefCell<ChaCha12Rng> = RefCell::new(ChaCha12Rng::seed_from_u64(0));
    static DRAWS: Cell<bool> = const { Cell::new(true) };
}

/// What this thread draws from now on follows from `seed`. A thread that never called it draws as if `seed` were 0.
pub fn seed_random(seed: u64) {
    STREAM.set(ChaCha12Rng::seed_from_u64(seed));
}

/// The next numbers of this thread's stream, on `device` and of its float type.
pub fn random<const D: usize>(shape: [usize; D], distribution: Distribution, device: &Device) -> Tensor<D> {
    if !DRAWS.get() {
        return Tensor::<D>::zeros([1; D], device).expand(shape);
    }
    let data = STREAM.with_borrow_mut(|stream| TensorData::random::<f32, _, _>(shape, distribution, stream));
    Tensor::from_data(data, device)
}

/// What `make` makes, with zeros for all random numbers and without moving the stream: for weights that are about to be
/// replaced by those of a file. Such zeros take neither time nor memory: all of a tensor are one.
pub fn without_drawing<T>(make: impl FnOnce() -> T) -> T {
    let _back = Back(DRAWS.replace(false));
    return make();

    /// Puts the setting back, after a panic too.
    struct Back(bool);
    impl Drop for Back {
        fn drop(&mut self) {
            DRAWS.set(self.0);
        }
    }
}

/// The place in this thread's stream.
#[derive(Debug, Clone)]
pub struct RandomState(ChaCha12Rng);

impl RandomState {
    /// The place where the stream is now.
    pub fn now() -> Self {
        Self(STREAM.with_borrow(Clone::clone))
    }

    /// What `run` gives when it draws from this place on; the stream goes on as if it had not run.
    pub fn replay<T>(&self, run: impl FnOnce() -> T) -> T {
        let now = STREAM.replace(self.0.clone());
        let result = run();
        STREAM.set(now);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::numbers;

    fn normal() -> Vec<f32> {
        numbers(random([2, 3], Distribution::Normal(0.0, 1.0), &Device::flex()))
    }

    #[test]
    fn a_stream_is_a_function_of_its_seed_whatever_other_threads_draw() {
        let drawn = || {
            seed_random(5);
            (0..200).map(|_| normal()).collect::<Vec<_>>()
        };
        let alone = drawn();
        assert_ne!(alone[0], alone[1]);
        std::thread::scope(|scope| {
            let beside: Vec<_> = (0..4).map(|_| scope.spawn(drawn)).collect();
            beside.into_iter().for_each(|thread| assert_eq!(thread.join().expect("a thread that draws"), alone));
        });
        seed_random(6);
        assert_ne!(normal(), alone[0]);
    }

    #[test]
    fn zeros_and_replays_leave_the_stream_where_it_is() {
        seed_random(5);
        let (state, first) = (RandomState::now(), normal());
        assert_eq!(without_drawing(normal), [0.0; 6]);
        assert_eq!(state.replay(normal), first);
        let second = normal();
        seed_random(5);
        assert_eq!([normal(), normal()], [first, second]);
    }

    /// The same on every machine and in every version: a seed that a paper names must mean the same model for ever.
    #[test]
    fn seed_0_begins_with_these_numbers() {
        assert_eq!(normal(), [0.712813, 0.85833144, -2.4362438, 0.16334426, -1.2750102, 1.287171]);
    }
}
