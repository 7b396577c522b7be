//! `polyhead tokenizer train`.

use std::path::Path;

use polyhead_data::train_bpe;
use polyhead_recipe::Loaded;
use polyhead_runs::Failure;
use polyhead_runs::data::project_root;

use super::must_not_exist;
use crate::console::talk;

/// Trains a tokenizer on the text of a recipe.
pub fn train(loaded: &Loaded, vocab_size: usize, out: &Path) -> Result<(), Failure> {
    must_not_exist(out)?;
    let documents = loaded.recipe.data.documents(&project_root())?.to_train();
    talk!("learning {vocab_size} tokens");
    let (learned, found) = train_bpe(&documents, vocab_size, out)?;
    found.notes.iter().for_each(|note| talk!("note: {note}"));
    talk!("wrote {learned} tokens, learned from {}, to {}", found.description, out.display());
    talk!("next: tokenizer.huggingface.path={}", out.display());
    Ok(())
}
