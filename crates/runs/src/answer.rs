//! What a model writes: prompts as tokens, where an answer ends, and its text as it arrives.

use std::ops::{ControlFlow, Range};

use polyhead_data::chat::{chat_template, end_of_answer};
use polyhead_data::{StreamDecoder, Tokenizer};
use polyhead_models::{Continuation, Decoder, Past, Request, Role, Sampling, continue_all};
use polyhead_recipe::Problems;
use serde_json::Value;

use crate::error::Failure;

/// What a model goes on from.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Its tokens, at least one.
    pub ids: Vec<u32>,
    /// Whose each of them is; empty where it is no conversation.
    pub roles: Vec<Role>,
    /// Tokens that end what the model writes.
    pub stops: Vec<u32>,
}

impl Prompt {
    /// A text that the model continues, behind the token that begins texts, where the tokenizer puts one. Where there is no
    /// text, the model starts one.
    ///
    /// # Errors
    /// If the tokenizer cannot encode it.
    pub fn plain(tokenizer: &Tokenizer, text: &str) -> Result<Self, Failure> {
        let mut ids = tokenizer.encode_prompt(text)?;
        if ids.is_empty() {
            ids.push(tokenizer.end_of_text().unwrap_or(0));
        }
        Ok(Self { ids, roles: Vec::new(), stops: tokenizer.end_of_text().into_iter().collect() })
    }

    /// Messages (objects with `role` and `content`) that the model answers, in the tokenizer's chat template.
    ///
    /// # Errors
    /// If there is no template, or it refuses the messages.
    pub fn chat(tokenizer: &Tokenizer, messages: &[Value]) -> Result<Self, Failure> {
        if tokenizer.chat_template().is_none() {
            let problem = "the model has no chat template: it has not been fine-tuned on conversations\n  hint: \
                           `polyhead generate --prompt` continues plain text (docs: Fine-tune on chats)";
            return Err(Problems::plain(problem.into()).into());
        }
        let template = chat_template("chat template", "tokenizer", tokenizer)?;
        let refused = |problem: String| Failure::Run(format!("the chat template refuses the messages: {problem}"));
        let rendered = template.prompt(messages).map_err(refused)?;
        let whose = whose(&rendered, messages);
        let tokens = tokenizer.encode_template(&rendered)?.into_iter();
        let role = |place: usize| {
            let own = whose.iter().find(|(range, _)| range.contains(&place));
            own.map_or(Role::Template, |(_, role)| *role)
        };
        let (ids, roles) = tokens.map(|(id, place)| (id, role(place))).unzip();
        Ok(Self { ids, roles, stops: stops(tokenizer)? })
    }

    /// The same, which these tokens end too.
    pub fn ending_at(mut self, ends: &[u32]) -> Self {
        self.stops.extend(ends);
        self
    }
}

/// Where the texts of messages are in a rendered conversation, in their order, and whose they are.
fn whose(rendered: &str, messages: &[Value]) -> Vec<(Range<usize>, Role)> {
    let mut from = 0;
    let mut found = Vec::new();
    for message in messages {
        let text = message.get("content").and_then(Value::as_str).map_or("", str::trim);
        let Some(at) = rendered[from..].find(text).filter(|_| !text.is_empty()) else { continue };
        let range = from + at..from + at + text.len();
        from = range.end;
        let role = match message.get("role").and_then(Value::as_str) {
            Some("assistant") => Role::Assistant,
            Some("system" | "developer") => Role::System,
            Some("user") => Role::User,
            _ => Role::Tool,
        };
        found.push((range, role));
    }
    found
}

/// The tokens after which a model has said what it has to say: the end of a text, and that of an answer in its chat template,
/// where it is a token of its own.
///
/// # Errors
/// If the template cannot be read.
pub fn stops(tokenizer: &Tokenizer) -> Result<Vec<u32>, Failure> {
    let mut stops: Vec<u32> = tokenizer.end_of_text().into_iter().collect();
    if tokenizer.chat_template().is_some() {
        let end = end_of_answer(&chat_template("chat template", "tokenizer", tokenizer)?, tokenizer)?;
        stops.extend(end.filter(|id| !stops.contains(id)));
    }
    Ok(stops)
}

