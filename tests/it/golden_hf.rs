//! Folders that transformers 4 and 5 wrote, and the logits that it computes from them (`tests/golden/hf/make_golden.py`).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use polyhead_attention::{Cache, Mask, Observe};
use polyhead_models::hf::{ExportOptions, Folder, export};
use polyhead_models::weights::{from_safetensors, named};
use polyhead_models::{Decoder, TokenPooling};

use crate::golden::{self, Golden, compare, files, values};
use crate::world::{SMALL, World, project};

/// Of logits in f32, absolute.
const LOGITS: f32 = 1e-5;
/// Of hidden states in f32, relative to the largest number.
const STATES: f32 = 1e-5;

/// Every folder of a model; files beside them tell how they were made.
fn folders(kind: &str) -> Vec<PathBuf> {
    let root = golden::folder(kind);
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    found.sort();
    assert!(!found.is_empty(), "no models");
    found
}

/// `[batch, seq, vocab]` for `[batch, seq]` ids.
fn logits(model: &Decoder, tokens: &[i64], shape: [usize; 2], cache: Option<&mut Cache>) -> Tensor<3> {
    let ids: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, shape), &model.device());
    model.logits(model.forward(ids, &Mask::causal(), cache, Observe::Nothing).hidden)
}

/// Two rows of tokens and their logits, which are all that the file has.
fn expected(folder: &Path) -> ([usize; 2], Vec<i64>, Vec<f32>) {
    let file = from_safetensors(&std::fs::read(folder.join("expected.safetensors")).unwrap()).unwrap();
    assert!(file.keys().eq(["logits", "tokens"]), "{}: {:?}", folder.display(), file.keys());
    let [batch, seq] = file["tokens"].shape[..] else { panic!("{}: tokens", folder.display()) };
    let tokens = file["tokens"].values.iter().map(|&id| id as i64).collect();
    ([batch, seq], tokens, file["logits"].values.clone())
}

#[test]
fn golden_hf() {
    for folder in folders("hf") {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let opened = Folder::open(&folder).unwrap_or_else(|error| panic!("{error}"));
        let model = opened.load(&Device::flex()).unwrap_or_else(|error| panic!("{error}"));
        let ([batch, seq], tokens, want) = expected(&folder);
        let got = logits(&model, &tokens, [batch, seq], None);
        compare(&name, "logits", &want, &values(got), LOGITS, false);
        // Decoding with a cache gives the same.
        let mut cache = Cache::new(model.layers.len());
        let rows = |from: usize, to: usize| -> Vec<i64> {
            tokens.chunks(seq).flat_map(|row| row[from..to].to_vec()).collect()
        };
        let middle = seq / 3;
        let parts = [(0, middle), (middle, middle + 1), (middle + 1, seq)]
            .map(|(from, to)| logits(&model, &rows(from, to), [batch, to - from], Some(&mut cache)));
        compare(&name, "logits with a cache", &want, &values(Tensor::cat(parts.to_vec(), 1)), LOGITS, false);

        // Written and read again, it is the same model, to the bit.
        let dir = tempfile::tempdir().unwrap();
        let options =
            ExportOptions { max_positions: opened.max_positions(), end_of_text: Some(2), ..Default::default() };
        let exported = export(&model, options).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (file, bytes) in &exported.files {
            std::fs::write(dir.path().join(file), bytes).unwrap();
        }
        exported.write_weights(&mut std::fs::File::create(dir.path().join("model.safetensors")).unwrap()).unwrap();
        let again = Folder::open(dir.path()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(again.decoder(), opened.decoder(), "{name}");
        let again = again.load(&Device::flex()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(named(&again), named(&model), "{name}");
    }
}

#[test]
fn golden_peft() {
    for folder in folders("peft") {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let opened = Folder::open(&folder).unwrap_or_else(|error| panic!("{error}"));
        assert!(opened.notes().iter().any(|note| note.contains("an adapter of rank")), "{:?}", opened.notes());
        let ([batch, seq], tokens, want) = expected(&folder);
        let model = opened.load(&Device::flex()).unwrap_or_else(|error| panic!("{error}"));
        // What is added makes logits larger than those of the models alone: relative to the largest.
        compare(&name, "logits", &want, &values(logits(&model, &tokens, [batch, seq], None)), LOGITS, true);
    }
}

#[test]
fn adapters_that_are_not_folded_exactly_are_refused_by_the_key() {
    let source = golden::folder("peft").join("llama_patterns");
    let base = golden::folder("hf").join("llama_v5").canonicalize().unwrap();
    let told = |key: &str, value: serde_json::Value| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(source.join("adapter_model.safetensors"), dir.path().join("adapter_model.safetensors")).unwrap();
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(source.join("adapter_config.json")).unwrap()).unwrap();
        config["base_model_name_or_path"] = base.to_str().unwrap().into();
        config[key] = value;
        std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
        Folder::open(dir.path()).and_then(|folder| folder.load(&Device::flex())).map(drop).map_err(|e| e.to_string())
    };
    assert_eq!(told("lora_dropout", 0.3.into()), Ok(()));
    for (key, value, words) in [
        ("peft_type", "IA3".into(), "peft_type is \"IA3\""),
        ("use_dora", true.into(), "use_dora (true)"),
        ("bias", "all".into(), "bias (\"all\")"),
        ("fan_in_fan_out", true.into(), "fan_in_fan_out (true)"),
        ("modules_to_save", serde_json::json!(["lm_head"]), "modules_to_save"),
        ("init_lora_weights", "pissa".into(), "init_lora_weights (\"pissa\") changes the base model"),
        ("r", 3.into(), "expected [3, 32]"),
        ("rank_pattern", serde_json::json!({ "(q|v)_proj": 2 }), "is a regular expression"),
        ("alpha_pattern", serde_json::json!({ "q_proj": 2.0, "self_attn.q_proj": 3.0 }), "two names are the end of"),
        (
            "base_model_name_or_path",
            "meta-llama/Llama-2-7b".into(),
            "base_model_name_or_path (\"meta-llama/Llama-2-7b\")",
        ),
        (
            "base_model_name_or_path",
            golden::folder("hf").join("gpt_neox_v5").to_str().unwrap().into(),
            "belongs to no parameter",
        ),
    ] {
        let error = told(key, value).unwrap_err();
        assert!(error.contains(words), "{key}: {error}");
    }
}

