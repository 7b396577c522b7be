//! `[data]`: one of its tables.

use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::chat::ChatConfig;
use crate::examples::{
    ChirpsConfig, CifarConfig, CsvImagesConfig, FeaturePairsConfig, FeaturesConfig, IdxConfig, ImageFolderConfig,
    LabelledTextConfig, LayerFeaturesConfig, ShapesConfig, WavFolderConfig,
};
use crate::long_context::LongContextConfig;
use crate::synthetic::{
    AssociativeRecallConfig, CopyConfig, FactsConfig, InductionConfig, MarkovConfig, NeedlesConfig, Problem, Task,
};
use crate::text::{JsonlConfig, TextConfig};

/// What a model learns from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DataConfig {
    /// The English of the Rust documentation that rustup installs; without it, the project's own text and source.
    RustDocs(RustDocsConfig),
    /// Text files.
    Text(TextConfig),
    /// Lines of JSON with a text field.
    Jsonl(JsonlConfig),
    /// Conversations, one a line of JSON.
    Chat(ChatConfig),
    /// Generated questions about long texts, as conversations.
    LongContext(LongContextConfig),
    /// A random Markov chain, whose best possible loss is known.
    Markov(MarkovConfig),
    /// Multi-query associative recall.
    AssociativeRecall(AssociativeRecallConfig),
    /// Needles in filler, with look-alikes.
    Needles(NeedlesConfig),
    /// A random sequence and the same again.
    Induction(InductionConfig),
    /// Random tokens, a separator, the same tokens.
    Copy(CopyConfig),
    /// A world of facts, some of which are never taught.
    Facts(FactsConfig),
    /// For classifiers: generated pictures of a shape among clutter.
    Shapes(ShapesConfig),
    /// For classifiers: generated sounds in noise.
    Chirps(ChirpsConfig),
    /// For classifiers: pictures in IDX files, as MNIST's.
    Idx(IdxConfig),
    /// For classifiers: CIFAR's binary files.
    Cifar(CifarConfig),
    /// For classifiers: pictures as rows of a table.
    CsvImages(CsvImagesConfig),
    /// For classifiers: image files, a folder for each class.
    ImageFolder(ImageFolderConfig),
    /// For classifiers: WAV files, a folder for each class.
    WavFolder(WavFolderConfig),
    /// For classifiers: texts with their classes, one a line of JSON.
    LabelledText(LabelledTextConfig),
    /// For classifiers: features of all layers of a frozen model, in files.
    Features(FeaturesConfig),
    /// For classifiers: generated features of layers, with impulses and drift.
    LayerFeatures(LayerFeaturesConfig),
    /// For embedders: features of texts that belong together, in files.
    FeaturePairs(FeaturePairsConfig),
}

/// The Rust documentation has no settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RustDocsConfig {}

impl DataConfig {
    /// Whether it is text, which needs a tokenizer.
    pub fn is_text(&self) -> bool {
        matches!(
            self,
            Self::RustDocs(_)
                | Self::Text(_)
                | Self::Jsonl(_)
                | Self::Chat(_)
                | Self::LongContext(_)
                | Self::LabelledText(_)
        )
    }

    /// Whether it is examples with a class each, for classifiers.
    pub fn is_labelled(&self) -> bool {
        matches!(
            self,
            Self::Shapes(_)
                | Self::Chirps(_)
                | Self::Idx(_)
                | Self::Cifar(_)
                | Self::CsvImages(_)
                | Self::ImageFolder(_)
                | Self::WavFolder(_)
                | Self::LabelledText(_)
                | Self::Features(_)
                | Self::LayerFeatures(_)
        )
    }

    /// Whether it is pairs that belong together, for embedders.
    pub fn is_pairs(&self) -> bool {
        matches!(self, Self::FeaturePairs(_))
    }

    /// Whether its examples are made, not read from files.
    pub fn is_generated(&self) -> bool {
        matches!(self, Self::Shapes(_) | Self::Chirps(_) | Self::LayerFeatures(_))
            || !self.is_text() && !self.is_labelled() && !self.is_pairs()
    }

    /// Whether new rows come without end, so that there are no epochs.
    pub fn is_endless(&self) -> bool {
        matches!(self, Self::LongContext(_)) || self.is_generated() && !self.is_labelled()
    }

    /// Whether it is pictures, or sounds as pictures.
    pub fn shows_pictures(&self) -> bool {
        self.is_labelled() && !matches!(self, Self::LabelledText(_) | Self::Features(_) | Self::LayerFeatures(_))
    }

