//! Means, spreads and intervals over seeds; tests that are corrected for their number, and how many seeds a test needs.

use serde::{Deserialize, Serialize};
use statrs::distribution::{ChiSquared, Continuous, ContinuousCDF, Normal, StudentsT};
use statrs::function::gamma::ln_gamma;

/// How sure an interval is to cover the mean, where its assumptions hold.
pub const CONFIDENCE: f64 = 0.95;
/// How likely a test should find a difference that is there; the usual choice (Cohen 1988).
pub const POWER: f64 = 0.8;
/// More seeds than anybody trains; chosen by us.
pub const MOST_SEEDS: usize = 10_000;

/// Facts about a few values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// How many values.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation, with n - 1 below; `None` for one value.
    pub deviation: Option<f64>,
    /// Half the width of the 95 % interval of the mean, by Student's t; `None` for one value.
    pub margin: Option<f64>,
}

impl Summary {
    /// Of these values; `None` where there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let deviation = (n > 1).then(|| {
            let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
            (squares / (n - 1) as f64).sqrt()
        });
        let margin = deviation.and_then(|deviation| {
            let t = StudentsT::new(0.0, 1.0, (n - 1) as f64).ok()?.inverse_cdf(0.5 + CONFIDENCE / 2.0);
            Some(t * deviation / (n as f64).sqrt())
        });
        Some(Self { n, mean, deviation, margin })
    }

    /// The interval's ends.
    pub fn interval(&self) -> Option<(f64, f64)> {
        self.margin.map(|margin| (self.mean - margin, self.mean + margin))
    }

    /// Whether the interval leaves 0 out; `None` where there is no interval.
    pub fn beyond_chance(&self) -> Option<bool> {
        self.interval().map(|(low, high)| low > 0.0 || high < 0.0)
    }

    /// How likely a mean as far from 0 would be if the true one were 0: the two-sided p of Student's t test. `None` for one
    /// value.
    pub fn p_value(&self) -> Option<f64> {
        let deviation = self.deviation?;
        if self.mean == 0.0 {
            return Some(1.0);
        }
        let t = self.mean.abs() / (deviation / (self.n as f64).sqrt());
        if t.is_infinite() {
            return Some(0.0);
        }
        Some(2.0 * StudentsT::new(0.0, 1.0, (self.n - 1) as f64).ok()?.sf(t))
    }

    /// How many values would show a mean of this size, at this deviation, with a chance of [`POWER`]; [`MOST_SEEDS`] for that
    /// many and more. `None` for one value, or a mean of 0.
    pub fn values_needed(&self) -> Option<usize> {
        let effect = self.mean.abs() / self.deviation?;
        if effect.is_nan() || effect == 0.0 {
            return None;
        }
        let enough = |n: usize| power(effect, n) >= POWER;
        let (mut low, mut high) = (1, MOST_SEEDS);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if enough(middle) { high = middle } else { low = middle }
        }
        Some(high)
    }
}

/// How far two independent samples are apart, in their common standard deviation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EffectSize {
    /// Cohen's d: the difference of the means over the pooled deviation.
    pub d: f64,
    /// The deviation of both samples together, each around its own mean.
    pub pooled_deviation: f64,
    /// What small samples make d too large by, exactly: J = Γ(f/2) / (sqrt(f/2) Γ((f-1)/2)) with f = n1 + n2 - 2 (Hedges 1981).
    pub correction: f64,
    /// The standard error of d.
    pub standard_error: f64,
}

