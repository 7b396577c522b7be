//! Gated DeltaNet by transformers' Qwen3-Next; see `tests/golden/gated_delta_net/README.md`.

use burn::tensor::{Device, Tensor};
use polyhead_attention::{
    Call, DeltaState, Dims, GatedDeltaNetConfig, Mask, Mechanism, MechanismCache, MechanismConfig,
};
use polyhead_models::weights;

use crate::golden::{
    GRADIENT, Golden, Layout, Names, OUTPUT, compare, compare_gradients, files, renamed, size, tensor, values,
};

const NAMES: Names<'static> = &[
    ("in_proj_qkvz.weight", "qkvz_proj.weight", Layout::Linear),
    ("in_proj_ba.weight", "ba_proj.weight", Layout::Linear),
    ("conv1d.weight", "conv.weight", Layout::Same),
    ("dt_bias", "dt_bias", Layout::Same),
    ("A_log", "a_log", Layout::Same),
    ("norm.weight", "norm.weight", Layout::Same),
    ("out_proj.weight", "o_proj.weight", Layout::Linear),
];

#[test]
fn golden_gated_delta_net() {
    files("gated_delta_net").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.is("method", "gated_delta_net");
    config.beside_the_point(&["verified"]);
    let device = Device::flex().autodiff();
    let size = |key: &str| size(config, key);
    let described = GatedDeltaNetConfig {
        n_heads: size("n_v_heads"),
        n_key_heads: Some(size("n_k_heads")),
        head_k_dim: Some(size("head_k_dim")),
        head_v_dim: Some(size("head_v_dim")),
        conv_kernel: size("conv_kernel"),
    };
    let norm_eps = config["norm_eps"].as_f64().unwrap();
    let dims = Dims { d_model: size("d_model"), n_layers: 1, layer: 0, rope: true, norm_eps, grid: None };
    described.validate(&dims).unwrap_or_else(|error| panic!("{name}: {error}"));
    let layer = weights::load(described.init(&dims, &device), renamed(file, "w.", NAMES));
    let layer = layer.unwrap_or_else(|error| panic!("{name}: {error}"));
    let (mask, mut whole) = (Mask::causal(), DeltaState::default());
    let x: Tensor<3> = tensor(file, "x", &device).require_grad();
    let out = layer.forward(x.clone(), Call { cache: Some(&mut whole), ..Call::new(&mask) }).hidden;
    compare(name, "out", &file["out"].values, &values(out.clone()), OUTPUT, false);
    let state = whole.state().unwrap().clone();
    compare(name, "inter.state", &file["inter.state"].values, &values(state), OUTPUT, false);
    let grads = (out.clone() * tensor(file, "cotangent", &device)).sum().backward();
    compare(name, "grad.x", &file["grad.x"].values, &values(x.grad(&grads).unwrap()), GRADIENT, true);
    compare_gradients(name, &layer, &grads, &renamed(file, "grad.", NAMES), GRADIENT);

    // Token by token from the state.
    let (x, mut cache) = (x.detach(), DeltaState::default());
    let seq = x.dims()[1];
    let step =
        |token| layer.forward(x.clone().narrow(1, token, 1), Call { cache: Some(&mut cache), ..Call::new(&mask) });
    let steps = Tensor::cat((0..seq).map(step).map(|attended| attended.hidden).collect(), 1);
    compare(name, "decoded", &file["out"].values, &values(steps), OUTPUT, false);
    assert_eq!(cache.len(), seq, "{name}");
    assert_eq!(cache.elements() as u64, described.cost(&dims).state_elements, "{name}");
}
