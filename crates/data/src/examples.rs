//! Labelled examples for classifiers: images, audio, texts and features, from files or generated.
//!
//! An example is a pure function of (seed, side, epoch, index), what augmentation draws included. Sources that read files
//! hand over [`Found`], those that generate implement [`Maker`].

mod audio;
mod class_folders;
mod classes;
mod feature_pairs;
mod features;
mod images;
mod labelled_text;
mod layer_features;

use std::sync::Arc;

use polyhead_models::{Examples, InputShape, Inputs};
use rand_chacha::ChaCha8Rng;

use crate::loader::{LoaderOptions, Order};
use crate::synthetic::{EPOCH, Side};
use crate::{Data, DataError, OpenOptions, Opening, Tokenizer};

pub use audio::{ChirpsConfig, WavFolderConfig};
pub use feature_pairs::{FeaturePairsConfig, PairLoader, Paired, read_features};
pub use features::{FeaturesConfig, NewFeatures, NewPairs};
pub use images::{AugmentConfig, CifarConfig, CsvImagesConfig, IdxConfig, ImageFolderConfig, ShapesConfig};
pub use labelled_text::LabelledTextConfig;
pub use layer_features::LayerFeaturesConfig;

use classes::Classes;

/// An example with its class.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Example {
    /// What is classified.
    pub content: Content,
    /// Its class.
    pub label: u32,
    /// Its group; 0 where the data has none.
    pub group: u32,
}

/// What is classified: of the shape that its set tells.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Content {
    /// Pixels, or features.
    Numbers(Vec<f32>),
    /// Token ids, not padded.
    Tokens(Vec<u32>),
}

/// A set of examples of one shape.
pub(crate) trait ExampleSet: Send + Sync {
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
    fn new(set: Arc<dyn ExampleSet>, (options, order): (&OpenOptions, Order)) -> Self {
        // Nothing is augmented in validation.
        let augment = Some(&options.augmentation).filter(|augment| order != Order::Once && !augment.is_nothing());
        Self { set, augment: augment.cloned(), options: LoaderOptions::of(options, order) }
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
    /// Batches to train on, without end.
    pub train: ExampleLoader,
    /// Batches to validate on.
    pub validation: ExampleLoader,
    /// The names of the classes.
    pub classes: Vec<String>,
    /// Training examples of each class; where they are generated without end, equally many.
    pub counts: Vec<u64>,
    /// The names of the groups by which a model is asked to be equally good; none where the data has none.
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

/// Generated examples of one side.
pub(crate) struct Drawn<T> {
    /// What makes examples.
    pub task: T,
    /// Decides all of them.
    pub seed: u64,
    /// Training or validation.
    pub side: Side,
    /// Examples of an epoch.
    pub samples: u64,
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
        self.samples
    }

    /// Classes take turns, so that any stretch of examples has all of them equally often.
    fn example(&self, index: u64) -> Result<Example, DataError> {
        let class = (index % self.task.classes().len() as u64) as usize;
        let mut rng = self.side.rng(self.seed, index);
        let group = self.task.group(class, &mut rng);
        let content = Content::Numbers(self.task.make(class, group, &mut rng));
        Ok(Example { content, label: class as u32, group: group as u32 })
    }
}

/// Generated examples: new ones without end, or `samples` of them again and again. `what` describes them.
fn generated(task: impl Maker, what: &str, samples: Option<u64>, opening: Opening<'_>) -> Result<Data, DataError> {
    let (options, seed, classes) = (opening.options, opening.options.seed, task.classes());
    let (n, in_all) = (classes.len() as u64, samples.unwrap_or(EPOCH));
    let held_out = options.validation_samples.max(1);
    let loader = |side, samples, order| {
        ExampleLoader::new(Arc::new(Drawn { task: task.clone(), seed, side, samples }), (options, order))
    };
    let order = if samples.is_some() { Order::Shuffled } else { Order::Endless };
    let count = samples.map_or("new samples without end".into(), |samples| format!("{samples} samples to train on"));
    Ok(Data::Examples(Box::new(Labelled {
        train: loader(Side::Train, in_all, order),
        validation: loader(Side::Validation(held_out), held_out, Order::Once),
        counts: (0..n).map(|class| (in_all + n - 1 - class) / n).collect(),
        description: format!("generated: {what}, {n} classes, {count}"),
        classes,
        groups: task.groups(),
        tokenizer: None,
        notes: Vec::new(),
        text_hash: None,
    })))
}

/// Labelled examples that were found in files, not yet divided.
pub(crate) struct Found {
    /// What they are, in words: goes before ", 10 classes".
    pub what: String,
    /// Of each example.
    pub shape: InputShape,
    /// The class of each example.
    pub labels: Vec<u32>,
    /// So many at the beginning are to train on. If these are all, some of them are held out.
    pub to_train: usize,
    /// The names of the classes.
    pub classes: Vec<String>,
    /// The key of the recipe that says where classes are, where there is one.
    pub label_field: Option<&'static str>,
    /// The names of the groups, where there are some.
    pub groups: Vec<String>,
    /// Reads an example by its number.
    pub example: Box<dyn Fn(usize) -> Result<Example, DataError> + Send + Sync>,
    /// What was left out, changed or guessed.
    pub notes: Vec<String>,
    /// Of everything that was read.
    pub hash: blake3::Hasher,
}

/// Some of the examples that were found.
struct Part {
    found: Arc<Found>,
    indices: Vec<u32>,
}

impl ExampleSet for Part {
    fn shape(&self) -> InputShape {
        self.found.shape
    }

