//! Labelled examples for classifiers: pictures, texts, sounds, from files or generated.
//!
//! [`open_labelled`] turns `[data]` of a recipe into two [`ExampleLoader`]s. A source is a file here with its settings and an
//! [`ExampleSet`]. An example is a pure function of (seed, side, epoch, index), what augmentation draws included.

mod augment;
mod chirps;
mod cifar;
mod classes;
mod csv_images;
mod decode;
mod feature_pairs;
mod features;
mod fourier;
mod idx;
mod image_folder;
mod labelled_text;
mod layer_features;
mod log_mel;
mod packed;
mod pictures;
mod shapes;
mod wav;
mod wav_folder;

use std::sync::Arc;

use polyhead_models::{Examples, InputShape, Inputs};
use rand_chacha::ChaCha8Rng;

use crate::loader::{LoaderOptions, Order};
use crate::synthetic::{EPOCH, Side};
use crate::{DataConfig, DataError, OpenOptions, Tokenizer};

pub use augment::AugmentConfig;
pub use chirps::ChirpsConfig;
pub use cifar::{CifarConfig, CifarLabels};
pub use csv_images::{Column, CsvImagesConfig};
pub use feature_pairs::{FeaturePairsConfig, PairLoader, Paired, open_pairs, read_features};
pub use features::{FeaturesConfig, NewFeatures, NewPairs};
pub use idx::IdxConfig;
pub use image_folder::ImageFolderConfig;
pub use labelled_text::LabelledTextConfig;
pub use layer_features::LayerFeaturesConfig;
pub use log_mel::LogMelConfig;
pub use shapes::ShapesConfig;
pub use wav_folder::WavFolderConfig;

use classes::Classes;
use pictures::Pictures;

/// An example with its class.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// What is classified.
    pub content: Content,
    /// Its class.
    pub label: u32,
    /// Its group; 0 where data tells none.
    pub group: u32,
}

/// What is classified: of the shape that its set tells.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Pixels, or features.
    Numbers(Vec<f32>),
    /// Token ids, not padded.
    Tokens(Vec<u32>),
}

/// A set of examples of one shape.
pub trait ExampleSet: Send + Sync {
    /// The shape of an input.
    fn shape(&self) -> InputShape;

    /// Examples of an epoch.
    fn per_epoch(&self) -> u64;

    /// Example `index` of any epoch, before augmentation.
    ///
    /// # Errors
    /// If it cannot be read.
    fn example(&self, index: u64) -> Result<Example, DataError>;
}

/// Batches of examples by position.
#[derive(Clone)]
pub struct ExampleLoader {
    set: Arc<dyn ExampleSet>,
    augment: Option<AugmentConfig>,
    options: LoaderOptions,
}

impl ExampleLoader {
    /// A loader over `set`, which augments pictures if told how.
    pub fn new(set: Arc<dyn ExampleSet>, augment: Option<AugmentConfig>, options: LoaderOptions) -> Self {
        Self { set, augment, options }
    }

    /// The shape of an input.
    pub fn shape(&self) -> InputShape {
        self.set.shape()
    }

    /// Batches until every example has come once.
    pub fn batches_per_epoch(&self) -> u64 {
        self.set.per_epoch().div_ceil(self.options.batch_size.max(1) as u64)
    }

    /// Batch number `position` since the start; where examples come as they are, the last one of an epoch is as short as what is
    /// left.
    ///
    /// # Errors
    /// If an example cannot be read.
    pub fn batch(&self, position: u64) -> Result<Examples, DataError> {
        let n = self.set.per_epoch();
        let mut all = Vec::new();
        for number in self.options.rows(n, position) {
            let (epoch, index) = self.options.place(n, number);
            let mut example = self.set.example(index)?;
            if let (Some(augment), Content::Numbers(pixels), shape @ InputShape::Images { .. }) =
                (&self.augment, &mut example.content, self.shape())
            {
                augment.apply(pixels, shape, (self.options.seed, epoch, index));
            }
            all.push(example);
        }
        Ok(collate(all, self.shape()))
    }
}

