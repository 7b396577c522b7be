//! Counting values into TensorFlow's buckets (`tensorflow/core/lib/histogram/histogram.cc`).
//!
//! The bucket limits grow by a factor of 1.1 from 1e-12 to 1e20, mirrored for negative values.
//! They are the same at every step, so the histograms of a run can be compared.

use std::sync::OnceLock;

/// A distribution, as the message `HistogramProto` holds it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Histogram {
    pub min: f64,
    pub max: f64,
    pub num: f64,
    pub sum: f64,
    pub sum_squares: f64,
    /// The upper end, exclusive, of each bucket; the lower end is the one before.
    pub limits: Vec<f64>,
    /// How many values are in each bucket.
    pub counts: Vec<f64>,
}

impl Histogram {
    /// Counts the finite numbers among `values`.
    pub(super) fn of(values: &[f32]) -> Self {
        let limits = all_limits();
        let mut counts = vec![0.0; limits.len()];
        let mut histogram = Self {
            min: f64::INFINITY,
            max: f64::NEG_INFINITY,
            num: 0.0,
            sum: 0.0,
            sum_squares: 0.0,
            limits: Vec::new(),
            counts: Vec::new(),
        };
        for value in values.iter().filter(|value| value.is_finite()) {
            let value = f64::from(*value);
            histogram.min = histogram.min.min(value);
            histogram.max = histogram.max.max(value);
            histogram.num += 1.0;
            histogram.sum += value;
            histogram.sum_squares += value * value;
            counts[limits.partition_point(|limit| *limit <= value)] += 1.0;
        }
        // A run of empty buckets becomes one, which only says where the next one begins.
        for (index, count) in counts.iter().enumerate() {
            let next_is_empty = counts.get(index + 1).is_none_or(|next| *next == 0.0);
            if *count > 0.0 || !next_is_empty {
                histogram.limits.push(limits[index]);
                histogram.counts.push(*count);
            }
        }
        histogram
    }
}

fn all_limits() -> &'static [f64] {
    static LIMITS: OnceLock<Vec<f64>> = OnceLock::new();
    LIMITS.get_or_init(|| {
        let mut positive = Vec::new();
        let mut limit = 1e-12;
        while limit < 1e20 {
            positive.push(limit);
            limit *= 1.1;
        }
        positive.push(f64::MAX);
        let negative = positive.iter().rev().map(|limit| -limit);
        negative.chain(std::iter::once(0.0)).chain(positive.iter().copied()).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_rise_and_hold_every_f32() {
        let limits = all_limits();
        assert!(limits.is_sorted_by(|a, b| a < b));
        for value in [f32::MIN, f32::MAX, 0.0, -0.0, f32::MIN_POSITIVE, 1e-45] {
            assert_eq!(Histogram::of(&[value]).num, 1.0);
        }
    }

    #[test]
    fn each_value_lies_in_the_bucket_that_claims_it() {
        let values: Vec<f32> =
            (0..1000).map(|i| (i as f32 - 400.0).powi(3) * 1e-5).chain([f32::NAN, f32::INFINITY, 0.0]).collect();
        let histogram = Histogram::of(&values);
        assert_eq!(histogram.num, 1001.0);
        assert_eq!(histogram.counts.iter().sum::<f64>(), 1001.0);
        let mut low = f64::NEG_INFINITY;
        for (high, count) in histogram.limits.iter().zip(&histogram.counts) {
            let inside = values
                .iter()
                .filter(|value| value.is_finite())
                .filter(|value| (low..*high).contains(&f64::from(**value)))
                .count();
            assert_eq!(inside as f64, *count, "[{low}, {high})");
            low = *high;
        }
        let finite = values.iter().filter(|value| value.is_finite());
        let squares: f64 = finite.map(|value| f64::from(*value).powi(2)).sum();
        assert_eq!(histogram.sum_squares, squares);
        assert_eq!(histogram.min, f64::from(values[0]));
        assert_eq!(histogram.max, f64::from(values[999]));
    }

    #[test]
    fn no_finite_values_give_an_empty_histogram() {
        let histogram = Histogram::of(&[f32::NAN, f32::NEG_INFINITY]);
        assert_eq!((histogram.num, histogram.limits.len()), (0.0, 0));
    }
}
