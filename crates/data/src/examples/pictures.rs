//! Pictures from files, in memory as bytes.

use std::sync::Arc;

use polyhead_models::InputShape;

use super::{Content, Example, ExampleSet};
use crate::DataError;

/// Pictures of one size with their classes.
pub(crate) struct Pictures {
    /// Of each.
    pub shape: InputShape,
    /// `[n, channels, height, width]`
    pub pixels: Vec<u8>,
    /// The class of each.
    pub labels: Vec<u32>,
    /// The names of the classes.
    pub classes: Vec<String>,
}

impl Pictures {
    /// Adds everything that decides what is learned.
    pub(super) fn hash(&self, hasher: &mut blake3::Hasher) {
        hasher.update(format!("{:?} {:?}", self.shape, self.classes).as_bytes());
        hasher.update(&self.pixels);
        self.labels.iter().for_each(|label| {
            hasher.update(&label.to_le_bytes());
        });
    }

    /// The names of classes that are but numbers.
    pub(super) fn numbered(labels: &[u32]) -> Vec<String> {
        (0..=labels.iter().copied().max().unwrap_or(0)).map(|label| label.to_string()).collect()
    }
}

/// Some of the pictures.
pub(crate) struct Part {
    /// All of them.
    pub set: Arc<Pictures>,
    indices: Vec<u32>,
}

impl Part {
    pub(super) fn all(set: Arc<Pictures>) -> Self {
        let indices = (0..set.labels.len() as u32).collect();
        Self { set, indices }
    }

    pub(super) fn of(set: Arc<Pictures>, indices: Vec<u32>) -> Self {
        Self { set, indices }
    }

    /// Pictures of each class.
    pub(super) fn counts(&self) -> Vec<u64> {
        let mut counts = vec![0; self.set.classes.len()];
        self.indices.iter().for_each(|&index| counts[self.set.labels[index as usize] as usize] += 1);
        counts
    }
}

impl ExampleSet for Part {
    fn shape(&self) -> InputShape {
        self.set.shape
    }

    fn per_epoch(&self) -> u64 {
        self.indices.len() as u64
    }

    /// Bytes become numbers from -1 to 1.
    fn example(&self, index: u64) -> Result<Example, DataError> {
        let at = self.indices[index as usize] as usize;
        let size = self.set.pixels.len() / self.set.labels.len();
        let pixels = self.set.pixels[at * size..(at + 1) * size].iter();
        let content = Content::Numbers(pixels.map(|&byte| f32::from(byte) / 127.5 - 1.0).collect());
        Ok(Example { content, label: self.set.labels[at], group: 0 })
    }
}
