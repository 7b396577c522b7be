//! A conversation as tokens: which of them are learned, and whose each is.
//!
//! What is learned of an answer is what a model has to write itself (`turns.rs`). Templates that render an answer otherwise once
//! more follows (Qwen 3's strips the thoughts of earlier answers) give several texts: the whole conversation, of which those
//! answers are learned that stand in it as they are written, and for the others the conversation up to them.

use std::collections::BTreeMap;
use std::ops::Range;

use polyhead_models::Role;
use serde_json::Value;

use super::columns::Conversation;
use super::complete::complete;
use super::message_spans::message_spans;
use super::template::{ChatTemplate, Given, Rendered};
use super::turns::{Turn, role_of, turns};
use super::weights::weight;
use super::{ChatTokens, Learn, limits};
use crate::Tokenizer;

/// Up to so many messages each text is searched for whose its parts are; of more the places in the whole text are kept. Chosen
/// by us.
const SEARCHED: usize = 96;
/// Bytes of a text whose tokens are not counted, where it is too long anyway. Chosen by us.
const LONG: usize = 16 << 20;

/// What may become of a text that is longer than a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// It is kept, and whoever gets it decides.
    Any,
    /// The same, unless it is so long that its tokens would fill the memory.
    Told(usize),
    /// It is left out.
    Most(usize),
    /// Its end is cut off; it is left out where nothing to learn is left.
    Cut(usize),
}

/// A text of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Text {
    /// In tokens.
    Tokens(ChatTokens),
    /// In tokens, without its end.
    Cut(ChatTokens),
    /// Left out, as it is too long.
    TooLong,
}

/// How a conversation becomes tokens.
#[derive(Clone, Copy)]
pub(super) struct Rules<'a> {
    pub(super) learn: Learn,
    pub(super) template: &'a ChatTemplate,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) room: Room,
    /// Bytes that one token may stand for, where that is known.
    pub(super) longest: Option<usize>,
}

/// A conversation in tokens: one text, or several that begin alike, the whole conversation first where anything of it is
/// learned.
///
/// # Errors
/// If the template refuses it, leaves something out, or answers cannot be told apart from the rest.
pub(crate) fn tokenize(
    chat: &Conversation,
    learn: Learn,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
) -> Result<Vec<ChatTokens>, String> {
    let rules = Rules { learn, template, tokenizer, room: Room::Any, longest: None };
    let texts = limits::on_deep_stack(|| texts(chat, rules))??;
    let tokens = |text| match text {
        Text::Tokens(tokens) | Text::Cut(tokens) => Some(tokens),
        Text::TooLong => None,
    };
    Ok(texts.into_iter().filter_map(tokens).collect())
}

/// The texts of a conversation, in tokens where they fit. None where the conversation says that none of it is to be learned.
pub(super) fn texts(chat: &Conversation, rules: Rules<'_>) -> Result<Vec<Text>, String> {
    let Rules { learn, template, .. } = rules;
    let weights = chat.messages.iter().map(|message| Ok(weight(message)? != Some(false)));
    let wanted = weights.collect::<Result<Vec<bool>, String>>()?;
    let (chat, given, whole) = complete(chat, template)?;
    let Rendered { text: whole, generated } = whole;
    let this = Whole { chat: &chat, given: &given, text: &whole, wanted: &wanted, rules, spans: Default::default() };
    let nothing = || "nothing is learned from it: no answer of the assistant".to_owned();
    if let Some(generated) = generated {
        if generated.is_empty() && learn != Learn::All {
            return Err(nothing());
        }
        let answers = this.generated(generated)?;
        if learn != Learn::All && answers.iter().all(|(_, learned)| !learned) {
            return Ok(Vec::new());
        }
        this.says_something(&[&whole])?;
        return Ok(vec![this.tokens(Part { count: chat.messages.len(), shared: whole.len(), tail: "" }, answers)?]);
    }
    let places = || this.places().iter().map(|(range, index)| (*index, range.clone())).collect::<BTreeMap<_, _>>();
    let turns = match (turns((&chat, &given), &whole, template, &places), learn) {
        (turns, Learn::Assistant | Learn::Last) => turns?,
        // Everything is learned: where answers stand is of interest only to whom shows them.
        (turns, Learn::All) => turns.unwrap_or_default(),
    };
    if turns.is_empty() && learn != Learn::All {
        return Err(nothing());
    }
    let own = |turn: &Turn| format!("{}{}", &whole[turn.start.min(turn.shared)..turn.shared], turn.tail);
    let own: Vec<String> = turns.iter().map(own).collect();
    this.says_something(&own.iter().map(String::as_str).collect::<Vec<_>>())?;
    this.several(&turns)
}

