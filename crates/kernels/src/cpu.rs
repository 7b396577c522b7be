//! What the fused operations share: when they apply, raw views of CPU tensors, and room for results.

use burn::backend::DispatchDevice;
use burn::tensor::{Bytes, DType, Device, Shape, Tensor};
use burn_flex::{FlexTensor, Layout};

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

fn is_flex(device: &Device) -> bool {
    matches!(device.clone().inner().as_dispatch(), DispatchDevice::Flex(_))
}

/// The values of a contiguous tensor.
pub(crate) fn values(tensor: &FlexTensor) -> &[f32] {
    let start = tensor.layout().start_offset();
    &tensor.storage::<f32>()[start..start + tensor.layout().num_elements()]
}

/// A 4-dimensional tensor, wherever its values lie.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    values: &'a [f32],
    start: usize,
    /// Sizes of the dimensions.
    pub shape: [usize; 4],
    /// Distances between neighbours.
    pub strides: [usize; 4],
}

impl<'a> View<'a> {
    /// A view of `tensor`, which [`row_major`] has seen.
    pub(crate) fn new(tensor: &'a FlexTensor) -> Self {
        let layout = tensor.layout();
        let shape = std::array::from_fn(|axis| layout.shape()[axis]);
        let strides = std::array::from_fn(|axis| layout.strides()[axis] as usize);
        Self { values: tensor.storage::<f32>(), start: layout.start_offset(), shape, strides }
    }

    /// The last dimension at `[a, b, c]`.
    pub(crate) fn row(&self, a: usize, b: usize, c: usize) -> &'a [f32] {
        let at = self.offset(a, b, c);
        &self.values[at..at + self.shape[3]]
    }

    /// Where `[a, b, c, 0]` lies; from there on, [`Self::row_stride`] leads from row to row.
    pub(crate) fn pointer(&self, a: usize, b: usize, c: usize) -> *const f32 {
        self.values[self.offset(a, b, c)..].as_ptr()
    }

    /// Distance between neighbours of dimension 2.
    pub(crate) fn row_stride(&self) -> usize {
        self.strides[2]
    }

    fn offset(&self, a: usize, b: usize, c: usize) -> usize {
        self.start + a * self.strides[0] + b * self.strides[1] + c * self.strides[2]
    }
}

/// The tensor with rows that lie together and no negative strides; copies only where it has to.
pub(crate) fn row_major(tensor: FlexTensor) -> FlexTensor {
    let strides = tensor.layout().strides();
    let together = strides.last().is_none_or(|&stride| stride == 1) && strides.iter().all(|&stride| stride >= 0);
    if together { tensor } else { tensor.to_contiguous() }
}

/// A contiguous tensor of `values`.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Vec<usize>>) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(Shape::from(shape.into())), DType::F32)
}

/// A tensor `[batch, heads, seq, width]` whose values lie as `[batch, seq, heads, width]`: joining its heads, and
/// splitting the gradient that comes back, costs no copy.
pub(crate) fn tensor_by_position(values: Vec<f32>, [batch, heads, seq, width]: [usize; 4]) -> FlexTensor {
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
        self::tensor(values(&tensor.to_contiguous()).to_vec(), tensor.layout().shape().to_vec())
    }
}

/// The sizes of a matrix.
pub(crate) fn sizes(matrix: &FlexTensor) -> [usize; 2] {
    [matrix.layout().shape()[0], matrix.layout().shape()[1]]
}

/// Room for `len` values, each of which has to be written before it is read. In tests it is full of NaN.
pub(crate) fn room(len: usize) -> Vec<f32> {
    if cfg!(test) {
        return vec![f32::NAN; len];
    }
    let mut values = Vec::with_capacity(len);
    // SAFETY: the capacity is there, every bit pattern is an f32, and nobody reads before writing (the tests, in which
    // the room is full of NaN, would show it).
    #[allow(clippy::uninit_vec)]
    unsafe {
        values.set_len(len);
    }
    values
}