    fn per_epoch(&self) -> u64 {
        self.indices.len() as u64
    }

    fn example(&self, index: u64) -> Result<Example, DataError> {
        (self.found.example)(self.indices[index as usize] as usize)
    }
}

impl Found {
    /// Checks the classes and divides the examples. `also` ends the description.
    fn open(mut self, also: &str, opening: Opening<'_>) -> Result<Data, DataError> {
        let Opening { name, options, tokenizer, .. } = opening;
        let mut notes = std::mem::take(&mut self.notes);
        if self.to_train == 0 || self.labels.is_empty() {
            let problem = format!("data.{name}: no example to train on can be read; {}", notes.join("; "));
            return Err(DataError::Unusable(problem));
        }
        let classes = Classes { names: &self.classes, data: name, field: self.label_field };
        notes.extend(classes.check(self.labels[..self.to_train].iter().copied())?);
        let [train, validation] = divide(self.labels.len(), self.to_train, options.validation_fraction)?;
        let mut counts = vec![0; self.classes.len()];
        train.iter().for_each(|&index| counts[self.labels[index as usize] as usize] += 1);
        let description = format!(
            "{}, {} classes: {} for training, {} for validation{also}",
            self.what,
            self.classes.len(),
            train.len(),
            validation.len()
        );
        let (classes, groups) = (self.classes.clone(), self.groups.clone());
        let is_text = matches!(self.shape, InputShape::Tokens { .. });
        let text_hash = Some(self.hash.finalize().to_hex().to_string());
        let found = Arc::new(self);
        let loader =
            |indices, order| ExampleLoader::new(Arc::new(Part { found: found.clone(), indices }), (options, order));
        Ok(Data::Examples(Box::new(Labelled {
            train: loader(train, Order::Shuffled),
            validation: loader(validation, Order::Once),
            classes,
            counts,
            groups,
            tokenizer: is_text.then(|| tokenizer.clone()),
            description,
            notes,
            text_hash,
        })))
    }
}

/// Which of `n` examples are to train on and which to validate on: the first `to_train` and the others, or if these are all, a
/// share of them. The same whatever the seed, so that runs are compared on the same.
///
/// # Errors
/// If there are too few for both sides.
fn divide(n: usize, to_train: usize, fraction: f64) -> Result<[Vec<u32>; 2], DataError> {
    const KEY: u64 = 0x0064_6976_6964_6564; // "divided"
    if n > to_train {
        return Ok([(0..to_train as u32).collect(), (to_train as u32..n as u32).collect()]);
    }
    if n < 2 {
        return Err(DataError::Unusable(format!("{n} examples cannot be both trained and validated on: give more")));
    }
    let kept = ((n as f64 * fraction).ceil() as u64).clamp(1, n as u64 - 1);
    let (validation, train) =
        (0..n as u32).partition(|&index| crate::order::permute(n as u64, KEY, u64::from(index)) < kept);
    Ok([train, validation])
}

#[cfg(test)]
mod tests;
