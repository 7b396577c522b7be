//! Spans: some of the tokens, as they are written, and what they mean of the tokens of a pass.

use std::ops::Range;

use polyhead_attention::{ConfigError, Positions, require};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Context, Decode};
use crate::Role;

/// Some of the tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(
    untagged,
    expecting = "\"all\", \"system\", \"context\", \"question\", \"response\", \"prompt\", \"first\" or \"last_prompt_token\", a range \
                 { from = 0, to = 4 }, a text { text = \"Paris\" }, or the rest of the prompt { outside = [\"question\"] }"
)]
pub enum Span {
    /// By name.
    Named(SpanName),
    /// By position.
    Range(RangeConfig),
    /// By what they say.
    Text(TextSpan),
    /// By what they do not belong to.
    Outside(OutsideSpan),
}

impl Default for Span {
    fn default() -> Self {
        Self::Named(SpanName::All)
    }
}

/// Positions by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RangeConfig {
    /// The first position, from 0.
    pub from: usize,
    /// The position behind the last.
    pub to: usize,
}

/// The tokens of a text, wherever it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextSpan {
    /// What to look for, to the letter.
    pub text: String,
}

/// The tokens of the prompt that belong to none of some spans.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OutsideSpan {
    /// The spans.
    pub outside: Vec<Span>,
}

impl Span {
    /// Itself, or the spans that it is outside of.
    pub fn parts(&self) -> Vec<&Self> {
        match self {
            Self::Outside(OutsideSpan { outside }) => outside.iter().flat_map(Self::parts).collect(),
            other => vec![other],
        }
    }

    /// Whether each token of a text belongs to it.
    pub fn of_text(&self, tokens: &[u32], decode: &Decode) -> Vec<bool> {
        let context = Context { rows: 1, tokens, prompt: tokens.len(), ..Context::default() };
        of_row(self, 0, &context, Some(decode))
    }

    pub(super) fn validate(&self, field: &str) -> Result<(), ConfigError> {
        match self {
            Self::Named(_) => Ok(()),
            Self::Range(RangeConfig { from, to }) => {
                require(from < to, field, || format!("{field} is from {from} to {to}, which are no positions"))
            }
            Self::Text(TextSpan { text }) => {
                require(!text.is_empty(), field, || format!("{field}.text is empty: give some text to look for"))
            }
            Self::Outside(OutsideSpan { outside }) => {
                require(!outside.is_empty(), field, || format!("{field}.outside is empty: name spans, or \"prompt\""))?;
                outside.iter().try_for_each(|span| span.validate(field))
            }
        }
    }
}

/// Tokens that have a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SpanName {
    /// Every token
    All,
    /// Instructions that come before, in conversations and generated tasks
    System,
    /// What an answer can be read off: what a tool gave back, what users said before their last turn, what a generated task shows
    Context,
    /// The last turn of the user; in generated tasks everything that is asked
    Question,
    /// What the assistant says, answers of generated tasks, and what is generated
    Response,
    /// Every token that is not generated
    Prompt,
    /// The first token, the usual attention sink
    First,
    /// The token that the first generated one is predicted from; in a conversation the one before the first answer
    LastPromptToken,
}

impl SpanName {
    /// Whether it depends on whose tokens are whose.
    pub fn needs_roles(self) -> bool {
        matches!(self, Self::System | Self::Context | Self::Question | Self::Response)
    }
}

/// Tokens of the prompt, or those that are generated behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The prompt.
    Prefill,
    /// What is generated.
    Decode,
    /// Both.
    #[default]
    Both,
}

/// The positions of a span in a phase; `decode` is needed where a text is searched.
pub(super) fn positions(span: &Span, phase: Phase, context: &Context<'_>, decode: Option<&Decode>) -> Positions {
    let within = |range: Range<usize>| match phase {
        Phase::Prefill => Positions::Range(range.start..range.end.min(context.prompt)),
        Phase::Decode => Positions::Range(range.start.max(context.prompt)..range.end),
        Phase::Both => Positions::Range(range),
    };
    match (span, phase) {
        (Span::Named(SpanName::All), Phase::Both) => Positions::All,
        (Span::Named(SpanName::All), _) => within(0..usize::MAX),
        (Span::Named(SpanName::Prompt), _) => within(0..context.prompt),
        (Span::Named(SpanName::First), _) if context.documents.is_empty() => within(0..1),
        (Span::Range(RangeConfig { from, to }), _) => within(*from..*to),
        _ => {
            let mut rows = rows_of(span, context, decode);
            if phase == Phase::Decode {
                rows.iter_mut().for_each(|row| row.fill(false));
            }
            let beyond = *span == Span::Named(SpanName::Response) && phase != Phase::Prefill;
            Positions::Rows { rows: rows.into(), beyond }
        }
    }
}

