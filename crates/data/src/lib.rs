//! Text, conversations, generated tasks and labelled examples, to batches.
//!
//! Start here. A source of data is one table of `[data]`: the list below has all of them, and [`Source`] is what each
//! implements in a file of its own; `mixture.rs` mixes several of text. A new source is that file, a `mod` line and a line in the list; from the list it gets its
//! key in recipes and its place in their reference.
//!
//! A source is opened as batches by position (`batches.rs`): a [`Loader`] of rows of tokens, an [`ExampleLoader`] of labelled
//! examples, a [`PairLoader`] or an [`ImageLoader`]. Text goes through documents (`texts.rs`), token ids in a memory-mapped file
//! (`documents/tokens.rs`) and rows (`documents/windows.rs`).

#[macro_use]
mod error;

mod augment;
mod batches;
pub mod chat;
mod documents;
mod examples;
mod files;
mod guard;
mod image_file;
pub mod long_context;
mod mixture;
mod options;
mod problem;
mod prompt_pairs;
mod random;
mod source;
pub mod synthetic;
mod table;
pub mod text_suites;
mod texts;
mod tokenizer;
mod unlabelled;
mod would_read;

pub use augment::AugmentConfig;
pub use batches::{
    ExampleLoader, ImageLoader, ImageSet, Labelled, Loader, LoaderOptions, Opened, Order, PairLoader, Paired, Sample,
    Samples,
};
pub use documents::{
    JsonlConfig, LabelledFields, LabelledText, NumberRule, PairedText, PostKind, PostsConfig, RustDocsConfig, Syntax,
    Template, TextConfig, distinct_names, read_labelled, read_pairs, read_templates,
};
pub use error::DataError;
pub use examples::{
    ChirpsConfig, CifarConfig, CsvImagesConfig, FeatureArray, FeaturePairsConfig, FeatureTableConfig, FeaturesConfig,
    IdxConfig, ImageFolderConfig, LabelledTextConfig, LayerFeaturesConfig, NewFeatures, NewPairs, ShapesConfig,
    WavFolderConfig, open_features, open_labels,
};
pub use image_file::{Image, read_image};
pub use mixture::{LastDocument, MixedSource, MixtureConfig, Until, documents_within, quotas};
pub use options::{OpenOptions, Packing, Tracking};
pub use problem::Problem;
pub use prompt_pairs::{PairTask, Prompt, WrittenPair, generate_pairs, read_prompt_pairs};
pub use source::{Data, Modality, Opening, Origin, Source, Yields};
pub use table::MIXTURE;
pub use texts::{Contents, Documents, FromFiles, TakeText, TextDocument};
pub use tokenizer::{HuggingfaceTokenizer, StreamDecoder, Tokenizer, TokenizerConfig, train_bpe};
pub use unlabelled::{ImageFilesConfig, PatternsConfig};

use chat::ChatConfig;
use long_context::LongContextConfig;
use synthetic::StateTrackingConfig;
use synthetic::{
    AssociativeRecallConfig, CopyConfig, FactsConfig, InContextConfig, InductionConfig, MadConfig, MarkovConfig,
    MqarConfig, NeedlesConfig,
};
use text_suites::{BabilongLikeConfig, RulerConfig};

// From where, what samples are, what they become.
source::sources! {
    /// The English of the Rust documentation that rustup installs; without it, the project's own text and source.
    rust_docs => RustDocs(RustDocsConfig): Files, Text, Tokens;
    /// Text files.
    text => Text(TextConfig): Files, Text, Tokens;
    /// Rows of JSON or of tables with a text field.
    jsonl => Jsonl(JsonlConfig): Files, Text, Tokens;
    /// Generated posts: junk that says nothing, or control text that practises three skills.
    posts => Posts(PostsConfig): Generated, Text, Tokens;
    /// Conversations, one a row of JSON or of a table.
    chat => Chat(ChatConfig): Files, Chat, Tokens;
    /// Generated questions about long texts, as conversations.
    long_context => LongContext(LongContextConfig): Generated, Chat, Tokens;
    /// A synthetic task of RULER, in our own words: long texts with a question.
    ruler => Ruler(RulerConfig): Generated, Text, Tokens;
    /// Stories in the manner of BABILong: facts scattered in a background, with a question.
    babilong_like => BabilongLike(BabilongLikeConfig): Generated, Text, Tokens;
    /// A random Markov chain, whose best possible loss is known.
    markov => Markov(MarkovConfig): Generated, Ids, Tokens;
    /// Multi-query associative recall.
    associative_recall => AssociativeRecall(AssociativeRecallConfig): Generated, Ids, Tokens;
    /// Multi-query associative recall as Zoology's code makes it: finite sets of rows, by length and pairs.
    mqar => Mqar(MqarConfig): Generated, Ids, Tokens;
    /// The tasks of mechanistic architecture design (MAD): recall, copying, compression, memorisation.
    mad => Mad(MadConfig): Generated, Ids, Tokens;
    /// State tracking: parity, arithmetic, words of groups, bounded brackets.
    state_tracking => StateTracking(StateTrackingConfig): Generated, Ids, Tokens;
    /// Needles in filler, with look-alikes.
    needles => Needles(NeedlesConfig): Generated, Ids, Tokens;
    /// Shots of a hidden task, then inputs that it is asked for.
    in_context => InContext(InContextConfig): Generated, Ids, Tokens;
    /// A random sequence and the same again.
    induction => Induction(InductionConfig): Generated, Ids, Tokens;
    /// Random tokens, a separator, the same tokens.
    copy => Copy(CopyConfig): Generated, Ids, Tokens;
    /// A world of facts, some of which are never taught.
    facts => Facts(FactsConfig): Generated, Ids, Tokens;
    /// For classifiers: generated images of a shape among clutter.
    shapes => Shapes(ShapesConfig): Generated, Images, Examples;
    /// For classifiers: generated audio in noise.
    chirps => Chirps(ChirpsConfig): Generated, Audio, Examples;
    /// For classifiers: images in IDX files, as MNIST's.
    idx => Idx(IdxConfig): Files, Images, Examples;
    /// For classifiers: CIFAR's binary files.
    cifar => Cifar(CifarConfig): Files, Images, Examples;
    /// For classifiers: images as rows of a table.
    csv_images => CsvImages(CsvImagesConfig): Files, Images, Examples;
    /// For classifiers: image files, a folder for each class.
    image_folder => ImageFolder(ImageFolderConfig): Files, Images, Examples;
    /// For classifiers: WAV files, a folder for each class.
    wav_folder => WavFolder(WavFolderConfig): Files, Audio, Examples;
    /// For classifiers: texts with their classes, one a row of JSON or of a table.
    labelled_text => LabelledText(LabelledTextConfig): Files, Text, Examples;
    /// For classifiers: features of all layers of a frozen model, in files.
    features => Features(FeaturesConfig): Files, Features, Examples;
    /// For classifiers: rows of numbers with their classes, of tables, Parquet, Arrow or JSON.
    feature_table => FeatureTable(FeatureTableConfig): Files, Features, Examples;
    /// For classifiers: generated features of layers, with impulses and drift.
    layer_features => LayerFeatures(LayerFeaturesConfig): Generated, Features, Examples;
    /// For embedders: features of texts that belong together, in files.
    feature_pairs => FeaturePairs(FeaturePairsConfig): Files, Features, Pairs;
    /// For super-resolution: squares of image files of any size.
    image_files => ImageFiles(ImageFilesConfig): Files, Images, Images;
    /// For super-resolution: generated images of repeated patterns.
    patterns => Patterns(PatternsConfig): Generated, Images, Images;
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
