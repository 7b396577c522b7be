//! What a template writes of a row: all that is in it, or the row is refused.

use serde_json::Value;

use super::columns::{Conversation, part_text};
use super::template::{ChatTemplate, Given, Rendered};

/// More messages that call tools than this are looked for all at once, as each alone takes a rendering of the whole.
const ONE_BY_ONE: usize = 16;

/// A conversation in the form that the template can write, and what it writes.
///
/// # Errors
/// What the template says against it, or what it leaves out.
pub(super) fn complete(
    chat: &Conversation,
    template: &ChatTemplate,
) -> Result<(Conversation, Given, Rendered), String> {
    let (chat, given) = in_texts(chat, template);
    let whole = render(&given, template)?;
    if whole.text.trim().is_empty() {
        let name = template.name();
        return Err(format!(
            "the chat template writes nothing of it: a name in it may be misspelled (data.chat.template \"{name}\")"
        ));
    }
    let same = |other: &Given| render(other, template).is_ok_and(|other| other.text == whole.text);
    let way_out = "\n  hint: use a template that writes tools: the tokenizer's own (template = \"tokenizer\"), if it does, or a \
                   file of Jinja";
    if chat.tools.is_some() && same(&Given { tools: ().into(), ..given.clone() }) {
        return Err(format!("it has tools, of which the template writes nothing{way_out}"));
    }
    let calls = |message: &Value| message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
    let mut calling: Vec<usize> = (0..chat.messages.len()).filter(|&index| calls(&chat.messages[index])).collect();
    if calling.len() > ONE_BY_ONE {
        let found = found(&chat, &calling, template);
        calling.retain(|index| !found.contains(index));
    }
    for index in calling {
        let mut silent = chat.messages[index].clone();
        if let Some(message) = silent.as_object_mut() {
            message.remove("tool_calls");
        }
        let mut other = given.clone();
        other.messages[index] = super::numbers::value(&silent);
        if same(&other) {
            return Err(format!("message {} calls tools, of which the template writes nothing{way_out}", index + 1));
        }
    }
    Ok((chat, given, whole))
}

/// Of messages that call tools those whose calls are to be seen in the text, by marking the names of what is called.
fn found(chat: &Conversation, calling: &[usize], template: &ChatTemplate) -> Vec<usize> {
    let mut between = chat.clone();
    for &index in calling {
        for call in between.messages[index]["tool_calls"].as_array_mut().into_iter().flatten() {
            let call = if call.get("function").is_some() { &mut call["function"] } else { call };
            if let Some(name) = call["name"].as_str() {
                call["name"] = format!("{name}\u{F0E0D}{index}\u{F0E0D}").into();
            }
        }
    }
    let Ok(rendered) = render(&Given::of(&between), template) else { return Vec::new() };
    rendered.text.split('\u{F0E0D}').skip(1).step_by(2).filter_map(|index| index.parse().ok()).collect()
}

fn render(chat: &Given, template: &ChatTemplate) -> Result<Rendered, String> {
    template.render(chat, chat.messages.len(), false)
}

/// Contents that are lists of parts as one text each, unless the template writes parts only.
fn in_texts(chat: &Conversation, template: &ChatTemplate) -> (Conversation, Given) {
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
    let given = Given::of(&joined);
    if joined == *chat {
        return (joined, given);
    }
    let writes =
        |chat: &Given| render(chat, template).is_ok_and(|whole| texts.iter().all(|text| whole.text.contains(text)));
    let parts = Given::of(chat);
    if writes(&given) || !writes(&parts) { (joined, given) } else { (chat.clone(), parts) }
}
