//! Means, spreads and intervals over seeds.

use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, StudentsT};

/// How sure an interval is to cover the mean, where its assumptions hold.
pub const CONFIDENCE: f64 = 0.95;

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
}
