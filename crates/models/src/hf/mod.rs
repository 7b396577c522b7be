//! Models under Hugging Face's names: read ([`Folder`]) and written ([`export`]).
//!
//! `config.rs` reads config.json, `names.rs` has the name of each of our parameters in each family's files, `import.rs`
//! and `export.rs` go through it in either direction. Which families have a mechanism, and what their config.json says of it,
//! the mechanism states. `peft.rs` folds adapters into what is read, `peft_export.rs` writes them.
//!
//! What no family has is written under Polyhead's own class (`own.rs`), and read back to the bit.

mod config;
mod export;
pub mod files;
mod import;
mod names;
mod own;
mod peft;
mod peft_export;
#[cfg(test)]
mod tests;

pub use export::{ExportError, ExportOptions, Exported, export, notes};
pub use import::{FindBase, Folder, ImportError, files_of_index, missing_weights};
pub use peft_export::{AdapterError, BaseName, export_adapter};
pub use polyhead_attention::Family;
