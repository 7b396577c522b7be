//! Fuzzy in-context recall: keys and values are motifs of one or more ids. A pair, the probe, is placed near a random position
//! and shown again at the end; rows are padded on the left. As in the code, the probe is not shown before in one or two of a
//! hundred rows, where its place is behind the last pair that has room.

use std::collections::BTreeMap;

use polyhead_models::IGNORE;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::super::sets::{Rules, labels, rule};
use super::super::{Side, Task, distinct};
use super::next_tokens;
use crate::batches::Sample;

/// Fuzzy in-context recall.
#[derive(Debug, Clone, PartialEq)]
pub struct FuzzyRecall {
    /// Ids: those of keys, those of values, padding.
    pub vocab_size: usize,
    /// Ids of a motif at most; of keys in test rows, always as many.
    pub motif: usize,
}

impl FuzzyRecall {
    /// Ids of keys, and ids of keys and values.
    fn ids(&self) -> [usize; 2] {
        [(self.vocab_size - 1) / 2, self.vocab_size - 1]
    }

    fn key(&self, rng: &mut ChaCha8Rng, side: Side) -> Vec<u32> {
        let size = match side {
            Side::Train => rng.random_range(1..=self.motif),
            _ => self.motif,
        };
        distinct(rng, self.ids()[0], size)
    }

    /// A motif of values.
    fn value(&self, rng: &mut ChaCha8Rng) -> Vec<u32> {
        let [keys, all] = self.ids();
        let size = rng.random_range(1..=self.motif);
        distinct(rng, all - keys, size).into_iter().map(|id| keys as u32 + id).collect()
    }
}

impl Task for FuzzyRecall {
    fn n_ids(&self) -> usize {
        self.vocab_size
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, side: Side) -> Sample {
        let mut values: BTreeMap<Vec<u32>, Vec<u32>> = BTreeMap::new();
        let probe = self.key(rng, side);
        let value = self.value(rng);
        let longest = 2 * self.motif;
        let room = (seq_len + 1).saturating_sub(probe.len() + value.len());
        let place = rng.random_range(0..=room.saturating_sub(longest));
        values.insert(probe.clone(), value.clone());
        // Pairs with whether their keys were shown before.
        let (mut pairs, mut length, mut placed) = (Vec::<(Vec<u32>, Vec<u32>)>::new(), 0, false);
        while length + longest <= room {
            let key = if !placed && length >= place { probe.clone() } else { self.key(rng, side) };
            placed |= key == probe; // by chance too
            let value = match values.get(&key) {
                Some(value) => value.clone(),
                None => values.entry(key.clone()).or_insert(self.value(rng)).clone(),
            };
            length += key.len() + value.len();
            pairs.push((key, value));
        }
        pairs.push((probe, value));
        let pad = self.vocab_size as u32 - 1;
        let length: usize = pairs.iter().map(|(key, value)| key.len() + value.len()).sum();
        let mut all = vec![pad; seq_len + 1 - length];
        let mut asked = Vec::new();
        let mut seen = std::collections::BTreeSet::new();
        let last = pairs.len() - 1;
        for (at, (key, value)) in pairs.into_iter().enumerate() {
            all.extend(&key);
            if !seen.insert(key) || at == last {
                asked.extend(all.len() - 1..all.len() - 1 + value.len());
            }
            all.extend(value);
        }
        let end = all.pop().unwrap_or(pad);
        let mut targets = next_tokens(&all, end);
        if !matches!(side, Side::Train) {
            let silent = targets.iter_mut().enumerate().filter(|(at, _)| !asked.contains(at));
            silent.for_each(|(_, target)| *target = IGNORE);
        }
        Sample { tokens: all, targets, ..Sample::default() }
    }
}

impl Rules for FuzzyRecall {
    fn check(&self, row: &Sample, side: Side) -> Result<(), String> {
        let (seq_len, pad, [keys, _]) = (row.tokens.len(), self.vocab_size as u32 - 1, self.ids());
        let labels = labels(row, seq_len, self.vocab_size)?;
        let last = labels.last().filter(|(at, _)| *at + 1 == seq_len);
        let &(_, end) = last.ok_or("the end of the final probe is not asked for")?;
        let all: Vec<u32> = row.tokens.iter().copied().chain([end]).collect();
        let padding = all.iter().take_while(|&&id| id == pad).count();
        rule(all[padding..].iter().all(|&id| id != pad), || "padding stands before the pairs alone".into())?;
        // Runs of ids of keys and of values, in turn.
        let is_key = |id: u32| (id as usize) < keys;
        let mut runs: Vec<(usize, Vec<u32>)> = Vec::new();
        for (at, &id) in all.iter().enumerate().skip(padding) {
            match runs.last_mut() {
                Some((_, run)) if is_key(run[0]) == is_key(id) => run.push(id),
                _ => runs.push((at, vec![id])),
            }
        }
        let whole = runs.len().is_multiple_of(2) && runs.first().is_some_and(|(_, run)| is_key(run[0]));
        rule(whole, || "keys and values must take turns, a key first".into())?;
        for (number, (at, run)) in runs.iter().enumerate() {
            let of_key = number % 2 == 0;
            let exact = of_key && !matches!(side, Side::Train);
            let mut sorted = run.clone();
            sorted.sort_unstable();
            sorted.dedup();
            let fits = run.len() <= self.motif && (!exact || run.len() == self.motif);
            rule(fits && sorted.len() == run.len(), || format!("position {at}: {run:?} is no motif"))?;
        }
        let mut values: BTreeMap<&[u32], &[u32]> = BTreeMap::new();
        let mut asked = Vec::new();
        let count = runs.len() / 2;
        for (number, pair) in runs.chunks(2).enumerate() {
            let [(_, key), (at, value)] = pair else { continue };
            let before = values.insert(key, value);
            rule(before.is_none_or(|before| before == value), || format!("position {at}: {key:?} had another value"))?;
            if before.is_some() || number + 1 == count {
                asked.extend(value.iter().enumerate().map(|(more, &id)| (at - 1 + more, id)));
            }
        }
        let wanted = match side {
            Side::Train => next_tokens(&row.tokens, end).into_iter().map(|id| id as u32).enumerate().collect(),
            _ => asked,
        };
        rule(labels == wanted, || match side {
            Side::Train => "targets must be the next tokens".into(),
            _ => "targets must be the values of repeated keys and of the last one".into(),
        })
    }
}
