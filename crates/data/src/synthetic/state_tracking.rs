//! State tracking: what must be followed from the first token to the last. Parity and arithmetic modulo 5 are those of NX-AI and
//! Grazzi et al. 2024 (arXiv 2411.12537; automl/unlocking_state_tracking@df8f840), words of groups those of Merrill et al. 2024
//! (arXiv 2404.08819; jopetty/word-problem@8f910f9), bounded brackets those of Hewitt et al. 2020
//! (john-hewitt/dyckkm-learning@02e4437).
//!
//! The law of the rows is that of the codes, not their random numbers. Where a code leaves a length to a random draw, the draw is
//! uniform over the sizes that there are.

mod dyck;
mod expressions;
mod words;

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::EPOCH;
use super::sets::{Rules, Set, SetData, open, rule};
use crate::batches::Order;
use crate::problem::{Problem, require, within};
use crate::{Data, DataError, Opening, Source, Tokenizer};

pub use dyck::Dyck;
pub use expressions::{Brackets, Modular, Parity};
pub use words::{Group, Words};

/// `[data.state_tracking]`. Sizes are those of the papers: of parity, modular and modular_brackets with the answer counted; of words
/// the elements without the token that begins; of dyck the brackets with END.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StateTrackingConfig {
    /// Which task: "parity", "modular", "modular_brackets", { words = { group = "S5" } } or { dyck = { k = 2, m = 3 } }.
    pub task: StateTask,
    /// What is trained on.
    pub train: StateSet,
    /// What is tested on, one set after the other.
    pub test: Vec<StateSet>,
}

/// Rows of sizes from the smallest to the largest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StateSet {
    /// The smallest size.
    pub min: usize,
    /// The largest size; words have this one.
    pub max: usize,
    /// Rows. Default: to train on, new ones without end; to test on, 1024.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<u64>,
}

/// A task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StateTask {
    /// Whether the number of ones is odd.
    Parity,
    /// Digits with + - * modulo 5, with the usual precedence.
    Modular,
    /// Bracketed digits with + - modulo 5.
    ModularBrackets,
    /// The product of all elements so far.
    Words(WordsConfig),
    /// Well-nested brackets of k types, at most m deep.
    Dyck(DyckConfig),
}

/// The words of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WordsConfig {
    /// "S3", "S4", "S5", "A4", "A5", "Z60" or "A4xZ5".
    pub group: Group,
    /// Use no elements but the identity and the swaps of two, for S groups. Default: false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub swaps: bool,
}

/// Bounded brackets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DyckConfig {
    /// Types of brackets.
    pub k: usize,
    /// Depth at most.
    pub m: usize,
}

impl Source for StateTrackingConfig {
    fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        match self.task {
            StateTask::Words(WordsConfig { group, swaps }) => {
                require(!swaps || group.is_symmetric(), "task.words.swaps", || {
                    "swaps are elements of S groups".into()
                })?;
            }
            StateTask::Dyck(DyckConfig { k, m }) => {
                within("task.dyck.k", k, 1..=1 << 16)?;
                within("task.dyck.m", m, 1..=1 << 16)?;
            }
            _ => {}
        }
        let fits = |set: &StateSet, field: &str| {
            let rows = within("rows", set.rows.unwrap_or(EPOCH), 1..=EPOCH).map_err(|wrong| wrong.problem);
            rows.and_then(|()| self.fits(set)).map_err(|problem| Problem::new(field, format!("{field}: {problem}")))
        };
        fits(&self.train, "train")?;
        require(!self.test.is_empty(), "test", || "test is empty: name at least one set of rows".into())?;
        self.test.iter().try_for_each(|set| fits(set, "test"))?;
        let needed = self.length(&self.train, seq_len);
        require(needed == seq_len && self.longest() <= (1 << 20), "train", || {
            let least = self.least(&self.train);
            match self.pads() {
                true => format!("train: a row needs {least} tokens, more than training.seq_len ({seq_len})"),
                false => {
                    format!("train: rows have {needed} tokens, and training.seq_len ({seq_len}) must say the same")
                }
            }
        })
    }

    fn repeats(&self) -> bool {
        self.train.rows.is_some()
    }

    fn vocab_size(&self, _tokenizer: &Tokenizer) -> usize {
        self.rules(&self.train).n_ids()
    }

    fn longest_row(&self, seq_len: usize) -> usize {
        seq_len.max(self.longest())
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let seq_len = opening.options.seq_len;
        let set = |set: &StateSet, rows: u64| Set {
            name: match set.min == set.max {
                true => format!("size {}", set.max),
                false => format!("sizes {} to {}", set.min, set.max),
            },
            rows: set.rows.unwrap_or(rows),
            seq_len: self.length(set, seq_len),
            task: self.rules(set),
        };
        let order = if self.repeats() { Order::Shuffled } else { Order::Endless };
        let test = self.test.iter().map(|one| set(one, TEST_ROWS)).collect();
        let n_ids = self.rules(&self.train).n_ids();
        open(SetData { train: vec![set(&self.train, EPOCH)], order, test, n_ids }, opening)
    }
}

