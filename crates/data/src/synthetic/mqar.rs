//! Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927) as its code makes it
//! (HazyResearch/zoology@d88d6f5): pairs of a key and a value; behind them, among filler, each key once, where its value is to
//! be predicted.
//!
//! The law of the rows is the code's, not its random numbers. Slots behind the pairs are drawn without replacement with weights
//! `(g + 1)^(power_a - 1)`, the first key first, so that early keys are asked for early. `forgetting` gives some keys another
//! value before they are asked for; `compositional` keys are all pairs of two parts. As in the code, a new value may be the old
//! one or another key's.

use std::collections::HashMap;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::sets::{Rules, Set, SetData, labels, open, rule};
use super::{EPOCH, MOST_IDS, Side, Task, answers_only, below, distinct};
use crate::batches::{Order, Sample};
use crate::problem::{Problem, require, within};
use crate::{Data, DataError, Opening, Source, Tokenizer};

/// `[data.mqar]`. Rows come set after set, in the order given and not shuffled, as in Zoology's code.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MqarConfig {
    /// Ids: 0 is filler, keys are below the half, values from there on. Default: 8192.
    pub vocab_size: usize,
    /// What is asked: "plain" (default), "forgetting" or "compositional".
    pub kind: MqarKind,
    /// Keys that "forgetting" gives another value. Default: 4.
    pub n_updates: usize,
    /// Fill what is not asked with random ids instead of 0. Default: false.
    pub random_non_queries: bool,
    /// How soon early keys are asked for: slots have weights (g + 1)^(power_a - 1). Default: 0.01.
    pub power_a: f64,
    /// Sets to train on. Default: 100000 rows of 64 tokens with 4 pairs.
    pub train: Vec<MqarSet>,
    /// Sets to test on, all rows of each. Default: 3000 rows of 64 tokens with 4 pairs.
    pub test: Vec<MqarSet>,
}

/// Rows of one length and number of pairs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MqarSet {
    /// Tokens of a row.
    pub seq_len: usize,
    /// Pairs of a key and a value.
    pub n_pairs: usize,
    /// Rows.
    pub rows: u64,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MqarKind {
    /// The value of each key.
    #[default]
    Plain,
    /// The last value of each key, some of which get another one.
    Forgetting,
    /// The value of each pair of a first and a second key, of as many first as second ones.
    Compositional,
}

impl Default for MqarConfig {
    fn default() -> Self {
        let sets = |rows| vec![MqarSet { seq_len: 64, n_pairs: 4, rows }];
        Self {
            vocab_size: 8192,
            kind: MqarKind::Plain,
            n_updates: 4,
            random_non_queries: false,
            power_a: 0.01,
            train: sets(100_000),
            test: sets(3000),
        }
    }
}

impl Source for MqarConfig {
    fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        let Self { vocab_size, power_a, .. } = *self;
        within("vocab_size", vocab_size, 8..=MOST_IDS)?;
        require((0.0..=1.0).contains(&power_a) && power_a > 0.0, "power_a", || {
            format!("power_a ({power_a}) must be above 0, up to 1 (where all slots are alike)")
        })?;
        for (field, sets) in [("train", &self.train), ("test", &self.test)] {
            require(!sets.is_empty(), field, || format!("{field} is empty: name at least one set of rows"))?;
            for (at, set) in sets.iter().enumerate() {
                let rows = within("rows", set.rows, 1..=EPOCH).map_err(|wrong| wrong.problem);
                self.task(set)
                    .fits(set.seq_len)
                    .and(rows)
                    .map_err(|problem| Problem::new(format!("{field}.{at}"), format!("{field}: {problem}")))?;
            }
        }
        let longest = self.train.iter().map(|set| set.seq_len).max().unwrap_or_default();
        require(longest == seq_len, "train", || {
            format!("train: its longest rows have {longest} tokens, and training.seq_len ({seq_len}) must say the same")
        })
    }

    fn repeats(&self) -> bool {
        true
    }

    fn vocab_size(&self, _tokenizer: &Tokenizer) -> usize {
        self.vocab_size
    }

    fn longest_row(&self, _seq_len: usize) -> usize {
        self.train.iter().chain(&self.test).map(|set| set.seq_len).max().unwrap_or_default()
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let sets = |sets: &[MqarSet]| sets.iter().map(|set| self.set(set)).collect();
        let (train, test) = (sets(&self.train), sets(&self.test));
        open(SetData { train, order: Order::Parts, test, n_ids: self.vocab_size }, opening)
    }
}

