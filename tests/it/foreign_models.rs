//! Folders of other people in all their variety: what is left out, contradicts itself, or is broken.

use std::path::Path;

use burn::tensor::Device;
use polyhead_models::hf::Folder;
use polyhead_models::weights::{Named, NonFinite, TensorFiles, named, to_safetensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::world::{SMALL, World, project};

/// A copy of a golden folder.
fn copy(name: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(project().join("tests/golden/hf").join(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

/// A copy whose config.json has other keys; null takes a key out.
fn with(name: &str, keys: Value) -> TempDir {
    let dir = copy(name);
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let object = config.as_object_mut().unwrap();
    for (key, value) in keys.as_object().unwrap() {
        match value {
            Value::Null => drop(object.remove(key)),
            value => drop(object.insert(key.clone(), value.clone())),
        }
    }
    std::fs::write(path, config.to_string()).unwrap();
    dir
}

fn error(dir: &TempDir) -> String {
    let loaded = Folder::open(dir.path()).and_then(|folder| folder.load(&Device::flex()));
    loaded.expect_err("must be refused").to_string()
}

/// The tensors of a folder's only file, changed and written back.
fn change_tensors(dir: &Path, change: impl FnOnce(&mut Vec<Named>)) {
    let path = dir.join("model.safetensors");
    let files = TensorFiles::open(std::slice::from_ref(&path)).unwrap();
    let read = |name: &str| Named {
        name: name.to_owned(),
        shape: files.shape(name).unwrap().to_vec(),
        values: files.values(name).unwrap(),
    };
    let mut tensors: Vec<Named> = files.names().map(read).collect();
    drop(files);
    change(&mut tensors);
    std::fs::write(path, to_safetensors(&tensors, &[]).unwrap()).unwrap();
}

#[test]
fn a_head_beside_tied_embeddings_is_taken_where_it_differs() {
    let dir = copy("qwen2_v5");
    let tied = named(&Folder::open(dir.path()).unwrap().load(&Device::flex()).unwrap());
    // The same numbers: tied, without a word.
    let add = |factor: f32| {
        move |tensors: &mut Vec<Named>| {
            tensors.retain(|tensor| tensor.name != "lm_head.weight");
            let mut head = tensors.iter().find(|tensor| tensor.name.contains("embed_tokens")).unwrap().clone();
            head.name = "lm_head.weight".into();
            head.values[3] *= factor;
            tensors.push(head);
        }
    };
    change_tensors(dir.path(), add(1.0));
    let same = Folder::open(dir.path()).unwrap();
    assert!(same.notes().is_empty() && same.decoder().tie_embeddings, "{:?}", same.notes());
    assert_eq!(named(&same.load(&Device::flex()).unwrap()), tied);
    drop(same);
    change_tensors(dir.path(), add(2.0));
    let other = Folder::open(dir.path()).unwrap();
    assert!(
        !other.decoder().tie_embeddings && other.notes()[0].contains("lm_head.weight differs"),
        "{:?}",
        other.notes()
    );
    let loaded = named(&other.load(&Device::flex()).unwrap());
    let head = loaded.iter().find(|tensor| tensor.name == "head.weight").unwrap();
    let embedding = loaded.iter().find(|tensor| tensor.name == "embedding.weight").unwrap();
    // Ours is [d_model, vocab].
    assert_eq!(head.values[3 * embedding.shape[0]], 2.0 * embedding.values[3]);
    // A head of another shape does not fit, and is not thrown away.
    change_tensors(dir.path(), |tensors| {
        let head = tensors.iter_mut().find(|tensor| tensor.name == "lm_head.weight").unwrap();
        (head.shape, head.values) = (vec![2, 32], vec![0.0; 64]);
    });
    assert!(error(&dir).contains("lm_head.weight has shape [2, 32], expected [48, 32]"));
}

#[test]
fn missing_keys_are_what_transformers_takes_for_them() {
    let keyless = |name: &str, keys: Value| Folder::open(with(name, keys).path()).map_err(|error| error.to_string());
    // Mistral's window is 4096 where nothing is said, which is told; no key switches it off.
    let window = |folder: &Folder| json!(folder.decoder())["attention"]["softmax"]["window"].clone();
    let windowed = keyless("mistral_v5", json!({ "sliding_window": null })).unwrap();
    assert_eq!((window(&windowed), windowed.max_positions()), (json!(4096), 64));
    assert!(windowed.notes()[0].contains("sliding_window = 4096"), "{:?}", windowed.notes());
    let on = keyless("mistral_v5", json!({ "use_sliding_window": false, "sliding_window": 8 })).unwrap();
    assert_eq!(window(&on), json!(8));
    let heads = keyless("mistral_v5", json!({ "num_key_value_heads": null })).unwrap_err();
    assert!(
        heads.contains("n_kv_heads (8) must divide n_heads (4)") && heads.contains("num_key_value_heads"),
        "{heads}"
    );
    // Qwen's is used where it is switched on, in layers from max_window_layers on: 28 where nothing is said.
    let on = json!({ "use_sliding_window": true, "sliding_window": 8, "layer_types": null, "max_window_layers": null });
    assert_eq!(window(&keyless("qwen2_v5", on.clone()).unwrap()), Value::Null, "two layers, neither of them slides");
    let mut first = on.clone();
    first["max_window_layers"] = json!(1);
    assert_eq!(window(&keyless("qwen2_v5", first.clone()).unwrap()), json!([0, 8]));
    // Types of layers go before: what they name is what transformers makes.
    first["layer_types"] = json!(["sliding_attention", "sliding_attention"]);
    assert_eq!(window(&keyless("qwen2_v5", first.clone()).unwrap()), json!(8));
    first["use_sliding_window"] = json!(false);
    assert_eq!(window(&keyless("qwen2_v5", first.clone()).unwrap()), Value::Null, "switched off");
    first["use_sliding_window"] = json!(true);
    for (types, window, words) in [
        (json!(["chunked_attention", "full_attention"]), json!(8), "layer_types names \"chunked_attention\""),
        (json!(["sliding_attention"]), json!(8), "layer_types lists 1 layers for num_hidden_layers (2)"),
        (json!(["sliding_attention", "full_attention"]), json!(0), "sliding_window (0) must be at least 1"),
    ] {
        (first["layer_types"], first["sliding_window"]) = (types, window);
        let error = keyless("qwen2_v5", first.clone()).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    let mixed = json!({ "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] });
    assert!(keyless("mistral_v5", mixed).unwrap_err().contains("gives every layer of MistralForCausalLM one"));
    let error = keyless("qwen3_v5", json!({ "head_dim": null })).and_then(|folder| {
        assert!(folder.notes()[0].contains("head_dim = 128"), "{:?}", folder.notes());
        folder.load(&Device::flex()).map(drop).map_err(|error| error.to_string())
    });
    assert!(error.unwrap_err().contains("numbers, and the files hold"), "heads of 128 channels are not in the files");
    let few = keyless("llama_v5", json!({ "hidden_act": null, "max_position_embeddings": null, "rms_norm_eps": null }));
    assert_eq!(few.unwrap().max_positions(), 2048);
    // The kind is known by model_type where architectures says nothing.
    for (name, class) in [("llama_v5", "LlamaForCausalLM"), ("gpt_neox_v5", "GPTNeoXForCausalLM")] {
        assert_eq!(keyless(name, json!({ "architectures": null })).unwrap().family().class(), class);
    }
    for (keys, words) in [
        (json!({ "architectures": null, "model_type": null }), "architectures and model_type are missing"),
        (json!({ "architectures": null, "model_type": "gemma" }), "model_type is \"gemma\""),
        (json!({ "architectures": ["LlamaModel"] }), "architectures names \"LlamaModel\""),
        (json!({ "architectures": "LlamaForCausalLM" }), "architectures must be a list of names"),
        (json!({ "model_type": "mistral" }), "model_type is \"mistral\", which is MistralForCausalLM: make them agree"),
    ] {
        let error = keyless("llama_v5", keys).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn complaints_about_config_json_name_file_key_and_value() {
    for (keys, words) in [
        (json!({ "hidden_size": null }), "missing field `hidden_size`"),
        (
            json!({ "hidden_size": "32" }),
            "hidden_size: invalid type: string \"32\", expected a whole number, 0 or more",
        ),
        (json!({ "vocab_size": -1 }), "vocab_size: invalid value: integer `-1`, expected a whole number"),
        (json!({ "tie_word_embeddings": 1 }), "tie_word_embeddings: invalid type: integer `1`, expected true or false"),
        (json!({ "num_attention_heads": 0 }), "num_attention_heads (0) must be at least 1"),
        (json!({ "head_dim": 1u64 << 32 }), "head_dim (4294967296) must be at most"),
        (json!({ "num_attention_heads": 16384, "head_dim": 1 << 20 }), "must be at most 16777216"),
        (
            json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 0 } }),
            "rope_parameters.rope_theta (0) must be",
        ),
        (json!({ "rope_parameters": null, "rope_theta": -1.5 }), "rope_theta (-1.5) must be a positive number"),
        (json!({ "rms_norm_eps": 0 }), "rms_norm_eps"),
        (json!({ "eos_token_id": 48 }), "eos_token_id (48) must be 0 or more and below vocab_size (48)"),
        (json!({ "eos_token_id": [2, 4_294_967_295u64] }), "eos_token_id (4294967295) must be"),
        (json!({ "pad_token_id": -1 }), "pad_token_id (-1) must be"),
        (json!({ "bos_token_id": "1" }), "bos_token_id must be a number"),
    ] {
        let error = error(&with("llama_v5", keys.clone()));
        assert!(error.contains("config.json") && error.contains(words), "{keys}: {error}");
    }
    let text = |text: &str| {
        let dir = copy("llama_v5");
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        error(&dir)
    };
    assert!(
        text("{\"rope_theta\": Infinity}").contains("`\"rope_theta\": I"),
        "{}",
        text("{\"rope_theta\": Infinity}")
    );
    assert!(text("{\"vocab_size\": 1, \"rope_theta\": 1e999}").contains("rope_theta"));
    assert!(text("{\"hidden_size\": 1, \"hidden_size\": 2}").contains("hidden_size is there twice"));
    assert!(text("[]").contains("expected an object"));
    let dir = copy("llama_v5");
    std::fs::write(dir.path().join("generation_config.json"), "{\"eos_token_id\": [2, 99]}").unwrap();
    let error = error(&dir);
    assert!(error.contains("generation_config.json: eos_token_id (99)"), "{error}");
}

#[test]
fn broken_indices_and_names_are_told() {
    let index = |map: Value| {
        let dir = copy("llama_v5");
        std::fs::write(dir.path().join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string())
            .unwrap();
        error(&dir)
    };
    for name in ["../model.safetensors", "/etc/passwd", "..", "a\\b", ""] {
        let error = index(json!({ "lm_head.weight": name }));
        assert!(error.contains("index.json: weight_map.lm_head.weight") && error.contains("without a path"), "{error}");
    }
    assert!(index(json!({ "lm_head.weight": 7 })).contains("weight_map.lm_head.weight (7)"));
    assert!(index(json!({})).contains("weight_map must give a file"));
    // A tensor in two shards, both of which are named.
    let dir = copy("llama_v5");
    let [second, third] = [2, 3].map(|at| dir.path().join(format!("model-0000{at}-of-00003.safetensors")));
    std::fs::copy(&second, &third).unwrap();
    let error = error(&dir);
    assert!(
        error.contains("is in two files") && error.contains("model-00002") && error.contains("model-00003"),
        "{error}"
    );
}

#[test]
fn weights_that_are_not_finite_are_refused_unless_they_are_asked_for() {
    let dir = copy("mistral_v5");
    change_tensors(dir.path(), |tensors| {
        let tensor = tensors.iter_mut().find(|tensor| tensor.name.ends_with("layers.1.mlp.up_proj.weight")).unwrap();
        (tensor.values[0], tensor.values[33]) = (f32::NAN, f32::INFINITY);
    });
    let words = "model.safetensors: model.layers.1.mlp.up_proj.weight: 2 of 1536 values are not finite (the first is NaN at [0, 0])";
    let folder = Folder::open(dir.path()).unwrap();
    let told = folder.load(&Device::flex()).unwrap_err().to_string();
    assert!(told.contains(words), "{told}");
    assert!(folder.load_with(&Device::flex(), NonFinite::Allow, &mut |_, _| {}).is_ok());

    let world = World::new(SMALL);
    let folder = dir.path().to_str().unwrap();
    std::fs::write(
        world.dir.path().join("child.toml"),
        format!("[data.markov]{}", SMALL.split_once("[data.markov]").unwrap().1),
    )
    .unwrap();
    let pretrained = format!("model.pretrained={folder}");
    for args in [
        &["logits", folder, "--tokens", "1,2", "--out", "l.safetensors"][..],
        &["export", folder, "--to", "exported"],
        &["convert", folder, "--to", "grouped_query", "--kv-heads", "1", "--out", "converted"],
        &["train", "child.toml", &pretrained, "--out", "run"],
    ] {
        let err = world.fails(1, args);
        assert!(err.contains(words) && err.contains("--allow-nonfinite"), "{args:?}: {err}");
    }
    world.succeeds(&["logits", folder, "--tokens", "1,2", "--out", "l.safetensors", "--allow-nonfinite"]);
}

#[test]
fn a_text_is_read_behind_what_begins_texts() {
    // Ids 0 to 47 of the model: letters, and <s> as 1.
    let letters = (2..48).map(|id| (char::from_u32(b'0' as u32 + id).unwrap().to_string(), json!(id)));
    let begin_and_end = [("</s>".to_owned(), json!(0)), ("<s>".to_owned(), json!(1))];
    let vocab: serde_json::Map<String, Value> = begin_and_end.into_iter().chain(letters).collect();
    let special = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true })
    };
    let template = json!({ "type": "TemplateProcessing", "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }],
        "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } } });
    let mut tokenizer = json!({ "version": "1.0", "added_tokens": [special(0, "</s>"), special(1, "<s>")],
        "post_processor": template, "model": { "type": "BPE", "vocab": vocab, "merges": [] } });
    let dir = copy("mistral_v5");
    let write = |tokenizer: &Value| std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let world = World::new(SMALL);
    let folder = dir.path().to_str().unwrap();
    let tokens = |args: &[&str]| {
        world.succeeds(&[&["logits", folder, "--out", "l.safetensors"], args].concat());
        TensorFiles::open(&[world.dir.path().join("l.safetensors")]).unwrap().values("tokens").unwrap()
    };
    write(&tokenizer);
    assert_eq!(tokens(&["--text", "AB"]), [1.0, 17.0, 18.0]);
    let greedy = ["generate", folder, "--prompt", "AB", "--temperature", "0", "--max-new-tokens", "12"];
    let (with_begin, _) = world.succeeds(&greedy);
    tokenizer["post_processor"] = Value::Null;
    write(&tokenizer);
    assert_eq!(tokens(&["--text", "AB"]), [17.0, 18.0]);
    assert_ne!(world.succeeds(&greedy).0, with_begin, "the first token changes what is written");
    std::fs::write(dir.path().join("tokenizer_config.json"), "{\"bos_token\": \"<s>\", \"add_bos_token\": true}")
        .unwrap();
    assert_eq!(tokens(&["--text", "AB"]), [1.0, 17.0, 18.0]);
    assert_eq!(world.succeeds(&greedy).0, with_begin);
}
