//! Helpers of the fused operations: when they apply, the values of CPU tensors, and tensors of results.

use burn::backend::DispatchDevice;
use burn::tensor::{Bytes, DType, Device, Shape, Tensor};
use burn_flex::{FlexTensor, Layout};

use crate::matrix::Matrix;
use crate::simd;

/// Whether tensors like this one go through the fused operations: f32 on Burn's CPU backend `flex`. Everything else
/// takes the plain form.
pub(crate) fn fuses<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.dtype() == DType::F32 && is_flex(&tensor.device())
}

/// Threads that operations on the CPU are spread over; the environment variable RAYON_NUM_THREADS sets them.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Whether this is Burn's CPU backend `flex`, with or without gradients.
pub(crate) fn is_flex(device: &Device) -> bool {
    matches!(device.clone().inner().as_dispatch(), DispatchDevice::Flex(_))
}

/// Whether products on this device take weights of bf16 with states of f32, as they are; elsewhere they are made f32 each time.
pub fn multiplies_bf16(device: &Device) -> bool {
    is_flex(device)
}

/// The values of a contiguous tensor.
///
/// # Panics
/// If it is not contiguous.
pub(crate) fn values(tensor: &FlexTensor) -> &[f32] {
    assert!(tensor.is_contiguous(), "values that are not contiguous: {:?}", tensor.layout());
    let start = tensor.layout().start_offset();
    &tensor.storage::<f32>()[start..start + tensor.layout().num_elements()]
}

/// A tensor's sizes.
pub(crate) fn shape(tensor: &FlexTensor) -> Vec<usize> {
    tensor.layout().shape().to_vec()
}

/// A contiguous tensor as a matrix whose columns are its last dimension.
pub(crate) fn matrix(tensor: &FlexTensor) -> Matrix<'_> {
    let shape = tensor.layout().shape();
    let (last, others) = shape.split_last().unwrap_or((&1, &[]));
    Matrix::by_rows(values(tensor), [others.iter().product(), *last])
}

/// A 4-dimensional tensor of any strides.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    values: &'a [f32],
    start: usize,
    /// Sizes of the dimensions.
    pub shape: [usize; 4],
    /// Distances between neighbours.
    strides: [usize; 4],
}

impl<'a> View<'a> {
    /// A view of `tensor`, which [`row_major`] has seen.
    ///
    /// # Panics
    /// If it has not.
    pub(crate) fn new(tensor: &'a FlexTensor) -> Self {
        let layout = tensor.layout();
        let (Ok(shape), Ok(strides)) =
            (<[usize; 4]>::try_from(&layout.shape()[..]), <[isize; 4]>::try_from(layout.strides()))
        else {
            panic!("a view of four dimensions of a tensor {:?}", layout.shape());
        };
        let together = strides[3] == 1 || shape[3] <= 1;
        assert!(together && strides.iter().all(|&stride| stride >= 0), "rows that are not contiguous: {layout:?}");
        let strides = strides.map(|stride| stride as usize);
        Self { values: tensor.storage::<f32>(), start: layout.start_offset(), shape, strides }
    }

    /// The last dimension at `[a, b, c]`.
    pub(crate) fn row(&self, a: usize, b: usize, c: usize) -> &'a [f32] {
        let at = self.offset(a, b, c);
        &self.values[at..at + self.shape[3]]
    }

    /// The same where each dimension has that size or is 1, which stands for all.
    pub(crate) fn spread_row(&self, place: [usize; 3]) -> &'a [f32] {
        let [a, b, c] = std::array::from_fn(|axis| if self.shape[axis] == 1 { 0 } else { place[axis] });
        self.row(a, b, c)
    }

    /// The last two dimensions at `[a, b]`, `rows` of them.
    pub(crate) fn rows(&self, a: usize, b: usize, rows: std::ops::Range<usize>) -> Matrix<'a> {
        let from = &self.values[self.offset(a, b, rows.start)..];
        Matrix::new(from, [rows.len(), self.shape[3]], [self.strides[2], 1])
    }

    /// The second and the last dimension at `a` and `c`: of `[batch, seq, heads, width]` the rows of one head.
    pub(crate) fn positions(&self, a: usize, c: usize) -> Matrix<'a> {
        let from = self.values.get(self.offset(a, 0, c)..).unwrap_or_default();
        Matrix::new(from, [self.shape[1], self.shape[3]], [self.strides[1], 1])
    }

    fn offset(&self, a: usize, b: usize, c: usize) -> usize {
        self.start + a * self.strides[0] + b * self.strides[1] + c * self.strides[2]
    }
}

/// The tensor with contiguous rows and no negative strides; copies only where it has to.
pub(crate) fn row_major(tensor: FlexTensor) -> FlexTensor {
    let strides = tensor.layout().strides();
    let together = strides.last().is_none_or(|&stride| stride == 1) && strides.iter().all(|&stride| stride >= 0);
    if together { tensor } else { tensor.to_contiguous() }
}

/// The tensor without negative strides, as matrices want it; copies only where it has to.
pub(crate) fn not_backwards(tensor: FlexTensor) -> FlexTensor {
    if tensor.layout().strides().iter().all(|&stride| stride >= 0) { tensor } else { tensor.to_contiguous() }
}

/// A contiguous tensor of `values`.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Vec<usize>>) -> FlexTensor {
    let shape = Shape::from(shape.into());
    assert_eq!(values.len(), shape.num_elements(), "values of a tensor {shape:?}");
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::F32)
}

/// A tensor `[batch, heads, seq, width]` laid out as `[batch, seq, heads, width]`: joining its heads, and
/// splitting the gradient that comes back, costs no copy.
pub(crate) fn tensor_by_position(values: Vec<f32>, [batch, heads, seq, width]: [usize; 4]) -> FlexTensor {
    assert_eq!(values.len(), batch * heads * seq * width, "values of a tensor {:?}", [batch, heads, seq, width]);
    let strides = [seq * heads * width, width, heads * width, 1].map(|stride| stride as isize);
    let layout = Layout::new(Shape::from(vec![batch, heads, seq, width]), strides.to_vec(), 0);
    FlexTensor::new(Bytes::from_elems(values), layout, DType::F32)
}

/// The tensor with its values alone in a buffer of their own size: not a part of a larger one.
pub(crate) fn whole(tensor: FlexTensor) -> FlexTensor {
    let fills = tensor.storage::<f32>().len() == tensor.layout().num_elements();
    if fills && tensor.is_contiguous() {
        tensor
    } else {
        self::tensor(values(&tensor.to_contiguous()).to_vec(), shape(&tensor))
    }
}

/// The sum of `parts`, each of `len` values, always in the same order.
pub(crate) fn sum_in_order(len: usize, parts: &[Vec<f32>]) -> Vec<f32> {
    let mut sum = vec![0.0; len];
    parts.iter().for_each(|part| simd::add(&mut sum, part));
    sum
}
