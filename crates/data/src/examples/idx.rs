//! IDX files, in which MNIST and its like come: a header with the type and the sizes, then the numbers.

use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Found;
use super::pictures::Pictures;
use crate::DataError;
use crate::error::At;
use crate::synthetic::Problem;

/// `[data.idx]`: IDX files of bytes, as MNIST's, packed (.gz) or not: pictures [n, height, width] (or [n, channels, height,
/// width]) and their classes [n].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IdxConfig {
    /// The pictures, such as train-images-idx3-ubyte.gz.
    pub images: PathBuf,
    /// Their classes, such as train-labels-idx1-ubyte.gz.
    pub labels: PathBuf,
    /// Pictures to validate on. Default: a share of the others, validation.fraction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_images: Option<PathBuf>,
    /// Their classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_labels: Option<PathBuf>,
}

impl IdxConfig {
    /// Checks the settings without touching a file.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self) -> Result<(), Problem> {
        match self.validation_images.is_some() == self.validation_labels.is_some() {
            true => Ok(()),
            false => {
                Err(("validation_images", "validation_images and validation_labels are given both or neither".into()))
            }
        }
    }

    pub(super) fn read(&self) -> Result<Found, DataError> {
        let learnt = read_pair(&self.images, &self.labels)?;
        let held_out = match (&self.validation_images, &self.validation_labels) {
            (Some(images), Some(labels)) => Some(read_pair(images, labels)?),
            _ => None,
        };
        Ok(Found { learnt, held_out })
    }
}

fn read_pair(images: &Path, labels: &Path) -> Result<Pictures, DataError> {
    let (sizes, pixels) = read(images)?;
    let shape = match sizes[..] {
        [_, height, width] => InputShape::Images { channels: 1, height, width },
        [_, channels, height, width] => InputShape::Images { channels, height, width },
        _ => return Err(unfit(images, format!("sizes {sizes:?} are no pictures, which have 3 or 4"))),
    };
    let (counts, labels_read) = read(labels)?;
    if counts != [sizes[0]] {
        return Err(unfit(labels, format!("sizes {counts:?} do not fit {} pictures", sizes[0])));
    }
    let labels: Vec<u32> = labels_read.into_iter().map(u32::from).collect();
    let classes = Pictures::numbered(&labels);
    Ok(Pictures { shape, pixels, labels, classes })
}

fn unfit(path: &Path, problem: String) -> DataError {
    DataError::Unusable(format!("{}: {problem}", path.display()))
}

/// Sizes and bytes of a file.
fn read(path: &Path) -> Result<(Vec<usize>, Vec<u8>), DataError> {
    let bytes = unpacked(path)?;
    let short = || unfit(path, "no IDX file, or one that was cut off".into());
    let &[0, 0, kind, n_sizes] = bytes.first_chunk::<4>().ok_or_else(short)? else { return Err(short()) };
    if kind != 8 {
        return Err(unfit(path, format!("holds numbers of type {kind:#04x}; bytes (0x08) can be read")));
    }
    let header = 4 + 4 * usize::from(n_sizes);
    let sizes = bytes.get(4..header).ok_or_else(short)?.as_chunks::<4>().0.iter();
    let sizes: Vec<usize> = sizes.map(|&size| u32::from_be_bytes(size) as usize).collect();
    let all = sizes.iter().try_fold(1usize, |all, &size| all.checked_mul(size)).filter(|&all| all > 0);
    match all == Some(bytes.len() - header) {
        true => Ok((sizes, bytes[header..].to_vec())),
        false => {
            Err(unfit(path, format!("{} bytes behind the header do not fit sizes {sizes:?}", bytes.len() - header)))
        }
    }
}

/// A file's bytes, unpacked where it is packed.
pub(super) fn unpacked(path: &Path) -> Result<Vec<u8>, DataError> {
    let bytes = std::fs::read(path).at(path)?;
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return Ok(bytes);
    }
    let mut all = Vec::new();
    GzDecoder::new(bytes.as_slice()).read_to_end(&mut all).at(path)?;
    Ok(all)
}
