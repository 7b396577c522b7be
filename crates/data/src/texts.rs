//! Texts with their names, as sources of text read them.

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

/// The documents of a text source.
#[derive(Debug)]
pub struct Documents {
    /// The texts.
    pub texts: Vec<TextDocument>,
    /// What they are, in words.
    pub description: String,
    /// What was left out or changed, with counts.
    pub notes: Vec<String>,
}

impl Documents {
    /// Documents that are described by their number and size. `what` is one of them in words, `name` the source.
    ///
    /// # Errors
    /// If they are empty.
    pub(crate) fn counted(read: FromFiles<TextDocument>, what: &str, name: &str) -> Result<Self, DataError> {
        let FromFiles { items: texts, notes } = read;
        let bytes: usize = texts.iter().map(|document| document.text.len()).sum();
        let plural = if texts.len() == 1 { "" } else { "s" };
        let description = format!("{} {what}{plural} ({:.1} MB)", texts.len(), bytes as f64 / 1e6);
        match bytes {
            0 => Err(unusable!("{description} hold no text: name others in data.{name}.paths")),
            _ => Ok(Self { texts, description, notes }),
        }
    }
}
