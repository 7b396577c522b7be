//! Templates with swapped attributes: how much more a model prefers one of two options where the text has one attribute rather than the
//! other, as probes of subtle bias ask.
//!
//! ```text
//! preference_i = log p(option 0 | template with attribute i) - log p(option 1 | template with attribute i)
//! difference   = preference_0 - preference_1                                 0 where the attribute does not matter
//! ```
//! Whatever makes one option likelier by itself is the same for both attributes, and cancels. The mean over templates comes with the
//! percentile interval of a bootstrap over them (Efron 1979).

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Resamples of a bootstrap; as scipy's, 9999 and the sample.
const RESAMPLES: usize = 10_000;
/// How sure the interval is to cover the mean.
const CONFIDENCE: f64 = 0.95;

/// The logarithm of an option's probability behind a text, and its tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptionScore {
    /// Nats, summed over its tokens.
    pub log_probability: f64,
    /// How many there are.
    pub tokens: usize,
}

/// The scores of a template, by attribute and option.
pub type TemplateScores = [[OptionScore; 2]; 2];

/// By how much the preference for option 0 is larger with attribute 0, in nats; or of options by their means over tokens, so that the
/// longer one does not decide.
pub fn difference(scores: &TemplateScores, per_token: bool) -> f64 {
    let of = |score: &OptionScore| match per_token {
        true => score.log_probability / score.tokens.max(1) as f64,
        false => score.log_probability,
    };
    let [first, second] = scores.each_ref().map(|[a, b]| of(a) - of(b));
    first - second
}

/// A mean with its interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MeanInterval {
    /// The mean.
    pub mean: f64,
    /// The ends of the interval of 95 %.
    pub interval: [f64; 2],
}

impl MeanInterval {
    /// Of these values; `None` where there are fewer than two.
    pub fn of(values: &[f64], seed: u64) -> Option<Self> {
        let n = values.len();
        if n < 2 {
            return None;
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut resample = || (0..n).map(|_| values[rng.random_range(0..n)]).sum::<f64>() / n as f64;
        let mut means: Vec<f64> = (0..RESAMPLES).map(|_| resample()).collect();
        means.sort_by(f64::total_cmp);
        let tail = (1.0 - CONFIDENCE) / 2.0;
        let interval = [tail, 1.0 - tail].map(|share| quantile(&means, share));
        Some(Self { mean: values.iter().sum::<f64>() / n as f64, interval })
    }
}

/// Between sorted values, linearly.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_options_have_by_themselves_cancels() {
        let score = |log_probability, tokens| OptionScore { log_probability, tokens };
        let scores = [[score(-2.0, 1), score(-6.0, 2)], [score(-3.0, 1), score(-5.0, 2)]];
        assert_eq!((difference(&scores, false), difference(&scores, true)), (2.0, 1.5));
        let [[a, b], _] = scores;
        assert_eq!(difference(&[[a, b], [a, b]], false), 0.0);
        let [one, other] = scores;
        assert_eq!(difference(&[other, one], false), -2.0, "attributes exchanged");
    }

    #[test]
    fn an_interval_takes_two_values_and_depends_on_the_seed_alone() {
        assert_eq!(MeanInterval::of(&[1.0], 0), None);
        let same = MeanInterval { mean: 3.0, interval: [3.0, 3.0] };
        assert_eq!(MeanInterval::of(&[3.0; 5], 0), Some(same));
        let values: Vec<f64> = (0..20).map(|at| f64::from(at * at % 17) / 3.0).collect();
        assert_eq!(MeanInterval::of(&values, 7), MeanInterval::of(&values, 7));
        assert_ne!(MeanInterval::of(&values, 7), MeanInterval::of(&values, 8));
    }
}