impl MqarConfig {
    fn task(&self, set: &MqarSet) -> Mqar {
        let Self { vocab_size, kind, n_updates, random_non_queries, power_a, .. } = *self;
        Mqar { vocab_size, kind, n_updates, random_non_queries, power_a, n_pairs: set.n_pairs }
    }

    fn set(&self, set: &MqarSet) -> Set {
        let name = format!("{} tokens, {} pairs", set.seq_len, set.n_pairs);
        Set { name, rows: set.rows, seq_len: set.seq_len, task: std::sync::Arc::new(self.task(set)) }
    }
}

/// Rows with one number of pairs.
#[derive(Debug, Clone, PartialEq)]
pub struct Mqar {
    /// Ids.
    pub vocab_size: usize,
    /// What is asked.
    pub kind: MqarKind,
    /// Keys that get another value, where the kind is forgetting.
    pub n_updates: usize,
    /// Whether filler is random instead of 0.
    pub random_non_queries: bool,
    /// How soon early keys are asked for.
    pub power_a: f64,
    /// Pairs.
    pub n_pairs: usize,
}

impl Mqar {
    /// First keys, and second keys: the root of the pairs.
    fn grid(&self) -> usize {
        self.n_pairs.isqrt()
    }

    /// Tokens before the first slot, and tokens of a slot.
    fn layout(&self) -> [usize; 2] {
        match self.kind {
            MqarKind::Plain => [2 * self.n_pairs, 2],
            MqarKind::Forgetting => [2 * (self.n_pairs + self.n_updates), 2],
            MqarKind::Compositional => [3 * self.n_pairs, 3],
        }
    }

    /// Where ids of a kind begin and end: keys (of a composition the first ones), second keys, values.
    fn ids(&self) -> [std::ops::Range<u32>; 3] {
        let v = self.vocab_size as u32;
        match self.kind {
            MqarKind::Compositional => [1..v / 3, v / 3..2 * v / 3, 2 * (v / 3)..v],
            _ => [1..v / 2, 0..0, v / 2..v],
        }
    }

    /// Whether rows of this length have room.
    fn fits(&self, seq_len: usize) -> Result<(), String> {
        let Self { vocab_size, n_pairs, n_updates, .. } = *self;
        let ([context, slot], [first, second, values]) = (self.layout(), self.ids());
        rule((1..=1 << 20).contains(&n_pairs), || format!("n_pairs ({n_pairs}) must be 1 to {}", 1 << 20))?;
        if self.kind == MqarKind::Compositional {
            let grid = self.grid();
            rule(grid * grid == n_pairs, || {
                format!("n_pairs ({n_pairs}) must be a square: all pairs of as many keys")
            })?;
            rule(grid <= first.len() && grid <= second.len(), || {
                format!("{grid} first and second keys must be in vocab_size ({vocab_size})")
            })?;
        } else {
            rule(seq_len.is_multiple_of(2), || format!("seq_len ({seq_len}) must be even"))?;
            rule(n_pairs <= first.len(), || format!("n_pairs ({n_pairs}) must be at most the keys, {}", first.len()))?;
        }
        if self.kind == MqarKind::Forgetting {
            rule(n_updates <= n_pairs, || format!("n_updates ({n_updates}) must be at most n_pairs ({n_pairs})"))?;
        }
        rule(n_pairs <= values.len(), || format!("n_pairs ({n_pairs}) must be at most the values, {}", values.len()))?;
        rule(vocab_size > seq_len, || format!("vocab_size ({vocab_size}) must be above seq_len ({seq_len})"))?;
        let needed = context + slot * n_pairs;
        rule(needed <= seq_len, || {
            format!("{n_pairs} pairs and their queries take {needed} tokens, more than seq_len ({seq_len})")
        })
    }

    /// The slot of each key: the largest of log weight + Gumbel noise, in their order.
    fn slots(&self, rng: &mut ChaCha8Rng, slots: usize) -> Vec<usize> {
        let noisy = |g: usize| {
            let uniform = 1.0 - rng.random::<f64>();
            ((self.power_a - 1.0) * ((g + 1) as f64).ln() - (-uniform.ln()).ln(), g)
        };
        let mut all: Vec<(f64, usize)> = (0..slots).map(noisy).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        all.into_iter().take(self.n_pairs).map(|(_, g)| g).collect()
    }

