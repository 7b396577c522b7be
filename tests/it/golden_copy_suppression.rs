//! Copy suppression by its authors' code; see `tests/golden/copy_suppression/README.md`.

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use polyhead_attention::{QueryHead, QuerySite, Site, StreamSite};
use polyhead_evaluation::copy_suppression::{HeadRun, Keep, cspa, effective_embedding, mean_ablation, self_repair};
use polyhead_evaluation::edges::Writer;
use polyhead_evaluation::lens::{Targets, direct_logits, read_under};
use polyhead_evaluation::weight_circuits::{Divisor, Own, normed, own, share, unembedding};
use polyhead_models::weights::{Named, load};
use polyhead_models::{DecoderConfig, Norm};
use serde_json::json;

use crate::golden::{Golden, compare, files, size, tensor, transposed, values};
use crate::golden_decoder::{llama, rows};

/// Absolute. Ranks and masks are exact.
const NUMBERS: f32 = 5e-5;

#[test]
fn golden_copy_suppression() {
    for golden in &files("copy_suppression") {
        match golden.config["kind"].as_str().unwrap() {
            "ovqk" => check_circuits(golden),
            "cspa" => check_cspa(golden),
            "self_repair" => check_repair(golden),
            other => panic!("{}: kind {other}", golden.name),
        }
    }
}

fn check_circuits(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex();
    let [vocab, d_model, heads] = ["vocab", "d_model", "heads"].map(|key| size(config, key));
    let eps = config["rms_eps"].as_f64().unwrap();
    let described: DecoderConfig = serde_json::from_value(json!({
        "d_model": d_model, "n_layers": 1, "d_ff": size(config, "d_ff"), "norm_eps": eps, "tie_embeddings": false,
        "attention": { "softmax": { "n_heads": heads, "head_dim": size(config, "head_dim") } },
    }))
    .unwrap();
    let named = |ours: &str, tensor: Named| (ours.to_owned(), Named { name: ours.into(), ..tensor });
    let fresh = described.init(vocab, &device);
    let given = [
        named("embedding.weight", file["W_E"].clone()),
        named("head.weight", transposed(&file["W_U"])),
        named("layers.0.mlp_norm.weight", file["mlp0.norm.weight"].clone()),
        named("layers.0.mlp.gate_proj.weight", transposed(&file["mlp0.gate.weight"])),
        named("layers.0.mlp.up_proj.weight", transposed(&file["mlp0.up.weight"])),
        named("layers.0.mlp.down_proj.weight", transposed(&file["mlp0.down.weight"])),
    ];
    let mut weights: std::collections::BTreeMap<String, Named> =
        polyhead_models::weights::named(&fresh).into_iter().map(|one| (one.name.clone(), one)).collect();
    weights.extend(given);
    let model = load(fresh, weights).unwrap();
    let same = |key: &str, got: &[f32]| compare(name, key, &file[key].values, got, NUMBERS, false);

    let embedding = effective_embedding(&model);
    same("effective_embedding", &values(embedding.clone()));
    let tokens: Vec<u32> = (0..vocab as u32).collect();
    let of_head = |key: &str, head: usize| tensor::<3>(file, key, &device).narrow(0, head, 1).squeeze_dim::<2>(0);
    let ov: Vec<Vec<Own>> = (0..heads)
        .map(|head| {
            let writes = of_head("W_O", head).matmul(unembedding(&model).transpose());
            own(embedding.clone().matmul(of_head("W_V", head)), &writes, &tokens)
        })
        .collect();
    same("ov.diag", &ov.concat().iter().map(|own| own.value).collect::<Vec<_>>());
    let ranks =
        |of: &[Vec<Own>], rank: fn(&Own) -> usize| of.iter().flatten().map(|own| rank(own) as f32).collect::<Vec<_>>();
    assert_eq!(ranks(&ov, |own| own.from_below), file["ov.rank"].values, "{name}: ov.rank");
    let ks = &file["ov.ks"].values;
    assert_eq!(config["ks"], json!(ks.iter().map(|&k| k as u64).collect::<Vec<_>>()), "{name}: ov.ks");
    let below = |own: &[Own], most: usize| share(own, |own| own.from_below <= most) as f32;
    same("ov.rate", &ov.iter().flat_map(|own| ks.iter().map(|&k| below(own, k as usize))).collect::<Vec<_>>());
    let bottom = vocab.div_ceil(20);
    assert_eq!(bottom, size(config, "bottom5_count"), "{name}");
    same("ov.rate_bottom5pct", &ov.iter().map(|own| below(own, bottom)).collect::<Vec<_>>());

    let norm = |weight: Tensor<1>| Norm { weight: Param::from_tensor(weight), bias: None };
    let (plain, keyed) = (norm(Tensor::ones([d_model], &device)), norm(tensor(file, "key_norm.weight", &device)));
    for (kind, norm, divisor) in [
        ("raw", &plain, Divisor::One),
        ("std", &plain, Divisor::Deviation),
        ("rmsnorm", &keyed, Divisor::RootMeanSquare(eps)),
    ] {
        let keys = normed(embedding.clone(), norm, divisor);
        let qk: Vec<Vec<Own>> = (0..heads)
            .map(|head| {
                let queries = unembedding(&model).matmul(of_head("W_Q", head));
                own(queries, &keys.clone().matmul(of_head("W_K", head)).transpose(), &tokens)
            })
            .collect();
        let key = format!("qk.rank.{kind}");
        assert_eq!(ranks(&qk, |own| own.from_above), file[key.as_str()].values, "{name}: {key}");
        let first = qk.iter().map(|own| share(own, |own| own.from_above == 1) as f32);
        same(&format!("qk.rate_top1.{kind}"), &first.collect::<Vec<_>>());
    }
}

