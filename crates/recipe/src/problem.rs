//! Mistakes in a recipe: file, line, column, the line itself with a caret, and a way out.

use std::fmt;
use std::ops::Range;

/// More of a line is not shown; chosen by us.
const LONGEST_LINE: usize = 160;

/// One mistake in a recipe.
#[derive(Debug, Clone)]
pub struct Problem {
    message: String,
    hint: Option<String>,
    place: Option<Place>,
}

#[derive(Debug, Clone)]
struct Place {
    source: String,
    line: usize,
    column: usize,
    text: String,
    length: usize,
}

impl Problem {
    /// One that has no place in a recipe.
    pub fn plain(message: String) -> Self {
        Self { message, hint: None, place: None }
    }

    /// About a span of bytes of a text.
    pub fn in_text(source: &str, text: &str, span: Option<Range<usize>>, message: String) -> Self {
        let span = span.unwrap_or(0..0);
        let start = span.start.min(text.len());
        let before = text.get(..start).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let line_text = text.get(line_start..).unwrap_or_default().lines().next().unwrap_or_default();
        let column = text.get(line_start..start).unwrap_or_default().chars().count() + 1;
        // A line of a file that is no recipe may be the whole file.
        let line_text = line_text.chars().take(column.max(LONGEST_LINE)).map(visible).collect();
        let length =
            text.get(start..span.end.max(start)).map_or(1, |part| part.lines().next().unwrap_or("").chars().count());
        let place = Place {
            source: source.to_owned(),
            line: before.matches('\n').count() + 1,
            column,
            length: length.max(1),
            text: line_text,
        };
        Self { message, hint: None, place: Some(place) }
    }

    /// Said about one of several.
    pub fn about(self, who: &str) -> Self {
        Self { message: format!("{who}: {}", self.message), ..self }
    }

    /// Its words behind its file and line, for a note.
    pub fn in_a_line(&self) -> String {
        let place = self.place.as_ref().map(|Place { source, line, .. }| format!("{source}:{line}: "));
        format!("{}{}", place.unwrap_or_default(), self.message.trim_end())
    }

    /// With a way out.
    pub fn hint(self, hint: Option<String>) -> Self {
        Self { hint, ..self }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message.trim_end())?;
        if let Some(place) = &self.place {
            let Place { source, line, column, text, length } = place;
            if *line == 0 {
                write!(f, "\n  --> {source}")?;
            } else {
                let number = line.to_string();
                let margin = " ".repeat(number.len());
                write!(f, "\n{margin}--> {source}:{line}:{column}\n{margin} |\n{number} | {text}\n{margin} | ")?;
                write!(f, "{}{}", " ".repeat(column - 1), "^".repeat(*length))?;
            }
        }
        if let Some(hint) = &self.hint {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

/// A sign for a control character, as wide as the caret below takes it to be: what is in a file must not steer the terminal.
fn visible(sign: char) -> char {
    match sign {
        '\t' => sign,
        '\u{7f}' => '\u{2421}',
        '\0'..='\u{1f}' => char::from_u32(0x2400 + sign as u32).unwrap_or('\u{fffd}'),
        sign if sign.is_control() => '\u{fffd}',
        sign => sign,
    }
}

/// What serde says about a wrong type, for people who do not know Rust.
pub fn in_words(message: &str) -> String {
    let message = message.trim_end().split("\nin `").next().unwrap_or_default();
    let Some((found, expected)) = message.rsplit_once("expected ") else { return message.to_owned() };
    let expected = match expected {
        "u64" | "usize" | "u32" => "a whole number, 0 or more",
        "f64" | "f32" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list, such as [\"a\", \"b\"]",
        "path string" | "a string" => "text",
        table if table.starts_with("struct ") || table == "map" => "a table",
        other => other,
    };
    format!("{found}expected {expected}")
}

/// Mistakes in a recipe, all that were found.
#[derive(Debug)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// A mistake that has no place in a recipe.
    pub fn plain(message: String) -> Self {
        Self(vec![Problem::plain(message)])
    }

    /// `Ok` where there are none.
    ///
    /// # Errors
    /// All of them.
    pub fn none(found: Vec<Problem>) -> Result<(), Self> {
        if found.is_empty() { Ok(()) } else { Err(Self(found)) }
    }

    /// Said about one of several.
    pub fn about(self, who: &str) -> Self {
        Self(self.0.into_iter().map(|problem| problem.about(who)).collect())
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            write!(f, "{}{problem}", if index > 0 { "\n\n" } else { "" })?;
        }
        Ok(())
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self(vec![problem])
    }
}
