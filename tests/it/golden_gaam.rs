//! Gaussian Adaptive Attention: the package, its older version, and the experiments' code.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use polyhead_attention::{GaussianAdaptive, GaussianAdaptiveConfig, GaussianGateConfig};
use polyhead_kernels::comparison::{Tolerance, assert_close};
use polyhead_models::weights::{self, Named};
use polyhead_models::{FeatureSizes, GaussianAdaptiveTransformerConfig};
use serde_json::{Value, json};

use crate::golden::{
    Config, Golden, Layout, Tensors, compare, compare_gradients, files, gradients, renamed, size, tensor, values,
};

/// Relative to the largest number.
const OUTPUT: f32 = 2e-5;
/// Relative to the largest number.
const GRADIENT: f32 = 1e-4;
/// Of a head by itself: its largest number counts as at least this share of that of all heads.
const SMALL: f64 = 0.01;

#[test]
fn golden_gaam() {
    for golden in files("gaam") {
        match (golden.config["kind"].as_str(), golden.tensors["x"].shape.len()) {
            (Some("paper_dat_decoder"), _) => check_transformer(&golden),
            (_, 2) => check_gates::<2>(&golden),
            (_, 3) => check_gates::<3>(&golden),
            (_, 4) => check_gates::<4>(&golden),
            (_, 5) => check_gates::<5>(&golden),
            (_, rank) => panic!("{}: x has {rank} dimensions", golden.name),
        }
    }
}

/// The gates of a file as a recipe would describe them, and the axis of each.
fn describe(config: &Config) -> (GaussianAdaptiveConfig, Vec<Value>) {
    let (kind, padding) = (config["kind"].as_str().unwrap(), config.get("padding_value").cloned());
    let heads = config.get("num_heads").cloned().unwrap_or(json!(1));
    let eps = || config["eps"].clone();
    let list = |key: &str| config[key].as_array().unwrap().clone();
    let (gates, axes) = match kind {
        "paper_daam" => {
            config.is("eps_var", 1e-8);
            config.is("eps_sqrt", 1e-5);
            (vec![json!({"paper": {"n_heads": heads, "c_init": config["c_init"]}})], vec![json!(1)])
        }
        "product_single_head" | "product_multi_head" => {
            // Only a head by itself gets the eps that it is given: see the setting.
            let axis = config["norm_axis"].clone();
            let eps = if kind == "product_single_head" {
                eps()
            } else {
                _ = eps();
                json!(1e-8)
            };
            let gate = json!({"product": {"n_heads": heads, "n_gaussians": config["num_gaussians"], "axis": axis,
                "eps": eps, "compat_padding_value": padding}});
            (vec![gate], vec![axis])
        }
        "sum_mixture_multi_head" => {
            let axis = config["norm_axis"].clone();
            // What c began as is no part of the numbers.
            config.beside_the_point(&["c_init"]);
            let gate = json!({"mixture": {"n_heads": heads, "n_gaussians": config["num_gaussians"], "axis": axis,
                "eps": eps(), "compat_padding_value": padding}});
            (vec![gate], vec![axis])
        }
        "product_block_residual" => {
            config.beside_the_point(&["eps"]);
            let [axes, heads, gaussians] = ["norm_axes", "num_heads", "num_gaussians"].map(list);
            assert!([&axes, &heads, &gaussians].iter().all(|list| list.len() == size(config, "num_layers")));
            let gate = |layer: usize| {
                json!({"product": {"n_heads": heads[layer], "n_gaussians": gaussians[layer],
                "axis": axes[layer], "compat_padding_value": padding}})
            };
            ((0..axes.len()).map(gate).collect(), axes)
        }
        other => panic!("kind {other}"),
    };
    let residual = kind == "product_block_residual";
    (serde_json::from_value(json!({"gates": gates, "residual": residual})).unwrap(), axes)
}

