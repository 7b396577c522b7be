//! Draws: the same for the same seed, kind and case, on any machine.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Where the draws of one case come from.
#[derive(Clone)]
pub struct Random(ChaCha8Rng);

impl Random {
    /// A stream of its own for each case of each kind.
    pub fn new(seed: u64, kind: &str, case: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let kind = kind.bytes().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        rng.set_stream(kind.wrapping_mul(1 << 40).wrapping_add(case));
        Self(rng)
    }

    /// 0 to `n - 1`; 0 where `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n.max(1) as u64) as usize
    }

    /// 0 to 1.
    pub fn share(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of them. There is at least one.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        self.below(256) as u8
    }
}
