//! Arrays of numbers in files, mapped into memory: tensors of a safetensors file, and NumPy's `.npy`.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use polyhead_models::MappedFile;
use safetensors::tensor::{Dtype, SafeTensors};

use crate::DataError;
use crate::error::At;
use crate::files::{not_text, open_file};

/// An array whose values are read when they are asked for.
#[derive(Debug, Clone)]
pub(crate) struct Array {
    path: Arc<Path>,
    map: Arc<MappedFile>,
    /// Where in the file the values stand.
    place: Range<usize>,
    number: Number,
    /// Sizes of the axes; row-major.
    pub(crate) shape: Vec<usize>,
    /// What it is called in messages: the file, and the tensor where there are several.
    pub(crate) name: String,
}

/// How a number is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
}

impl Number {
    fn width(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 | Self::U16 => 2,
            Self::I8 | Self::U8 => 1,
        }
    }

    fn of_tensor(dtype: Dtype) -> Option<Self> {
        Some(match dtype {
            Dtype::F64 => Self::F64,
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::BF16 => Self::Bf16,
            Dtype::I64 => Self::I64,
            Dtype::I32 => Self::I32,
            Dtype::I16 => Self::I16,
            Dtype::I8 => Self::I8,
            Dtype::U64 => Self::U64,
            Dtype::U32 => Self::U32,
            Dtype::U16 => Self::U16,
            Dtype::U8 => Self::U8,
            _ => return None,
        })
    }

    /// NumPy's name of a type; it has none for bf16.
    fn of_numpy(descr: &str) -> Option<Self> {
        Some(match descr {
            "<f8" => Self::F64,
            "<f4" => Self::F32,
            "<f2" => Self::F16,
            "<i8" => Self::I64,
            "<i4" => Self::I32,
            "<i2" => Self::I16,
            "|i1" => Self::I8,
            "<u8" => Self::U64,
            "<u4" => Self::U32,
            "<u2" => Self::U16,
            "|u1" => Self::U8,
            _ => return None,
        })
    }

    fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::Bf16)
    }
}

impl Array {
    /// Numbers `range` of a floating-point array, in f32.
    ///
    /// # Errors
    /// If they are whole numbers, or the file is shorter by now.
    pub(crate) fn floats(&self, range: Range<usize>) -> Result<Vec<f32>, DataError> {
        let bytes = self.bytes(range)?;
        let two = |value: fn([u8; 2]) -> f32| bytes.as_chunks::<2>().0.iter().map(|&chunk| value(chunk)).collect();
        Ok(match self.number {
            Number::F32 => bytes.as_chunks::<4>().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect(),
            Number::F64 => bytes.as_chunks::<8>().0.iter().map(|&chunk| f64::from_le_bytes(chunk) as f32).collect(),
            Number::F16 => two(|chunk| f16::from_le_bytes(chunk).to_f32()),
            Number::Bf16 => two(|chunk| bf16::from_le_bytes(chunk).to_f32()),
            other => {
                let problem = format!("{} holds {other:?}: features are F32, F16, BF16 or F64", self.name);
                return Err(DataError::Unusable(problem));
            }
        })
    }

    /// All numbers of an array of whole ones.
    ///
    /// # Errors
    /// If they are fractions, or too large to be labels, or the file is shorter by now.
    pub(crate) fn labels(&self) -> Result<Vec<u32>, DataError> {
        if self.number.is_float() {
            let problem = format!("{} holds {:?}: labels are whole numbers", self.name, self.number);
            return Err(DataError::Unusable(problem));
        }
        let bytes = self.bytes(0..self.shape.iter().product())?;
        let label = |(row, chunk): (usize, &[u8])| {
            let mut wide = [0; 8];
            let negative = !matches!(self.number, Number::U64 | Number::U32 | Number::U16 | Number::U8)
                && chunk.last().is_some_and(|byte| *byte >= 0x80);
            wide.fill(if negative { 0xFF } else { 0 });
            wide[..chunk.len()].copy_from_slice(chunk);
            let value = i64::from_le_bytes(wide);
            u32::try_from(value).ok().filter(|label| *label < MOST_CLASSES).ok_or_else(|| {
                let problem = format!(
                    "{}: the label of row {row} is {value}; labels are numbers of classes, from 0 to {}",
                    self.name,
                    MOST_CLASSES - 1
                );
                DataError::Unusable(problem)
            })
        };
        bytes.chunks(self.number.width()).enumerate().map(label).collect()
    }

