//! Text to token ids and back: plain bytes, or any Hugging Face `tokenizer.json`.

mod byte_level;
mod bytes;
mod check;
mod stream;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokenizers::{Encoding, Tokenizer as HfTokenizer};

use crate::DataError;
use crate::guard::guarded;
use byte_level::bytes_json;
use bytes::TokenBytes;

pub use byte_level::train_bpe;
pub use stream::StreamDecoder;

const END_OF_TEXT: &str = "<|endoftext|>";
const PAD: &str = "<|pad|>";
/// What other projects call the token that ends a text, in the order in which we look.
const END_NAMES: [&str; 6] = [END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]"];

/// `[tokenizer]`: one of its tables.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TokenizerConfig {
    /// One token per byte of UTF-8, and two special ones: 258 ids.
    Bytes(BytesTokenizer),
    /// A tokenizer in Hugging Face's format.
    Huggingface(HuggingfaceTokenizer),
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        Self::Bytes(BytesTokenizer {})
    }
}

/// The bytes tokenizer has no settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BytesTokenizer {}

/// Where a Hugging Face tokenizer is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HuggingfaceTokenizer {
    /// A tokenizer.json, or a folder that holds one. `polyhead tokenizer train` makes one.
    pub path: PathBuf,
}

/// A tokenizer, ready to use.
#[derive(Clone)]
pub struct Tokenizer {
    /// Where it came from, for complaints.
    path: Option<PathBuf>,
    json: String,
    // None for bytes, whose ids are the bytes.
    inner: Option<Box<HfTokenizer>>,
    end_of_text: Option<u32>,
    token_bytes: TokenBytes,
    /// What is put before a text, and behind it.
    around: [Vec<u32>; 2],
    /// Whether the former is what tokenizer_config.json says, not the post-processor.
    begins_by_config: bool,
    notes: Vec<String>,
    begin_of_text: String,
    pad: Option<u32>,
    chat_template: Option<String>,
    marks_beginnings: bool,
}

/// What a template may call the tokenizer's special tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Special {
    /// Begins a text.
    pub bos: String,
    /// Ends a text.
    pub eos: String,
    /// Fills up.
    pub pad: String,
}

impl Tokenizer {
    /// Opens what a recipe names.
    ///
    /// # Errors
    /// If the file is missing or not a tokenizer.
    pub fn open(config: &TokenizerConfig) -> Result<Self, DataError> {
        match config {
            TokenizerConfig::Bytes(_) => Ok(Self::bytes()),
            TokenizerConfig::Huggingface(HuggingfaceTokenizer { path }) => {
                let file = if path.is_dir() { path.join("tokenizer.json") } else { path.clone() };
                let json = crate::files::read_text(&file).map_err(|cause| DataError::Tokenizer {
                    path: file.clone(),
                    problem: format!("{cause} (`polyhead tokenizer train` makes one)"),
                })?;
                let about = |path: &Path, error| match error {
                    DataError::Unusable(problem) => DataError::Tokenizer { path: path.to_owned(), problem },
                    other => other,
                };
                let mut tokenizer = Self::from_json(&json).map_err(|error| about(&file, error))?;
                let [config, template] =
                    ["tokenizer_config.json", "chat_template.jinja"].map(|name| file.with_file_name(name));
                // There or not; what is there and cannot be read is not passed over.
                let beside = |path: &Path| match crate::files::read_text(path) {
                    Ok(text) => Ok(Some(text)),
                    Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    Err(cause) => Err(DataError::Tokenizer { path: path.to_owned(), problem: cause.to_string() }),
                };
                if let Some(json) = beside(&config)? {
                    tokenizer = tokenizer.with_config(&json).map_err(|error| about(&config, error))?;
                }
                if let Some(template) = beside(&template)? {
                    tokenizer = tokenizer.with_chat_template(template);
                }
                Ok(tokenizer.at(&file))
            }
        }
    }

    /// One token per byte: id = byte, 256 ends a text, 257 pads.
    pub fn bytes() -> Self {
        Self {
            path: None,
            json: bytes_json(),
            inner: None,
            end_of_text: Some(256),
            token_bytes: TokenBytes::bytes(),
            around: Default::default(),
            notes: Vec::new(),
            begin_of_text: String::new(),
            pad: Some(257),
            chat_template: None,
            marks_beginnings: false,
            begins_by_config: false,
        }
    }

