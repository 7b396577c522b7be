//! Interventions as a user has them: files on the command line, and a table of a recipe.

use crate::world::{SMALL, World};

fn write(world: &World, name: &str, text: &str) {
    std::fs::write(world.dir.path().join(name), text).unwrap();
}

fn loss(world: &World, args: &[&str]) -> f64 {
    let (out, _) = world.succeeds(&[&["eval"], args].concat());
    serde_json::from_str::<serde_json::Value>(&out).unwrap()["loss"].as_f64().unwrap()
}

#[test]
fn files_change_what_a_model_computes_and_recipes_what_it_is_trained_with() {
    let world = World::new(SMALL);
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    let plain = loss(&world, &["run"]);
    write(&world, "off.toml", "[[edits]]\nsite = \"attn.hook_z\"\nchange = { scale = 0 }\n");
    write(&world, "same.toml", "[[edits]]\nsite = \"layers.1.z\"\nchange = { scale = 1 }\n");
    let off = loss(&world, &["run", "--intervention", "off.toml"]);
    assert_ne!(off, plain);
    assert_eq!(loss(&world, &["run", "--intervention", "same.toml"]), plain);
    let logits = |out: &str, more: &[&str]| {
        world.succeeds(&[&["logits", "run", "--tokens", "1,2,3", "--out", out], more].concat());
        world.read(out)
    };
    assert_eq!(logits("a", &[]), logits("b", &["--intervention", "same.toml"]));
    assert_ne!(logits("c", &[]), logits("d", &["--intervention", "off.toml"]));
    world.succeeds(&["inspect", "run", "--intervention", "off.toml", "--out", "seen"]);
    let numbers: serde_json::Value = serde_json::from_slice(&world.read("seen/inspect.json")).unwrap();
    let heads = numbers.as_array().unwrap();
    // Two layers of two signal heads; what is switched off has no importance.
    assert_eq!(heads.len(), 4);
    assert!(heads.iter().all(|head| head["importance"] == 0.0 && head["previous_token"].as_f64().unwrap() > 0.0));

    let with = format!("{SMALL}[[intervention.edits]]\nsite = \"z\"\nlayers = [1]\nchange = {{ scale = 0 }}\n");
    write(&world, "with.toml", &with);
    world.succeeds(&["validate", "with.toml"]);
    world.succeeds(&["train", "with.toml", "--out", "trained"]);
    // What it was trained with is there wherever it is used, unless another one is named.
    let own = loss(&world, &["trained"]);
    write(&world, "first.toml", "[[edits]]\nsite = \"z\"\nlayers = [0]\nchange = { scale = 0 }\n");
    assert_ne!(loss(&world, &["trained", "--intervention", "first.toml"]), own);
    // Its second layer's attention learned nothing: nothing of it reached the loss.
    write(&world, "second.toml", "[[edits]]\nsite = \"attn_out\"\nlayers = [1]\nchange = { scale = 0 }\n");
    assert_eq!(loss(&world, &["trained", "--intervention", "second.toml"]), own);
    assert!(world.fails(2, &["validate", "with.toml", "intervention.edits=[]"]).contains("edits is empty"));
    let beyond = "intervention.edits=[{site=\"z\",heads=[9],change={scale=1}}]";
    let told = world.fails(2, &["train", "with.toml", "--out", "never", beyond]);
    assert!(told.contains("intervention.edits.0.heads") && told.contains("has 2, from 0"), "{told}");
    assert!(!world.dir.path().join("never/metrics.jsonl").exists());
}

#[test]
fn mistakes_are_told_with_their_place_before_anything_runs() {
    let world = World::new(SMALL);
    world.succeeds(&["train", "recipe.toml", "--out", "run", "training.steps=2", "lr_scheduler.warmup_steps=1"]);
    let scaled = |line: &str| format!("[[edits]]\nsite = \"z\"\n{line}\nchange = {{ scale = 0 }}\n");
    for (text, code, words) in [
        (
            "[[edits]]\nsite = \"blocks.1.attn.hook_patern\"\nchange = { scale = 0 }\n".into(),
            2,
            vec!["e.toml:2", "did you mean \"blocks.1.attn.hook_pattern\""],
        ),
        (scaled("heads = [0, 2]"), 2, vec!["e.toml:3", "head 2", "has 2, from 0"]),
        (scaled("layers = [2]"), 2, vec!["e.toml:3", "layer 2", "has 2, from 0"]),
        (scaled("kv_heads = [0]"), 2, vec!["e.toml:3", "query heads, heads"]),
        (scaled("headz = [0]"), 2, vec!["e.toml:3", "unknown key `headz`", "did you mean `heads`"]),
        (scaled("tokens = \"context\""), 2, vec!["\"context\"", "whose tokens are whose", "hint"]),
        (scaled("tokens = { text = \"a\" }"), 2, vec!["e.toml:3", "no tokenizer"]),
        ("tensors = \"x\"\n[[edits]]\nsite = \"z\"\nchange = { scale = \"g\" }\n".into(), 1, vec!["cannot read x"]),
        ("".into(), 2, vec!["edits is empty"]),
    ] {
        write(&world, "e.toml", &text);
        let told = world.fails(code, &["eval", "run", "--intervention", "e.toml"]);
        assert!(words.iter().all(|word| told.contains(word)), "{text}: {told}");
    }
    assert!(world.fails(2, &["eval", "run", "--intervention", "nowhere.toml"]).contains("nowhere.toml"));
}
