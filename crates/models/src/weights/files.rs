//! Tensors in safetensors files that are mapped into memory: what is not asked for is never read, and nothing is kept twice.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::Dtype;

use super::{WeightsError, header};
use crate::MappedFile;

/// The tensors of one or more files, by name.
#[derive(Debug)]
pub struct TensorFiles {
    files: Vec<(PathBuf, MappedFile)>,
    places: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Where the values begin and end in the file.
    bytes: std::ops::Range<usize>,
}

impl TensorFiles {
    /// Maps files.
    ///
    /// # Errors
    /// If one cannot be read, is broken, or repeats a tensor of another.
    pub fn open(paths: &[PathBuf]) -> Result<Self, WeightsError> {
        let mut files = Self { files: Vec::new(), places: BTreeMap::new() };
        for path in paths {
            files.add(path)?;
        }
        Ok(files)
    }

    fn add(&mut self, path: &Path) -> Result<(), WeightsError> {
        let at = |cause: std::io::Error| WeightsError::File { path: path.to_owned(), cause };
        let file = MappedFile::open(path).map_err(at)?;
        let broken = |cause| WeightsError::Broken { path: path.to_owned(), cause };
        let header = header::read(file.all().map_err(at)?).map_err(broken)?;
        for (name, info) in header.tensors {
            let bytes = header.start + info.data_offsets.0..header.start + info.data_offsets.1;
            let place = Place { file: self.files.len(), dtype: info.dtype, shape: info.shape, bytes };
            if let Some(other) = self.places.insert(name.clone(), place) {
                let other = self.files.get(other.file).map_or(path, |(other, _)| other);
                return Err(WeightsError::Twice { name, files: [other.to_owned(), path.to_owned()] });
            }
        }
        self.files.push((path.to_owned(), file));
        Ok(())
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// The sizes of a tensor, if there is one of that name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.places.get(name).map(|place| place.shape.as_slice())
    }

    /// The file that a tensor is in, if there is one of that name.
    pub fn file(&self, name: &str) -> Option<&Path> {
        self.places.get(name).map(|place| self.files[place.file].0.as_path())
    }

    /// A tensor's values in f32, row-major.
    ///
    /// # Errors
    /// If there is no such tensor, its type is none of f32, f16, bf16, or its file is shorter by now.
    pub fn values(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        let unfit = |problem: String| WeightsError::Unfit(vec![problem]);
        let place = self.places.get(name).ok_or_else(|| unfit(format!("{name} is missing")))?;
        let (path, file) = &self.files[place.file];
        let cut = |cause| WeightsError::File { path: path.clone(), cause };
        let bytes = file.bytes(place.bytes.clone()).map_err(cut)?;
        let two = |value: fn([u8; 2]) -> f32| bytes.as_chunks::<2>().0.iter().map(|&chunk| value(chunk)).collect();
        match place.dtype {
            Dtype::F32 => Ok(bytes.as_chunks::<4>().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect()),
            Dtype::F16 => Ok(two(|chunk| f16::from_le_bytes(chunk).to_f32())),
            Dtype::BF16 => Ok(two(|chunk| bf16::from_le_bytes(chunk).to_f32())),
            other => Err(unfit(format!("{name} is {other:?}; F32, F16 and BF16 can be read"))),
        }
    }
}
