//! The search for the heads of SoftPAG's weak model (HeadHunter: Ahn et al. 2025, arXiv 2506.10978), for language models.
//!
//! ```text
//! each round: every head that is left is added alone to those that were found; the best ones are taken, if they are better than without
//! ```
//! The paper searches by a score of images; here it is accuracy or entropy, as for the sink. Its code could not be had.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use polyhead_attention::{ConfigError, QuerySite};
use serde::Serialize;

use super::answer_score::{AnswerScore, By, answer_score};
use super::{ChangeConfig, EditConfig, GuidanceConfig, Intervention, InterventionConfig, read};
use crate::{Batch, Decoder};

/// What a search is told.
#[derive(Debug, Clone)]
pub struct HeadSearch<'a> {
    /// What it measures on, with a target at least.
    pub batches: &'a [Batch],
    /// By what guided predictions are better.
    pub by: By,
    /// How they are guided.
    pub guided: Guided,
    /// Heads that a round adds.
    pub add: usize,
    /// Rounds at most, one at least.
    pub rounds: usize,
}

/// How predictions are guided by heads.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Guided {
    /// The weight of guidance, other than 0.
    pub weight: f64,
    /// How far maps are pulled to the identity, above 0 and up to 1.
    pub pull: f64,
}

/// A round of a search.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Round {
    /// Layer and head of each head that was left, with what is predicted once it is added, the best first.
    pub each: Vec<((usize, usize), AnswerScore)>,
    /// The best of them together.
    pub score: AnswerScore,
    /// Whether they are taken.
    pub taken: bool,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FoundHeads {
    /// Without guidance.
    pub plain: AnswerScore,
    /// The rounds; those of the first are always taken.
    pub rounds: Vec<Round>,
    /// Layer and head of each head that was taken.
    pub heads: BTreeSet<(usize, usize)>,
}

impl Guided {
    /// The intervention that steers away from the model in which these heads (layer and head) attend to themselves.
    pub fn by(self, heads: &BTreeSet<(usize, usize)>) -> InterventionConfig {
        let mut layers: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        heads.iter().for_each(|(layer, head)| layers.entry(*layer).or_default().push(*head));
        let edit = |(layer, heads): (usize, Vec<usize>)| EditConfig {
            layers: Some(vec![layer]),
            heads: Some(heads),
            ..EditConfig::new("weights", ChangeConfig::ToIdentity(self.pull))
        };
        let edits = layers.into_iter().map(edit).collect();
        InterventionConfig {
            guidance: Some(GuidanceConfig { weight: self.weight }),
            edits,
            ..InterventionConfig::default()
        }
    }

    /// What a model, which has no intervention, predicts under that.
    ///
    /// # Errors
    /// If the model has no such head.
    pub fn score(
        self,
        model: &Decoder,
        batches: &[Batch],
        heads: &BTreeSet<(usize, usize)>,
    ) -> Result<AnswerScore, ConfigError> {
        let intervention = Intervention::new(&self.by(heads), &BTreeMap::new(), model, None)?;
        Ok(answer_score(&model.clone().intervened(Some(intervention)), batches, &|_| Vec::new()))
    }
}

/// Layer and head of every map of a model.
///
/// # Errors
/// If no layer has a map.
pub fn heads_with_maps(model: &Decoder) -> Result<Vec<(usize, usize)>, ConfigError> {
    let site = QuerySite::Weights.into();
    let absent = |layer: usize| model.config().mechanism(layer).absent(site);
    let with_map = (0..model.layers.len()).filter(|&layer| absent(layer).is_none());
    let heads = |layer: usize| (0..read::sizes(model, layer, site)[0]).map(move |head| (layer, head));
    let all: Vec<(usize, usize)> = with_map.flat_map(heads).collect();
    match all.is_empty() {
        true => {
            let name = model.config().mechanism(0).name();
            Err(ConfigError::new("", format!("{name} has no maps: {}", absent(0).unwrap_or_default())))
        }
        false => Ok(all),
    }
}

