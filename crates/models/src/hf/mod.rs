//! Models under Hugging Face's names: read ([`Folder`]) and written ([`export`]).
//!
//! `config.rs` reads config.json, `names.rs` knows where each of our parameters stands in each family's files, `import.rs`
//! and `export.rs` go through it in either direction.

mod config;
mod export;
mod import;
mod names;

pub use export::{ExportError, ExportOptions, export, tokenizer_note};
pub use import::{Folder, ImportError};
pub use names::Family;