fn check_gates<const D: usize>(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    let x: Tensor<D> = tensor(file, "x", &device).require_grad();
    let (described, axes) = describe(config);
    check_input(golden, &described, &axes);
    // The old package drops what its heads leave over of the axis: so do we, before its gate.
    let used = if config["kind"].as_str().is_some_and(|kind| kind.starts_with("sum_mixture")) {
        let (axis, heads) =
            (from_the_first(&axes[0], D), config.get("num_heads").map_or(1, |_| size(config, "num_heads")));
        x.clone().narrow(axis, 0, x.dims()[axis] / heads * heads)
    } else {
        x.clone()
    };
    let sizes = &used.dims()[1..];
    described.validate(sizes).unwrap_or_else(|error| panic!("{name}: {error}"));
    let fresh = described.init(sizes, &device);
    let (stored, slopes) = (of_gates(&fresh, file, "w."), of_gates(&fresh, file, "grad.w."));
    let gates = weights::load(fresh, stored).unwrap_or_else(|error| panic!("{name}: {error}"));

    let (out, seen) = gates.forward(used, None);
    assert_eq!(file["out"].shape, out.dims(), "{name}");
    compare(name, "out", &file["out"].values, &values(out.clone()), OUTPUT, true);
    let one = seen.len() == 1;
    for (layer, seen) in seen.into_iter().enumerate() {
        // The old package tells no weights, and its files may have none.
        let key = if one && !described.residual { "aux.attn".to_owned() } else { format!("aux.attn.layer{layer}") };
        if file.contains_key(&key) || !matches!(described.gates[layer], GaussianGateConfig::Mixture(_)) {
            compare(name, &key, &file[key.as_str()].values, &values(seen), OUTPUT, true);
        }
    }
    let grads = (out * tensor(file, "cotangent", &device)).sum().backward();
    compare(name, "grad.x", &file["grad.x"].values, &values(x.grad(&grads).unwrap()), GRADIENT, true);
    compare_gradients(name, &gates, &grads, &slopes, GRADIENT);
    // Head by head too: those of one may be small beside those of another.
    let found = gradients(&gates, &grads);
    for (key, want) in &slopes {
        let per_head = want.shape[1..].iter().product();
        let largest = want.values.iter().fold(0.0f64, |most, value| most.max(f64::from(value.abs())));
        let tolerance = Tolerance::relative(GRADIENT.into()).of_at_least(SMALL * largest);
        for (got, want) in found[key].chunks(per_head).zip(want.values.chunks(per_head)) {
            assert_close(&format!("{name}: {key} of a head"), got, want, tolerance);
        }
    }
}

fn from_the_first(axis: &Value, rank: usize) -> usize {
    let axis = axis.as_i64().unwrap();
    if axis < 0 { (axis + rank as i64) as usize } else { axis as usize }
}

/// The sizes of the input, how heads share the axis, and where padding is, are what the file says.
fn check_input(golden: &Golden, described: &GaussianAdaptiveConfig, axes: &[Value]) {
    let Golden { name, config, tensors: file, .. } = golden;
    let x = &file["x"];
    let listed = |value: &Value| -> Vec<usize> {
        value.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect()
    };
    assert_eq!(listed(&config["x_shape"]), x.shape, "{name}");
    if let Some(chunks) = config.get("head_chunks") {
        let (length, heads) = (x.shape[from_the_first(&axes[0], x.shape.len())], size(config, "num_heads"));
        let mut shares = vec![length / heads; heads];
        // The old package has no remainder.
        if !matches!(described.gates[0], GaussianGateConfig::Mixture(_)) {
            shares[heads - 1] += length % heads;
        }
        assert_eq!(listed(chunks), shares, "{name}");
    }
    if config["kind"] == "paper_daam" {
        assert_eq!(x.shape[1..], [size(config, "num_encoder_layers"), size(config, "feature_size")], "{name}");
    }
    let (Some(padding), Some(lengths)) = (config.get("padding_value"), config.get("lens")) else {
        assert!(config.get("lens").is_none(), "{name}: lengths without a padding value");
        return;
    };
    let (padding, lengths) = (padding.as_f64().unwrap() as f32, listed(lengths));
    // Along axis 1, or along the last one.
    let padded = |axis: usize| {
        let behind: usize = x.shape[axis + 1..].iter().product();
        let row: usize = x.shape[1..].iter().product();
        x.values
            .iter()
            .enumerate()
            .all(|(at, &value)| at / behind % x.shape[axis] < lengths[at / row] || value == padding)
    };
    assert!(
        lengths.len() == x.shape[0] && (padded(1) || padded(x.shape.len() - 1)),
        "{name}: padding is where lens says"
    );
}

