//! Fine-tuning with a token that asks for answers from the context.

use std::fmt::Write;

use polyhead_kernels::comparison::{Tolerance, assert_close};
use safetensors::SafeTensors;

use crate::world::{SMALL, World};

/// Conversations of which every second answer depends on its context, and a base run that knows no indicator.
fn world() -> World {
    let chat = "[data.chat]\npaths = [\"chats.jsonl\"]\ntemplate = \"plain\"";
    let recipe = SMALL.replace("[data.markov]\nstates = 6", chat).replace("seq_len = 16", "seq_len = 48");
    let world = World::new(&recipe);
    let (mut chats, mut scores) = (String::new(), String::new());
    for at in 1..=24 {
        let _ = writeln!(
            chats,
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{at}\"}}, {{\"role\": \"assistant\", \"content\": \"b{at}\"}}]}}"
        );
        let score = if at % 2 == 0 { 0.9 } else { 0.1 };
        let _ = writeln!(
            scores,
            "{{\"row\": {at}, \"message\": 1, \"tokens\": 2, \"score\": {score}, \"depends\": false}}"
        );
    }
    std::fs::write(world.dir.path().join("chats.jsonl"), chats).unwrap();
    std::fs::write(world.dir.path().join("scores.jsonl"), scores).unwrap();
    let (_, rest) = recipe.split_once("[data.chat]").unwrap();
    let marked = format!(
        "[model]\npretrained = \"run\"\n[data.chat]\nindicator = {{ above = 0.6, scores = \"scores.jsonl\" }}{rest}"
    );
    std::fs::write(world.dir.path().join("marked.toml"), marked).unwrap();
    world
}

#[test]
fn the_token_is_learned_saved_and_exported() {
    let world = world();
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    let (_, err) = world.succeeds(&["train", "marked.toml", "--out", "whole", "lr_scheduler.decay=constant"]);
    assert!(err.contains("12 messages of users are marked with [IND]"), "{err}");
    let (rows, _) = world.succeeds(&["preview", "marked.toml", "--rows", "6"]);
    assert!(rows.contains("258 \"[IND]\""), "{rows}");
    let embedding = |path: &str| {
        let bytes = world.read(path);
        SafeTensors::deserialize(&bytes).unwrap().tensor("embedding.weight").unwrap().shape().to_vec()
    };
    assert_eq!(embedding("run/step-00000012/model.safetensors"), [258, 16]);
    assert_eq!(embedding("whole/step-00000012/model.safetensors"), [259, 16]);
    let parts = ["train", "marked.toml", "--out", "parts", "lr_scheduler.decay=constant"];
    world.succeeds(&[&parts[..], &["training.steps=7", "validation.interval=100"]].concat());
    world.succeeds(&parts);
    let weights = |run: &str| world.read(&format!("{run}/step-00000012/model.safetensors"));
    assert_eq!(weights("parts"), weights("whole"));
    let kept = String::from_utf8(world.read("whole/step-00000012/tokenizer.json")).unwrap();
    assert!(kept.contains("[IND]"));
    // Trained on, the model has the token already.
    world.succeeds(&["train", "marked.toml", "--out", "more", "model.pretrained=\"whole\"", "training.steps=1"]);
    assert_eq!(embedding("more/step-00000001/model.safetensors"), [259, 16]);
    let (out, _) = world.succeeds(&["generate", "whole", "--prompt", "7. [IND]", "--max-new-tokens", "3"]);
    assert!(out.starts_with("7. [IND]"), "{out}");
    // What is exported knows the token and its row, and says the same.
    world.succeeds(&["export", "whole", "--out", "exported"]);
    let tokenizer: serde_json::Value = serde_json::from_slice(&world.read("exported/tokenizer.json")).unwrap();
    let added = tokenizer["added_tokens"].as_array().unwrap();
    assert!(added.iter().any(|token| token["id"] == 258 && token["content"] == "[IND]"), "{added:?}");
    let again = world.succeeds(&["generate", "exported", "--prompt", "7. [IND]", "--max-new-tokens", "3"]).0;
    assert_eq!(again, out);
    let logits = |folder: &str, out: &str| {
        world.succeeds(&["logits", folder, "--tokens", "60,258,61", "--out", out]);
        let bytes = world.read(out);
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let logits = tensors.tensor("logits").unwrap();
        assert_eq!(logits.shape().last(), Some(&259));
        logits.data().as_chunks::<4>().0.iter().map(|&four| f32::from_le_bytes(four)).collect::<Vec<_>>()
    };
    assert_close("logits", &logits("exported", "a"), &logits("whole", "b"), Tolerance::absolute(1e-5));
}

#[test]
fn mistakes_are_told_before_anything_is_trained() {
    let world = world();
    world.succeeds(&["train", "recipe.toml", "--out", "run", "training.steps=1"]);
    for (change, words) in [
        ("data.chat.indicator.token=two words", "must be a word without spaces"),
        ("data.chat.indicator.wait=1", "unknown key `wait`"),
        ("data.chat.paths=[\"chats.jsonl\", \"more.jsonl\"]", "takes scores of one file, and data.chat.paths names 2"),
        ("lora.rank=4", "whose row lora does not train"),
        ("freeze.parameters=[\"embedding.*\"]", "whose row freeze does not train"),
    ] {
        let err = world.fails(2, &["validate", "marked.toml", change]);
        assert!(err.contains(words), "{change}: {err}");
    }
    let train = ["train", "marked.toml", "--out", "other"];
    let missing = "data.chat.indicator.scores=none.jsonl";
    assert!(world.fails(1, &[&train[..], &[missing]].concat()).contains("none.jsonl"));
    std::fs::copy(world.dir.path().join("chats.jsonl"), world.dir.path().join("chats2.jsonl")).unwrap();
    let err = world.fails(1, &[&train[..], &["data.chat.paths=[\"chats*.jsonl\"]"]].concat());
    assert!(err.contains("takes scores of one file") && err.contains("chats2.jsonl"), "{err}");
    std::fs::write(world.dir.path().join("scores.jsonl"), "{\"row\": 1, \"message\": 1, \"score\": 0.5}\n").unwrap();
    let err = world.fails(1, &train);
    assert!(err.contains("chats.jsonl:2") && err.contains("no score for message 1"), "{err}");
}
