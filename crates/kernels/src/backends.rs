//! Every operation on other backends, through the portable forms, against the fused ones of the CPU: outputs and all
//! gradients. Only with `--features ndarray` or `--features cuda` (the latter needs a GPU).

use burn::tensor::{Device, Tensor};

use crate::comparison::{Tolerance, assert_close, numbers};
use crate::testing::normal;
use crate::*;

/// Allowed difference, relative to the largest entry; GPUs add in another order.
const TOLERANCE: Tolerance = Tolerance::relative(1e-4).of_at_least(1e-3);

#[cfg(feature = "ndarray")]
#[test]
#[allow(deprecated)] // kept for comparing numbers
fn ndarray_agrees() {
    all_operations_agree(&Device::ndarray());
}

#[cfg(feature = "cuda")]
#[test]
fn cuda_agrees() {
    let found = Device::enumerate(burn::tensor::DeviceType::Cuda);
    assert!(!found.is_empty(), "no CUDA device: this test needs one");
    all_operations_agree(&Device::cuda(0));
}

type Operation = Box<dyn Fn(&[Tensor<1>]) -> Tensor<1>>;

fn all_operations_agree(other: &Device) {
    for (name, sizes, operation) in operations() {
        let values: Vec<Vec<f32>> = sizes.iter().map(|&n| numbers(normal([n], &Device::flex()))).collect();
        let run = |device: &Device| {
            let device = device.clone().autodiff();
            let leaves: Vec<_> = values.iter().map(|v| Tensor::from_floats(&v[..], &device).require_grad()).collect();
            let out = operation(&leaves);
            let grads = out.clone().sin().sum().backward();
            let grads = leaves.iter().map(|leaf| numbers(leaf.grad(&grads).expect("gradient")));
            std::iter::once(numbers(out)).chain(grads).collect::<Vec<_>>()
        };
        for (index, (got, want)) in run(other).iter().zip(&run(&Device::flex())).enumerate() {
            assert_close(&format!("{name}, result {index}"), got, want, TOLERANCE);
        }
    }
}

/// Name, sizes of the inputs, and what is made of them.
fn operations() -> Vec<(String, Vec<usize>, Operation)> {
    let mut all: Vec<(String, Vec<usize>, Operation)> = vec![
        (
            "linear".into(),
            vec![2 * 7 * 5, 5 * 6, 6],
            Box::new(|x| {
                linear(x[0].clone().reshape([2, 7, 5]), x[1].clone().reshape([5, 6]), Some(x[2].clone())).reshape([-1])
            }),
        ),
        (
            "rms_norm".into(),
            vec![3 * 7 * 16, 16],
            Box::new(|x| rms_norm(x[0].clone().reshape([3, 7, 16]), x[1].clone(), 1e-5).reshape([-1])),
        ),
        (
            "gated_mlp".into(),
            vec![2 * 7 * 8, 8 * 12, 8 * 12, 12 * 8],
            Box::new(|x| {
                let matrix = |i: usize, rows| x[i].clone().reshape([rows as i32, -1]);
                gated_mlp(x[0].clone().reshape([2, 7, 8]), matrix(1, 8), matrix(2, 8), matrix(3, 12)).reshape([-1])
            }),
        ),
        (
            "subtract_noise".into(),
            vec![2 * 8 * 5 * 6, 1, 6],
            Box::new(|x| {
                let how = Combination { ratio: 3, eps: 1e-5, factor: 0.8 };
                subtract_noise(x[0].clone().reshape([2, 8, 5, 6]), x[1].clone(), x[2].clone(), how).reshape([-1])
            }),
        ),
        (
            "cross_entropy".into(),
            vec![9 * 6, 6 * 20],
            Box::new(|x| {
                let targets = Targets::new(&[3, 0, -100, 19, 5, 5, -100, 7, 1]);
                cross_entropy(x[0].clone().reshape([9, 6]), x[1].clone().reshape([6, 20]), &targets).sum
            }),
        ),
    ];
    for layout in [RopeLayout::RotateHalf, RopeLayout::Interleaved] {
        let angles = normal::<2>([7, 4], &Device::flex()).into_data(); // the same on both
        all.push((
            format!("rope {layout:?}"),
            vec![2 * 3 * 7 * 8],
            Box::new(move |x| {
                let angles = Tensor::<2>::from_data(angles.clone(), &x[0].device());
                let turned = rope(x[0].clone().reshape([2, 3, 7, 8]), angles.clone().cos(), angles.sin(), layout);
                turned.reshape([-1])
            }),
        ));
    }
    let (batch, seq) = (2, 40);
    let documents: Vec<u32> = (0..batch * seq).map(|i| (i % seq / 9 % 3) as u32).collect();
    let turns: Vec<bool> = (0..batch * seq).map(|i| i / 7 % 2 == 0).collect();
    for (name, mask) in [
        ("none", Mask::none()),
        ("causal", Mask::causal()),
        ("lengths", Mask::none().with_lengths(&[0, 31])),
        ("documents", Mask::causal().with_documents(&documents)),
        ("turns", Mask::turns(&turns, seq)),
    ] {
        let sizes = vec![batch * 6 * seq * 8, batch * 3 * seq * 8, batch * 2 * seq * 12];
        all.push((
            format!("attention, mask {name}"),
            sizes,
            Box::new(move |x| {
                let heads = |i: usize, n, width| x[i].clone().reshape([batch, n, seq, width]);
                let options = AttentionOptions { mask: Some(&mask), ..Default::default() };
                attention(heads(0, 6, 8), heads(1, 3, 8), heads(2, 2, 12), &options).hidden.reshape([-1])
            }),
        ));
    }
    all
}
