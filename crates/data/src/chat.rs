//! Conversations to rows: `[data.chat]`.
//!
//! A conversation is rendered by a chat template, as at generation; what the assistant says in it, from behind the header
//! of its turn to the end of the turn, is learnt. Context and answers are turned into tokens apart, so that an answer
//! begins with the token with which a model has to begin it, too.
//!
//! Where answers stand is found by rendering the conversation up to each answer, with and without it (`tokenize.rs`), unless
//! the template marks answers with `{% generation %}`. A row of which the template leaves something out is refused
//! (`written.rs`).
//!
//! Rotary positions are not begun anew inside a row: scores depend on distances only, and attention does not leave a
//! conversation.

mod columns;
mod markers;
mod python;
mod rows;
mod sides;
mod template;
mod tokenize;
mod written;

use std::collections::BTreeMap;
use std::path::PathBuf;

use polyhead_models::Role;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::At;
use crate::synthetic::Problem;
use crate::text::{expand, without_mark};
use crate::{DataError, Tokenizer};

pub use columns::{AlpacaColumns, ColumnsConfig, Conversation, MessagesColumns, Names, SharegptColumns};
pub use markers::end_of_answer;
pub(crate) use markers::note;
pub use rows::ChatRows;
pub(crate) use sides::Sides;
pub use template::{BUILT_IN, ChatTemplate, Special};
pub(crate) use tokenize::tokenize;

/// `[data.chat]`: conversations, one a line of JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatConfig {
    /// Files, folders and patterns.
    pub paths: Vec<String>,
    /// How a row tells its messages. Default: messages.
    #[serde(default)]
    pub columns: ColumnsConfig,
    /// The chat template: "tokenizer" (its own; the default), "chatml", "llama3", "plain", or a file of Jinja.
    #[serde(default = "tokenizer")]
    pub template: String,
    /// Variables of the template, such as { enable_thinking = false } for Qwen 3's. An export's template has them as defaults.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub template_variables: BTreeMap<String, Value>,
    /// What is learnt: "assistant" (default), the answers; "last", the last answer only; "all", every token.
    #[serde(default)]
    pub learn: Learn,
    /// What happens to a conversation of more than training.seq_len tokens: "error" (default), "drop", or "truncate", which
    /// cuts its end off. What was dropped or cut is counted in the log.
    #[serde(default)]
    pub too_long: TooLong,
    /// What happens to a row that cannot be used: "error" (default), or "skip", counted in the log.
    #[serde(default)]
    pub on_bad_row: OnBadRow,
    /// More skipped rows than this are an error. Default: 100.
    #[serde(default = "max_bad_rows")]
    pub max_bad_rows: usize,
    /// Several conversations in a row, where they fit; attention stays inside each. Default: true.
    #[serde(default = "yes")]
    pub pack: bool,
}

impl ChatConfig {
    /// Checks the settings.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self) -> Result<(), Problem> {
        /// What each row, or the tokenizer, tells a template.
        const GIVEN: [&str; 7] =
            ["messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token"];
        if self.paths.is_empty() {
            return Err(("paths", "paths is empty: name at least one file, folder or pattern".to_owned()));
        }
        for name in self.template_variables.keys() {
            let word = |sign: char| sign == '_' || sign.is_ascii_alphanumeric();
            if GIVEN.contains(&name.as_str()) {
                let problem = format!("template_variables sets {name}, which rows and tokenizer tell the template");
                return Err(("template_variables", problem));
            }
            if name.is_empty() || !name.chars().all(word) || name.starts_with(|sign: char| sign.is_ascii_digit()) {
                let problem =
                    format!("template_variables has \"{name}\", which is no name in Jinja: letters, digits and _");
                return Err(("template_variables", problem));
            }
        }
        Ok(())
    }

    /// The chat template with its variables.
    ///
    /// # Errors
    /// If there is none, or it is no Jinja.
    pub fn template(&self, tokenizer: &Tokenizer) -> Result<ChatTemplate, DataError> {
        Ok(chat_template("data.chat.template", &self.template, tokenizer)?.with_variables(&self.template_variables))
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

/// Which tokens are learnt.
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

/// What happens to what cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRow {
    /// It ends the run.
    #[default]
    Error,
    /// It is left out.
    Skip,
}

/// A conversation in tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ChatTokens {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whose each is.
    pub roles: Vec<Role>,
    /// Whether it is to be predicted.
    pub learnt: Vec<bool>,
    /// Of those that were read, counted from 0. Several may come of one row.
    pub row: usize,
}

