//! Evaluation beyond the loss: questions asked and answers scored, uncertainty, what layers and heads do. This crate knows
//! models, but neither files nor where questions come from.

pub mod answers;
pub mod ees;
pub mod eigenscore;
pub mod hallucination;
pub mod heads;
pub mod likelihood;
pub mod perplexity;
pub mod sensitivity;
pub mod texts;
