//! Documents of text: where they come from, and how they become rows of tokens.

mod html;
mod jsonl;
mod rows;
mod rust_docs;
mod text;
mod tokens;
mod windows;

use std::sync::Arc;

use polyhead_models::Batch;

use crate::loader::{LoaderOptions, Order, Samples};
use crate::{Data, DataError, Loader, OpenOptions, Opened, Opening, Tokenizer};

pub use jsonl::JsonlConfig;
pub use rows::{FromFiles, LabelledFields, LabelledText, PairedText, distinct_names, read_labelled, read_pairs};
pub use rust_docs::RustDocsConfig;
pub use text::{Syntax, TextConfig};
pub use windows::Packing;

use tokens::{TokenFile, split};
use windows::Windows;

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
            0 => Err(DataError::Unusable(format!("{description} hold no text: name others in data.{name}.paths"))),
            _ => Ok(Self { texts, description, notes }),
        }
    }

    /// All of the documents as rows in their order, nothing kept back.
    ///
    /// # Errors
    /// If the tokenizer fails, tokens cannot be kept in a file, or there is too little text for a row.
    pub fn in_order(&self, tokenizer: &Tokenizer, options: &OpenOptions) -> Result<Loader, DataError> {
        let file = TokenFile::open_or_build(&self.texts, tokenizer, &options.cache_dir, &mut |_, _| {})?;
        let rows = Windows::new(file.clone(), file.documents().collect(), options.seq_len, options.packing, None)?;
        let texts = self.texts.iter().map(|document| document.text.as_str());
        let (bytes, _) = bytes_per_token(tokenizer.token_bytes_of(texts));
        Ok(Loader::new(Arc::new(rows), bytes, LoaderOptions::of(options, Order::Once)))
    }

    /// Tokenizes the documents, and divides and packs them into rows.
    fn open(self, opening: Opening<'_>) -> Result<Data, DataError> {
        let Opening { tokenizer, options, progress, .. } = opening;
        let (seq_len, packing) = (options.seq_len, options.packing);
        let file = TokenFile::open_or_build(&self.texts, tokenizer, &options.cache_dir, progress)?;
        let tracked_share = options.tracking.map_or(0.0, |tracking| tracking.fraction);
        let split = split(&file, options.validation_fraction, tracked_share)?;
        let texts =
            options.tracking.map_or(Ok(Vec::new()), |tracking| file.texts(&split.tracking, seq_len, tracking.texts))?;
        let train = Windows::new(file.clone(), split.train, seq_len, packing, Some(options.seed))?;
        let held_out = Windows::new(file.clone(), split.validation, seq_len, packing, None)?;
        let texts_of = self.texts.iter().map(|document| document.text.as_str());
        let (bytes, note) = bytes_per_token(tokenizer.token_bytes_of(texts_of));
        let loader =
            |samples: Arc<dyn Samples>, order| Loader::new(samples, bytes.clone(), LoaderOptions::of(options, order));
        Ok(Data::Tokens(Box::new(Opened {
            train: loader(Arc::new(train), Order::Shuffled),
            validation: loader(Arc::new(held_out), Order::Once),
            tracking: texts.into_iter().map(Batch::text).collect(),
            vocab_size: tokenizer.vocab_size(),
            tokenizer: Some(tokenizer.clone()),
            description: format!("{}: {} tokens; {}", self.description, file.len(), split.description),
            notes: self.notes.into_iter().chain(note).collect(),
            text_hash: Some(file.key().to_owned()),
            floor: None,
        })))
    }
}

/// Bytes per token where they are known, and a note where they are not.
pub(crate) fn bytes_per_token(bytes: Result<Vec<u32>, String>) -> (Option<Vec<u32>>, Option<String>) {
    match bytes {
        Ok(bytes) => (Some(bytes), None),
        Err(note) => (None, Some(note)),
    }
}