/// Examples of one shape as a batch.
fn collate(all: Vec<Example>, shape: InputShape) -> Examples {
    let [labels, groups] =
        [|example: &Example| example.label, |example: &Example| example.group].map(|of| all.iter().map(of).collect());
    let (mut numbers, mut tokens, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
    for example in all {
        match example.content {
            Content::Numbers(more) => numbers.extend(more),
            Content::Tokens(text) => {
                lengths.push(text.len() as u32);
                tokens.push(text);
            }
        }
    }
    let inputs = match shape {
        InputShape::Images { channels, height, width } => Inputs::Images { pixels: numbers, channels, height, width },
        InputShape::Features { layers, dim } => Inputs::Features { values: numbers, layers, dim },
        InputShape::Tokens { seq_len, .. } => {
            // As long as the longest text of the batch: what is padded costs time and says nothing.
            let longest = lengths.iter().max().map_or(1, |&length| length as usize).min(seq_len);
            let mut padded = Vec::with_capacity(longest * lengths.len());
            for text in tokens {
                padded.extend_from_slice(&text);
                padded.resize(padded.len() + longest - text.len(), 0);
            }
            Inputs::Tokens { tokens: padded, lengths, seq_len: longest }
        }
    };
    Examples { inputs, labels, groups }
}

/// Labelled data, ready to use.
pub struct Labelled {
    /// Batches to learn from, without end.
    pub train: ExampleLoader,
    /// Batches to validate on.
    pub validation: ExampleLoader,
    /// The names of the classes.
    pub classes: Vec<String>,
    /// Examples of each class to learn from; where they are generated without end, equally many.
    pub counts: Vec<u64>,
    /// The names of the groups by which a model is asked to be equally good; none where data tells none.
    pub groups: Vec<String>,
    /// For text.
    pub tokenizer: Option<Tokenizer>,
    /// What the data is, in words.
    pub description: String,
    /// What was left out, changed or guessed, with counts.
    pub notes: Vec<String>,
    /// For files: a hash of what was read, which tells whether they have changed.
    pub text_hash: Option<String>,
}

/// What an example of each side is drawn from, for data that is generated.
pub(crate) struct Drawn<T> {
    /// What makes examples.
    pub task: T,
    /// Decides all of them.
    pub seed: u64,
    /// Training or validation.
    pub side: Side,
}

/// A way of making examples.
pub(crate) trait Maker: Clone + Send + Sync + 'static {
    /// The shape of an input.
    fn shape(&self) -> InputShape;

    /// The names of the classes.
    fn classes(&self) -> Vec<String>;

    /// The names of the groups, where there are some.
    fn groups(&self) -> Vec<String> {
        Vec::new()
    }

    /// The group of an example of a class, drawn before the example is.
    fn group(&self, _class: usize, _rng: &mut ChaCha8Rng) -> usize {
        0
    }

    /// An example of a class and a group.
    fn make(&self, class: usize, group: usize, rng: &mut ChaCha8Rng) -> Vec<f32>;
}

impl<T: Maker> ExampleSet for Drawn<T> {
    fn shape(&self) -> InputShape {
        self.task.shape()
    }

    fn per_epoch(&self) -> u64 {
        self.side.per_epoch()
    }

    /// Classes come in turn, so that any stretch of examples has all of them equally often.
    fn example(&self, index: u64) -> Result<Example, DataError> {
        let class = (index % self.task.classes().len() as u64) as usize;
        let mut rng = self.side.rng(self.seed, index);
        let group = self.task.group(class, &mut rng);
        let content = Content::Numbers(self.task.make(class, group, &mut rng));
        Ok(Example { content, label: class as u32, group: group as u32 })
    }
}

/// Opens what a recipe names.
///
/// # Errors
/// If a setting breaks a rule, files are missing or malformed, or there is too little to divide.
pub fn open_labelled(
    data: &DataConfig,
    tokenizer: &Tokenizer,
    augment: &AugmentConfig,
    options: &OpenOptions,
) -> Result<Labelled, DataError> {
    if options.batch_size == 0 {
        return Err(DataError::Unusable("training.batch_size (0) must be at least 1".into()));
    }
    match data {
        DataConfig::Shapes(config) => Ok(generated(config.clone(), "shapes", augment, options)),
        DataConfig::Chirps(config) => Ok(generated(chirps::Chirps::new(config), "chirps", augment, options)),
        DataConfig::Idx(config) => of_pictures(config.read()?, "IDX files", (data, augment, options)),
        DataConfig::Cifar(config) => of_pictures(config.read()?, "CIFAR files", (data, augment, options)),
        DataConfig::CsvImages(config) => of_pictures(config.read()?, "rows of pixels", (data, augment, options)),
        DataConfig::ImageFolder(config) => of_pictures(config.read()?, "image files", (data, augment, options)),
        DataConfig::WavFolder(config) => wav_folder::open(config, augment, options),
        DataConfig::LabelledText(config) => labelled_text::open(config, tokenizer, options),
        DataConfig::Features(config) => features::open(config, options),
        DataConfig::LayerFeatures(config) => Ok(layer_features::open(config, options)),
        other => {
            Err(DataError::Unusable(format!("data.{} has no classes: a classifier cannot learn it", other.name())))
        }
    }
}

