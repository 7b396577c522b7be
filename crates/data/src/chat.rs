//! Conversations to rows: `[data.chat]`.
//!
//! A conversation is rendered by a chat template, as at generation; what the assistant says in it, from behind the header
//! of its turn to the end of the turn, is learnt. Context and answers are turned into tokens apart, so that an answer
//! begins with the token with which a model has to begin it, too.
//!
//! Where answers stand is found by rendering the conversation up to each answer, with and without it: both must be
//! beginnings of the whole text. Templates that render a message otherwise once more follow it (that strip thoughts, for
//! instance) are refused, row by row, unless they mark answers with `{% generation %}`.
//!
//! Rotary positions are not begun anew inside a row: scores depend on distances only, and attention does not leave a
//! conversation.

mod columns;
mod python;
mod rows;
mod template;

use std::ops::Range;
use std::path::{Path, PathBuf};

use polyhead_models::Role;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::At;
use crate::text::expand;
use crate::{DataError, Tokenizer};

pub use columns::{AlpacaColumns, ColumnsConfig, Conversation, MessagesColumns, SharegptColumns};
pub use rows::ChatRows;
pub use template::{BUILT_IN, ChatTemplate, Special};

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
}

/// The chat template that a recipe names.
///
/// # Errors
/// If there is none, or it is no Jinja.
pub fn chat_template(name: &str, tokenizer: &Tokenizer) -> Result<ChatTemplate, DataError> {
    let built_in = BUILT_IN.iter().find(|(other, _)| *other == name).map(|(_, source)| (*source).to_owned());
    let source = match (name, built_in) {
        (_, Some(source)) => source,
        ("tokenizer", None) => tokenizer.chat_template().map(str::to_owned).ok_or_else(|| {
            DataError::Unusable(
                "data.chat.template: the tokenizer brings no chat template (neither chat_template.jinja nor \
                 tokenizer_config.json beside it); name a built-in one: \"chatml\", \"llama3\" or \"plain\""
                    .into(),
            )
        })?,
        (path, None) => std::fs::read_to_string(path).at(Path::new(path))?,
    };
    ChatTemplate::new(&source, tokenizer.special())
        .map_err(|problem| DataError::Unusable(format!("data.chat.template \"{name}\": {problem}")))
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
    let template = chat_template(&config.template, tokenizer)?;
    let (mut chats, mut counts) = (Vec::new(), Counts::default());
    for (path, _) in expand(&config.paths, &["jsonl", "ndjson"])? {
        let content = std::fs::read(&path).at(&path)?;
        for (index, line) in content.split(|&byte| byte == b'\n').enumerate() {
            if line.trim_ascii().is_empty() {
                continue;
            }
            counts.rows += 1;
            match read_row(line, config, &template, tokenizer) {
                Ok(chat) => keep(chat, config, (&path, index + 1, seq_len), &mut chats, &mut counts)?,
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
) -> Result<ChatTokens, String> {
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

/// A conversation in tokens.
///
/// # Errors
/// If the template refuses it, or answers cannot be told from the rest.
pub(crate) fn tokenize(
    chat: &Conversation,
    learn: Learn,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
) -> Result<ChatTokens, String> {
    let rendered = template.render(chat, chat.messages.len(), false)?;
    let answers = match rendered.generated {
        Some(generated) => generated,
        None => answers(chat, &rendered.text, template)?,
    };
    if answers.is_empty() && learn != Learn::All {
        return Err("nothing is learnt from it: no answer of the assistant".into());
    }
    let contents = contents(chat, &rendered.text, &answers);
    let mut out = ChatTokens::default();
    let mut add = |range: Range<usize>, answer: Option<usize>| -> Result<(), String> {
        for (id, place) in tokenizer.encode_template(&rendered.text[range.clone()]).map_err(|e| e.to_string())? {
            let at = range.start + place;
            let said = contents.iter().find(|(range, _)| range.contains(&at)).map(|(_, role)| *role);
            out.tokens.push(id);
            out.roles.push(match answer {
                Some(_) => Role::Assistant,
                None => said.unwrap_or(Role::Template),
            });
            out.learnt.push(match learn {
                Learn::All => true,
                Learn::Assistant => answer.is_some(),
                Learn::Last => answer.is_some_and(|index| index + 1 == answers.len()),
            });
        }
        Ok(())
    };
    let mut end = 0;
    for (index, answer) in answers.iter().enumerate() {
        add(end..answer.start, None)?;
        add(answer.clone(), Some(index))?;
        end = answer.end;
    }
    add(end..rendered.text.len(), None)?;
    Ok(out)
}

fn role_of(message: &Value) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or_default()
}

/// Where the assistant's answers stand, by rendering the conversation up to each of them.
fn answers(chat: &Conversation, text: &str, template: &ChatTemplate) -> Result<Vec<Range<usize>>, String> {
    let mut answers: Vec<Range<usize>> = Vec::new();
    for (index, _) in chat.messages.iter().enumerate().filter(|(_, message)| role_of(message) == "assistant") {
        let refused = |problem: String| format!("the template refuses messages 1 to {}: {problem}", index + 1);
        let after = template.render(chat, index + 1, false).map_err(refused)?.text;
        // Most templates refuse to render no message at all.
        let before = match index {
            0 => header(chat, template, &after)?,
            _ => template.render(chat, index, true).map_err(refused)?.text,
        };
        if !(text.starts_with(&after) && after.starts_with(&before)) {
            return Err(format!(
                "answers cannot be told from the rest: the template renders messages 1 to {} otherwise when they stand \
                 alone, or before an answer, than inside the conversation\n  hint: a template that marks answers with \
                 {{% generation %}} needs no comparing",
                index + 1
            ));
        }
        // An answer that follows another directly begins where that one ends.
        let start = before.len().max(answers.last().map_or(0, |last| last.end));
        answers.push(start..after.len());
    }
    Ok(answers)
}

/// What stands before an answer that opens the conversation.
fn header(chat: &Conversation, template: &ChatTemplate, after: &str) -> Result<String, String> {
    if let Ok(rendered) = template.render(chat, 0, true) {
        return Ok(rendered.text);
    }
    let content = chat.messages[0].get("content").and_then(Value::as_str).unwrap_or_default().trim();
    let start = after.find(content).filter(|_| !content.is_empty());
    start.map(|start| after[..start].to_owned()).ok_or_else(|| "its first message is an empty answer".to_owned())
}

/// Where the texts of all other messages stand, between the answers, with their roles.
fn contents(chat: &Conversation, text: &str, answers: &[Range<usize>]) -> Vec<(Range<usize>, Role)> {
    let (mut found, mut from, mut next_answer) = (Vec::new(), 0, answers.iter());
    for message in &chat.messages {
        let role = match role_of(message) {
            "assistant" => {
                from = next_answer.next().map_or(from, |answer| answer.end);
                continue;
            }
            "system" | "developer" => Role::System,
            "user" => Role::User,
            _ => Role::Tool,
        };
        let content = message.get("content").and_then(Value::as_str).unwrap_or_default().trim();
        let Some(start) = text[from..].find(content).filter(|_| !content.is_empty()).map(|at| from + at) else {
            continue;
        };
        found.push((start..start + content.len(), role));
        from = start + content.len();
    }
    found
}

#[cfg(test)]
mod tests;
