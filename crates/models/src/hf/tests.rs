//! What Polyhead writes it reads again: the same settings, and the same tensors to the bit, of every mechanism of the table.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use half::bf16;
use polyhead_attention::{AttentionConfig, Dims, Mask, Observe};
use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, numbers};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{ExportOptions, Folder, export};
use crate::adapters::LoraConfig;
use crate::weights::{FrozenDtype, Named, NonFinite, Reading, from_safetensors, load, load_with, named};
use crate::{Batch, Decoder, DecoderConfig, Parameter, PerLayer, parameters};

/// A decoder of the size of [`Dims::example`] with weights that all differ.
fn model(attention: PerLayer<AttentionConfig>, more: Value) -> Decoder {
    let Dims { d_model, n_layers, .. } = Dims::example();
    let mut config = json!({ "d_model": d_model, "n_layers": n_layers, "attention": attention });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let config: DecoderConfig = serde_json::from_value(config).unwrap();
    config.validate().unwrap();
    let model = config.init(11, &Device::flex());
    let wave = |(place, tensor): (usize, Named)| {
        let values = (0..tensor.values.len()).map(|at| 0.3 + 0.2 * (at as f32 * 1.7 + place as f32).sin()).collect();
        (tensor.name.clone(), Named { values, ..tensor })
    };
    let weights: BTreeMap<String, Named> = named(&model).into_iter().enumerate().map(wave).collect();
    load(model, weights).unwrap()
}

fn exported(model: &Decoder) -> (TempDir, Value) {
    let dir = tempfile::tempdir().unwrap();
    let exported = export(model, ExportOptions { max_positions: 16, ..Default::default() }).unwrap();
    for (name, bytes) in &exported.files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    exported.write_weights(&mut std::fs::File::create(dir.path().join("model.safetensors")).unwrap()).unwrap();
    let config = serde_json::from_slice(&std::fs::read(dir.path().join("config.json")).unwrap()).unwrap();
    (dir, config)
}

fn read(dir: &TempDir) -> Decoder {
    let folder = Folder::open(dir.path()).unwrap_or_else(|error| panic!("{error}"));
    folder.load(&Device::flex()).unwrap_or_else(|error| panic!("{error}"))
}

/// Exports a decoder and reads it; returns the class that it was written as.
fn comes_back(model: &Decoder) -> String {
    let (dir, config) = exported(model);
    let again = read(&dir);
    match config["model_type"] == "polyhead" {
        true => assert_eq!(again.config(), model.config(), "{config:#}"),
        false => assert_eq!(again.config(), &without_default_width(model.config()), "{config:#}"),
    }
    let bits = |model: &Decoder| -> Vec<(String, Vec<usize>, Vec<u32>)> {
        let of = |tensor: Named| (tensor.name, tensor.shape, tensor.values.into_iter().map(f32::to_bits).collect());
        named(model).into_iter().map(of).collect()
    };
    assert_eq!(bits(&again), bits(model), "{config:#}");
    config["architectures"][0].as_str().unwrap().to_owned()
}

/// The same settings without a width of heads that is the default, and with one number for windows that are all alike, which
/// published families do not tell apart.
fn without_default_width(config: &DecoderConfig) -> DecoderConfig {
    let mut json = json!(config);
    for table in json["attention"].as_object_mut().into_iter().flat_map(|tables| tables.values_mut()) {
        let [width, heads] = ["head_dim", "n_heads"].map(|key| table[key].as_u64());
        if width.zip(heads).is_some_and(|(width, heads)| width * heads == config.d_model as u64) {
            table.as_object_mut().unwrap().remove("head_dim");
        }
        if let Some([first, rest @ ..]) = table["window"].as_array().map(Vec::as_slice)
            && rest.iter().all(|window| window == first)
        {
            table["window"] = first.clone();
        }
    }
    serde_json::from_value(json).unwrap()
}

fn logits(model: &Decoder) -> Tensor<3> {
    let tokens = Tensor::<2, Int>::from_ints([[1, 2, 3, 10, 5, 6, 7, 3]], &model.device());
    model.logits(model.forward(tokens, &Mask::causal(), None, Observe::Nothing).hidden)
}