    /// The bytes of numbers `range`.
    ///
    /// # Errors
    /// If the file is shorter by now.
    pub(crate) fn bytes(&self, range: Range<usize>) -> Result<&[u8], DataError> {
        let width = self.number.width();
        let place = self.place.start + range.start * width..self.place.start + range.end * width;
        self.map.bytes(place).at(&self.path)
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
) -> Result<([Array; N], Option<Vec<String>>), DataError> {
    let mapped = Arc::new(open(path)?);
    let map = mapped.all().at(path)?;
    let broken = |cause: String| DataError::Unusable(format!("{}: {cause}", path.display()));
    let read = |cause: safetensors::SafeTensorError| match not_text(map).filter(|what| what != "safetensors") {
        Some(what) => broken(format!("not a safetensors file: it is {what}")),
        None => broken(format!("not a safetensors file, or one that is cut off: {cause}")),
    };
    let file = SafeTensors::deserialize(map).map_err(read)?;
    let find = |name: &str| {
        let view = file.tensor(name).map_err(|_| {
            let mut there: Vec<String> = file.names().into_iter().map(|name| format!("\"{name}\"")).collect();
            there.sort();
            broken(format!(
                "no tensor \"{name}\" ({} there); what is read is \"features\" and \"labels\"",
                there.join(", ")
            ))
        })?;
        let number = Number::of_tensor(view.dtype()).ok_or_else(|| {
            broken(format!("\"{name}\" is {:?}; F32, F16, BF16, F64 and whole numbers can be read", view.dtype()))
        })?;
        let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
        Ok(Array {
            path: path.into(),
            map: mapped.clone(),
            place: start..start + view.data().len(),
            number,
            shape: view.shape().to_vec(),
            name: format!("{}, \"{name}\"", path.display()),
        })
    };
    let mut found = Vec::with_capacity(N);
    for name in names {
        found.push(find(name)?);
    }
    let (_, header) = SafeTensors::read_metadata(map).map_err(read)?;
    let classes = header.metadata().as_ref().and_then(|all| all.get("classes")).map(|text| {
        serde_json::from_str(text)
            .map_err(|cause| broken(format!("the metadata \"classes\" is no list of names: {cause}")))
    });
    let found = found.try_into().unwrap_or_else(|_| unreachable!("one array per name"));
    Ok((found, classes.transpose()?))
}

/// The array of a `.npy` file (format versions 1 to 3 of `numpy.lib.format`).
///
/// # Errors
/// If the file cannot be read or is none, or holds what is neither floats nor whole numbers in rows.
pub(crate) fn npy(path: &Path) -> Result<Array, DataError> {
    let mapped = open(path)?;
    let map = mapped.all().at(path)?;
    let unusable = |problem: String| DataError::Unusable(format!("{}: {problem}", path.display()));
    let none = || match not_text(map) {
        Some(what) if !what.contains("NumPy") => unusable(format!("not a .npy file: it is {what}")),
        _ => unusable("not a .npy file".into()),
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
    let number = Number::of_numpy(descr).ok_or_else(|| {
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
    let count = shape.iter().try_fold(number.width(), |product, size| product.checked_mul(*size));
    let end = count.and_then(|bytes| start.checked_add(bytes)).filter(|end| *end == map.len());
    let end = end
        .ok_or_else(|| unusable(format!("its length is not that of {shape:?} numbers of {} bytes", number.width())))?;
    let name = path.display().to_string();
    Ok(Array { path: path.into(), map: Arc::new(mapped), place: start..end, number, shape, name })
}

fn open(path: &Path) -> Result<MappedFile, DataError> {
    let mapped = MappedFile::of(open_file(path)?, path).at(path)?;
    if mapped.is_empty() {
        return Err(DataError::Unusable(format!("{} is empty", path.display())));
    }
    Ok(mapped)
}
