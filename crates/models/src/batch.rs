//! What a model is given to learn from: token ids with their targets, still on the host.

/// Marks a position whose prediction is not asked for: no loss, no gradient, no accuracy.
pub const IGNORE: i64 = -100;

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
    /// `[batch, seq]`: which document of its row a token belongs to; attention does not cross documents.
    /// `None` where each row is one stream.
    pub documents: Option<Vec<u32>>,
    /// Bytes of text that the targets (those not ignored) stand for, for bits per byte; 0 where the data is no text.
    pub target_bytes: u64,
}

impl Batch {
    /// How many positions have a target.
    pub fn target_tokens(&self) -> u64 {
        self.targets.iter().filter(|&&target| target != IGNORE).count() as u64
    }
}