    /// The context, and each key with its last value.
    fn context(&self, rng: &mut ChaCha8Rng) -> (Vec<u32>, Vec<(Vec<u32>, u32)>) {
        let [first, second, values] = self.ids();
        let values = few(rng, values, self.n_pairs);
        let keys: Vec<Vec<u32>> = match self.kind {
            MqarKind::Compositional => {
                let grid = self.grid();
                let [first, second] = [first, second].map(|range| few(rng, range, grid));
                let cell = |at: u32| vec![first[at as usize / grid], second[at as usize % grid]];
                distinct(rng, self.n_pairs, self.n_pairs).into_iter().map(cell).collect()
            }
            _ => few(rng, first, self.n_pairs).into_iter().map(|key| vec![key]).collect(),
        };
        let mut asked: Vec<(Vec<u32>, u32)> = keys.into_iter().zip(values).collect();
        let mut tokens: Vec<u32> = asked.iter().flat_map(|(key, value)| key.iter().copied().chain([*value])).collect();
        if self.kind == MqarKind::Forgetting {
            let [_, _, values] = self.ids();
            for at in distinct(rng, self.n_pairs, self.n_updates) {
                let (key, value) = &mut asked[at as usize];
                *value = rng.random_range(values.clone());
                tokens.extend([key[0], *value]);
            }
        }
        (tokens, asked)
    }
}

/// `count` different ids of a range, in random order; of few in a wide range, drawn until they differ.
fn few(rng: &mut ChaCha8Rng, range: std::ops::Range<u32>, count: usize) -> Vec<u32> {
    if 4 * count > range.len() {
        return distinct(rng, range.len(), count).into_iter().map(|at| range.start + at).collect();
    }
    let mut drawn: Vec<u32> = Vec::with_capacity(count);
    let mut seen = std::collections::HashSet::with_capacity(count);
    while drawn.len() < count {
        let id = rng.random_range(range.clone());
        if seen.insert(id) {
            drawn.push(id);
        }
    }
    drawn
}

impl Task for Mqar {
    fn n_ids(&self) -> usize {
        self.vocab_size
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, _: Side) -> Sample {
        let [context, slot] = self.layout();
        let (mut tokens, asked) = self.context(rng);
        let slots = self.slots(rng, (seq_len - context) / slot);
        match self.random_non_queries {
            true => tokens.extend((context..seq_len).map(|_| below(rng, self.vocab_size))),
            false => tokens.resize(seq_len, 0),
        }
        let mut answers = Vec::with_capacity(asked.len());
        for ((key, value), at) in asked.into_iter().zip(slots) {
            let first = context + slot * at;
            tokens[first..first + key.len()].copy_from_slice(&key);
            answers.push((first + key.len() - 1, value));
        }
        answers_only(tokens, &answers)
    }
}

impl Rules for Mqar {
    fn check(&self, row: &Sample, _side: Side) -> Result<(), String> {
        let seq_len = row.tokens.len();
        self.fits(seq_len)?;
        let labels = labels(row, seq_len, self.vocab_size)?;
        let ([context, slot], n) = (self.layout(), self.n_pairs);
        let values = self.read_context(&row.tokens[..context])?;
        rule(labels.len() == n, || format!("{} labels: each of {n} keys is asked for once", labels.len()))?;
        let width = slot - 1; // of a key
        let mut queried = vec![false; seq_len];
        let mut left = values;
        for (at, label) in labels {
            let first = (at + 1).checked_sub(width).filter(|first| *first >= context);
            let in_slot = first.filter(|first| (first - context).is_multiple_of(slot) && first + slot <= seq_len);
            let first = in_slot.ok_or_else(|| format!("position {at}: no place of a query has this label"))?;
            let key = &row.tokens[first..=at];
            let value = left
                .remove(key)
                .ok_or_else(|| format!("position {at}: {key:?} is no key that is still to be asked"))?;
            rule(value == label, || format!("position {at}: the label is {label}, the key's value {value}"))?;
            queried[first..=at].fill(true);
        }
        let strange = (context..seq_len).find(|&at| !self.random_non_queries && !queried[at] && row.tokens[at] != 0);
        strange.map_or(Ok(()), |at| Err(format!("position {at}: filler is 0, not {}", row.tokens[at])))
    }
}