/// Text up to the first of some strings, as it arrives: what may be the beginning of one is held back.
#[derive(Debug, Default)]
pub struct Until<'a> {
    strings: &'a [String],
    held: String,
    reached: bool,
}

impl<'a> Until<'a> {
    /// Up to the first of these; empty ones are never found.
    pub fn new(strings: &'a [String]) -> Self {
        Self { strings, ..Self::default() }
    }

    fn strings(&self) -> impl Iterator<Item = &'a str> {
        self.strings.iter().map(String::as_str).filter(|string| !string.is_empty())
    }

    /// What can be shown now that `text` has arrived.
    pub fn push(&mut self, text: &str) -> String {
        if self.reached {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(at) = self.strings().filter_map(|string| self.held.find(string)).min() {
            self.reached = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let begins_one =
            |at: &usize| self.strings().any(|string| string.as_bytes().starts_with(&self.held.as_bytes()[*at..]));
        let from = (0..self.held.len()).find(begins_one).unwrap_or(self.held.len());
        // A character of the text is never cut: a string begins where one of its characters does.
        let rest = self.held.split_off(from);
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether one of the strings has come.
    pub fn reached(&self) -> bool {
        self.reached
    }

    /// What is still held back, at the end.
    pub fn rest(self) -> String {
        if self.reached { String::new() } else { self.held }
    }
}

/// Why a model stopped writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop token or a stop string came.
    Stop,
    /// As many tokens as were allowed.
    Length,
}

impl Finish {
    /// As it is called elsewhere, too.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What a model wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The text, without what ended it.
    pub text: String,
    /// Its tokens, without the stop token.
    pub tokens: Vec<u32>,
    /// The stop token, if one came.
    pub stop: Option<u32>,
    /// Why there is no more.
    pub finish: Finish,
}

/// An answer that is being written.
struct Writing<'a> {
    stream: StreamDecoder<'a>,
    until: Until<'a>,
    text: String,
}

impl<'a> Writing<'a> {
    fn new(tokenizer: &'a Tokenizer, until: &'a [String]) -> Self {
        Self { stream: StreamDecoder::new(tokenizer), until: Until::new(until), text: String::new() }
    }

    /// The text that can be shown now that a token has come.
    fn push(&mut self, token: u32) -> String {
        let new = self.stream.push(token).map(|new| self.until.push(&new)).unwrap_or_default();
        self.text.push_str(&new);
        new
    }

    /// The text that was held back, and the whole answer.
    fn end(mut self, tokens: Vec<u32>, stop: Option<u32>) -> (String, Answer) {
        let unfinished = self.until.push(&self.stream.rest());
        let finish = if stop.is_some() || self.until.reached() { Finish::Stop } else { Finish::Length };
        let rest = unfinished + &self.until.rest();
        self.text.push_str(&rest);
        (rest, Answer { text: self.text, tokens, stop, finish })
    }
}