/// The examples of the mechanisms that decoders can have.
fn examples() -> Vec<AttentionConfig> {
    AttentionConfig::examples()
        .into_iter()
        .filter(|example| example.check_causal().is_ok() && causal(example))
        .collect()
}

/// Whether a decoder takes it.
fn causal(example: &AttentionConfig) -> bool {
    let config = json!({ "d_model": 24, "n_layers": 4, "attention": example });
    serde_json::from_value::<DecoderConfig>(config).unwrap().validate().is_ok()
}

/// Settings around attention that no published family has.
fn unusual() -> Value {
    json!({
        "rope_layout": "interleaved", "rope_theta": 5000.5, "norm": "layer", "norm_eps": 3e-6,
        "parallel_residual": true, "tie_embeddings": false, "rope_scaling": { "linear": { "factor": 2.5 } },
        "attention_gate": { "residual": true, "gates": [{ "product": { "axis": -1, "n_heads": 4 } }] },
    })
}

/// The parameters that are bf16.
fn narrow(model: &Decoder) -> Vec<String> {
    parameters(model).into_iter().filter(|one| one.dtype == DType::BF16).map(|one| one.name).collect()
}

/// The same folder with all weights in bf16.
fn in_bf16(dir: &TempDir) -> TempDir {
    let narrow = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), narrow.path().join(file.file_name())).unwrap();
    }
    let weights = narrow.path().join("model.safetensors");
    let tensors = from_safetensors(&std::fs::read(&weights).unwrap()).unwrap();
    let bytes = |tensor: &Named| tensor.values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
    let bytes: Vec<(&Named, Vec<u8>)> = tensors.values().map(|tensor| (tensor, bytes(tensor))).collect();
    let views = bytes
        .iter()
        .map(|(tensor, bytes)| (&tensor.name, TensorView::new(Dtype::BF16, tensor.shape.clone(), bytes).unwrap()));
    std::fs::write(&weights, safetensors::serialize(views, None).unwrap()).unwrap();
    narrow
}

#[test]
fn weights_stay_bf16_where_the_file_has_bf16_and_are_given_back_as_they_were() {
    let softmax = examples().into_iter().find(|example| example.name() == "softmax").unwrap();
    let (dir, _) = exported(&model(PerLayer::Same(softmax), json!({ "tie_embeddings": false })));
    let dir = in_bf16(&dir);
    let load = |frozen, device: &Device| {
        let reading = Reading { nonfinite: NonFinite::Refuse, frozen };
        Folder::open(dir.path()).unwrap().load_with(device, reading, &mut |_, _| {}).unwrap()
    };
    let device = Device::flex();
    let [as_in_file, wide] = [FrozenDtype::File, FrozenDtype::F32].map(|frozen| load(frozen, &device));
    assert!(narrow(&wide).is_empty());
    let kept = narrow(&as_in_file);
    assert!(["head.weight", "embedding.weight"].iter().all(|name| kept.iter().any(|kept| kept == name)), "{kept:?}");
    assert!(kept.iter().all(|name| !name.contains("norm")), "{kept:?}");
    assert_eq!(named(&as_in_file), named(&wide));
    assert_eq!(numbers(logits(&as_in_file)), numbers(logits(&wide)));
    let [narrow, wide] =
        [&as_in_file, &wide].map(|model| parameters(model).iter().map(Parameter::bytes).sum::<usize>());
    assert!(2 * narrow < wide + wide / 10, "{narrow} of {wide} bytes");
}