    /// Opens the text of a tokenizer.json, as checkpoints keep it.
    ///
    /// # Errors
    /// If it is not a tokenizer.
    pub fn from_json(json: &str) -> Result<Self, DataError> {
        if json == bytes_json() {
            return Ok(Self::bytes());
        }
        let (value, notes) = check::check(json).map_err(DataError::Unusable)?;
        let json = if notes.is_empty() { json.to_owned() } else { value.to_string() };
        guarded("tokenizers", || Self::read(json, &value, notes)).unwrap_or_else(Err).map_err(DataError::Unusable)
    }

    /// Reads what has been checked.
    fn read(json: String, value: &Value, notes: Vec<String>) -> Result<Self, String> {
        let mut inner = HfTokenizer::from_bytes(&json).map_err(|e| format!("not a valid tokenizer.json: {e}"))?;
        // Many published files cut at, or fill up to, the length their model was trained with; texts here are whole.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| format!("truncation cannot be switched off: {e}"))?;
        // Published vocabularies have gaps, so the highest id counts, not the number of tokens.
        let end = inner.get_vocab(true).into_values().max().map_or(0, |id| id + 1);
        let mut added = Vec::new();
        check::added_by_processor(&value["post_processor"], "post_processor", &mut added);
        if added.len() > MOST_AROUND {
            let count = added.len();
            return Err(format!("post_processor puts {count} tokens around every text; {MOST_AROUND} are allowed"));
        }
        if let Some((place, id)) = added.into_iter().find(|&(_, id)| id >= u64::from(end)) {
            return Err(format!("{place} ({id}) must be an id of the vocabulary, below {end}"));
        }
        // What breaks on any text breaks here, where the file is named. That a text is unknown to it is no mistake.
        if let Ok(tried) = inner.encode(SAMPLE, true) {
            drop(inner.decode(tried.get_ids(), true));
        }
        let end_of_text = END_NAMES.iter().find_map(|name| inner.token_to_id(name));
        let pad = inner.token_to_id(PAD);
        let silent: Vec<u32> = end_of_text.into_iter().chain(pad).collect();
        Ok(Self {
            token_bytes: TokenBytes::of(value, &inner, end, &silent),
            around: around(&inner),
            marks_beginnings: marks_beginnings(&inner),
            path: None,
            json,
            inner: Some(Box::new(inner)),
            end_of_text,
            notes,
            begin_of_text: String::new(),
            pad,
            chat_template: None,
            begins_by_config: false,
        })
    }

    /// The same with the special tokens and the chat template of a tokenizer_config.json; what it does not name stays.
    ///
    /// # Errors
    /// If it is invalid JSON.
    pub fn with_config(mut self, json: &str) -> Result<Self, DataError> {
        let config: Value = serde_json::from_str(json).map_err(|e| unusable!("invalid JSON: {e}"))?;
        let token = |key: &str| {
            let value = &config[key];
            value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
        };
        if let Some(id) = token("eos_token").and_then(|name| self.inner.as_ref()?.token_to_id(&name)) {
            self.end_of_text = Some(id);
        }
        self.pad = token("pad_token").and_then(|name| self.inner.as_ref()?.token_to_id(&name)).or(self.pad);
        self.begin_of_text = token("bos_token").unwrap_or(self.begin_of_text);
        // The post-processor decides; where there is none that adds anything, the key does.
        let [before, behind] = &mut self.around;
        let begin = self.inner.as_ref().and_then(|inner| inner.token_to_id(&self.begin_of_text));
        if let (Some(true), Some(begin), true) =
            (config["add_bos_token"].as_bool(), begin, before.is_empty() && behind.is_empty())
        {
            before.push(begin);
            self.begins_by_config = true;
            self.notes.push(format!("add_bos_token is true: {} is put before texts", self.begin_of_text));
        }
        let named = |all: &[Value]| {
            let default = all.iter().find(|one| one["name"] == "default").or(all.first());
            default.and_then(|one| one["template"].as_str()).map(str::to_owned)
        };
        let template = &config["chat_template"];
        let template = template.as_str().map(str::to_owned).or_else(|| template.as_array().and_then(|all| named(all)));
        self.chat_template = template.or(self.chat_template);
        Ok(self)
    }

    /// The same with the file that it came from, which complaints then name.
    pub fn at(self, path: &Path) -> Self {
        Self { path: Some(path.to_owned()), ..self }
    }

