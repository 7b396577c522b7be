//! Conversations packed into rows of equal length.

use std::collections::BTreeMap;
use std::sync::Arc;

use polyhead_models::{IGNORE, Role};

use super::ChatTokens;
use crate::DataError;
use crate::batches::{Sample, Samples};

/// Rows of `seq_len` tokens: one conversation each, or as many as fit.
pub struct ChatRows {
    chats: Arc<Vec<ChatTokens>>,
    /// The conversations of each row.
    rows: Vec<Vec<usize>>,
    seq_len: usize,
    pad: u32,
}

impl ChatRows {
    /// Rows of some of the conversations, none of which is longer than `seq_len`. Packed, each goes where it leaves the
    /// least room, the longest first.
    pub fn new(chats: Arc<Vec<ChatTokens>>, which: Vec<usize>, (seq_len, pack, pad): (usize, bool, u32)) -> Self {
        let rows = match pack {
            true => best_fit(&chats, which, seq_len),
            false => which.into_iter().map(|index| vec![index]).collect(),
        };
        Self { chats, rows, seq_len, pad }
    }

    /// Share of all tokens that pad.
    pub fn padding(&self) -> f64 {
        let used: usize = self.rows.iter().flatten().map(|&index| self.chats[index].tokens.len()).sum();
        1.0 - used as f64 / (self.rows.len() * self.seq_len).max(1) as f64
    }
}

fn best_fit(chats: &[ChatTokens], mut which: Vec<usize>, seq_len: usize) -> Vec<Vec<usize>> {
    which.sort_by_key(|&index| (std::cmp::Reverse(chats[index].tokens.len()), index));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // Rows by the room that is left in them.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for index in which {
        let length = chats[index].tokens.len();
        let (room, row) = match open.range(length..).next().map(|(&room, _)| room) {
            Some(room) => {
                let waiting = open.get_mut(&room).map(|rows| (rows.pop(), rows.is_empty()));
                if matches!(waiting, Some((_, true))) {
                    open.remove(&room);
                }
                (room, waiting.and_then(|(row, _)| row).unwrap_or_default())
            }
            None => {
                rows.push(Vec::new());
                (seq_len, rows.len() - 1)
            }
        };
        rows[row].push(index);
        open.entry(room - length).or_default().push(row);
    }
    rows
}

impl Samples for ChatRows {
    fn per_epoch(&self) -> u64 {
        self.rows.len() as u64
    }

    fn sample(&self, _epoch: u64, index: u64) -> Result<Sample, DataError> {
        let chats = self.rows[index as usize].iter().map(|&index| &self.chats[index]);
        Ok(row(chats, self.seq_len, self.pad))
    }
}

/// A row of conversations one after the other, filled up with `pad`; attention stays inside each.
pub(crate) fn row<'a>(chats: impl IntoIterator<Item = &'a ChatTokens>, seq_len: usize, pad: u32) -> Sample {
    let (mut tokens, mut targets, mut roles) = (Vec::new(), Vec::new(), Vec::new());
    let (mut documents, mut count) = (Vec::new(), 0);
    for chat in chats {
        let ahead = chat.tokens.iter().zip(&chat.learned).skip(1);
        targets.extend(ahead.map(|(&id, &learned)| if learned { i64::from(id) } else { IGNORE }));
        targets.push(IGNORE);
        tokens.extend(&chat.tokens);
        roles.extend(&chat.roles);
        documents.resize(tokens.len(), count);
        count += 1;
    }
    tokens.resize(seq_len, pad);
    targets.resize(seq_len, IGNORE);
    documents.resize(seq_len, count);
    roles.resize(seq_len, Role::Padding);
    Sample { tokens, targets, documents: Some(documents), roles: Some(roles), ..Sample::default() }
}
