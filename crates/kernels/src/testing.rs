//! Helpers of the tests of fused operations.

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

/// The gradient of each input has the same bits whichever others are asked for with it, and none comes where none is.
pub(crate) fn every_subset_of_gradients<const N: usize>(
    shapes: &[&[usize]; N],
    operation: impl Fn([Tensor<1>; N]) -> Tensor<1>,
) {
    let device = Device::flex().autodiff();
    let inputs = shapes.map(|shape| normal([shape.iter().product()], &device));
    let cotangent = normal(operation(inputs.clone()).dims(), &device);
    let gradients = |asked: usize| {
        let leaves: [Tensor<1>; N] = std::array::from_fn(|index| match asked >> index & 1 {
            0 => inputs[index].clone(),
            _ => inputs[index].clone().detach().require_grad(),
        });
        let grads = (operation(leaves.clone()) * cotangent.clone()).sum().backward();
        leaves.map(|leaf| leaf.grad(&grads).map(numbers))
    };
    let all = gradients((1 << N) - 1);
    for asked in 1..1 << N {
        for (index, (got, want)) in gradients(asked).into_iter().zip(&all).enumerate() {
            let want = want.as_ref().filter(|_| asked >> index & 1 == 1);
            assert!(got.as_ref() == want, "gradient {index} of those asked for ({asked:b})");
            assert!(want.is_none_or(|grad| grad.iter().any(|&value| value != 0.0)), "gradient {index} is zero");
        }
    }
}
