//! A source of data: one table of `[data]`.
//!
//! [`Source`] is implemented by the settings of a source, in the source's own file. The table in `lib.rs` lists all of them;
//! from it come the keys of recipes, their reference, and what [`DataConfig`](crate::DataConfig) does.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use polyhead_models::{Batch, InputShape};

use crate::documents::Documents;
use crate::examples::{AugmentConfig, Labelled, Paired};
use crate::loader::Loader;
use crate::synthetic::World;
use crate::{DataError, Packing, Tokenizer};

/// What a source yields, which decides the kind of model that trains on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Yields {
    /// Rows of tokens, for decoders.
    Tokens,
    /// Labelled examples, for classifiers.
    Examples,
    /// Pairs that belong together, for embedders.
    Pairs,
}

/// What the samples of a source are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Modality {
    /// Generated ids, which need no tokenizer.
    Ids,
    /// Text, which a tokenizer turns into ids.
    Text,
    /// Conversations, which a chat template turns into text.
    Chat,
    /// Images.
    Images,
    /// Audio, as log-mel images.
    Audio,
    /// Features of the layers of a frozen model.
    Features,
}

/// The settings of a source.
pub trait Source {
    /// What it yields.
    const YIELDS: Yields;
    /// What its samples are.
    const MODALITY: Modality;
    /// Whether its samples are generated, not read from files.
    const GENERATED: bool = false;

    /// Checks the settings without touching a file.
    ///
    /// # Errors
    /// Names the field and the rule.
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        Ok(())
    }

    /// Paths and patterns of the files and folders that it reads.
    fn paths(&self) -> Vec<String> {
        Vec::new()
    }

    /// Whether new samples come without end, so that there are no epochs.
    fn is_endless(&self) -> bool {
        Self::GENERATED
    }

    /// The shape of its examples, where the recipe alone tells it.
    fn shape(&self) -> Option<InputShape> {
        None
    }

    /// How many ids it has, known without reading it.
    fn vocab_size(&self, tokenizer: &Tokenizer) -> usize {
        tokenizer.vocab_size()
    }

    /// The generated facts that it states, if it does.
    fn facts(&self, _seed: u64) -> Option<World> {
        None
    }

    /// Its texts, to train a tokenizer on; `None` if it has none.
    fn documents(&self, _project_root: &Path) -> Option<Result<Documents, DataError>> {
        None
    }

    /// Reads or generates it.
    ///
    /// # Errors
    /// If files are missing or malformed, or there is too little data.
    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError>;
}

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
    /// How images are augmented in training.
    pub augmentation: AugmentConfig,
    /// Share of a text kept for validation.
    pub validation_fraction: f64,
    /// What is kept out of training to track a model on it, where anybody does.
    pub tracking: Option<Tracking>,
    /// Validation samples of a generated set.
    pub validation_samples: u64,
    /// Where token files are kept.
    pub cache_dir: PathBuf,
    /// The project's folder, for its own text.
    pub project_root: PathBuf,
}

/// Texts that are neither trained nor validated on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tracking {
    /// Share of a text.
    pub fraction: f64,
    /// How many texts at most, each of up to `seq_len` tokens.
    pub texts: usize,
}

/// What a source is opened with.
pub struct Opening<'a> {
    /// The source's name, for messages.
    pub name: &'static str,
    /// For text.
    pub tokenizer: &'a Tokenizer,
    /// Everything else.
    pub options: &'a OpenOptions,
    /// Gets bytes done and bytes in all while text is tokenized.
    pub progress: &'a mut dyn FnMut(u64, u64),
}

/// Data, ready to use.
pub enum Data {
    /// For decoders.
    Tokens(Box<Opened>),
    /// For classifiers.
    Examples(Box<Labelled>),
    /// For embedders.
    Pairs(Box<Paired>),
}

