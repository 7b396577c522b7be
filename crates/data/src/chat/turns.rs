//! Where a conversation's answers stand, and how each is written: by rendering the conversation up to it, with and without it.
//!
//! Each such rendering takes as long as the conversation, and all of them the square of that. Templates treat most turns alike:
//! of a long conversation some answers of each kind are rendered so, and what they have in common (what the template writes
//! before and behind what is said) tells where the others stand. An answer is taken to be of a kind only where the text around
//! it agrees with those that were rendered, byte by byte; one that does not is rendered itself.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use serde_json::Value;

use super::columns::Conversation;
use super::template::{ChatTemplate, Given};

/// Up to so many answers each is rendered itself. This and what follows is chosen by us.
const ALL_RENDERED: usize = 48;
/// Answers of a kind that are rendered where there are more.
const OF_A_KIND: usize = 5;
/// Messages that are rendered for one conversation at most, each rendering counted with all of its messages.
const MOST_RENDERED: usize = 1_000_000;

/// An answer as it is written: a beginning of the whole text, and what stands there instead of its rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Turn {
    /// Of its message.
    pub(super) index: usize,
    /// Bytes before it.
    pub(super) start: usize,
    /// Bytes that the conversation up to its end has in common with the whole one.
    pub(super) shared: usize,
    /// What follows these; empty where answers are not rendered otherwise once more follow.
    pub(super) tail: String,
}

impl Turn {
    /// Bytes of the conversation up to its end.
    pub(super) fn len(&self) -> usize {
        self.shared + self.tail.len()
    }

    /// Whether a text begins with the conversation up to this answer's end: a text that has `shared` bytes of the whole one, and
    /// then `tail`.
    pub(super) fn stands_in(&self, whole: &str, shared: usize, tail: &str) -> bool {
        if self.shared < shared {
            // The text still follows the whole one where this does not any more.
            return self.tail.is_empty();
        }
        let Some(rest) = tail.strip_prefix(&whole[shared..self.shared]) else { return false };
        rest.starts_with(&self.tail)
    }
}

/// The assistant's answers. `spans` are the places of messages' texts in the whole one, where they are known.
///
/// # Errors
/// If the template refuses a beginning of the conversation, asks for an answer otherwise than it renders it, or would have to
/// render too much.
pub(super) fn turns(
    chat: (&Conversation, &Given),
    whole: &str,
    template: &ChatTemplate,
    spans: &dyn Fn() -> BTreeMap<usize, Range<usize>>,
) -> Result<Vec<Turn>, String> {
    let spoken = |&index: &usize| role_of(&chat.0.messages[index]) == "assistant";
    let all: Vec<usize> = (0..chat.0.messages.len()).filter(spoken).collect();
    if all.len() <= ALL_RENDERED {
        return all.iter().map(|&index| rendered(chat, whole, index, template)).collect();
    }
    let spans = spans();
    let mut kinds: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for &index in &all {
        kinds.entry(kind(chat.0, index, &spans)).or_default().push(index);
    }
    let (mut found, mut budget) = (BTreeMap::new(), MOST_RENDERED);
    let mut render = |index: usize| {
        budget = budget.checked_sub(2 * index + 1).ok_or_else(|| {
            format!(
                "it has {} answers, and finding them takes more than {MOST_RENDERED} messages to render, as the template \
                 writes each in its own way\n  hint: divide the conversation, or use a template that marks answers \
                 with {{% generation %}}",
                all.len()
            )
        })?;
        rendered(chat, whole, index, template)
    };
    for alike in kinds.values() {
        let last = alike.len() - 1;
        let mut sampled: Vec<usize> = (0..OF_A_KIND).map(|k| alike[last * k / (OF_A_KIND - 1)]).collect();
        sampled.dedup();
        for &index in &sampled {
            found.insert(index, render(index)?);
        }
        let common: Option<Vec<Around>> =
            sampled.iter().map(|index| Around::of(&found[index], whole, &spans)).collect();
        let common = common.filter(|all| all.windows(2).all(|pair| pair[0] == pair[1])).and_then(|mut all| all.pop());
        for &index in alike {
            if let Entry::Vacant(place) = found.entry(index) {
                let alike = common.as_ref().and_then(|around| around.turn(index, whole, spans.get(&index)?));
                place.insert(alike.map_or_else(|| render(index), Ok)?);
            }
        }
    }
    Ok(found.into_values().collect())
}