#[test]
fn weights_kept_in_bf16_compute_what_the_same_numbers_compute_in_f32() {
    for example in examples() {
        let (dir, _) = exported(&model(PerLayer::Same(example.clone()), json!({})));
        let reading = |frozen| Reading { nonfinite: NonFinite::Refuse, frozen };
        let load = |frozen| {
            Folder::open(dir.path())
                .unwrap()
                .load_with(&Device::flex().autodiff(), reading(frozen), &mut |_, _| {})
                .unwrap()
        };
        let rounded = load(FrozenDtype::Bf16);
        let kept = narrow(&rounded);
        assert!(
            kept.len() > 6 && kept.iter().all(|name| name.ends_with("_proj.weight") || name == "embedding.weight"),
            "{kept:?}"
        );
        assert!(narrow(&load(FrozenDtype::File)).is_empty(), "the file has f32");
        let has_queries = kept.iter().any(|name| name.ends_with(".q_proj.weight"));
        let targets = ["o_proj", "up_proj", "q_proj"].into_iter().filter(|&name| name != "q_proj" || has_queries);
        let pairs = LoraConfig { rank: 2, targets: targets.map(str::to_owned).collect(), ..LoraConfig::default() };
        let with_pairs = |model: Decoder| {
            let model = model.with_lora(&pairs, 3).unwrap();
            let spread = |(place, tensor): (usize, Named)| match tensor.name.starts_with("lora.") {
                true => {
                    let values = (0..tensor.values.len()).map(|at| (at as f32 + place as f32).sin() * 0.1).collect();
                    Some((tensor.name.clone(), Named { values, ..tensor }))
                }
                false => None,
            };
            let mut lora: BTreeMap<String, Named> = named(&model).into_iter().enumerate().filter_map(spread).collect();
            load_with(model, &mut |name, shape| Ok(lora.remove(name).map(|own| TensorData::new(own.values, shape)))).0
        };
        let forms: [fn(Decoder) -> Decoder; 3] = [|model| model, |model| model, Decoder::merged];
        for (form, at) in forms.into_iter().zip(0..) {
            let [got, want] = [rounded.clone(), rounded.clone().in_f32()].map(|model| {
                let model = form(if at == 0 { model } else { with_pairs(model) });
                let batch = Batch::text(vec![1, 2, 3, 10, 5, 6, 7, 3]);
                let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                [bits(numbers(logits(&model))), bits(numbers(model.loss(&batch, Observe::Nothing).cross_entropy))]
            });
            assert!(got == want, "{}, form {at}", example.name());
        }
    }
}

#[test]
fn every_mechanism_comes_back_in_any_decoder() {
    let examples = examples();
    assert!(examples.len() + 2 > AttentionConfig::NAMES.len(), "all but those of images");
    for example in &examples {
        let class = comes_back(&model(PerLayer::Same(example.clone()), json!({ "d_ff": 32 })));
        let layers: Vec<_> = vec![example; Dims::example().n_layers];
        let published = AttentionConfig::published(&layers, &Dims::example(), polyhead_attention::Form::Llama);
        assert_eq!(class, published.map_or("PolyheadForCausalLM", |published| published.family.class()));
        let zoology = json!({
            "rope": false, "learned_positions": 9, "norm": "layer", "mlp": "identity", "tie_embeddings": false, "head_bias": true,
        });
        let positions = json!({ "learned_positions": 9 });
        for more in [unusual(), json!({ "rope": false, "mlp": "gelu" }), zoology, positions] {
            let class = comes_back(&model(PerLayer::Same(example.clone()), more));
            assert_eq!(class, "PolyheadForCausalLM", "{}", example.name());
        }
    }
    // Each beside the next one, around the table.
    for at in 0..examples.len() {
        let layers =
            (0..Dims::example().n_layers).map(|layer| examples[(at + layer) % examples.len()].clone()).collect();
        let hybrid = model(PerLayer::Each(layers), json!({}));
        assert_eq!(comes_back(&hybrid), "PolyheadForCausalLM");
        let (_dir, config) = exported(&hybrid);
        assert_eq!(config["attention"][0], json!(examples[at]), "a table by the mechanism's name");
        assert_eq!([&config["model_type"], &config["hidden_size"]], [&json!("polyhead"), &json!(24)]);
    }
}