/// The sum of `parts`, each of `len` values, always in the same order.
pub(crate) fn sum_in_order(len: usize, parts: &[Vec<f32>]) -> Vec<f32> {
    let mut sum = vec![0.0; len];
    parts.iter().for_each(|part| simd::add(&mut sum, part));
    sum
}

/// A buffer that threads write to at places of their own.
#[derive(Clone, Copy)]
pub(crate) struct Shared(*mut f32, usize);

// SAFETY: it is only a pointer; `slice` states what its users promise.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// A handle on `buffer`, valid while the buffer is neither moved nor dropped.
    pub(crate) fn new(buffer: &mut [f32]) -> Self {
        Self(buffer.as_mut_ptr(), buffer.len())
    }

    /// `buffer[at..at + len]`.
    ///
    /// # Safety
    /// No two slices that overlap may be alive at the same time.
    // The lifetime is the caller's promise, as `new` states.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice<'a>(self, at: usize, len: usize) -> &'a mut [f32] {
        assert!(at + len <= self.1, "slice {at}..{} of a buffer of {}", at + len, self.1);
        // SAFETY: inside the buffer, and not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }

    /// A pointer to `buffer[at]`.
    pub(crate) fn pointer(self, at: usize) -> *mut f32 {
        assert!(at <= self.1);
        // SAFETY: inside the buffer, or one behind its end.
        unsafe { self.0.add(at) }
    }
}

// SAFETY: it is only a pointer; `product` states what its users promise.
unsafe impl Send for Matrix {}
// SAFETY: as above.
unsafe impl Sync for Matrix {}

/// A matrix operand of [`product`]: where it starts, and the distances from row to row and from column to column.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    /// The first value.
    pub start: *const f32,
    /// Distance between rows.
    pub rows: usize,
    /// Distance between columns.
    pub columns: usize,
}

impl Matrix {
    /// A whole tensor of two dimensions, wherever its values lie.
    pub(crate) fn new(tensor: &FlexTensor) -> Self {
        let layout = tensor.layout();
        let start = tensor.storage::<f32>()[layout.start_offset()..].as_ptr();
        Self { start, rows: layout.strides()[0] as usize, columns: layout.strides()[1] as usize }
    }

    /// Rows that lie together.
    pub(crate) fn by_rows(start: *const f32, rows: usize) -> Self {
        Self { start, rows, columns: 1 }
    }

    /// Without the first columns.
    pub(crate) fn columns_from(self, column: usize) -> Self {
        // `wrapping_add`, because nothing is promised about what is left.
        Self { start: self.start.wrapping_add(column * self.columns), ..self }
    }

    /// Without the first rows.
    pub(crate) fn rows_from(self, row: usize) -> Self {
        Self { start: self.start.wrapping_add(row * self.rows), ..self }
    }

    /// The same values, transposed.
    pub(crate) fn transposed(self) -> Self {
        Self { start: self.start, rows: self.columns, columns: self.rows }
    }
}

/// How [`product`] writes.
#[derive(Clone, Copy)]
pub(crate) struct Destination {
    /// The first value.
    pub start: *mut f32,
    /// Distance between rows; columns lie together.
    pub rows: usize,
    /// Add to what is there instead of replacing it.
    pub add: bool,
    /// Use all threads; otherwise this one.
    pub parallel: bool,
}

/// `out (+)= factor * left right` for `[m, k]` times `[k, n]`.
///
/// # Safety
/// All three matrices lie in memory that is theirs, and nobody else touches the result meanwhile.
pub(crate) unsafe fn product([m, k, n]: [usize; 3], left: Matrix, right: Matrix, factor: f32, out: Destination) {
    let parallelism = if out.parallel { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    // SAFETY: the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.start,
            1,
            out.rows as isize,
            out.add,
            left.start,
            left.columns as isize,
            left.rows as isize,
            right.start,
            right.columns as isize,
            right.rows as isize,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}
