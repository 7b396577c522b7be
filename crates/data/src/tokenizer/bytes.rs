//! How many bytes of text each id stands for, by how a tokenizer spells its tokens; and whether that adds up to a text.
//!
//! Spellings: GPT-2's stand-ins for bytes; `<0x0A>` for bytes that have no token; `▁` for a space (Metaspace, SentencePiece);
//! `</w>` behind the last piece of a word (BPE), `##` before all but its first (WordPiece), where spaces are in no token.
//! What is done to a text before it is divided (normalizers: NFKC, lower case, stripped accents) shows in no token: only a
//! text tells, by its length.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tokenizers::Tokenizer as HfTokenizer;

/// Bytes per id: as the tokens are spelled, and where spaces are in no token, with one for each word.
#[derive(Debug, Clone)]
pub(super) struct TokenBytes {
    tables: Vec<Vec<u32>>,
}

/// How a tokenizer spells its tokens.
#[derive(Debug, Default)]
struct Spelling {
    byte_level: bool,
    byte_fallback: bool,
    /// What a space is written as.
    spaces: BTreeSet<String>,
    /// Behind the last piece of a word.
    suffix: Option<String>,
    /// Before all pieces of a word but the first.
    prefix: Option<String>,
    /// Words begin without a mark, and the spaces between them are dropped.
    drops_spaces: bool,
    unknown: Option<String>,
}

impl Spelling {
    fn of(json: &Value) -> Self {
        let model = &json["model"];
        let text = |key: &str| model[key].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let word_piece = model["type"] == "WordPiece";
        let prefix = text("continuing_subword_prefix").or_else(|| word_piece.then(|| "##".to_owned()));
        let unk_id = model["unk_id"].as_u64().and_then(|id| model["vocab"][id as usize][0].as_str());
        let mut spelling = Self {
            byte_fallback: model["byte_fallback"] == true,
            suffix: text("end_of_word_suffix"),
            drops_spaces: word_piece && prefix.is_some(),
            prefix,
            unknown: text("unk_token").or(unk_id.map(str::to_owned)),
            ..Self::default()
        };
        for part in ["normalizer", "pre_tokenizer", "decoder"] {
            spelling.read(&json[part]);
        }
        spelling
    }

    fn read(&mut self, part: &Value) {
        let nested = ["normalizers", "pretokenizers", "decoders"].iter().filter_map(|key| part[key].as_array());
        nested.flatten().for_each(|inner| self.read(inner));
        match part["type"].as_str() {
            Some("ByteLevel") => self.byte_level = true,
            Some("ByteFallback") => self.byte_fallback = true,
            Some("Metaspace") => {
                self.spaces.insert(part["replacement"].as_str().unwrap_or("\u{2581}").to_owned());
            }
            // `" "` to `▁` before, or the way back behind.
            Some("Replace") => match (part["pattern"]["String"].as_str(), part["content"].as_str()) {
                (Some(" "), Some(mark)) | (Some(mark), Some(" ")) if !mark.is_empty() => {
                    self.spaces.insert(mark.to_owned());
                }
                _ => {}
            },
            _ => {}
        }
    }

    /// Bytes of a token, and whether a space that is in no token belongs to it.
    fn count(&self, token: &str, signs: &BTreeMap<char, u8>) -> (u32, bool) {
        if self.unknown.as_deref() == Some(token) {
            return (0, false);
        }
        if self.byte_fallback && is_byte(token) {
            return (1, false);
        }
        let ended = self.suffix.as_deref().and_then(|suffix| token.strip_suffix(suffix));
        let continued = self.prefix.as_deref().and_then(|prefix| token.strip_prefix(prefix));
        let piece = ended.or(continued).unwrap_or(token);
        let space = ended.is_some() || self.drops_spaces && continued.is_none();
        if self.byte_level && piece.chars().all(|sign| signs.contains_key(&sign)) {
            return (piece.chars().count() as u32, space);
        }
        let written = self.spaces.iter().fold(piece.to_owned(), |piece, mark| piece.replace(mark, " "));
        (written.len() as u32, space)
    }
}

/// Whether a token is the byte that no other token spells: `<0x00>` to `<0xFF>`.
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
}

impl TokenBytes {
    /// Of the tokenizer that bytes are for themselves.
    pub fn bytes() -> Self {
        let mut table = vec![1; 256];
        table.extend([0, 0]);
        Self { tables: vec![table] }
    }

    /// Of a tokenizer.json, whose highest id is below `end`; the ids of `silent` stand for no text.
    pub fn of(json: &Value, inner: &HfTokenizer, end: u32, silent: &[u32]) -> Self {
        let spelling = Spelling::of(json);
        let (added, signs) = (inner.get_added_tokens_decoder(), super::byte_level::stand_ins());
        let count = |id: u32| -> (u32, bool) {
            // Added tokens are spelled as they stand, never with stand-ins.
            match added.get(&id) {
                _ if silent.contains(&id) => (0, false),
                Some(added) if spelling.byte_fallback && is_byte(&added.content) => (1, false),
                Some(added) if added.special => (0, false),
                Some(added) => (added.content.len() as u32, false),
                None => inner.id_to_token(id).map_or((0, false), |token| spelling.count(&token, &signs)),
            }
        };
        let counts: Vec<(u32, bool)> = (0..end).map(count).collect();
        let plain = counts.iter().map(|&(bytes, _)| bytes).collect();
        let spaced = || counts.iter().map(|&(bytes, space)| bytes + u32::from(space)).collect();
        let tables = if counts.iter().any(|&(_, space)| space) { vec![spaced(), plain] } else { vec![plain] };
        Self { tables }
    }

    /// The likeliest numbers.
    pub fn table(&self) -> &[u32] {
        &self.tables[0]
    }

    /// The numbers that add up to pieces of text, each with its tokens.
    ///
    /// # Errors
    /// If none do, with what they add up to, as a sentence.
    pub fn that_add_up(&self, pieces: &[(&str, Vec<u32>)]) -> Result<Vec<u32>, String> {
        let all: u64 = pieces.iter().map(|(text, _)| text.len() as u64).sum();
        // A mark at the beginning or the end of each piece stands for nothing; and a character in a thousand may be unknown.
        // Chosen by us.
        let tolerance = pieces.len() as u64 + all / 1000;
        let sum = |table: &[u32], ids: &[u32]| ids.iter().map(|&id| u64::from(table[id as usize])).sum::<u64>();
        // Piece by piece: what one has too many does not make up for what another has too few.
        let off =
            |table: &[u32]| pieces.iter().map(|(text, ids)| sum(table, ids).abs_diff(text.len() as u64)).sum::<u64>();
        if let Some(table) = self.tables.iter().find(|table| off(table) <= tolerance) {
            return Ok(table.clone());
        }
        let found: u64 = pieces.iter().map(|(_, ids)| sum(self.table(), ids)).sum();
        Err(format!(
            "bits per byte is left out: by their spelling, the tokens of this tokenizer stand for {found} bytes of a text that has \
             {all}, and not for what each part of it has (it changes texts before it divides them, or keeps no spaces)"
        ))
    }
}
