//! SF-Attn by an own reference, and H2O by the authors' code; see `tests/golden/sinklora_sf/README.md`.

use burn::tensor::{Device, Tensor};
use polyhead_attention::sparse::BlockMask;
use polyhead_attention::sparse::h2o::{H2oConfig, global_columns, local_mask, with_recent};
use polyhead_attention::sparse::shifted::ShiftedConfig;
use polyhead_attention::{KvCache, Mask};
use polyhead_kernels::{AttentionOptions, attention, attention_weights};

use crate::golden::{Golden, OUTPUT, compare, files, size, tensor, values};
use crate::golden_sinklora::{check_layer, seen_by_heads};

#[test]
fn golden_sinklora_sf() {
    for golden in files("sinklora_sf") {
        match golden.config["kind"].as_str().unwrap() {
            "sf_attn" => check_shifted(&golden),
            "h2o_stream" => check_stream(&golden),
            "h2o_mask" => check_masks(&golden),
            other => panic!("{}: {other}", golden.name),
        }
    }
}

fn check_shifted(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.is("rope_layout", "neox");
    let (tokens, heads, group) = (size(config, "tokens"), size(config, "num_heads"), size(config, "group_size"));
    let settings = ShiftedConfig {
        chunk_size: Some(group),
        shift_fraction: config["shift_fraction"].as_f64().unwrap(),
        sinks: size(config, "sinks"),
        ..ShiftedConfig::default()
    };
    let shift = settings.shift(tokens, heads);
    assert_eq!(shift.shifted_heads, size(config, "shifted_heads"), "{name}: shifted_heads");
    assert_eq!(group / 2, size(config, "shift"), "{name}: shift");
    assert_eq!(file["x"].shape[2], size(config, "d_model"), "{name}: d_model");
    let seen = seen_by_heads(&Mask::causal().with_blocks(shift.mask(tokens, heads)), tokens);
    assert_eq!(seen, file["mask"].values, "{name}: mask");
    check_layer(golden, settings);
}

fn check_stream(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.is("batch", 1);
    let (heads, prefill, decode) = (size(config, "num_heads"), size(config, "prefill"), size(config, "decode"));
    let settings = H2oConfig { heavy: size(config, "heavy"), recent: size(config, "recent") };
    let (budget, tokens) = (settings.heavy + settings.recent, prefill + decode);
    let device = Device::flex();
    let [q, k, v] = ["q", "k", "v"].map(|key| tensor::<4>(file, key, &device));
    assert_eq!(q.dims(), [1, heads, tokens, size(config, "head_dim")], "{name}: sizes of q");
    let (mut cache, mut out, mut rows) = (KvCache::evicting(settings), Vec::new(), Vec::new());
    let (mut positions, mut scores, mut counts) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..=decode {
        let (at, new) = if step == 0 { (0, prefill) } else { (prefill + step - 1, 1) };
        let part = |x: &Tensor<4>| x.clone().narrow(2, at, new);
        let before: Vec<Vec<usize>> = match step {
            0 => vec![Vec::new(); heads],
            _ => cache.heavy_hitters().iter().map(|head| head.positions.clone()).collect(),
        };
        let (keys, all) = cache.append(part(&k), part(&v));
        let (mask, scale) = (Mask::causal(), config["scale"].as_f64());
        let query_offset = keys.dims()[2] - new;
        let options = AttentionOptions { mask: Some(&mask), scale, query_offset, ..Default::default() };
        out.push(attention(part(&q), keys.clone(), all, &options).hidden);
        let weights = values(attention_weights(part(&q), keys.clone(), &options));
        match step {
            0 => compare(name, "attn.prefill", &file["attn.prefill"].values, &weights, OUTPUT, false),
            _ => rows.extend(before.iter().zip(weights.chunks(keys.dims()[2])).flat_map(|(before, weights)| {
                let mut row = vec![0.0; tokens];
                before.iter().copied().chain([at]).zip(weights).for_each(|(key, weight)| row[key] = *weight);
                row
            })),
        }
        cache.evict(&part(&q), &keys, &options);
        for head in cache.heavy_hitters() {
            let empty = budget - head.positions.len();
            positions.extend(head.positions.iter().map(|&key| key as f32).chain(vec![-1.0; empty]));
            scores.extend(head.scores.iter().copied().chain(vec![0.0; empty]));
        }
        counts.push(cache.kept().unwrap()[0].dims()[2] as f32);
    }
    compare(name, "attn.decode", &file["attn.decode"].values, &rows, OUTPUT, false);
    assert_eq!(positions, file["keep.positions"].values, "{name}: keep.positions");
    assert_eq!(counts, file["keep.count"].values, "{name}: keep.count");
    compare(name, "keep.scores", &file["keep.scores"].values, &scores, OUTPUT, false);
    compare(name, "out", &file["out"].values, &values(Tensor::cat(out, 2)), OUTPUT, false);
}

fn check_masks(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let (batch, heads, seq) = (size(config, "batch"), size(config, "num_heads"), size(config, "tokens"));
    let (heavy, recent) = (size(config, "heavy"), size(config, "recent"));
    let device = Device::flex();
    let [q, k, v] = ["q", "k", "v"].map(|key| tensor::<4>(file, key, &device));
    assert_eq!(q.dims(), [batch, heads, seq, size(config, "head_dim")], "{name}: sizes of q");
    let scale = config["scale"].as_f64().unwrap();
    let scores = values(q.clone().matmul(k.clone().swap_dims(2, 3)) * scale);
    let later = |at: usize| at % seq > at / seq % seq;
    let scores: Vec<f32> = scores.iter().enumerate().map(|(at, &s)| if later(at) { -1e9 } else { s }).collect();
    compare(name, "scores", &file["scores"].values, &scores, OUTPUT, false);
    let mask = Mask::causal();
    let options = AttentionOptions { mask: Some(&mask), scale: Some(scale), ..Default::default() };
    let weights = values(attention_weights(q.clone(), k.clone(), &options));
    let [mut hitters, mut columns, mut local, mut global] = [const { Vec::new() }; 4];
    for weights in weights.chunks(seq * seq) {
        let (own, best) = (local_mask(weights, heavy), global_columns(weights, heavy));
        local.extend(with_recent(|query, key| own[query * seq + key], seq, recent));
        global.extend(with_recent(|_, key| best[key], seq, recent));
        hitters.extend(own);
        columns.extend(best);
    }
    for (key, seen) in [
        ("mask.local_heavy", &hitters),
        ("mask.global_columns", &columns),
        ("mask.local", &local),
        ("mask.global", &global),
    ] {
        let seen: Vec<f32> = seen.iter().map(|&seen| f32::from(u8::from(seen))).collect();
        assert_eq!(seen, file[key].values, "{name}: {key}");
    }
    for (key, seen) in [("out.local", &local), ("out.global", &global)] {
        let mask = Mask::none().with_blocks(BlockMask::of_blocks(seen, [batch, heads], [seq, seq], [1, 1]));
        let options = AttentionOptions { mask: Some(&mask), ..options.clone() };
        let out = attention(q.clone(), k.clone(), v.clone(), &options).hidden;
        compare(name, key, &file[key].values, &values(out), OUTPUT, false);
    }
}
