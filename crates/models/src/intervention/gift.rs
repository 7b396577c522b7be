//! GIFT, the gaze shift (arXiv 2510.22067): what a question begins to look at, token by token, is looked at more
//! while the answer is generated. Made from the description alone; the span may be a retrieved passage instead of an image.
//!
//! ```text
//! jump[q, v] = max(0, A[q, v] - A[q-1, v])          content words of the question, from its second token on
//! m[v] = exp(α · minmax(clip(mean jump[v])))       over the half of the heads that jump most, clipped at mean ± 3 std
//! ```
//! The question's own columns are scaled by the gain of the span, so that it keeps its place beside it.

use std::ops::Range;

use polyhead_kernels::comparison::largest;

/// Deviations from the mean at which jumps are clipped; from the description.
pub const CLAMP_SIGMAS: f64 = 3.0;

/// Which standard deviation, which the description does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deviation {
    /// Divided by n.
    Population,
    /// Divided by n - 1.
    Sample,
}

/// The mean and the standard deviation of numbers.
pub(super) fn mean_and_deviation(values: &[f64], kind: Deviation) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count.max(1.0);
    let divisor = if kind == Deviation::Sample { count - 1.0 } else { count };
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, if divisor > 0.0 { (squares / divisor).sqrt() } else { 0.0 })
}

/// What a question looks at.
#[derive(Debug, Clone, PartialEq)]
pub struct Gaze {
    /// `[layers][heads][question][span]`: how much more each token of the question looks at a token of the span than the one
    /// before it; 0 for its first.
    pub jumps: Vec<Vec<Vec<Vec<f64>>>>,
    /// `[layers][heads]`: whether a head is kept.
    pub kept: Vec<Vec<bool>>,
    /// `[span]`: the mean jump over what is kept.
    pub mean: Vec<f64>,
    /// `[span]`: the same, clipped.
    pub clamped: Vec<f64>,
    /// `[span]`: the same, from 0 to 1.
    pub saliency: Vec<f64>,
    /// `[span]`: exp(α · saliency).
    pub multiplier: Vec<f64>,
}

/// Finds what a question looks at in a span, by maps `[layers][heads][queries][keys]`; `content` says which tokens of the question
/// are content words.
pub fn gaze(
    maps: &[Vec<Vec<Vec<f32>>>],
    (span, question): (Range<usize>, Range<usize>),
    content: &[bool],
    alpha: f64,
    deviation: Deviation,
) -> Gaze {
    let jump = |map: &Vec<Vec<f32>>, at: usize| -> Vec<f64> {
        let query = question.start + at;
        let of = |key: usize| largest(0.0, [f64::from(map[query][key]) - f64::from(map[query - 1][key])]);
        if at == 0 { vec![0.0; span.len()] } else { span.clone().map(of).collect() }
    };
    let of_head = |map: &Vec<Vec<f32>>| (0..question.len()).map(|at| jump(map, at)).collect::<Vec<_>>();
    let jumps: Vec<Vec<Vec<Vec<f64>>>> = maps.iter().map(|layer| layer.iter().map(of_head).collect()).collect();
    let counted: Vec<usize> = (1..question.len()).filter(|&at| content[at]).collect();
    let total = |head: &Vec<Vec<f64>>| counted.iter().map(|&at| head[at].iter().sum::<f64>()).sum::<f64>();
    let kept: Vec<Vec<bool>> = jumps
        .iter()
        .map(|heads| {
            let mut order: Vec<usize> = (0..heads.len()).collect();
            let totals: Vec<f64> = heads.iter().map(total).collect();
            order.sort_by(|&a, &b| totals[b].total_cmp(&totals[a]).then(a.cmp(&b)));
            // Where no word counts, no head does.
            let kept = &order[..if counted.is_empty() { 0 } else { (heads.len() / 2).max(1) }];
            (0..heads.len()).map(|head| kept.contains(&head)).collect()
        })
        .collect();
    let heads = || jumps.iter().zip(&kept).flat_map(|(heads, kept)| heads.iter().zip(kept));
    let chosen: Vec<&Vec<Vec<f64>>> = heads().filter(|(_, kept)| **kept).map(|(head, _)| head).collect();
    let rows = (chosen.len() * counted.len()).max(1) as f64;
    let mean_of =
        |at: usize| chosen.iter().flat_map(|head| counted.iter().map(move |&q| head[q][at])).sum::<f64>() / rows;
    let mean: Vec<f64> = (0..span.len()).map(mean_of).collect();
    let (middle, deviation) = mean_and_deviation(&mean, deviation);
    let bound = CLAMP_SIGMAS * deviation;
    // Where a weight is no number, neither is what follows from it.
    let clamp = |value: &f64| if bound.is_nan() { bound } else { value.clamp(middle - bound, middle + bound) };
    let clamped: Vec<f64> = mean.iter().map(clamp).collect();
    let most = largest(f64::NEG_INFINITY, clamped.iter().copied());
    let least = -largest(f64::NEG_INFINITY, clamped.iter().map(|value| -value));
    let spread = most > least && !counted.is_empty();
    let saliency: Vec<f64> = clamped
        .iter()
        .map(|value| if spread || value.is_nan() { (value - least) / (most - least) } else { 0.0 })
        .collect();
    let multiplier = saliency.iter().map(|value| (alpha * value).exp()).collect();
    Gaze { jumps, kept, mean, clamped, saliency, multiplier }
}

impl Gaze {
    /// A row of weights with the gaze shifted, and the gain of the question's columns.
    pub fn shifted(&self, row: &[f32], (span, question): (Range<usize>, Range<usize>)) -> (Vec<f64>, f64) {
        let weight = |key: usize| f64::from(row[key]);
        let before: f64 = span.clone().map(weight).sum();
        let after: f64 = span.clone().zip(&self.multiplier).map(|(key, factor)| weight(key) * factor).sum();
        let gain = if before > 0.0 { after / before } else { 1.0 };
        let factor = |key: usize| match key {
            key if span.contains(&key) => self.multiplier[key - span.start],
            key if question.contains(&key) => gain,
            _ => 1.0,
        };
        let raised: Vec<f64> = (0..row.len()).map(|key| weight(key) * factor(key)).collect();
        let sum: f64 = raised.iter().sum();
        (raised.into_iter().map(|weight| weight / sum.max(f64::MIN_POSITIVE)).collect(), gain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_that_is_no_number_is_not_taken_for_none() {
        let maps = |weight: f32| vec![vec![vec![vec![0.5; 4], vec![0.5; 4], vec![weight, 0.2, 0.2, 0.1]]]];
        let of = |weight: f32| gaze(&maps(weight), (0..2, 1..3), &[true, true], 1.0, Deviation::Population);
        assert!(of(0.9).saliency.iter().all(|value| value.is_finite()));
        let broken = of(f32::NAN);
        assert!(broken.mean[0].is_nan() && broken.saliency[0].is_nan() && broken.multiplier[0].is_nan(), "{broken:?}");
    }
}
