//! Evaluation beyond the loss: questions asked and answers scored, uncertainty, what layers and heads do. This crate knows
//! models, but neither files nor where questions come from.

pub mod ablation;
pub mod answers;
pub mod circuit;
pub mod context_score;
pub mod copy_suppression;
pub mod edges;
pub mod ees;
pub mod eigenscore;
pub mod grouping;
pub mod hallucination;
pub mod head_importance;
pub mod head_scores;
pub mod head_sets;
pub mod heads;
pub mod health;
pub mod lens;
pub mod likelihood;
pub mod next_token;
pub mod patching;
pub mod perplexity;
pub mod saliency;
pub mod sensitivity;
pub mod sets;
pub mod sgrs;
pub mod sinks;
pub mod swap;
pub mod templates;
pub mod texts;
pub mod weight_circuits;
