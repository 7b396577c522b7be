//! Sets of rows of published tasks: finite ones to train on, others to test on, each with its task and its length.

use std::sync::Arc;

use super::{Side, Task};
use crate::batches::{LoaderOptions, Order, Sample, Samples, first_rows};
use crate::random::mix;
use crate::{Data, DataError, Loader, Opened, Opening};

/// A task with the rules that its rows obey, whoever made them.
pub trait Rules: Task {
    /// Whether a row of one side of the split is one of this task.
    ///
    /// # Errors
    /// The place, the value and the rule that it breaks.
    fn check(&self, row: &Sample, side: Side) -> Result<(), String>;
}

/// Rows of one kind.
#[derive(Clone)]
pub(super) struct Set {
    /// What it is called in results.
    pub name: String,
    /// How many rows there are.
    pub rows: u64,
    /// Tokens of a row.
    pub seq_len: usize,
    /// What makes them.
    pub task: Arc<dyn Rules>,
}

/// Several sets, one behind the other. A row is a function of the seed, the side, the set's place and the row's.
struct Sets {
    sets: Vec<Set>,
    seed: u64,
    side: Side,
}

impl Samples for Sets {
    fn per_epoch(&self) -> u64 {
        self.sets.iter().map(|set| set.rows).sum()
    }

    fn parts(&self) -> Vec<(String, u64)> {
        self.sets.iter().map(|set| (set.name.clone(), set.rows)).collect()
    }

    fn sample(&self, _epoch: u64, index: u64) -> Result<Sample, DataError> {
        let mut within = index;
        for (at, set) in self.sets.iter().enumerate() {
            if within < set.rows {
                let mut rng = self.side.rng(mix(self.seed, at as u64), within);
                return Ok(set.task.row(&mut rng, set.seq_len, self.side));
            }
            within -= set.rows;
        }
        Err(unusable!("there are {} rows, and none with number {index}", self.per_epoch()))
    }
}

/// What a source of sets is opened with.
pub(super) struct SetData {
    /// To train on, again and again.
    pub train: Vec<Set>,
    /// In which order.
    pub order: Order,
    /// To validate on, every row of each.
    pub test: Vec<Set>,
    /// Different ids.
    pub n_ids: usize,
}

/// Opens sets of rows.
pub(super) fn open(data: SetData, opening: Opening<'_>) -> Result<Data, DataError> {
    let (options, SetData { train, order, test, n_ids }) = (opening.options, data);
    let texts = options.tracking.map_or(0, |tracking| tracking.texts as u64);
    let sets = |sets: &[Set], side| Sets { sets: sets.to_vec(), seed: options.seed, side };
    let count = |sets: &[Set]| sets.iter().map(|set| set.rows).sum::<u64>();
    let many = match order {
        Order::Endless => "new rows without end".into(),
        _ => format!("{} rows to train on", count(&train)),
    };
    let description = format!("generated: {} ({n_ids} ids), {many}, {} to test on", opening.name, count(&test));
    let held_out = sets(&test, Side::Validation(count(&test)));
    let loader = |rows, order| Loader::new(Arc::new(rows), None, LoaderOptions::of(options, order));
    Ok(Data::Tokens(Box::new(Opened {
        tracking: first_rows(&sets(&train, Side::Tracking(texts)), texts)?,
        train: loader(sets(&train, Side::Train), order),
        validation: loader(held_out, Order::Once),
        tokenizer: None,
        vocab_size: n_ids,
        description,
        notes: Vec::new(),
        text_hash: None,
        floor: None,
    })))
}

/// Positions of a row with a target, and the target, which has to be an id.
///
/// # Errors
/// If lengths differ, or an id is not below `n_ids`.
pub(super) fn labels(row: &Sample, seq_len: usize, n_ids: usize) -> Result<Vec<(usize, u32)>, String> {
    if row.tokens.len() != seq_len || row.targets.len() != seq_len {
        let (tokens, targets) = (row.tokens.len(), row.targets.len());
        return Err(format!("{tokens} tokens and {targets} targets: a row has {seq_len} of each"));
    }
    if let Some((at, id)) = row.tokens.iter().enumerate().find(|(_, id)| **id as usize >= n_ids) {
        return Err(format!("position {at}: id {id} must be below {n_ids}"));
    }
    let mut labels = Vec::new();
    for (at, &target) in row.targets.iter().enumerate().filter(|(_, target)| **target != polyhead_models::IGNORE) {
        match u32::try_from(target).ok().filter(|id| (*id as usize) < n_ids) {
            Some(id) => labels.push((at, id)),
            None => return Err(format!("position {at}: target {target} must be 0 to {}", n_ids - 1)),
        }
    }
    Ok(labels)
}

/// An error unless `rule` holds.
pub(super) fn rule(rule: bool, problem: impl FnOnce() -> String) -> Result<(), String> {
    if rule { Ok(()) } else { Err(problem()) }
}

#[cfg(test)]
pub(super) mod testing {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Rows of a task on both sides, each accepted by the task's own rules.
    pub(in crate::synthetic) fn checked(task: &dyn Rules, seq_len: usize, rows: u64) -> [Vec<Sample>; 2] {
        [Side::Train, Side::Validation(rows)].map(|side| {
            let row = |index| {
                let row = task.row(&mut side.rng(11, index), seq_len, side);
                task.check(&row, side).unwrap_or_else(|problem| panic!("{side:?}, row {index}: {problem}\n{row:?}"));
                row
            };
            (0..rows).map(row).collect()
        })
    }

    /// Whether counts of equally likely outcomes are as they should be: chi-square within four standard deviations.
    pub(in crate::synthetic) fn is_uniform(counts: &[u64]) -> bool {
        let (n, kinds) = (counts.iter().sum::<u64>() as f64, counts.len() as f64);
        let square = |&count: &u64| (count as f64 - n / kinds).powi(2) / (n / kinds);
        let chi = counts.iter().map(square).sum::<f64>();
        (chi - (kinds - 1.0)).abs() < 4.0 * (2.0 * (kinds - 1.0)).sqrt()
    }
}
