//! Feature files: what the layers of a frozen encoder made of samples, with a label each. `polyhead features` writes them; so does
//! any program that saves arrays.
//!
//! * A safetensors file holds `features` `[n, layers, dim]` (or `[n, dim]`, one layer) and `labels` `[n]`, whole numbers from 0;
//!   the metadata `classes`, a JSON list of names, may say what they mean.
//! * A `.npy` file holds features alone; a second one, named in `labels`, holds its labels.
//!
//! Files are mapped: opening reads them once, to tell rows that cannot be used and the hash; after that a batch reads its own
//! rows.

mod array;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use polyhead_models::InputShape;
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, TensorView};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Found;
use crate::batches::{Content, Example};
use crate::problem::{Problem, require, shown, some_path};
use crate::source::Source;
use crate::{Data, DataError, Opening};

pub use array::FeatureArray;
pub(super) use array::tensors;

/// `[data.features]`: features of all layers of a frozen encoder, with labels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FeaturesConfig {
    /// Files: safetensors with the tensors "features" [n, layers, dim] and "labels" [n], or .npy with features.
    pub paths: Vec<PathBuf>,
    /// The labels of each .npy file of paths, in the same order. Default: none, for safetensors files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<PathBuf>,
    /// Files to validate on. Default: a share of the others' rows, validation.fraction.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation_paths: Vec<PathBuf>,
    /// The labels of each .npy file of validation_paths. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation_labels: Vec<PathBuf>,
}

impl Source for FeaturesConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        some_path(&self.paths)?;
        for (field, files, beside, labels) in [
            ("labels", "paths", &self.paths, &self.labels),
            ("validation_labels", "validation_paths", &self.validation_paths, &self.validation_labels),
        ] {
            let arrays = beside.iter().filter(|path| is_npy(path)).count();
            require(arrays == labels.len(), field, || {
                let count = labels.len();
                format!(
                    "{field} names {count} files for {arrays} .npy files in {files}: give one each (safetensors files hold their own)"
                )
            })?;
        }
        Ok(())
    }

    fn paths(&self) -> Vec<String> {
        shown([&self.paths, &self.labels, &self.validation_paths, &self.validation_labels].into_iter().flatten())
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        // All files are read once: to tell rows that cannot be used, and for the hash.
        let mut files = File::open_all(&self.paths, &self.labels)?;
        let count = |files: &[File]| files.iter().map(|file| file.labels.len()).sum::<usize>();
        let to_train = count(&files);
        files.extend(File::open_all(&self.validation_paths, &self.validation_labels)?);
        let first = &files[0];
        let (layers, dim) = (first.n_layers, first.dim);
        for file in &files {
            let name = &file.features.name;
            if (file.n_layers, file.dim) != (layers, dim) {
                return Err(unusable!(
                    "{name} holds {} layers of {} numbers, {} holds {layers} of {dim}: files of one set agree",
                    file.n_layers,
                    file.dim,
                    first.features.name
                ));
            }
            if file.classes != first.classes {
                return Err(unusable!(
                    "{name} names the classes {:?}, {} names {:?}: files of one set agree (`polyhead features --classes` says which \
                     there are)",
                    file.classes,
                    first.features.name,
                    first.classes
                ));
            }
        }
        let most = files.iter().flat_map(|file| &file.labels).max().map_or(0, |label| *label as usize);
        let classes = first.classes.clone().unwrap_or_else(|| (0..=most).map(|class| class.to_string()).collect());
        if most >= classes.len() || classes.len() < 2 {
            return Err(unusable!(
                "{}: labels go up to {most}, and {} classes are named: two or more are needed, and a name for each",
                first.features.name,
                classes.len()
            ));
        }
        let mut hash = blake3::Hasher::new();
        for file in &files {
            file.read_through(&mut hash)?;
        }
        let labels = files.iter().flat_map(|file| &file.labels).copied().collect();
        let places: Vec<(usize, usize)> =
            files.iter().enumerate().flat_map(|(at, file)| (0..file.labels.len()).map(move |row| (at, row))).collect();
        let example = move |at: usize| {
            let (file, row) = places[at];
            let file: &File = &files[file];
            let content = Content::Numbers(file.features.floats(file.numbers(row))?);
            Ok(Example { content, label: file.labels[row], group: 0 })
        };
        let found = Found {
            what: format!("features of {layers} layers of {dim} numbers"),
            shape: InputShape::Features { layers, dim },
            labels,
            to_train,
            classes,
            label_field: None,
            groups: Vec::new(),
            example: Box::new(example),
            notes: Vec::new(),
            hash,
        };
        found.open("", opening)
    }
}

fn is_npy(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "npy")
}

/// Features of texts that belong together, to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct NewPairs {
    /// `[n, parts, layers, dim]` row-major.
    pub values: Vec<f32>,
    /// `[parts, layers, dim]`
    pub shape: [usize; 3],
}

