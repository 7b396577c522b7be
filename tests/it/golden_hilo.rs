//! HiLo attention by the code of LITv2, for classification and for detection (which fills up windows with zeros).

use burn::tensor::{Device, Tensor};
use polyhead_attention::{Call, Dims, HiloConfig, Mask, Mechanism, MechanismConfig};
use polyhead_models::weights;

use crate::golden::{Golden, Layout, Names, compare, compare_gradients, files, renamed, size, tensor, values};

/// Relative to the largest number.
const OUTPUT: f32 = 2e-5;
/// Relative to the largest number.
const GRADIENT: f32 = 5e-5;

/// What the authors call the projections.
const NAMES: Names<'static> = &[
    ("h_qkv.weight", "hifi.qkv_proj.weight", Layout::Linear),
    ("h_qkv.bias", "hifi.qkv_proj.bias", Layout::Same),
    ("h_proj.weight", "hifi.o_proj.weight", Layout::Linear),
    ("h_proj.bias", "hifi.o_proj.bias", Layout::Same),
    ("l_q.weight", "lofi.q_proj.weight", Layout::Linear),
    ("l_q.bias", "lofi.q_proj.bias", Layout::Same),
    ("l_kv.weight", "lofi.kv_proj.weight", Layout::Linear),
    ("l_kv.bias", "lofi.kv_proj.bias", Layout::Same),
    ("l_proj.weight", "lofi.o_proj.weight", Layout::Linear),
    ("l_proj.bias", "lofi.o_proj.bias", Layout::Same),
];

#[test]
fn golden_hilo() {
    files("hilo").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    let size = |key: &str| size(config, key);
    let described = HiloConfig {
        n_heads: size("num_heads"),
        window: size("window_size"),
        alpha: config["alpha"].as_f64().unwrap(),
        qkv_bias: config["qkv_bias"].as_bool().unwrap(),
        compat_padding: config["padded"].as_bool().unwrap(),
    };
    let heads = [size("l_heads"), size("h_heads")];
    assert_eq!([described.lofi_heads(), described.n_heads - described.lofi_heads()], heads, "{name}");
    let d_model = size("dim");
    let grid = [size("H"), size("W")];
    let dims = Dims { d_model, n_layers: 1, layer: 0, rope: false, norm_eps: 1e-5, grid: Some(grid) };
    described.validate(&dims).unwrap();
    let layer = weights::load(described.init(&dims, &device), renamed(file, "w.", NAMES));
    let layer = layer.unwrap_or_else(|error| panic!("{name}: {error}"));
    let x: Tensor<3> = tensor(file, "x", &device).require_grad();
    let out = layer.forward(x.clone(), Call { grid: Some(grid), ..Call::new(&Mask::none()) }).hidden;
    compare(name, "out", &file["out"].values, &values(out.clone()), OUTPUT, true);
    let hifi = size("h_heads") * d_model / size("num_heads");
    for (part, start, width) in [("aux.hifi", 0, hifi), ("aux.lofi", hifi, d_model - hifi)] {
        if width > 0 {
            compare(name, part, &file[part].values, &values(out.clone().narrow(2, start, width)), OUTPUT, true);
        }
    }
    let grads = (out * tensor(file, "cotangent", &device)).sum().backward();
    compare(name, "grad.x", &file["grad.x"].values, &values(x.grad(&grads).unwrap()), GRADIENT, true);
    compare_gradients(name, &layer, &grads, &renamed(file, "grad.w.", NAMES), GRADIENT);
}
