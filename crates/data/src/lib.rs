//! Text, generated tasks and labelled examples, to batches.
//!
//! [`open`] turns `[data]` and `[tokenizer]` of a recipe into two [`Loader`]s. On the way: documents (`text.rs`,
//! `rust_docs.rs`), token ids in a memory-mapped file (`tokens.rs`), rows (`pack.rs`) or generated rows (`synthetic/`),
//! batches by position (`loader.rs`). For classifiers, [`open_labelled`] gives two [`ExampleLoader`]s (`examples.rs`); for
//! embedders, [`open_pairs`] two [`PairLoader`]s.

pub mod chat;
mod config;
mod encoding;
mod error;
mod examples;
mod files;
mod html;
mod loader;
pub mod long_context;
mod order;
mod pack;
mod rust_docs;
mod sniff;
mod sources;
pub mod synthetic;
mod text;
mod tokenizer;
mod tokens;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use polyhead_models::{Batch, Role};

pub use config::{DataConfig, RustDocsConfig};
pub use error::DataError;
pub use examples::{
    AugmentConfig, ChirpsConfig, CifarConfig, CifarLabels, Column, Content, CsvImagesConfig, Example, ExampleLoader,
    ExampleSet, FeaturePairsConfig, FeaturesConfig, IdxConfig, ImageFolderConfig, Labelled, LabelledTextConfig,
    LayerFeaturesConfig, LogMelConfig, NewFeatures, NewPairs, PairLoader, Paired, ShapesConfig, WavFolderConfig,
    open_labelled, open_pairs, read_features,
};
pub use files::OnBadFile;
pub use loader::{FromDataset, Loader, LoaderOptions, Order, Sample, Samples};
pub use pack::{Packing, Windows};
pub use text::{
    FromFiles, JsonlConfig, LabelledFields, LabelledText, PairedText, Syntax, TextConfig, TextDocument, Texts,
    distinct_names, read_labelled, read_pairs,
};
pub use tokenizer::{BytesTokenizer, HuggingfaceTokenizer, StreamDecoder, Tokenizer, TokenizerConfig, train_bpe};
pub use tokens::{Split, TokenFile, split};

use chat::{ChatConfig, ChatRows};
use long_context::{LongContext, LongContextConfig};
use synthetic::{Generated, Side};

/// Everything about data besides what it is.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Tokens per row.
    pub seq_len: usize,
    /// Rows per batch.
    pub batch_size: usize,
    /// Decides order and generated samples.
    pub seed: u64,
    /// Whether rows see across documents.
    pub packing: Packing,
    /// Share of a text kept for validation.
    pub validation_fraction: f64,
    /// What is kept out of training to watch a model on it, where anybody does.
    pub tracking: Option<Tracking>,
    /// Validation samples of a generated set.
    pub validation_samples: u64,
    /// Where token files are kept.
    pub cache_dir: PathBuf,
    /// The project's folder, for its own text.
    pub project_root: PathBuf,
}

/// Texts that are neither learned from nor validated on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tracking {
    /// Share of a text.
    pub fraction: f64,
    /// How many texts at most, each of up to `seq_len` tokens.
    pub texts: usize,
}

/// Data, ready to use.
pub struct Opened {
    /// Batches to learn from, without end.
    pub train: Loader,
    /// Batches to validate on.
    pub validation: Loader,
    /// Texts to watch a model on, a batch of one row each, without padding; empty where nobody does.
    pub tracking: Vec<Batch>,
    /// For text.
    pub tokenizer: Option<Tokenizer>,
    /// Ids that occur.
    pub vocab_size: usize,
    /// What the data is, in words.
    pub description: String,
    /// What else there is to know before it is learned from.
    pub notes: Vec<String>,
    /// For text: a hash of the texts and the tokenizer, which tells whether files have changed.
    pub text_hash: Option<String>,
    /// The lowest loss that any model can reach, in nats per target, where it is known.
    pub floor: Option<f64>,
}

