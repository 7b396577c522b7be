//! Where the texts of messages are in what a template writes.

use std::ops::Range;

use serde_json::Value;

use super::columns::{Conversation, part_text};
use super::numbers;
use super::template::{ChatTemplate, Given};

/// Around the texts of messages: one code point for each message that opens it, and one that closes any. Private ones of
/// Unicode, which no text holds by rights.
const OPEN: std::ops::RangeInclusive<u32> = 0x10_0000..=0x10_FFFD;
const CLOSE: char = '\u{F0E0D}';

/// Places of the texts of `which` messages among the first `count`, in the order of the text, each with its message. Those that
/// cannot be found are left out.
pub(super) fn message_spans(
    chat: (&Conversation, &Given),
    (text, count): (&str, usize),
    which: &[usize],
    template: &ChatTemplate,
) -> Vec<(Range<usize>, usize)> {
    let mut found = Vec::new();
    let mut budget = (200_000 / (count + 1)).max(64);
    search(chat, (text, count), which, template, (&mut found, &mut budget));
    found.sort_by_key(|(range, _)| (range.start, range.end));
    found
}

/// All at once; where the template renders otherwise then, each half apart, so that a few messages which it looks at closely
/// do not hide the others. `budget` renderings at most.
fn search(
    chat: (&Conversation, &Given),
    text: (&str, usize),
    which: &[usize],
    template: &ChatTemplate,
    (found, budget): (&mut Vec<(Range<usize>, usize)>, &mut usize),
) {
    if which.is_empty() || *budget == 0 {
        return;
    }
    *budget -= 1;
    if let Some(all) = marked(chat, text, which, template) {
        found.extend(all);
        return;
    }
    match which {
        [index] => found.extend(replaced(chat, text, *index, template).map(|range| (range, *index))),
        _ => {
            let (first, second) = which.split_at(which.len() / 2);
            search(chat, text, first, template, (found, budget));
            search(chat, text, second, template, (found, budget));
        }
    }
}

/// By rendering them between marks; `None` where the template renders the text otherwise then.
fn marked(
    (chat, given): (&Conversation, &Given),
    (text, count): (&str, usize),
    which: &[usize],
    template: &ChatTemplate,
) -> Option<Vec<(Range<usize>, usize)>> {
    let mut between = given.clone();
    for &index in which {
        let open = OPEN.clone().nth(index).and_then(char::from_u32)?;
        // White space around a text stays outside, where templates trim it.
        let around = |said: &str| match said.trim() {
            "" => said.to_owned(),
            trimmed => said.replacen(trimmed, &format!("{open}{trimmed}{CLOSE}"), 1),
        };
        let mut message = chat.messages[index].clone();
        message.get_mut("content").into_iter().for_each(|content| change(content, &around));
        between.messages[index] = numbers::value(&message);
    }
    let rendered = template.render(&between, count, false).ok()?.text;
    let (mut plain, mut found, mut open) = (String::with_capacity(text.len()), Vec::new(), None);
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
    (plain == text).then_some(found)
}

/// Where the text of one message stands, by rendering another in its place.
fn replaced(
    (chat, given): (&Conversation, &Given),
    (text, count): (&str, usize),
    index: usize,
    template: &ChatTemplate,
) -> Option<Range<usize>> {
    let mut message = chat.messages[index].clone();
    change(message.get_mut("content")?, &|_| CLOSE.to_string());
    let mut other = given.clone();
    other.messages[index] = numbers::value(&message);
    let rendered = template.render(&other, count, false).ok()?.text;
    let (before, behind) = rendered.split_once(CLOSE)?;
    let end = text.len().checked_sub(behind.len()).filter(|&end| end > before.len())?;
    (text.starts_with(before) && text.ends_with(behind)).then_some(before.len()..end)
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
