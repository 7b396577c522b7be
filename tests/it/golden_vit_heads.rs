//! Head importance of vision transformers; see `tests/golden/vit_heads/README.md`.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use polyhead_attention::{Observe, QuerySite};
use polyhead_evaluation::head_importance::{ablate, gate_gradients, grid_distance, rank_correlation, reach};
use polyhead_models::sites::SitePlan;
use polyhead_models::weights::{Named, load};
use polyhead_models::{Body, ClassifierConfig, Encoder, InputShape, Inputs, Sizes};
use serde_json::json;

use crate::golden::{Golden, compare, files, size, transposed, values};

/// Absolute.
const NUMBERS: f32 = 5e-5;

#[test]
fn golden_vit_heads() {
    files("vit_heads").iter().for_each(check_file);
}

/// The encoder of a file, on a device.
fn encoder(golden: &Golden, device: &Device) -> Encoder {
    let Golden { config, tensors: file, .. } = golden;
    let heads = size(config, "num_heads");
    assert_eq!(heads * size(config, "head_dim"), size(config, "d_model"));
    let described: ClassifierConfig = serde_json::from_value(json!({ "vision_transformer": {
        "patch_size": size(config, "patch"), "d_model": size(config, "d_model"), "n_layers": size(config, "layers"),
        "d_ff": size(config, "d_ff"), "norm_eps": config["layer_norm_eps"], "pooling": "class_token",
        "attention": { "softmax": { "n_heads": heads, "qkv_bias": true, "o_bias": true } },
    }}))
    .unwrap();
    let (image, channels) = (size(config, "image"), size(config, "channels"));
    let input = InputShape::Images { channels, height: image, width: image };
    let model = described.init(Sizes { input, n_classes: size(config, "classes") }, device);
    let mut weights: BTreeMap<String, Named> = BTreeMap::new();
    let mut put = |ours: String, named: Named| _ = weights.insert(ours.clone(), Named { name: ours, ..named });
    let flat = |key: &str, shape: Vec<usize>| Named { shape, ..file[key].clone() };
    let width = size(config, "d_model");
    let patch = file["w.patch.weight"].shape[1..].iter().product::<usize>();
    put("body.input.weight".into(), transposed(&flat("w.patch.weight", vec![width, patch])));
    put("body.input.bias".into(), file["w.patch.bias"].clone());
    put("body.class_token".into(), flat("w.cls", vec![1, width]));
    put("body.positions".into(), flat("w.pos", vec![file["w.pos"].shape[1], width]));
    for layer in 0..size(config, "layers") {
        for (theirs, ours, linear) in [
            ("ln1", "attention_norm", false),
            ("q", "attention.q_proj", true),
            ("k", "attention.k_proj", true),
            ("v", "attention.v_proj", true),
            ("o", "attention.o_proj", true),
            ("ln2", "mlp_norm", false),
            ("fc1", "mlp.up_proj", true),
            ("fc2", "mlp.down_proj", true),
        ] {
            let weight = &file[format!("w.{layer}.{theirs}.weight").as_str()];
            let weight = if linear { transposed(weight) } else { weight.clone() };
            put(format!("body.layers.{layer}.{ours}.weight"), weight);
            put(format!("body.layers.{layer}.{ours}.bias"), file[format!("w.{layer}.{theirs}.bias").as_str()].clone());
        }
    }
    put("body.norm.weight".into(), file["w.ln.weight"].clone());
    put("body.norm.bias".into(), file["w.ln.bias"].clone());
    put("body.head.weight".into(), transposed(&file["w.head.weight"]));
    put("body.head.bias".into(), file["w.head.bias"].clone());
    match load(model, weights).unwrap().body {
        Body::Encoder(encoder) => encoder,
        _ => panic!("a vision transformer is an encoder"),
    }
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.is("model", "vit");
    config.is("log_base", "e");
    config.beside_the_point(&["images"]);
    let same = |key: &str, got: &[f32]| compare(name, key, &file[key].values, got, NUMBERS, false);
    let narrow = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect::<Vec<_>>();
    let plain = encoder(golden, &Device::flex());
    let (image, channels) = (size(config, "image"), size(config, "channels"));
    let inputs = Inputs::Images { pixels: file["x"].values.clone(), channels, height: image, width: image };
    let labels: Vec<u32> = file["labels"].values.iter().map(|&label| label as u32).collect();
    let layers = plain.layers.len();

    let read = plain.read(&inputs, Observe::Nothing, &SitePlan::tap_all(layers, QuerySite::Weights));
    same("logits", &values(read.scored.logits.clone()));
    same("probs", &values(burn::tensor::activation::softmax(read.scored.logits, 1)));
    same("embedding.cls", &values(read.pooled));
    let maps: Vec<Tensor<5>> = read.taps.into_iter().map(|tap| tap.values.unsqueeze_dim(1)).collect();
    same("attention", &values(Tensor::cat(maps, 1)));

    let ablated = ablate(&plain, &inputs, &labels).concat();
    let each =
        |of: fn(&polyhead_evaluation::head_importance::Ablated) -> f64| ablated.iter().map(of).collect::<Vec<_>>();
    same("loo.probs", &narrow(ablated.iter().flat_map(|head| head.probabilities.concat()).collect()));
    same("loo.prob_drop", &narrow(each(|head| head.drop)));
    same("loo.js", &narrow(each(|head| head.divergence)));
    same("loo.cosine_change", &narrow(each(|head| head.embedding_change)));
    compare(
        name,
        "loo.accuracy_drop",
        &file["loo.accuracy_drop"].values,
        &narrow(each(|head| head.accuracy_drop)),
        1e-6,
        false,
    );

    let gradients = gate_gradients(&encoder(golden, &Device::flex().autodiff()), &inputs, &labels);
    same("gate.grad_per_image", &narrow(gradients.concat().concat()));
    let heads = ablated.len();
    let mean = |of: fn(f64) -> f64| -> Vec<f64> {
        let flat: Vec<Vec<f64>> = gradients.iter().map(|image| image.concat()).collect();
        (0..heads).map(|head| flat.iter().map(|image| of(image[head])).sum::<f64>() / flat.len() as f64).collect()
    };
    same("gate.grad_mean_loss", &narrow(mean(|gradient| gradient)));
    let sizes = mean(f64::abs);
    same("gate.abs_mean", &narrow(sizes.clone()));
    let told = config["spearman_js_vs_abs_gate"].as_f64().unwrap();
    let found = rank_correlation(&each(|head| head.divergence), &sizes);
    assert!((found - told).abs() < 1e-6, "{name}: rank correlation {found}, told {told}");

    let grid = size(config, "grid");
    let patches = grid * grid;
    let distances: Vec<f32> =
        (0..patches * patches).map(|at| grid_distance(at / patches, at % patches, grid) as f32).collect();
    assert_eq!(distances, file["khop.chebyshev"].values, "{name}: khop.chebyshev");
    let reach = reach(&plain, &inputs, [grid, grid], 1).concat();
    same("khop.profile", &narrow(reach.iter().flat_map(|head| head.profile.clone()).collect()));
    same("khop.profile_renormalised", &narrow(reach.iter().flat_map(|head| head.renormalised.clone()).collect()));
    same("khop.mean_distance", &narrow(reach.iter().map(|head| head.mean_distance).collect()));
}
