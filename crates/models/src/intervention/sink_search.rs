//! The search of ZeroTuning (Han et al. 2025, arXiv 2505.11739): which heads' attention to the first token is scaled, and by how much.
//!
//! ```text
//! 1. each head alone, with γ and with 1/γ: it is of the kind that is better up, or better down
//! 2. of the kind that has more heads, the best share of all heads
//! 3. these heads together, with every γ of a grid: the best one
//! ```
//! Better is by accuracy (equal ones by loss), which needs answers, or by the entropy of what is predicted, which needs none. As in
//! the authors' code a head is an index, the same in every layer; (layer, head) pairs are the other choice. They leave the grid
//! to the user and have no search by entropy in their code; ours is of the paper's text.

use std::cmp::Ordering;

use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::{ConfigError, Edit, QuerySite, Site};
use serde::Serialize;

use super::answer_score::{AnswerScore, By, answer_score};
use super::spans::{Phase, Span, SpanName, positions};
use super::{read, zero_tuning};
use crate::{Batch, Decoder};

/// What a search is told.
#[derive(Debug, Clone)]
pub struct SinkSearch<'a> {
    /// What it measures on, with a target at least.
    pub batches: &'a [Batch],
    /// The grid, all above 0.
    pub gammas: &'a [f64],
    /// By what a factor is better.
    pub by: By,
    /// What is scaled alone at first.
    pub each: Each,
    /// The factor that heads are scaled by alone, above 1, and its inverse.
    pub probe: f64,
    /// The largest share of heads that are scaled together, above 0 and up to 1.
    pub share: f64,
}

/// What is scaled alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Each {
    /// The heads of one index, in all layers.
    Index,
    /// One head of one layer.
    Head,
}

/// Heads that were scaled alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Profiled {
    /// The layer; `None` where it is all of them.
    pub layer: Option<usize>,
    /// The head.
    pub head: usize,
    /// With the factor.
    pub up: AnswerScore,
    /// With its inverse.
    pub down: AnswerScore,
    /// Whether it is of the kind that is scaled, and among the best of these.
    pub chosen: bool,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FoundSink {
    /// Without any change.
    pub plain: AnswerScore,
    /// Every head, or index.
    pub profile: Vec<Profiled>,
    /// The heads that are chosen, with each factor of the grid.
    pub sweep: Vec<(f64, AnswerScore)>,
    /// The best factor: one of the grid, or 1 where none is better than none.
    pub gamma: f64,
}

/// Layers and query heads whose scores can be scaled, alike in every layer.
///
/// # Errors
/// If a layer has no scores, or heads differ in number.
pub fn scored_heads(model: &Decoder) -> Result<[usize; 2], ConfigError> {
    let site = QuerySite::Scores.into();
    let mut all = Vec::new();
    for layer in 0..model.layers.len() {
        let mechanism = model.config().mechanism(layer);
        if let Some(reason) = mechanism.absent(site) {
            return Err(ConfigError::new(
                "",
                format!("{} in layer {layer} has no {}: {reason}", mechanism.name(), Site::name(site)),
            ));
        }
        all.push(read::sizes(model, layer, site)[0]);
    }
    match all.iter().all(|&heads| heads == all[0]) {
        true => Ok([all.len(), all[0]]),
        false => Err(ConfigError::new(
            "",
            format!("layers have different numbers of heads, {all:?}: indices of heads mean nothing"),
        )),
    }
}

/// What a model predicts with `log_gamma`, `[layers, query heads]`, added to the scores of first tokens.
pub fn sink_score(model: &Decoder, batches: &[Batch], log_gamma: &Tensor<2>) -> AnswerScore {
    answer_score(model, batches, &|context| {
        let keys = positions(&Span::Named(SpanName::First), Phase::Both, context, None);
        let edits = zero_tuning(log_gamma, 0..1).into_iter();
        edits.map(|(layer, edit)| (layer, Edit { keys: keys.clone(), ..edit })).collect()
    })
}

