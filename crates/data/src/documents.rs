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

pub(crate) use rows::read_labelled_of;
pub(crate) use tokens::{Split, TokenFile, split};
pub(crate) use windows::Windows;

impl Documents {
    /// All of the documents as rows in their order, nothing kept back.
    ///
    /// # Errors
    /// If the tokenizer fails, tokens cannot be kept in a file, or there is too little text for a row.
    pub fn in_order(&self, tokenizer: &Tokenizer, options: &OpenOptions) -> Result<Loader, DataError> {
        let file = TokenFile::open_or_build(&self.texts, tokenizer, &options.cache_dir, &mut |_, _| {})?;
        let rows = Windows::new(file.clone(), file.documents().collect(), options.seq_len, options.packing, None)?;
        let texts = self.texts.iter().map(|document| document.text.as_str());
        let (bytes, _) = tokenizer.token_bytes_of(texts);
        Ok(Loader::new(Arc::new(rows), bytes, LoaderOptions::of(options, Order::Once)))
    }
}

/// Tokenizes the documents of a source, and divides and packs them into rows.
fn open(source: &dyn Source, opening: Opening<'_>) -> Result<Data, DataError> {
    let Opening { name, tokenizer, options, progress } = opening;
    let documents = texts_of(source, name, &options.project_root)?;
    let (seq_len, packing) = (options.seq_len, options.packing);
    let file = TokenFile::open_or_build(&documents.texts, tokenizer, &options.cache_dir, progress)?;
    let tracked_share = options.tracking.map_or(0.0, |tracking| tracking.fraction);
    let split = split(&file, documents.held_out, options.validation_fraction, tracked_share)?;
    let texts =
        options.tracking.map_or(Ok(Vec::new()), |tracking| file.texts(&split.tracking, seq_len, tracking.texts))?;
    let train = Windows::new(file.clone(), split.train, seq_len, packing, Some(options.seed))?;
    let held_out = Windows::new(file.clone(), split.validation, seq_len, packing, None)?;
    let all = documents.texts.iter().map(|document| document.text.as_str());
    let (bytes, note) = tokenizer.token_bytes_of(all);
    let loader =
        |samples: Arc<dyn Samples>, order| Loader::new(samples, bytes.clone(), LoaderOptions::of(options, order));
    Ok(Data::Tokens(Box::new(Opened {
        train: loader(Arc::new(train), Order::Shuffled),
        validation: loader(Arc::new(held_out), Order::Once),
        tracking: texts.into_iter().map(Batch::text).collect(),
        vocab_size: tokenizer.vocab_size(),
        tokenizer: Some(tokenizer.clone()),
        description: format!("{}: {} tokens; {}", documents.description, file.len(), split.description),
        notes: documents.notes.into_iter().chain(note).collect(),
        text_hash: Some(file.key().to_owned()),
        floor: None,
    })))
}
