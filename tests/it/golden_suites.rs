//! Rows of published suites by their official generators, and rows that were spoilt; Zoology's reference model. See
//! `tests/golden/suites/README.md`.

use std::collections::BTreeMap;

use burn::tensor::Device;
use polyhead_attention::Observe;
use polyhead_data::Sample;
use polyhead_data::synthetic::{
    Brackets, Compression, Dyck, FuzzyRecall, Group, Memorization, Modular, Mqar, MqarKind, Parity, Recall, Rules,
    SelectiveCopying, Side, Words,
};
use polyhead_models::weights::{self, Named};
use polyhead_models::{Batch, Decoder, DecoderConfig};
use serde_json::Value;

use crate::golden::{Config, GRADIENT, Golden, OUTPUT, Tensors, compare, files, gradients, size, transposed, values};

#[test]
fn golden_suites() {
    for golden in files("suites") {
        match golden.config["task"].as_str().unwrap() {
            "zoology_model" => check_model(&golden),
            task => check_rows(&golden, task),
        }
    }
}

/// Every official row is accepted, every spoilt one refused.
fn check_rows(golden: &Golden, task: &str) {
    let Golden { name, config, tensors, .. } = golden;
    config.is("ignore_index", -100);
    config.beside_the_point(&["notes"]);
    let (rules, side) = rules(golden, task);
    let reasons = config["reasons"].as_array().unwrap();
    let valid = tensors.wide("valid");
    assert_eq!((reasons.len(), valid.len()), (valid.len(), tensors["inputs"].shape[0]), "{name}");
    assert!(valid.contains(&1.0) && valid.contains(&0.0), "{name}");
    let length = tensors["inputs"].shape[1];
    let (inputs, targets) = (tensors.wide("inputs"), tensors.wide("targets"));
    assert_eq!(inputs.len(), targets.len(), "{name}");
    for (at, (inputs, targets)) in inputs.chunks(length).zip(targets.chunks(length)).enumerate() {
        let tokens = inputs.iter().map(|&id| u32::try_from(id as i64).unwrap_or(u32::MAX)).collect();
        let targets = targets.iter().map(|&id| id as i64).collect();
        let found = rules.check(&Sample { tokens, targets, ..Sample::default() }, side);
        let reason = reasons[at].as_str().unwrap();
        match valid[at] {
            1.0 => assert!(found.is_ok() && reason.is_empty(), "{name}, row {at}: {}", found.unwrap_err()),
            0.0 => assert!(found.is_err() && !reason.is_empty(), "{name}, row {at} was accepted: {reason}"),
            other => panic!("{name}, row {at}: valid is {other}"),
        }
    }
}

/// The task that a file is of, and the side of the split that its rows are on.
fn rules(golden: &Golden, task: &str) -> (Box<dyn Rules>, Side) {
    let Golden { config, .. } = golden;
    let side = match config.get("split").and_then(Value::as_str) {
        Some("test") => Side::Validation(1),
        _ => Side::Train,
    };
    let rules: Box<dyn Rules> = match task {
        "mqar" => Box::new(mqar(config, MqarKind::Plain)),
        "mqar_forgetting" => Box::new(mqar(config, MqarKind::Forgetting)),
        "mqar_compositional" => Box::new(mqar(config, MqarKind::Compositional)),
        "mad_recall" => Box::new(recall(config)),
        "mad_fuzzy" => Box::new(fuzzy(config)),
        "mad_selective_copying" => {
            size(config, "seq_len");
            let (vocab_size, n_copied) = (size(config, "vocab_size"), size(config, "num_tokens_to_copy"));
            Box::new(SelectiveCopying { vocab_size, n_copied })
        }
        "mad_compression" => {
            size(config, "seq_len");
            Box::new(Compression { vocab_size: size(config, "vocab_size") })
        }
        "mad_memorization" => Box::new(memorization(golden)),
        "state_parity" => {
            config.is("vocab_size", 3);
            let [min, max] = sizes(config);
            Box::new(Parity { min, max })
        }
        "state_mod" => {
            config.is("vocab_size", 10);
            let [min, max] = sizes(config);
            Box::new(Modular { min, max, modulus: size(config, "modulus") as u32 })
        }
        "state_brackets" => {
            config.is("vocab_size", 12);
            let ([min, max], mult) = (sizes(config), flag(config, "mult"));
            Box::new(Brackets { min, max, modulus: size(config, "modulus") as u32, mult })
        }
        "state_word" => Box::new(words(golden)),
        "state_dyck" => Box::new(Dyck {
            k: size(config, "k"),
            m: size(config, "m"),
            min: size(config, "min_len"),
            max: size(config, "max_len"),
        }),
        other => panic!("{}: task {other}", golden.name),
    };
    (rules, side)
}

