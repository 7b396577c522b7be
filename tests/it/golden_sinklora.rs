//! S2-Attn by the authors' code; see `tests/golden/sinklora/README.md`.

use burn::tensor::{Device, Tensor};
use polyhead_attention::sparse::shifted::{Shift, ShiftedConfig};
use polyhead_attention::sparse::{Sparse, SparseConfig};
use polyhead_attention::{
    Call, Dims, Mask, Mechanism, MechanismConfig, Rope, RopeLayout, Sites, Softmax, SoftmaxConfig,
};
use polyhead_models::weights;

use crate::golden::{
    GRADIENT, Golden, Layout, Names, OUTPUT, compare, compare_gradients, dot, files, renamed, size, tensor, values,
};

/// The projections of the files of shifted attention.
const NAMES: Names<'static> = &[
    ("q", "q_proj.weight", Layout::Linear),
    ("k", "k_proj.weight", Layout::Linear),
    ("v", "v_proj.weight", Layout::Linear),
    ("o", "o_proj.weight", Layout::Linear),
];

#[test]
fn golden_sinklora() {
    files("sinklora").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let (tokens, heads, group) = (size(config, "tokens"), size(config, "num_heads"), size(config, "group_size"));
    let shift = Shift { group, shifted_heads: heads / 2, sinks: 0 };
    let shifted = Mask::causal().with_blocks(shift.mask(tokens, heads));
    let leaking = Mask::causal().ordered_by(shift.leaking_mask(tokens, heads));
    for (key, mask, head) in [
        ("mask.unshifted", &shifted, 0),
        ("mask.unshifted", &leaking, 0),
        ("mask.shifted_no_leak", &shifted, heads - 1),
        ("mask.shifted_official", &leaking, heads - 1),
    ] {
        let seen = seen_by_heads(mask, tokens);
        assert_eq!(seen[head * tokens * tokens..(head + 1) * tokens * tokens], file[key].values, "{name}: {key}");
    }
    let settings = ShiftedConfig { chunk_size: Some(group), leak: true, ..ShiftedConfig::default() };
    let out = check_layer(golden, settings);
    compare(name, "loss", &file["loss"].values, &[dot(&out, &file["cotangent"].values)], GRADIENT, true);
}

/// `[heads, seq, seq]`, 1 where a key is seen.
pub fn seen_by_heads(mask: &Mask, seq: usize) -> Vec<f32> {
    let hidden = mask.hidden(1, 0, seq, seq, &Device::flex()).unwrap();
    hidden.into_data().iter::<bool>().map(|hidden| f32::from(u8::from(!hidden))).collect()
}

/// A layer of softmax attention while it is trained: output, gradients and their sizes are the file's. Gives the output.
pub fn check_layer(golden: &Golden, settings: ShiftedConfig) -> Vec<f32> {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    let x = tensor::<3>(file, "x", &device).require_grad();
    let [batch, seq, d_model] = x.dims();
    assert_eq!([batch, seq], [size(config, "batch"), size(config, "tokens")], "{name}: sizes of x");
    let head_dim = size(config, "head_dim");
    let described = SoftmaxConfig {
        n_heads: size(config, "num_heads"),
        n_kv_heads: Some(size(config, "num_kv_heads")),
        head_dim: Some(head_dim),
        ..SoftmaxConfig::default()
    };
    let dims = Dims { d_model, n_layers: 1, layer: 0, rope: true, norm_eps: 1e-6, grid: None };
    let layer: Softmax = weights::load(described.init(&dims, &device), renamed(file, "w.", NAMES)).unwrap();
    let theta = config["rope_theta"].as_f64().unwrap();
    let rope = Rope::new(0..seq, head_dim, theta, RopeLayout::RotateHalf, &device);
    let sparse = Sparse::Config(SparseConfig::Shifted(settings), None);
    let run = |x: Tensor<3>, layer: &Softmax| {
        let sites = Sites { sparse: Some(&sparse), ..Sites::default() };
        layer.forward(x, Call { rope: Some(&rope), sites, ..Call::new(&Mask::causal()) }).hidden
    };
    let out = run(x.clone(), &layer);
    compare(name, "out", &file["out"].values, &values(out.clone()), OUTPUT, false);
    let grads = (out.clone() * tensor(file, "cotangent", &device)).sum().backward();
    compare(name, "grad.x", &file["grad.x"].values, &values(x.grad(&grads).unwrap()), GRADIENT, true);
    compare_gradients(name, &layer, &grads, &renamed(file, "grad.w.", NAMES), GRADIENT);
    values(out)
}