/// Rows of a test set where nothing is said; chosen by us.
const TEST_ROWS: u64 = 1024;

impl StateTrackingConfig {
    /// Whether rows are padded to `training.seq_len`, be they to train or to test on.
    fn pads(&self) -> bool {
        matches!(self.task, StateTask::Parity | StateTask::Modular | StateTask::ModularBrackets)
    }

    /// Tokens that a set's largest row takes.
    fn least(&self, set: &StateSet) -> usize {
        match self.task {
            StateTask::Parity | StateTask::Modular | StateTask::ModularBrackets => set.max.saturating_sub(1),
            StateTask::Words(_) => set.max.saturating_add(1),
            StateTask::Dyck(_) => set.max,
        }
    }

    /// Tokens of a set's rows.
    fn length(&self, set: &StateSet, seq_len: usize) -> usize {
        let least = self.least(set);
        if self.pads() { seq_len.max(least) } else { least }
    }

    fn longest(&self) -> usize {
        self.test.iter().chain([&self.train]).map(|set| self.least(set)).max().unwrap_or_default()
    }

    /// Whether there are rows of such sizes.
    fn fits(&self, set: &StateSet) -> Result<(), String> {
        let StateSet { min, max, .. } = *set;
        rule(min <= max, || format!("min ({min}) must be at most max ({max})"))?;
        rule(max <= 1 << 20, || format!("max ({max}) must be at most {}", 1 << 20))?;
        let (least, what) = match self.task {
            StateTask::Parity => (2, "one bit and the answer"),
            StateTask::Modular => (3, "a digit, = and the answer"),
            StateTask::ModularBrackets => (5, "two signs, =, the answer and its place"),
            StateTask::Words(_) => (1, "one element"),
            StateTask::Dyck(_) => (3, "a pair of brackets and END"),
        };
        rule(max >= least, || format!("max ({max}) must be at least {least}: {what}"))?;
        rule(!matches!(self.task, StateTask::Words(_)) || min == max, || {
            format!("min ({min}) must be max ({max}): words have one size")
        })?;
        // END alone is drawn anew before there are `min` brackets, and is one of `max`.
        let fewest = min.max(2).next_multiple_of(2);
        rule(!matches!(self.task, StateTask::Dyck(_)) || fewest < max, || {
            format!(
                "max ({max}) must be above {fewest}, the fewest brackets in pairs that are not below min ({min}): END is one more"
            )
        })
    }