    /// Whether its pictures are of sounds: time from left to right, pitch from bottom to top.
    pub fn is_sounds(&self) -> bool {
        matches!(self, Self::Chirps(_) | Self::WavFolder(_))
    }

    /// The shape of its examples, where the recipe alone tells it.
    pub fn shape(&self) -> Option<InputShape> {
        let images = |channels, [height, width]: [usize; 2]| Some(InputShape::Images { channels, height, width });
        match self {
            Self::Shapes(config) => images(1, [config.size; 2]),
            Self::Chirps(config) => images(1, config.log_mel.size()),
            Self::WavFolder(config) => images(1, config.log_mel.size()),
            Self::Cifar(_) => images(3, [32; 2]),
            Self::CsvImages(config) => images(1, config.size),
            Self::ImageFolder(config) => images(config.channels, config.size),
            Self::LayerFeatures(config) => Some(InputShape::Features { layers: config.n_layers, dim: config.dim }),
            _ => None,
        }
    }

    /// The name of its table.
    pub fn name(&self) -> &'static str {
        match self {
            Self::RustDocs(_) => "rust_docs",
            Self::Text(_) => "text",
            Self::Jsonl(_) => "jsonl",
            Self::Chat(_) => "chat",
            Self::LongContext(_) => "long_context",
            Self::Markov(_) => "markov",
            Self::AssociativeRecall(_) => "associative_recall",
            Self::Needles(_) => "needles",
            Self::Induction(_) => "induction",
            Self::Copy(_) => "copy",
            Self::Facts(_) => "facts",
            Self::Shapes(_) => "shapes",
            Self::Chirps(_) => "chirps",
            Self::Idx(_) => "idx",
            Self::Cifar(_) => "cifar",
            Self::CsvImages(_) => "csv_images",
            Self::ImageFolder(_) => "image_folder",
            Self::WavFolder(_) => "wav_folder",
            Self::LabelledText(_) => "labelled_text",
            Self::Features(_) => "features",
            Self::LayerFeatures(_) => "layer_features",
            Self::FeaturePairs(_) => "feature_pairs",
        }
    }

    /// Checks the settings without touching a file.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        let named = |paths: &[String]| match paths.is_empty() {
            true => Err(("paths", "paths is empty: name at least one file, folder or pattern".to_owned())),
            false => Ok(()),
        };
        match self {
            Self::RustDocs(_) => Ok(()),
            Self::Text(text) => named(&text.paths),
            Self::Jsonl(jsonl) => named(&jsonl.paths),
            Self::Chat(chat) => chat.validate(),
            Self::LongContext(config) => config.validate(),
            Self::Markov(task) => task.validate(),
            Self::AssociativeRecall(task) => task.validate(seq_len),
            Self::Needles(task) => task.validate(seq_len),
            Self::Induction(task) => task.validate(seq_len),
            Self::Copy(task) => task.validate(seq_len),
            Self::Facts(facts) => facts.validate(seq_len),
            Self::Shapes(config) => config.validate(),
            Self::Chirps(config) => config.validate(),
            Self::Idx(config) => config.validate(),
            Self::Cifar(config) => config.validate(),
            Self::CsvImages(config) => config.validate(),
            Self::ImageFolder(config) => config.validate(),
            Self::WavFolder(config) => config.validate(),
            Self::LabelledText(config) => config.validate(),
            Self::Features(config) => config.validate(),
            Self::LayerFeatures(config) => config.validate(),
            Self::FeaturePairs(config) => config.validate(),
        }
    }

    /// The generator of a set that is no text, and the best possible loss where it is known.
    pub(crate) fn task(&self, seed: u64) -> Option<(Box<dyn Task>, Option<f64>)> {
        if self.is_text() || self.is_labelled() {
            return None;
        }
        match self.clone() {
            Self::Markov(config) => {
                let chain = config.chain(seed);
                let floor = chain.floor();
                Some((Box::new(chain), Some(floor)))
            }
            Self::AssociativeRecall(task) => Some((Box::new(task), Some(0.0))),
            Self::Needles(task) => Some((Box::new(task), Some(0.0))),
            Self::Induction(task) => Some((Box::new(task), Some(0.0))),
            Self::Copy(task) => Some((Box::new(task), Some(0.0))),
            Self::Facts(facts) => Some((Box::new(facts.world(seed)), Some(0.0))),
            _ => None,
        }
    }
}
