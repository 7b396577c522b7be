//! VAR and secondary sinks by their authors' code; see `tests/golden/var_sinks/README.md`.

use burn::tensor::{Bool, Device, Tensor, TensorData};
use polyhead_attention::Place;
use polyhead_evaluation::sinks::{Kind, SinkRule, sinks};
use polyhead_models::intervention::visual_sinks::{Marks, VarConfig, phi};

use crate::golden::{Golden, compare, files, size, values};

/// Relative to the largest number.
const NUMBERS: f32 = 1e-5;

#[test]
fn golden_var_sinks() {
    for golden in &files("var_sinks") {
        match golden.config["kind"].as_str().unwrap() {
            "var" => check_var(golden),
            "secondary" => check_secondary(golden),
            other => panic!("{}: kind {other}", golden.name),
        }
    }
}

fn same(golden: &Golden, key: &str, got: &[f64]) {
    let got: Vec<f32> = got.iter().map(|&value| value as f32).collect();
    compare(&golden.name, key, &golden.tensors[key].values, &got, NUMBERS, true);
}

fn exact(golden: &Golden, key: &str, got: impl IntoIterator<Item = bool>) {
    let got: Vec<f32> = got.into_iter().map(|flag| f32::from(u8::from(flag))).collect();
    assert_eq!(got, golden.tensors[key].values, "{}: {key}", golden.name);
}

fn check_var(golden: &Golden) {
    let Golden { config, tensors: file, .. } = golden;
    let number = |key: &str| config[key].as_f64().unwrap();
    let how = VarConfig {
        sinks: Vec::new(),
        rho: number("rho"),
        least_mass: number("summ"),
        p: number("p"),
        eps: number("eps_share_per_token"),
    };
    let (seq, heads) = (size(config, "seq"), size(config, "n_heads"));
    let span = config["span"][0].as_u64().unwrap() as usize..config["span"][1].as_u64().unwrap() as usize;
    let channels: Vec<usize> = file["dim_sink"].values.iter().map(|&channel| channel as usize).collect();
    let phis: Vec<f64> =
        (file["hidden"].values.chunks(size(config, "d_model"))).map(|x| phi(x, &channels, number("eps_phi"))).collect();
    same(golden, "phi", &phis);
    let is_sink: Vec<bool> = phis.iter().map(|&phi| phi > number("tau")).collect();
    exact(golden, "is_sink", is_sink.iter().copied());

    let inside: Vec<bool> = (0..seq).map(|at| span.contains(&at)).collect();
    let redistributed = |key: &str, queries: usize, first: usize, keys: usize| {
        let weights = TensorData::new(file[key].values.clone(), [1, heads, queries, keys]);
        let weights = Tensor::<4>::from_data(weights, &Device::flex());
        let place = Place { first, first_key: Some(0) };
        let marks = Marks { sinks: is_sink.clone(), span: inside.clone(), documents: Vec::new() };
        how.redistribute(weights, place, &[marks])
    };
    let near = |key: &str, got: Vec<f32>| compare(&golden.name, key, &file[key].values, &got, NUMBERS, true);
    let flags = |edited: Tensor<4, Bool>| edited.into_data().iter::<bool>().collect::<Vec<_>>();
    let found = redistributed("A", seq, 0, seq);
    near("share", values(found.share));
    near("mass", values(found.mass));
    exact(golden, "edited", flags(found.edited));
    near("out", values(found.weights));
    let decoded = redistributed("decode.A", 1, seq, seq + 1);
    exact(golden, "decode.edited", flags(decoded.edited));
    near("decode.out", values(decoded.weights));
}

fn check_secondary(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let (layers, seq, width) = (size(config, "n_layers"), size(config, "seq"), size(config, "d_model"));
    let token = |at: usize| file["hidden"].values[at * width..(at + 1) * width].to_vec();
    let hidden: Vec<Vec<Vec<f32>>> =
        (0..layers).map(|layer| (0..seq).map(|at| token(layer * seq + at)).collect()).collect();
    let candidates: Vec<usize> = serde_json::from_value(config["first_candidates"].clone()).unwrap();
    let rule = SinkRule::published(layers);
    config.is("cos_threshold", rule.cosine);
    config.is("primary_min_lifetime", rule.primary);
    config.is("noise_max_lifetime", rule.noise);
    let names = config.table("labels");
    for (label, kind) in [("0", "none"), ("1", "noise"), ("2", "secondary"), ("3", "primary")] {
        names.is(label, kind);
    }
    let found = sinks(&hidden, &candidates, rule);
    assert_eq!(found.first, size(config, "bos"), "{name}: bos");
    assert_eq!(found.on, size(config, "l_on")..size(config, "l_off"), "{name}");
    same(golden, "cosine", &found.cosine.concat());
    exact(golden, "member", found.member.concat());
    let whole = |key: &str| file[key].values.iter().map(|&value| value as i64).collect::<Vec<_>>();
    assert_eq!(found.lifetime.iter().map(|&lifetime| lifetime as i64).collect::<Vec<_>>(), whole("lifetime"), "{name}");
    let birth: Vec<i64> = found.birth.iter().map(|birth| birth.map_or(-1, |layer| layer as i64)).collect();
    assert_eq!(birth, whole("birth"), "{name}");
    let label = |kind: &Kind| match kind {
        Kind::None => 0,
        Kind::Noise => 1,
        Kind::Secondary => 2,
        Kind::Primary => 3,
    };
    assert_eq!(found.kind.iter().map(label).collect::<Vec<i64>>(), whole("label"), "{name}");
}
