//! Tensors in files that are mapped into memory: what is not asked for is never read, and nothing is kept twice.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use safetensors::tensor::Dtype;

use super::{WeightsError, header};
use crate::MappedFile;

/// Numbers that are read at a time: of more, those that are held already would be in memory twice (chosen by us).
const PIECE: usize = 1 << 20;

/// An array of numbers in a mapped file, row-major.
#[derive(Debug, Clone)]
pub struct MappedTensor {
    file: Arc<MappedFile>,
    path: Arc<Path>,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Where the numbers begin and end in the file.
    place: Range<usize>,
}

impl MappedTensor {
    /// The array of this type and shape whose numbers are at `place` in the file; `None` if they would take another number of
    /// bytes.
    pub fn new(
        (file, path): (Arc<MappedFile>, &Path),
        dtype: Dtype,
        shape: Vec<usize>,
        place: Range<usize>,
    ) -> Option<Self> {
        let bits = shape.iter().try_fold(dtype.bitsize(), |product, size| product.checked_mul(*size));
        let fits = place.start <= place.end && bits == place.len().checked_mul(8) && place.end <= file.len();
        fits.then(|| Self { file, path: path.into(), dtype, shape, place })
    }

    /// The file that it is in.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The type of its numbers.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How many numbers there are.
    pub fn numbers(&self) -> usize {
        self.shape.iter().product()
    }

    fn place_of(&self, numbers: Range<usize>) -> Range<usize> {
        let width = self.dtype.bitsize() / 8;
        self.place.start + numbers.start * width..self.place.start + numbers.end * width
    }

    /// Some of its numbers are held elsewhere now: they need not be in memory twice.
    fn release(&self, numbers: Range<usize>) {
        self.file.release(self.place_of(numbers));
    }

    /// The bytes of some of its numbers.
    ///
    /// # Errors
    /// If the file is shorter by now.
    pub fn bytes(&self, numbers: Range<usize>) -> Result<&[u8], WeightsError> {
        self.file
            .bytes(self.place_of(numbers))
            .map_err(|cause| WeightsError::File { path: self.path.to_path_buf(), cause })
    }

    /// Some of its numbers in f32; `None` if they are not floating-point numbers of 16 to 64 bits.
    ///
    /// # Errors
    /// If the file is shorter by now.
    pub fn floats(&self, numbers: Range<usize>) -> Result<Option<Vec<f32>>, WeightsError> {
        let bytes = self.bytes(numbers)?;
        let two = |value: fn([u8; 2]) -> f32| bytes.as_chunks::<2>().0.iter().map(|&chunk| value(chunk)).collect();
        Ok(Some(match self.dtype {
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect(),
            Dtype::F64 => bytes.as_chunks::<8>().0.iter().map(|&chunk| f64::from_le_bytes(chunk) as f32).collect(),
            Dtype::F16 => two(|chunk| f16::from_le_bytes(chunk).to_f32()),
            Dtype::BF16 => two(|chunk| bf16::from_le_bytes(chunk).to_f32()),
            _ => return Ok(None),
        }))
    }
}

/// The tensors of one or more safetensors files, by name.
#[derive(Debug, Default)]
pub struct TensorFiles {
    tensors: BTreeMap<String, MappedTensor>,
    metadata: HashMap<String, String>,
}

impl TensorFiles {
    /// Maps files.
    ///
    /// # Errors
    /// If one cannot be read, is broken, or repeats a tensor of another.
    pub fn open(paths: &[PathBuf]) -> Result<Self, WeightsError> {
        let mut files = Self::default();
        for path in paths {
            files.add(path)?;
        }
        Ok(files)
    }

    fn add(&mut self, path: &Path) -> Result<(), WeightsError> {
        let at = |cause: std::io::Error| WeightsError::File { path: path.to_owned(), cause };
        let broken = |cause: String| WeightsError::Broken { path: path.to_owned(), cause };
        let file = Arc::new(MappedFile::open(path).map_err(at)?);
        let header = header::read(file.all().map_err(at)?).map_err(broken)?;
        self.metadata.extend(header.metadata);
        for (name, info) in header.tensors {
            let place = header.start + info.data_offsets.0..header.start + info.data_offsets.1;
            let tensor = MappedTensor::new((file.clone(), path), info.dtype, info.shape, place)
                .ok_or_else(|| broken(format!("{name} has another size than its numbers")))?;
            if let Some(other) = self.tensors.insert(name.clone(), tensor) {
                return Err(WeightsError::Twice { name, files: [other.path.to_path_buf(), path.to_owned()] });
            }
        }
        Ok(())
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor, if there is one of that name.
    pub fn tensor(&self, name: &str) -> Option<&MappedTensor> {
        self.tensors.get(name)
    }

    /// What the files' metadata say under a key; of several files the last.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The sizes of a tensor, if there is one of that name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensor(name).map(MappedTensor::shape)
    }

    /// Numbers of all tensors.
    pub fn numbers(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.numbers() as u64).sum()
    }

    /// The file that a tensor is in, if there is one of that name.
    pub fn file(&self, name: &str) -> Option<&Path> {
        self.tensor(name).map(MappedTensor::path)
    }

    /// A tensor's values in f32, row-major.
    ///
    /// # Errors
    /// If there is no such tensor, its type is none of f32, f16, bf16, or its file is shorter by now.
    pub fn values(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        let mut values = self.part(name, 0..0)?; // which says what cannot be read
        let numbers = self.tensor(name).map_or(0, MappedTensor::numbers);
        values.reserve_exact(numbers);
        for start in (0..numbers).step_by(PIECE) {
            values.extend(self.part(name, start..(start + PIECE).min(numbers))?);
        }
        Ok(values)
    }

    fn part(&self, name: &str, numbers: Range<usize>) -> Result<Vec<f32>, WeightsError> {
        let unfit = |problem: String| WeightsError::Unfit(vec![problem]);
        let tensor = self.tensor(name).ok_or_else(|| unfit(format!("{name} is missing")))?;
        let values = if tensor.dtype == Dtype::F64 { None } else { tensor.floats(numbers.clone())? };
        tensor.release(numbers);
        values.ok_or_else(|| unfit(format!("{name} is {:?}; F32, F16 and BF16 can be read", tensor.dtype)))
    }

    /// Whether two tensors have the same shape and the same values; compared piece by piece.
    ///
    /// # Errors
    /// As [`values`](Self::values).
    pub fn equal(&self, names: [&str; 2]) -> Result<bool, WeightsError> {
        let [one, other] = names.map(|name| self.shape(name));
        if one != other {
            return Ok(false);
        }
        let numbers = one.into_iter().flatten().product::<usize>();
        for start in (0..numbers).step_by(PIECE) {
            let [one, other] = names.map(|name| self.part(name, start..(start + PIECE).min(numbers)));
            if one? != other? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