/// The parameters of gates, which the files keep head by head, and here are one tensor each.
fn of_gates(gates: &GaussianAdaptive, file: &Tensors, prefix: &str) -> BTreeMap<String, Named> {
    let gather = |named: Named| {
        // gates.0.mean_offset
        let [_, layer, parameter] = named.name.splitn(3, '.').collect::<Vec<_>>()[..] else { panic!("{}", named.name) };
        let of_head = |head: usize| {
            let part = format!("layer{layer}.");
            let full =
                [format!("{part}head{head}."), format!("head{head}."), format!("daam.head{head}."), String::new()];
            let names = full
                .iter()
                .flat_map(|path| [String::new(), "s".into()].map(|s| format!("{prefix}{path}{parameter}{s}")));
            let found = names.into_iter().find_map(|key| file.get(&key));
            found.unwrap_or_else(|| panic!("no {parameter} of head {head}")).values.clone()
        };
        let values = (0..named.shape[0]).flat_map(of_head).collect();
        (named.name.clone(), Named { values, ..named })
    };
    weights::named(gates).into_iter().map(gather).collect()
}

fn check_transformer(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    let size = |key: &str| size(config, key);
    let sizes = FeatureSizes {
        n_layers: size("num_encoder_layers"),
        d_model: size("feature_size"),
        n_classes: size("num_classes"),
    };
    let described: GaussianAdaptiveTransformerConfig = serde_json::from_value(json!({
        "mixer": {"gaussian_adaptive": {"gates": [{"paper": {"n_heads": size("num_heads")}}]}},
        "d_conv": size("mid_channels"), "grid": config["reshape_hw"],
    }))
    .unwrap();
    described.validate(sizes).unwrap();
    let fresh = described.init(sizes, &device);
    let gates = {
        let stack = json!({"gates": [{"paper": {"n_heads": size("num_heads")}}]});
        let stack: GaussianAdaptiveConfig = serde_json::from_value(stack).unwrap();
        stack.init(&[sizes.n_layers, sizes.d_model], &device)
    };
    let all = |prefix: &str| {
        let names = ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"].map(|name| (name, name, Layout::Same));
        let head = [("fc.weight", "head.weight", Layout::Linear), ("fc.bias", "head.bias", Layout::Same)];
        let mut all = renamed(file, prefix, &[&names[..], &head].concat());
        for (key, named) in of_gates(&gates, file, prefix) {
            let name = format!("mixer.{key}");
            all.insert(name.clone(), Named { name, ..named });
        }
        all
    };
    let model = weights::load(fresh, all("w.")).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(model.num_params(), all("w.").values().map(|tensor| tensor.values.len()).sum::<usize>());
    let x: Tensor<3> = tensor(file, "x", &device).require_grad();
    assert_eq!(config["x_shape"], json!(x.dims()), "{name}");
    compare(name, "daam_out", &file["aux.daam_out"].values, &values(model.mix(x.clone()).0), OUTPUT, true);
    let out = model.forward(x.clone()).logits;
    compare(name, "out", &file["out"].values, &values(out.clone()), OUTPUT, true);
    let grads = (out * tensor(file, "cotangent", &device)).sum().backward();
    compare(name, "grad.x", &file["grad.x"].values, &values(x.grad(&grads).unwrap()), GRADIENT, true);
    compare_gradients(name, &model, &grads, &all("grad.w."), GRADIENT);
}
