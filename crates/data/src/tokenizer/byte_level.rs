//! Byte-level tokenizers of our own: plain bytes, and BPE that is learned from texts.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::sync_channel;

use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as HfTokenizer};

use super::{END_OF_TEXT, PAD};
use crate::DataError;
use crate::error::At;
use crate::texts::{Contents, Documents};

/// Texts that are read before they are counted, so that neither waits for the other.
const AHEAD: usize = 64;

/// Learns a byte-level BPE and writes its tokenizer.json. The same texts give the same file. Gives its vocabulary size, and what the
/// texts were, of which memory holds a few at a time.
///
/// # Errors
/// If vocab_size leaves no room for the 256 bytes and the special tokens, a text cannot be read, or the file cannot be written.
pub fn train_bpe(documents: &Documents, vocab_size: usize, out: &Path) -> Result<(usize, Contents), DataError> {
    if vocab_size < 258 {
        return Err(unusable!("vocab_size ({vocab_size}) must be at least 258: 256 bytes and 2 special tokens"));
    }
    let (sender, texts) = sync_channel(AHEAD);
    let (learned, contents) = std::thread::scope(|scope| {
        let learning = scope.spawn(|| learn(texts.into_iter(), vocab_size));
        let contents = documents.for_each(&mut move |document| {
            // Nobody takes it where learning has failed, which says why.
            let _ = sender.send(document.text);
            Ok(())
        });
        (learning.join(), contents)
    });
    let contents = contents?;
    let failed = |problem: String| DataError::Tokenizer { path: out.to_owned(), problem };
    let learned = learned.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let (json, size) = learned.map_err(|cause| failed(cause.to_string()))?;
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).at(folder)?;
    // Whole or not at all: a full disk must not leave half a tokenizer behind.
    std::fs::write(out, json).inspect_err(|_| drop(std::fs::remove_file(out))).at(out)?;
    Ok((size, contents))
}

/// The tokenizer in JSON, and the size of its vocabulary.
fn learn(texts: impl Iterator<Item = String> + Send, vocab_size: usize) -> Result<(String, usize), tokenizers::Error> {
    let mut tokenizer = HfTokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    let special = |name: &str| AddedToken::from(name, true);
    let mut trainer = tokenizers::models::TrainerWrapper::BpeTrainer(
        BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(vocab_size)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![special(END_OF_TEXT), special(PAD)])
            .build(),
    );
    tokenizer.train(&mut trainer, texts)?;
    Ok((tokenizer.to_string(true)?, tokenizer.get_vocab_size(true)))
}

/// GPT-2's printable stand-ins for bytes, which byte-level tokenizers spell their tokens with.
pub(super) fn stand_ins() -> BTreeMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 256u32;
    let mut all = BTreeMap::new();
    for byte in 0..=255u8 {
        let sign = if printable(byte) { u32::from(byte) } else { next };
        next += u32::from(!printable(byte));
        all.extend(char::from_u32(sign).map(|sign| (sign, byte)));
    }
    all
}

/// The bytes tokenizer in Hugging Face's format: byte-level tokens of one byte, no merges.
pub(super) fn bytes_json() -> String {
    let vocab: BTreeMap<String, u32> = stand_ins().into_iter().map(|(sign, byte)| (sign.into(), byte.into())).collect();
    let special = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true })
    };
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(256, END_OF_TEXT), special(257, PAD)],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [] },
    });
    json.to_string()
}