/// Rows of tokens, ready to use.
pub struct Opened {
    /// Batches to train on, without end.
    pub train: Loader,
    /// Batches to validate on.
    pub validation: Loader,
    /// Texts to track a model on, a batch of one row each, without padding; empty where nobody does.
    pub tracking: Vec<Batch>,
    /// For text.
    pub tokenizer: Option<Tokenizer>,
    /// Ids that occur.
    pub vocab_size: usize,
    /// What the data is, in words.
    pub description: String,
    /// What else there is to know before training on it.
    pub notes: Vec<String>,
    /// For text: a hash of the texts and the tokenizer, which tells whether files have changed.
    pub text_hash: Option<String>,
    /// The lowest loss that any model can reach, in nats per target, where it is known.
    pub floor: Option<f64>,
}

impl Data {
    /// What it is, in words.
    pub fn description(&self) -> &str {
        match self {
            Self::Tokens(opened) => &opened.description,
            Self::Examples(labelled) => &labelled.description,
            Self::Pairs(paired) => &paired.description,
        }
    }

    /// What else there is to know before training on it.
    pub fn notes(&self) -> &[String] {
        match self {
            Self::Tokens(opened) => &opened.notes,
            Self::Examples(labelled) => &labelled.notes,
            Self::Pairs(_) => &[],
        }
    }

    /// For files: a hash of what was read.
    pub fn text_hash(&self) -> Option<&str> {
        match self {
            Self::Tokens(opened) => opened.text_hash.as_deref(),
            Self::Examples(labelled) => labelled.text_hash.as_deref(),
            Self::Pairs(paired) => Some(&paired.text_hash),
        }
    }

    /// Batches until every training sample has come once.
    pub fn batches_per_epoch(&self) -> u64 {
        match self {
            Self::Tokens(opened) => opened.train.batches_per_epoch(),
            Self::Examples(labelled) => labelled.train.batches_per_epoch(),
            Self::Pairs(paired) => paired.train.batches_per_epoch(),
        }
    }
}