fn generated<T: Maker>(task: T, name: &str, augment: &AugmentConfig, options: &OpenOptions) -> Labelled {
    let classes = task.classes();
    let set = |side| Arc::new(Drawn { task: task.clone(), seed: options.seed, side });
    let (train, held_out) = (set(Side::Train), set(Side::Validation(options.validation_samples.max(1))));
    Labelled {
        train: loader(train, Some(augment), options, Order::Endless),
        validation: loader(held_out, None, options, Order::Once),
        counts: vec![EPOCH / classes.len() as u64; classes.len()],
        description: format!("generated: {name} of {} classes, new samples without end", classes.len()),
        classes,
        groups: task.groups(),
        tokenizer: None,
        notes: Vec::new(),
        text_hash: None,
    }
}

fn loader(
    set: Arc<dyn ExampleSet>,
    augment: Option<&AugmentConfig>,
    options: &OpenOptions,
    order: Order,
) -> ExampleLoader {
    let augment = augment.filter(|augment| !augment.is_nothing()).cloned();
    ExampleLoader::new(set, augment, LoaderOptions { batch_size: options.batch_size, seed: options.seed, order })
}

/// What files of pictures hold: one set that is to be divided, or one for each side.
pub(crate) struct Found {
    pub learned: Pictures,
    pub held_out: Option<Pictures>,
    pub notes: Vec<String>,
}

fn of_pictures(
    found: Found,
    what: &str,
    (data, augment, options): (&DataConfig, &AugmentConfig, &OpenOptions),
) -> Result<Labelled, DataError> {
    let Found { learned, held_out, mut notes } = found;
    let mut hash = blake3::Hasher::new();
    learned.hash(&mut hash);
    if let Some(held_out) = &held_out {
        held_out.hash(&mut hash);
        if held_out.shape != learned.shape {
            return Err(DataError::Unusable("the pictures to validate on have another size than the others".into()));
        }
        if held_out.labels.iter().any(|&label| label as usize >= learned.classes.len()) {
            return Err(DataError::Unusable(
                "the pictures to validate on have classes that the others have not".into(),
            ));
        }
    }
    let field = matches!(data, DataConfig::CsvImages(_)).then_some("label");
    let held_out_labels = held_out.iter().flat_map(|held_out| &held_out.labels);
    let labels = learned.labels.iter().chain(held_out_labels).copied();
    notes.extend(Classes { names: &learned.classes, data: data.name(), field }.check(labels)?);
    let all = learned.labels.len();
    let (train, validation) = match held_out {
        Some(held_out) => {
            let count = held_out.labels.len();
            (
                pictures::Part::all(Arc::new(learned)),
                pictures::Part::of(Arc::new(held_out), (0..count as u32).collect()),
            )
        }
        None => {
            let [train, validation] = divide(all, options.validation_fraction)?;
            let learned = Arc::new(learned);
            (pictures::Part::of(learned.clone(), train), pictures::Part::of(learned, validation))
        }
    };
    let (counts, classes) = (train.counts(), train.set.classes.clone());
    let InputShape::Images { channels, height, width } = train.shape() else { unreachable!("pictures") };
    let (learned, kept) = (train.per_epoch(), validation.per_epoch());
    Ok(Labelled {
        description: format!(
            "{what}: {width} x {height} pixels of {channels} channels, {} classes; {learned} for training, {kept} for \
             validation",
            classes.len()
        ),
        train: loader(Arc::new(train), Some(augment), options, Order::Shuffled),
        validation: loader(Arc::new(validation), None, options, Order::Once),
        classes,
        counts,
        groups: Vec::new(),
        tokenizer: None,
        notes,
        text_hash: Some(hash.finalize().to_hex().to_string()),
    })
}

/// Which of `n` examples are learned from and which are validated on. The same whatever the seed, so that runs are compared on
/// the same.
///
/// # Errors
/// If there are too few for both sides.
pub(crate) fn divide(n: usize, fraction: f64) -> Result<[Vec<u32>; 2], DataError> {
    const KEY: u64 = 0x0064_6976_6964_6564; // "divided"
    if n < 2 {
        return Err(DataError::Unusable(format!("{n} examples cannot be both learned and validated on: give more")));
    }
    let kept = ((n as f64 * fraction).ceil() as u64).clamp(1, n as u64 - 1);
    let (validation, train) =
        (0..n as u32).partition(|&index| crate::order::permute(n as u64, KEY, u64::from(index)) < kept);
    Ok([train, validation])
}

#[cfg(test)]
mod tests;
