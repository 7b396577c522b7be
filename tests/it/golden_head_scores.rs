//! Head scores, logit lens, direct logit attribution and copying by TransformerLens; see `tests/golden/head_scores/README.md`.

use burn::tensor::Device;
use polyhead_attention::QuerySite;
use polyhead_evaluation::head_scores::{Pattern, Without, fit, stripe};
use polyhead_evaluation::lens::{Targets, direct_logits, logit_lens, read};
use polyhead_evaluation::weight_circuits::{Copying, Own, copying, share};
use polyhead_models::weights::Named;

use crate::golden::{Golden, compare, files, size, values};
use crate::golden_decoder::{decoder, ids, rows, run};

/// Relative to the largest number.
const NUMBERS: f32 = 1e-5;
/// Of scores by eigenvalues, and of those that the library rounds to three decimals; absolute.
const EIGENVALUES: f32 = 1e-4;
const ROUNDED: f32 = 6e-4;

#[test]
fn golden_head_scores() {
    for golden in &files("head_scores") {
        match golden.config["kind"].as_str().unwrap() {
            "maps" => check_maps(golden),
            "lens" => check_lens(golden),
            other => panic!("{}: kind {other}", golden.name),
        }
    }
}

/// The scores of maps, `[maps][queries * keys]`, against those of a file under a suffix.
fn check_scores(golden: &Golden, maps: &[Vec<f32>], tokens: &[u32], (suffix, without): (&str, Without)) {
    let Golden { name, tensors: file, .. } = golden;
    for pattern in Pattern::ALL {
        let wanted = pattern.of(tokens);
        let fits: Vec<_> = maps.iter().map(|map| fit(map, &wanted, without)).collect();
        let shares: Vec<f32> = fits.iter().map(|fit| fit.share as f32).collect();
        let close: Vec<f32> = fits.iter().map(|fit| fit.closeness as f32).collect();
        let pattern = pattern.name();
        for (key, got, tolerance, relative) in
            [("mul", &shares, NUMBERS, true), ("abs", &close, NUMBERS, true), ("abs_rounded", &close, ROUNDED, false)]
        {
            let key = format!("{key}.{pattern}{suffix}");
            compare(name, &key, &file[key.as_str()].values, got, tolerance, relative);
        }
    }
}

/// Stripes of maps, `[batch][heads][queries * keys]`, mean over the batch.
fn check_stripes(golden: &Golden, maps: &[Vec<Vec<f32>>]) {
    let Golden { name, config, tensors: file, .. } = golden;
    let period = size(config, "period");
    let mean = |pattern: Pattern, second_copy: bool| -> Vec<f32> {
        let of = |head: usize| maps.iter().map(|row| stripe(&row[head], pattern, period, second_copy)).sum::<f64>();
        (0..maps[0].len()).map(|head| (of(head) / maps.len() as f64) as f32).collect()
    };
    let mut wanted: Vec<(String, Vec<f32>)> =
        Pattern::ALL.iter().map(|&pattern| (format!("stripe.{}", pattern.name()), mean(pattern, false))).collect();
    wanted.push(("stripe.induction_second_copy".into(), mean(Pattern::Induction, true)));
    for (key, got) in wanted {
        compare(name, &key, &file[key.as_str()].values, &got, NUMBERS, true);
    }
}

/// The maps of a tensor `[.., queries, keys]`, in its order.
fn maps_of(named: &Named) -> Vec<Vec<f32>> {
    let seq = named.shape[named.shape.len() - 1];
    named.values.chunks(seq * seq).map(<[f32]>::to_vec).collect()
}

fn check_maps(golden: &Golden) {
    let Golden { config, tensors: file, .. } = golden;
    config.beside_the_point(&["planted", "n_layers", "n_heads", "seq"]);
    let tokens: Vec<u32> = file["ids"].values.iter().map(|&id| id as u32).collect();
    for pattern in Pattern::ALL {
        let key = format!("pattern.{}", pattern.name());
        let wanted: Vec<bool> = file[key.as_str()].values.iter().map(|&value| value == 1.0).collect();
        assert_eq!(pattern.of(&tokens), wanted, "{}: {key}", golden.name);
    }
    let maps = maps_of(&file["A"]);
    for (suffix, first_key, current) in
        [("", false, false), (".no_bos", true, false), (".no_current", false, true), (".no_bos.no_current", true, true)]
    {
        check_scores(golden, &maps, &tokens, (suffix, Without { first_key, current }));
    }
    check_stripes(golden, &[maps]);
}