    /// The error of a text that cannot be encoded.
    fn failed(&self, problem: String) -> DataError {
        match &self.path {
            Some(path) => DataError::Tokenizer { path: path.clone(), problem },
            None => unusable!("the tokenizer failed: {problem}"),
        }
    }

    /// The same with one token more, which texts have where they have this word, and its id; `None` where it has the token already.
    ///
    /// # Errors
    /// If the token cannot be added.
    pub fn with_token(self, word: &str) -> Result<(Self, Option<u32>), DataError> {
        if self.inner.as_ref().is_some_and(|inner| inner.token_to_id(word).is_some()) {
            return Ok((self, None));
        }
        let id = self.vocab_size() as u32;
        let mut json: Value = serde_json::from_str(&self.json).map_err(|error| self.failed(error.to_string()))?;
        let token = json!({ "id": id, "content": word, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": false });
        match &mut json["added_tokens"] {
            Value::Array(added) => added.push(token),
            other => *other = json!([token]),
        }
        let Self { path, end_of_text, around, begins_by_config, notes, begin_of_text, pad, chat_template, .. } = self;
        let own = Self::from_json(&json.to_string())?;
        let same =
            Self { path, end_of_text, around, begins_by_config, notes, begin_of_text, pad, chat_template, ..own };
        Ok((same, Some(id)))
    }

    /// The same with another chat template.
    pub fn with_chat_template(self, template: String) -> Self {
        Self { chat_template: Some(template), ..self }
    }

    /// The Jinja text that renders conversations, where the tokenizer brings one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// What chat templates may call the special tokens.
    pub fn special(&self) -> Special {
        let text = |id: Option<u32>| id.map(|id| self.token_text(id)).unwrap_or_default();
        let pad = self.pad.or(self.end_of_text);
        Special { bos: self.begin_of_text.clone(), eos: text(self.end_of_text), pad: text(pad) }
    }

    /// An id that fills up rows.
    pub fn pad(&self) -> u32 {
        self.pad.or(self.end_of_text).unwrap_or(0)
    }

    /// The token that begins a text, where there is one.
    pub fn begin_of_text(&self) -> Option<u32> {
        self.inner.as_ref()?.token_to_id(&self.begin_of_text)
    }

    /// Token ids of what a chat template wrote, each with the last byte that it stands for. Special tokens that are spelled out are
    /// meant, in the bytes tokenizer too; none are added.
    ///
    /// # Errors
    /// If the tokenizer cannot encode it.
    pub fn encode_template(&self, text: &str) -> Result<Vec<(u32, usize)>, DataError> {
        let Some(inner) = &self.inner else {
            let (mut out, mut at) = (Vec::with_capacity(text.len()), 0);
            while at < text.len() {
                let special = [(END_OF_TEXT, 256), (PAD, 257)].into_iter();
                let (id, length) =
                    match special.clone().find(|(name, _)| text.as_bytes()[at..].starts_with(name.as_bytes())) {
                        Some((name, id)) => (id, name.len()),
                        None => (u32::from(text.as_bytes()[at]), 1),
                    };
                at += length;
                out.push((id, at - 1));
            }
            return Ok(out);
        };
        let encoded = self.checked(|| inner.encode(text, false))?;
        let last = encoded.get_offsets().iter().map(|&(start, end)| start.max(end.saturating_sub(1)));
        Ok(encoded.get_ids().iter().copied().zip(last).collect())
    }

    /// Bytes of text that one token may stand for; `None` where a token may stand for any number of them, as a normaliser leaves
    /// out some, or what is not known is one token.
    pub(crate) fn longest_token(&self) -> Option<usize> {
        let Some(inner) = &self.inner else { return Some(END_OF_TEXT.len()) };
        let whole = |part: Value| part["type"] == "ByteLevel";
        let by_bytes = inner.get_pre_tokenizer().and_then(|part| serde_json::to_value(part).ok()).is_some_and(whole);
        if !by_bytes || inner.get_normalizer().is_some() {
            return None;
        }
        let longest = inner.get_vocab(true).into_keys().map(|token| token.len()).max();
        longest.filter(|_| !inner.get_added_tokens_decoder().values().any(|token| token.lstrip || token.rstrip))
    }

    /// Whether the beginning of a text gets a mark of its own, as SentencePiece puts `▁` there: a text in pieces has other
    /// tokens than in one, then.
    pub fn marks_beginnings(&self) -> bool {
        self.marks_beginnings
    }

    /// Whether an id is one that was added to the vocabulary: a special token, or another one that is never divided.
    pub fn is_added(&self, id: u32) -> bool {
        match &self.inner {
            None => id >= 256,
            Some(inner) => inner.get_added_tokens_decoder().contains_key(&id),
        }
    }

    /// Token ids of a text; no special tokens are added.
    ///
    /// # Errors
    /// If the tokenizer cannot encode it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let Some(inner) = &self.inner else { return Ok(text.bytes().map(u32::from).collect()) };
        Ok(self.checked(|| inner.encode_fast(text, false))?.get_ids().to_vec())
    }

    /// What the library makes of a text, of ids that are in the vocabulary.
    fn checked(&self, encode: impl FnOnce() -> tokenizers::Result<Encoding>) -> Result<Encoding, DataError> {
        let encoded = guarded("tokenizers", || encode().map_err(|error| error.to_string())).unwrap_or_else(Err);
        let encoded = encoded.map_err(|problem| self.failed(problem))?;
        match encoded.get_ids().iter().find(|&&id| id as usize >= self.vocab_size()) {
            Some(id) => Err(self.failed(format!("id {id} came out, which is not in the vocabulary"))),
            None => Ok(encoded),
        }
    }

    /// Token ids of a text between the special tokens that the tokenizer puts around one, as Hugging Face's models expect it.
    ///
    /// # Errors
    /// If the tokenizer cannot encode it.
    pub fn encode_whole(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let [before, behind] = &self.around;
        Ok([before, &self.encode(text)?[..], behind].concat())
    }

    /// Token ids of a text that is to be continued: behind the special tokens that the tokenizer puts before one, without those
    /// that end it.
    ///
    /// # Errors
    /// If the tokenizer cannot encode it.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, DataError> {
        Ok([self.beginning(), &self.encode(text)?[..]].concat())
    }

