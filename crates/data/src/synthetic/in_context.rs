//! In-context tasks: which of several hidden maps is meant can be told from the shots alone, as in the tasks of words (antonyms,
//! capitals) that soft injection (SITE, arXiv 2507.20906) is measured on. The maps themselves can be learned; they are ours.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{MOST_IDS, Side, Task, asked_only, below, distinct, open};
use crate::batches::Sample;
use crate::problem::{Problem, is_default, require, within};
use crate::{Data, DataError, Opening, Source, Tokenizer};

/// `[data.in_context]`. A row: `input arrow output` n_shots times, then n_queries further inputs with their outputs, all of one task,
/// then padding. The output is asked for at the arrow, so that where it is predicted, input and task both have to be read. A task is a random map of inputs to outputs, one to one; the
/// tasks are decided by debug.seed, not by the row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct InContextConfig {
    /// Tasks that exist. Default: 8.
    pub n_tasks: usize,
    /// Different inputs, and as many outputs, that exist. Default: 32.
    pub n_inputs: usize,
    /// Pairs that are shown. Default: 8; with 0 nothing tells the task of the first query.
    pub n_shots: usize,
    /// Inputs asked for behind them. Default: 1.
    pub n_queries: usize,
    /// The task of every row, from 0. Default: another one in each row.
    #[serde(skip_serializing_if = "is_default")]
    pub task: Option<usize>,
}

impl Default for InContextConfig {
    fn default() -> Self {
        Self { n_tasks: 8, n_inputs: 32, n_shots: 8, n_queries: 1, task: None }
    }
}

impl Source for InContextConfig {
    fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        let Self { n_tasks, n_inputs, n_shots, n_queries, task } = *self;
        within("n_tasks", n_tasks, 1..=MOST_IDS)?;
        within("n_inputs", n_inputs, 2..=MOST_IDS)?;
        let numbers = n_tasks.saturating_mul(n_inputs);
        require(numbers <= MOST_IDS, "n_tasks", || {
            format!("n_tasks * n_inputs = {numbers} must be at most {MOST_IDS}")
        })?;
        let pairs = n_shots.saturating_add(n_queries);
        require(n_queries > 0 && pairs <= n_inputs, "n_queries", || {
            format!(
                "n_queries ({n_queries}) must be at least 1, and with n_shots ({n_shots}) at most n_inputs ({n_inputs}): inputs of a row differ"
            )
        })?;
        require(3 * pairs <= seq_len, "n_shots", || {
            format!("3 * (n_shots + n_queries) = {} must fit into training.seq_len ({seq_len})", 3 * pairs)
        })?;
        require(task.is_none_or(|task| task < n_tasks), "task", || {
            format!("task ({}) must be below n_tasks ({n_tasks})", task.unwrap_or_default())
        })
    }

    fn vocab_size(&self, _tokenizer: &Tokenizer) -> usize {
        self.n_ids()
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        open(self.tasks(opening.options.seed), opening)
    }
}

impl InContextConfig {
    fn n_ids(&self) -> usize {
        2 * self.n_inputs + 2
    }

    /// The tasks that a seed makes.
    fn tasks(&self, seed: u64) -> Tasks {
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x0074_6173_6b73);
        let map = |_| {
            let mut outputs: Vec<u32> = (0..self.n_inputs as u32).collect();
            outputs.shuffle(&mut rng);
            outputs
        };
        Tasks { maps: (0..self.n_tasks).map(map).collect(), config: self.clone() }
    }
}

/// The tasks, and what rows are made of them.
#[derive(Debug, Clone)]
struct Tasks {
    config: InContextConfig,
    /// Of each task, the number of the output of each input.
    maps: Vec<Vec<u32>>,
}

// Ids: inputs, then outputs, the arrow, padding.
impl Task for Tasks {
    fn n_ids(&self) -> usize {
        self.config.n_ids()
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, _: Side) -> Sample {
        let InContextConfig { n_inputs, n_shots, n_queries, task, .. } = self.config;
        let map = &self.maps[task.unwrap_or_else(|| below(rng, self.maps.len()) as usize)];
        let inputs = distinct(rng, n_inputs, n_shots + n_queries);
        let output = |input: u32| n_inputs as u32 + map[input as usize];
        let arrow = 2 * n_inputs as u32;
        let mut tokens: Vec<u32> = inputs.iter().flat_map(|&input| [input, arrow, output(input)]).collect();
        let answers: Vec<(usize, u32)> = (n_shots..inputs.len()).map(|at| (3 * at + 1, output(inputs[at]))).collect();
        tokens.resize(seq_len, arrow + 1);
        asked_only(tokens, 3 * n_shots, 2, &answers)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use super::*;
    use crate::synthetic::testing::{answers, rows};

    #[test]
    fn a_row_is_of_one_task_and_asks_behind_its_shots() {
        let config = InContextConfig { n_shots: 4, n_queries: 2, ..Default::default() };
        let tasks = config.tasks(5);
        let of = |row: &Sample, task: usize| {
            let shown = |one: &[u32]| one[1] == 64 && one[2] == 32 + tasks.maps[task][one[0] as usize];
            row.tokens[..18].chunks(3).all(shown)
        };
        let mut met = BTreeSet::new();
        for row in rows(tasks.clone(), 20) {
            met.insert((0..8).find(|&task| of(&row, task)).unwrap());
            assert_eq!(answers(&row), [13, 16].map(|at| (at, row.tokens[at + 1])));
            assert!(row.tokens[18..].iter().all(|&id| id == 65));
        }
        assert_eq!(met.len(), 8, "30 rows of 8 tasks");
        let one = InContextConfig { task: Some(3), ..config };
        assert!(rows(one.tasks(5), 20).iter().all(|row| of(row, 3)), "the same maps, whatever else is asked for");
        assert_ne!(one.tasks(6).maps, tasks.maps, "another seed has other maps");
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_name() {
        let refused = |config: InContextConfig| config.validate(24).err().map(|error| error.field);
        let config = || InContextConfig { n_shots: 7, ..Default::default() };
        assert_eq!(refused(config()), None);
        assert_eq!(refused(InContextConfig { n_shots: 8, ..config() }), Some("n_shots".into()));
        assert_eq!(refused(InContextConfig { n_inputs: 7, ..config() }), Some("n_queries".into()));
        assert_eq!(refused(InContextConfig { task: Some(8), ..config() }), Some("task".into()));
    }
}
