//! How a row of a file tells a conversation.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::numbers;
use super::weights::weight;

/// A conversation: messages as chat templates read them, and the tools that may be called in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// Objects with `role`, `content` and whatever else a template knows.
    pub messages: Vec<Value>,
    /// As the row gives them.
    pub tools: Option<Value>,
}

/// `[data.chat.columns]`: one of its tables.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ColumnsConfig {
    /// A list of messages with roles system, user, assistant, tool.
    Messages(MessagesColumns),
    /// A list of messages with "from" and "value", as ShareGPT has them.
    Sharegpt(Box<SharegptColumns>),
    /// Columns for an instruction, its input and the output, as Alpaca has them.
    Alpaca(AlpacaColumns),
}

impl Default for ColumnsConfig {
    fn default() -> Self {
        Self::Messages(MessagesColumns::default())
    }
}

/// Names of the columns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MessagesColumns {
    /// The list of messages. Default: "messages".
    pub messages: String,
    /// The list of tools, where there is one. Default: "tools".
    pub tools: String,
    /// A system message that is none of the list, where there is one. Default: "system".
    pub system: String,
}

impl Default for MessagesColumns {
    fn default() -> Self {
        Self { messages: "messages".into(), tools: "tools".into(), system: "system".into() }
    }
}

/// Who has several names in a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a name, or a list of names")]
pub enum Names {
    /// One.
    One(String),
    /// Any of them.
    Several(Vec<String>),
}

impl Names {
    fn has(&self, name: &str) -> bool {
        match self {
            Self::One(one) => one == name,
            Self::Several(all) => all.iter().any(|one| one == name),
        }
    }
}

impl From<&str> for Names {
    fn from(name: &str) -> Self {
        Self::One(name.into())
    }
}

/// Names of the columns, and of who speaks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SharegptColumns {
    /// The list of messages. Default: "conversations".
    pub messages: String,
    /// Who speaks, in each message. Default: "from".
    pub role: String,
    /// What is said. Default: "value".
    pub content: String,
    /// Names of system, of users, of the assistant and of tools: each one name, or a list such as ["gpt", "function_call"].
    /// Defaults: "system", "human", "gpt", "tool".
    pub system: Names,
    /// See `system`.
    pub user: Names,
    /// See `system`.
    pub assistant: Names,
    /// See `system`.
    pub tool: Names,
    /// The column of a system message that is none of the list, where there is one. Default: "system".
    pub system_column: String,
    /// The list of tools, where there is one. Default: "tools".
    pub tools: String,
}

impl Default for SharegptColumns {
    fn default() -> Self {
        let [messages, role, content] = ["conversations", "from", "value"].map(Into::into);
        let [system, user, assistant, tool] = ["system", "human", "gpt", "tool"].map(Into::into);
        let [system_column, tools] = ["system", "tools"].map(Into::into);
        Self { messages, role, content, system, user, assistant, tool, system_column, tools }
    }
}

/// Names of the columns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AlpacaColumns {
    /// What is asked. Default: "instruction".
    pub instruction: String,
    /// What it is asked about, set behind the instruction; may be empty or missing. Default: "input".
    pub input: String,
    /// The answer. Default: "output".
    pub output: String,
    /// A system message, where there is one. Default: "system".
    pub system: String,
}

impl Default for AlpacaColumns {
    fn default() -> Self {
        let [instruction, input, output, system] = ["instruction", "input", "output", "system"].map(Into::into);
        Self { instruction, input, output, system }
    }
}

impl ColumnsConfig {
    /// The columns that are read, of a file that has more.
    pub(super) fn names(&self) -> Vec<&str> {
        match self {
            Self::Messages(names) => vec![&names.messages, &names.tools, &names.system],
            Self::Sharegpt(names) => vec![&names.messages, &names.tools, &names.system_column],
            Self::Alpaca(names) => vec![&names.instruction, &names.input, &names.output, &names.system],
        }
    }

