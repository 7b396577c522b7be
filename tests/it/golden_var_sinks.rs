//! VAR and secondary sinks by their authors' code; see `tests/golden/var_sinks/README.md`.

use polyhead_evaluation::sinks::{Kind, SinkRule, sinks};
use polyhead_models::intervention::visual_sinks::{VarConfig, phi};

use crate::golden::{Golden, compare, files, size};

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
        tau: number("tau"),
        rho: number("rho"),
        least_mass: number("summ"),
        p: number("p"),
        eps_phi: number("eps_phi"),
        eps_share: number("eps_share_per_token"),
    };
    let (seq, heads) = (size(config, "seq"), size(config, "n_heads"));
    let span = config["span"][0].as_u64().unwrap() as usize..config["span"][1].as_u64().unwrap() as usize;
    let channels: Vec<usize> = file["dim_sink"].values.iter().map(|&channel| channel as usize).collect();
    let phis: Vec<f64> =
        file["hidden"].values.chunks(size(config, "d_model")).map(|x| phi(x, &channels, how.eps_phi)).collect();
    same(golden, "phi", &phis);
    let is_sink: Vec<bool> = phis.iter().map(|&phi| phi > how.tau).collect();
    exact(golden, "is_sink", is_sink.iter().copied());

    let rows: Vec<_> = (file["A"].values.chunks(seq).enumerate())
        .map(|(at, row)| how.redistribute(row, &is_sink, span.clone(), at % seq >= span.end))
        .collect();
    same(golden, "share", &rows.iter().map(|row| row.share).collect::<Vec<_>>());
    same(golden, "mass", &rows.iter().map(|row| row.mass).collect::<Vec<_>>());
    exact(golden, "edited", rows.iter().map(|row| row.edited));
    same(golden, "out", &rows.iter().flat_map(|row| row.row.clone()).collect::<Vec<_>>());
    let decoded: Vec<_> = (file["decode.A"].values.chunks(seq + 1))
        .map(|row| how.redistribute(row, &is_sink, span.clone(), true))
        .collect();
    assert_eq!(decoded.len(), heads);
    exact(golden, "decode.edited", decoded.iter().map(|row| row.edited));
    same(golden, "decode.out", &decoded.iter().flat_map(|row| row.row.clone()).collect::<Vec<_>>());
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
