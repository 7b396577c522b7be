//! Boosts of spans ("Fixing Imbalanced Attention", arXiv 2501.12206, in its released code): while an answer is generated, the scores of
//! two sets of tokens of a span are raised by a share of their size.
//!
//! ```text
//! s ← s + gain · |s|          gain = α on the top set, β on the bottom set; in the query that generates only
//! ```
//! What is raised depends on where the scores have their zero, which softmax does not: ln(1 + gain) added to the scores is the form
//! that does not. Left out: the authors' "spatial" set, which ranks sums that are all 1.

use std::sync::Arc;

use polyhead_attention::Change;

/// The tokens of an image that an encoder looks at, by its class token's rows.
#[derive(Debug, Clone, PartialEq)]
pub struct BoostSets {
    /// Which tokens are in the top set.
    pub top: Vec<bool>,
    /// Which tokens are in the bottom set.
    pub bottom: Vec<bool>,
    /// What tokens of the bottom set are above: Q3 + 1.5 IQR.
    pub threshold: f64,
}

/// The sets of an encoder's maps, `[heads][tokens]` of the class token's row without the class token itself: the bottom set are
/// outliers in the last layer but one, the top set the largest share in the first layer, less those.
pub fn boost_sets(first: &[Vec<f32>], last_but_one: &[Vec<f32>], top_share: f64) -> BoostSets {
    let sum = |map: &[Vec<f32>]| -> Vec<f64> {
        let tokens = map.first().map_or(0, Vec::len);
        (0..tokens).map(|at| map.iter().map(|head| f64::from(head[at])).sum()).collect()
    };
    let (first, late) = (sum(first), sum(last_but_one));
    let mut sorted = late.clone();
    sorted.sort_by(f64::total_cmp);
    let quartile = |share: f64| {
        let place = share * (sorted.len().max(1) - 1) as f64;
        let (low, rest) = (place.floor() as usize, place.fract());
        sorted[low] + (sorted[(low + 1).min(sorted.len() - 1)] - sorted[low]) * rest
    };
    let (low, high) = (quartile(0.25), quartile(0.75));
    let threshold = high + 1.5 * (high - low);
    let bottom: Vec<bool> = late.iter().map(|&value| value > threshold).collect();
    let mut order: Vec<usize> = (0..first.len()).collect();
    order.sort_by(|&a, &b| first[b].total_cmp(&first[a]).then(a.cmp(&b)));
    let largest = &order[..(first.len() as f64 * top_share).floor() as usize];
    let top = (0..first.len()).map(|at| largest.contains(&at) && !bottom[at]).collect();
    BoostSets { top, bottom, threshold }
}

/// The change of scores that raises each by a share of its size.
pub fn boost(gain: f64) -> Change {
    Change::With(Arc::new(move |scores, _| scores.clone() + scores.abs() * gain))
}