impl NewPairs {
    /// The bytes of a safetensors file that `[data.feature_pairs]` reads.
    ///
    /// # Errors
    /// If sizes contradict each other.
    pub fn to_safetensors(&self) -> Result<Vec<u8>, DataError> {
        let [parts, layers, dim] = self.shape;
        let rows = self.values.len() / (parts * layers * dim).max(1);
        let features = ("features", vec![rows, parts, layers, dim], Dtype::F32, bytes_of(&self.values));
        serialized(vec![features], None)
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A tensor that is to be written: its name, its sizes, its type and its bytes.
type NewTensor = (&'static str, Vec<usize>, Dtype, Vec<u8>);

fn serialized(tensors: Vec<NewTensor>, metadata: Option<HashMap<String, String>>) -> Result<Vec<u8>, DataError> {
    let unusable = |cause: SafeTensorError| unusable!("features cannot be written: {cause}");
    let mut views = Vec::with_capacity(tensors.len());
    for (name, shape, dtype, bytes) in &tensors {
        views.push((*name, TensorView::new(*dtype, shape.clone(), bytes).map_err(unusable)?));
    }
    safetensors::serialize(views, metadata).map_err(unusable)
}

/// One file.
struct File {
    features: FeatureArray,
    labels: Vec<u32>,
    n_layers: usize,
    dim: usize,
    classes: Option<Vec<String>>,
}

/// Features that are to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct NewFeatures {
    /// `[n, layers, dim]` row-major.
    pub values: Vec<f32>,
    /// Layers of a row.
    pub n_layers: usize,
    /// Numbers of a layer.
    pub dim: usize,
    /// `[n]`: the class of each row.
    pub labels: Vec<u32>,
    /// The names of the classes.
    pub classes: Vec<String>,
}

impl NewFeatures {
    /// The bytes of a safetensors file that `[data.features]` reads.
    ///
    /// # Errors
    /// If sizes contradict each other.
    pub fn to_safetensors(&self) -> Result<Vec<u8>, DataError> {
        let n = self.labels.len();
        let labels = self.labels.iter().flat_map(|label| i64::from(*label).to_le_bytes()).collect();
        let classes =
            serde_json::to_string(&self.classes).map_err(|cause| unusable!("features cannot be written: {cause}"))?;
        let tensors = vec![
            ("features", vec![n, self.n_layers, self.dim], Dtype::F32, bytes_of(&self.values)),
            ("labels", vec![n], Dtype::I64, labels),
        ];
        serialized(tensors, Some(HashMap::from([("classes".to_owned(), classes)])))
    }
}

impl File {
    fn open_all(paths: &[PathBuf], labels: &[PathBuf]) -> Result<Vec<Self>, DataError> {
        let mut labels = labels.iter();
        let mut open = |path: &PathBuf| match is_npy(path) {
            false => {
                let ([features, labels], classes) = array::tensors(path, ["features", "labels"])?;
                Self::new(features, &labels, classes)
            }
            true => {
                let beside = labels
                    .next()
                    .ok_or_else(|| unusable!("{}: data.features.labels names no labels for it", path.display()))?;
                Self::new(array::npy(path)?, &array::npy(beside)?, None)
            }
        };
        paths.iter().map(&mut open).collect()
    }

    fn new(features: FeatureArray, labels: &FeatureArray, classes: Option<Vec<String>>) -> Result<Self, DataError> {
        let (rows, n_layers, dim) = match features.shape()[..] {
            [rows, n_layers, dim] => (rows, n_layers, dim),
            [rows, dim] => (rows, 1, dim),
            ref other => {
                return Err(unusable!(
                    "{} is {other:?}: features are [rows, layers, numbers], or [rows, numbers] of one layer",
                    features.name
                ));
            }
        };
        if labels.shape() != [rows] {
            return Err(unusable!(
                "{} is {:?} for {rows} rows of features: labels are [{rows}], one a row",
                labels.name,
                labels.shape()
            ));
        }
        if rows == 0 || n_layers == 0 || dim == 0 {
            return Err(unusable!("{} is {:?}: it holds nothing", features.name, features.shape()));
        }
        Ok(Self { labels: labels.labels()?, features, n_layers, dim, classes })
    }

    /// Which numbers of the array are those of a row.
    fn numbers(&self, row: usize) -> Range<usize> {
        let size = self.n_layers * self.dim;
        row * size..(row + 1) * size
    }

    /// Adds all rows to a hash, and looks at every number on the way.
    fn read_through(&self, hash: &mut blake3::Hasher) -> Result<(), DataError> {
        hash.update(&(self.labels.len() as u64).to_le_bytes());
        for (row, label) in self.labels.iter().enumerate() {
            if let Some(value) = self.features.floats(self.numbers(row))?.iter().find(|value| !value.is_finite()) {
                return Err(unusable!("{}: row {row} holds {value}", self.features.name));
            }
            hash.update(self.features.bytes(self.numbers(row))?).update(&label.to_le_bytes());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
