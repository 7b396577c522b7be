//! Tensors to a safetensors file piece by piece: what a model holds is never held twice.

use std::io::{self, Write};

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::{Named, ParameterVisitor, visit_parameters};

/// Numbers that are on the host at a time (4 MiB; chosen by us).
const PIECE: usize = 1 << 20;

/// What can be written as a tensor of a file.
pub trait ToWrite {
    /// Its name in the file.
    fn name(&self) -> &str;

    /// Sizes of the dimensions.
    fn shape(&self) -> &[usize];

    /// Hands its values in f32 to `take`, row-major, piece by piece.
    ///
    /// # Errors
    /// The first that `take` gives.
    fn pieces(&self, take: &mut dyn FnMut(&[f32]) -> io::Result<()>) -> io::Result<()>;
}

/// A named tensor whose values stay where they are until they are asked for, piece by piece.
#[derive(Debug, Clone)]
pub struct Held {
    /// Field names from the model down, joined by dots.
    pub name: String,
    /// Sizes of the dimensions.
    pub shape: Vec<usize>,
    flat: Tensor<1>,
}

impl Held {
    /// A tensor under a name; it shares its values with `tensor`.
    pub fn new<const D: usize>(name: String, tensor: Tensor<D>) -> Self {
        let shape = tensor.dims().to_vec();
        let numbers = shape.iter().product::<usize>();
        Self { name, shape, flat: tensor.reshape([numbers]) }
    }

    /// Values from the host, on `device`.
    pub fn on_device(tensor: Named, device: &Device) -> Self {
        let numbers = tensor.values.len();
        let flat = Tensor::from_data(TensorData::new(tensor.values, [numbers]), device);
        Self { name: tensor.name, shape: tensor.shape, flat }
    }

    /// The tensor, which shares its values.
    ///
    /// # Panics
    /// If it has other than `D` dimensions.
    pub(crate) fn tensor<const D: usize>(self) -> Tensor<D> {
        let shape: [usize; D] = self.shape.try_into().expect("as many dimensions as are asked for");
        self.flat.reshape(shape)
    }

    /// All of its values in f32, row-major.
    pub fn values(&self) -> Vec<f32> {
        let data = self.flat.to_data().convert_dtype(DType::F32);
        data.try_into_vec().unwrap_or_else(|error| unreachable!("converted to f32: {error:?}"))
    }

    /// The same with its values.
    pub fn named(&self) -> Named {
        Named { name: self.name.clone(), shape: self.shape.clone(), values: self.values() }
    }
}

impl ToWrite for Held {
    fn name(&self) -> &str {
        &self.name
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// In pieces of up to 2²⁰.
    fn pieces(&self, take: &mut dyn FnMut(&[f32]) -> io::Result<()>) -> io::Result<()> {
        let [numbers] = self.flat.dims();
        for start in (0..numbers).step_by(PIECE) {
            let end = (start + PIECE).min(numbers);
            let data = self.flat.clone().narrow(0, start, end - start).into_data().convert_dtype(DType::F32);
            let values = data.as_slice::<f32>().map_err(|error| io::Error::other(format!("{error:?}")))?;
            take(values)?;
        }
        Ok(())
    }
}

impl ToWrite for Named {
    fn name(&self) -> &str {
        &self.name
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// In one.
    fn pieces(&self, take: &mut dyn FnMut(&[f32]) -> io::Result<()>) -> io::Result<()> {
        take(&self.values)
    }
}

/// All parameters of a module, in the order of its fields, as [`named`](super::named) has them, without their values.
pub fn held<M: Module>(module: &M) -> Vec<Held> {
    struct Collect(Vec<Held>);
    impl ParameterVisitor for Collect {
        fn visit<const D: usize>(&mut self, name: String, param: &Param<Tensor<D>>) {
            self.0.push(Held::new(name, param.val()));
        }
    }
    visit_parameters(module, Collect(Vec::new())).0
}

/// Writes the bytes that [`to_safetensors`](super::to_safetensors) gives, piece by piece. Gives the tensors that hold a NaN or
/// an infinity, and how many.
///
/// # Errors
/// If `out` cannot be written.
pub fn write_safetensors(
    tensors: &[impl ToWrite],
    metadata: &[(&str, String)],
    out: &mut dyn Write,
) -> io::Result<Vec<(String, usize)>> {
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by(|a, b| a.name().cmp(b.name())); // as the crate sorts tensors of one type
    let mut at = 0;
    let entries = order.iter().map(|tensor| {
        let start = at;
        at += tensor.shape().iter().product::<usize>() * size_of::<f32>();
        let info = TensorInfo { dtype: Dtype::F32, shape: tensor.shape().to_vec(), data_offsets: (start, at) };
        (tensor.name().to_owned(), info)
    });
    let entries = entries.collect();
    let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    let header = Metadata::new(Some(metadata), entries).map_err(io::Error::other)?;
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    let (mut bytes, mut bad) = (Vec::with_capacity(PIECE * size_of::<f32>()), Vec::new());
    for tensor in order {
        let mut count = 0;
        tensor.pieces(&mut |values| {
            bytes.clear();
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            count += values.iter().filter(|value| !value.is_finite()).count();
            out.write_all(&bytes)
        })?;
        if count > 0 {
            bad.push((tensor.name().to_owned(), count));
        }
    }
    Ok(bad)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::weights::to_safetensors;

    fn tensor(name: &str, shape: [usize; 2], value: impl Fn(usize) -> f32) -> (Held, Named) {
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(value).collect();
        let data = TensorData::new(values.clone(), shape);
        let held = Held::new(name.to_owned(), Tensor::<2>::from_data(data, &Device::flex()));
        (held, Named { name: name.to_owned(), shape: shape.to_vec(), values })
    }

    #[test]
    fn pieces_make_the_file_that_the_crate_writes() {
        let value = |i: usize| (i as f32 * 0.37).sin();
        // The largest takes several pieces, the last of which is short; names come in no order.
        let (held, named): (Vec<_>, Vec<_>) = [
            tensor("layers.10.weight", [3, 5], value),
            tensor("embedding.weight", [1033, 2049], value),
            tensor("layers.2.weight", [4, 1], value),
        ]
        .into_iter()
        .unzip();
        let metadata = [("format", "polyhead".to_owned())];
        let mut bytes = Vec::new();
        assert!(write_safetensors(&held, &metadata, &mut bytes).unwrap().is_empty());
        assert!(bytes == to_safetensors(&named, &metadata).unwrap());
    }

    #[test]
    fn what_is_not_finite_is_counted_by_name() {
        let (good, _) = tensor("a", [2, 3], |i| i as f32);
        let (bad, _) = tensor("b", [2, 3], |i| [f32::NAN, f32::INFINITY, 0.0][i % 3]);
        let told = write_safetensors(&[good, bad], &[], &mut Vec::new()).unwrap();
        assert_eq!(told, [("b".to_owned(), 4)]);
    }
}
