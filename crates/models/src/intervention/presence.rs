//! In how many rows the spans of an intervention are: what is checked before it is used on them.

use super::{Context, Intervention, RangeConfig, Span, SpanName, TextSpan, spans};

/// A span of an intervention, and in how many rows it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Presence {
    /// Its place in the file.
    pub field: String,
    /// The span.
    pub span: Span,
    /// Rows that have it.
    pub rows: usize,
}

impl Presence {
    /// That it is in none of `among`, which is said in words.
    pub fn missing(&self, among: &str) -> String {
        match &self.span {
            Span::Text(TextSpan { text }) => {
                format!("text ({text:?}) is nowhere in {among}: it is searched to the letter")
            }
            Span::Range(RangeConfig { from, .. }) => {
                format!("from ({from}) is behind the end of {among}: positions count from 0")
            }
            _ => format!("the span {} is nowhere in {among}", self.written()),
        }
    }

    /// As it is written, in JSON.
    pub fn written(&self) -> String {
        serde_json::to_string(&self.span).unwrap_or_default()
    }

    /// Whether it depends on the roles of tokens alone, which a text may have or not.
    pub fn is_role(&self) -> bool {
        matches!(&self.span, Span::Named(name) if name.needs_roles())
    }
}

impl Intervention {
    /// In how many rows of `context` each span is, where rows end at `length` positions, those that are generated among them. Of what
    /// an edit is outside of, texts and ranges alone are counted.
    pub fn presence(&self, context: &Context<'_>, length: usize) -> Vec<Presence> {
        let there = |span: &Span, row: usize| match span {
            Span::Text(TextSpan { text }) => {
                let tokens = context.tokens.get(row * context.prompt..(row + 1) * context.prompt);
                tokens.zip(self.decode.as_ref()).is_some_and(|(tokens, decode)| decode(tokens).contains(text))
            }
            Span::Range(RangeConfig { from, .. }) => *from < length,
            Span::Named(SpanName::Response) if length > context.prompt => true,
            _ => spans::of_row(span, row, context, None).contains(&true),
        };
        let counted = |(field, span): (String, &Span)| Presence {
            field,
            span: span.clone(),
            rows: (0..context.rows.max(1)).filter(|&row| there(span, row)).count(),
        };
        self.counted_spans().map(counted).collect()
    }
}