fn check_cspa(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.beside_the_point(&["vocab", "d_model", "head_dim", "batch", "tokens"]);
    config.is("keep_self_attention", true);
    config.is("mask_tolerance", 1e-6);
    config.is("explained_order", json!(["both", "ov_only", "qk_only"]));
    let device = Device::flex();
    let three = |key: &str| tensor::<3>(file, key, &device);
    let head = HeadRun {
        values: three("head.v"),
        pattern: three("head.pattern"),
        o: tensor(file, "head.W_O", &device),
        result: three("head.result"),
        resid_pre: three("resid_pre"),
        resid_final: three("resid_final"),
        scale: three("final_scale"),
        unembed: tensor(file, "W_U", &device),
        mean: tensor(file, "result_mean", &device),
    };
    let keep = match config["k_is_fraction"].as_bool().unwrap() {
        true => Keep::Share(config["k_unembeddings"].as_f64().unwrap()),
        false => Keep::Count(size(config, "k_unembeddings")),
    };
    let function_words: Vec<u32> = file["function_tokens"].values.iter().map(|&id| id as u32).collect();
    let found = cspa(&head, &rows(file, "tokens"), keep, &function_words);
    let same = |key: &str, got: &[f32]| compare(name, key, &file[key].values, got, NUMBERS, false);
    let narrow = |got: &[f64]| got.iter().map(|&value| value as f32).collect::<Vec<_>>();
    same("logit_lens", &values(found.lens.clone()));
    let kept: Vec<f32> = found.kept.iter().map(|&kept| f32::from(u8::from(kept))).collect();
    assert_eq!(kept, file["mask.qk"].values, "{name}: mask.qk");
    for (at, form) in ["cspa", "ov_only", "qk_only"].into_iter().enumerate() {
        same(&format!("head.result_{form}"), &values(found.results[at].clone()));
    }
    for (at, form) in ["clean", "ablated", "cspa", "ov_only", "qk_only"].into_iter().enumerate() {
        same(&format!("logits.{form}"), &values(found.logits[at].clone()));
        if at > 0 {
            same(&format!("kl.{form}"), &narrow(&found.kl[at - 1]));
        }
        if at < 3 {
            same(&format!("loss.{form}"), &narrow(&found.losses[at]));
        }
    }
    same("explained.kl", &narrow(&found.explained()));
    let [net, absolute] = found.explained_loss();
    same("explained.loss_net", &[net as f32]);
    same("explained.loss_abs", &[absolute as f32]);
}

fn check_repair(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.is("ablation", "mean over prompts per position");
    let device = Device::flex();
    let model = llama(golden, &device);
    let (texts, answers) = (rows(file, "tokens"), rows(file, "answers"));
    let [right, wrong] = [0, 1].map(|side| answers.iter().map(|pair| pair[side]).collect::<Vec<_>>());
    let targets = Targets { rows: &texts, tokens: &right, minus: Some(&wrong) };
    let heads: Vec<(usize, QueryHead)> = (config["ablated_heads"].as_array().unwrap().iter())
        .map(|head| (head[0].as_u64().unwrap() as usize, QueryHead(head[1].as_u64().unwrap() as usize)))
        .collect();
    let same = |key: &str, got: &[f32]| compare(name, key, &file[key].values, got, NUMBERS, false);
    same("final_scale", &direct_logits(&model, targets).scale);
    let directions: Vec<f32> = (answers.iter())
        .flat_map(|pair| {
            let rows = unembedding(&model);
            let of = |token: u32| rows.clone().narrow(0, token as usize, 1);
            values(of(pair[0]) - of(pair[1]))
        })
        .collect();
    same("unembed_diff", &directions);

    let found = self_repair(&model, targets, &heads);
    let called = |repair: &polyhead_evaluation::copy_suppression::Repair| match repair.part {
        Writer::Head(layer, head) => format!("a.{layer}.{head}"),
        Writer::Mlp(layer) => format!("m.{layer}"),
        Writer::Input => "input".into(),
    };
    assert_eq!(config["components"], json!(found.iter().map(called).collect::<Vec<_>>()), "{name}");
    same("dla.before", &found.iter().map(|repair| repair.before as f32).collect::<Vec<_>>());
    same("dla.after", &found.iter().map(|repair| repair.after as f32).collect::<Vec<_>>());
    same("share", &found.iter().map(|repair| repair.share as f32).collect::<Vec<_>>());
    let ablated = mean_ablation(&model, &texts, &heads);
    for (key, edits) in [("out.before", Vec::new()), ("out.after", ablated)] {
        let sites: [Site; 2] = [QuerySite::Result.into(), StreamSite::MlpOut.into()];
        let taps = read_under(&model, &texts, &sites, edits);
        let written = found.iter().flat_map(|repair| {
            let (layer, site, head) = match repair.part {
                Writer::Head(layer, head) => (layer, sites[0], head),
                Writer::Mlp(layer) => (layer, sites[1], 0),
                Writer::Input => panic!("{name}: the input repairs nothing"),
            };
            let tap = taps.iter().find(|tap| tap.layer == layer && tap.site == site).unwrap();
            values(tap.values.clone().narrow(1, head, 1).narrow(2, texts[0].len() - 1, 1))
        });
        same(key, &written.collect::<Vec<_>>());
    }
}
