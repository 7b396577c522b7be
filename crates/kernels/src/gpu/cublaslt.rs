//! Products of linear maps through cuBLASLt, NVIDIA's library of products, in place of Burn's kernels: forward and both products of the
//! backward. It is loaded when it is first used; what it has no algorithm for is multiplied by Burn.
//!
//! Operands are bf16, f16 or f32, and what is added up is f32. It is off unless [`crate::use_cublaslt`] asks for it: it has run on no
//! card yet.

use burn::backend::Cube;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{Shape, Tensor};
use burn_cubecl::tensor::CubeTensor;

use crate::differentiable::{InputGrads, Wanted};

#[cfg(feature = "cuda-nvrtc")]
mod library;

/// Whether linear maps of tensors like this one go through the library, as far as it has algorithms for them.
pub(crate) fn multiplies<const D: usize>(x: &Tensor<D>) -> bool {
    super::cublaslt_wanted() && super::takes(x.dtype()) && is_nvidia(&x.device())
}

/// See [`crate::find_cublaslt`].
#[cfg(feature = "cuda-nvrtc")]
pub(crate) fn find(device: &burn::tensor::Device) -> Result<(), String> {
    use burn::backend::{CubeDevice, DispatchDevice};

    match device.clone().inner().as_dispatch() {
        DispatchDevice::Cube(cube @ CubeDevice::Cuda(cuda)) => {
            library::find(&cube.client(), cuda.index)?;
            first_product(cube)
        }
        _ => Err("it multiplies on NVIDIA's GPUs alone (device cuda)".into()),
    }
}

/// A product whose numbers are known: small whole ones, whose sums are exact in any order.
#[cfg(feature = "cuda-nvrtc")]
fn first_product(device: &burn::backend::CubeDevice) -> Result<(), String> {
    use burn::tensor::TensorData;

    let [rows, inner, columns] = [48, 32, 64];
    let matrix = |sizes: [usize; 2]| {
        let values: Vec<f32> = (0..sizes[0] * sizes[1]).map(|place| (place % 7) as f32 - 3.0).collect();
        (Cube::float_from_data(TensorData::new(values.clone(), sizes), device), values)
    };
    let ((x, left), (weight, right)) = (matrix([rows, inner]), matrix([inner, columns]));
    let product = through_library(&x, &weight).ok_or("it has no algorithm for a plain product")?;
    let found = burn_cubecl::ops::into_data_sync(product);
    let known = (0..rows * columns).map(|place| {
        let (row, column) = (place / columns, place % columns);
        (0..inner).map(|k| left[row * inner + k] * right[k * columns + column]).sum::<f32>()
    });
    if found.iter::<f32>().eq(known) { Ok(()) } else { Err("its first product is wrong".into()) }
}

#[cfg(feature = "cuda-nvrtc")]
fn is_nvidia(device: &burn::tensor::Device) -> bool {
    use burn::backend::{CubeDevice, DispatchDevice};
    matches!(device.clone().inner().as_dispatch(), DispatchDevice::Cube(CubeDevice::Cuda(_)))
}

#[cfg(not(feature = "cuda-nvrtc"))]
fn is_nvidia(_: &burn::tensor::Device) -> bool {
    false
}

/// `x · weight`, with both for the backward.
pub(crate) fn forward([x, weight]: [CubeTensor; 2]) -> (CubeTensor, [CubeTensor; 2]) {
    let y = product(by_rows(x.clone()), weight.clone());
    let shape = with_last(&x, y.meta.shape()[1]);
    (Cube::float_reshape(y, shape), [x, weight])
}

/// `y_grad · weightᵀ` and `xᵀ · y_grad`
pub(crate) fn backward(
    [x, weight]: [Option<CubeTensor>; 2],
    y_grad: CubeTensor,
    [of_x, of_weight]: Wanted<2>,
) -> InputGrads<Cube, 2> {
    let rows = by_rows(y_grad.clone());
    let x_grad = weight.filter(|_| of_x).map(|weight| {
        let x_grad = product(rows.clone(), Cube::float_swap_dims(weight, 0, 1));
        let shape = with_last(&y_grad, x_grad.meta.shape()[1]);
        Cube::float_reshape(x_grad, shape)
    });
    let weight_grad = x.filter(|_| of_weight).map(|x| product(Cube::float_swap_dims(by_rows(x), 0, 1), rows));
    [x_grad, weight_grad]
}

/// A tensor as a matrix whose columns are its last dimension.
fn by_rows(x: CubeTensor) -> CubeTensor {
    let shape = x.meta.shape();
    let (columns, rows) = (shape[shape.len() - 1], shape[..shape.len() - 1].iter().product());
    Cube::float_reshape(x, Shape::new([rows, columns]))
}

/// The shape of a tensor with another last dimension.
fn with_last(x: &CubeTensor, last: usize) -> Shape {
    let shape = x.meta.shape();
    let others = shape[..shape.len() - 1].iter().copied();
    Shape::from(others.chain([last]).collect::<Vec<_>>())
}

/// `left right`, of matrices.
fn product(left: CubeTensor, right: CubeTensor) -> CubeTensor {
    #[cfg(feature = "cuda-nvrtc")]
    if let Some(product) = through_library(&left, &right) {
        return product;
    }
    Cube::float_matmul(left, right)
}

/// `left right`; `None` where the library has no algorithm for it, or is not there.
#[cfg(feature = "cuda-nvrtc")]
pub(crate) fn through_library(left: &CubeTensor, right: &CubeTensor) -> Option<CubeTensor> {
    use super::gemm::{Gemm, Lines};
    use burn::backend::CubeDevice;

    let CubeDevice::Cuda(device) = &left.device else { return None };
    let lines = |matrix: &CubeTensor| {
        let plain = super::takes(matrix.dtype) && matrix.dtype == left.dtype && !matrix.meta.is_tiled();
        let (shape, strides) = (matrix.meta.shape(), matrix.meta.strides());
        (plain && shape.len() == 2).then(|| Lines::of([shape[0], shape[1]], [strides[0], strides[1]])).flatten()
    };
    let (of_left, of_right) = (lines(left)?, lines(right)?);
    let sizes = [of_left.sizes()[0], of_right.sizes()[1]];
    let product = super::launch::empty(left, sizes, left.dtype);
    library::multiply(device.index, Gemm::of(of_left, of_right), [left, right, &product]).then_some(product)
}