/// What a model writes after a prompt, up to a stop token or one of the strings `until`. Text is handed to `show` as it comes.
/// `past` is kept, so that a prompt that goes on from this answer costs its new tokens only.
///
/// # Errors
/// The first one of `show`, which ends it.
pub fn answer(
    (model, tokenizer): (&Decoder, &Tokenizer),
    past: &mut Past,
    prompt: &Prompt,
    (sampling, until): (&Sampling, &[String]),
    show: &mut dyn FnMut(&str) -> Result<(), Failure>,
) -> Result<Answer, Failure> {
    let (mut writing, mut shown) = (Writing::new(tokenizer, until), Ok(()));
    past.roles.clone_from(&prompt.roles);
    let (tokens, stop) = past.generate(model, &prompt.ids, sampling, &prompt.stops, |token| {
        let new = writing.push(token);
        if !new.is_empty() {
            shown = show(&new);
        }
        if shown.is_err() || writing.until.reached() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    shown?;
    let (rest, answer) = writing.end(tokens, stop);
    if !rest.is_empty() {
        show(&rest)?;
    }
    Ok(answer)
}

/// A prompt, and how it is answered.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// What the model goes on from.
    pub prompt: &'a Prompt,
    /// How tokens are chosen, and how many.
    pub sampling: &'a Sampling,
    /// Strings before which the answer ends.
    pub until: &'a [String],
    /// Which of the streams of random numbers of its seed it draws from.
    pub stream: u64,
}

/// Gets the place of a question, its new text after every token (which may be none), and in the end the whole answer; may break
/// the answer off.
pub type Hear<'a> = &'a mut dyn FnMut(usize, &str, Option<Answer>) -> ControlFlow<()>;

/// What a model writes after many prompts. Those of one length are read together: there is no padding, so that each gets what it
/// would get alone. Asks `go_on` before every token; `None` once it says no.
pub fn answers(
    (model, tokenizer): (&Decoder, &Tokenizer),
    questions: &[Question],
    hear: Hear<'_>,
    go_on: &dyn Fn() -> bool,
) -> Option<()> {
    // Roles are known of all prompts of a call or of none.
    let alike = |at: usize| (questions[at].prompt.ids.len(), questions[at].prompt.roles.is_empty());
    let (nothing, mut order): (Vec<usize>, Vec<usize>) =
        (0..questions.len()).partition(|&at| questions[at].sampling.max_new_tokens == 0);
    for at in nothing {
        let _ = hear(at, "", Some(Writing::new(tokenizer, &[]).end(Vec::new(), None).1));
    }
    order.sort_by_key(|&at| alike(at));
    for group in order.chunk_by(|&a, &b| alike(a) == alike(b)) {
        let of = |&at: &usize| {
            let Question { prompt, sampling, stream, .. } = questions[at];
            Request { prompt: &prompt.ids, roles: &prompt.roles, sampling, stops: &prompt.stops, stream }
        };
        let requests: Vec<Request> = group.iter().map(of).collect();
        let mut writing: Vec<Option<Writing>> =
            group.iter().map(|&at| Some(Writing::new(tokenizer, questions[at].until))).collect();
        let mut on_token = |row: usize, written: &Continuation| {
            let Some(mut now) = writing[row].take() else { return ControlFlow::Break(()) };
            let token = written.tokens.last().filter(|_| written.stop.is_none());
            let mut new = token.map(|&token| now.push(token)).unwrap_or_default();
            let full = written.tokens.len() >= requests[row].sampling.max_new_tokens;
            if !(written.stop.is_some() || full || now.until.reached()) {
                writing[row] = Some(now);
                return hear(group[row], &new, None);
            }
            let (rest, answer) = now.end(written.tokens.clone(), written.stop);
            new.push_str(&rest);
            let _ = hear(group[row], &new, Some(answer));
            ControlFlow::Break(())
        };
        continue_all(model, &requests, &mut on_token, go_on)?;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown of pieces, and whether the end came.
    fn shown(strings: &[&str], pieces: &[&str]) -> (Vec<String>, String, bool) {
        let strings: Vec<String> = strings.iter().map(|&string| string.into()).collect();
        let mut until = Until::new(&strings);
        let parts = pieces.iter().map(|piece| until.push(piece)).collect();
        let reached = until.reached();
        (parts, until.rest(), reached)
    }

    #[test]
    fn text_ends_before_the_first_stop_string() {
        let parts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        assert_eq!(shown(&["\n\n"], &["a\n", "b\n", "\nc"]), (parts(&["a", "\nb", ""]), String::new(), true));
        assert_eq!(shown(&["END", "E"], &["xEN", "D"]), (parts(&["x", ""]), String::new(), true));
        // What only looked like a beginning is shown, in the end too.
        assert_eq!(shown(&["ENDE"], &["EN", "EN"]), (parts(&["", "EN"]), "EN".into(), false));
        assert_eq!(shown(&[""], &["a"]), (parts(&["a"]), String::new(), false));
        assert_eq!(shown(&["é!"], &["caf", "é", "?"]), (parts(&["caf", "", "é?"]), String::new(), false));
    }
}
