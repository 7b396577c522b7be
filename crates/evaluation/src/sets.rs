//! How well a decoder does on a set of rows of which only some positions are scored: the measures that published suites report.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::{Int, Tensor, TensorData};
use polyhead_models::{Batch, ContextMask, Decoder, IGNORE, Pass};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Logits that are there at a time (32 MiB); chosen by us.
const LOGITS: usize = 1 << 23;

/// A decoder's score on a set of rows. Predictions are first choices over all ids.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SetScore {
    /// What the set is called.
    pub name: String,
    /// Rows.
    pub rows: u64,
    /// Scored positions.
    pub targets: u64,
    /// Share of the scored positions that are right.
    pub accuracy: f64,
    /// The mean over rows of the share of a row's scored positions that are right (Zoology's accuracy).
    pub row_accuracy: f64,
    /// Share of the rows in which all scored positions are right.
    pub exact: f64,
    /// torchmetrics' macro accuracy, which MAD reports: the mean of the recalls of the ids that a batch's predictions or targets
    /// have, averaged over batches by their rows.
    pub macro_accuracy: f64,
}

impl SetScore {
    /// The measures by their names.
    pub fn measures(&self) -> [(&'static str, f64); 4] {
        let Self { accuracy, row_accuracy, exact, macro_accuracy, .. } = *self;
        [("accuracy", accuracy), ("row_accuracy", row_accuracy), ("exact", exact), ("macro_accuracy", macro_accuracy)]
    }
}

/// What batches of a set add up to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SetTotals {
    rows: u64,
    targets: u64,
    right: u64,
    shares: f64,
    exact: u64,
    macro_sum: f64,
}

impl SetTotals {
    /// Adds a batch that the model, on a plain device, predicts.
    pub fn add(&mut self, model: &Decoder, batch: &Batch) {
        self.count(batch, &first_choices(model, batch));
    }

    /// Adds a batch with the first choice at each scored position, in their order.
    fn count(&mut self, batch: &Batch, choices: &[u32]) {
        let mut choices = choices.iter();
        let mut recalls: BTreeMap<i64, [u64; 2]> = BTreeMap::new(); // right, all
        let mut chosen = BTreeSet::new();
        for row in batch.targets.chunks(batch.seq.max(1)) {
            let scored = row.iter().filter(|target| **target != IGNORE).zip(&mut choices);
            let (mut right, mut all) = (0, 0);
            for (&target, &choice) in scored {
                let is_right = target == i64::from(choice);
                let recall = recalls.entry(target).or_default();
                recall[0] += u64::from(is_right);
                recall[1] += 1;
                chosen.insert(i64::from(choice));
                right += u64::from(is_right);
                all += 1;
            }
            self.targets += all;
            self.right += right;
            self.shares += right as f64 / all.max(1) as f64;
            self.exact += u64::from(right == all && all > 0);
        }
        let classes = recalls.keys().copied().chain(chosen).collect::<BTreeSet<i64>>().len();
        let sum: f64 = recalls.values().map(|[right, all]| *right as f64 / *all as f64).sum();
        self.rows += batch.batch as u64;
        self.macro_sum += batch.batch as f64 * sum / classes.max(1) as f64;
    }

    /// The score.
    pub fn score(&self, name: String) -> SetScore {
        let rows = self.rows.max(1) as f64;
        SetScore {
            name,
            rows: self.rows,
            targets: self.targets,
            accuracy: self.right as f64 / self.targets.max(1) as f64,
            row_accuracy: self.shares / rows,
            exact: self.exact as f64 / rows,
            macro_accuracy: self.macro_sum / rows,
        }
    }
}

/// The likeliest id at each scored position of a batch, row after row.
fn first_choices(model: &Decoder, batch: &Batch) -> Vec<u32> {
    let scored = batch.targets.iter().enumerate().filter(|(_, target)| **target != IGNORE);
    let scored: Vec<i32> = scored.map(|(at, _)| at as i32).collect();
    if scored.is_empty() {
        return Vec::new();
    }
    let hidden = model.pass(model.tokens(batch), Pass::new(&batch.mask(ContextMask::Causal))).hidden;
    let [rows, seq, d_model] = hidden.dims();
    let hidden = hidden.reshape([rows * seq, d_model]);
    let at_once = (LOGITS / model.vocab_size().max(1)).max(1);
    let choices = scored.chunks(at_once).flat_map(|some| {
        let at = Tensor::<1, Int>::from_data(TensorData::new(some.to_vec(), [some.len()]), &hidden.device());
        let logits = model.logits(hidden.clone().select(0, at).reshape([1, some.len(), d_model]));
        logits.argmax(2).into_data().iter::<i64>().map(|id| id as u32).collect::<Vec<_>>()
    });
    choices.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_measure_counts_what_it_says() {
        let batch = |batch: usize, targets: Vec<i64>| Batch { batch, seq: 3, targets, ..Batch::default() };
        let mut totals = SetTotals::default();
        // Row accuracies 1, 0.5 and 0; of ids: 4 is right twice of three, 5 never, 6 was chosen only.
        totals.count(&batch(2, vec![IGNORE, 4, IGNORE, 4, 4, IGNORE]), &[4, 4, 6]);
        totals.count(&batch(1, vec![IGNORE, IGNORE, 5]), &[4]);
        let score = totals.score("x".into());
        assert_eq!((score.rows, score.targets, score.accuracy), (3, 4, 0.5));
        assert_eq!((score.row_accuracy, score.exact), (0.5, 1.0 / 3.0));
        // (2/3 + 0) / 2 ids of two rows, 0 of one.
        assert!((score.macro_accuracy - 2.0 / 9.0).abs() < 1e-12, "{}", score.macro_accuracy);
        assert_eq!(SetTotals::default().score("none".into()).exact, 0.0);
    }
}
