//! Number types: parameters stay f32, the type of the states decides what products run in.

use burn::tensor::{DType, Tensor};

/// `x` as `dtype`; differentiable, and nothing at all where it is that already.
pub fn in_type<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    if x.dtype() == dtype { x } else { x.cast(dtype) }
}