fn check_lens(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.beside_the_point(&["batch", "seq", "points", "components", "scores"]);
    let device = Device::flex();
    let model = decoder(&config.table("model"), file, "w.", &device);
    let rows = rows(file, "ids");
    let same = |key: &str, got: &[f32]| compare(name, key, &file[key].values, got, NUMBERS, true);
    same("logits", &values(run(&model, &ids(file, "ids", &device), Default::default()).0));
    let taps = read(&model, &rows, &[QuerySite::Weights.into()]);
    same("A", &taps.iter().flat_map(|tap| values(tap.values.clone())).collect::<Vec<_>>());
    let of_row = |row: usize| -> Vec<Vec<f32>> {
        let seq = rows[row].len();
        let own = taps.iter().flat_map(|tap| values(tap.values.clone().narrow(0, row, 1)));
        own.collect::<Vec<_>>().chunks(seq * seq).map(<[f32]>::to_vec).collect()
    };
    check_scores(golden, &of_row(0), &rows[0], ("", Without::default()));
    check_stripes(golden, &(0..rows.len()).map(of_row).collect::<Vec<_>>());

    let points = logit_lens(&model, &rows);
    let names: Vec<&str> =
        golden.config["points"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert_eq!(points.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), names, "{name}");
    same("lens.logits", &points.into_iter().flat_map(|(_, logits)| values(logits)).collect::<Vec<_>>());

    let tokens = |key: &str| -> Vec<u32> { file[key].values.iter().map(|&id| id as u32).collect() };
    let (target, wrong) = (tokens("target"), tokens("wrong"));
    for (prefix, minus) in [("dla", None), ("dla.difference", Some(&wrong[..]))] {
        let parts = direct_logits(&model, Targets { rows: &rows, tokens: &target, minus });
        same(&format!("{prefix}.embed"), &parts.embedding);
        same(&format!("{prefix}.attn"), &parts.attention.concat());
        same(&format!("{prefix}.mlp"), &parts.mlp.concat());
        same(&format!("{prefix}.head"), &parts.heads.concat().concat());
        same("final_scale", &parts.scale);
        let logits = &file["logits"];
        let [_, seq, vocab] = logits.shape[..] else { panic!("logits") };
        for (row, total) in parts.total().into_iter().enumerate() {
            let at = |token: u32| logits.values[(row * seq + seq - 1) * vocab + token as usize];
            let want = at(target[row]) - minus.map_or(0.0, |minus| at(minus[row]));
            assert!((total - f64::from(want)).abs() < 1e-5, "{name}: {prefix} adds up to {total}, the logit is {want}");
        }
    }

    let top = size(config, "ov_top_k");
    let heads: Vec<_> = (0..model.layers.len()).flat_map(|layer| copying(&model, layer).unwrap()).collect();
    let each = |of: fn(&Copying) -> f64| heads.iter().map(|head| of(head) as f32).collect::<Vec<_>>();
    for (key, got) in [
        ("copy.ov", each(|head| head.ov)),
        ("copy.ov_folded", each(|head| head.ov_folded)),
        ("copy.full", each(|head| head.full)),
        ("copy.full_folded", each(|head| head.full_folded)),
    ] {
        compare(name, key, &file[key].values, &got, EIGENVALUES, false);
    }
    let diagonal = heads.iter().flat_map(|head| head.own.iter().map(|own| own.value));
    same("ov.diagonal", &diagonal.collect::<Vec<_>>());
    let shares =
        |holds: &dyn Fn(&Own) -> bool| heads.iter().map(|head| share(&head.own, holds) as f32).collect::<Vec<_>>();
    assert_eq!(shares(&|own| own.from_above <= top), file["ov.top_share"].values, "{name}: ov.top_share");
    assert_eq!(shares(&|own| own.from_below <= top), file["ov.bottom_share"].values, "{name}: ov.bottom_share");
}
