//! Text, conversations, generated tasks and labelled examples, to batches.
//!
//! Start here. A source of data is one table of `[data]`: the list below has all of them, and [`Source`] is what each
//! implements in a file of its own. A new source is that file, a `mod` line and a line in the list; from the list it gets its
//! key in recipes and its place in their reference.
//!
//! [`DataConfig::open`] turns a source into batches by position: a [`Loader`] of rows of tokens, an [`ExampleLoader`] of
//! labelled examples or a [`PairLoader`]. Text goes through documents (`documents.rs`), token ids in a memory-mapped file
//! (`documents/tokens.rs`) and rows (`documents/windows.rs`).

pub mod chat;
mod documents;
mod error;
mod examples;
mod files;
mod guard;
mod loader;
pub mod long_context;
mod order;
mod source;
pub mod synthetic;
mod tokenizer;

use std::path::Path;

use polyhead_models::InputShape;

pub use documents::{
    Documents, FromFiles, JsonlConfig, LabelledFields, LabelledText, Packing, PairedText, RustDocsConfig, Syntax,
    TextConfig, TextDocument, distinct_names, read_labelled, read_pairs,
};
pub use error::DataError;
pub use examples::{
    AugmentConfig, ChirpsConfig, CifarConfig, CsvImagesConfig, ExampleLoader, FeaturePairsConfig, FeaturesConfig,
    IdxConfig, ImageFolderConfig, Labelled, LabelledTextConfig, LayerFeaturesConfig, NewFeatures, NewPairs, PairLoader,
    Paired, ShapesConfig, WavFolderConfig, read_features,
};
pub use loader::{Loader, LoaderOptions, Order, Sample, Samples};
pub use source::{Data, Modality, OpenOptions, Opened, Opening, Problem, Source, Tracking, Yields};
pub use tokenizer::{HuggingfaceTokenizer, StreamDecoder, Tokenizer, TokenizerConfig, train_bpe};

use chat::ChatConfig;
use long_context::LongContextConfig;
use synthetic::{
    AssociativeRecallConfig, CopyConfig, FactsConfig, InductionConfig, MarkovConfig, NeedlesConfig, World,
};

source::sources! {
    /// The English of the Rust documentation that rustup installs; without it, the project's own text and source.
    rust_docs => RustDocs, RustDocsConfig;
    /// Text files.
    text => Text, TextConfig;
    /// Rows of JSON or of tables with a text field.
    jsonl => Jsonl, JsonlConfig;
    /// Conversations, one a row of JSON or of a table.
    chat => Chat, ChatConfig;
    /// Generated questions about long texts, as conversations.
    long_context => LongContext, LongContextConfig;
    /// A random Markov chain, whose best possible loss is known.
    markov => Markov, MarkovConfig;
    /// Multi-query associative recall.
    associative_recall => AssociativeRecall, AssociativeRecallConfig;
    /// Needles in filler, with look-alikes.
    needles => Needles, NeedlesConfig;
    /// A random sequence and the same again.
    induction => Induction, InductionConfig;
    /// Random tokens, a separator, the same tokens.
    copy => Copy, CopyConfig;
    /// A world of facts, some of which are never taught.
    facts => Facts, FactsConfig;
    /// For classifiers: generated images of a shape among clutter.
    shapes => Shapes, ShapesConfig;
    /// For classifiers: generated audio in noise.
    chirps => Chirps, ChirpsConfig;
    /// For classifiers: images in IDX files, as MNIST's.
    idx => Idx, IdxConfig;
    /// For classifiers: CIFAR's binary files.
    cifar => Cifar, CifarConfig;
    /// For classifiers: images as rows of a table.
    csv_images => CsvImages, CsvImagesConfig;
    /// For classifiers: image files, a folder for each class.
    image_folder => ImageFolder, ImageFolderConfig;
    /// For classifiers: WAV files, a folder for each class.
    wav_folder => WavFolder, WavFolderConfig;
    /// For classifiers: texts with their classes, one a row of JSON or of a table.
    labelled_text => LabelledText, LabelledTextConfig;
    /// For classifiers: features of all layers of a frozen model, in files.
    features => Features, FeaturesConfig;
    /// For classifiers: generated features of layers, with impulses and drift.
    layer_features => LayerFeatures, LayerFeaturesConfig;
    /// For embedders: features of texts that belong together, in files.
    feature_pairs => FeaturePairs, FeaturePairsConfig;
}

#[cfg(test)]
mod tests;