/// What became of the rows of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Rows that there are.
    pub rows: usize,
    /// Left out because they cannot be used.
    pub bad: usize,
    /// Left out because they are too long.
    pub dropped: usize,
    /// Cut.
    pub truncated: usize,
    /// Of which several conversations are learnt, as the template renders answers otherwise once more follow.
    pub several: usize,
}

/// The chat template that a recipe names with the setting `key`.
///
/// # Errors
/// If there is none, or it is no Jinja.
pub fn chat_template(key: &str, name: &str, tokenizer: &Tokenizer) -> Result<ChatTemplate, DataError> {
    let unusable = |problem: String| DataError::Unusable(format!("{key}{problem}"));
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
        (path, None) => std::fs::read_to_string(path).map_err(|cause| {
            let here = std::env::current_dir().unwrap_or_default();
            unusable(format!(
                " \"{path}\": {cause} (looked from {}); it may be \"tokenizer\", \"chatml\", \"llama3\", \"plain\", or a file \
                 of Jinja",
                here.display()
            ))
        })?,
    };
    ChatTemplate::new(&source, tokenizer.special()).map_err(|problem| unusable(format!(" \"{name}\": {problem}")))
}

/// Reads all conversations.
///
/// # Errors
/// If files are missing, or a row cannot be used and is not to be left out: file, line and reason.
pub fn read_chats(
    config: &ChatConfig,
    tokenizer: &Tokenizer,
    seq_len: usize,
) -> Result<(Vec<ChatTokens>, Counts), DataError> {
    let template = config.template(tokenizer)?;
    let (mut chats, mut counts) = (Vec::new(), Counts::default());
    for (path, _) in expand(&config.paths, &["jsonl", "ndjson"])? {
        let content = std::fs::read(&path).at(&path)?;
        for (index, line) in without_mark(&content).split(|&byte| byte == b'\n').enumerate() {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let row = counts.rows;
            counts.rows += 1;
            match read_row(line, config, &template, tokenizer) {
                Ok(several) => {
                    counts.several += usize::from(several.len() > 1);
                    for chat in several {
                        let chat = ChatTokens { row, ..chat };
                        keep(chat, config, (&path, index + 1, seq_len), &mut chats, &mut counts)?;
                    }
                }
                Err(problem) => {
                    counts.bad += 1;
                    let row = |problem| DataError::Row { path: path.clone(), line: index + 1, problem };
                    if config.on_bad_row == OnBadRow::Error {
                        let hint = "data.chat.on_bad_row = \"skip\" leaves such rows out";
                        return Err(row(format!("{problem}\n  hint: {hint}")));
                    }
                    if counts.bad > config.max_bad_rows {
                        let most = config.max_bad_rows;
                        return Err(row(format!("{problem}\n  and more than data.chat.max_bad_rows ({most}) in all")));
                    }
                }
            }
        }
    }
    match chats.is_empty() {
        true => Err(DataError::Unusable(format!("data.chat: of {} rows none is left to learn from", counts.rows))),
        false => Ok((chats, counts)),
    }
}

fn read_row(
    line: &[u8],
    config: &ChatConfig,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
) -> Result<Vec<ChatTokens>, String> {
    let row: Value = serde_json::from_slice(line).map_err(|error| {
        let (problem, column) = (error.to_string(), error.column());
        format!("column {column}: no JSON: {}", problem.split(" at line ").next().unwrap_or_default())
    })?;
    tokenize(&config.columns.read(&row)?, config.learn, template, tokenizer)
}

/// Keeps a conversation if it fits, or as much of it as does.
fn keep(
    mut chat: ChatTokens,
    config: &ChatConfig,
    (path, line, seq_len): (&PathBuf, usize, usize),
    chats: &mut Vec<ChatTokens>,
    counts: &mut Counts,
) -> Result<(), DataError> {
    let length = chat.tokens.len();
    if length > seq_len {
        match config.too_long {
            TooLong::Error => {
                let problem = format!(
                    "{length} tokens are more than training.seq_len ({seq_len})\n  hint: data.chat.too_long = \"drop\" or \
                     \"truncate\""
                );
                return Err(DataError::Row { path: path.clone(), line, problem });
            }
            TooLong::Drop => {
                counts.dropped += 1;
                return Ok(());
            }
            TooLong::Truncate => {
                chat.tokens.truncate(seq_len);
                chat.roles.truncate(seq_len);
                chat.learnt.truncate(seq_len);
                if !chat.learnt.iter().skip(1).any(|&learnt| learnt) {
                    counts.dropped += 1;
                    return Ok(());
                }
                counts.truncated += 1;
            }
        }
    }
    chats.push(chat);
    Ok(())
}

#[cfg(test)]
mod tests;