/// Of each row of the prompt, whether a token belongs to a span.
pub(super) fn rows_of(span: &Span, context: &Context<'_>, decode: Option<&Decode>) -> Vec<Vec<bool>> {
    (0..context.rows.max(1)).map(|row| of_row(span, row, context, decode)).collect()
}

/// The same of several spans together.
pub(super) fn rows_of_any(spans: &[Span], context: &Context<'_>, decode: Option<&Decode>) -> Vec<Vec<bool>> {
    let each: Vec<Vec<Vec<bool>>> = spans.iter().map(|span| rows_of(span, context, decode)).collect();
    let row = |row: usize| (0..context.prompt).map(|at| each.iter().any(|span| span[row][at])).collect();
    (0..context.rows.max(1)).map(row).collect()
}

pub(super) fn of_row(span: &Span, row: usize, context: &Context<'_>, decode: Option<&Decode>) -> Vec<bool> {
    let Context { tokens, roles, documents, prompt, .. } = *context;
    let range = row * prompt..(row + 1) * prompt;
    let roles = roles.get(range.clone());
    match span {
        Span::Text(TextSpan { text }) => match (tokens.get(range), decode) {
            (Some(tokens), Some(decode)) => found(text, tokens, decode),
            _ => vec![false; prompt],
        },
        Span::Range(RangeConfig { from, to }) => (0..prompt).map(|at| (*from..*to).contains(&at)).collect(),
        Span::Outside(OutsideSpan { outside }) => {
            let inside: Vec<_> = outside.iter().map(|span| of_row(span, row, context, decode)).collect();
            let nobody = |at: usize| roles.is_some_and(|roles| roles[at] == Role::Padding);
            (0..prompt).map(|at| !nobody(at) && inside.iter().all(|span| !span[at])).collect()
        }
        Span::Named(name) => {
            let of_document =
                |length: usize, from: usize| of_name(*name, length, roles.map(|own| &own[from..from + length]));
            match documents.get(range) {
                None => of_document(prompt, 0),
                Some(documents) => {
                    let mut from = 0;
                    let each = documents.chunk_by(|a, b| a == b).flat_map(|document| {
                        from += document.len();
                        of_document(document.len(), from - document.len())
                    });
                    each.collect()
                }
            }
        }
    }
}

/// Which tokens of a text, or of a conversation with these roles, belong to a span.
fn of_name(name: SpanName, length: usize, roles: Option<&[Role]>) -> Vec<bool> {
    let (from, to) = match name {
        SpanName::All | SpanName::Prompt => (0, length),
        SpanName::First => (0, 1),
        SpanName::LastPromptToken => {
            let answer = roles.and_then(|roles| roles.iter().position(|&role| role == Role::Assistant));
            let last = answer.unwrap_or(length).saturating_sub(1);
            (last, last + 1)
        }
        _ => return roles.map_or_else(|| vec![false; length], |roles| of_role(name, roles)),
    };
    (0..length).map(|at| (from..to).contains(&at)).collect()
}

/// Which tokens of a conversation belong to a span.
fn of_role(name: SpanName, roles: &[Role]) -> Vec<bool> {
    // The last turn of the user: a run of tokens, in which a template may write.
    let last = roles.iter().rposition(|&role| role == Role::User).map_or(0, |last| last + 1);
    let other = |&role: &Role| !matches!(role, Role::User | Role::Template);
    let first = roles[..last].iter().rposition(other).map_or(0, |other| other + 1);
    let question = |at: usize| (first..last).contains(&at) && roles[at] == Role::User;
    let belongs = |at: usize| match name {
        SpanName::System => roles[at] == Role::System,
        SpanName::Question => question(at) || roles[at] == Role::Question,
        SpanName::Context => roles[at] == Role::Tool || (roles[at] == Role::User && !question(at)),
        _ => roles[at] == Role::Assistant,
    };
    (0..roles.len()).map(belongs).collect()
}

/// The tokens of every place where `text` is.
fn found(text: &str, tokens: &[u32], decode: &Decode) -> Vec<bool> {
    // What a token stands for may depend on those before it: ends are measured in the text so far.
    let ends: Vec<usize> = (1..=tokens.len()).map(|count| decode(&tokens[..count]).len()).collect();
    let whole = decode(tokens);
    let mut chosen = vec![false; tokens.len()];
    for (start, _) in whole.match_indices(text) {
        let end = start + text.len();
        for (at, chosen) in chosen.iter_mut().enumerate() {
            let from = if at == 0 { 0 } else { ends[at - 1] };
            *chosen |= from < end && ends[at] > start;
        }
    }
    chosen
}
