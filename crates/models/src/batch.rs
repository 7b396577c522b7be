//! What a model is given to learn from: token ids with their targets, still on the host.

use std::collections::BTreeMap;
use std::sync::Arc;

use polyhead_attention::Mask;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Evaluated;

/// Marks a position whose prediction is not asked for: no loss, no gradient, no accuracy.
pub const IGNORE: i64 = -100;

/// Whose a token of a conversation, or of a generated task, is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Instructions that come before.
    System,
    /// What is asked.
    User,
    /// One of several questions about the same, in a generated task.
    Question,
    /// What is answered: from behind the header of the turn to its end.
    Assistant,
    /// What a tool gave back, or a generated task shows.
    Tool,
    /// What the template writes around: headers, separators, the prompt for an answer.
    Template,
    /// Nobody's: it fills up the row.
    Padding,
}

/// What tokens see of the conversation before an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ContextMask {
    /// Every token sees what stands before it.
    #[default]
    Causal,
    /// Inside a turn of context every token sees all others of the turn; answers stay causal.
    Bidirectional,
}

/// One batch of token sequences on the host; rows of equal length, padded where needed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// Number of rows.
    pub batch: usize,
    /// Tokens per row.
    pub seq: usize,
    /// `[batch, seq]` row-major: token ids.
    pub tokens: Vec<u32>,
    /// `[batch, seq]`: the id to be predicted at each position, or [`IGNORE`].
    pub targets: Vec<i64>,
    /// `[batch, seq]`: which document of its row a token belongs to; attention does not cross documents. Padding is a
    /// document of its own. `None` where each row is one stream.
    pub documents: Option<Vec<u32>>,
    /// `[batch, seq]`: whose each token is, where the data is conversations, or a generated task that tells.
    pub roles: Option<Vec<Role>>,
    /// Which source each target comes from, where the data is a mixture.
    pub sources: Option<Sources>,
    /// Bytes of text that the targets (those not ignored) stand for, for bits per byte; 0 where the data is no text, or
    /// nobody counted.
    pub target_bytes: u64,
}

/// The source of each target of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sources {
    /// What the sources are called.
    pub names: Arc<[String]>,
    /// `[batch, seq]`: numbers of sources.
    pub of: Vec<u16>,
}

impl Sources {
    /// The losses of targets, added up for each source that has some. Accuracy and bytes are not told apart.
    pub fn sums(&self, targets: &[i64], losses: impl Iterator<Item = f64>) -> BTreeMap<String, Evaluated> {
        let mut sums: BTreeMap<String, Evaluated> = BTreeMap::new();
        for ((&source, loss), _) in self.of.iter().zip(losses).zip(targets).filter(|(_, target)| **target != IGNORE) {
            let one = Evaluated { loss, targets: 1, ..Evaluated::default() };
            sums.entry(self.names[usize::from(source)].clone()).or_default().add(one);
        }
        sums
    }
}

impl Batch {
    /// A plain text as one row: each token is to be predicted from those before it, nothing after the last.
    pub fn text(tokens: Vec<u32>) -> Self {
        let ahead = tokens.iter().skip(1).map(|&id| i64::from(id));
        let targets = ahead.chain(std::iter::repeat(IGNORE)).take(tokens.len()).collect();
        Self { batch: 1, seq: tokens.len(), tokens, targets, ..Self::default() }
    }

    /// How many positions have a target.
    pub fn target_tokens(&self) -> u64 {
        self.targets.iter().filter(|&&target| target != IGNORE).count() as u64
    }

    /// One row as a batch of its own.
    pub fn row(&self, index: usize) -> Self {
        let range = index * self.seq..(index + 1) * self.seq;
        Self {
            batch: 1,
            seq: self.seq,
            tokens: self.tokens[range.clone()].to_vec(),
            targets: self.targets[range.clone()].to_vec(),
            documents: self.documents.as_ref().map(|ids| ids[range.clone()].to_vec()),
            roles: self.roles.as_ref().map(|roles| roles[range.clone()].to_vec()),
            sources: self
                .sources
                .as_ref()
                .map(|Sources { names, of }| Sources { names: names.clone(), of: of[range].to_vec() }),
            target_bytes: 0,
        }
    }

    /// `[batch, seq]`: which tokens are answers: those that are to be predicted, which nothing before them may see, and
    /// where it is said whose tokens are whose, all that the assistant says.
    pub fn answers(&self) -> Vec<bool> {
        let asked = |at: usize| !at.is_multiple_of(self.seq) && self.targets[at - 1] != IGNORE;
        let said = |at: usize| self.roles.as_ref().is_some_and(|roles| roles[at] == Role::Assistant);
        (0..self.tokens.len()).map(|at| asked(at) || said(at)).collect()
    }

    /// Who sees whom in this batch.
    pub fn mask(&self, context: ContextMask) -> Mask {
        let mask = match context {
            ContextMask::Causal => Mask::causal(),
            ContextMask::Bidirectional => Mask::turns(&self.answers(), self.seq),
        };
        match &self.documents {
            Some(documents) => mask.with_documents(documents),
            None => mask,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_add_up_by_source() {
        let sources = Sources { names: ["a".into(), "b".into()].into(), of: vec![0, 1, 1, 0] };
        let sums = sources.sums(&[5, IGNORE, 6, 7], [1.0, 2.0, 4.0, 8.0].into_iter());
        let told: Vec<_> = sums.iter().map(|(name, sum)| (name.as_str(), sum.loss, sum.targets)).collect();
        assert_eq!(told, [("a", 9.0, 2), ("b", 4.0, 1)]);
    }

    #[test]
    fn what_is_to_be_predicted_is_an_answer_whoever_says_it() {
        use Role::{Assistant, User};
        let batch = |targets: [i64; 5], roles: Option<[Role; 5]>| Batch {
            batch: 1,
            seq: 5,
            tokens: vec![1, 2, 3, 4, 5],
            targets: targets.to_vec(),
            roles: roles.map(|roles| roles.to_vec()),
            ..Batch::default()
        };
        let said = Some([User, User, Assistant, User, Assistant]);
        // Learned from: the last turn; every answer; everything. An answer that is not learned stays one.
        let last = [IGNORE, IGNORE, IGNORE, 5, IGNORE];
        assert_eq!(batch(last, said).answers(), [false, false, true, false, true]);
        assert_eq!(batch([IGNORE, 3, IGNORE, 5, IGNORE], said).answers(), [false, false, true, false, true]);
        assert_eq!(batch([2, 3, 4, 5, IGNORE], said).answers(), [false, true, true, true, true]);
        assert_eq!(batch(last, None).answers(), [false, false, false, false, true]);
    }
}
