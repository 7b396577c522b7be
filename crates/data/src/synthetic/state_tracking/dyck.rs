//! Dyck-(k, m): well-nested brackets of k types, at most m deep, as a language to be predicted.
//!
//! From an empty stack a row ends or opens with a half each; a full one closes; otherwise it closes or opens with a half each. An
//! end that comes too early is drawn again, and rows of other sizes are thrown away. Test rows ask for closing brackets where the
//! stack is full: there is nothing else that may follow.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::super::sets::{Rules, labels, rule};
use super::super::{Side, Task, answers_only, below};
use crate::batches::Sample;

/// Bounded brackets. Ids: opening, closing, START, END. A row begins with START; END is only predicted.
#[derive(Debug, Clone, PartialEq)]
pub struct Dyck {
    /// Types of brackets.
    pub k: usize,
    /// Depth at most.
    pub m: usize,
    /// The fewest brackets.
    pub min: usize,
    /// The most, END counted.
    pub max: usize,
}

impl Dyck {
    /// START and END.
    fn ends(&self) -> [u32; 2] {
        [2 * self.k as u32, 2 * self.k as u32 + 1]
    }

    /// Brackets of a row, of any size up to the largest; `None` where it is larger.
    fn brackets(&self, rng: &mut ChaCha8Rng) -> Option<Vec<u32>> {
        let (mut brackets, mut stack) = (Vec::new(), Vec::new());
        while brackets.len() < self.max {
            let closes = match stack.len() {
                0 => {
                    // Drawn again below the smallest size: then it opens.
                    if brackets.len() >= self.min && rng.random::<bool>() {
                        return Some(brackets);
                    }
                    false
                }
                depth if depth == self.m => true,
                _ => rng.random::<bool>(),
            };
            match stack.pop_if(|_| closes) {
                Some(kind) => brackets.push(self.k as u32 + kind),
                None => {
                    let kind = below(rng, self.k);
                    stack.push(kind);
                    brackets.push(kind);
                }
            }
        }
        None
    }
}

impl Task for Dyck {
    fn n_ids(&self) -> usize {
        2 * self.k + 2
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, side: Side) -> Sample {
        let [start, end] = self.ends();
        let brackets = loop {
            if let Some(brackets) = self.brackets(rng) {
                break brackets;
            }
        };
        let (mut answers, mut depth) = (Vec::with_capacity(brackets.len() + 1), 0);
        for (at, &next) in brackets.iter().chain([&end]).enumerate() {
            if matches!(side, Side::Train) || depth == self.m {
                answers.push((at, next));
            }
            depth = if (next as usize) < self.k { depth + 1 } else { depth.max(1) - 1 };
        }
        let mut tokens: Vec<u32> = [start].into_iter().chain(brackets).collect();
        tokens.resize(seq_len, 0);
        answers_only(tokens, &answers)
    }
}

impl Rules for Dyck {
    fn check(&self, row: &Sample, side: Side) -> Result<(), String> {
        let ([start, end], k) = (self.ends(), self.k as u32);
        let labels = labels(row, row.tokens.len(), self.n_ids())?;
        rule(row.tokens.first() == Some(&start), || format!("a row begins with START ({start})"))?;
        // A whole row ends where its brackets do; of a test row, not all are asked for.
        let size = match side {
            Side::Train => labels.len(),
            _ => row.tokens[1..].iter().rposition(|&id| id >= k && id < 2 * k).map_or(0, |last| last + 2),
        };
        rule((self.min..=self.max).contains(&size), || {
            format!("{size} brackets with END must be {} to {}", self.min, self.max)
        })?;
        rule(size <= row.tokens.len() && size > 0, || format!("{} tokens have no room for {size}", row.tokens.len()))?;
        rule(row.tokens[size..].iter().all(|&id| id == 0), || "behind the last bracket is padding".into())?;
        let (mut stack, mut wanted) = (Vec::new(), Vec::new());
        for at in 0..size {
            let next = if at + 1 == size { end } else { row.tokens[at + 1] };
            if matches!(side, Side::Train) || stack.len() == self.m {
                wanted.push((at, next));
            }
            match next {
                id if id < k => stack.push(id),
                id if id < 2 * k => {
                    let opened = stack.pop().ok_or_else(|| format!("position {}: nothing is open to close", at + 1))?;
                    rule(opened + k == id, || format!("position {}: {id} closes {opened}", at + 1))?;
                }
                id => rule(id == end && stack.is_empty(), || format!("position {}: {id} inside a row", at + 1))?,
            }
            rule(stack.len() <= self.m, || format!("position {}: deeper than {}", at + 1, self.m))?;
        }
        rule(labels == wanted, || "targets must be the next tokens, of test rows those at full depth".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::sets::testing::checked;

    #[test]
    fn a_quarter_of_rows_is_one_pair() {
        let task = Dyck { k: 2, m: 3, min: 1, max: 84 };
        let [rows, _] = checked(&task, 84, 4000);
        let short = rows.iter().filter(|row| row.targets[2] == 5).count() as f64 / 4000.0;
        assert!((short - 0.25).abs() < 0.03, "{short}");
    }
}
