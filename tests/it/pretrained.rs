//! Runs that start from trained weights.

use crate::world::{SMALL, World};

/// The tensors of a run's checkpoint, as bytes.
fn weights(world: &World, run: &str, step: u64) -> Vec<u8> {
    world.read(&format!("{run}/step-{step:08}/model.safetensors"))
}

/// A run of SMALL in `parent`, and `child.toml`, which goes on from its weights.
fn parent_and_child() -> World {
    let world = World::new(SMALL);
    world.succeeds(&["train", "recipe.toml", "--out", "parent"]);
    let child =
        format!("[model]\npretrained = \"parent\"\n[data.markov]{}", SMALL.split_once("[data.markov]").unwrap().1);
    std::fs::write(world.dir.path().join("child.toml"), child).unwrap();
    world
}

#[test]
fn a_run_starts_from_trained_weights_and_then_needs_their_folder_no_more() {
    let world = parent_and_child();
    world.succeeds(&["plan", "child.toml", "--no-probe"]);
    world.succeeds(&["train", "child.toml", "optimizer.adamw.lr=0", "training.steps=1", "--out", "still"]);
    assert_eq!(weights(&world, "parent", 12), weights(&world, "still", 1), "a step of rate 0 changes nothing");

    world.succeeds(&["train", "child.toml", "--out", "whole"]);
    let schedule = "lr_scheduler.decay=constant";
    world.succeeds(&["train", "child.toml", schedule, "--out", "constant"]);
    world.succeeds(&["train", "child.toml", schedule, "training.steps=8", "--out", "parts"]);
    // What the run keeps is a recipe that does the same again.
    let (again, _) = world.succeeds(&["validate", "whole/recipe.toml"]);
    assert!(again.contains("valid"));
    world.succeeds(&["train", "whole/recipe.toml", "--out", "again"]);
    assert_eq!(weights(&world, "whole", 12), weights(&world, "again", 12));

    std::fs::remove_dir_all(world.dir.path().join("parent")).unwrap();
    world.succeeds(&["train", "child.toml", schedule, "--out", "parts"]);
    assert_eq!(weights(&world, "constant", 12), weights(&world, "parts", 12));
    world.succeeds(&["eval", "parts"]);
    let err = world.fails(2, &["train", "child.toml", "--out", "fresh"]);
    assert!(err.contains("parent: no such checkpoint"), "{err}");
    let err = world.fails(2, &["train", "child.toml", schedule, "model.pretrained=elsewhere", "--out", "parts"]);
    assert!(err.contains("model.pretrained"), "{err}");
    // Another folder of the same name is another model, unless both are stages of one run.
    std::fs::create_dir(world.dir.path().join("far")).unwrap();
    std::fs::rename(world.dir.path().join("again"), world.dir.path().join("far/parent")).unwrap();
    world.succeeds(&["train", "child.toml", schedule, "model.pretrained=far/parent", "--out", "from-far"]);
    std::fs::rename(world.dir.path().join("far/parent"), world.dir.path().join("parent")).unwrap();
    let err = world.fails(2, &["train", "child.toml", schedule, "training.steps=14", "--out", "from-far"]);
    assert!(err.contains("model.pretrained: \"far/parent\" -> \"parent\""), "{err}");
}

#[test]
fn what_contradicts_trained_weights_is_told() {
    let world = parent_and_child();
    world.succeeds(&["train", "child.toml", "--out", "kept"]);
    let err = world.fails(2, &["train", "kept/recipe.toml", "model.decoder.rope_theta=5e5", "--out", "child"]);
    assert!(err.contains("rope_theta: 10000.0 -> 500000.0") && err.contains("leave model.decoder out"), "{err}");
    let err = world.fails(1, &["train", "child.toml", "data.markov.states=600", "--out", "child"]);
    assert!(err.contains("knows 6"), "{err}");
    std::fs::write(
        world.dir.path().join("none.toml"),
        "[model]\n[data.copy]\n[training]\nsteps=1\nseq_len=8\nbatch_size=1\n",
    )
    .unwrap();
    assert!(world.fails(2, &["validate", "none.toml"]).contains("model is empty"));
}

#[test]
fn the_tokenizer_comes_with_the_weights() {
    let text = SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]");
    let world = World::new(&text);
    let write = |name: &str, text: &str| std::fs::write(world.dir.path().join(name), text).unwrap();
    write("book.txt", &"the cat sat on the mat. ".repeat(90));
    write("other.txt", &"dogs ran; birds flew. ".repeat(90));
    for (text, path) in [("book.txt", "bpe.json"), ("other.txt", "other.json")] {
        let paths = format!("data.text.paths=[\"{text}\"]");
        world.succeeds(&["tokenizer", "train", "recipe.toml", &paths, "--vocab-size", "300", "--out", path]);
    }
    world.succeeds(&["train", "recipe.toml", "tokenizer.huggingface.path=bpe.json", "--out", "parent"]);
    std::fs::remove_file(world.dir.path().join("bpe.json")).unwrap();
    let (out, _) = world.succeeds(&["eval", "parent"]);
    assert!(out.contains("bits_per_byte"), "a checkpoint has its own tokenizer: {out}");
    write(
        "child.toml",
        &format!("[model]\npretrained = \"parent\"\n[data.text]{}", text.split_once("[data.text]").unwrap().1),
    );
    let err = world.fails(2, &["train", "child.toml", "tokenizer.huggingface.path=other.json", "--out", "child"]);
    assert!(err.contains("not the one that parent learned with") && err.contains("leave [tokenizer] out"), "{err}");
    world.succeeds(&["train", "child.toml", "--out", "child"]);
    std::fs::remove_dir_all(world.dir.path().join("parent")).unwrap();
    world.succeeds(&["train", "child.toml", "training.steps=14", "--out", "child"]);
    world.succeeds(&["generate", "child", "--max-new-tokens", "3"]);
}