    /// The special tokens that the tokenizer puts before a text.
    pub fn beginning(&self) -> &[u32] {
        &self.around[0]
    }

    /// What a person should know about how the tokenizer was read, as sentences.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The text of token ids. Bytes that are invalid UTF-8 become U+FFFD; special tokens become nothing.
    pub fn decode(&self, ids: &[u32]) -> String {
        match &self.inner {
            None => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            Some(inner) => {
                guarded("tokenizers", || inner.decode(ids, true)).ok().and_then(Result::ok).unwrap_or_default()
            }
        }
    }

    /// How many ids there are.
    pub fn vocab_size(&self) -> usize {
        self.token_bytes.table().len()
    }

    /// The id that ends a text.
    pub fn end_of_text(&self) -> Option<u32> {
        self.end_of_text
    }

    /// Bytes of text that each id stands for, by how it is spelled; 0 for special ones.
    pub fn token_bytes(&self) -> Vec<u32> {
        self.token_bytes.table().to_vec()
    }

    /// The same, where they add up to the bytes of texts, of which parts are tried; otherwise a sentence that says why bits per
    /// byte cannot be known.
    pub fn token_bytes_of<'a>(&self, texts: impl Iterator<Item = &'a str>) -> (Option<Vec<u32>>, Option<String>) {
        let encoded = |piece: &'a str| Ok::<_, String>((piece, self.encode(piece).map_err(|error| error.to_string())?));
        let bytes = match self.inner {
            None => Ok(self.token_bytes()),
            Some(_) => {
                let pieces = texts.flat_map(pieces_of).take(PIECES).map(encoded).collect::<Result<Vec<_>, _>>();
                pieces.and_then(|pieces| self.token_bytes.that_add_up(&pieces))
            }
        };
        bytes.map_or_else(|note| (None, Some(note)), |bytes| (Some(bytes), None))
    }

    /// The same, where they add up to a sample of text.
    pub fn token_bytes_of_sample(&self) -> (Option<Vec<u32>>, Option<String>) {
        self.token_bytes_of(std::iter::once(SAMPLE))
    }

    /// How an id is shown to a person.
    pub fn token_text(&self, id: u32) -> String {
        match (&self.inner, id) {
            (None, 256) => END_OF_TEXT.into(),
            (None, 257) => PAD.into(),
            (None, byte) => std::ascii::escape_default(byte as u8).to_string(),
            (Some(inner), id) => inner.id_to_token(id).unwrap_or_else(|| format!("<{id}>")),
        }
    }

    /// A hash that tells tokenizers apart.
    pub fn fingerprint(&self) -> String {
        let mut hash = blake3::Hasher::new();
        hash.update(self.json.as_bytes());
        // The token that ends a text is found by its name, unless a tokenizer_config.json says another.
        let usual = self.inner.as_ref().map(|inner| END_NAMES.iter().find_map(|name| inner.token_to_id(name)));
        if usual.is_some_and(|usual| usual != self.end_of_text) {
            hash.update(&self.end_of_text.unwrap_or(u32::MAX).to_le_bytes());
        }
        hash.finalize().to_hex().to_string()
    }

    /// The tokenizer.json, which Hugging Face's library reads with the same ids.
    pub fn to_json(&self) -> &str {
        &self.json
    }

    /// The tokenizer_config.json beside it, as transformers 4 and 5 read it.
    pub fn config_json(&self) -> String {
        let name = |id: u32| match &self.inner {
            Some(inner) => inner.id_to_token(id).unwrap_or_default(),
            None => (if id == 256 { END_OF_TEXT } else { PAD }).into(),
        };
        let (end, pad) = (self.end_of_text.map(name), self.pad.or(self.end_of_text).map(name));
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": pad,
            "clean_up_tokenization_spaces": false, "model_max_length": 1_000_000,
            // transformers 4 would add token_type_ids, which decoders refuse.
            "model_input_names": ["input_ids", "attention_mask"],
        });
        let more = [
            ("bos_token", Some(&self.begin_of_text).filter(|bos| !bos.is_empty())),
            ("chat_template", self.chat_template.as_ref()),
        ];
        for (key, value) in more {
            if let Some(value) = value {
                config[key] = json!(value);
            }
        }
        if self.begins_by_config {
            config["add_bos_token"] = json!(true);
        }
        format!("{config:#}\n")
    }
}

