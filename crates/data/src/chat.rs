//! Conversations to rows: `[data.chat]`.
//!
//! A conversation is rendered by a chat template, as at generation; what the assistant says in it, from behind the header
//! of its turn to the end of the turn, is learned. Context and answers are turned into tokens apart, so that an answer
//! begins with the token with which a model has to begin it, too.
//!
//! Where answers stand is found by rendering the conversation up to answers, with and without them (`turns.rs`), unless the
//! template marks answers with `{% generation %}`. A row of which the template leaves something out is refused (`complete.rs`).
//! Templates come with folders from anywhere: they run as under transformers (`jinja.rs`), within limits (`limits.rs`).
//!
//! Rotary positions are not begun anew inside a row: scores depend on distances only, and attention does not leave a
//! conversation.

mod columns;
mod complete;
mod dates;
mod indicator;
mod jinja;
mod limits;
mod markers;
mod message_spans;
mod methods;
mod numbers;
mod open;
mod python;
mod read;
mod rows;
mod split;
mod template;
mod tokenize;
mod turns;
mod weights;

use std::collections::BTreeMap;

use polyhead_models::Role;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files::OnBad;
use crate::problem::{Problem, require, some_path};
use crate::source::Source;
use crate::{Data, DataError, Opening, Tokenizer};

pub use crate::tokenizer::Special;
pub use columns::{AlpacaColumns, ColumnsConfig, Conversation, MessagesColumns, Names, SharegptColumns};
pub use indicator::IndicatorConfig;
pub use markers::end_of_answer;
pub(crate) use markers::{note, other_than_own};
pub(crate) use rows::row;
pub use template::{BUILT_IN, ChatTemplate};
pub(crate) use tokenize::tokenize;

/// `[data.chat]`: conversations, one a row: a line of JSON, an object in a JSON array, or a row of a table (.csv, .tsv) whose first
/// row names the columns, packed (.gz, .zst) or not; or a row of Parquet or Arrow.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatConfig {
    /// Files, folders and patterns. Of a folder whose files are called train, validation and test, as those of the Hugging Face
    /// hub, train is trained on, validation is held out, and test is left out.
    pub paths: Vec<String>,
    /// The same, to validate on. Default: the validation files of folders, or a share of the others, validation.fraction.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation_paths: Vec<String>,
    /// How a row holds its messages. Default: messages.
    #[serde(default)]
    pub columns: ColumnsConfig,
    /// The chat template: "tokenizer" (its own; the default), "chatml", "llama3", "plain", or a file of Jinja.
    #[serde(default = "tokenizer")]
    pub template: String,
    /// Variables of the template, such as { enable_thinking = false } for Qwen 3's. An export's template has them as defaults.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub template_variables: BTreeMap<String, Value>,
    /// The day that a template gets if it asks for today's (strftime_now), such as "2025-07-26". Default: 2025-01-01, for those
    /// that need one; others have a date of their own. The log says when one is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub date: Option<String>,
    /// Whether arguments of tool calls that are JSON in a text, as OpenAI's format has them, are given to the template as objects.
    /// Default: false, as the row has them; many templates then write a text in a text. How many there are is counted in the log.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub decode_arguments: bool,
    /// What is learned: "assistant" (default), the answers; "last", the last answer only; "all", every token. Messages with
    /// weight = 0, train = false, training = false or loss = false are not, which is counted in the log.
    #[serde(default)]
    pub learn: Learn,
    /// What happens to a conversation of more than training.seq_len tokens: "error" (default), "drop", or "truncate", which
    /// cuts its end off. What was dropped or cut is counted in the log.
    #[serde(default)]
    pub too_long: TooLong,
    /// What happens to a row that cannot be used: "error" (default), or "skip", counted in the log.
    #[serde(default)]
    pub on_bad_row: OnBad,
    /// More skipped rows than this are an error. Default: 100.
    #[serde(default = "max_bad_rows")]
    pub max_bad_rows: usize,
    /// Mark what users say where the answer depends on the context, such as { scores = "scores.jsonl" }. Default: nothing is marked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub indicator: Option<IndicatorConfig>,
    /// Several conversations in a row, where they fit; attention stays inside each. Default: true.
    #[serde(default = "yes")]
    pub pack: bool,
}