#[test]
fn settings_of_each_mechanism_come_back() {
    let moh = |router: Value| json!({ "mixture_of_head": { "n_heads": 6, "shared_heads": [2, 2, 1, 1], "top_k": 2, "router": router } });
    let gda = |more: Value| {
        let mut table = json!({ "n_heads": 6, "n_noise_heads": 2 });
        table.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "grouped_differential": table })
    };
    let maps = json!({ "n_heads": 4, "key_map": [0, 1, 1, 2], "value_map": [1, 0, 0, 0] });
    let fusing = json!({ "n_heads": 4, "key_map": [0, 1, 1, 2], "value_map": [1, 0, 0, 0], "fusing": true });
    let unread = json!({ "fixed": { "query_heads": [0, 3, 1, 0] } });
    let softmax = |more: Value| {
        let mut table = json!({ "n_heads": 4 });
        table.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "softmax": table })
    };
    let lambdas = json!({ "lambda_init": { "each": [0.25, 0.5, 0.125, 0.75] }, "head_dim": 6 });
    for (attention, class) in [
        (moh(json!({ "learned": {} })), "PolyheadForCausalLM"),
        (moh(json!({ "query_norm": {} })), "PolyheadForCausalLM"),
        (gda(json!({})), "MotifForCausalLM"),
        (gda(json!({ "lambda_init": "motif", "subln_init": 1.0 })), "MotifForCausalLM"),
        (gda(json!({ "lambda_init": { "constant": 0.2 }, "n_kv_heads": 2 })), "MotifForCausalLM"),
        (gda(lambdas), "MotifForCausalLM"),
        (gda(json!({ "subln": false })), "PolyheadForCausalLM"),
        (json!({ "decoupled_head": maps }), "DecoupledHeadForCausalLM"),
        (json!({ "decoupled_head": fusing }), "PolyheadForCausalLM"),
        (
            json!({ "key_driven": { "n_heads": 4, "n_kv_heads": 4, "head_dim": 6, "allocation": unread } }),
            "PolyheadForCausalLM",
        ),
        (json!({ "gated_delta_net": { "n_heads": 3 } }), "PolyheadForCausalLM"),
        (softmax(json!({})), "LlamaForCausalLM"),
        (softmax(json!({ "n_kv_heads": 1, "head_dim": 8, "qkv_bias": true, "o_bias": true })), "LlamaForCausalLM"),
        (softmax(json!({ "qkv_bias": true })), "Qwen2ForCausalLM"),
        (softmax(json!({ "qk_norm": true, "n_kv_heads": 2 })), "Qwen3ForCausalLM"),
        (softmax(json!({ "window": 5 })), "MistralForCausalLM"),
        (softmax(json!({ "window": [5, 5, 5, 5], "n_kv_heads": 2 })), "MistralForCausalLM"),
        (softmax(json!({ "window": [0, 5, 0, 5] })), "PolyheadForCausalLM"),
        (softmax(json!({ "window": 5, "qkv_bias": true, "o_bias": true })), "PolyheadForCausalLM"),
        (softmax(json!({ "window": 5, "softcap": 2.0 })), "PolyheadForCausalLM"),
        (softmax(json!({ "window": [5, 0, 0, 5], "qkv_bias": true })), "Qwen2ForCausalLM"),
        (softmax(json!({ "window": [5, 0, 6, 5], "qkv_bias": true })), "PolyheadForCausalLM"),
        (softmax(json!({ "window": 7, "qk_norm": true })), "Qwen3ForCausalLM"),
        (softmax(json!({ "o_bias": true })), "PolyheadForCausalLM"),
        (softmax(json!({ "qk_norm": true, "qkv_bias": true })), "PolyheadForCausalLM"),
    ] {
        let same = PerLayer::Same(serde_json::from_value(attention.clone()).unwrap());
        assert_eq!(comes_back(&model(same, json!({ "d_ff": 32 }))), class, "{attention}");
    }
    // In GPT-NeoX's form, and what GPT-NeoX has no word for.
    let neox = json!({ "norm": "layer", "mlp": "gelu", "d_ff": 32, "rope_fraction": 0.67, "parallel_residual": true });
    for (more, class) in [
        (json!({ "qkv_bias": true, "o_bias": true }), "GPTNeoXForCausalLM"),
        (json!({}), "GPTNeoXForCausalLM"),
        (json!({ "n_kv_heads": 2 }), "PolyheadForCausalLM"),
    ] {
        let attention = PerLayer::Same(serde_json::from_value(softmax(more)).unwrap());
        assert_eq!(comes_back(&model(attention, neox.clone())), class);
    }
}

/// The classes of `python/modeling_polyhead.py` for mechanisms, by the mechanism's name: its table MECHANISMS.
fn python_classes(code: &str) -> BTreeMap<&str, &str> {
    let table = code.split("\nMECHANISMS = {\n").nth(1).and_then(|rest| rest.split("\n}\n").next()).unwrap();
    table.lines().map(|line| line.trim().trim_end_matches(',').split_once(": ").unwrap()).collect()
}

