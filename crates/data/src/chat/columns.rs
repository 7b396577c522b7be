//! How a row of a file tells a conversation.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

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
    Sharegpt(SharegptColumns),
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
}

impl Default for MessagesColumns {
    fn default() -> Self {
        Self { messages: "messages".into(), tools: "tools".into() }
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
    /// Names of system, of users, of the assistant and of tools. Defaults: "system", "human", "gpt", "tool".
    pub system: String,
    /// See `system`.
    pub user: String,
    /// See `system`.
    pub assistant: String,
    /// See `system`.
    pub tool: String,
}

impl Default for SharegptColumns {
    fn default() -> Self {
        let [messages, role, content] = ["conversations", "from", "value"].map(Into::into);
        let [system, user, assistant, tool] = ["system", "human", "gpt", "tool"].map(Into::into);
        Self { messages, role, content, system, user, assistant, tool }
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
    /// The conversation of a row.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn read(&self, row: &Value) -> Result<Conversation, String> {
        let Some(row) = row.as_object() else { return Err("the row is no object".into()) };
        let chat = match self {
            Self::Messages(names) => {
                let tools = row.get(&names.tools).filter(|tools| !tools.is_null()).cloned();
                Conversation { messages: list(row, &names.messages)?.clone(), tools }
            }
            Self::Sharegpt(names) => {
                let read = |message: &Value| {
                    let text = |key: &str| message.get(key).and_then(Value::as_str);
                    let from =
                        text(&names.role).ok_or_else(|| format!("a message has no text in \"{}\"", names.role))?;
                    let content = text(&names.content)
                        .ok_or_else(|| format!("a message has no text in \"{}\"", names.content))?;
                    let known = [
                        (&names.system, "system"),
                        (&names.user, "user"),
                        (&names.assistant, "assistant"),
                        (&names.tool, "tool"),
                    ];
                    let role = known.iter().find(|(theirs, ours)| *theirs == from || *ours == from);
                    let (_, role) = role.ok_or_else(|| {
                        format!("\"{from}\" speaks, whom nobody knows: name the roles in data.chat.columns.sharegpt")
                    })?;
                    Ok(json!({ "role": role, "content": content }))
                };
                let messages = list(row, &names.messages)?.iter().map(read).collect::<Result<_, String>>()?;
                Conversation { messages, tools: None }
            }
            Self::Alpaca(names) => {
                let text = |key: &str| row.get(key).and_then(Value::as_str);
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
        check(&chat)?;
        Ok(chat)
    }
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
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn check(chat: &Conversation) -> Result<(), String> {
    if chat.messages.is_empty() {
        return Err("it has no messages".into());
    }
    for (index, message) in chat.messages.iter().enumerate() {
        let number = index + 1;
        match message.get("role").and_then(Value::as_str) {
            Some("system" | "developer" | "user" | "assistant" | "tool" | "function" | "ipython") => {}
            Some(other) => {
                return Err(format!("message {number} has the role \"{other}\": system, user, assistant or tool"));
            }
            None => return Err(format!("message {number} has no role")),
        }
        let said = message.get("content").is_some_and(|content| content.is_string() || content.is_array());
        if !said && message.get("tool_calls").is_none() {
            return Err(format!("message {number} has no content"));
        }
    }
    Ok(())
}
