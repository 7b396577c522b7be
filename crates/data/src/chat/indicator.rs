//! `data.chat.indicator`: a token of its own behind what users say where the answer depends on the context (arXiv 2411.02688), by the
//! scores that `polyhead score-context` writes. A user asks with it for an answer from the context.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use polyhead_models::marked_message;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Conversation;
use crate::DataError;
use crate::error::At;
use crate::problem::{Problem, require};

/// Settings of the indicator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IndicatorConfig {
    /// The score above which an answer depends on its context. Default: 0.6, as published.
    #[serde(default = "above")]
    pub above: f64,
    /// The scores of the answers: what `polyhead score-context` wrote about the one file of data.chat.paths.
    pub scores: PathBuf,
    /// The token, which the tokenizer and the model get where they lack it: its row is the mean of all others. Default: "[IND]".
    #[serde(default = "token")]
    pub token: String,
}

fn above() -> f64 {
    0.6
}

fn token() -> String {
    "[IND]".into()
}

impl IndicatorConfig {
    pub(super) fn validate(&self, paths: &[String]) -> Result<(), Problem> {
        require(self.above.is_finite(), "indicator.above", || format!("above ({}) must be a number", self.above))?;
        let plain = !self.token.is_empty() && !self.token.contains(char::is_whitespace);
        require(plain, "indicator.token", || {
            format!("token ({:?}) must be a word without spaces, such as \"[IND]\"", self.token)
        })?;
        require(paths.len() == 1, "indicator", || {
            format!("data.chat.indicator takes scores of one file, and data.chat.paths names {}", paths.len())
        })
    }
}

/// Scores by the line of the conversation and the place of the answer in it.
pub(super) struct Scores<'a> {
    config: &'a IndicatorConfig,
    scores: HashMap<(u64, u64), Option<f64>>,
}

impl<'a> Scores<'a> {
    /// Reads them.
    ///
    /// # Errors
    /// If the file is missing, or a line is not a score.
    pub(super) fn read(config: &'a IndicatorConfig) -> Result<Self, DataError> {
        let path: &Path = &config.scores;
        let text = std::fs::read_to_string(path).at(path)?;
        let mut scores = HashMap::new();
        for (line, text) in (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()) {
            let score = score(text).map_err(|problem| DataError::Row { path: path.to_owned(), line, problem })?;
            scores.insert((score.0, score.1), score.2);
        }
        Ok(Self { config, scores })
    }

    /// Marks what the user said before each answer; gives how many messages got the token. `line` is the conversation's, from 1.
    pub(super) fn mark(&self, chat: &mut Conversation, line: usize) -> Result<usize, String> {
        let mut marked = 0;
        for answer in 0..chat.messages.len() {
            if !is_answer(&chat.messages[answer]) {
                continue;
            }
            let Some(user) = (0..answer).rev().find(|&at| chat.messages[at]["role"] == "user") else { continue };
            if chat.messages[user + 1..answer].iter().any(is_answer) {
                continue; // what the user said belongs to the answer before
            }
            let score = self.scores.get(&(line as u64, answer as u64)).copied().ok_or_else(|| {
                format!(
                    "{} has no score for message {answer} (from 0): `polyhead score-context MODEL --data FILE` writes one for each \
                     answer",
                    self.config.scores.display()
                )
            })?;
            let (Some(score), Some(text)) = (score, chat.messages[user]["content"].as_str()) else { continue };
            let text = marked_message(text, score, self.config.above, &self.config.token);
            marked += usize::from(score > self.config.above);
            chat.messages[user]["content"] = Value::String(text);
        }
        Ok(marked)
    }
}

/// Whether a message has a score: what an assistant says without a text, as in calling a tool, has none.
fn is_answer(message: &Value) -> bool {
    message["role"] == "assistant" && message["content"].as_str().is_some_and(|text| !text.trim().is_empty())
}

/// Line, message and score of a line of the file.
fn score(text: &str) -> Result<(u64, u64, Option<f64>), String> {
    let value: Value = serde_json::from_str(text).map_err(|error| format!("invalid JSON: {error}"))?;
    let whole = |key: &str| value[key].as_u64().ok_or_else(|| format!("no whole number \"{key}\": {value}"));
    let score = match &value["score"] {
        Value::Null if value.get("score").is_some() => None,
        score => Some(score.as_f64().ok_or_else(|| format!("no number \"score\": {value}"))?),
    };
    Ok((whole("row")?, whole("message")?, score))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::Folder;

    fn chat() -> Conversation {
        let say = |role: &str, content: &str| serde_json::json!({ "role": role, "content": content });
        let messages = vec![say("user", "Who"), say("assistant", "me"), say("user", "Why?"), say("assistant", "so")];
        Conversation { messages, tools: None }
    }

    fn config(path: PathBuf) -> IndicatorConfig {
        IndicatorConfig { above: 0.6, scores: path, token: token() }
    }

    #[test]
    fn messages_before_answers_that_depend_on_them_are_marked() {
        let dir = Folder::new();
        let rows = "{\"row\": 2, \"message\": 1, \"score\": 0.6}\n{\"row\": 2, \"message\": 3, \"score\": 0.7}\n";
        let config = config(dir.write("scores.jsonl", rows));
        let scores = Scores::read(&config).unwrap();
        let mut marked = chat();
        assert_eq!(scores.mark(&mut marked, 2), Ok(1));
        assert_eq!(
            (&marked.messages[0]["content"], &marked.messages[2]["content"]),
            (&"Who.".into(), &"Why? [IND]".into())
        );
        // A call of a tool is no answer: message 3 is the first one to what the user said first.
        let mut calls = chat();
        calls.messages[1]["content"] = "".into();
        calls.messages[2]["role"] = "tool".into();
        assert_eq!(scores.mark(&mut calls, 2), Ok(1));
        assert_eq!(calls.messages[0]["content"], "Who. [IND]");
        let error = scores.mark(&mut chat(), 1).unwrap_err();
        assert!(error.contains("no score for message 1") && error.contains("score-context"), "{error}");
    }

    #[test]
    fn scores_that_are_none_are_named_by_line() {
        let dir = Folder::new();
        for (row, words) in [
            ("{\"row\": 1}", "no number \"score\""),
            ("{\"message\": 1, \"score\": 0.5}", "no whole number \"row\""),
            ("score", "invalid JSON"),
        ] {
            let config = config(dir.write("scores.jsonl", format!("\n{row}\n")));
            let error = Scores::read(&config).err().unwrap().to_string();
            assert!(error.contains("scores.jsonl:2") && error.contains(words), "{error}");
        }
        let config = config(dir.path().join("none.jsonl"));
        assert!(Scores::read(&config).err().unwrap().to_string().contains("none.jsonl"));
        let problem = |paths: usize| config.validate(&vec![String::new(); paths]);
        assert!(problem(1).is_ok() && problem(2).unwrap_err().problem.contains("names 2"));
        assert_eq!(
            IndicatorConfig { token: "a b".into(), ..config }.validate(&[String::new()]).unwrap_err().field,
            "indicator.token"
        );
    }
}
