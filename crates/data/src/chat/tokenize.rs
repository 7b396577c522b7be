//! A conversation as tokens: which of them are learnt, and whose each is.
//!
//! Where an answer stands is found by rendering the conversation up to it, with and without it: the one must be a beginning
//! of the other. What is learnt is then what a model has to write itself. Templates that render an answer otherwise once
//! more follows (Qwen 3's strips the thoughts of earlier answers) give several texts: the whole conversation, of which those
//! answers are learnt that stand in it as they are written, and for the others the conversation up to them.

use std::ops::Range;

use polyhead_models::Role;
use serde_json::Value;

use super::columns::{Conversation, part_text};
use super::template::{ChatTemplate, Rendered};
use super::written::written;
use super::{ChatTokens, Learn};
use crate::Tokenizer;

/// A conversation in tokens: one text, or several that begin alike, the whole conversation first where anything of it is
/// learnt.
///
/// # Errors
/// If the template refuses it, leaves something out, or answers cannot be told from the rest.
pub(crate) fn tokenize(
    chat: &Conversation,
    learn: Learn,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
) -> Result<Vec<ChatTokens>, String> {
    let (chat, whole) = written(chat, template)?;
    let texts = texts(&chat, whole, learn, template)?;
    texts.iter().map(|text| tokens(&chat, text, learn, template, tokenizer)).collect()
}

/// The beginning of a conversation.
struct Text {
    /// Messages in it.
    count: usize,
    text: String,
    /// Where answers stand, and whether they are learnt.
    answers: Vec<(Range<usize>, bool)>,
}

/// An answer as it is written.
struct Turn {
    /// Of its message.
    index: usize,
    /// Bytes before it.
    start: usize,
    /// The conversation up to its end.
    text: String,
}

fn texts(chat: &Conversation, whole: Rendered, learn: Learn, template: &ChatTemplate) -> Result<Vec<Text>, String> {
    let count = chat.messages.len();
    let nothing = || "nothing is learnt from it: no answer of the assistant".to_owned();
    if let Some(generated) = whole.generated {
        if generated.is_empty() && learn != Learn::All {
            return Err(nothing());
        }
        let last = generated.len();
        let answers = generated.into_iter().enumerate();
        let answers = answers.map(|(index, range)| (range, learn != Learn::Last || index + 1 == last)).collect();
        return Ok(vec![Text { count, text: whole.text, answers }]);
    }
    let turns = match (turns(chat, template), learn) {
        (turns, Learn::Assistant | Learn::Last) => turns?,
        // Everything is learnt: where answers stand is of interest only to whom shows them.
        (turns, Learn::All) => turns.unwrap_or_default(),
    };
    let mut left: Vec<&Turn> = match learn {
        Learn::Last => turns.last().into_iter().collect(),
        _ => turns.iter().collect(),
    };
    if left.is_empty() && learn != Learn::All {
        return Err(nothing());
    }
    let (mut text, mut count, mut out) = (whole.text, count, Vec::new());
    loop {
        let stands = |turn: &Turn| turn.index < count && text.starts_with(&turn.text);
        let (inside, rest): (Vec<&Turn>, Vec<&Turn>) = left.iter().partition(|turn| stands(turn));
        let mut answers: Vec<(Range<usize>, bool)> = Vec::new();
        for turn in turns.iter().filter(|turn| stands(turn)) {
            // An answer that follows another directly begins where that one ends.
            let start = turn.start.max(answers.last().map_or(0, |(last, _)| last.end));
            answers.push((start..turn.text.len(), inside.iter().any(|learnt| learnt.index == turn.index)));
        }
        if !inside.is_empty() || learn == Learn::All {
            out.push(Text { count, text, answers });
        }
        // The last of them ends the next text, so that each time fewer are left.
        let Some(last) = rest.last().filter(|_| learn != Learn::All) else { return Ok(out) };
        (text, count, left) = (last.text.clone(), last.index + 1, rest);
    }
}