    /// The conversation of a row.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn read(&self, row: &Value) -> Result<Conversation, String> {
        let Some(row) = row.as_object() else { return Err("the row is not an object".into()) };
        let mut chat = match self {
            Self::Messages(names) => {
                let messages = with_system(list(row, &names.messages)?.clone(), row, &names.system)?;
                Conversation { messages, tools: tools(row, &names.tools)? }
            }
            Self::Sharegpt(names) => {
                let messages = list(row, &names.messages)?.iter().map(|message| names.message(message));
                let messages = with_system(messages.collect::<Result<_, String>>()?, row, &names.system_column)?;
                Conversation { messages, tools: tools(row, &names.tools)? }
            }
            Self::Alpaca(names) => {
                let text =
                    |key: &str| row.get(key).and_then(Value::as_str).filter(|text| numbers::literal(text).is_none());
                let need = |key: &str| text(key).ok_or_else(|| missing(row, key));
                let (question, answer) = (need(&names.instruction)?, need(&names.output)?);
                let asked = match text(&names.input).filter(|input| !input.is_empty()) {
                    Some(input) => format!("{question}\n\n{input}"),
                    None => question.to_owned(),
                };
                let message = |role: &str, content: &str| json!({ "role": role, "content": content });
                let system = text(&names.system).filter(|text| !text.is_empty());
                let mut messages: Vec<Value> = system.map(|text| message("system", text)).into_iter().collect();
                messages.extend([message("user", &asked), message("assistant", answer)]);
                Conversation { messages, tools: None }
            }
        };
        check(&mut chat)?;
        Ok(chat)
    }
}

/// What a message of ShareGPT's may say besides: its calls of tools, and whether it is learned (`weights.rs`).
const KEPT: [&str; 7] = ["tool_calls", "weight", "train", "training", "loss", "train_detail", "training_detail"];

impl SharegptColumns {
    fn message(&self, message: &Value) -> Result<Value, String> {
        let text = |key: &str| message.get(key).and_then(Value::as_str).filter(|text| numbers::literal(text).is_none());
        let need = |key: &str| text(key).ok_or_else(|| format!("a message has no text in \"{key}\""));
        let (from, content) = (need(&self.role)?, need(&self.content)?);
        let known =
            [(&self.system, "system"), (&self.user, "user"), (&self.assistant, "assistant"), (&self.tool, "tool")];
        let role = known.iter().find(|(theirs, _)| theirs.has(from)).or(known.iter().find(|(_, ours)| *ours == from));
        let (_, role) = role.ok_or_else(|| {
            format!(
                "the role \"{from}\" is unknown: name the roles in data.chat.columns.sharegpt (assistant = [\"gpt\", \
                 \"{from}\"], for instance)"
            )
        })?;
        let mut read = json!({ "role": role, "content": content });
        for key in KEPT {
            if let Some(value) = message.get(key) {
                read[key] = value.clone();
            }
        }
        Ok(read)
    }
}

/// The messages behind the system message of a column of its own, where there is one.
fn with_system(mut messages: Vec<Value>, row: &Map<String, Value>, key: &str) -> Result<Vec<Value>, String> {
    let text = match row.get(key) {
        None | Some(Value::Null) => return Ok(messages),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(messages),
        Some(Value::String(text)) => text,
        Some(other) => {
            return Err(format!("\"{key}\" is {}, where the text of a system message belongs", kind(other)));
        }
    };
    if messages.first().is_some_and(|first| first.get("role").and_then(Value::as_str) == Some("system")) {
        return Err(format!("it has two system messages: the first message and \"{key}\""));
    }
    messages.insert(0, json!({ "role": "system", "content": text }));
    Ok(messages)
}

/// The tools of a column; `None` where it has none.
fn tools(row: &Map<String, Value>, key: &str) -> Result<Option<Value>, String> {
    match row.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
        Some(value) => {
            let tools = objects(value).map_err(|problem| format!("\"{key}\" {problem}"))?;
            Ok(if tools.is_empty() { None } else { Some(Value::Array(tools)) })
        }
    }
}

/// A list of objects. The list, and each object, may be JSON in a text, as files of tables keep them.
fn objects(value: &Value) -> Result<Vec<Value>, String> {
    let parsed = |value: &Value| match value {
        Value::String(text) => {
            numbers::parse(text.as_bytes()).map_err(|_| "is a text that is not valid JSON".to_owned())
        }
        other => Ok(other.clone()),
    };
    let Value::Array(items) = parsed(value)? else {
        return Err(format!("is {}, where a list of objects belongs", kind(&parsed(value)?)));
    };
    let object = |item: &Value| match parsed(item)? {
        Value::Object(object) => Ok(Value::Object(object)),
        other => Err(format!("is a list that holds {}, where objects belong", kind(&other))),
    };
    items.iter().map(object).collect()
}

