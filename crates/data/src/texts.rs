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
    /// The texts; the last `held_out` of them are for validation alone.
    pub texts: Vec<TextDocument>,
    /// How many the recipe gives to validate on; 0 where a share of the texts is kept back.
    pub held_out: usize,
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
        let size = match bytes {
            0..100_000 => format!("{:.1} kB", bytes as f64 / 1e3),
            _ => format!("{:.1} MB", bytes as f64 / 1e6),
        };
        let description = format!("{} {what}{plural} ({size})", texts.len());
        match bytes {
            0 => Err(unusable!(
                "{description} hold no text: name others in data.{name}.paths (docs: Bring your own data)"
            )),
            _ => Ok(Self { texts, held_out: 0, description, notes }),
        }
    }

    /// Those of `paths`, and with them those of `validation_paths`, where some are named.
    ///
    /// # Errors
    /// As `read`.
    pub(crate) fn read(
        paths: &[String],
        validation_paths: &[String],
        read: impl Fn(&[String]) -> Result<Self, DataError>,
    ) -> Result<Option<Self>, DataError> {
        let own = read(paths)?;
        Ok(Some(if validation_paths.is_empty() { own } else { own.with_held_out(read(validation_paths)?) }))
    }

    /// The same with others, to validate on.
    pub(crate) fn with_held_out(mut self, others: Self) -> Self {
        self.held_out = others.texts.len();
        self.texts.extend(others.texts);
        self.notes.extend(others.notes);
        Self { description: format!("{}, {} to validate on", self.description, others.description), ..self }
    }

    /// The texts to train on, which some of are kept back where none are given to validate on.
    pub fn to_train(&self) -> &[TextDocument] {
        &self.texts[..self.texts.len() - self.held_out]
    }
}