impl SinkSearch<'_> {
    /// Searches; every measurement is told with their number.
    ///
    /// # Errors
    /// As [`scored_heads`].
    pub fn run(&self, model: &Decoder, on_step: &mut dyn FnMut(u64, u64)) -> Result<FoundSink, ConfigError> {
        let [layers, heads] = scored_heads(model)?;
        let units: Vec<(Option<usize>, usize)> = match self.each {
            Each::Index => (0..heads).map(|head| (None, head)).collect(),
            Each::Head => (0..layers).flat_map(|layer| (0..heads).map(move |head| (Some(layer), head))).collect(),
        };
        let (mut done, all) = (0, (2 * units.len() + self.gammas.len() + 1) as u64);
        let mut score = |scaled: &[(Option<usize>, usize)], gamma: f64| {
            let numbers = log_gamma([layers, heads], scaled, gamma, &model.device());
            let score = sink_score(model, self.batches, &numbers);
            done += 1;
            on_step(done, all);
            score
        };
        let plain = score(&[], 1.0);
        let mut profile: Vec<Profiled> = Vec::new();
        for unit in &units {
            let [up, down] = [self.probe, 1.0 / self.probe].map(|gamma| score(&[*unit], gamma));
            profile.push(Profiled { layer: unit.0, head: unit.1, up, down, chosen: false });
        }
        let of_kind = |kind: Ordering| -> Vec<usize> {
            let is = |at: &usize| self.by.compare(&profile[*at].up, &profile[*at].down) == kind;
            (0..profile.len()).filter(is).collect()
        };
        let (up, down) = (of_kind(Ordering::Greater), of_kind(Ordering::Less));
        let best = |at: usize| if up.len() >= down.len() { profile[at].up } else { profile[at].down };
        let mut kind = if up.len() >= down.len() { up.clone() } else { down.clone() };
        kind.sort_by(|&a, &b| self.by.compare(&best(b), &best(a)).then(a.cmp(&b)));
        kind.truncate((self.share * profile.len() as f64).ceil() as usize);
        kind.iter().for_each(|&at| profile[at].chosen = true);
        let chosen: Vec<(Option<usize>, usize)> = kind.iter().map(|&at| units[at]).collect();
        let sweep: Vec<(f64, AnswerScore)> = self.gammas.iter().map(|&gamma| (gamma, score(&chosen, gamma))).collect();
        let none = (1.0, plain);
        // Of equal ones the first: none, if that is as good.
        let better = |best: (f64, AnswerScore), other: &(f64, AnswerScore)| match self.by.compare(&other.1, &best.1) {
            Ordering::Greater => *other,
            _ => best,
        };
        let gamma = sweep.iter().fold(none, better).0;
        Ok(FoundSink { plain, profile, sweep, gamma })
    }
}

impl FoundSink {
    /// `[layers, query heads]`: what is added to the scores of the first token.
    pub fn log_gamma(&self, sizes: [usize; 2], device: &Device) -> Tensor<2> {
        let chosen: Vec<_> = self.profile.iter().filter(|own| own.chosen).map(|own| (own.layer, own.head)).collect();
        log_gamma(sizes, &chosen, self.gamma, device)
    }
}

fn log_gamma([layers, heads]: [usize; 2], scaled: &[(Option<usize>, usize)], gamma: f64, device: &Device) -> Tensor<2> {
    let is = |layer: usize, head: usize| scaled.contains(&(None, head)) || scaled.contains(&(Some(layer), head));
    let number = |at: usize| if is(at / heads, at % heads) { gamma.ln() as f32 } else { 0.0 };
    Tensor::from_data(TensorData::new((0..layers * heads).map(number).collect::<Vec<f32>>(), [layers, heads]), device)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use polyhead_kernels::seed_random;

    use super::*;
    use crate::DecoderConfig;

    #[test]
    fn the_best_factor_of_the_heads_of_one_kind_is_found() {
        let json = r#"{"d_model": 16, "n_layers": 2, "attention": {"softmax": {"n_heads": 4, "n_kv_heads": 2}}}"#;
        seed_random(5);
        let model = serde_json::from_str::<DecoderConfig>(json).unwrap().init(11, &Device::flex());
        let batches = [Batch::text(vec![1, 5, 3, 2, 9, 4, 7, 8]), Batch::text(vec![3, 3, 0, 2, 1])];
        // What is measured without a change is what an evaluation says.
        let zero = Tensor::zeros([2, 4], &model.device());
        let (plain, sums) = (sink_score(&model, &batches, &zero), batches.iter().map(|batch| model.evaluate(batch)));
        let sums = sums
            .reduce(|mut a, b| {
                a.add(b);
                a
            })
            .unwrap();
        assert!(
            (plain.loss - sums.mean_loss()).abs() < 1e-6 && plain.accuracy == sums.accuracy(),
            "{plain:?} {sums:?}"
        );
        for (by, each, units) in [(By::Accuracy, Each::Index, 4), (By::Entropy, Each::Head, 8)] {
            let search =
                SinkSearch { batches: &batches, gammas: &[0.25, 4.0, 100.0], by, each, probe: 2.0, share: 0.3 };
            let mut steps = 0;
            let found = search.run(&model, &mut |_, _| steps += 1).unwrap();
            assert_eq!((found.profile.len(), steps), (units, 2 * units + 4));
            let chosen: Vec<&Profiled> = found.profile.iter().filter(|own| own.chosen).collect();
            assert_eq!(chosen.len(), (0.3 * units as f64).ceil() as usize);
            let kind = by.compare(&chosen[0].up, &chosen[0].down);
            assert!(chosen.iter().all(|own| by.compare(&own.up, &own.down) == kind && kind != Ordering::Equal));
            let of_gamma =
                found.sweep.iter().find(|(gamma, _)| *gamma == found.gamma).map_or(found.plain, |(_, score)| *score);
            assert!(found.sweep.iter().all(|(_, score)| by.compare(score, &of_gamma) != Ordering::Greater));
            assert!(by.compare(&found.plain, &of_gamma) != Ordering::Greater);
            let again = sink_score(&model, &batches, &found.log_gamma([2, 4], &model.device()));
            assert!((again.loss - of_gamma.loss).abs() < 1e-6, "{again:?} {of_gamma:?}");
        }
    }
}
