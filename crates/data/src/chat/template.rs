//! Chat templates: Jinja, as Hugging Face's tokenizers bring them, rendered as transformers renders them.
//!
//! `strftime_now` tells a fixed day: a text that depends on today's would make every run another one. Templates that ask whether
//! it is defined (Llama 3's do) take their constant date, unless a recipe sets one.

use std::collections::BTreeMap;

use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, context};
use serde_json::Value as Json;

use super::columns::Conversation;
use super::dates::{self, Day};
use super::jinja::MARKS;
use super::{jinja, limits, numbers};
use crate::tokenizer::Special;

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

const ANSWER: &str = "an answer like no other";

/// Before a template whose recipe sets the day that it gets; a comment of Jinja's.
const DATE: [&str; 2] = ["{#- data.chat.date = ", " #}\n"];

/// A chat template, ready to use.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    special: Special,
    marks: bool,
    /// What a recipe calls it.
    name: String,
    day: Option<Day>,
}

/// A conversation as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rendered {
    pub(super) text: String,
    /// What `{% generation %}` blocks wrote, in bytes; `None` where the template has no such blocks.
    pub(super) generated: Option<Vec<std::ops::Range<usize>>>,
}

/// A conversation as templates get it.
#[derive(Clone)]
pub(super) struct Given {
    pub(super) messages: Vec<Value>,
    pub(super) tools: Value,
    /// Of all of it, about.
    pub(super) bytes: usize,
}

impl Given {
    pub(super) fn of(chat: &Conversation) -> Self {
        let messages: Vec<Value> = chat.messages.iter().map(numbers::value).collect();
        let tools = chat.tools.as_ref().map_or(Value::from(()), numbers::value);
        let bytes = chat.messages.iter().chain(&chat.tools).map(size).sum();
        Self { messages, tools, bytes }
    }
}

fn size(json: &Json) -> usize {
    match json {
        Json::String(text) => text.len() + 8,
        Json::Array(items) => items.iter().map(size).sum::<usize>() + 8,
        Json::Object(fields) => fields.iter().map(|(key, item)| key.len() + size(item)).sum::<usize>() + 8,
        _ => 8,
    }
}

impl ChatTemplate {
    /// Reads a template. Every line end counts as one, as in Jinja2, and a byte order mark before it as none of it.
    ///
    /// # Errors
    /// If it is not valid Jinja, or larger than templates may be: the line and what is wrong there.
    pub fn new(source: &str, special: Special) -> Result<Self, String> {
        let source = source.strip_prefix('\u{FEFF}').unwrap_or(source).replace("\r\n", "\n").replace('\r', "\n");
        limits::check(&source)?;
        let day = source.strip_prefix(DATE[0]).and_then(|rest| rest.split_once(DATE[1])).map(|(day, _)| day);
        let day = day.and_then(Day::parse);
        let (marked, marks) = with_filters(&source);
        let environment = limits::on_deep_stack(|| {
            let mut environment = jinja::environment()?;
            environment.add_template_owned("chat", marked)?;
            Ok(environment)
        })?;
        let mut environment = environment.map_err(|error: minijinja::Error| in_words(&error, ""))?;
        if let Some(day) = day.or(default_day(&source)) {
            jinja::tell_day(&mut environment, day);
        }
        Ok(Self { environment, source, special, marks, name: String::new(), day })
    }

