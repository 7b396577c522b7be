//! Chat templates: Jinja, as Hugging Face's tokenizers bring them, rendered as transformers renders them.
//!
//! Left out on purpose: `strftime_now`. A text that depends on the day would make every run another one; templates that
//! ask whether it is defined (Llama 3's do) take their constant date.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{Environment, ErrorKind, context};
use serde_json::Value as Json;

use super::columns::Conversation;
use super::python;

/// `<|im_start|>role`, the text, `<|im_end|>`: Qwen's, and many others'.
const CHATML: &str = "\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>' + '\\n' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Llama 3's, without tools.
const LLAMA3: &str = "\
{{- bos_token }}\
{%- for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + (message['content'] or '')|trim + '<|eot_id|>' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";

/// Lines that begin with who speaks; answers end with the token that ends a text. Needs no special tokens.
const PLAIN: &str = "\
{%- for message in messages %}{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + (message['content'] or '') + eos_token + '\\n' }}\
{%- else %}{{ message['role']|capitalize + ': ' + (message['content'] or '') + '\\n' }}{% endif %}{% endfor %}\
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}";

/// Templates that a recipe may name.
pub const BUILT_IN: [(&str, &str); 3] = [("chatml", CHATML), ("llama3", LLAMA3), ("plain", PLAIN)];

/// Around what a `{% generation %}` block wrote. Private code points of Unicode, which no text holds by rights.
const MARKS: [char; 2] = ['\u{F0E0A}', '\u{F0E0B}'];

const ANSWER: &str = "an answer like no other";

/// A chat template, ready to use.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    special: Special,
    marks: bool,
}

/// What a template may call the tokenizer's special tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Special {
    /// Begins a text.
    pub bos: String,
    /// Ends a text.
    pub eos: String,
    /// Fills up.
    pub pad: String,
}

/// A conversation as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rendered {
    pub(super) text: String,
    /// What `{% generation %}` blocks wrote, in bytes; `None` where the template has no such blocks.
    pub(super) generated: Option<Vec<std::ops::Range<usize>>>,
}

impl ChatTemplate {
    /// Reads a template.
    ///
    /// # Errors
    /// If it is no Jinja: the line and what is wrong there.
    pub fn new(source: &str, special: Special) -> Result<Self, String> {
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        environment.set_syntax(syntax.trim_blocks(true).lstrip_blocks(true).build().map_err(|e| e.to_string())?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", |value: Value, options: Kwargs| {
            let indent: Option<usize> = options.get("indent")?;
            options.assert_all_used().or_else(|_| options.get::<Option<Value>>("ensure_ascii").map(|_| ()))?;
            let json = serde_json::to_value(&value)
                .map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, "tojson").with_source(error))?;
            Ok::<_, minijinja::Error>(Value::from_safe_string(python::dumps(&json, indent)))
        });
        environment.add_filter("generation", |text: String| format!("{}{text}{}", MARKS[0], MARKS[1]));
        environment.set_formatter(|out, state, value| match value.kind() {
            ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
            ValueKind::None => Ok(out.write_str("None")?),
            _ => minijinja::escape_formatter(out, state, value),
        });
        let (marked, marks) = with_filters(source);
        environment.add_template_owned("chat", marked).map_err(|error| in_words(&error))?;
        Ok(Self { environment, source: source.to_owned(), special, marks })
    }

    /// The same with variables that a recipe sets. They become part of the text, as defaults, so that whoever uses the model
    /// renders with them, too.
    #[must_use]
    pub fn with_variables(mut self, variables: &BTreeMap<String, Json>) -> Self {
        let mut defaults = String::new();
        for (name, value) in variables {
            self.environment.add_global(name.clone(), Value::from(Serde(value)));
            // JSON is a literal of Jinja's, too.
            defaults.push_str(&format!("{{%- if {name} is not defined %}}{{%- set {name} = {value} %}}{{%- endif %}}"));
        }
        if !defaults.is_empty() {
            // The line break ends the block and is not written.
            self.source = format!("{defaults}\n{}", self.source);
        }
        self
    }

    /// The Jinja text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation, or of its first `count` messages.
    ///
    /// # Errors
    /// What the template says against it.
    pub(super) fn render(&self, chat: &Conversation, count: usize, prompt: bool) -> Result<Rendered, String> {
        let Special { bos, eos, pad } = &self.special;
        let variables = context! {
            messages => Value::from(Serde(&chat.messages[..count])),
            tools => chat.tools.as_ref().map(|tools| Value::from(Serde(tools))),
            documents => Value::from(()),
            add_generation_prompt => prompt,
            bos_token => bos, eos_token => eos, pad_token => pad,
        };
        let template = self.environment.get_template("chat").map_err(|error| in_words(&error))?;
        let text = template.render(variables).map_err(|error| in_words(&error))?;
        Ok(if self.marks { unmarked(&text)? } else { Rendered { text, generated: None } })
    }

    /// The text that asks a model for an answer to these messages.
    ///
    /// # Errors
    /// What the template says against it.
    pub fn prompt(&self, messages: &[Json]) -> Result<String, String> {
        let chat = Conversation { messages: messages.to_vec(), tools: None };
        Ok(self.render(&chat, messages.len(), true)?.text)
    }

    /// What stands behind an answer: how a model says that its turn is over.
    pub fn end_of_turn(&self) -> Option<String> {
        let text = self.probe()?;
        text.split_once(ANSWER).map(|(_, behind)| behind.to_owned()).filter(|behind| !behind.is_empty())
    }

    /// A question with [`ANSWER`], where the template takes it.
    pub(super) fn probe(&self) -> Option<String> {
        let message = |role: &str, content: &str| serde_json::json!({ "role": role, "content": content });
        let chat = Conversation { messages: vec![message("user", "?"), message("assistant", ANSWER)], tools: None };
        Some(self.render(&chat, 2, false).ok()?.text)
    }
}

/// `{% generation %}` of transformers as a filter block, whose white space is treated the same; whether there is any.
fn with_filters(source: &str) -> (String, bool) {
    let (mut out, mut rest, mut found) = (String::new(), source, false);
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let tag = &rest[start + 2..start + length];
        let name = tag.trim_matches(['-', '+', ' ', '\n', '\t']);
        out.push_str(&rest[..start]);
        let tag = match name {
            "generation" => tag.replace("generation", " filter generation "),
            "endgeneration" => tag.replace("endgeneration", " endfilter "),
            _ => tag.to_owned(),
        };
        found |= name == "generation";
        out.push_str(&format!("{{%{tag}%}}"));
        rest = &rest[start + length + 2..];
    }
    (out + rest, found)
}

fn unmarked(marked: &str) -> Result<Rendered, String> {
    let (mut text, mut ranges, mut open) = (String::new(), Vec::new(), None);
    for sign in marked.chars() {
        match (MARKS.iter().position(|&mark| mark == sign), open) {
            (Some(0), None) => open = Some(text.len()),
            (Some(1), Some(start)) => {
                ranges.push(start..text.len());
                open = None;
            }
            (None, _) => text.push(sign),
            _ => return Err("the text holds the code points U+F0E0A or U+F0E0B, which mark answers here".into()),
        }
    }
    Ok(Rendered { text, generated: Some(ranges) })
}

fn in_words(error: &minijinja::Error) -> String {
    let place = error.line().map_or(String::new(), |line| format!("line {line} of the chat template: "));
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    format!("{place}{what}")
}
