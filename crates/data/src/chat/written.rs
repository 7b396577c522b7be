//! What a template writes of a row: all that is in it, or the row is refused.

use serde_json::Value;

use super::columns::{Conversation, part_text};
use super::template::{ChatTemplate, Rendered};

/// A conversation in the form that the template can write, and what it writes.
///
/// # Errors
/// What the template says against it, or what it leaves out.
pub(super) fn written(chat: &Conversation, template: &ChatTemplate) -> Result<(Conversation, Rendered), String> {
    let chat = in_texts(chat, template);
    let whole = render(&chat, template)?;
    let same = |other: &Conversation| render(other, template).is_ok_and(|other| other.text == whole.text);
    let way_out = "\n  hint: use a template that writes tools: the tokenizer's own (template = \"tokenizer\"), if it does, or a \
                   file of Jinja";
    if chat.tools.is_some() && same(&Conversation { tools: None, ..chat.clone() }) {
        return Err(format!("it has tools, of which the template writes nothing{way_out}"));
    }
    let calls = |message: &Value| message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
    for (index, _) in chat.messages.iter().enumerate().filter(|(_, message)| calls(message)) {
        let mut silent = chat.clone();
        if let Some(message) = silent.messages[index].as_object_mut() {
            message.remove("tool_calls");
        }
        if same(&silent) {
            return Err(format!("message {} calls tools, of which the template writes nothing{way_out}", index + 1));
        }
    }
    Ok((chat, whole))
}

fn render(chat: &Conversation, template: &ChatTemplate) -> Result<Rendered, String> {
    template.render(chat, chat.messages.len(), false)
}

/// Contents that are lists of parts as one text each, unless the template writes parts only.
fn in_texts(chat: &Conversation, template: &ChatTemplate) -> Conversation {
    let mut joined = chat.clone();
    let mut texts = Vec::new();
    for message in &mut joined.messages {
        let Some(Value::Array(parts)) = message.get("content") else { continue };
        let text: String = parts.iter().filter_map(part_text).collect();
        // Templates may leave out something of earlier answers.
        if message["role"] != "assistant" {
            texts.extend(parts.iter().filter_map(part_text).map(|text| text.trim().to_owned()));
        }
        message["content"] = text.into();
    }
    let writes = |chat: &Conversation| {
        render(chat, template).is_ok_and(|whole| texts.iter().all(|text| whole.text.contains(text)))
    };
    if joined == *chat || writes(&joined) || !writes(chat) { joined } else { chat.clone() }
}