/// A setting that breaks a rule: the field, and the problem in words.
pub type Problem = (&'static str, String);

/// `Ok` if `rule` holds.
pub(crate) fn require(rule: bool, field: &'static str, problem: impl FnOnce() -> String) -> Result<(), Problem> {
    if rule { Ok(()) } else { Err((field, problem())) }
}

/// `Ok` if a value is in a range.
pub(crate) fn within<T: PartialOrd + Display>(
    field: &'static str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<(), Problem> {
    let rule = || format!("{field} ({value}) must be {} to {}", range.start(), range.end());
    require(range.contains(&value), field, rule)
}

/// Refuses an empty list of paths.
pub(crate) fn some_path<T>(paths: &[T]) -> Result<(), Problem> {
    require(!paths.is_empty(), "paths", || "paths is empty: name at least one file, folder or pattern".into())
}

/// Paths as text.
pub(crate) fn shown<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Vec<String> {
    paths.into_iter().map(|path| path.display().to_string()).collect()
}

/// Makes [`DataConfig`](crate::DataConfig) and what it does from the table of sources.
macro_rules! sources {
    ($($(#[$doc:meta])* $key:ident => $Source:ident, $Config:ident;)+) => {
        /// What a model trains on: one table of `[data]`.
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum DataConfig { $($(#[$doc])* $Source($Config),)+ }

        impl DataConfig {
            /// The name of its table.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$Source(_) => stringify!($key),)+ }
            }

            /// See [`Source::YIELDS`].
            pub fn yields(&self) -> Yields {
                match self { $(Self::$Source(_) => $Config::YIELDS,)+ }
            }

            /// See [`Source::MODALITY`].
            pub fn modality(&self) -> Modality {
                match self { $(Self::$Source(_) => $Config::MODALITY,)+ }
            }

            /// See [`Source::GENERATED`].
            pub fn is_generated(&self) -> bool {
                match self { $(Self::$Source(_) => $Config::GENERATED,)+ }
            }

            /// See [`Source::validate`].
            ///
            /// # Errors
            /// Names the field and the rule.
            pub fn validate(&self, seq_len: usize) -> Result<(), Problem> {
                match self { $(Self::$Source(config) => config.validate(seq_len),)+ }
            }

            /// See [`Source::paths`].
            pub fn paths(&self) -> Vec<String> {
                match self { $(Self::$Source(config) => config.paths(),)+ }
            }

            /// See [`Source::is_endless`].
            pub fn is_endless(&self) -> bool {
                match self { $(Self::$Source(config) => config.is_endless(),)+ }
            }

            /// See [`Source::shape`].
            pub fn shape(&self) -> Option<InputShape> {
                match self { $(Self::$Source(config) => config.shape(),)+ }
            }

            /// See [`Source::vocab_size`].
            pub fn vocab_size(&self, tokenizer: &Tokenizer) -> usize {
                match self { $(Self::$Source(config) => config.vocab_size(tokenizer),)+ }
            }

            /// See [`Source::facts`].
            pub fn facts(&self, seed: u64) -> Option<World> {
                match self { $(Self::$Source(config) => config.facts(seed),)+ }
            }

            /// See [`Source::documents`].
            ///
            /// # Errors
            /// If files are missing or malformed, or it has no texts.
            pub fn documents(&self, project_root: &Path) -> Result<Documents, DataError> {
                let documents = match self { $(Self::$Source(config) => config.documents(project_root),)+ };
                documents.unwrap_or_else(|| Err(DataError::Unusable(format!("data.{} has no texts", self.name()))))
            }

            /// See [`Source::open`]. `progress` gets bytes done and bytes in all while text is tokenized; only
            /// text needs a tokenizer.
            ///
            /// # Errors
            /// If a setting breaks a rule, files are missing or malformed, or there is too little data.
            pub fn open(
                &self,
                tokenizer: &Tokenizer,
                options: &OpenOptions,
                progress: &mut dyn FnMut(u64, u64),
            ) -> Result<Data, DataError> {
                if options.batch_size == 0 {
                    return Err(DataError::Unusable("training.batch_size (0) must be at least 1".into()));
                }
                self.validate(options.seq_len).map_err(|(field, problem)| {
                    DataError::Unusable(format!("data.{}.{field}: {problem}", self.name()))
                })?;
                let opening = Opening { name: self.name(), tokenizer, options, progress };
                match self { $(Self::$Source(config) => config.open(opening),)+ }
            }
        }
    };
}
pub(crate) use sources;

impl crate::DataConfig {
    /// Whether it is text, which needs a tokenizer.
    pub fn is_text(&self) -> bool {
        matches!(self.modality(), Modality::Text | Modality::Chat)
    }

    /// See [`open`](Self::open), for a decoder.
    ///
    /// # Errors
    /// The same, or if it yields something else than tokens.
    pub fn open_tokens(
        &self,
        tokenizer: &Tokenizer,
        options: &OpenOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Opened, DataError> {
        match self.open(tokenizer, options, progress)? {
            Data::Tokens(opened) => Ok(*opened),
            _ => Err(self.not("tokens", "model.decoder")),
        }
    }

    /// See [`open`](Self::open), for a classifier.
    ///
    /// # Errors
    /// The same, or if it yields something else than labelled examples.
    pub fn open_examples(&self, tokenizer: &Tokenizer, options: &OpenOptions) -> Result<Labelled, DataError> {
        match self.open(tokenizer, options, &mut |_, _| {})? {
            Data::Examples(labelled) => Ok(*labelled),
            _ => Err(self.not("classes", "model.classifier")),
        }
    }

    /// See [`open`](Self::open), for an embedder.
    ///
    /// # Errors
    /// The same, or if it yields something else than pairs.
    pub fn open_pairs(&self, options: &OpenOptions) -> Result<Paired, DataError> {
        match self.open(&Tokenizer::bytes(), options, &mut |_, _| {})? {
            Data::Pairs(paired) => Ok(*paired),
            _ => Err(self.not("pairs", "model.embedder")),
        }
    }

    fn not(&self, what: &str, model: &str) -> DataError {
        DataError::Unusable(format!("data.{} has no {what} for {model} to train on", self.name()))
    }
}
