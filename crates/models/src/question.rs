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
    /// It was stated, and is to be forgotten.
    Forgotten,
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

/// A question about a skill, as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkillQuestion {
    /// The skill's name.
    pub skill: &'static str,
    /// What is asked, and the answer.
    pub tokens: Vec<u32>,
    /// Where in them the answer begins.
    pub answer: usize,
}