impl EffectSize {
    /// Of `x` against `y`; `None` where one of them has fewer than two values, or none of them spreads by more than rounding.
    pub fn between(x: &[f64], y: &[f64]) -> Option<Self> {
        let (of_x, of_y) = (Summary::of(x)?, Summary::of(y)?);
        let (n, m) = (of_x.n as f64, of_y.n as f64);
        let freedom = n + m - 2.0;
        let squares = (n - 1.0) * of_x.deviation?.powi(2) + (m - 1.0) * of_y.deviation?.powi(2);
        let pooled_deviation = (squares / freedom).sqrt();
        let rounding = 1e-9 * of_x.mean.abs().max(of_y.mean.abs());
        if pooled_deviation <= rounding || !pooled_deviation.is_finite() {
            return None;
        }
        let d = (of_x.mean - of_y.mean) / pooled_deviation;
        let correction = (ln_gamma(freedom / 2.0) - ln_gamma((freedom - 1.0) / 2.0)).exp() / (freedom / 2.0).sqrt();
        let standard_error = ((n + m) / (n * m) + d * d / (2.0 * (n + m))).sqrt();
        Some(Self { d, pooled_deviation, correction, standard_error })
    }

    /// Hedges' g: d without what small samples add to it.
    pub fn g(&self) -> f64 {
        self.d * self.correction
    }
}

/// How likely a two-sided t test of `n` values finds a mean of `effect` standard deviations: the tails of the noncentral t
/// distribution, integrated over the deviation that the test would see.
fn power(effect: f64, n: usize) -> f64 {
    let freedom = (n - 1) as f64;
    let (Ok(t), Ok(squares), Ok(normal)) =
        (StudentsT::new(0.0, 1.0, freedom), ChiSquared::new(freedom), Normal::new(0.0, 1.0))
    else {
        return 0.0;
    };
    let (critical, shift) = (t.inverse_cdf(0.5 + CONFIDENCE / 2.0), effect * (n as f64).sqrt());
    if !shift.is_finite() {
        return 1.0;
    }
    let found = |seen: f64| normal.cdf(shift - critical * seen) + normal.cdf(-shift - critical * seen);
    // The seen deviation, as a share of the true one, is the root of a chi-squared number over its degrees of freedom.
    let density = |seen: f64| 2.0 * freedom * seen * squares.pdf(freedom * seen * seen);
    let reach = 8.0 / (2.0 * freedom).sqrt();
    let (low, high) = ((1.0 - reach).max(1e-9), 1.0 + reach);
    integral(low, high, |seen| found(seen) * density(seen))
}

/// Simpson's rule over 512 intervals.
fn integral(low: f64, high: f64, value: impl Fn(f64) -> f64) -> f64 {
    const INTERVALS: usize = 512;
    let step = (high - low) / INTERVALS as f64;
    let weight = |at: usize| match at {
        0 | INTERVALS => 1.0,
        at if at % 2 == 1 => 4.0,
        _ => 2.0,
    };
    (0..=INTERVALS).map(|at| weight(at) * value(low + step * at as f64)).sum::<f64>() * step / 3.0
}

/// The middle 95 % of resampled values; they are sorted. `None` where there are none.
pub fn percentile_interval(values: &mut [f64]) -> Option<[f64; 2]> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)? as f64;
    let tail = (1.0 - CONFIDENCE) / 2.0;
    Some([tail, 1.0 - tail].map(|share| values[(share * last).round() as usize]))
}