fn list<'a>(row: &'a Map<String, Value>, key: &str) -> Result<&'a Vec<Value>, String> {
    row.get(key).and_then(Value::as_array).ok_or_else(|| missing(row, key))
}

fn missing(row: &Map<String, Value>, key: &str) -> String {
    let has = row.keys().cloned().collect::<Vec<_>>().join(", ");
    match row.get(key) {
        Some(other) => format!("\"{key}\" is {}, which does not fit", kind(other)),
        None => format!("no \"{key}\" (the row has {has}); set data.chat.columns"),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(text) if numbers::literal(text).is_some() => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn check(chat: &mut Conversation) -> Result<(), String> {
    if chat.messages.is_empty() {
        return Err("it has no messages".into());
    }
    for (index, message) in chat.messages.iter_mut().enumerate() {
        let number = index + 1;
        without_nulls(message);
        match message.get("role").and_then(Value::as_str) {
            Some("system" | "developer" | "user" | "assistant" | "tool" | "function" | "ipython") => {}
            Some(other) => {
                return Err(format!("message {number} has the role \"{other}\": system, user, assistant or tool"));
            }
            None => return Err(format!("message {number} has no role")),
        }
        let mut calls = false;
        if let Some(field) = message.get_mut("tool_calls").filter(|field| !field.is_null()) {
            let mut all = objects(field).map_err(|problem| format!("\"tool_calls\" of message {number} {problem}"))?;
            all.iter_mut().for_each(without_nulls);
            all.iter_mut().filter_map(|call| call.get_mut("function")).for_each(without_nulls);
            calls = !all.is_empty();
            *field = Value::Array(all);
        }
        match message.get("content") {
            Some(Value::String(text)) if numbers::literal(text).is_none() => {}
            Some(Value::Array(parts)) => {
                if let Some(other) = parts.iter().find(|part| part_text(part).is_none()) {
                    let what = other.get("type").map_or_else(|| kind(other).to_owned(), Value::to_string);
                    return Err(format!("message {number} has a part that is {what}: only text can be learned from"));
                }
            }
            _ if calls => {}
            _ => return Err(format!("message {number} has no content")),
        }
        if let Some(Value::Array(parts)) = message.get_mut("content") {
            parts.iter_mut().for_each(without_nulls);
        }
        weight(message).map_err(|problem| format!("message {number} has {problem}"))?;
    }
    Ok(())
}

/// A key with null counts as absent, as under transformers: tables give every row all columns. Arguments of calls and tools keep
/// theirs, where null is a value.
fn without_nulls(value: &mut Value) {
    if let Some(fields) = value.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
}

/// How many calls of tools have their arguments as JSON in a text, as OpenAI's format has them; decoded if asked.
///
/// # Errors
/// If they are to be decoded and are not a JSON object: the message.
pub(super) fn arguments(chat: &mut Conversation, decode: bool) -> Result<usize, String> {
    let mut count = 0;
    for (index, message) in chat.messages.iter_mut().enumerate() {
        for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            let call = if call.get("function").is_some() { &mut call["function"] } else { call };
            let Some(text) = call.get("arguments").and_then(Value::as_str) else { continue };
            count += 1;
            if decode {
                let read = if text.trim().is_empty() { Ok(json!({})) } else { numbers::parse(text.as_bytes()) };
                call["arguments"] = read.ok().filter(Value::is_object).ok_or_else(|| {
                    format!("a call of message {} has arguments that are a text and not a JSON object", index + 1)
                })?;
            }
        }
    }
    Ok(count)
}

/// The text of a part of a message whose content is a list of parts.
pub(super) fn part_text(part: &Value) -> Option<&str> {
    let is_text = part.get("type").is_none_or(|kind| kind == "text");
    part.as_str().or_else(|| part.get("text").filter(|_| is_text).and_then(Value::as_str))
}