/// What may make a template treat an answer otherwise than another: who speaks before and behind it, what keys these messages
/// have, and what their texts look like.
fn kind(chat: &Conversation, index: usize, spans: &BTreeMap<usize, Range<usize>>) -> String {
    let message = |at: Option<usize>| {
        let Some(message) = at.and_then(|at| chat.messages.get(at)) else { return "none".to_owned() };
        let keys = message.as_object().map(|fields| fields.keys().map(String::as_str).collect::<Vec<_>>().join(","));
        let text = message.get("content").and_then(Value::as_str).unwrap_or_default();
        let shape = [
            text.is_empty(),
            text.trim() != text,
            text.contains('<'),
            text.contains('['),
            text.contains('\n'),
            message.get("tool_calls").is_some_and(|calls| calls.as_array().is_some_and(|calls| !calls.is_empty())),
        ];
        format!("{}({}){shape:?}", role_of(message), keys.unwrap_or_default())
    };
    let around = [index.checked_sub(2), index.checked_sub(1), Some(index), Some(index + 1)].map(message);
    format!("{} {}", around.join(" "), spans.contains_key(&index))
}

/// What the template writes around what is said in answers of a kind.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Around {
    /// In the whole text: before what is said, from where the conversation up to the answer differs or the answer begins.
    before: String,
    /// In the whole text, behind what is said.
    behind: String,
    /// In the conversation up to the answer, in place of `before` and of `behind`.
    opening: String,
    closing: String,
    /// Bytes of `opening` before the answer.
    start: usize,
}

impl Around {
    /// `None` where what is said does not stand in the answer as it stands in the whole.
    fn of(turn: &Turn, whole: &str, spans: &BTreeMap<usize, Range<usize>>) -> Option<Self> {
        let span = spans.get(&turn.index)?;
        let from = turn.shared.min(span.start).min(turn.start);
        // Beginnings of a conversation are one text up to here.
        let own = format!("{}{}", whole.get(from..turn.shared)?, turn.tail);
        let said = whole.get(span.clone()).filter(|said| !said.is_empty())?;
        let at = own.rfind(said)?;
        let closing = own[at + said.len()..].to_owned();
        let behind = whole.get(span.end..)?.get(..closing.len())?.to_owned();
        let (before, opening) = (whole.get(from..span.start)?.to_owned(), own[..at].to_owned());
        Some(Self { before, behind, opening, closing, start: turn.start - from })
    }

    /// An answer of this kind, whose text stands at `span`; `None` where the text around it is another.
    fn turn(&self, index: usize, whole: &str, span: &Range<usize>) -> Option<Turn> {
        let from = span.start.checked_sub(self.before.len())?;
        if whole.get(from..span.start)? != self.before || !whole.get(span.end..)?.starts_with(&self.behind) {
            return None;
        }
        let own = format!("{}{}{}", self.opening, whole.get(span.clone())?, self.closing);
        let shared = common(&own, &whole[from..]);
        Some(Turn { index, start: from + self.start, shared: from + shared, tail: own[shared..].to_owned() })
    }
}

/// Bytes that two texts begin with alike, to the border of a character.
pub(super) fn common(one: &str, other: &str) -> usize {
    let mut length = one.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
    while !one.is_char_boundary(length) || !other.is_char_boundary(length) {
        length -= 1;
    }
    length
}

/// An answer by rendering the conversation up to it.
fn rendered(
    (chat, given): (&Conversation, &Given),
    whole: &str,
    index: usize,
    template: &ChatTemplate,
) -> Result<Turn, String> {
    let refused = |problem: String| format!("the template refuses messages 1 to {}: {problem}", index + 1);
    let text = template.render(given, index + 1, false).map_err(refused)?.text;
    // Most templates refuse to render no message at all.
    let before = match index {
        0 => header((chat, given), template, &text)?,
        _ => template.render(given, index, true).map_err(refused)?.text,
    };
    if !text.starts_with(&before) {
        return Err(format!(
            "answers cannot be told apart from the rest: the template asks for message {} in another way than it renders it, so that a \
             model would learn to write what it is never asked for\n  hint: data.chat.template_variables tells a template what to \
             ask for (enable_thinking = false for answers without thoughts, with Qwen 3's); a template that marks answers with \
             {{% generation %}} needs no comparing",
            index + 1
        ));
    }
    let shared = common(&text, whole);
    Ok(Turn { index, start: before.len(), shared, tail: text[shared..].to_owned() })
}

/// What stands before an answer that opens the conversation.
fn header((chat, given): (&Conversation, &Given), template: &ChatTemplate, after: &str) -> Result<String, String> {
    if let Ok(rendered) = template.render(given, 0, true) {
        return Ok(rendered.text);
    }
    let content = chat.messages[0].get("content").and_then(Value::as_str).unwrap_or_default().trim();
    let start = after.find(content).filter(|_| !content.is_empty());
    start.map(|start| after[..start].to_owned()).ok_or_else(|| "its first message is an empty answer".to_owned())
}

pub(super) fn role_of(message: &Value) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or_default()
}
