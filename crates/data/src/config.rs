//! `[data]`: one of its tables.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::chat::ChatConfig;
use crate::long_context::LongContextConfig;
use crate::synthetic::{
    AssociativeRecallConfig, CopyConfig, FactsConfig, InductionConfig, MarkovConfig, NeedlesConfig, Problem, Task,
};
use crate::text::{JsonlConfig, TextConfig};

/// What a model learns from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DataConfig {
    /// The English of the Rust documentation that rustup installs; without it, the project's own text and source.
    RustDocs(RustDocsConfig),
    /// Text files.
    Text(TextConfig),
    /// Lines of JSON with a text field.
    Jsonl(JsonlConfig),
    /// Conversations, one a line of JSON.
    Chat(ChatConfig),
    /// Generated questions about long texts, as conversations.
    LongContext(LongContextConfig),
    /// A random Markov chain, whose best possible loss is known.
    Markov(MarkovConfig),
    /// Multi-query associative recall.
    AssociativeRecall(AssociativeRecallConfig),
    /// Needles in filler, with look-alikes.
    Needles(NeedlesConfig),
    /// A random sequence and the same again.
    Induction(InductionConfig),
    /// Random tokens, a separator, the same tokens.
    Copy(CopyConfig),
    /// A world of facts, some of which are never taught.
    Facts(FactsConfig),
}

/// The Rust documentation has no settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RustDocsConfig {}

impl DataConfig {
    /// Whether it is text, which needs a tokenizer.
    pub fn is_text(&self) -> bool {
        matches!(self, Self::RustDocs(_) | Self::Text(_) | Self::Jsonl(_) | Self::Chat(_) | Self::LongContext(_))
    }

    /// The name of its table.
    pub fn name(&self) -> &'static str {
        match self {
            Self::RustDocs(_) => "rust_docs",
            Self::Text(_) => "text",
            Self::Jsonl(_) => "jsonl",
            Self::Chat(_) => "chat",
            Self::LongContext(_) => "long_context",
            Self::Markov(_) => "markov",
            Self::AssociativeRecall(_) => "associative_recall",
            Self::Needles(_) => "needles",
            Self::Induction(_) => "induction",
            Self::Copy(_) => "copy",
            Self::Facts(_) => "facts",
        }
    }

    /// Checks the settings without touching a file.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        let named = |paths: &[String]| match paths.is_empty() {
            true => Err(("paths", "paths is empty: name at least one file, folder or pattern".to_owned())),
            false => Ok(()),
        };
        match self {
            Self::RustDocs(_) => Ok(()),
            Self::Text(text) => named(&text.paths),
            Self::Jsonl(jsonl) => named(&jsonl.paths),
            Self::Chat(chat) => named(&chat.paths),
            Self::LongContext(LongContextConfig { tasks, .. }) if tasks.is_empty() => {
                Err(("tasks", "tasks is empty: name at least one".to_owned()))
            }
            Self::LongContext(_) => Ok(()),
            Self::Markov(task) => task.validate(),
            Self::AssociativeRecall(task) => task.validate(seq_len),
            Self::Needles(task) => task.validate(seq_len),
            Self::Induction(task) => task.validate(seq_len),
            Self::Copy(task) => task.validate(seq_len),
            Self::Facts(facts) => facts.validate(seq_len),
        }
    }

    /// The generator of a set that is no text, and the best possible loss where it is known.
    pub(crate) fn task(&self, seed: u64) -> Option<(Box<dyn Task>, Option<f64>)> {
        match self.clone() {
            Self::RustDocs(_) | Self::Text(_) | Self::Jsonl(_) | Self::Chat(_) | Self::LongContext(_) => None,
            Self::Markov(config) => {
                let chain = config.chain(seed);
                let floor = chain.floor();
                Some((Box::new(chain), Some(floor)))
            }
            Self::AssociativeRecall(task) => Some((Box::new(task), Some(0.0))),
            Self::Needles(task) => Some((Box::new(task), Some(0.0))),
            Self::Induction(task) => Some((Box::new(task), Some(0.0))),
            Self::Copy(task) => Some((Box::new(task), Some(0.0))),
            Self::Facts(facts) => Some((Box::new(facts.world(seed)), Some(0.0))),
        }
    }
}