/// A copy of a folder whose config.json and files may be changed.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(project().join("tests/golden/hf").join(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

fn change_config(dir: &tempfile::TempDir, from: &str, to: &str) {
    let path = dir.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from} is not in {text}");
    std::fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn what_cannot_be_read_is_told() {
    let told = |name: &str, from: &str, to: &str| {
        let dir = copy(name);
        change_config(&dir, from, to);
        let loaded = Folder::open(dir.path()).and_then(|folder| folder.load(&Device::flex()));
        loaded.err().unwrap_or_else(|| panic!("{name} with {to} must be refused")).to_string()
    };
    for (name, from, to, words) in [
        ("llama_v5", "\"llama3\"", "\"yarn\"", "\"yarn\" is not supported; linear and llama3 are"),
        ("llama_v4", "LlamaForCausalLM", "GemmaForCausalLM", "\"GemmaForCausalLM\"; LlamaForCausalLM, Mistral"),
        ("mistral_v5", "\"sliding_window\": null", "\"sliding_window\": 0", "sliding_window (0) must be at least 1"),
        ("llama_v5", "\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", "hidden_act is \"gelu\"; \"silu\""),
        ("llama_v5", "\"mlp_bias\": false", "\"mlp_bias\": true", "mlp_bias"),
        (
            "qwen3_v5",
            "\"vocab_size\": 48",
            "\"vocab_size\": 50",
            "model.embed_tokens.weight has shape [48, 32], expected [50, 32]",
        ),
        (
            "qwen2_v5",
            "\"vocab_size\"",
            "\"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 4.0}, \"vocab_size\"",
            "rope_parameters (\"default\") and rope_scaling (\"linear\") say different things",
        ),
        (
            "llama_v5",
            "\"vocab_size\": 48",
            "\"vocab_size\": 1000000000000",
            "vocab_size (1000000000000) must be at most",
        ),
        ("llama_v5", "\"vocab_size\": 48", "\"vocab_size\": 4800000", "numbers, and the files hold 21664"),
        ("gpt_neox_v5", "\"num_attention_heads\": 4", "\"num_attention_heads\": 5", "n_heads (5) must divide d_model"),
    ] {
        let error = told(name, from, to);
        assert!(error.contains(words), "{name} with {to}: {error}");
    }
    let slides = copy("qwen2_v5");
    change_config(&slides, "\"use_sliding_window\": false", "\"use_sliding_window\": true");
    assert!(Folder::open(slides.path()).is_ok(), "a window that is null hides nothing");
    // Every missing and every left-over tensor is listed.
    let error = told("gpt_neox_v4", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    assert_eq!(error.matches("layers.2.").count(), 12, "{error}");
    let error = told("llama_v5", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
    assert_eq!(error.matches("belongs to no parameter").count(), 9, "{error}");

    let pickles = copy("mistral_v5");
    std::fs::rename(pickles.path().join("model.safetensors"), pickles.path().join("pytorch_model.bin")).unwrap();
    let error = Folder::open(pickles.path()).unwrap_err().to_string();
    assert!(error.contains("pytorch_model.bin is a pickle") && error.contains("save_pretrained"), "{error}");
    let broken = copy("llama_v5");
    let shard = broken.path().join("model-00002-of-00003.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 4]).unwrap();
    let error = Folder::open(broken.path()).unwrap_err().to_string();
    assert!(error.contains("model-00002-of-00003"), "{error}");
    std::fs::remove_file(&shard).unwrap();
    assert!(Folder::open(broken.path()).unwrap_err().to_string().contains("model-00002-of-00003"));
}

#[test]
fn commands_take_such_folders_and_runs_start_from_them() {
    let world = World::new(SMALL);
    for name in ["qwen3_v5", "gpt_neox_v4"] {
        let folder = project().join("tests/golden/hf").join(name).canonicalize().unwrap();
        let folder = folder.to_str().unwrap();
        let (out, run) = (format!("{name}.safetensors"), format!("run-{name}"));
        world.succeeds(&["logits", folder, "--tokens", "1,2,3", "--out", &out]);
        assert!(world.fails(1, &["generate", folder]).contains("has no tokenizer"));
        assert!(world.fails(1, &["eval", folder]).contains("says nothing about data"));
        let text = SMALL.split_once("[data.markov]").unwrap().1;
        std::fs::write(world.dir.path().join("child.toml"), format!("[data.markov]{text}")).unwrap();
        let pretrained = format!("model.pretrained={folder}");
        world.succeeds(&["train", "child.toml", &pretrained, "--out", &run]);
        // The model knows more ids than the data has, as published ones often do.
        let (_, err) = world.succeeds(&["train", "child.toml", &pretrained, "training.steps=14", "--out", &run]);
        assert!(err.contains("resume: from"), "{err}");
        world.succeeds(&["eval", &run]);
        world.succeeds(&["export", &run, "--to", &format!("exported-{name}")]);
    }
    // A tokenizer that is not the model's: 258 ids beside 48.
    let own = copy("qwen2_v5");
    let tokenizer = polyhead_data::Tokenizer::bytes();
    std::fs::write(own.path().join("tokenizer.json"), tokenizer.to_json()).unwrap();
    let err = world.fails(1, &["generate", own.path().to_str().unwrap(), "--prompt", "a"]);
    assert!(err.contains("tokenizer.json has 258 ids, the model knows 48"), "{err}");
    let folder = project().join("tests/golden/hf/qwen2_v5").canonicalize().unwrap();
    let pretrained = format!("model.pretrained={}", folder.display());
    let err =
        world.fails(2, &["train", "recipe.toml", &pretrained, "data={text={paths=[\"recipe.toml\"]}}", "--out", "x"]);
    assert!(err.contains("has no tokenizer, and the recipe names none"), "{err}");
}

#[test]
fn golden_features() {
    for Golden { tensors, .. } in files("features") {
        let models: BTreeSet<&str> = tensors.keys().map(|key| key.rsplit_once('.').unwrap().0).collect();
        let wanted: BTreeSet<String> =
            models.iter().flat_map(|model| ["last", "mean"].map(|how| format!("{model}.{how}"))).collect();
        assert!(tensors.keys().eq(&wanted), "both poolings of each model");
        for key in tensors.keys() {
            let (name, how) = key.rsplit_once('.').unwrap();
            let pooling = match how {
                "mean" => TokenPooling::Mean,
                "last" => TokenPooling::Last,
                other => panic!("{key}: pooling {other}"),
            };
            let folder = folders("hf").into_iter().find(|folder| folder.ends_with(name));
            let folder = folder.unwrap_or_else(|| panic!("{key}: there is no such model"));
            let model = Folder::open(&folder).unwrap().load(&Device::flex()).unwrap();
            let ([_, seq], tokens, _) = expected(&folder);
            let texts: Vec<Vec<u32>> =
                tokens.chunks(seq).map(|text| text.iter().map(|&id| id as u32).collect()).collect();
            let found = values(model.layer_features(&texts, pooling));
            compare(name, how, &tensors[key.as_str()].values, &found, STATES, true);
        }
    }
}
