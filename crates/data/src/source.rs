//! A source of data: one table of `[data]`.
//!
//! [`Source`] is implemented by the settings of a source, in the source's own file. The table in `lib.rs` lists all of them;
//! from it come the keys of recipes, their reference, and what [`DataConfig`] does.

use std::path::Path;

use polyhead_models::InputShape;

use crate::batches::{ImageSet, Labelled, Opened, Paired};
use crate::options::OpenOptions;
use crate::problem::Problem;
use crate::texts::Documents;
use crate::{DataConfig, DataError, Tokenizer};

/// Where the samples of a source come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// They are read from files.
    Files,
    /// They are generated.
    Generated,
}

/// What a source yields, which decides the kind of model that trains on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Yields {
    /// Rows of tokens, for decoders.
    Tokens,
    /// Labelled examples, for classifiers.
    Examples,
    /// Pairs that belong together, for embedders.
    Pairs,
    /// Images without classes, for super-resolution.
    Images,
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

    /// Whether generated samples come again, so that there are epochs.
    fn repeats(&self) -> bool {
        false
    }

    /// The shape of its examples, where the recipe alone tells it.
    fn shape(&self) -> Option<InputShape> {
        None
    }

    /// Tokens of its longest row, to train or to test on.
    fn longest_row(&self, seq_len: usize) -> usize {
        seq_len
    }

    /// How many ids it has, known without reading it.
    fn vocab_size(&self, tokenizer: &Tokenizer) -> usize {
        tokenizer.vocab_size()
    }

    /// Its texts; `None` if it has none.
    ///
    /// # Errors
    /// If files are missing or malformed.
    fn documents(&self, _project_root: &Path) -> Result<Option<Documents>, DataError> {
        Ok(None)
    }

    /// Reads or generates it.
    ///
    /// # Errors
    /// If files are missing or malformed, or there is too little data.
    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError>;
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
    /// For super-resolution.
    Images(Box<ImageSet>),
}

