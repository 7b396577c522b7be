//! Randomness that never changes between versions: generators, draws, and a keyed permutation, by which a position alone says
//! which sample comes.

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A value-stable mix of two numbers (the finaliser of SplitMix64, Steele et al. 2014).
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(b).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Where `index` of `0..n` goes under the permutation that `key` chooses: a Feistel network of four rounds over the next
/// even number of bits, walked until it lands below `n`.
pub(crate) fn permute(n: u64, key: u64, index: u64) -> u64 {
    debug_assert!(index < n);
    let bits = (64 - n.saturating_sub(1).leading_zeros()).max(2);
    let half = bits.div_ceil(2);
    let low = (1u64 << half) - 1;
    let mut at = index;
    loop {
        let (mut left, mut right) = (at >> half, at & low);
        for round in 0..4 {
            (left, right) = (right, left ^ (mix(key ^ round, right) & low));
        }
        at = (left << half) | right;
        if at < n {
            return at;
        }
    }
}

/// The generator of sample number `stream` for `seed`.
pub fn generator(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng
}

/// `count` of these, in random order.
pub(crate) fn some<T: Copy>(all: &[T], count: usize, rng: &mut ChaCha8Rng) -> Vec<T> {
    let mut all = all.to_vec();
    all.shuffle(rng);
    all.truncate(count);
    all
}

/// A number from N(0, 1), by the method of Box and Muller (1958).
pub(crate) fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (a, b) = (1.0 - rng.random::<f32>(), rng.random::<f32>());
    (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_comes_once() {
        for n in 1..70 {
            let mut seen: Vec<u64> = (0..n).map(|i| permute(n, 7, i)).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn keys_give_different_orders() {
        let order = |key| (0..100).map(|i| permute(100, key, i)).collect::<Vec<_>>();
        assert_ne!(order(1), order(2));
        assert_ne!(order(1), (0..100).collect::<Vec<_>>());
        assert_eq!(order(3), order(3));
    }
}