/// A text that begins like the whole one: so many messages, so many bytes in common, and what follows.
#[derive(Clone, Copy)]
struct Part<'a> {
    count: usize,
    shared: usize,
    tail: &'a str,
}

struct Whole<'a> {
    chat: &'a Conversation,
    given: &'a Given,
    text: &'a str,
    /// Of each message, whether it may be learned.
    wanted: &'a [bool],
    rules: Rules<'a>,
    spans: std::cell::OnceCell<Vec<(Range<usize>, usize)>>,
}

impl Whole<'_> {
    /// Where the texts of all messages are in the whole.
    fn places(&self) -> &[(Range<usize>, usize)] {
        let all: Vec<usize> = (0..self.chat.messages.len()).collect();
        let whole = (self.text, self.chat.messages.len());
        self.spans.get_or_init(|| message_spans((self.chat, self.given), whole, &all, self.rules.template))
    }

    /// What the template marks as answers, and which of it is learned.
    fn generated(&self, ranges: Vec<Range<usize>>) -> Result<Vec<(Range<usize>, bool)>, String> {
        let last = ranges.len();
        let of_learn = |index: usize| self.rules.learn != Learn::Last || index + 1 == last;
        let mut answers: Vec<(Range<usize>, bool)> =
            ranges.into_iter().enumerate().map(|(index, range)| (range, of_learn(index))).collect();
        let spoken: Vec<usize> = (0..self.wanted.len()).filter(|&index| self.is_answer(index)).collect();
        if spoken.iter().all(|&index| self.wanted[index]) {
            return Ok(answers);
        }
        for (place, &index) in spoken.iter().enumerate().filter(|(_, index)| !self.wanted[**index]) {
            let span = self.places().iter().find(|(_, other)| *other == index).map(|(range, _)| range.clone());
            let same = spoken.len() == answers.len();
            let found = match span {
                Some(span) => answers.iter().position(|(range, _)| range.start <= span.start && span.end <= range.end),
                None => Some(place).filter(|_| same),
            };
            let Some(found) = found else {
                let number = index + 1;
                return Err(format!(
                    "message {number} is not to be learned (weight 0), and where the template writes it cannot be found"
                ));
            };
            answers[found].1 = false;
        }
        Ok(answers)
    }

    fn is_answer(&self, index: usize) -> bool {
        role_of(&self.chat.messages[index]) == "assistant"
    }

    /// Refuses a template that writes nothing of what the assistant says.
    fn says_something(&self, answers: &[&str]) -> Result<(), String> {
        let words = |message: &Value| {
            let content = message.get("content").and_then(Value::as_str)?;
            content.split_whitespace().next_back().map(str::to_owned)
        };
        let spoken = self.chat.messages.iter().filter(|message| role_of(message) == "assistant");
        let mut spoken = spoken.filter_map(words).peekable();
        if spoken.peek().is_none() {
            return Ok(());
        }
        let few = !answers.is_empty() && answers.len() <= 64;
        if spoken
            .any(|word| if few { answers.iter().any(|text| text.contains(&word)) } else { self.text.contains(&word) })
        {
            return Ok(());
        }
        let name = self.rules.template.name();
        Err(format!(
            "the chat template writes nothing of what the assistant says: a name in it may be misspelled (data.chat.template \
             \"{name}\")"
        ))
    }

    /// The whole, and the beginnings in which answers stand that the whole has otherwise.
    fn several(&self, turns: &[Turn]) -> Result<Vec<Text>, String> {
        let learn = self.rules.learn;
        let mut left: Vec<&Turn> = match learn {
            Learn::Last => turns.last().into_iter().collect(),
            _ => turns.iter().collect(),
        };
        left.retain(|turn| self.wanted[turn.index]);
        let mut part = Part { count: self.chat.messages.len(), shared: self.text.len(), tail: "" };
        let mut out = Vec::new();
        if left.is_empty() && learn != Learn::All {
            return Ok(out);
        }
        loop {
            let stands = |turn: &Turn| turn.index < part.count && turn.stands_in(self.text, part.shared, part.tail);
            let (inside, rest): (Vec<&Turn>, Vec<&Turn>) = left.iter().partition(|turn| stands(turn));
            if !inside.is_empty() || learn == Learn::All {
                let learned: std::collections::BTreeSet<usize> = inside.iter().map(|turn| turn.index).collect();
                let mut answers: Vec<(Range<usize>, bool)> = Vec::new();
                for turn in turns.iter().filter(|turn| stands(turn)) {
                    // An answer that follows another directly begins where that one ends.
                    let start = turn.start.max(answers.last().map_or(0, |(last, _)| last.end));
                    answers.push((start..turn.len(), learned.contains(&turn.index)));
                }
                out.push(self.tokens(part, answers)?);
                // It ends the run: the others need not be made.
                let ends = |most: usize| match out.last() {
                    Some(Text::Tokens(chat)) => chat.tokens.len() > most,
                    _ => true,
                };
                if matches!(self.rules.room, Room::Told(most) if ends(most)) {
                    return Ok(out);
                }
            }
            // The last of them ends the next text, so that each time fewer are left.
            let Some(last) = rest.last().filter(|_| learn != Learn::All) else { return Ok(out) };
            part = Part { count: last.index + 1, shared: last.shared, tail: &last.tail };
            left = rest;
        }
    }

    fn tokens(&self, part: Part<'_>, answers: Vec<(Range<usize>, bool)>) -> Result<Text, String> {
        let Rules { learn, tokenizer, room, longest, .. } = self.rules;
        let length = part.shared + part.tail.len();
        let most = match room {
            Room::Any => usize::MAX,
            Room::Told(most) | Room::Most(most) | Room::Cut(most) => most,
        };
        // So many bytes cannot be few enough tokens.
        let surely = longest.is_some_and(|longest| length.div_ceil(longest) > most);
        let first = answers.iter().find(|(_, learned)| *learned).map_or(length, |(range, _)| range.start);
        let hopeless = longest.is_some_and(|longest| first.div_ceil(longest) > most) && learn != Learn::All;
        let left_out = match room {
            Room::Any => false,
            Room::Told(_) => length > LONG,
            Room::Most(_) => true,
            Room::Cut(_) => hopeless,
        };
        if surely && left_out {
            return Ok(Text::TooLong);
        }
        let most = if matches!(room, Room::Told(_)) { usize::MAX } else { most };
        let text = format!("{}{}", &self.text[..part.shared], part.tail);
        let mut cuts = vec![0, text.len()];
        if !tokenizer.marks_beginnings() {
            // So that an answer begins with the token with which a model has to begin it, too.
            cuts.extend(answers.iter().flat_map(|(range, _)| [range.start, range.end]));
            cuts.sort_unstable();
            cuts.dedup();
        }
        let (mut tokens, mut places) = (Vec::new(), Vec::new());
        for piece in cuts.windows(2) {
            if tokens.len() > most {
                break;
            }
            let ids = tokenizer.encode_template(&text[piece[0]..piece[1]]).map_err(|error| error.to_string())?;
            tokens.extend(ids.iter().map(|(id, _)| *id));
            places.extend(ids.iter().map(|(_, place)| piece[0] + place));
        }
        let long = tokens.len() > most;
        if long && matches!(room, Room::Most(_)) {
            return Ok(Text::TooLong);
        }
        tokens.truncate(most);
        places.truncate(most);
        let said = self.said(part, &text, answers.len());
        let within = |at: usize| {
            let next = answers.partition_point(|(range, _)| range.end <= at);
            answers.get(next).filter(|(range, _)| range.contains(&at)).map(|(_, learned)| *learned)
        };
        let whose = |at: usize| {
            let next = said.partition_point(|(range, _)| range.end <= at);
            said.get(next).filter(|(range, _)| range.contains(&at)).map(|(_, index)| *index)
        };
        let mut out = ChatTokens { tokens, ..ChatTokens::default() };
        for at in places {
            let (answer, message) = (within(at), whose(at));
            let role = message.map_or(Role::Template, |index| role(&self.chat.messages[index]));
            out.roles.push(answer.map_or(role, |_| Role::Assistant));
            let all = learn == Learn::All && message.is_none_or(|index| self.wanted[index]);
            out.learned.push(answer.unwrap_or(all));
        }
        Ok(match long {
            true if out.learned.iter().skip(1).any(|&learned| learned) => Text::Cut(out),
            true => Text::TooLong,
            false => Text::Tokens(out),
        })
    }

    /// Where the texts of messages are in a text, in its order. What the template writes itself belongs to nobody.
    fn said(&self, part: Part<'_>, text: &str, answers: usize) -> Vec<(Range<usize>, usize)> {
        let all_answers = (0..part.count).filter(|&index| self.is_answer(index)).count() == answers;
        let asked: Vec<usize> = (0..part.count).filter(|&index| !all_answers || !self.is_answer(index)).collect();
        let kept = |(range, index): &&(Range<usize>, usize)| {
            range.end <= part.shared && (!all_answers || !self.is_answer(*index))
        };
        if self.chat.messages.len() > SEARCHED {
            return self.places().iter().filter(kept).cloned().collect();
        }
        message_spans((self.chat, self.given), (text, part.count), &asked, self.rules.template)
    }
}

fn role(message: &Value) -> Role {
    match role_of(message) {
        "assistant" => Role::Assistant,
        "system" | "developer" => Role::System,
        "user" => Role::User,
        _ => Role::Tool,
    }
}
