//! A question with its answer, as token ids.

/// What a model was told about the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// It was stated in these words.
    Taught,
    /// It was stated, in other words.
    Paraphrased,
    /// It was never stated.
    Untaught,
}

/// A question to a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What is asked.
    pub prompt: Vec<u32>,
    /// The true answer.
    pub answer: Vec<u32>,
    /// Whether it can be known.
    pub known: Known,
}
