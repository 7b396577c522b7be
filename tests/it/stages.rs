//! Recipes in stages: runs and conversions that are handed over in one run.

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use crate::resume::fingerprint_at;
use crate::world::World;

/// A parent, whose heads are searched, fused and collapsed, and that is trained on.
const STAGED: &str = r#"
[model.decoder]
d_model = 16
n_layers = 2
[model.decoder.attention.softmax]
n_heads = 4
[data.markov]
states = 6
[training]
steps = 8
seq_len = 16
batch_size = 4
[metrics]
log_freq = 1
[validation]
interval = 4
batches = 2
[checkpoint]
interval = 4
[[stage]]
name = "parent"
[[stage]]
name = "search"
convert = { to = "decoupled_head", kv_budget = 0.4, fusing = true }
[[stage]]
name = "fuse"
[stage.recipe.procedure.fusion]
[stage.recipe.training]
steps = 120
[[stage]]
name = "collapse"
convert = { to = "decoupled_head" }
[[stage]]
name = "train on"
[stage.recipe.lr_scheduler]
decay = "constant"
"#;

const TRAIN: [&str; 3] = ["train", "recipe.toml", "--out"];

fn json(world: &World, path: &str) -> Value {
    serde_json::from_slice(&world.read(path)).unwrap()
}

/// Killed while heads are fused, and with a conversion cut off, a run in stages ends with the same bits.
#[test]
fn stages_are_handed_over_and_go_on_where_they_were_killed() {
    let world = World::new(STAGED);
    let exists = |path: &str| world.dir.path().join(path).exists();
    let (_, err) = world.succeeds(&[&TRAIN[..], &["whole"]].concat());
    for told in
        ["stage 1 of 5, parent: training", "stage 2 of 5, search: conversion", "stage 5 of 5, train on: training"]
    {
        assert!(err.contains(told), "{told}: {err}");
    }
    let mut child = world.command(&[&TRAIN[..], &["parts"]].concat());
    let mut child = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !exists("parts/3-fuse/step-00000008/manifest.json") {
        std::thread::sleep(Duration::from_millis(2));
        assert!(child.try_wait().unwrap().is_none(), "ended by itself");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!exists("parts/3-fuse/result.json"), "killed within the stage");
    std::fs::remove_file(world.dir.path().join("parts/2-search/conversion.json")).unwrap();
    std::fs::remove_file(world.dir.path().join("parts/2-search/recipe.toml")).unwrap();
    // The folder may be called otherwise meanwhile.
    std::fs::rename(world.dir.path().join("parts"), world.dir.path().join("moved")).unwrap();
    let (_, err) = world.succeeds(&[&TRAIN[..], &["./moved"]].concat());
    assert!(err.contains("parent: finished before") && err.contains("resume: from ./moved/3-fuse"), "{err}");
    std::fs::rename(world.dir.path().join("moved"), world.dir.path().join("parts")).unwrap();
    for (stage, step) in [("1-parent", 8), ("2-search", 0), ("3-fuse", 120), ("4-collapse", 0), ("5-train-on", 8)] {
        let of = |run: &str| match step {
            0 => (world.read(&format!("{run}/{stage}/step-00000000/model.safetensors")), Vec::new(), Vec::new()),
            _ => fingerprint_at(&world, &format!("{run}/{stage}"), step),
        };
        assert!(of("whole") == of("parts"), "{stage}");
    }
    let reached = |run: &str| json(&world, &format!("{run}/result.json"))["validation"].clone();
    assert_eq!(reached("whole"), reached("parts"));
    assert_eq!(reached("parts"), reached("parts/5-train-on"), "the last stage's result is the run's");
    assert_eq!(json(&world, "whole/stages.json"), json(&world, "parts/stages.json"));

    let stages = json(&world, "parts/stages.json");
    let number = |at: usize, key: &str| stages[at][key].as_f64().unwrap();
    assert!(stages[0]["loss_before"].is_null() && stages[1]["steps"].is_null());
    for at in 1..5 {
        assert!((number(at, "loss_before") - number(at - 1, "loss")).abs() < 1e-6, "stage {at}: {stages:#}");
    }
    assert_eq!(number(1, "divergence"), 0.0, "fusion begins as the parent");
    assert!(number(3, "divergence") < 1e-6, "the collapse changes nothing: {stages:#}");
    assert_eq!(number(4, "kv_bytes_per_token"), number(0, "kv_bytes_per_token") * 6.0 / 16.0);

    // The whole folder stands for its last stage.
    let eval = |run: &str| world.succeeds(&["eval", run]).0;
    assert_eq!(eval("parts"), eval("parts/5-train-on"));
    let (_, err) = world.succeeds(&[&TRAIN[..], &["parts"]].concat());
    assert_eq!(err.matches("finished before").count(), 5, "{err}");
}

