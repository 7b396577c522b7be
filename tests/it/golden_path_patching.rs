//! Activation, attribution and path patching, and edge attribution, by their authors' code; see
//! `tests/golden/path_patching/README.md`.

use burn::tensor::{Device, Tensor};
use polyhead_attention::{KvHead, KvSite, Positions, QueryHead, QuerySite, Site, StreamSite};
use polyhead_evaluation::edges::{Reader, Steps, Writer, edge_scores, node_scores, parts};
use polyhead_evaluation::patching::{Receiver, Runs, effect, z_gradients};
use polyhead_models::{Decoder, PromptPair};
use serde_json::{Value, json};

use crate::golden::{Golden, compare, files, size, values};
use crate::golden_decoder::{ids, llama, rows, run};

/// Absolute: of logits, of effects and scores.
const LOGITS: f32 = 5e-5;
const EFFECTS: f32 = 1e-4;

#[test]
fn golden_path_patching() {
    files("path_patching").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.is("tie_embeddings", false);
    config.is("position", -1);
    config.beside_the_point(&["tokens", "prompts", "score_sign"]);
    let plain = llama(golden, &Device::flex());
    let [clean, corrupt] = ["tokens.clean", "tokens.corrupt"].map(|key| rows(file, key));
    let pairs: Vec<PromptPair> = (clean.into_iter().zip(corrupt).zip(rows(file, "answers")))
        .map(|((clean, corrupt), answers)| PromptPair { clean, corrupt, right: answers[0], wrong: answers[1] })
        .collect();
    pairs.iter().for_each(|pair| pair.check(plain.vocab_size()).unwrap());
    let same = |key: &str, got: &[f32], tolerance: f32| {
        compare(name, key, &file[key].values, got, tolerance, false);
    };
    let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect::<Vec<_>>();
    for side in ["clean", "corrupt"] {
        let input = ids(file, &format!("tokens.{side}"), &Device::flex());
        same(&format!("logits.{side}"), &values(run(&plain, &input, Default::default()).0), LOGITS);
    }
    let runs = Runs::new(&plain, &pairs);
    let (layers, heads) = (plain.layers.len(), runs.heads(0));
    for (side, (key, told)) in
        [("ld.clean", "ld_clean_mean"), ("ld.corrupt", "ld_corrupt_mean")].into_iter().enumerate()
    {
        same(key, &narrow(&runs.differences[side]), LOGITS);
        let mean = runs.differences[side].iter().sum::<f64>() / pairs.len() as f64;
        assert!((mean - config[told].as_f64().unwrap()).abs() < f64::from(LOGITS), "{name}: {told}");
    }
    for (side, key) in ["z.clean", "z.corrupt"].into_iter().enumerate() {
        let all = (0..layers).map(|layer| runs.z(layer)[side].clone().unsqueeze_dim::<5>(1));
        same(key, &values(Tensor::cat(all.collect(), 1)), LOGITS);
    }

    let mean = |of_pairs: &[f64]| of_pairs.iter().sum::<f64>() / pairs.len() as f64;
    let each = |of: &dyn Fn(usize, QueryHead) -> Vec<f64>| -> Vec<f64> {
        (0..layers * heads).map(|at| mean(&of(at / heads, QueryHead(at % heads)))).collect()
    };
    let ends = runs.differences.each_ref().map(|side| mean(side));
    for (which, positions) in [("last", runs.last()), ("all", Positions::All)] {
        let patched = each(&|layer, head| runs.patch_head(layer, head, positions.clone()));
        same(&format!("act_patch.{which}.ld"), &narrow(&patched), EFFECTS);
        let effects: Vec<f64> = patched.iter().map(|&ld| effect(ld, ends)).collect();
        same(&format!("act_patch.{which}.effect"), &narrow(&effects), EFFECTS);
    }

    let trained = llama(golden, &Device::flex().autodiff());
    let gradients = z_gradients(&trained, &pairs);
    let stacked: Vec<Tensor<5>> = gradients.iter().map(|grad| grad.clone().unsqueeze_dim::<5>(1)).collect();
    same("attr.grad_z", &values(Tensor::cat(stacked, 1)), EFFECTS);
    let of_heads = |of: &dyn Fn(usize) -> Tensor<4>| -> Vec<f32> {
        (0..layers).flat_map(|layer| values(of(layer).sum_dim(0).sum_dim(2).sum_dim(3))).collect()
    };
    let attribution = |position| narrow(&runs.attribution(&gradients, position).concat());
    same("attr.effect_ld", &attribution(None), EFFECTS);
    same("attr.effect_ld_last", &attribution(Some(runs.seq - 1)), EFFECTS);
    same("gate.grad", &of_heads(&|layer| runs.z(layer)[0].clone() * gradients[layer].clone()), EFFECTS);

    for spec in config["path_specs"].as_array().unwrap() {
        assert_eq!(spec["position"], -1, "{name}");
        let receivers: Vec<Receiver> = (spec["receivers"].as_array().unwrap().iter())
            .map(|receiver| named_receiver(receiver, spec["component"].as_str().unwrap()))
            .collect();
        let freeze = spec["freeze_mlps"].as_bool().unwrap();
        let patched = each(&|layer, head| runs.patch_path((layer, head), &receivers, freeze));
        let effects: Vec<f64> = patched.iter().map(|&ld| effect(ld, ends)).collect();
        let key = format!("path.{}", spec["name"].as_str().unwrap());
        same(&key, &narrow(&effects), EFFECTS);
        // As released, a head's output as receiver is overwritten by what is frozen.
        let released = format!("{key}_official");
        if spec["component"] == "z" {
            assert!(file[released.as_str()].values.iter().all(|effect| effect.abs() < 1e-6), "{name}: {released}");
        }
    }
    check_edges(golden, &trained, &pairs, [layers, heads]);
}