/// The p of several tests, corrected by Holm's method (1979): calling those below 5 % different is wrong about any of them in
/// at most 5 % of the cases, however many there are. In the order given.
pub fn holm(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_by(|&a, &b| p_values[a].total_cmp(&p_values[b]));
    let (mut corrected, mut largest) = (vec![0.0; p_values.len()], 0.0f64);
    for (rank, &at) in order.iter().enumerate() {
        largest = largest.max(((p_values.len() - rank) as f64 * p_values[at]).min(1.0));
        corrected[at] = largest;
    }
    corrected
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_interval_is_that_of_the_tables() {
        // t(0.975, 2) = 4.302653, t(0.975, 4) = 2.776445
        let summary = Summary::of(&[1.0, 2.0, 3.0]).unwrap();
        assert_eq!((summary.n, summary.mean, summary.deviation), (3, 2.0, Some(1.0)));
        assert!((summary.margin.unwrap() - 4.302653 / 3f64.sqrt()).abs() < 1e-5, "{summary:?}");
        let summary = Summary::of(&[0.1, 0.3, 0.2, 0.4, 0.5]).unwrap();
        let expected = 2.776445 * 0.025f64.sqrt() / 5f64.sqrt();
        assert!((summary.margin.unwrap() - expected).abs() < 1e-6, "{summary:?}");
        assert_eq!(summary.beyond_chance(), Some(true));
    }

    #[test]
    fn one_value_has_no_interval_and_none_no_summary() {
        let one = Summary::of(&[3.0]).unwrap();
        assert_eq!((one.deviation, one.margin, one.beyond_chance()), (None, None, None));
        assert!(Summary::of(&[]).is_none());
        assert_eq!(Summary::of(&[-1.0, 1.0]).unwrap().beyond_chance(), Some(false));
    }

    #[test]
    fn p_is_that_of_the_tables() {
        // The closed forms of 2 and 4 degrees of freedom.
        for (values, p) in
            [(vec![1.0, 2.0, 3.0], 0.0741799002), (vec![0.1, 0.3, 0.2, 0.4, 0.5], 0.0132355996), (vec![-1.0, 1.0], 1.0)]
        {
            let found = Summary::of(&values).unwrap().p_value().unwrap();
            assert!((found - p).abs() < 1e-9, "{values:?}: {found}, not {p}");
        }
        assert_eq!(Summary::of(&[2.0, 2.0]).unwrap().p_value(), Some(0.0));
        assert_eq!(Summary::of(&[2.0]).unwrap().p_value(), None);
    }

    #[test]
    fn holm_multiplies_the_least_most_and_keeps_the_order() {
        // R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
        let corrected = holm(&[0.01, 0.04, 0.03, 0.005]);
        for (found, expected) in corrected.iter().zip([0.03, 0.06, 0.06, 0.02]) {
            assert!((found - expected).abs() < 1e-12, "{corrected:?}");
        }
        assert_eq!((holm(&[0.7, 0.9]), holm(&[])), (vec![1.0, 1.0], vec![]));
    }

    #[test]
    fn effect_sizes_are_those_worked_out_by_hand() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0];
        let effect = EffectSize::between(&x, &x.map(|value| value + 2.0)).unwrap();
        for (found, expected) in [
            (effect.pooled_deviation, 2.5f64.sqrt()),
            (effect.d, -1.264911),
            (effect.correction, 0.902703),
            (effect.g(), -1.141839),
        ] {
            assert!((found - expected).abs() < 1e-6, "{effect:?}");
        }
        assert_eq!(EffectSize::between(&x, &[1.0]), None);
        assert_eq!(EffectSize::between(&[2.0, 2.0], &[1.0, 1.0]), None);
        // What seeds leave the same differs by rounding at most.
        assert_eq!(EffectSize::between(&[0.1 + 0.2, 0.3, 0.3], &[0.8, 0.8, 0.8]), None);
    }

    #[test]
    fn as_many_seeds_are_needed_as_power_tables_say() {
        // The tables of Cohen's d for paired samples, two-sided, 5 %, power 0.8: 199, 34, 15 for 0.2, 0.5, 0.8.
        for (effect, n) in [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (2.0, 5), (5.0, 3), (20.0, 2)] {
            let summary = Summary { n: 3, mean: -effect, deviation: Some(1.0), margin: None };
            assert_eq!(summary.values_needed(), Some(n), "{effect}");
        }
        let still = |mean, deviation| Summary { n: 3, mean, deviation, margin: None }.values_needed();
        assert_eq!((still(0.0, Some(1.0)), still(1.0, None)), (None, None));
        assert_eq!((still(1e-6, Some(1.0)), still(1.0, Some(0.0))), (Some(MOST_SEEDS), Some(2)));
    }
}