/// Makes [`DataConfig`] and what is known of each source from the table of sources.
macro_rules! sources {
    ($($(#[$doc:meta])* $key:ident => $Source:ident($Config:ident): $Origin:ident, $Modality:ident, $Yields:ident;)+) => {
        /// What a model trains on: one table of `[data]`, or several in a mixture.
        #[derive(Debug, Clone, PartialEq)]
        pub enum DataConfig {
            $($(#[$doc])* $Source($Config),)+
            /// Texts of several sources in exact shares.
            Mixture($crate::MixtureConfig),
        }

        /// What a model trains on: one table of `[data]`.
        #[derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[serde(rename_all = "snake_case")]
        pub(crate) enum Single { $($(#[$doc])* $Source($Config),)+ }

        impl From<Single> for DataConfig {
            fn from(single: Single) -> Self {
                match single { $(Single::$Source(config) => Self::$Source(config),)+ }
            }
        }

        impl serde::Serialize for DataConfig {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match self {
                    $(Self::$Source(config) => Single::$Source(config.clone()).serialize(serializer),)+
                    Self::Mixture(mixture) => mixture.serialize(serializer),
                }
            }
        }

        impl DataConfig {
            /// The name of its table.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$Source(_) => stringify!($key),)+ Self::Mixture(_) => "source" }
            }

            /// Where its samples come from.
            pub fn origin(&self) -> Origin {
                match self { $(Self::$Source(_) => Origin::$Origin,)+ Self::Mixture(_) => Origin::Files }
            }

            /// What its samples are.
            pub fn modality(&self) -> Modality {
                match self { $(Self::$Source(_) => Modality::$Modality,)+ Self::Mixture(_) => Modality::Text }
            }

            /// What it yields.
            pub fn yields(&self) -> Yields {
                match self { $(Self::$Source(_) => Yields::$Yields,)+ Self::Mixture(_) => Yields::Tokens }
            }

            /// Its settings.
            pub fn source(&self) -> &dyn Source {
                match self { $(Self::$Source(config) => config,)+ Self::Mixture(config) => config }
            }
        }
    };
}
pub(crate) use sources;

impl DataConfig {
    /// Checks the settings without touching a file.
    ///
    /// # Errors
    /// Names the field, from `[data]` on, and the rule.
    pub fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        let own = |error: Problem| if matches!(self, Self::Mixture(_)) { error } else { error.within(self.name()) };
        self.source().validate(seq_len).map_err(own)
    }

    /// What the sources that are trained on are called, whose losses are told apart; none where it is of one.
    pub fn trained_sources(&self) -> Vec<String> {
        match self {
            Self::Mixture(mixture) => mixture.trained_names(),
            Self::Facts(facts) => facts.source_names(),
            _ => Vec::new(),
        }
    }

    /// Whether it is text, which needs a tokenizer.
    pub fn is_text(&self) -> bool {
        matches!(self.modality(), Modality::Text | Modality::Chat)
    }

    /// Whether its samples are generated, not read from files.
    pub fn is_generated(&self) -> bool {
        self.origin() == Origin::Generated
    }

    /// Whether new samples come without end, so that there are no epochs.
    pub fn is_endless(&self) -> bool {
        self.is_generated() && !self.source().repeats()
    }

    /// Its texts, to train a tokenizer on.
    ///
    /// # Errors
    /// If files are missing or malformed, or it has no texts.
    pub fn documents(&self, project_root: &Path) -> Result<Documents, DataError> {
        texts_of(self.source(), self.name(), project_root)
    }

    /// See [`Source::open`]. `progress` gets bytes done and bytes in all while text is tokenized; only text needs a
    /// tokenizer.
    fn open(
        &self,
        tokenizer: &Tokenizer,
        options: &OpenOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Data, DataError> {
        if options.batch_size == 0 {
            return Err(unusable!("training.batch_size (0) must be at least 1"));
        }
        self.validate(options.seq_len).map_err(|error| unusable!("data.{error}"))?;
        self.source().open(Opening { name: self.name(), tokenizer, options, progress })
    }

    /// Opens it for a decoder. `progress` gets bytes done and bytes in all while text is tokenized; only text needs a
    /// tokenizer.
    ///
    /// # Errors
    /// If a setting breaks a rule, files are missing or malformed, there is too little data, or it yields something else than
    /// tokens.
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

    /// Opens it for a classifier.
    ///
    /// # Errors
    /// As [`open_tokens`](Self::open_tokens), or if it yields something else than labelled examples.
    pub fn open_examples(&self, tokenizer: &Tokenizer, options: &OpenOptions) -> Result<Labelled, DataError> {
        match self.open(tokenizer, options, &mut |_, _| {})? {
            Data::Examples(labelled) => Ok(*labelled),
            _ => Err(self.not("classes", "model.classifier")),
        }
    }

    /// Opens it for an embedder.
    ///
    /// # Errors
    /// As [`open_tokens`](Self::open_tokens), or if it yields something else than pairs.
    pub fn open_pairs(&self, options: &OpenOptions) -> Result<Paired, DataError> {
        match self.open(&Tokenizer::bytes(), options, &mut |_, _| {})? {
            Data::Pairs(paired) => Ok(*paired),
            _ => Err(self.not("pairs", "model.embedder")),
        }
    }

    /// Opens it for super-resolution.
    ///
    /// # Errors
    /// As [`open_tokens`](Self::open_tokens), or if it yields something else than images without classes.
    pub fn open_images(&self, options: &OpenOptions) -> Result<ImageSet, DataError> {
        match self.open(&Tokenizer::bytes(), options, &mut |_, _| {})? {
            Data::Images(images) => Ok(*images),
            _ => Err(self.not("images without classes", "model.super_resolution")),
        }
    }

    fn not(&self, what: &str, model: &str) -> DataError {
        unusable!("data.{} has no {what} for {model} to train on", self.name())
    }
}

/// The texts of a source.
pub(crate) fn texts_of(source: &dyn Source, name: &str, project_root: &Path) -> Result<Documents, DataError> {
    source.documents(project_root)?.ok_or_else(|| unusable!("data.{name} has no texts"))
}
