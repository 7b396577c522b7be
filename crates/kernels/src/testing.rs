//! What the tests of fused operations share.

use burn::tensor::{Device, Distribution, Tensor};

pub(crate) use crate::comparison::numbers;
use crate::comparison::{Tolerance, assert_close};
use crate::random;

/// Allowed difference, relative to the largest entry.
const TOLERANCE: Tolerance = Tolerance::relative(1e-5).of_at_least(1e-3);

/// The next normal numbers of this test's own stream.
pub(crate) fn normal<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// A leaf of normal numbers on the autodiff device.
pub(crate) fn leaf<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    normal(shape, &Device::flex().autodiff()).require_grad()
}

/// All entries agree, relative to the largest.
pub(crate) fn agree(what: &str, got: &[f32], want: &[f32]) {
    assert_close(what, got, want, TOLERANCE);
}

/// Two forms of an operation of flattened inputs give the same outputs and gradients.
pub(crate) fn agree_with_gradients<const N: usize>(
    inputs: &[&Tensor<1>; N],
    fused: impl Fn([Tensor<1>; N]) -> Tensor<1>,
    plain: impl Fn([Tensor<1>; N]) -> Tensor<1>,
) {
    let leaves = inputs.map(|input| input.clone().detach().require_grad());
    let (got, want) = (fused(leaves.clone()), plain(leaves.clone()));
    let cotangent = normal(want.dims(), &want.device());
    agree("output", &numbers(got.clone()), &numbers(want.clone()));
    let (got, want) = ((got * cotangent.clone()).sum().backward(), (want * cotangent).sum().backward());
    for (index, leaf) in leaves.iter().enumerate() {
        let grad = |grads| numbers(leaf.grad(grads).expect("gradient"));
        agree(&format!("gradient {index}"), &grad(&got), &grad(&want));
    }
}
