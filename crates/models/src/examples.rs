//! What a classifier is given to learn from: examples with one label each, still on the host.

use serde::{Deserialize, Serialize};

use crate::TrainBatch;

/// One batch of labelled examples.
#[derive(Debug, Clone, PartialEq)]
pub struct Examples {
    /// What is classified.
    pub inputs: Inputs,
    /// The class of each example.
    pub labels: Vec<u32>,
    /// The group of each example, by which a model is asked to be equally good; all 0 where data tells none.
    pub groups: Vec<u32>,
}

/// What is classified: `n` examples of one shape.
#[derive(Debug, Clone, PartialEq)]
pub enum Inputs {
    /// Images, or spectrograms.
    Images {
        /// `[n, channels, height, width]` row-major, around 0 and of the order of 1.
        pixels: Vec<f32>,
        /// Colours; 1 for grey.
        channels: usize,
        /// Pixels down.
        height: usize,
        /// Pixels across.
        width: usize,
    },
    /// Vectors from the layers of another model.
    Features {
        /// `[n, layers, dim]` row-major.
        values: Vec<f32>,
        /// Layers.
        layers: usize,
        /// Channels of a layer.
        dim: usize,
    },
    /// Texts as token ids.
    Tokens {
        /// `[n, seq_len]` row-major; what stands behind a text's length is padding.
        tokens: Vec<u32>,
        /// Tokens of each text; at least 1.
        lengths: Vec<u32>,
        /// Tokens of a row.
        seq_len: usize,
    },
}

/// The shape of one input, known before any is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum InputShape {
    /// See [`Inputs::Images`].
    Images {
        /// Colours.
        channels: usize,
        /// Pixels down.
        height: usize,
        /// Pixels across.
        width: usize,
    },
    /// See [`Inputs::Features`].
    Features {
        /// Layers.
        layers: usize,
        /// Channels of a layer.
        dim: usize,
    },
    /// See [`Inputs::Tokens`].
    Tokens {
        /// Ids that there are.
        vocab_size: usize,
        /// Tokens of a row.
        seq_len: usize,
    },
}

impl InputShape {
    /// What it is, in a word.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Images { .. } => "images",
            Self::Features { .. } => "features",
            Self::Tokens { .. } => "text",
        }
    }
}

impl Examples {
    /// How many examples there are.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// One example as a batch of its own.
    pub fn row(&self, index: usize) -> Self {
        let cut = |values: &[f32]| {
            let size = values.len() / self.len();
            values[index * size..(index + 1) * size].to_vec()
        };
        let inputs = match &self.inputs {
            Inputs::Images { pixels, channels, height, width } => {
                let (channels, height, width) = (*channels, *height, *width);
                Inputs::Images { pixels: cut(pixels), channels, height, width }
            }
            Inputs::Features { values, layers, dim } => {
                Inputs::Features { values: cut(values), layers: *layers, dim: *dim }
            }
            Inputs::Tokens { tokens, lengths, seq_len } => {
                let row = index * seq_len..(index + 1) * seq_len;
                Inputs::Tokens { tokens: tokens[row].to_vec(), lengths: vec![lengths[index]], seq_len: *seq_len }
            }
        };
        Self { inputs, labels: vec![self.labels[index]], groups: vec![self.groups[index]] }
    }
}

impl TrainBatch for Examples {
    fn inputs(&self) -> u64 {
        self.len() as u64
    }

    fn targets(&self) -> u64 {
        self.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_one_example() {
        let pixels = (0..24).map(|i| i as f32).collect();
        let inputs = Inputs::Images { pixels, channels: 2, height: 2, width: 3 };
        let second = Examples { inputs, labels: vec![4, 5], groups: vec![1, 2] }.row(1);
        let expected: Vec<f32> = (12..24).map(|i| i as f32).collect();
        assert_eq!(second.inputs, Inputs::Images { pixels: expected, channels: 2, height: 2, width: 3 });
        assert_eq!((second.labels.as_slice(), second.inputs(), second.targets()), ([5].as_slice(), 1, 1));
        assert_eq!(second.groups, [2]);
        let texts = Inputs::Tokens { tokens: vec![1, 2, 0, 3, 0, 0], lengths: vec![2, 1], seq_len: 3 };
        let second = Examples { inputs: texts, labels: vec![0, 1], groups: vec![0, 0] }.row(1);
        assert_eq!(second.inputs, Inputs::Tokens { tokens: vec![3, 0, 0], lengths: vec![1], seq_len: 3 });
    }
}