impl HeadSearch<'_> {
    /// Searches; every measurement is told with their largest number.
    ///
    /// # Errors
    /// As [`heads_with_maps`].
    pub fn run(&self, model: &Decoder, on_step: &mut dyn FnMut(u64, u64)) -> Result<FoundHeads, ConfigError> {
        let all = heads_with_maps(model)?;
        let (mut done, steps) = (0, (self.rounds * (all.len() + 1)) as u64);
        let mut score = |heads: &BTreeSet<(usize, usize)>| {
            done += 1;
            on_step(done, steps);
            self.guided.score(model, self.batches, heads)
        };
        let plain = answer_score(model, self.batches, &|_| Vec::new());
        let mut found = FoundHeads { plain, rounds: Vec::new(), heads: BTreeSet::new() };
        let mut best = plain;
        while found.rounds.len() < self.rounds {
            let left = all.iter().filter(|head| !found.heads.contains(head));
            let with = |more: &[(usize, usize)]| found.heads.iter().chain(more).copied().collect::<BTreeSet<_>>();
            let each = left.map(|head| Ok((*head, score(&with(&[*head]))?)));
            let mut each = each.collect::<Result<Vec<((usize, usize), AnswerScore)>, ConfigError>>()?;
            if each.is_empty() {
                break;
            }
            each.sort_by(|a, b| self.by.compare(&b.1, &a.1).then(a.0.cmp(&b.0)));
            let added: Vec<(usize, usize)> = each.iter().take(self.add).map(|(head, _)| *head).collect();
            let together = with(&added);
            let own = if added.len() == 1 { each[0].1 } else { score(&together)? };
            let taken = found.rounds.is_empty() || self.by.compare(&own, &best) == Ordering::Greater;
            found.rounds.push(Round { each, score: own, taken });
            if !taken {
                break;
            }
            (found.heads, best) = (together, own);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_kernels::seed_random;

    use super::*;
    use crate::DecoderConfig;
    use crate::weights::{load, named};

    fn model(attention: &str) -> Decoder {
        let json = format!(r#"{{"d_model": 16, "n_layers": 2, "attention": {attention}}}"#);
        seed_random(5);
        let fresh = serde_json::from_str::<DecoderConfig>(&json).unwrap().init(11, &Device::flex());
        let larger = named(&fresh).into_iter().map(|mut tensor| {
            let matrix = tensor.shape.len() == 2;
            tensor.values.iter_mut().filter(|_| matrix).for_each(|value| *value *= 10.0);
            (tensor.name.clone(), tensor)
        });
        let larger = larger.collect();
        load(fresh, larger).unwrap()
    }

    #[test]
    fn every_round_takes_the_best_heads_and_the_last_one_only_if_they_help() {
        let model = model(r#"{"softmax": {"n_heads": 4, "n_kv_heads": 2}}"#);
        let batches = [Batch::text(vec![1, 5, 3, 2, 9, 4, 7, 8]), Batch::text(vec![3, 3, 0, 2, 1])];
        for (by, add) in [(By::Accuracy, 1), (By::Entropy, 3)] {
            let guided = Guided { weight: 0.5, pull: 1.0 };
            let search = HeadSearch { batches: &batches, by, guided, add, rounds: 9 };
            let found = search.run(&model, &mut |done, all| assert!(done <= all)).unwrap();
            let taken: Vec<&Round> = found.rounds.iter().filter(|round| round.taken).collect();
            assert_eq!(found.heads.len(), (taken.len() * add).min(8));
            assert!(found.rounds[..found.rounds.len() - 1].iter().all(|round| round.taken));
            assert!(taken.windows(2).all(|pair| by.compare(&pair[1].score, &pair[0].score) == Ordering::Greater));
            let first = &found.rounds[0];
            assert_eq!(first.each.len(), 8);
            for (head, score) in &first.each {
                assert_eq!(*score, guided.score(&model, &batches, &BTreeSet::from([*head])).unwrap());
                assert!(by.compare(&first.each[0].1, score) != Ordering::Less);
            }
            let last = taken[taken.len() - 1].score;
            assert_eq!(last, guided.score(&model, &batches, &found.heads).unwrap());
        }
        let recurrent = self::model(r#"{"gated_delta_net": {"n_heads": 2}}"#);
        let told = heads_with_maps(&recurrent).unwrap_err().problem;
        assert!(told.starts_with("gated_delta_net has no maps: "), "{told}");
    }
}
