//! The overlap of heads by A-STAR's formula in PyTorch; see `tests/golden/head_overlap/README.md`.

use burn::tensor::{Device, Tensor};
use polyhead_models::head_overlap;

use crate::golden::{compare, files, size, tensor, values};

#[test]
fn golden_head_overlap() {
    for golden in &files("head_overlap") {
        let (name, file) = (&golden.name, &golden.tensors);
        let weights: Tensor<4> = tensor::<4>(file, "weights", &Device::flex().autodiff()).require_grad();
        let [batch, heads, seq] = ["batch", "n_heads", "seq"].map(|key| size(&golden.config, key));
        assert_eq!(weights.dims(), [batch, heads, seq, seq], "{name}");
        let out = head_overlap(weights.clone());
        compare(name, "out", &file["out"].values, &values(out.clone()), 1e-6, false);
        let grads = out.backward();
        // Hidden keys have a weight of 0 in all heads, where the smaller one has no gradient of its own.
        let hidden = golden.config["causal"].as_bool().unwrap();
        let got = values(weights.grad(&grads).unwrap());
        let place = |at: usize| at % seq > at / seq % seq;
        let got: Vec<f32> =
            got.into_iter().enumerate().map(|(at, grad)| if hidden && place(at) { 0.0 } else { grad }).collect();
        compare(name, "grad.weights", &file["grad.weights"].values, &got, 1e-5, true);
    }
}
