//! Batches of labelled examples.

use std::sync::Arc;

use polyhead_models::{Examples, InputShape, Inputs};

use super::{AugmentConfig, Content, Example, ExampleSet};
use crate::loader::{LoaderOptions, Order};
use crate::{DataError, OpenOptions};

/// Batches of examples by position.
#[derive(Clone)]
pub struct ExampleLoader {
    pub(super) set: Arc<dyn ExampleSet>,
    augment: Option<AugmentConfig>,
    options: LoaderOptions,
}

impl ExampleLoader {
    pub(super) fn new(set: Arc<dyn ExampleSet>, (options, order): (&OpenOptions, Order)) -> Self {
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