/// The assistant's answers, by rendering the conversation up to each of them.
fn turns(chat: &Conversation, template: &ChatTemplate) -> Result<Vec<Turn>, String> {
    let mut turns = Vec::new();
    for (index, _) in chat.messages.iter().enumerate().filter(|(_, message)| role_of(message) == "assistant") {
        let refused = |problem: String| format!("the template refuses messages 1 to {}: {problem}", index + 1);
        let text = template.render(chat, index + 1, false).map_err(refused)?.text;
        // Most templates refuse to render no message at all.
        let before = match index {
            0 => header(chat, template, &text)?,
            _ => template.render(chat, index, true).map_err(refused)?.text,
        };
        if !text.starts_with(&before) {
            return Err(format!(
                "answers cannot be told from the rest: the template asks for message {} in another way than it renders it, so \
                 that a model would learn to write what it is never asked for\n  hint: data.chat.template_variables tells a \
                 template what to ask for (enable_thinking = false for answers without thoughts, with Qwen 3's); a template \
                 that marks answers with {{% generation %}} needs no comparing",
                index + 1
            ));
        }
        turns.push(Turn { index, start: before.len(), text });
    }
    Ok(turns)
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

fn tokens(
    chat: &Conversation,
    text: &Text,
    learn: Learn,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
) -> Result<ChatTokens, String> {
    let contents = contents(chat, text, template);
    let mut cuts = vec![0, text.text.len()];
    if !tokenizer.marks_beginnings() {
        // So that an answer begins with the token with which a model has to begin it, too.
        cuts.extend(text.answers.iter().flat_map(|(range, _)| [range.start, range.end]));
        cuts.sort_unstable();
    }
    let mut out = ChatTokens::default();
    for piece in cuts.windows(2) {
        let ids = tokenizer.encode_template(&text.text[piece[0]..piece[1]]).map_err(|error| error.to_string())?;
        for (id, place) in ids {
            let at = piece[0] + place;
            let answer = text.answers.iter().find(|(range, _)| range.contains(&at));
            let said = contents.iter().find(|(range, _)| range.contains(&at)).map(|(_, role)| *role);
            out.tokens.push(id);
            out.roles.push(answer.map_or(said.unwrap_or(Role::Template), |_| Role::Assistant));
            out.learnt.push(learn == Learn::All || answer.is_some_and(|(_, learnt)| *learnt));
        }
    }
    Ok(out)
}

fn role_of(message: &Value) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or_default()
}

/// Where the texts of messages stand, with their roles. What the template writes itself belongs to nobody.
fn contents(chat: &Conversation, text: &Text, template: &ChatTemplate) -> Vec<(Range<usize>, Role)> {
    let messages = &chat.messages[..text.count];
    let role = |message: &Value| match role_of(message) {
        "assistant" => Role::Assistant,
        "system" | "developer" => Role::System,
        "user" => Role::User,
        _ => Role::Tool,
    };
    let spoken = messages.iter().filter(|message| role_of(message) == "assistant").count();
    let all_answers = spoken == text.answers.len();
    let asked = |index: &usize| !all_answers || role_of(&messages[*index]) != "assistant";
    let asked: Vec<usize> = (0..text.count).filter(asked).collect();
    let found = marked(chat, text, &asked, template).unwrap_or_else(|| {
        let one = |&index: &usize| Some((replaced(chat, text, index, template)?, index));
        asked.iter().filter_map(one).collect()
    });
    found.into_iter().map(|(range, index)| (range, role(&messages[index]))).collect()
}

/// Around the texts of messages: one code point for each message that opens it, and one that closes any. Private ones of
/// Unicode, which no text holds by rights.
const OPEN: std::ops::RangeInclusive<u32> = 0x10_0000..=0x10_FFFD;
const CLOSE: char = '\u{F0E0D}';

/// Where the texts of messages stand, by rendering them between marks; `None` where the template renders them otherwise then.
fn marked(
    chat: &Conversation,
    text: &Text,
    which: &[usize],
    template: &ChatTemplate,
) -> Option<Vec<(Range<usize>, usize)>> {
    let mut between = chat.clone();
    for &index in which {
        let open = OPEN.clone().nth(index).and_then(char::from_u32)?;
        // White space around a text stays outside, where templates trim it.
        let around = |said: &str| match said.trim() {
            "" => said.to_owned(),
            trimmed => said.replacen(trimmed, &format!("{open}{trimmed}{CLOSE}"), 1),
        };
        let content = between.messages[index].get_mut("content");
        content.into_iter().for_each(|content| change(content, &around));
    }
    let rendered = template.render(&between, text.count, false).ok()?.text;
    let (mut plain, mut found, mut open) = (String::with_capacity(text.text.len()), Vec::new(), None);
    for sign in rendered.chars() {
        match open {
            _ if OPEN.contains(&u32::from(sign)) => {
                open = Some((plain.len(), (u32::from(sign) - OPEN.start()) as usize))
            }
            Some((start, index)) if sign == CLOSE => {
                found.push((start..plain.len(), index));
                open = None;
            }
            _ => plain.push(sign),
        }
    }
    (plain == text.text).then_some(found)
}

/// Where the text of one message stands, by rendering another in its place.
fn replaced(chat: &Conversation, text: &Text, index: usize, template: &ChatTemplate) -> Option<Range<usize>> {
    let mut other = chat.clone();
    change(other.messages[index].get_mut("content")?, &|_| CLOSE.to_string());
    let rendered = template.render(&other, text.count, false).ok()?.text;
    let (before, behind) = rendered.split_once(CLOSE)?;
    let end = text.text.len().checked_sub(behind.len()).filter(|&end| end > before.len())?;
    (text.text.starts_with(before) && text.text.ends_with(behind)).then_some(before.len()..end)
}

/// Changes the text of a content, or of each of its parts.
fn change(content: &mut Value, new: &dyn Fn(&str) -> String) {
    match content {
        Value::String(said) => *said = new(said),
        Value::Array(parts) => {
            for part in parts {
                match part {
                    Value::String(said) => *said = new(said),
                    part => {
                        if let Some(said) = part_text(part).map(new) {
                            part["text"] = said.into();
                        }
                    }
                }
            }
        }
        _ => {}
    }
}
