//! GIFT, the gaze shift (arXiv 2510.22067): what a question begins to look at, token by token, is looked at more
//! while the answer is generated. Made from the description alone; the span may be a retrieved passage instead of an image.
//!
//! ```text
//! jump[q, v] = max(0, A[q, v] - A[q-1, v])          content words of the question, from its second token on
//! m[v] = exp(α · minmax(clip(mean jump[v])))       over the half of the heads that jump most, clipped at mean ± 3 std
//! ```
//! The question's own columns are scaled by the gain of the span, so that it keeps its place beside it.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use polyhead_attention::{Change, ConfigError, Place, require};
use polyhead_kernels::comparison::largest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Decode, RangeConfig, Span};

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

/// The gaze that is shifted while an answer is generated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GazeConfig {
    /// What the weight of each token of the span is multiplied by.
    pub multiplier: Vec<f64>,
    /// The question, whose weights are multiplied by the gain of the span.
    pub question: RangeConfig,
}

impl GazeConfig {
    pub(super) fn validate(&self, keys: &Span) -> Result<(), ConfigError> {
        let count = self.multiplier.len();
        let fits = matches!(keys, Span::Range(RangeConfig { from, to }) if from + count == *to);
        require(fits, "multiplier", || {
            format!(
                "multiplier has {count} numbers: keys must be a range of as many tokens, such as {{ from = 0, to = {count} }}"
            )
        })?;
        let wrong = self.multiplier.iter().find(|factor| !factor.is_finite() || **factor < 0.0);
        require(wrong.is_none(), "multiplier", || {
            format!("multiplier has {}: every number must be finite, from 0 on", wrong.copied().unwrap_or_default())
        })?;
        Span::Range(self.question).validate("question")
    }

    /// The change of all weights of a map; the span begins at `start`.
    pub(super) fn change(&self, start: usize) -> Change {
        let how = self.clone();
        Change::With(Arc::new(move |weights, place| how.shifted(weights, place, start).0))
    }

    /// Weights, `[batch, heads, queries, keys]`, with the gaze shifted and the sums that rows had, and the gain of the question's columns,
    /// `[batch, heads, queries, 1]`; the span begins at `start`.
    pub fn shifted(&self, weights: Tensor<4>, place: Place, start: usize) -> (Tensor<4>, Tensor<4>) {
        let (keys, first) = (weights.dims()[3], place.first_key.unwrap_or(0));
        let columns = |of: &dyn Fn(usize) -> f64| {
            let row: Vec<f32> = (first..first + keys).map(|key| of(key) as f32).collect();
            Tensor::<4>::from_data(TensorData::new(row, [1, 1, 1, keys]), &weights.device()).cast(weights.dtype())
        };
        let factor = |key: usize| key.checked_sub(start).and_then(|at| self.multiplier.get(at)).copied();
        let asks = |key: usize| factor(key).is_none() && (self.question.from..self.question.to).contains(&key);
        let inside = columns(&|key| f64::from(u8::from(factor(key).is_some())));
        let multiplier = columns(&|key| factor(key).unwrap_or(1.0));
        let question = columns(&|key| f64::from(u8::from(asks(key))));
        let before = (weights.clone() * inside.clone()).sum_dim(3);
        let after = (weights.clone() * inside * multiplier.clone()).sum_dim(3);
        // Where nothing is on the span, there is nothing to keep up with; a quotient by next to nothing has no gradient.
        let nothing = |x: &Tensor<4>| x.clone().lower_elem(f32::MIN_POSITIVE);
        let empty = nothing(&before);
        let gain = (after / before.mask_fill(empty.clone(), 1.0)).mask_fill(empty, 1.0);
        let raised = weights.clone() * (multiplier + question * (gain.clone() - 1.0));
        let (sum, own) = (weights.sum_dim(3), raised.clone().sum_dim(3));
        let empty = nothing(&own);
        (raised * (sum / own.mask_fill(empty, 1.0)), gain)
    }
}

/// Words that say little by themselves; chosen by us.
const STOP_WORDS: [&str; 60] = [
    "a", "about", "all", "an", "and", "are", "as", "at", "be", "been", "but", "by", "can", "could", "did", "do",
    "does", "for", "from", "had", "has", "have", "he", "her", "his", "how", "i", "if", "in", "is", "it", "its", "me",
    "my", "no", "not", "of", "on", "or", "our", "she", "so", "than", "that", "the", "their", "them", "they", "this",
    "to", "was", "we", "were", "what", "when", "which", "who", "will", "with", "you",
];

/// Which tokens of a text are content words: part of a word that is none of the most frequent ones of English. The description takes
/// nouns, verbs, adjectives, adverbs and numerals, for which a tagger is needed.
pub fn content_words(tokens: &[u32], decode: &Decode) -> Vec<bool> {
    let ends: Vec<usize> = (1..=tokens.len()).map(|count| decode(&tokens[..count]).len()).collect();
    let text = decode(tokens);
    let words = text.split(|sign: char| !sign.is_alphanumeric()).filter(|word| !word.is_empty());
    let content = words.filter(|word| !STOP_WORDS.contains(&word.to_lowercase().as_str()));
    let places: Vec<Range<usize>> = content
        .map(|word| {
            let start = word.as_ptr() as usize - text.as_ptr() as usize;
            start..start + word.len()
        })
        .collect();
    let token = |at: usize| {
        let from = if at == 0 { 0 } else { ends[at - 1] };
        places.iter().any(|word| from < word.end && ends[at] > word.start)
    };
    (0..tokens.len()).map(token).collect()
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

    #[test]
    fn frequent_words_and_signs_are_no_content() {
        let words = ["What", " is", " a", " sl", "ice", "?", " The", " 7th"];
        let decode: Decode = Arc::new(move |ids: &[u32]| ids.iter().map(|&id| words[id as usize]).collect());
        let content = content_words(&[0, 1, 2, 3, 4, 5, 6, 7], &decode);
        assert_eq!(content, [false, false, false, true, true, false, false, true]);
    }
}