    fn rules(&self, set: &StateSet) -> Arc<dyn Rules> {
        let StateSet { min, max, .. } = *set;
        match self.task {
            StateTask::Parity => Arc::new(Parity { min, max }),
            StateTask::Modular => Arc::new(Modular { min, max, modulus: 5 }),
            StateTask::ModularBrackets => Arc::new(Brackets { min, max, modulus: 5, mult: false }),
            StateTask::Words(WordsConfig { group, swaps }) => Arc::new(Words::new(group, max, swaps)),
            StateTask::Dyck(DyckConfig { k, m }) => Arc::new(Dyck { k, m, min, max }),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::synthetic::sets::testing::checked;
    use crate::synthetic::testing::answers;

    fn config(json: &str) -> StateTrackingConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn rows_obey_their_rules() {
        for (json, seq_len) in [
            (r#"{"task":"parity","train":{"min":3,"max":40},"test":[{"min":40,"max":256}]}"#, 255),
            (r#"{"task":"modular","train":{"min":3,"max":40},"test":[{"min":40,"max":256}]}"#, 255),
            (r#"{"task":"modular_brackets","train":{"min":3,"max":40},"test":[{"min":40,"max":256}]}"#, 255),
            (
                r#"{"task":{"words":{"group":"S5"}},"train":{"min":12,"max":12,"rows":9},"test":[{"min":40,"max":40}]}"#,
                13,
            ),
            (r#"{"task":{"words":{"group":"A4xZ5"}},"train":{"min":6,"max":6},"test":[{"min":6,"max":6}]}"#, 7),
            (
                r#"{"task":{"words":{"group":"S5","swaps":true}},"train":{"min":6,"max":6},"test":[{"min":6,"max":6}]}"#,
                7,
            ),
            (r#"{"task":{"dyck":{"k":2,"m":3}},"train":{"min":1,"max":84},"test":[{"min":85,"max":168}]}"#, 84),
        ] {
            let config = config(json);
            config.validate(seq_len).unwrap();
            for set in [&config.train, &config.test[0]] {
                checked(&*config.rules(set), config.length(set, seq_len), 200);
            }
        }
    }

    #[test]
    fn answers_are_balanced_and_sizes_uniform() {
        for (task, first, count) in [("parity", 1, 2), ("modular", 5, 5), ("modular_brackets", 0, 5)] {
            let text = format!(r#"{{"task":"{task}","train":{{"min":40,"max":256}},"test":[]}}"#);
            let config = config(&text);
            let [rows, _] = checked(&*config.rules(&config.train), 255, 3000);
            let (mut counts, mut places) = (vec![0usize; count], 0);
            for row in &rows {
                let [(at, answer)] = answers(row)[..] else { panic!("{row:?}") };
                counts[answer as usize - first] += 1;
                places += at;
            }
            let share = 1.0 / count as f64;
            assert!(counts.iter().all(|&n| (n as f64 / 3000.0 - share).abs() < 0.03), "{task}: {counts:?}");
            let mean = places as f64 / 3000.0;
            assert!((mean - 146.0).abs() < 4.0, "{task}: answers at {mean}");
        }
    }

    #[test]
    fn sizes_that_cannot_be_are_refused_by_name() {
        let problem = |task: &str, train: &str, seq_len| {
            let text = format!(r#"{{"task":{task},"train":{train},"test":[{{"min":8,"max":9}}]}}"#);
            config(&text).validate(seq_len).unwrap_err().to_string()
        };
        assert!(problem(r#""parity""#, r#"{"min":9,"max":4}"#, 255).contains("min (9)"));
        assert!(problem(r#""parity""#, r#"{"min":3,"max":40}"#, 20).contains("needs 39 tokens"));
        assert!(problem(r#""modular""#, r#"{"min":2,"max":2}"#, 255).contains("at least 3"));
        assert!(problem(r#"{"words":{"group":"S3"}}"#, r#"{"min":3,"max":4}"#, 5).contains("one size"));
        assert!(problem(r#"{"words":{"group":"A5","swaps":true}}"#, r#"{"min":4,"max":4}"#, 5).contains("S groups"));
        assert!(problem(r#"{"dyck":{"k":0,"m":3}}"#, r#"{"min":1,"max":84}"#, 84).contains("k (0)"));
        assert!(problem(r#"{"dyck":{"k":2,"m":3}}"#, r#"{"min":1,"max":84}"#, 80).contains("rows have 84 tokens"));
        assert!(problem(r#""parity""#, r#"{"min":3,"max":40,"rows":0}"#, 255).contains("rows (0)"));
        // Sizes without a row, for which it would be drawn for ever.
        for (min, max, fewest) in [(85, 85, 86), (84, 84, 84), (83, 84, 84), (3, 3, 4), (2, 2, 2), (4, 4, 4)] {
            let problem = problem(r#"{"dyck":{"k":2,"m":3}}"#, &format!(r#"{{"min":{min},"max":{max}}}"#), max);
            assert!(problem.contains("must be "), "{min} to {max}: {problem}");
            assert!(max < 3 || problem.contains(&format!("above {fewest}")), "{min} to {max}: {problem}");
        }
        let smallest = Dyck { k: 2, m: 3, min: 84, max: 85 };
        checked(&smallest, 85, 20);
    }
}
