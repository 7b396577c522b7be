//! CIFAR's binary files (Krizhevsky 2009): rows of labels and 3 x 32 x 32 bytes.

use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Images;
use crate::files::{LeftOut, Packed, Search, search};
use crate::problem::{Problem, some_path};
use crate::source::Source;
use crate::{Data, DataError, Opening};

const PIXELS: usize = 3 * 32 * 32;
/// The most bytes of a file; all of CIFAR-100 are 185 MB.
const MOST_BYTES: u64 = 1 << 30;

/// `[data.cifar]`: CIFAR's binary version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CifarConfig {
    /// Files, folders and patterns, such as "cifar-10-batches-bin/data_batch_*.bin".
    pub paths: Vec<String>,
    /// Files to validate on, such as "cifar-10-batches-bin/test_batch.bin". Default: a share of the others,
    /// validation.fraction.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation_paths: Vec<String>,
    /// Which labels precede an image: "cifar10" (default), or of CIFAR-100 "coarse" or "fine".
    #[serde(default)]
    pub labels: CifarLabels,
}

/// Which labels precede an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CifarLabels {
    /// One of 10 classes.
    #[default]
    Cifar10,
    /// Two, of which the first is taken: 20 classes.
    Coarse,
    /// Two, of which the second is taken: 100 classes.
    Fine,
}

impl Source for CifarConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        some_path(&self.paths)
    }

    fn paths(&self) -> Vec<String> {
        [&self.paths[..], &self.validation_paths].concat()
    }

    fn shape(&self) -> Option<InputShape> {
        Some(InputShape::Images { channels: 3, height: 32, width: 32 })
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let mut left_out = LeftOut::default();
        let held_out = match self.validation_paths.is_empty() {
            true => None,
            false => Some(self.images(&self.validation_paths, &mut left_out)?),
        };
        let images = self.images(&self.paths, &mut left_out)?;
        images.open(held_out, ("CIFAR files", left_out.note().into_iter().collect(), None), opening)
    }
}

impl CifarConfig {
    fn images(&self, paths: &[String], left_out: &mut LeftOut) -> Result<Images, DataError> {
        let (in_front, taken, n_classes) = match self.labels {
            CifarLabels::Cifar10 => (1, 0, 10),
            CifarLabels::Coarse => (2, 0, 20),
            CifarLabels::Fine => (2, 1, 100),
        };
        let (mut pixels, mut labels) = (Vec::new(), Vec::new());
        let Search { files, left_out: besides } = search(paths, &[&["bin"]])?;
        left_out.extend(besides);
        for path in files.into_keys() {
            let bytes = Packed::open(&path)?.up_to(MOST_BYTES + 1, &path)?;
            let unfit = |problem: String| Err(DataError::in_file(&path, problem));
            let row = in_front + PIXELS;
            if bytes.len() as u64 > MOST_BYTES {
                return unfit(format!("more than {MOST_BYTES} bytes: CIFAR's files are smaller"));
            }
            if bytes.is_empty() || !bytes.len().is_multiple_of(row) {
                return unfit(format!(
                    "{} bytes are not a whole number of rows of {row}: is data.cifar.labels right?",
                    bytes.len()
                ));
            }
            for row in bytes.chunks_exact(row) {
                if row[taken] >= n_classes {
                    return unfit(format!(
                        "label {} is not below {n_classes}: is data.cifar.labels right?",
                        row[taken]
                    ));
                }
                labels.push(u32::from(row[taken]));
                pixels.extend_from_slice(&row[in_front..]);
            }
        }
        let classes = (0..n_classes).map(|class| class.to_string()).collect();
        Ok(Images { shape: InputShape::Images { channels: 3, height: 32, width: 32 }, pixels, labels, classes })
    }
}
