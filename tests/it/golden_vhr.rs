//! Head divergence and reinforcement by an own reference; see `tests/golden/vhr/README.md`.

use burn::tensor::Device;
use polyhead_models::intervention::gift::Deviation;
use polyhead_models::intervention::vhr::{Divergence, VhrConfig, Without, divergence, reinforce, total_divergence};
use polyhead_models::sites::SitePlan;

use crate::golden::{Golden, compare, files, size, values};
use crate::golden_decoder::{decoder, ids, rows, run};

/// Relative to the largest number.
const NUMBERS: f32 = 1e-5;

#[test]
fn golden_vhr() {
    for golden in &files("vhr") {
        match golden.config["kind"].as_str().unwrap() {
            "given" => check_given(golden),
            "decoder" => check_decoder(golden),
            other => panic!("{}: kind {other}", golden.name),
        }
    }
}

fn flags(layers: &[Divergence], of: fn(&Divergence) -> &Vec<bool>) -> Vec<f32> {
    layers.iter().flat_map(of).map(|&flag| f32::from(u8::from(flag))).collect()
}

fn numbers(layers: &[Divergence], of: fn(&Divergence) -> &Vec<f64>) -> Vec<f32> {
    layers.iter().flat_map(of).map(|&value| value as f32).collect()
}

fn check_given(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.beside_the_point(&["median", "selection"]);
    let [layers, heads, width, seq] = ["n_layers", "n_heads", "head_dim", "seq"].map(|key| size(config, key));
    let of_layer = |key: &str, layer: usize| -> Vec<Vec<f32>> {
        let own = &file[key].values[layer * heads * width..(layer + 1) * heads * width];
        own.chunks(width).map(<[f32]>::to_vec).collect()
    };
    let same = |key: &str, got: &[f32]| compare(name, key, &file[key].values, got, NUMBERS, true);
    let alpha = config["alpha"].as_f64().unwrap() as f32;
    for (prefix, deviation) in [("population", Deviation::Population), ("sample", Deviation::Sample)] {
        let found: Vec<Divergence> =
            (0..layers).map(|l| divergence(&of_layer("z.with", l), &of_layer("z.without", l), deviation)).collect();
        same("vhd", &numbers(&found, |layer| &layer.vhd));
        same("vhd.relative", &numbers(&found, |layer| &layer.relative));
        same("text_activation", &numbers(&found, |layer| &layer.text_activation));
        same("t_vhd", &[total_divergence(&found, size(config, "top_k")) as f32]);
        same(&format!("{prefix}.vhd_clean"), &numbers(&found, |layer| &layer.cleaned));
        same(&format!("{prefix}.median"), &found.iter().map(|layer| layer.median as f32).collect::<Vec<_>>());
        for (key, got) in
            [("outlier", flags(&found, |layer| &layer.outlier)), ("selected", flags(&found, |layer| &layer.selected))]
        {
            let key = format!("{prefix}.{key}");
            assert_eq!(got, file[key.as_str()].values, "{name}: {key}");
        }
        // z is [layers, seq, heads, head_dim].
        let scaled = file["z.all"].values.iter().enumerate().map(|(at, &z)| {
            let (layer, head) = (at / (seq * heads * width), at / width % heads);
            if found[layer].selected[head] { z * alpha } else { z }
        });
        same(&format!("{prefix}.z_scaled"), &scaled.collect::<Vec<_>>());
    }
}

fn check_decoder(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.beside_the_point(&["seq", "first_query_after_span"]);
    let device = Device::flex();
    let model = decoder(&config.table("model"), file, "w.", &device);
    let (tokens, input) = (rows(file, "ids").remove(0), ids(file, "ids", &device));
    let same = |key: &str, got: &[f32]| compare(name, key, &file[key].values, got, NUMBERS, true);
    same("logits.base", &values(run(&model, &input, SitePlan::default()).0));
    let span = config["span"][0].as_u64().unwrap() as usize..config["span"][1].as_u64().unwrap() as usize;
    let deviation = match config["std"].as_str().unwrap() {
        "sample" => Deviation::Sample,
        "population" => Deviation::Population,
        other => panic!("{name}: std {other}"),
    };
    for (mode, without) in [("mask", Without::Masked), ("remove", Without::Removed)] {
        for (branch, both) in [("scale_main", false), ("scale_both", true)] {
            let how = VhrConfig {
                layers: serde_json::from_value(config["layers"].clone()).unwrap(),
                alpha: config["alpha"].as_f64().unwrap(),
                without,
                both,
                deviation,
            };
            let found = reinforce(&model, &tokens, span.clone(), &how);
            let key = |last: &str| format!("{mode}.{branch}.{last}");
            same(&key("vhd"), &numbers(&found.layers, |layer| &layer.vhd));
            for (last, got) in [
                ("outlier", flags(&found.layers, |layer| &layer.outlier)),
                ("selected", flags(&found.layers, |layer| &layer.selected)),
            ] {
                assert_eq!(got, file[key(last).as_str()].values, "{name}: {}", key(last));
            }
            let plan = SitePlan { edits: found.edits, taps: Vec::new() };
            same(&key("logits"), &values(run(&model, &input, plan).0));
        }
    }
}