/// The smallest and the largest size of rows that are padded to their context less one.
fn sizes(config: &Config) -> [usize; 2] {
    config.is("context_length", 256);
    [size(config, "min_len"), size(config, "max_len")]
}

fn recall(config: &Config) -> Recall {
    size(config, "seq_len");
    Recall {
        vocab_size: size(config, "vocab_size"),
        noise_vocab_size: size(config, "noise_vocab_size"),
        noise: config["frac_noise"].as_f64().unwrap(),
        multi_query: flag(config, "multi_query"),
    }
}

fn fuzzy(config: &Config) -> FuzzyRecall {
    config.is("noise_vocab_size", 0);
    config.is("frac_noise", 0.0);
    config.is("multi_query", true);
    size(config, "seq_len");
    let (motif, values) = (size(config, "k_motif_size"), size(config, "v_motif_size"));
    assert_eq!(motif, values, "keys and values have the same largest size");
    FuzzyRecall { vocab_size: size(config, "vocab_size"), motif }
}

/// The map is the file's, which another generator drew.
fn memorization(golden: &Golden) -> Memorization {
    let Golden { name, config, tensors, .. } = golden;
    config.beside_the_point(&["kv_map_seed", "seq_len"]);
    let vocab_size = size(config, "vocab_size");
    let (keys, values) = (tensors.wide("map.keys"), tensors.wide("map.values"));
    let pairs = Memorization::new(vocab_size).values.len();
    assert_eq!((keys.len(), values.len()), (pairs, pairs), "{name}");
    let mut map = vec![u32::MAX; keys.len()];
    for (&key, &value) in keys.iter().zip(values) {
        map[key as usize] = value as u32;
    }
    let mut theirs = map.clone();
    theirs.sort_unstable();
    let range = keys.len() as u32..vocab_size as u32 - 1;
    assert!(theirs.iter().all(|value| range.contains(value)), "{name}: {theirs:?}");
    assert!(theirs.windows(2).all(|pair| pair[0] < pair[1]), "{name}: {theirs:?}");
    Memorization { vocab_size, values: map }
}

/// The group's table and the order of its elements are the file's.
fn words(golden: &Golden) -> Words {
    let Golden { name, config, tensors, .. } = golden;
    let group: Group = serde_json::from_value(config["group"].clone()).unwrap();
    let words = Words::new(group, size(config, "k"), false);
    let table: Vec<f64> = words.table.iter().flatten().map(|&id| f64::from(id)).collect();
    assert_eq!(tensors.wide("group.table"), table, "{name}");
    assert_eq!(config["elements"].as_array().unwrap().len(), words.table.len(), "{name}");
    words
}

fn flag(config: &Config, key: &str) -> bool {
    config[key].as_bool().unwrap()
}

fn mqar(config: &Config, kind: MqarKind) -> Mqar {
    size(config, "seq_len");
    Mqar {
        vocab_size: size(config, "vocab_size"),
        kind,
        n_updates: config.get("num_updates").map_or(0, |count| count.as_u64().unwrap() as usize),
        random_non_queries: flag(config, "random_non_queries"),
        power_a: config["power_a"].as_f64().unwrap(),
        n_pairs: size(config, "num_kv_pairs"),
    }
}

