//! IDX files, in which MNIST and its like come: a header with the type and the sizes, then the numbers.

use std::path::{Path, PathBuf};

use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Images;
use crate::files::Packed;
use crate::problem::{Problem, require, shown};
use crate::source::Source;
use crate::{Data, DataError, Opening};

/// `[data.idx]`: IDX files of bytes, as MNIST's, packed (.gz, .zst) or not: images [n, height, width] (or [n, channels, height,
/// width]) and their classes [n].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IdxConfig {
    /// The images, such as train-images-idx3-ubyte.gz.
    pub images: PathBuf,
    /// Their classes, such as train-labels-idx1-ubyte.gz.
    pub labels: PathBuf,
    /// Images to validate on. Default: a share of the others, validation.fraction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_images: Option<PathBuf>,
    /// Their classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_labels: Option<PathBuf>,
}

impl Source for IdxConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        require(self.validation_images.is_some() == self.validation_labels.is_some(), "validation_images", || {
            "validation_images and validation_labels are given both or neither".into()
        })
    }

    fn paths(&self) -> Vec<String> {
        shown([&self.images, &self.labels].into_iter().chain(&self.validation_images).chain(&self.validation_labels))
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let images = read_pair(&self.images, &self.labels)?;
        let held_out = match (&self.validation_images, &self.validation_labels) {
            (Some(images), Some(labels)) => Some(read_pair(images, labels)?),
            _ => None,
        };
        images.open(held_out, ("IDX files", Vec::new(), None), opening)
    }
}

fn read_pair(images: &Path, labels: &Path) -> Result<Images, DataError> {
    let (sizes, pixels) = read(images)?;
    let shape = match sizes[..] {
        [_, height, width] => InputShape::Images { channels: 1, height, width },
        [_, channels, height, width] => InputShape::Images { channels, height, width },
        _ => {
            return Err(DataError::in_file(
                images,
                format!("sizes {sizes:?} are not those of images, which have 3 or 4"),
            ));
        }
    };
    let (counts, labels_read) = read(labels)?;
    if counts != [sizes[0]] {
        return Err(DataError::in_file(labels, format!("sizes {counts:?} do not fit {} images", sizes[0])));
    }
    let labels: Vec<u32> = labels_read.into_iter().map(u32::from).collect();
    let classes = Images::numbered(&labels);
    Ok(Images { shape, pixels, labels, classes })
}

/// The most bytes that one file may hold; far more than MNIST's likes do.
const MOST_BYTES: usize = 1 << 32;

/// Sizes and bytes of a file: as many as its header promises, however much follows.
fn read(path: &Path) -> Result<(Vec<usize>, Vec<u8>), DataError> {
    let mut file = Packed::open(path)?;
    let short = || DataError::in_file(path, "not an IDX file, or one that was cut off");
    let start = file.up_to(4, path)?;
    let &[0, 0, kind, n_sizes] = start.first_chunk::<4>().ok_or_else(short)? else { return Err(short()) };
    if kind != 8 {
        return Err(DataError::in_file(path, format!("holds numbers of type {kind:#04x}; bytes (0x08) can be read")));
    }
    let sizes = file.up_to(4 * u64::from(n_sizes), path)?;
    if sizes.len() < 4 * usize::from(n_sizes) {
        return Err(short());
    }
    let sizes = sizes.as_chunks::<4>().0.iter();
    let sizes: Vec<usize> = sizes.map(|&size| u32::from_be_bytes(size) as usize).collect();
    let all = sizes.iter().try_fold(1usize, |all, &size| all.checked_mul(size));
    let all = all.filter(|all| (1..=MOST_BYTES).contains(all)).ok_or_else(|| {
        DataError::in_file(path, format!("its header promises sizes {sizes:?}: from 1 to {MOST_BYTES} bytes are read"))
    })?;
    let header = 4 + 4 * u64::from(n_sizes);
    let unfitting =
        |there: String| DataError::in_file(path, format!("{there} bytes behind the header do not fit sizes {sizes:?}"));
    if let Some(length) = file.length().filter(|length| *length != header + all as u64) {
        return Err(unfitting(length.saturating_sub(header).to_string()));
    }
    let bytes = file.up_to(all as u64 + 1, path)?;
    match bytes.len() == all {
        true => Ok((sizes, bytes)),
        false if bytes.len() > all => Err(unfitting(format!("more than {all}"))),
        false => Err(unfitting(bytes.len().to_string())),
    }
}