/// Whether something is put before the first piece of a text: by a normaliser, or by what divides it into words.
fn marks_beginnings(inner: &HfTokenizer) -> bool {
    fn any(part: &Value) -> bool {
        let nested = ["normalizers", "pretokenizers"].iter().filter_map(|key| part[key].as_array()).flatten();
        let prefix = || part["add_prefix_space"].as_bool();
        nested.clone().any(any)
            || match part["type"].as_str() {
                Some("Prepend") => true,
                Some("Metaspace") => part["prepend_scheme"].as_str().map_or(prefix() != Some(false), |s| s != "never"),
                Some("ByteLevel") => prefix() == Some(true),
                _ => false,
            }
    }
    let parts = [serde_json::to_value(inner.get_normalizer()), serde_json::to_value(inner.get_pre_tokenizer())];
    parts.iter().flatten().any(any)
}

/// A text as there are many: capitals, accents, digits, signs, two spaces, lines. Any tokenizer is tried on it.
const SAMPLE: &str = "When the café reopened in 1987, nobody's naïve guess -- that \"it'd fail\" -- came true.  Prices rose 3.5 %; \
                      the old owners (two sisters from Zürich) stayed.\n\n\tThey sold 12,000 cups a year: more than ever.\n";

/// Tokens that may be put around a text; chosen by us.
const MOST_AROUND: usize = 1000;
/// Parts of texts that are tried, and characters of each; chosen by us.
pub(crate) const PIECES: usize = 512;
const PIECE: usize = 200;
/// Parts of one text at most, spread over it; chosen by us.
const PIECES_OF_ONE: usize = 16;

/// Parts of a text, from its beginning on.
pub(crate) fn pieces_of(text: &str) -> impl Iterator<Item = &str> {
    let apart = (text.len() / PIECES_OF_ONE).max(4 * PIECE);
    (0..text.len()).step_by(apart).map(move |at| {
        let start = (at..=text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len());
        let end = text[start..].char_indices().nth(PIECE).map_or(text.len(), |(length, _)| start + length);
        &text[start..end]
    })
}

/// The special tokens that a post-processor puts before a text and behind it.
fn around(inner: &HfTokenizer) -> [Vec<u32>; 2] {
    // Where no letter is known, the empty text tells.
    let Ok(encoded) = inner.encode("a", true).or_else(|_| inner.encode("", true)) else { return Default::default() };
    let (ids, special) = (encoded.get_ids(), encoded.get_special_tokens_mask());
    let own = special.iter().position(|&special| special == 0);
    let last = special.iter().rposition(|&special| special == 0);
    match (own, last) {
        (Some(first), Some(last)) => [ids[..first].to_vec(), ids[last + 1..].to_vec()],
        _ => [ids.to_vec(), Vec::new()],
    }
}