#[test]
fn every_mechanism_of_decoders_has_its_class_in_the_code_that_export_writes() {
    let dims = Dims::example();
    for example in AttentionConfig::examples() {
        if example.check_causal().is_err() {
            continue;
        }
        let name = example.name();
        // Layers that differ are in no published family.
        let plain: AttentionConfig = serde_json::from_value(json!({ "softmax": { "n_heads": 4 } })).unwrap();
        let mut layers = vec![plain; dims.n_layers];
        layers[1] = example.clone();
        let other =
            if name == "softmax" { json!({ "softmax": { "n_heads": 4, "softcap": 2.0 } }) } else { json!(layers[0]) };
        layers[0] = serde_json::from_value(other).unwrap();
        let (dir, config) = exported(&model(PerLayer::Each(layers), json!({ "d_ff": 32 })));
        assert_eq!(config["auto_map"]["AutoModelForCausalLM"], "modeling_polyhead.PolyheadForCausalLM", "{name}");
        let code = std::fs::read_to_string(dir.path().join("modeling_polyhead.py")).unwrap();
        let classes = python_classes(&code);
        let class = classes.get(format!("\"{name}\"").as_str()).unwrap_or_else(|| panic!("{name} has no class"));
        let (_, body) = code.split_once(&format!("\nclass {class}(nn.Module):\n")).unwrap();
        let body = body.split("\nclass ").next().unwrap();
        // Every setting is an argument, of the class or of the softmax attention inside it.
        let (_, softmax) = code.split_once("\nclass Softmax(nn.Module):\n").unwrap();
        let inner = if body.contains("**softmax") { softmax.split("\nclass ").next().unwrap() } else { "" };
        for setting in json!(example)[name].as_object().unwrap().keys() {
            let argument = |body: &str| {
                [", ", " "].iter().any(|before| {
                    ["=", ",", "\n", ")"].iter().any(|after| body.contains(&format!("{before}{setting}{after}")))
                })
            };
            assert!(argument(body) || argument(inner), "{class} does not take {setting}");
        }
        let configuration = std::fs::read_to_string(dir.path().join("configuration_polyhead.py")).unwrap();
        for key in config.as_object().unwrap().keys() {
            let known = ["architectures", "auto_map", "model_type", "torch_dtype"].contains(&key.as_str());
            assert!(known || key.ends_with("_token_id") || configuration.contains(&format!("        {key}=")), "{key}");
        }
    }
}

#[test]
fn only_what_transformers_does_not_have_is_written_with_code() {
    let maps = json!({ "n_heads": 4, "key_map": [0, 1, 1, 2], "value_map": [1, 0, 0, 0] });
    for (attention, code) in [
        (json!({ "softmax": { "n_heads": 4 } }), false),
        (json!({ "softmax": { "n_heads": 4, "softcap": 3.0 } }), true),
        (json!({ "grouped_differential": { "n_heads": 4, "n_noise_heads": 2 } }), true),
        (json!({ "decoupled_head": maps }), true),
    ] {
        let model = model(PerLayer::Same(serde_json::from_value(attention).unwrap()), json!({}));
        let (dir, config) = exported(&model);
        assert_eq!(config["auto_map"].is_object(), code);
        assert_eq!(dir.path().join("modeling_polyhead.py").exists(), code);
        let note = super::notes(&model, ExportOptions::default()).concat();
        assert_eq!(note.contains("trust_remote_code=True"), code, "{note}");
    }
}