    /// The same under the name that errors tell.
    #[must_use]
    pub(super) fn named(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self }
    }

    /// The same with a day for `strftime_now`, which becomes part of the text as a comment.
    #[must_use]
    pub(super) fn with_day(mut self, day: Option<Day>, text: &str) -> Self {
        if let Some(day) = day.filter(|_| self.source.contains("strftime_now")) {
            jinja::tell_day(&mut self.environment, day);
            self.source = format!("{}{text}{}{}", DATE[0], DATE[1], self.source);
            self.day = Some(day);
        }
        self
    }

    /// The day that a template gets that asks for today's, where no recipe sets one.
    pub(super) fn day_by_default(&self) -> Option<&'static str> {
        default_day(&self.source).filter(|_| self.day.is_none()).map(|_| dates::DEFAULT)
    }

    /// The same with variables that a recipe sets. They become part of the text, as defaults, so that whoever uses the model
    /// renders with them, too.
    #[must_use]
    pub fn with_variables(mut self, variables: &BTreeMap<String, Json>) -> Self {
        let mut defaults = String::new();
        for (name, value) in variables {
            self.environment.add_global(name.clone(), numbers::value(value));
            let literal = literal(value);
            defaults
                .push_str(&format!("{{%- if {name} is not defined %}}{{%- set {name} = {literal} %}}{{%- endif %}}"));
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
    pub(super) fn render(&self, chat: &Given, count: usize, prompt: bool) -> Result<Rendered, String> {
        limits::on_deep_stack(|| {
            let Special { bos, eos, pad } = &self.special;
            let variables = context! {
                messages => Value::from(chat.messages[..count].to_vec()),
                tools => chat.tools.clone(),
                documents => Value::from(()),
                add_generation_prompt => prompt,
                bos_token => bos, eos_token => eos, pad_token => pad,
            };
            let mut environment = self.environment.clone();
            environment.set_fuel(Some(limits::steps(chat.bytes)));
            let template = environment.get_template("chat").map_err(|error| in_words(&error, &self.name))?;
            let text = template.render(variables).map_err(|error| in_words(&error, &self.name))?;
            Ok(if self.marks { unmarked(&text)? } else { Rendered { text, generated: None } })
        })?
    }

    /// What a recipe calls the template.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The text that asks a model for an answer to these messages.
    ///
    /// # Errors
    /// What the template says against it.
    pub fn prompt(&self, messages: &[Json]) -> Result<String, String> {
        let chat = Conversation { messages: messages.to_vec(), tools: None };
        Ok(self.render(&Given::of(&chat), messages.len(), true)?.text)
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
        Some(self.render(&Given::of(&chat), 2, false).ok()?.text)
    }
}

/// A template as MiniJinja gets it, and whether it marks answers. `{% generation %}` of transformers becomes a filter block, whose
/// white space is treated the same; what `{% set %}` keeps passes through a filter that bounds it.
fn with_filters(source: &str) -> (String, bool) {
    let (mut out, mut rest, mut marks) = (String::with_capacity(source.len()), source, false);
    while let Some(start) = ["{%", "{{", "{#"].iter().filter_map(|open| rest.find(open)).min() {
        let (length, _) = limits::tag(&rest[start..]);
        let (before, tag) = (&rest[..start], &rest[start + 2..start + 2 + length]);
        let name = tag.trim_matches(['-', '+', ' ', '\n', '\t']);
        let end = start + 2 + length;
        out.push_str(before);
        if !rest[start..].starts_with("{%") {
            out.push_str(&rest[start..end]);
        } else if name == "raw" {
            // As it is, up to its end.
            let raw = rest[end..].find("endraw").map_or(rest.len(), |at| end + at + "endraw".len());
            out.push_str(&rest[start..raw]);
            rest = &rest[raw..];
            continue;
        } else {
            out.push_str("{%");
            out.push_str(&match name {
                "generation" => tag.replace("generation", " filter generation "),
                "endgeneration" => tag.replace("endgeneration", " endfilter "),
                _ => bounded(tag).unwrap_or_else(|| tag.to_owned()),
            });
            marks |= name == "generation";
        }
        rest = &rest[end..];
    }
    (out + rest, marks)
}

/// `set a = b` as `set a = (b) | kept`: lists that are made of lists are lazy, and would grow without a step being counted.
fn bounded(tag: &str) -> Option<String> {
    let body = tag.strip_prefix(['-', '+']).unwrap_or(tag).trim_start();
    body.strip_prefix("set").filter(|rest| rest.starts_with(char::is_whitespace))?;
    let (target, value) = tag.split_once('=')?;
    if target.contains(['"', '\'', '(', '|']) || value.starts_with('=') {
        return None;
    }
    let signs = value.len() - value.trim_end_matches(['-', '+']).len();
    let (value, strip) = value.split_at(value.len() - signs);
    (!value.trim().is_empty()).then(|| format!("{target}=({value}) | kept {strip}"))
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

/// The day for templates that ask for today's without asking first whether they may.
fn default_day(source: &str) -> Option<Day> {
    let asks = |at: usize| {
        let mut words = source[at + "strftime_now".len()..].split_whitespace();
        let next = [words.next(), words.next(), words.next()];
        matches!(next, [Some("is"), Some(word), _] if word.starts_with("defined"))
            || matches!(next, [Some("is"), Some("not"), Some(word)] if word.starts_with("defined"))
    };
    let mut places = source.match_indices("strftime_now").map(|(at, _)| at).peekable();
    places.peek()?;
    if places.any(asks) { None } else { Day::parse(dates::DEFAULT) }
}

/// A value of JSON as Jinja spells it.
fn literal(value: &Json) -> String {
    match value {
        Json::Null => "none".into(),
        Json::Array(items) => format!("[{}]", items.iter().map(literal).collect::<Vec<_>>().join(", ")),
        Json::Object(fields) => {
            let field = |(key, item): (&String, &Json)| format!("{}: {}", Json::from(key.as_str()), literal(item));
            format!("{{{}}}", fields.iter().map(field).collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

fn in_words(error: &minijinja::Error, name: &str) -> String {
    let place = error.line().map_or(String::new(), |line| format!("line {line} of the chat template: "));
    let what = match error.kind() {
        ErrorKind::OutOfFuel => {
            "it takes more steps, or more memory, than a conversation of this length needs, and is stopped".to_owned()
        }
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    let others = ["import", "from", "include", "extends"].map(|word| format!("unknown statement {word}"));
    let what = match others.contains(&what) {
        true => {
            format!("{what}: a template is one file, and has no packages: write into it what it takes from elsewhere")
        }
        false => what,
    };
    let file = if name.is_empty() { String::new() } else { format!(" (data.chat.template \"{name}\")") };
    format!("{place}{what}{file}")
}

/// A template with variables of its own, for tests.
#[cfg(test)]
pub(super) fn rendered_with(source: &str, given: Value) -> Result<String, String> {
    let template = ChatTemplate::new(source, Special::default())?;
    let mut environment = template.environment.clone();
    environment.set_fuel(Some(limits::steps(0)));
    let text = limits::on_deep_stack(|| environment.get_template("chat")?.render(given));
    let text = text?.map_err(|error| in_words(&error, ""))?;
    Ok(text.replace(MARKS, ""))
}
