//! Arrays of numbers in files, mapped into memory: tensors of a safetensors file, and NumPy's `.npy`.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use polyhead_models::MappedFile;
use polyhead_models::weights::{MappedTensor, TensorFiles, WeightsError};
use safetensors::tensor::Dtype;

use crate::DataError;
use crate::error::At;
use crate::files::not_text;

/// An array whose values are read when they are asked for.
#[derive(Debug, Clone)]
pub struct FeatureArray {
    tensor: MappedTensor,
    /// What it is called in messages: the file, and the tensor where there are several.
    pub(crate) name: String,
}

impl FeatureArray {
    /// Sizes of the axes; row-major.
    pub fn shape(&self) -> &[usize] {
        self.tensor.shape()
    }

    /// Numbers `range` of a floating-point array, in f32.
    ///
    /// # Errors
    /// If they are whole numbers, or the file is shorter by now.
    pub fn floats(&self, range: Range<usize>) -> Result<Vec<f32>, DataError> {
        let (name, dtype) = (&self.name, self.tensor.dtype());
        let floats = self.tensor.floats(range).map_err(unreadable)?;
        floats.ok_or_else(|| unusable!("{name} holds {dtype:?}: features are F32, F16, BF16 or F64"))
    }

    /// All numbers of an array of whole ones.
    ///
    /// # Errors
    /// If they are fractions, or too large to be labels, or the file is shorter by now.
    pub(crate) fn labels(&self) -> Result<Vec<u32>, DataError> {
        let (name, dtype) = (&self.name, self.tensor.dtype());
        let signed = match dtype {
            Dtype::I64 | Dtype::I32 | Dtype::I16 | Dtype::I8 => true,
            Dtype::U64 | Dtype::U32 | Dtype::U16 | Dtype::U8 => false,
            _ => return Err(unusable!("{name} holds {dtype:?}: labels are whole numbers")),
        };
        let bytes = self.bytes(0..self.tensor.numbers())?;
        let label = |(row, chunk): (usize, &[u8])| {
            let negative = signed && chunk.last().is_some_and(|byte| *byte >= 0x80);
            let mut wide = [if negative { 0xFF } else { 0 }; 16];
            wide[..chunk.len()].copy_from_slice(chunk);
            let value = i128::from_le_bytes(wide);
            u32::try_from(value).ok().filter(|label| *label < MOST_CLASSES).ok_or_else(|| {
                let most = MOST_CLASSES - 1;
                unusable!("{name}: the label of row {row} is {value}; labels are numbers of classes, from 0 to {most}")
            })
        };
        bytes.chunks(dtype.bitsize() / 8).enumerate().map(label).collect()
    }

    /// The bytes of numbers `range`.
    ///
    /// # Errors
    /// If the file is shorter by now.
    pub(crate) fn bytes(&self, range: Range<usize>) -> Result<&[u8], DataError> {
        self.tensor.bytes(range).map_err(unreadable)
    }
}

/// What the reader of tensors says, which names the file.
fn unreadable(error: WeightsError) -> DataError {
    match error {
        WeightsError::File { path, cause } => DataError::File { path, cause },
        other => DataError::Unusable(other.to_string()),
    }
}

/// What NumPy writes for arrays of numbers has some 120 bytes; it refuses more than 10,000 itself.
const LONGEST_HEADER: usize = 1 << 16;
/// Far more than anybody tells apart, and few enough for a table of counts.
const MOST_CLASSES: u32 = 1 << 16;

/// The tensors of a safetensors file by the names that are asked for, and its metadata's `classes`.
///
/// # Errors
/// If the file cannot be read, is broken, or lacks one of them.
pub(crate) fn tensors<const N: usize>(
    path: &Path,
    names: [&str; N],
) -> Result<([FeatureArray; N], Option<Vec<String>>), DataError> {
    let broken = |cause: String| DataError::in_file(path, cause);
    let files = TensorFiles::open(&[path.to_owned()]).map_err(|error| match error {
        WeightsError::Broken { cause, .. } => match other_kind(path, "safetensors") {
            Some(what) => broken(format!("not a safetensors file: it is {what}")),
            None => broken(format!("not a safetensors file, or one that is cut off: {cause}")),
        },
        other => unreadable(other),
    })?;
    let find = |name: &str| -> Result<FeatureArray, DataError> {
        let tensor = files.tensor(name).ok_or_else(|| {
            let there: Vec<String> = files.names().map(|name| format!("\"{name}\"")).collect();
            let there = there.join(", ");
            broken(format!("no tensor \"{name}\" ({there} there); what is read is \"features\" and \"labels\""))
        })?;
        Ok(FeatureArray { tensor: tensor.clone(), name: format!("{}, \"{name}\"", path.display()) })
    };
    let classes = files.metadata("classes").map(|text| {
        serde_json::from_str(text)
            .map_err(|cause| broken(format!("the metadata \"classes\" is not a list of names: {cause}")))
    });
    let found = names.into_iter().map(find).collect::<Result<Vec<FeatureArray>, DataError>>()?;
    let found = found.try_into().unwrap_or_else(|_| unreachable!("one array per name"));
    Ok((found, classes.transpose()?))
}

