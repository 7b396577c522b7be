//! Documents of text: where they come from, and how they become rows of tokens.

mod html;
mod jsonl;
mod posts;
mod rows;
mod rust_docs;
mod text;
mod tokens;
mod windows;

use std::sync::Arc;

use polyhead_models::Batch;

use crate::batches::{Loader, LoaderOptions, Opened, Order, Samples};
use crate::options::OpenOptions;
use crate::source::{Source, texts_of};
use crate::texts::Documents;
use crate::{Data, DataError, Opening, Tokenizer};

pub use jsonl::{JsonlConfig, NumberRule};
pub use posts::{PostKind, PostsConfig};
pub use rows::{
    LabelledFields, LabelledText, PairedText, Template, distinct_names, read_labelled, read_pairs, read_templates,
};
pub use rust_docs::RustDocsConfig;
pub use text::{Syntax, TextConfig};

pub(crate) use rows::{for_each_row, name_of, read_labelled_of};
pub(crate) use tokens::{Split, TokenFile, Tokenized, split};
pub(crate) use windows::Windows;

impl Documents {
    /// All of the documents as rows in their order, nothing kept back, and what they are in words.
    ///
    /// # Errors
    /// If the tokenizer fails, tokens cannot be kept in a file, or there is too little text for a row.
    pub fn in_order(&self, tokenizer: &Tokenizer, options: &OpenOptions) -> Result<(Loader, String), DataError> {
        let Tokenized { file, contents, pieces } =
            TokenFile::open_or_build(self, tokenizer, &options.cache_dir, &mut |_, _| {})?;
        let rows = Windows::new(file.clone(), file.documents().collect(), options.seq_len, options.packing, None)?;
        let (bytes, _) = tokenizer.token_bytes_of(pieces.iter().map(String::as_str));
        let rows = Loader::new(Arc::new(rows), bytes, LoaderOptions::of(options, Order::Once));
        Ok((rows, contents.description))
    }
}

/// Tokenizes the documents of a source, and divides and packs them into rows.
fn open(source: &dyn Source, opening: Opening<'_>) -> Result<Data, DataError> {
    let Opening { name, tokenizer, options, progress } = opening;
    let documents = texts_of(source, name, &options.project_root)?;
    let (seq_len, packing) = (options.seq_len, options.packing);
    let Tokenized { file, contents, pieces } =
        TokenFile::open_or_build(&documents, tokenizer, &options.cache_dir, progress)?;
    let tracked_share = options.tracking.map_or(0.0, |tracking| tracking.fraction);
    let split = split(&file, contents.held_out, options.validation_fraction, tracked_share)?;
    let texts =
        options.tracking.map_or(Ok(Vec::new()), |tracking| file.texts(&split.tracking, seq_len, tracking.texts))?;
    let train = Windows::new(file.clone(), split.train, seq_len, packing, Some(options.seed))?;
    let held_out = Windows::new(file.clone(), split.validation, seq_len, packing, None)?;
    let (bytes, note) = tokenizer.token_bytes_of(pieces.iter().map(String::as_str));
    let loader =
        |samples: Arc<dyn Samples>, order| Loader::new(samples, bytes.clone(), LoaderOptions::of(options, order));
    Ok(Data::Tokens(Box::new(Opened {
        train: loader(Arc::new(train), Order::Shuffled),
        validation: loader(Arc::new(held_out), Order::Once),
        tracking: texts.into_iter().map(Batch::text).collect(),
        vocab_size: tokenizer.vocab_size(),
        tokenizer: Some(tokenizer.clone()),
        description: format!("{}: {} tokens; {}", contents.description, file.len(), split.description),
        notes: contents.notes.into_iter().chain(note).collect(),
        text_hash: Some(file.key().to_owned()),
        floor: None,
    })))
}