#[test]
fn the_differential_transformer_is_written_as_transformers_has_it() {
    let differential = |more: Value, decoder: Value| {
        let mut table = json!({ "n_heads": 4, "n_noise_heads": 2 });
        table.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let attention = serde_json::from_value(json!({ "grouped_differential": table })).unwrap();
        model(PerLayer::Same(attention), decoder)
    };
    let native = ExportOptions { max_positions: 16, native: true, ..Default::default() };
    let ours = differential(json!({}), json!({}));
    let exported_natively = export(&ours, native).unwrap();
    let mut weights = Vec::new();
    exported_natively.write_weights(&mut weights).unwrap();
    let files: BTreeMap<String, Vec<u8>> = exported_natively.files.into_iter().collect();
    let config: Value = serde_json::from_slice(&files["config.json"]).unwrap();
    assert_eq!(config["architectures"][0], "DiffLlamaForCausalLM");
    assert_eq!((&config["num_key_value_heads"], &config["auto_map"]), (&json!(4), &Value::Null));
    assert!(!files.contains_key("modeling_polyhead.py"));
    assert!(super::notes(&ours, native)[0].contains("DiffLlamaForCausalLM"));
    let theirs = crate::weights::from_safetensors(&weights).unwrap();
    assert!(!theirs.keys().any(|name| name.contains("subln")));
    let (_, motif) = exported(&ours);
    assert_eq!(motif["architectures"][0], "MotifForCausalLM");
    let mine: BTreeMap<String, Named> = named(&ours).into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
    // Heads 0 to 3 are signal, noise, signal, noise here; signals come first there. Theirs is [out, in], ours [in, out].
    const WIDTH: usize = 6;
    for name in ["q_proj", "k_proj", "v_proj"] {
        let theirs = &theirs[&format!("model.layers.1.self_attn.{name}.weight")];
        let mine = &mine[&format!("layers.1.attention.{name}.weight")];
        for (place, head) in [0, 2, 1, 3].into_iter().enumerate() {
            for (channel, input) in [(0, 0), (5, 3), (2, 23)] {
                let there = theirs.values[(place * WIDTH + channel) * theirs.shape[1] + input];
                assert_eq!(there, mine.values[input * mine.shape[1] + head * WIDTH + channel], "{name}");
            }
        }
    }
    let [o_proj, subln] = ["o_proj", "subln"].map(|name| &mine[&format!("layers.2.attention.{name}.weight")]);
    let there = &theirs["model.layers.2.self_attn.o_proj.weight"];
    for (row, column) in [(0, 0), (13, 5), (23, 23)] {
        let scaled = o_proj.values[row * o_proj.shape[1] + column] * subln.values[row % (2 * WIDTH)];
        assert_eq!(there.values[column * there.shape[1] + row], scaled);
    }
    // What DiffLlama does not have.
    for (more, decoder, words) in [
        (json!({ "n_noise_heads": 1 }), json!({}), "one signal head per noise head"),
        (json!({ "subln": false }), json!({}), "subln"),
        (json!({ "lambda_init": "motif" }), json!({}), "lambda_init"),
        (json!({ "window": 4 }), json!({}), "no window"),
        (json!({}), json!({ "norm_eps": 1e-6 }), "norm_eps"),
        (json!({}), json!({ "rope": false }), "rope = false"),
    ] {
        let error = export(&differential(more, decoder), native).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("without --native"), "{error}");
    }
    let sink = PerLayer::Same(serde_json::from_value(json!({ "sink": { "n_heads": 4 } })).unwrap());
    assert!(
        export(&model(sink, json!({})), native).unwrap_err().to_string().contains("only the Differential Transformer")
    );
    let plain = PerLayer::Same(serde_json::from_value(json!({ "softmax": { "n_heads": 4 } })).unwrap());
    assert_eq!(export(&model(plain, json!({})), native).unwrap().files.len(), 2);
}

