//! Boosts of spans ("Fixing Imbalanced Attention", arXiv 2501.12206, in its released code): while an answer is generated, the scores of
//! two sets of tokens of a span are raised by a share of their size.
//!
//! ```text
//! s ← s + gain · |s|          gain = α on the top set, β on the bottom set; in the query that generates only
//! ```
//! What is raised depends on where the scores have their zero, which softmax does not: ln(1 + gain) added to the scores is the form
//! that does not ([`Boost::LogFactor`]). Left out: the authors' "spatial" set, which ranks sums that are all 1.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use polyhead_attention::{At, Change, Edit, Place, Positions, QuerySite};

/// The form of a boost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boost {
    /// `s + gain |s|`, as released.
    Size,
    /// `s + ln(1 + gain)`: weights are multiplied by 1 + gain, then rows normalised.
    LogFactor,
}

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

impl BoostSets {
    /// `[span]`: the gain of each token.
    pub fn gains(&self, alpha: f64, beta: f64) -> Vec<f64> {
        let gain = |(&top, &bottom): (&bool, &bool)| {
            if top {
                alpha
            } else if bottom {
                beta
            } else {
                0.0
            }
        };
        self.top.iter().zip(&self.bottom).map(gain).collect()
    }
}

/// The change of one layer's scores: the gains of the tokens of a span, for the queries at `positions`.
pub fn span_boost(span: Range<usize>, gains: &[f64], positions: Positions, form: Boost) -> Edit {
    let gains: Vec<f32> = gains.iter().map(|&gain| gain as f32).collect();
    let keys = Positions::Range(span.clone());
    let boost = move |scores: Tensor<4>, place: Place| {
        let first = place.first_key.unwrap_or(0);
        let own = |key: usize| (key + first).checked_sub(span.start).and_then(|at| gains.get(at)).copied();
        let row: Vec<f32> = (0..scores.dims()[3]).map(|key| own(key).unwrap_or_default()).collect();
        let gain = TensorData::new(row, [1, 1, 1, scores.dims()[3]]);
        let gain = Tensor::<4>::from_data(gain, &scores.device()).cast(scores.dtype());
        match form {
            Boost::Size => scores.clone() + scores.abs() * gain,
            Boost::LogFactor => scores + (gain + 1.0).log(),
        }
    };
    let at = At::all(QuerySite::Scores.into());
    Edit { positions, keys, ..Edit::new(at, Change::With(Arc::new(boost))) }
}