impl Mqar {
    /// The last value of each key.
    fn read_context(&self, context: &[u32]) -> Result<HashMap<Vec<u32>, u32>, String> {
        let [first, second, range] = self.ids();
        let width = if self.kind == MqarKind::Compositional { 3 } else { 2 };
        let mut values: HashMap<Vec<u32>, u32> = HashMap::new();
        let (mut given, mut updated) = (std::collections::HashSet::new(), std::collections::HashSet::new());
        for (at, pair) in context.chunks(width).enumerate() {
            let (key, value) = (&pair[..width - 1], pair[width - 1]);
            let known = first.contains(&key[0]) && key.get(1).is_none_or(|id| second.contains(id));
            rule(known && range.contains(&value), || format!("pair {at} ({pair:?}) is no key and value"))?;
            let before = values.insert(key.to_vec(), value);
            match at < self.n_pairs {
                true => rule(before.is_none() && given.insert(value), || {
                    format!("pair {at} ({pair:?}): keys and values of a context differ")
                })?,
                false => rule(before.is_some() && updated.insert(key.to_vec()), || {
                    format!("update {at} ({pair:?}): each is of another key that has a value")
                })?,
            }
        }
        if self.kind == MqarKind::Compositional {
            let parts =
                |part: usize| values.keys().map(|key| key[part]).collect::<std::collections::HashSet<_>>().len();
            let (rows, columns, grid) = (parts(0), parts(1), self.grid());
            rule(rows == grid && columns == grid, || {
                format!("{rows} first and {columns} second keys: the grid of {grid} by {grid} is not complete")
            })?;
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::synthetic::sets::testing::{checked, is_uniform};
    use crate::synthetic::testing::answers;

    fn plain(n_pairs: usize, random_non_queries: bool) -> Mqar {
        Mqar { random_non_queries, ..MqarConfig::default().task(&MqarSet { seq_len: 64, n_pairs, rows: 1 }) }
    }

    #[test]
    fn rows_obey_their_rules() {
        for (seq_len, n_pairs) in [(64, 4), (64, 16), (128, 8), (512, 64)] {
            for random in [false, true] {
                checked(&plain(n_pairs, random), seq_len, 60);
                checked(&Mqar { kind: MqarKind::Forgetting, ..plain(n_pairs, random) }, 2 * seq_len, 60);
            }
        }
        for (seq_len, n_pairs) in [(64, 4), (100, 9), (257, 36)] {
            checked(&Mqar { kind: MqarKind::Compositional, ..plain(n_pairs, true) }, seq_len, 60);
        }
    }

    #[test]
    fn slots_and_ids_follow_the_law_of_the_code() {
        const ROWS: usize = 20_000;
        let task = plain(4, true);
        let [train, _] = checked(&task, 64, ROWS as u64);
        let (mut slots, mut in_first) = ([0usize; 4], [0usize; 4]);
        let mut ids = [[0u64; 16]; 3];
        for row in &train {
            for (at, _) in answers(row) {
                let key = row.tokens[..8].iter().step_by(2).position(|&key| key == row.tokens[at]).unwrap();
                slots[key] += (at - 8) / 2;
                in_first[key] += usize::from(at == 8);
            }
            // Keys, values and filler in sixteenths of their ranges.
            ids[0][(row.tokens[0] as usize - 1) * 16 / 4095] += 1;
            ids[1][(row.tokens[1] as usize - 4096) / 256] += 1;
            ids[2][row.tokens[63] as usize / 512] += 1;
        }
        for key in 0..4 {
            let (mean, share) = (slots[key] as f64 / ROWS as f64, in_first[key] as f64 / ROWS as f64);
            assert!((mean - [6.2, 6.8, 7.5, 8.1][key]).abs() < 0.15, "key {key}: mean slot {mean}");
            assert!((share - [0.250, 0.204, 0.156, 0.115][key]).abs() < 0.01, "key {key}: in slot 0 {share}");
        }
        assert!(ids.iter().all(|counts| is_uniform(counts)), "{ids:?}");
    }

    #[test]
    fn all_slots_are_used_where_there_are_no_others() {
        let [rows, _] = checked(&plain(16, false), 64, 20);
        assert!(rows.iter().all(|row| answers(row).iter().map(|&(at, _)| at).eq((32..64).step_by(2))));
    }

    #[test]
    fn sets_that_cannot_be_are_refused_by_name() {
        let problem = |train: MqarSet, kind: MqarKind, seq_len: usize| {
            let config = MqarConfig { train: vec![train], kind, ..MqarConfig::default() };
            config.validate(seq_len).unwrap_err().to_string()
        };
        let set = |seq_len, n_pairs, rows| MqarSet { seq_len, n_pairs, rows };
        assert!(problem(set(64, 17, 10), MqarKind::Plain, 64).contains("take 68 tokens"));
        assert!(problem(set(63, 4, 10), MqarKind::Plain, 63).contains("must be even"));
        assert!(problem(set(64, 4, 0), MqarKind::Plain, 64).contains("rows (0)"));
        assert!(problem(set(64, 5, 10), MqarKind::Compositional, 64).contains("must be a square"));
        assert!(problem(set(64, 3, 10), MqarKind::Forgetting, 64).contains("n_updates (4)"));
        assert!(problem(set(64, 4, 10), MqarKind::Plain, 32).contains("training.seq_len (32)"));
        assert!(problem(set(1 << 40, 4, 10), MqarKind::Plain, 32).contains("vocab_size (8192)"));
    }
}