/// Zoology's model of attention: logits, loss and gradients.
fn check_model(golden: &Golden) {
    let Golden { name, config, tensors, .. } = golden;
    for (key, only) in [("learned_positions", true), ("tied_embeddings", true)] {
        config.is(key, only);
    }
    for (key, only) in [("state_mixer", "identity"), ("dropout", "off")] {
        config.is(key, only);
    }
    config.is("ignore_index", -100);
    config.beside_the_point(&["num_kv_pairs"]);
    let (n_layers, seq) = (size(config, "n_layers"), size(config, "seq_len"));
    let described: DecoderConfig = serde_json::from_value(serde_json::json!({
        "d_model": size(config, "d_model"), "n_layers": n_layers, "norm": "layer", "norm_eps": config["layer_norm_eps"],
        "mlp": "identity", "rope": false, "learned_positions": seq,
        "attention": { "softmax": { "n_heads": size(config, "n_heads"), "qkv_bias": true, "o_bias": true } },
    }))
    .unwrap();
    described.validate().unwrap();
    let device = Device::flex().autodiff();
    let fresh = described.init(size(config, "vocab_size"), &device);
    let model: Decoder = weights::load(fresh, ours(tensors, "w.", n_layers)).unwrap();
    let ids = |key: &str| tensors.wide(key).iter().map(|&id| id as i64).collect::<Vec<i64>>();
    let tokens: Vec<u32> = ids("tokens").into_iter().map(|id| id as u32).collect();
    let batch = Batch { batch: tokens.len() / seq, seq, tokens, targets: ids("labels"), ..Batch::default() };
    let hidden =
        model.forward(model.tokens(&batch), &polyhead_attention::Mask::causal(), None, Observe::Nothing).hidden;
    compare(name, "logits", &tensors["logits"].values, &values(model.logits(hidden)), OUTPUT, false);
    let loss = model.loss(&batch, Observe::Nothing).cross_entropy / batch.target_tokens() as f64;
    compare(name, "loss", &tensors["loss"].values, &values(loss.clone()), OUTPUT, false);
    let want = ours(tensors, "grad.", n_layers).into_iter().map(|(key, named)| (key, named.values)).collect();
    let (got, want) = (merged(gradients(&model, &loss.backward())), merged(want));
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{name}: a gradient per parameter");
    for (key, got) in got {
        compare(name, &format!("grad.{key}"), &want[&key], &got, GRADIENT, true);
    }
}

/// Queries, keys and values in one, as in the file: gradients of the keys' biases are 0 but for rounding, and have no size of their own.
fn merged(mut gradients: BTreeMap<String, Vec<f32>>) -> BTreeMap<String, Vec<f32>> {
    let queries: Vec<String> = gradients.keys().filter(|key| key.contains(".q_proj.")).cloned().collect();
    for key in queries {
        let of = |part: &str| gradients[&key.replace("q_proj", part)].clone();
        let all = ["q_proj", "k_proj", "v_proj"].map(of).concat();
        gradients.insert(key.replace("q_proj", "qkv"), all);
    }
    gradients.retain(|key, _| !["q_proj", "k_proj", "v_proj"].iter().any(|part| key.contains(part)));
    gradients
}

/// A file's parameters, or their gradients, as ours: queries, keys and values are one matrix there.
fn ours(tensors: &Tensors, prefix: &str, n_layers: usize) -> BTreeMap<String, Named> {
    let mut found = BTreeMap::new();
    let mut put = |ours: String, tensor: Named| _ = found.insert(ours.clone(), Named { name: ours, ..tensor });
    let get = |theirs: String| tensors[format!("{prefix}backbone.{theirs}").as_str()].clone();
    put("embedding.weight".into(), get("embeddings.word_embeddings.weight".into()));
    put("positions.weight".into(), get("embeddings.position_embeddings.weight".into()));
    for kind in ["weight", "bias"] {
        put(format!("norm.{kind}"), get(format!("ln_f.{kind}")));
        for layer in 0..n_layers {
            let of = |part: &str| get(format!("layers.{layer}.{part}.{kind}"));
            let laid = |tensor: Named| if kind == "weight" { transposed(&tensor) } else { tensor };
            put(format!("layers.{layer}.attention_norm.{kind}"), of("norm1"));
            put(format!("layers.{layer}.mlp_norm.{kind}"), of("norm2"));
            put(format!("layers.{layer}.attention.o_proj.{kind}"), laid(of("sequence_mixer.out_proj")));
            let all = of("sequence_mixer.Wqkv");
            let third = all.values.len() / 3;
            for (at, name) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
                let mut shape = all.shape.clone();
                shape[0] /= 3;
                let values = all.values[at * third..(at + 1) * third].to_vec();
                let part = Named { name: String::new(), shape, values };
                put(format!("layers.{layer}.attention.{name}.{kind}"), laid(part));
            }
        }
    }
    found
}