/// What a file is by its content, where it is not what it is taken for.
fn other_kind(path: &Path, taken_for: &str) -> Option<String> {
    let mapped = MappedFile::open(path).ok()?;
    match mapped.all().ok()? {
        [] => Some("empty".into()),
        bytes => not_text(bytes).filter(|what| !what.contains(taken_for)),
    }
}

/// The array of a `.npy` file (format versions 1 to 3 of `numpy.lib.format`).
///
/// # Errors
/// If the file cannot be read or is none, or holds what is neither floats nor whole numbers in rows.
pub(crate) fn npy(path: &Path) -> Result<FeatureArray, DataError> {
    let mapped = Arc::new(MappedFile::open(path).at(path)?);
    let map = mapped.all().at(path)?;
    let unusable = |problem: String| DataError::in_file(path, problem);
    let none = || match other_kind(path, "NumPy") {
        Some(what) => unusable(format!("not a .npy file: it is {what}")),
        None => unusable("not a .npy file".into()),
    };
    if map.get(..6) != Some(b"\x93NUMPY") {
        return Err(none());
    }
    let wide = *map.get(6).ok_or_else(none)? > 1;
    let length = map.get(8..if wide { 12 } else { 10 }).ok_or_else(none)?;
    let length = length.iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
    if length > LONGEST_HEADER {
        return Err(unusable(format!("its header promises {length} bytes of itself; up to {LONGEST_HEADER} are read")));
    }
    let start = if wide { 12usize } else { 10 } + length;
    let header = map.get(start - length..start).and_then(|bytes| std::str::from_utf8(bytes).ok()).ok_or_else(none)?;
    // A Python dict in one fixed form: {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }
    let value = |key: &str| header.split_once(&format!("'{key}':")).map(|(_, rest)| rest.trim_start());
    let descr = value("descr").and_then(|rest| rest.strip_prefix('\'')?.split('\'').next()).unwrap_or("a structure");
    let dtype = numpy_type(descr).ok_or_else(|| {
        if descr.contains(['U', 'S', 'O']) {
            let problem = "classes are whole numbers from 0 on: save numpy.unique(labels, return_inverse=True)[1]";
            return unusable(format!("it holds text or objects ({descr}); {problem}"));
        }
        if descr.starts_with('>') {
            let native = "save it with .astype(array.dtype.newbyteorder('<'))";
            return unusable(format!("it holds {descr}, which is big-endian: {native}"));
        }
        unusable(format!(
            "it holds {descr}; float16, float32, float64 and whole numbers in little-endian order can be read: save it with \
             .astype(numpy.float32), and bfloat16 as safetensors"
        ))
    })?;
    if !value("fortran_order").is_some_and(|rest| rest.starts_with("False")) {
        return Err(unusable("it is in Fortran's order: save it with numpy.ascontiguousarray".into()));
    }
    let shape = value("shape").and_then(|rest| rest.strip_prefix('(')?.split(')').next()).ok_or_else(none)?;
    let sizes = shape.split(',').map(str::trim).filter(|size| !size.is_empty()).map(|size| size.parse().ok());
    let shape: Vec<usize> = sizes.collect::<Option<_>>().ok_or_else(none)?;
    let bytes = dtype.bitsize() / 8;
    let unfit = unusable(format!("its length is not that of {shape:?} numbers of {bytes} bytes"));
    let tensor = MappedTensor::new((mapped.clone(), path), dtype, shape, start..map.len()).ok_or(unfit)?;
    Ok(FeatureArray { tensor, name: path.display().to_string() })
}

/// The type that NumPy calls so; it has no name for bf16.
fn numpy_type(descr: &str) -> Option<Dtype> {
    Some(match descr {
        "<f8" => Dtype::F64,
        "<f4" => Dtype::F32,
        "<f2" => Dtype::F16,
        "<i8" => Dtype::I64,
        "<i4" => Dtype::I32,
        "<i2" => Dtype::I16,
        "|i1" => Dtype::I8,
        "<u8" => Dtype::U64,
        "<u4" => Dtype::U32,
        "<u2" => Dtype::U16,
        "|u1" => Dtype::U8,
        _ => return None,
    })
}