#[test]
fn what_transformers_makes_of_our_config_is_read() {
    let sink = json!({ "sink": { "n_heads": 4 } });
    let scaled = json!({ "rope_scaling": { "linear": { "factor": 2.0 } } });
    let model = model(PerLayer::Same(serde_json::from_value(sink).unwrap()), scaled);
    let (dir, mut config) = exported(&model);
    let scaling = config.as_object_mut().unwrap().remove("rope_scaling").unwrap();
    assert_eq!(scaling["factor"], 2.0);
    // Version 4 writes the key that it was given; 5 adds what stands beside.
    for more in [json!({}), json!({ "rope_theta": 10000.0, "partial_rotary_factor": 1.0 })] {
        config["rope_parameters"] = scaling.clone();
        config["rope_parameters"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config["transformers_version"] = "5.24.0".into();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        assert_eq!(read(&dir).config(), model.config());
    }
}

#[test]
fn heads_in_equal_groups_are_written_as_published_whatever_shares_them() {
    let even = json!({ "key_driven": { "n_heads": 4, "n_kv_heads": 2, "allocation": { "even": {} } } });
    let one = json!({ "key_driven": { "n_heads": 4, "n_kv_heads": 2, "allocation": { "fixed": { "query_heads": [0, 4] } } } });
    let crossed = json!({ "decoupled_head": { "n_heads": 4, "key_map": [0, 1, 1, 0], "value_map": [0, 1, 1, 0] } });
    for (attention, kv_heads) in [(even, 2), (one, 1), (crossed, 2)] {
        let model = model(PerLayer::Same(serde_json::from_value(attention.clone()).unwrap()), json!({}));
        let (dir, config) = exported(&model);
        assert_eq!(config["architectures"][0], "LlamaForCausalLM", "{attention}");
        assert_eq!(config["num_key_value_heads"], kv_heads, "{attention}");
        assert_tensors_close("logits", logits(&read(&dir)), logits(&model), Tolerance::absolute(1e-5));
    }
}

/// Of every mechanism that reads both sides, masked diffusion models come back; but for groups that the text decides.
#[test]
fn masked_diffusion_models_come_back_and_their_keys_have_to_agree() {
    let masked = json!({ "masked_diffusion": true, "tie_embeddings": false });
    let both_sides = |one: &AttentionConfig| one.check_bidirectional().is_ok() && one.name() != "hilo";
    for example in AttentionConfig::examples().into_iter().filter(both_sides) {
        assert_eq!(comes_back(&model(PerLayer::Same(example), masked.clone())), "PolyheadForMaskedLM");
    }
    let by_text = json!({ "key_driven": { "n_heads": 4, "n_kv_heads": 2, "allocation": { "per_call": {} } } });
    let by_text = model(PerLayer::Same(serde_json::from_value(by_text).unwrap()), masked.clone());
    let error = export(&by_text, ExportOptions::default()).unwrap_err().to_string();
    assert!(error.contains("key_driven"), "{error}");
    let plain = PerLayer::Same(serde_json::from_value(json!({ "softmax": { "n_heads": 4 } })).unwrap());
    let (dir, config) = exported(&model(plain, masked));
    let auto = config["auto_map"]["AutoModelForMaskedLM"].as_str();
    assert!(config["vocab_size"] == 12 && config["mask_token_id"] == 11 && auto.is_some(), "{config:#}");
    for (key, value, words) in [
        ("mask_token_id", json!(3), "mask_token_id (3) must be the last id, 11"),
        ("mask_token_id", Value::Null, "mask_token_id (null)"),
        ("masked_diffusion", json!(false), "make them agree"),
        ("architectures", json!(["PolyheadForCausalLM"]), "make them agree"),
        ("vocab_size", json!(1), "must be the last id, 0"),
    ] {
        let mut config = config.clone();
        config[key] = value;
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let error = Folder::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(words), "{key}: {error}");
    }
}

#[test]
fn keys_of_our_own_class_are_all_read_and_named_where_they_are_wrong() {
    let moh = json!({ "mixture_of_head": { "n_heads": 4, "shared_heads": 2, "top_k": 1 } });
    let model = model(PerLayer::Same(serde_json::from_value(moh).unwrap()), json!({ "d_ff": 32 }));
    let told = |key: &str, value: Value| {
        let (dir, mut config) = exported(&model);
        match value {
            Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
            value => config[key] = value,
        }
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        Folder::open(dir.path()).and_then(|folder| folder.load(&Device::flex())).unwrap_err().to_string()
    };
    for (key, value, words) in [
        ("hidden_size", Value::Null, "hidden_size"),
        ("hidden_size", json!("24"), "hidden_size"),
        ("hidden_size", json!(0), "hidden_size (0) must be at least 1"),
        ("num_hidden_layers", json!(3), "layers.3"),
        ("d_ff", json!(32), "d_ff is intermediate_size in config.json"),
        ("n_experts", json!(3), "unknown field `n_experts`"),
        ("rope_scaling", json!({ "rope_type": "yarn" }), "\"yarn\" is not supported"),
        ("attention", Value::Null, "missing field `attention`"),
        ("attention", json!({ "moh": {} }), "attention"),
        (
            "attention",
            json!({ "mixture_of_head": { "n_heads": 4, "shared_heads": 5, "top_k": 1 } }),
            "shared_heads (5)",
        ),
        ("attention", json!({ "hilo": { "n_heads": 4 } }), "hilo"),
        ("model_type", json!("llama"), "make them agree"),
        ("vocab_size", Value::Null, "vocab_size"),
    ] {
        let error = told(key, value.clone());
        assert!(error.contains(words), "{key} = {value}: {error}");
    }
}