#[test]
fn stages_that_have_changed_are_refused() {
    let world = World::new(&STAGED.replace("steps = 120", "steps = 9"));
    world.succeeds(&[&TRAIN[..], &["run"]].concat());
    let fails = |more: &[&str]| world.fails(2, &[&TRAIN[..], &["run"], more].concat());
    assert!(fails(&["training.batch_size=2"]).contains("training.batch_size: 4 -> 2"));
    assert!(fails(&["training.steps=9"]).contains("stage `parent` had training.steps = 8"));
    let change = |from: &str, to: &str| {
        let changed = STAGED.replace("steps = 120", "steps = 9").replace(from, to);
        std::fs::write(world.dir.path().join("recipe.toml"), changed).unwrap();
    };
    change("kv_budget = 0.4", "kv_budget = 0.5");
    assert!(fails(&[]).contains("stage `search` was another conversion"));
    // Only the last stage may take longer.
    change("decay = \"constant\"", "decay = \"constant\"\n[stage.recipe.training]\nsteps = 12");
    world.succeeds(&[&TRAIN[..], &["run"]].concat());
    assert_eq!(json(&world, "run/result.json")["steps"], 12);
    let err = world.fails(1, &[&TRAIN[..], &["run", "--resume", "never"]].concat());
    assert!(err.contains("holds a run already"), "{err}");
}

#[test]
fn stages_are_checked_planned_and_shown_before_they_run() {
    let world = World::new(STAGED);
    world.succeeds(&["validate", "recipe.toml"]);
    let (out, _) = world.succeeds(&["plan", "recipe.toml", "--no-probe"]);
    for told in ["stage 1 of 5: parent", "embedding", "kv_budget = 0.4", "120 of 64 tokens: 7,680 in all", "known once"]
    {
        assert!(out.contains(told), "{told}: {out}");
    }
    let (out, _) = world.succeeds(&["cat", "recipe.toml"]);
    assert!(out.contains("# stage 3 of 5: fuse") && out.contains("[procedure.fusion]"), "{out}");
    assert!(world.fails(2, &["preview", "recipe.toml"]).contains("is a run in stages"));
    for (from, to, words) in [
        ("name = \"fuse\"", "name = \"Search\"", "two stages have this name"),
        ("name = \"fuse\"", "nam = \"fuse\"", "did you mean `name`?"),
        ("fusing = true }", "fusing = true, kv_head = 1 }", "did you mean `kv_heads`?"),
        ("kv_budget = 0.4, fusing", "search = \"dynamic\", pool = \"best\", fusing", "pool"),
        ("to = \"decoupled_head\" }", "to = \"grouped_query\" }", "--kv-heads"),
        (
            "[stage.recipe.training]",
            "[stage.recipe.model.decoder]\nd_model = 8\n[stage.recipe.training]",
            "leave model out",
        ),
        ("[stage.recipe.training]", "[stage.recipe.trainin]", "unknown key `trainin`"),
        (
            "[stage.recipe.lr_scheduler]",
            "convert = { to = \"decoupled_head\" }\n[stage.recipe.lr_scheduler]",
            "make two stages",
        ),
        ("[[stage]]\nname = \"parent\"\n", "", "there is nothing yet"),
    ] {
        let changed = STAGED.replace(from, to);
        assert_ne!(changed, STAGED);
        std::fs::write(world.dir.path().join("wrong.toml"), changed).unwrap();
        let err = world.fails(2, &["validate", "wrong.toml"]);
        assert!(err.contains(words), "{to}: {err}");
    }
}
