//! What the tests of fused operations share.

use std::cell::Cell;

use burn::tensor::{Device, Tensor, TensorData};

/// Allowed difference, relative to the largest entry.
const RELATIVE: f32 = 1e-5;

thread_local! {
    static DRAWN: Cell<u64> = const { Cell::new(0) };
}

/// Normal numbers, the same in every run: a test has a thread of its own, while the backend's generator is shared by all
/// tests of the process, so that a rare draw that loses a digit more would fail now and then.
pub(crate) fn normal<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    let draw = || {
        let drawn = DRAWN.get() + 1;
        DRAWN.set(drawn);
        // splitmix64 (Steele et al. 2014): the n-th number is a function of n.
        let mut bits = drawn.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((bits ^ (bits >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    // Box-Muller.
    let number = |_| ((-2.0 * (1.0 - draw()).ln()).sqrt() * (std::f64::consts::TAU * draw()).cos()) as f32;
    let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(number).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// A leaf of normal numbers on the autodiff device.
pub(crate) fn leaf<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    normal(shape, &Device::flex().autodiff()).require_grad()
}

/// Values on the host.
pub(crate) fn numbers<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().iter::<f32>().collect()
}

/// All entries agree, relative to the largest.
pub(crate) fn agree(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(0f32, |max, value| max.max(value.abs()));
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= RELATIVE * scale.max(1e-3), "{what}: {got} is not {want} (largest {scale})");
    }
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
