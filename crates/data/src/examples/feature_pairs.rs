//! Features of texts that belong together, for embedders: a query, a document that answers it, and perhaps one that does not.
//!
//! A safetensors file holds `features` `[n, parts, layers, dim]`, parts 2 or 3, as `polyhead features --pairs` writes it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::divide;
use super::features::{FeatureArray, tensors};
use crate::batches::{LoaderOptions, Order, PairLoader, Paired, Samples};
use crate::problem::{Problem, shown, some_path};
use crate::source::Source;
use crate::{Data, DataError, Opening};

/// `[data.feature_pairs]`: features of texts that belong together, for model.embedder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FeaturePairsConfig {
    /// Safetensors files with the tensor "features" [n, 2 or 3, layers, dim]: queries, documents that belong to them, and
    /// documents that do not. `polyhead features --pairs` writes them.
    pub paths: Vec<PathBuf>,
    /// Files to validate on. Default: a share of the others' rows, validation.fraction.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation_paths: Vec<PathBuf>,
}

impl Source for FeaturePairsConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        some_path(&self.paths)
    }

    fn paths(&self) -> Vec<String> {
        shown(self.paths.iter().chain(&self.validation_paths))
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let options = opening.options;
        let open = |paths: &[PathBuf]| paths.iter().map(|path| File::open(path)).collect::<Result<Vec<_>, _>>();
        let mut files = open(&self.paths)?;
        let to_train: usize = files.iter().map(File::rows).sum();
        files.extend(open(&self.validation_paths)?);
        let mut hash = blake3::Hasher::new();
        for file in &files {
            if file.shape != files[0].shape {
                return Err(unusable!(
                    "{} holds {:?} a row, {} {:?}: files of one set agree",
                    file.features.name,
                    file.shape,
                    files[0].features.name,
                    files[0].shape
                ));
            }
            for row in 0..file.rows() {
                let values = file.row(row)?;
                if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                    return Err(unusable!("{}: row {row} holds {value}", file.features.name));
                }
                for value in values {
                    hash.update(&value.to_le_bytes());
                }
            }
        }
        let places: Vec<(usize, usize)> =
            files.iter().enumerate().flat_map(|(at, file)| (0..file.rows()).map(move |row| (at, row))).collect();
        let [train, validation] = divide(places.len(), to_train, options.validation_fraction)?
            .map(|side| side.into_iter().map(|index| places[index as usize]).collect::<Vec<_>>());
        let [parts, layers, dim] = files[0].shape;
        let description = format!(
            "features of {layers} layers of {dim} numbers: {} {} for training, {} for validation",
            train.len(),
            if parts == 3 { "pairs with a wrong document each" } else { "pairs" },
            validation.len()
        );
        let (shape, files) = (files[0].shape, Arc::new(files));
        let part = |places| Arc::new(Part { files: files.clone(), places });
        let loader = |places, order| PairLoader::new(part(places), shape, LoaderOptions::of(options, order));
        Ok(Data::Pairs(Box::new(Paired {
            train: loader(train, Order::Shuffled),
            validation: loader(validation, Order::Once),
            description,
            text_hash: hash.finalize().to_hex().to_string(),
        })))
    }
}

/// The features of one file.
struct File {
    features: FeatureArray,
    /// `[parts, layers, dim]`
    shape: [usize; 3],
}

impl File {
    fn open(path: &Path) -> Result<Self, DataError> {
        let ([features], _) = tensors(path, ["features"])?;
        match features.shape()[..] {
            [rows, parts @ 2..=3, layers, dim] if rows > 0 && layers > 0 && dim > 0 => {
                Ok(Self { shape: [parts, layers, dim], features })
            }
            ref other => Err(unusable!(
                "{} is {other:?}: pairs are [n, 2 or 3, layers, numbers], as `polyhead features --pairs` writes them",
                features.name
            )),
        }
    }

    fn rows(&self) -> usize {
        self.features.shape()[0]
    }

    fn row(&self, index: usize) -> Result<Vec<f32>, DataError> {
        let size = self.shape.iter().product::<usize>();
        self.features.floats(index * size..(index + 1) * size)
    }
}

/// Some of the pairs of files.
struct Part {
    files: Arc<Vec<File>>,
    /// File and row.
    places: Vec<(usize, usize)>,
}

impl Samples<Vec<f32>> for Part {
    fn per_epoch(&self) -> u64 {
        self.places.len() as u64
    }

    fn sample(&self, _epoch: u64, index: u64) -> Result<Vec<f32>, DataError> {
        let (file, row) = self.places[index as usize];
        self.files[file].row(row)
    }
}

/// The features `[n, layers, dim]` of a file that `polyhead features` wrote, or of pairs `[n, parts, layers, dim]`; read when they
/// are asked for.
///
/// # Errors
/// If the file cannot be read or holds none.
pub fn open_features(path: &Path) -> Result<FeatureArray, DataError> {
    let ([features], _) = tensors(path, ["features"])?;
    Ok(features)
}

/// The labels `[n]` of a file that `polyhead features` wrote of labelled texts.
///
/// # Errors
/// If the file cannot be read or holds none.
pub fn open_labels(path: &Path) -> Result<Vec<u32>, DataError> {
    let ([labels], _) = tensors(path, ["labels"])?;
    labels.labels()
}