/// Opens what a recipe names. `progress` is told bytes done and bytes in all while text is turned into tokens; generated
/// data needs no tokenizer.
///
/// # Errors
/// If a setting breaks a rule, files are missing or malformed, or there is too little text.
pub fn open(
    data: &DataConfig,
    tokenizer: &Tokenizer,
    options: &OpenOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Opened, DataError> {
    let OpenOptions { seq_len, batch_size, seed, packing, .. } = *options;
    let loader = |samples: Arc<dyn Samples>, bytes: Option<Vec<u32>>, order: Order| {
        Loader::new(samples, bytes, LoaderOptions { batch_size, seed, order })
    };
    if batch_size == 0 {
        return Err(DataError::Unusable("training.batch_size (0) must be at least 1".into()));
    }
    data.validate(seq_len)
        .map_err(|(field, problem)| DataError::Unusable(format!("data.{}.{field}: {problem}", data.name())))?;
    if let Some((task, floor)) = data.task(seed) {
        let vocab_size = task.vocab_size();
        let description = format!("generated: {} ({vocab_size} ids), new samples without end", data.name());
        let train = Generated { task, seq_len, seed, side: Side::Train };
        let again = || data.task(seed).unwrap_or_else(|| unreachable!("the same data is generated again")).0;
        let texts = options.tracking.map_or(0, |tracking| tracking.texts as u64);
        let tracked = Generated { task: again(), seq_len, seed, side: Side::Tracking(texts) };
        let tracking = watched(&tracked, texts)?;
        let task = again();
        let held_out = Generated { task, seq_len, seed, side: Side::Validation(options.validation_samples.max(1)) };
        let (train, validation) =
            (loader(Arc::new(train), None, Order::Endless), loader(Arc::new(held_out), None, Order::Once));
        return Ok(Opened {
            train,
            validation,
            tracking,
            tokenizer: None,
            vocab_size,
            description,
            notes: Vec::new(),
            text_hash: None,
            floor,
        });
    }
    if let DataConfig::Chat(config) = data {
        return open_chats(config, tokenizer, options);
    }
    if let DataConfig::LongContext(config) = data {
        return open_long_context(config, tokenizer, options);
    }
    if data.is_labelled() {
        let problem = format!("data.{} is examples with classes, for model.classifier", data.name());
        return Err(DataError::Unusable(problem));
    }
    if data.is_pairs() {
        let problem = format!("data.{} is pairs that belong together, for model.embedder", data.name());
        return Err(DataError::Unusable(problem));
    }
    let Documents { texts: documents, description: source, notes } = documents(data, &options.project_root)?;
    let file = TokenFile::open_or_build(&documents, tokenizer, &options.cache_dir, progress)?;
    let tracked_share = options.tracking.map_or(0.0, |tracking| tracking.fraction);
    let split = split(&file, options.validation_fraction, tracked_share)?;
    let texts =
        options.tracking.map_or(Ok(Vec::new()), |tracking| file.texts(&split.tracking, seq_len, tracking.texts))?;
    let tracking = texts.into_iter().map(Batch::text).collect();
    let train = Windows::new(file.clone(), split.train, seq_len, packing, Some(seed))?;
    let held_out = Windows::new(file.clone(), split.validation, seq_len, packing, None)?;
    let (bytes, note) = known(tokenizer.token_bytes_of(documents.iter().map(|document| document.text.as_str())));
    Ok(Opened {
        train: loader(Arc::new(train), bytes.clone(), Order::Shuffled),
        validation: loader(Arc::new(held_out), bytes, Order::Once),
        tracking,
        vocab_size: tokenizer.vocab_size(),
        tokenizer: Some(tokenizer.clone()),
        description: format!("{source}: {} tokens; {}", file.len(), split.description),
        notes: notes.into_iter().chain(note).collect(),
        text_hash: Some(file.key().to_owned()),
        floor: None,
    })
}

fn open_chats(config: &ChatConfig, tokenizer: &Tokenizer, options: &OpenOptions) -> Result<Opened, DataError> {
    let OpenOptions { seq_len, batch_size, seed, validation_fraction, .. } = *options;
    let (chats, counts) = chat::read_chats(config, tokenizer, seq_len)?;
    let template = config.template(tokenizer)?;
    let mut hash = blake3::Hasher::new();
    // Conversations of one row lie on one side; a row's hash is that of its first.
    let (mut rows, mut hashes) = (Vec::new(), Vec::new());
    for chat in &chats {
        let ids: Vec<u8> = chat.tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
        hash.update(&(ids.len() as u64).to_le_bytes()).update(&ids);
        if rows.last() != Some(&chat.row) {
            rows.push(chat.row);
            let own = blake3::hash(&ids);
            hashes.push(u64::from_le_bytes(std::array::from_fn(|i| own.as_bytes()[i])));
        }
    }
    let sides = chat::Sides::of(&hashes, validation_fraction, options.tracking.map(|tracking| tracking.fraction))?;
    let place = |index: usize| rows.partition_point(|&row| row < chats[index].row);
    let chosen =
        |side: &dyn Fn(usize) -> bool| (0..chats.len()).filter(|&index| side(place(index))).collect::<Vec<_>>();
    let train = chosen(&|row| !sides.held_out(row) && !sides.tracked(row));
    let (validation, tracked) = (chosen(&|row| sides.held_out(row)), chosen(&|row| sides.tracked(row)));
    let most = options.tracking.map_or(0, |tracking| tracking.texts);
    for (what, empty) in [
        ("to learn from", train.is_empty()),
        ("to watch the model on", options.tracking.is_some() && tracked.is_empty()),
    ] {
        if empty {
            let problem = format!(
                "data.chat: of {} conversations none is left {what}, as validation and tracking take their own: give more",
                chats.len()
            );
            return Err(DataError::Unusable(problem));
        }
    }
    let sizes = (train.len(), validation.len());
    let (tokens, learned) = chats.iter().fold((0, 0), |(tokens, learned), chat| {
        (tokens + chat.tokens.len(), learned + chat.learned.iter().filter(|&&learned| learned).count())
    });
    let chats = Arc::new(chats);
    let rows = |which: Vec<usize>, pack: bool| ChatRows::new(chats.clone(), which, (seq_len, pack, tokenizer.pad()));
    let [train, validation] = [train, validation].map(|which| rows(which, config.pack));
    let followed = match options.tracking {
        Some(_) => format!(", {} for tracking", tracked.len()),
        None => String::new(),
    };
    let tracking = watched(&rows(tracked, false), most as u64)?;
    let mut left_out = String::new();
    for (count, what) in [
        (counts.bad, "bad rows skipped"),
        (counts.weightless, "with nothing that is to be learned"),
        (counts.dropped, "too long, dropped"),
        (counts.truncated, "too long, cut"),
    ] {
        if count > 0 {
            left_out.push_str(&format!(", {count} {what}"));
        }
    }
    let description = format!(
        "{} rows of chat{left_out}: {tokens} tokens, {learned} of them learned; {} conversations for training in {} rows \
         ({:.0} % padding), {} for validation{followed}",
        counts.rows,
        sizes.0,
        train.per_epoch(),
        100.0 * train.padding(),
        sizes.1
    );
    let several = (counts.several > 0).then(|| {
        format!(
            "{} conversations are learned as several each ({} in all): the template renders their answers otherwise once more \
             follow, so that each is learned where it stands as it has to be written",
            counts.several,
            chats.len()
        )
    });
    let told = chat::notes(config, &counts, &template);
    let markers = chat::note(&template, tokenizer, "data.chat.template", &config.template)?;
    let (bytes, note) = known(tokenizer.token_bytes_of_sample());
    let loader = |rows: ChatRows, order: Order| {
        Loader::new(Arc::new(rows), bytes.clone(), LoaderOptions { batch_size, seed, order })
    };
    Ok(Opened {
        train: loader(train, Order::Shuffled),
        validation: loader(validation, Order::Once),
        tracking,
        vocab_size: tokenizer.vocab_size(),
        // Whoever uses the model has to write as it has learned to read.
        tokenizer: Some(tokenizer.clone().with_chat_template(template.source().to_owned())),
        description,
        notes: several.into_iter().chain(markers).chain(note).chain(told).chain(counts.left_out).collect(),
        text_hash: Some(hash.finalize().to_hex().to_string()),
        floor: None,
    })
}

fn open_long_context(
    config: &LongContextConfig,
    tokenizer: &Tokenizer,
    options: &OpenOptions,
) -> Result<Opened, DataError> {
    let OpenOptions { seq_len, batch_size, seed, validation_samples, .. } = *options;
    let rows = |side| LongContext::new(config, tokenizer, seq_len, (seed, side));
    let (train, held_out) = (rows(Side::Train)?, rows(Side::Validation(validation_samples.max(1)))?);
    let markers = chat::note(train.template(), tokenizer, "data.long_context.template", &config.template)?;
    let template = train.template().source().to_owned();
    let most = options.tracking.map_or(0, |tracking| tracking.texts as u64);
    let tracked = rows(Side::Tracking(most))?;
    let tracking = watched(&tracked, most)?;
    let (bytes, note) = known(tokenizer.token_bytes_of_sample());
    let loader = |rows, order| Loader::new(Arc::new(rows), bytes.clone(), LoaderOptions { batch_size, seed, order });
    let tasks: Vec<&str> = config.tasks.iter().map(|task| task.name()).collect();
    Ok(Opened {
        train: loader(train, Order::Endless),
        validation: loader(held_out, Order::Once),
        tracking,
        vocab_size: tokenizer.vocab_size(),
        tokenizer: Some(tokenizer.clone().with_chat_template(template)),
        description: format!("generated: questions about texts of up to {seq_len} tokens ({})", tasks.join(", ")),
        notes: markers.into_iter().chain(note).collect(),
        text_hash: None,
        floor: None,
    })
}

/// Bytes per id where they are known, and a note where they are not.
fn known(bytes: Result<Vec<u32>, String>) -> (Option<Vec<u32>>, Option<String>) {
    match bytes {
        Ok(bytes) => (Some(bytes), None),
        Err(note) => (None, Some(note)),
    }
}

/// The first samples, `most` or as many as there are, to watch a model on: as they would be learned from, less what pads them.
fn watched(samples: &dyn Samples, most: u64) -> Result<Vec<Batch>, DataError> {
    let row = |index: u64| {
        let Sample { mut tokens, mut targets, mut documents, mut roles } = samples.sample(0, index)?;
        let filled = roles.as_ref().and_then(|roles| roles.iter().rposition(|&role| role != Role::Padding));
        let seq = filled.map_or(tokens.len(), |last| last + 1);
        tokens.truncate(seq);
        targets.truncate(seq);
        documents.iter_mut().for_each(|documents| documents.truncate(seq));
        roles.iter_mut().for_each(|roles| roles.truncate(seq));
        Ok(Batch { batch: 1, seq, tokens, targets, documents, roles, target_bytes: 0 })
    };
    (0..most.min(samples.per_epoch())).map(row).collect()
}

/// How many ids data has, known without reading it.
pub fn vocab_size(data: &DataConfig, tokenizer: &Tokenizer) -> usize {
    data.task(0).map_or_else(|| tokenizer.vocab_size(), |(task, _)| task.vocab_size())
}

/// The documents of a text source.
pub struct Documents {
    /// The texts.
    pub texts: Vec<TextDocument>,
    /// What they are, in words.
    pub description: String,
    /// What was left out or changed, with counts.
    pub notes: Vec<String>,
}

/// Reads or makes the documents of a text source.
///
/// # Errors
/// If files are missing or malformed, or the source is no text.
pub fn documents(data: &DataConfig, project_root: &Path) -> Result<Documents, DataError> {
    let counted = |read: FromFiles<TextDocument>, what: &str| {
        let FromFiles { items: texts, notes } = read;
        let bytes: usize = texts.iter().map(|document| document.text.len()).sum();
        let plural = if texts.len() == 1 { "" } else { "s" };
        let description = format!("{} {what}{plural} ({:.1} MB)", texts.len(), bytes as f64 / 1e6);
        if bytes == 0 {
            let name = data.name();
            return Err(DataError::Unusable(format!("{description} hold no text: name others in data.{name}.paths")));
        }
        Ok(Documents { texts, description, notes })
    };
    match data {
        DataConfig::RustDocs(_) => {
            let (texts, description) = rust_docs::read_rust_docs(project_root)?;
            Ok(Documents { texts, description, notes: Vec::new() })
        }
        DataConfig::Text(config) => counted(text::read_text(config)?, "text file"),
        DataConfig::Jsonl(config) => counted(text::read_jsonl(config)?, "JSON row"),
        DataConfig::LongContext(config) => {
            let made = FromFiles { items: long_context::texts(config)?, notes: Vec::new() };
            counted(made, "generated conversation")
        }
        other => Err(DataError::Unusable(format!("data.{} is no text", other.name()))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use polyhead_models::IGNORE;

    use super::*;

    fn opened(data: &str, batch_size: usize) -> Result<Opened, DataError> {
        let options = OpenOptions {
            seq_len: 32,
            batch_size,
            seed: 3,
            packing: Packing::Stream,
            validation_fraction: 0.1,
            tracking: Some(Tracking { fraction: 0.1, texts: 3 }),
            validation_samples: 6,
            cache_dir: PathBuf::new(),
            project_root: PathBuf::new(),
        };
        let data: DataConfig = serde_json::from_str(data).unwrap();
        open(&data, &Tokenizer::bytes(), &options, &mut |_, _| {})
    }

    #[test]
    fn generated_sets_open_with_their_optimum() {
        for (data, vocab_size, floor) in
            [("induction", 64, Some(0.0)), ("copy", 65, Some(0.0)), ("associative_recall", 129, Some(0.0))]
        {
            let config = format!(r#"{{"{data}":{{}}}}"#);
            let opened = opened(&config, 4).unwrap();
            let known = super::vocab_size(&serde_json::from_str(&config).unwrap(), &Tokenizer::bytes());
            assert_eq!(known, vocab_size);
            assert_eq!((opened.vocab_size, opened.floor), (vocab_size, floor));
            assert_eq!((opened.validation.per_epoch(), opened.validation.batches_per_epoch()), (6, 2));
            assert_ne!(opened.train.batch(0).unwrap(), opened.validation.batch(0).unwrap());
            let rows = |batch: Batch| batch.tokens.chunks(32).map(<[u32]>::to_vec).collect::<Vec<_>>();
            assert_eq!(opened.tracking.len(), 3);
            for position in 0..2 {
                let used =
                    [rows(opened.train.batch(position).unwrap()), rows(opened.validation.batch(position).unwrap())];
                assert!(used.concat().iter().all(|row| opened.tracking.iter().all(|tracked| tracked.tokens != *row)));
            }
        }
    }

    #[test]
    fn tracked_rows_are_what_would_be_learnt_from() {
        let rows = opened(r#"{"facts":{}}"#, 4).unwrap();
        let learned = rows.train.batch(0).unwrap().row(0);
        assert_eq!(rows.tracking.len(), 3);
        for row in rows.tracking {
            // Statements of five tokens, whose answers and ends are asked for.
            assert_eq!(row.documents, learned.documents);
            let asked = |row: &Batch| row.targets.iter().map(|&target| target != IGNORE).collect::<Vec<_>>();
            assert_eq!((asked(&row), row.seq), (asked(&learned), 32));
        }
        let file = chats(0, 40);
        let rows = opened(&chat_data(&file), 4).unwrap();
        assert!(!rows.tracking.is_empty());
        for row in rows.tracking {
            let roles = row.roles.clone().unwrap();
            assert!(!roles.contains(&Role::Padding) && roles.len() == row.seq);
            // As evaluation asks: the answer, and nothing of the question.
            for (at, &target) in row.targets.iter().enumerate() {
                let answer = roles.get(at + 1) == Some(&Role::Assistant);
                assert_eq!(target != IGNORE, answer, "{at}: {roles:?}");
            }
        }
    }

    /// So many conversations in a file, from a number on.
    fn chats(first: usize, count: usize) -> tempfile::NamedTempFile {
        let row = |i| {
            format!(
                r#"{{"messages": [{{"role": "user", "content": "{i}?"}}, {{"role": "assistant", "content": "{}"}}]}}"#,
                i % 7
            )
        };
        let file = tempfile::Builder::new().suffix(".jsonl").tempfile().unwrap();
        std::fs::write(file.path(), (first..first + count).map(row).collect::<Vec<_>>().join("\n")).unwrap();
        file
    }

    fn chat_data(file: &tempfile::NamedTempFile) -> String {
        serde_json::json!({ "chat": { "paths": [file.path()], "template": "plain" } }).to_string()
    }

    #[test]
    fn few_conversations_are_each_on_one_side() {
        // Some of these sets leave nothing to validation, and their last one to tracking, before it is put right.
        for (first, count) in (0..40).flat_map(|first| [(10 * first, 5), (10 * first, 8)]) {
            let rows = opened(&chat_data(&chats(first, count)), 1).unwrap();
            let sizes = [rows.train.per_epoch(), rows.validation.per_epoch(), rows.tracking.len() as u64];
            assert!(sizes.iter().all(|&side| side > 0), "{first}, {count}: {sizes:?}");
            assert!(rows.description.ends_with(" for tracking"), "{}", rows.description);
        }
        let message = |count| opened(&chat_data(&chats(0, count)), 1).err().unwrap().to_string();
        assert!(message(1).contains("one conversation") && message(1).contains("at least 2"), "{}", message(1));
        assert!(message(2).contains("of 2 conversations none is left to "), "{}", message(2));
    }

    #[test]
    fn a_setting_that_breaks_a_rule_is_named() {
        let message = |data, batch_size| opened(data, batch_size).err().unwrap().to_string();
        let told = message(r#"{"needles":{"n_distractors":9}}"#, 4);
        assert!(told.starts_with("data.needles.n_needles: 3 * "), "{told}");
        assert!(message(r#"{"copy":{}}"#, 0).contains("batch_size (0)"));
    }
}
