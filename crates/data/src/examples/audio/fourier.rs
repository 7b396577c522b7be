//! The discrete Fourier transform of real samples, whose number is a power of two (Cooley and Tukey 1965).
//!
//! Our own, because the crates for it switch on features of `num-complex` for which the kernels of Burn are compiled once more.

/// A transform of one length.
#[derive(Clone)]
pub(super) struct Fourier {
    /// `[n / 2]`: cosine and sine of -2π k / n.
    turns: Vec<[f32; 2]>,
}

impl Fourier {
    /// Of `n` samples, a power of two from 2 on.
    pub(super) fn new(n: usize) -> Self {
        let turn = |k: usize| {
            let (sin, cos) = (-std::f64::consts::TAU * k as f64 / n as f64).sin_cos();
            [cos as f32, sin as f32]
        };
        Self { turns: (0..n / 2).map(turn).collect() }
    }

    /// The energies of the frequencies from 0 to half the sample rate, `[n / 2 + 1]`.
    pub(super) fn energies(&self, samples: &[f32]) -> Vec<f32> {
        let n = 2 * self.turns.len();
        let bits = n.trailing_zeros();
        let mut values = vec![[0f32; 2]; n];
        for (at, &sample) in samples.iter().enumerate() {
            values[at.reverse_bits() >> (usize::BITS - bits)] = [sample, 0.0];
        }
        let mut half = 1;
        while half < n {
            for block in values.chunks_mut(2 * half) {
                let (even, odd) = block.split_at_mut(half);
                for (k, (a, b)) in even.iter_mut().zip(odd).enumerate() {
                    let [cos, sin] = self.turns[k * (n / 2 / half)];
                    let turned = [b[0] * cos - b[1] * sin, b[0] * sin + b[1] * cos];
                    *b = [a[0] - turned[0], a[1] - turned[1]];
                    *a = [a[0] + turned[0], a[1] + turned[1]];
                }
            }
            half *= 2;
        }
        values[..n / 2 + 1].iter().map(|[re, im]| re * re + im * im).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn energies_are_those_of_the_definition() {
        for n in [2usize, 8, 64] {
            let samples: Vec<f32> = (0..n).map(|i| (i as f32 * 1.7).sin() + 0.3 * (i % 3) as f32).collect();
            let got = Fourier::new(n).energies(&samples);
            assert_eq!(got.len(), n / 2 + 1);
            for (k, &got) in got.iter().enumerate() {
                let part = |wave: fn(f64) -> f64| -> f64 {
                    let angle = |i: usize| std::f64::consts::TAU * (i * k) as f64 / n as f64;
                    samples.iter().enumerate().map(|(i, &sample)| f64::from(sample) * wave(angle(i))).sum()
                };
                let want = part(f64::cos).powi(2) + part(f64::sin).powi(2);
                assert!((f64::from(got) - want).abs() < 1e-4 * (1.0 + want), "{n} {k}: {got} {want}");
            }
        }
    }
}
