//! Grouped differential and softmax attention beside others' code.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use polyhead_attention::{
    Attention, AttentionConfig, Call, Dims, GroupedDifferentialConfig, LambdaInit, Mask, Rope, RopeLayout,
    SoftmaxConfig,
};
use polyhead_models::weights::{self, Named};

use crate::golden::{
    Config, GRADIENT, Golden, OUTPUT, compare, compare_gradients, files, size, tensor, transposed, values,
};

#[test]
fn golden_gda() {
    for golden in files("gda") {
        // The number is used as given: which layer it is of decides nothing.
        golden.config.beside_the_point(&["depth", "layer_idx"]);
        let described = |subln| AttentionConfig::GroupedDifferential(differential(&golden.config, subln));
        check(&golden, &described(true));
        check_difference(&golden, &described(false));
    }
}

#[test]
fn golden_softmax() {
    for golden in files("softmax") {
        golden.config.is("mechanism", "softmax");
        let config = &golden.config;
        let described = AttentionConfig::Softmax(SoftmaxConfig {
            n_heads: size(config, "n_q_heads"),
            n_kv_heads: Some(size(config, "n_kv_heads")),
            head_dim: Some(size(config, "head_dim")),
            qkv_bias: golden.tensors.contains_key("w.q_proj.bias"),
            o_bias: golden.tensors.contains_key("w.o_proj.bias"),
            ..SoftmaxConfig::default()
        });
        check(&golden, &described);
    }
}

/// The layer that a file describes.
pub fn differential(config: &Config, subln: bool) -> GroupedDifferentialConfig {
    config.is("subln_eps", 1e-5);
    GroupedDifferentialConfig {
        n_heads: size(config, "n_q_heads"),
        n_noise_heads: size(config, "n_noise"),
        n_kv_heads: Some(size(config, "n_kv_heads")),
        head_dim: Some(size(config, "head_dim")),
        lambda_init: LambdaInit::Constant(config["lambda_init"].as_f64().unwrap()),
        subln,
        subln_init: 1.0,
        window: None,
    }
}

/// What a layer writes for hidden states of a file, under its mask and with its rotary positions.
pub fn attend(config: &Config, layer: &Attention, x: Tensor<3>) -> Tensor<3> {
    assert_eq!(x.dims(), ["batch", "seq", "d_model"].map(|key| size(config, key)), "sizes of x");
    let layout = match config["rope_layout"].as_str() {
        Some("interleaved") => RopeLayout::Interleaved,
        Some("neox") => RopeLayout::RotateHalf,
        other => panic!("rope_layout {other:?}"),
    };
    let (seq, head_dim) = (size(config, "seq"), size(config, "head_dim"));
    let theta = config["rope_theta"].as_f64().unwrap();
    let rope = config["rope"].as_bool().unwrap().then(|| Rope::new(0..seq, head_dim, theta, layout, &x.device()));
    let mask = if config["causal"].as_bool().unwrap() { Mask::causal() } else { Mask::none() };
    layer.forward(x, Call { rope: rope.as_ref(), ..Call::new(&mask) }).hidden
}

fn check(golden: &Golden, described: &AttentionConfig) {
    let (name, file, device) = (&golden.name, &golden.tensors, Device::flex().autodiff());
    let layer = load(golden, described, ours(file.under("w.")));
    let x = tensor::<3>(file, "x", &device).require_grad();
    let out = attend(&golden.config, &layer, x.clone());
    compare(name, "out", &file["out"].values, &values(out.clone()), OUTPUT, false);

    let grads = (out * tensor(file, "cotangent", &device)).sum().backward();
    let mut want = ours(file.under("grad."));
    let of_x = want.remove("x").unwrap_or_else(|| panic!("{name} has no grad.x"));
    compare(name, "grad.x", &of_x.values, &values(x.grad(&grads).unwrap()), GRADIENT, true);
    compare_gradients(name, &layer, &grads, &want, GRADIENT);
}

/// λ, and what is left of the signal heads before their norm: seen through the output projection.
fn check_difference(golden: &Golden, described: &AttentionConfig) {
    let (name, file, device) = (&golden.name, &golden.tensors, Device::flex().autodiff());
    let mut stored = ours(file.under("w."));
    stored.remove("subln.weight");
    let layer = load(golden, described, stored);
    let Attention::GroupedDifferential(heads) = &layer else { panic!("{name}: differential") };
    compare(name, "inter.lambda", &file["inter.lambda"].values, &values(heads.lambda()), OUTPUT, false);
    let [batch, seq, signals, width] = file["inter.diff"].shape[..] else { panic!("{name}: inter.diff") };
    let rows = tensor::<4>(file, "inter.diff", &device).reshape([batch, seq, signals * width]);
    let want = values(polyhead_kernels::linear(rows, heads.o_proj.weight.val(), None));
    let got = values(attend(&golden.config, &layer, tensor(file, "x", &device)));
    compare(name, "inter.diff through o_proj", &want, &got, OUTPUT, false);
}

fn load(golden: &Golden, described: &AttentionConfig, stored: BTreeMap<String, Named>) -> Attention {
    let (name, config) = (&golden.name, &golden.config);
    let rope = config["rope"].as_bool().unwrap();
    let dims = Dims { d_model: size(config, "d_model"), n_layers: 1, layer: 0, rope, norm_eps: 1e-5, grid: None };
    described.validate(&dims).unwrap_or_else(|error| panic!("{name}: {error}"));
    let layer = described.init(&dims, &Device::flex().autodiff());
    weights::load(layer, stored).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Linear weights are `[out, in]` in the files and `[in, out]` here.
pub fn ours(tensors: BTreeMap<String, Named>) -> BTreeMap<String, Named> {
    let turn = |(key, tensor): (String, Named)| match tensor.shape.len() {
        2 => {
            assert!(key.ends_with("_proj.weight"), "{key}");
            (key, transposed(&tensor))
        }
        _ => (key, tensor),
    };
    tensors.into_iter().map(turn).collect()
}