fn named_receiver(receiver: &Value, component: &str) -> Receiver {
    let place = receiver[0].as_str().unwrap();
    let Some(head) = receiver[1].as_u64() else {
        let (layer, site) = Site::in_layer(place).unwrap_or_else(|| panic!("there is no {place}"));
        let Site::Stream(site) = site else { panic!("{place} is of heads") };
        return Receiver::Stream(layer, site);
    };
    let (layer, head) = (place.parse().unwrap(), head as usize);
    match component {
        "q" => Receiver::Query(layer, QuerySite::Q, QueryHead(head)),
        "z" => Receiver::Query(layer, QuerySite::Z, QueryHead(head)),
        "k" => Receiver::Kv(layer, KvSite::K, KvHead(head)),
        "v" => Receiver::Kv(layer, KvSite::V, KvHead(head)),
        "residual" => Receiver::Stream(layer, StreamSite::ResidPost),
        other => panic!("component {other}"),
    }
}

fn check_edges(golden: &Golden, model: &Decoder, pairs: &[PromptPair], [layers, heads]: [usize; 2]) {
    let Golden { name, config, tensors: file, .. } = golden;
    let (writers, readers) = parts(layers, heads);
    let writer = |writer: &Writer| match writer {
        Writer::Input => "input".to_owned(),
        Writer::Head(layer, head) => format!("a{layer}.h{head}"),
        Writer::Mlp(layer) => format!("m{layer}"),
    };
    let reader = |reader: &Reader| match reader {
        Reader::Head(layer, head, kind) => format!("a{layer}.h{head}.{}", ["q", "k", "v"][*kind]),
        Reader::Mlp(layer) => format!("m{layer}"),
        Reader::Logits => "logits".to_owned(),
    };
    assert_eq!(config["forward_nodes"], json!(writers.iter().map(writer).collect::<Vec<_>>()), "{name}");
    assert_eq!(config["backward_nodes"], json!(readers.iter().map(reader).collect::<Vec<_>>()), "{name}");
    let real: Vec<f32> = (writers.iter())
        .flat_map(|writer| readers.iter().map(|reader| f32::from(u8::from(writer.reaches(*reader)))))
        .collect();
    assert_eq!(real, file["edge.real"].values, "{name}: edge.real");
    let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect::<Vec<_>>();
    let same = |key: &str, got: &[f64]| compare(name, key, &file[key].values, &narrow(got), EFFECTS, false);
    let m = size(config, "ig_steps");
    let [clean, from_corrupt, to_clean] =
        [Steps::Clean, Steps::FromCorrupt(m), Steps::ToClean(m)].map(|steps| edge_scores(model, pairs, steps).unwrap());
    same("eap.official", &clean.edges.concat());
    same("eap_ig.official_k0", &from_corrupt.edges.concat());
    same("eap_ig.k1", &to_clean.edges.concat());
    same("node.eap", &clean.nodes);
    same("node.eap_ig_k0", &from_corrupt.nodes);
    same("node.eap_ig_k1", &to_clean.nodes);
    same("node.eap_ig_midpoint400", &node_scores(model, pairs, Steps::Midpoints(400)).unwrap());
    // As released, feed-forward layers have the gradient at what they read.
    for (key, scores) in [("node.eap_official", &clean), ("node.eap_ig_official", &to_clean)] {
        let released = writers.iter().zip(&scores.nodes).map(|(writer, &score)| match writer {
            Writer::Mlp(layer) => scores.released_mlps[*layer],
            _ => score,
        });
        same(key, &released.collect::<Vec<_>>());
    }
}
