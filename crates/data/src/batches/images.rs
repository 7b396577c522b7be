//! Batches of images without classes, for super-resolution.

use std::sync::Arc;

use polyhead_models::Images;

use super::{LoaderOptions, Samples, Stream};
use crate::DataError;

/// Batches of images by position.
#[derive(Clone)]
pub struct ImageLoader {
    stream: Stream<Vec<f32>>,
    size: [usize; 2],
}

impl ImageLoader {
    /// A loader over images `[3, height, width]` of one height and width.
    pub(crate) fn new(images: Arc<dyn Samples<Vec<f32>>>, size: [usize; 2], options: LoaderOptions) -> Self {
        Self { stream: Stream { samples: images, options }, size }
    }

    /// Batches until every image has come once.
    pub fn batches_per_epoch(&self) -> u64 {
        self.stream.batches_per_epoch()
    }

    /// Height and width.
    pub fn size(&self) -> [usize; 2] {
        self.size
    }

    /// Batch number `position` since the start; where images come as they are, the last batch of an epoch is as short as what is
    /// left.
    ///
    /// # Errors
    /// If an image cannot be read.
    pub fn batch(&self, position: u64) -> Result<Images, DataError> {
        let [height, width] = self.size;
        Ok(Images { pixels: self.stream.batch(position)?.concat(), height, width })
    }
}

/// Images without classes, ready to use.
pub struct ImageSet {
    /// Batches to train on, without end.
    pub train: ImageLoader,
    /// Batches to validate on.
    pub validation: ImageLoader,
    /// What the data is, in words.
    pub description: String,
    /// What was left out or changed, with counts.
    pub notes: Vec<String>,
    /// For files: a hash of what was read.
    pub text_hash: Option<String>,
}