impl Source for ChatConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        /// What each row, or the tokenizer, gives a template.
        const GIVEN: [&str; 7] =
            ["messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token"];
        some_path(&self.paths)?;
        self.indicator.as_ref().map_or(Ok(()), |indicator| indicator.validate(&self.paths))?;
        if let Some(date) = &self.date {
            require(dates::Day::parse(date).is_some(), "date", || {
                format!("date (\"{date}\") must be a day such as \"2025-07-26\"")
            })?;
        }
        for name in self.template_variables.keys() {
            let word = |sign: char| sign == '_' || sign.is_ascii_alphanumeric();
            let is_name = !name.starts_with(|sign: char| sign.is_ascii_digit()) && name.chars().all(word);
            require(!GIVEN.contains(&name.as_str()), "template_variables", || {
                format!("template_variables sets {name}, which rows and tokenizer give the template")
            })?;
            require(is_name && !name.is_empty(), "template_variables", || {
                format!("template_variables has \"{name}\", which is not a name in Jinja: letters, digits and _")
            })?;
        }
        Ok(())
    }

    fn paths(&self) -> Vec<String> {
        [&self.paths[..], &self.validation_paths].concat()
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        open::open(self, opening)
    }
}

impl ChatConfig {
    /// The chat template with its variables.
    ///
    /// # Errors
    /// If there is none, or it is not valid Jinja.
    pub fn template(&self, tokenizer: &Tokenizer) -> Result<ChatTemplate, DataError> {
        let template = chat_template("data.chat.template", &self.template, tokenizer)?;
        let date = self.date.as_deref().unwrap_or_default();
        Ok(template.with_variables(&self.template_variables).with_day(dates::Day::parse(date), date))
    }
}

fn tokenizer() -> String {
    "tokenizer".into()
}

fn max_bad_rows() -> usize {
    100
}

fn yes() -> bool {
    true
}

/// Which tokens are learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Learn {
    /// Those of answers.
    #[default]
    Assistant,
    /// Those of the last answer.
    Last,
    /// All.
    All,
}

/// What happens to what does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TooLong {
    /// It ends the run.
    #[default]
    Error,
    /// It is left out.
    Drop,
    /// Its end is cut off.
    Truncate,
}

/// A conversation in tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ChatTokens {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whose each is.
    pub roles: Vec<Role>,
    /// Whether it is to be predicted.
    pub learned: Vec<bool>,
    /// Of those that were read, counted from 0. Several may come of one row.
    pub row: usize,
}

/// The chat template that a recipe names with the setting `key`.
///
/// # Errors
/// If there is none, or it is not valid Jinja.
pub fn chat_template(key: &str, name: &str, tokenizer: &Tokenizer) -> Result<ChatTemplate, DataError> {
    let unusable = |problem: String| unusable!("{key}{problem}");
    let built_in = BUILT_IN.iter().find(|(other, _)| *other == name).map(|(_, source)| (*source).to_owned());
    let source = match (name, built_in) {
        (_, Some(source)) => source,
        ("tokenizer", None) => tokenizer.chat_template().map(str::to_owned).ok_or_else(|| {
            unusable(
                ": the tokenizer brings no chat template (neither chat_template.jinja nor tokenizer_config.json beside it); \
                 name a built-in one: \"chatml\", \"llama3\" or \"plain\""
                    .into(),
            )
        })?,
        (path, None) => crate::files::read_text(std::path::Path::new(path)).map_err(|cause| {
            let here = std::env::current_dir().unwrap_or_default();
            unusable(format!(
                " \"{path}\": {cause} (looked from {}); it may be \"tokenizer\", \"chatml\", \"llama3\", \"plain\", or a file \
                 of Jinja",
                here.display()
            ))
        })?,
    };
    let template = ChatTemplate::new(&source, tokenizer.special());
    Ok(template.map_err(|problem| unusable(format!(" \"{name}\": {problem}")))?.named(name))
}

#[cfg(test)]
mod tests;
