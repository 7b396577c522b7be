//! Gaussian Adaptive Attention: the package, its older version, and the experiments' code.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use polyhead_attention::{GaussianAdaptive, GaussianAdaptiveConfig};
use polyhead_models::weights::{self, Named};
use polyhead_models::{FeatureSizes, GaussianAdaptiveTransformerConfig};
use serde_json::{Value, json};

use crate::golden::{Golden, Layout, compare, compare_gradients, files, renamed, tensor, values};

/// Relative to the largest number.
const OUTPUT: f32 = 2e-5;
/// Relative to the largest number.
const GRADIENT: f32 = 1e-4;

#[test]
fn golden_gaam() {
    for golden in files("gaam") {
        match golden.config["kind"].as_str().unwrap() {
            "paper_dat_decoder" => check_transformer(&golden),
            _ => check_gates(&golden),
        }
    }
}

/// The gates of a file as a recipe would describe them.
fn describe(config: &Value) -> GaussianAdaptiveConfig {
    let heads = config.get("num_heads").unwrap_or(&json!(1)).clone();
    let kind = config["kind"].as_str().unwrap();
    let gates = match kind {
        "paper_daam" => json!([{"paper": {"n_heads": heads, "c_init": config["c_init"]}}]),
        "sum_mixture_multi_head" => {
            let (axis, gaussians) = (&config["norm_axis"], &config["num_gaussians"]);
            json!([{"mixture": {"n_heads": heads, "n_gaussians": gaussians, "axis": axis}}])
        }
        "product_block_residual" => (0..config["num_layers"].as_u64().unwrap() as usize)
            .map(|layer| {
                let [axis, heads, gaussians] =
                    ["norm_axes", "num_heads", "num_gaussians"].map(|key| &config[key][layer]);
                json!({"product": {"n_heads": heads, "n_gaussians": gaussians, "axis": axis}})
            })
            .collect(),
        "product_single_head" | "product_multi_head" => json!([{"product": {
            "n_heads": heads, "n_gaussians": config["num_gaussians"], "axis": config["norm_axis"],
            "compat_padding_value": config["padding_value"],
        }}]),
        other => panic!("kind {other}"),
    };
    let residual = kind == "product_block_residual";
    serde_json::from_value(json!({"gates": gates, "residual": residual})).unwrap()
}

fn check_gates(golden: &Golden) {
    let Golden { name, config, tensors: file } = golden;
    let device = Device::flex().autodiff();
    let x: Tensor<3> = tensor(file, "x", &device).require_grad();
    let described = describe(config);
    let sizes = &x.dims()[1..];
    described.validate(sizes).unwrap_or_else(|error| panic!("{name}: {error}"));
    let fresh = described.init(sizes, &device);
    let (stored, slopes) = (of_gates(&fresh, file, "w."), of_gates(&fresh, file, "grad.w."));
    let gates = weights::load(fresh, stored).unwrap_or_else(|error| panic!("{name}: {error}"));

    let (out, seen) = gates.forward(x.clone(), None);
    compare(name, "out", &file["out"].values, &values(out.clone()), OUTPUT, true);
    let mut compared = 0;
    for (layer, seen) in seen.into_iter().enumerate() {
        let keys = ["aux.attn".to_owned(), format!("aux.attn.layer{layer}")];
        if let Some(want) = keys.iter().find_map(|key| file.get(key)) {
            compare(name, &want.name, &want.values, &values(seen), OUTPUT, true);
            compared += 1;
        }
    }
    let auxiliary = file.keys().filter(|key| key.starts_with("aux.")).count();
    assert_eq!(compared, auxiliary, "{name}: every gate of the file is compared");
    let grads = (out * tensor(file, "cotangent", &device)).sum().backward();
    compare(name, "grad.x", &file["grad.x"].values, &values(x.grad(&grads).unwrap()), GRADIENT, true);
    compare_gradients(name, &gates, &grads, &slopes, GRADIENT);
}

/// The parameters of gates, which the files keep head by head, and here are one tensor each.
fn of_gates(gates: &GaussianAdaptive, file: &BTreeMap<String, Named>, prefix: &str) -> BTreeMap<String, Named> {
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
    let gathered: BTreeMap<String, Named> = weights::named(gates).into_iter().map(gather).collect();
    // Nothing of the file is left out.
    let numbers = |parts: &mut dyn Iterator<Item = &Named>| parts.map(|part| part.values.len()).sum::<usize>();
    let other = ["conv", "fc"].map(|part| format!("{prefix}{part}"));
    let of_file = |key: &str| key.starts_with(prefix) && !other.iter().any(|other| key.starts_with(other));
    let theirs = numbers(&mut file.iter().filter(|(key, _)| of_file(key)).map(|(_, tensor)| tensor));
    assert_eq!(numbers(&mut gathered.values()), theirs, "as many numbers as in the file");
    gathered
}

fn check_transformer(golden: &Golden) {
    let Golden { name, config, tensors: file } = golden;
    let device = Device::flex().autodiff();
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
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
    compare(name, "daam_out", &file["aux.daam_out"].values, &values(model.mix(x.clone()).0), OUTPUT, true);
    let out = model.forward(x.clone()).logits;
    compare(name, "out", &file["out"].values, &values(out.clone()), OUTPUT, true);
    let grads = (out * tensor(file, "cotangent", &device)).sum().backward();
    compare(name, "grad.x", &file["grad.x"].values, &values(x.grad(&grads).unwrap()), GRADIENT, true);
    compare_gradients(name, &model, &grads, &all("grad.w."), GRADIENT);
}
