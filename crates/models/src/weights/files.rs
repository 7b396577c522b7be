//! Tensors in safetensors files that are mapped into memory: what is not asked for is never read, and nothing is kept twice.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::tensor::Dtype;

use super::{WeightsError, header};

/// The tensors of one or more files, by name.
#[derive(Debug)]
pub struct TensorFiles {
    paths: Vec<PathBuf>,
    maps: Vec<Mmap>,
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
        let mut files = Self { paths: Vec::new(), maps: Vec::new(), places: BTreeMap::new() };
        for path in paths {
            files.add(path)?;
        }
        Ok(files)
    }

    fn add(&mut self, path: &Path) -> Result<(), WeightsError> {
        let at = |cause: std::io::Error| WeightsError::File { path: path.to_owned(), cause };
        let file = std::fs::File::open(path).map_err(at)?;
        // SAFETY: the map is only read. Files of weights are replaced, not rewritten in place; whoever writes into one that
        // is in use gives wrong numbers, as with any program that maps its weights.
        let map = unsafe { Mmap::map(&file) }.map_err(at)?;
        let broken = |cause| WeightsError::Broken { path: path.to_owned(), cause };
        let header = header::read(&map).map_err(broken)?;
        for (name, info) in header.tensors {
            let bytes = header.start + info.data_offsets.0..header.start + info.data_offsets.1;
            let place = Place { file: self.maps.len(), dtype: info.dtype, shape: info.shape, bytes };
            if let Some(other) = self.places.insert(name.clone(), place) {
                let files = [self.paths[other.file].clone(), path.to_owned()];
                return Err(WeightsError::Twice { name, files });
            }
        }
        self.paths.push(path.to_owned());
        self.maps.push(map);
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
        self.places.get(name).map(|place| self.paths[place.file].as_path())
    }

    /// A tensor's values in f32, row-major.
    ///
    /// # Errors
    /// If there is no such tensor, or its type is none of f32, f16, bf16.
    pub fn values(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        let unfit = |problem: String| WeightsError::Unfit(vec![problem]);
        let place = self.places.get(name).ok_or_else(|| unfit(format!("{name} is missing")))?;
        let bytes = &self.maps[place.file][place.bytes.clone()];
        let two = |value: fn([u8; 2]) -> f32| bytes.as_chunks::<2>().0.iter().map(|&chunk| value(chunk)).collect();
        match place.dtype {
            Dtype::F32 => Ok(bytes.as_chunks::<4>().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect()),
            Dtype::F16 => Ok(two(|chunk| f16::from_le_bytes(chunk).to_f32())),
            Dtype::BF16 => Ok(two(|chunk| bf16::from_le_bytes(chunk).to_f32())),
            other => Err(unfit(format!("{name} is {other:?}; F32, F16 and BF16 can be read"))),
        }
    }
}
