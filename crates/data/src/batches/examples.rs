//! Batches of labelled examples, for classifiers.

use std::sync::Arc;

use polyhead_models::{Examples, InputShape, Inputs};

use super::{LoaderOptions, Order, Samples, Stream};
use crate::augment::AugmentConfig;
use crate::options::OpenOptions;
use crate::{DataError, Tokenizer};

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

/// Batches of examples by position.
#[derive(Clone)]
pub struct ExampleLoader {
    stream: Stream<Example>,
    shape: InputShape,
}

impl ExampleLoader {
    /// A loader over examples of one shape; images are augmented in training, never in validation.
    pub(crate) fn new(
        examples: Arc<dyn Samples<Example>>,
        shape: InputShape,
        (options, order): (&OpenOptions, Order),
    ) -> Self {
        let (augment, seed) = (options.augmentation.clone(), options.seed);
        let samples: Arc<dyn Samples<Example>> = match order == Order::Once || augment.is_nothing() {
            true => examples,
            false => Arc::new(Augmented { examples, shape, augment, seed }),
        };
        Self { stream: Stream { samples, options: LoaderOptions::of(options, order) }, shape }
    }

    /// The shape of an input.
    pub fn shape(&self) -> InputShape {
        self.shape
    }

    /// Examples of an epoch.
    pub fn per_epoch(&self) -> u64 {
        self.stream.samples.per_epoch()
    }

    /// Batches until every example has come once.
    pub fn batches_per_epoch(&self) -> u64 {
        self.stream.batches_per_epoch()
    }

    /// Batch number `position` since the start; where examples come as they are, the last one of an epoch is as short as what is
    /// left.
    ///
    /// # Errors
    /// If an example cannot be read.
    pub fn batch(&self, position: u64) -> Result<Examples, DataError> {
        Ok(collate(self.stream.batch(position)?, self.shape))
    }
}

/// Examples as augmentation changes them, in each epoch otherwise.
struct Augmented {
    examples: Arc<dyn Samples<Example>>,
    shape: InputShape,
    augment: AugmentConfig,
    seed: u64,
}

impl Samples<Example> for Augmented {
    fn per_epoch(&self) -> u64 {
        self.examples.per_epoch()
    }

    fn sample(&self, epoch: u64, index: u64) -> Result<Example, DataError> {
        let mut example = self.examples.sample(epoch, index)?;
        if let Content::Numbers(pixels) = &mut example.content {
            self.augment.apply(pixels, self.shape, (self.seed, epoch, index));
        }
        Ok(example)
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
