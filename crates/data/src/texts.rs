//! Texts with their names, as sources of text read them: anew each time that they are asked for, one after the other, so that
//! memory holds one of them and not the whole file.

use crate::DataError;

/// What was read from files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FromFiles<T> {
    /// In the order of the files.
    pub items: Vec<T>,
    /// What was left out or changed, with counts.
    pub notes: Vec<String>,
}

/// A text with its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextDocument {
    /// Where it comes from.
    pub name: String,
    /// The text.
    pub text: String,
}

/// What takes texts, one after the other.
pub type TakeText<'a> = dyn FnMut(TextDocument) -> Result<(), DataError> + 'a;

/// Hands over every text in an order that does not change; gives what was left out or changed, with counts.
type Read = dyn Fn(&mut TakeText<'_>) -> Result<Vec<String>, DataError>;

/// The documents of a text source, read whenever they are asked for.
pub struct Documents {
    parts: Vec<Part>,
    notes: Vec<String>,
}

/// Documents of one source and one use.
struct Part {
    read: Box<Read>,
    named: Named,
    held_out: bool,
}

/// How documents are described.
enum Named {
    /// By their number and size; without any text they are refused.
    Counted {
        /// One of them, in words.
        what: String,
        /// The source.
        name: &'static str,
    },
    /// In these words.
    As(String),
}

/// What documents were, once all of them have been read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// How many there are.
    pub documents: usize,
    /// How many of them, the last ones, are given to validate on; 0 where a share of the texts is kept back.
    pub held_out: usize,
    /// Bytes of all texts.
    pub bytes: u64,
    /// What they are, in words.
    pub description: String,
    /// What was left out or changed, with counts.
    pub notes: Vec<String>,
}

impl Documents {
    /// Documents that are described by their number and size. `what` is one of them in words, `name` the source.
    pub(crate) fn counted(
        what: impl Into<String>,
        name: &'static str,
        read: impl Fn(&mut TakeText<'_>) -> Result<Vec<String>, DataError> + 'static,
    ) -> Self {
        Self::of(Named::Counted { what: what.into(), name }, Box::new(read))
    }

    /// Documents in memory, described in these words.
    pub(crate) fn described(words: impl Into<String>, texts: Vec<TextDocument>) -> Self {
        Self::of(Named::As(words.into()), Box::new(held(texts)))
    }

    fn of(named: Named, read: Box<Read>) -> Self {
        Self { parts: vec![Part { read, named, held_out: false }], notes: Vec::new() }
    }

    /// The same with things to say about them.
    pub(crate) fn noted(mut self, notes: Vec<String>) -> Self {
        self.notes.extend(notes);
        self
    }

    /// The same, and behind them others to validate on.
    pub(crate) fn with_held_out(mut self, others: Self) -> Self {
        self.parts.extend(others.parts.into_iter().map(|part| Part { held_out: true, ..part }));
        self.noted(others.notes)
    }

    /// The same, and behind them others.
    pub(crate) fn and(mut self, others: Self) -> Self {
        self.parts.extend(others.parts);
        self.noted(others.notes)
    }

    /// Those to train on, which some of are kept back where none are given to validate on.
    pub fn to_train(mut self) -> Self {
        self.parts.retain(|part| !part.held_out);
        self
    }

    /// Hands over every text; those that are given to validate on come last.
    ///
    /// # Errors
    /// If files are missing or malformed, they hold no text, or `take` fails.
    pub fn for_each(&self, take: &mut TakeText<'_>) -> Result<Contents, DataError> {
        let mut all = Contents { notes: self.notes.clone(), ..Contents::default() };
        for part in &self.parts {
            let (mut documents, mut bytes) = (0, 0);
            let notes = (part.read)(&mut |document| {
                documents += 1;
                bytes += document.text.len() as u64;
                take(document)
            })?;
            let description = part.named.description(documents, bytes)?;
            let comma = if all.description.is_empty() { "" } else { ", " };
            all.description += &format!("{comma}{description}{}", if part.held_out { " to validate on" } else { "" });
            all.documents += documents;
            all.held_out += if part.held_out { documents } else { 0 };
            all.bytes += bytes;
            all.notes.extend(notes);
        }
        Ok(all)
    }

    /// All texts at once, in memory.
    ///
    /// # Errors
    /// As [`for_each`](Self::for_each).
    pub fn read_all(&self) -> Result<(Vec<TextDocument>, Contents), DataError> {
        let mut texts = Vec::new();
        let contents = self.for_each(&mut |document| {
            texts.push(document);
            Ok(())
        })?;
        Ok((texts, contents))
    }
}

/// Hands over texts that are in memory already.
pub(crate) fn held(texts: Vec<TextDocument>) -> impl Fn(&mut TakeText<'_>) -> Result<Vec<String>, DataError> {
    move |take| {
        texts.iter().cloned().try_for_each(take)?;
        Ok(Vec::new())
    }
}

impl Named {
    fn description(&self, documents: usize, bytes: u64) -> Result<String, DataError> {
        let (what, name) = match self {
            Self::As(words) => return Ok(words.clone()),
            Self::Counted { what, name } => (what, name),
        };
        let plural = if documents == 1 { "" } else { "s" };
        let size = match bytes {
            0..100_000 => format!("{:.1} kB", bytes as f64 / 1e3),
            _ => format!("{:.1} MB", bytes as f64 / 1e6),
        };
        let description = format!("{documents} {what}{plural} ({size})");
        match bytes {
            0 => Err(unusable!(
                "{description} hold no text: name others in data.{name}.paths (docs: Bring your own data)"
            )),
            _ => Ok(description),
        }
    }
}
