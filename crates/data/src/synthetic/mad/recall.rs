//! In-context recall: pairs of a key and a value, the value of a key being drawn when the key is first shown. The last key was
//! shown before. With noise, pairs are two ids of noise instead; with a single query, a sign stands before the last pair.

use std::collections::BTreeMap;

use polyhead_models::IGNORE;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::super::sets::{Rules, labels, rule};
use super::super::{Side, Task, below};
use super::next_tokens;
use crate::batches::Sample;

/// In-context recall.
#[derive(Debug, Clone, PartialEq)]
pub struct Recall {
    /// Ids: keys, values, ids of noise; with a single query its sign, the last id.
    pub vocab_size: usize,
    /// Ids of noise.
    pub noise_vocab_size: usize,
    /// The share of pairs that are noise.
    pub noise: f64,
    /// Whether every repeated key is asked for.
    pub multi_query: bool,
}

impl Recall {
    /// Keys and values together: those before the noise.
    fn ordinary(&self) -> usize {
        self.vocab_size - self.noise_vocab_size - usize::from(!self.multi_query)
    }

    /// Ids of noise, which are followed by the sign of a single query.
    fn noise_ids(&self) -> std::ops::Range<u32> {
        self.ordinary() as u32..(self.ordinary() + self.noise_vocab_size) as u32
    }

    /// Whole pairs before the last one, of a row whose last value is predicted only.
    fn pairs(&self, seq_len: usize) -> usize {
        if self.multi_query { seq_len.div_ceil(2) - 1 } else { seq_len / 2 - 1 }
    }
}

impl Task for Recall {
    fn n_ids(&self) -> usize {
        self.vocab_size
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, side: Side) -> Sample {
        let (half, pairs) = (self.ordinary() / 2, self.pairs(seq_len));
        let certain = below(rng, pairs) as usize; // one pair that is no noise
        let mut values: BTreeMap<u32, u32> = BTreeMap::new();
        let (mut tokens, mut repeated) = (Vec::with_capacity(seq_len + 1), Vec::new());
        for pair in 0..pairs {
            if pair != certain && rng.random::<f64>() < self.noise {
                tokens.extend([0, 1].map(|_| rng.random_range(self.noise_ids())));
                continue;
            }
            let (key, others) = (below(rng, half), self.ordinary() - half);
            if values.contains_key(&key) {
                repeated.push(tokens.len());
            }
            let value = *values.entry(key).or_insert_with(|| half as u32 + below(rng, others));
            tokens.extend([key, value]);
        }
        if !self.multi_query {
            tokens.push(self.vocab_size as u32 - 1);
        }
        let known: Vec<(u32, u32)> = values.into_iter().collect();
        let (key, value) = known[below(rng, known.len()) as usize];
        repeated.push(tokens.len());
        tokens.push(key);
        let mut targets = next_tokens(&tokens, value);
        if !matches!(side, Side::Train) {
            let asked = |at: usize| if self.multi_query { repeated.contains(&at) } else { at + 1 == seq_len };
            targets.iter_mut().enumerate().filter(|(at, _)| !asked(*at)).for_each(|(_, target)| *target = IGNORE);
        }
        Sample { tokens, targets, ..Sample::default() }
    }
}

impl Rules for Recall {
    fn check(&self, row: &Sample, side: Side) -> Result<(), String> {
        let (seq_len, sign) = (row.tokens.len(), self.vocab_size as u32 - 1);
        let labels = labels(row, seq_len, self.vocab_size)?;
        rule(seq_len >= 3 && seq_len % 2 == usize::from(self.multi_query), || {
            format!("{seq_len} tokens are no pairs")
        })?;
        let (half, ordinary) = ((self.ordinary() / 2) as u32, self.ordinary() as u32);
        let mut pairs: Vec<u32> = row.tokens.clone();
        if !self.multi_query {
            let at = seq_len - 2;
            rule(pairs.remove(at) == sign, || format!("position {at}: the sign {sign} stands before the last pair"))?;
        }
        let last = labels.last().filter(|(at, _)| *at + 1 == seq_len);
        let &(_, last) = last.ok_or("the value of the last key is not asked for")?;
        pairs.push(last);
        let mut values: BTreeMap<u32, u32> = BTreeMap::new();
        let mut repeated = Vec::new();
        let count = pairs.len() / 2;
        for (at, pair) in pairs.chunks(2).enumerate() {
            let (key, value) = (pair[0], pair[1]);
            if self.noise_ids().contains(&key) && self.noise_ids().contains(&value) {
                rule(at + 1 < count && self.noise > 0.0, || format!("pair {at} ({pair:?}) is noise"))?;
                continue;
            }
            rule(key < half && (half..ordinary).contains(&value), || {
                format!("pair {at} ({pair:?}) is no key and value")
            })?;
            let before = values.insert(key, value);
            rule(before.is_none_or(|before| before == value), || {
                format!("pair {at} ({pair:?}): the key had another value")
            })?;
            rule(at + 1 < count || before.is_some(), || format!("the last key, {key}, was not shown before"))?;
            if before.is_some() {
                repeated.push((2 * at + usize::from(!self.multi_query && at + 1 == count), value));
            }
        }
        let wanted = match side {
            Side::Train => next_tokens(&row.tokens, last).into_iter().map(|id| id as u32).enumerate().collect(),
            _ if self.multi_query => repeated,
            _ => vec![(seq_len - 1, last)],
        };
        rule(labels == wanted, || match side {
            Side::Train => "targets must be the next tokens".into(),
            _ => "targets must be the values of repeated keys, at the keys alone".into(),
        })
    }
}
