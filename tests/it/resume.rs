//! A run that was interrupted, killed or damaged ends with the same bits as one that was not.

use std::time::Duration;

use crate::world::{SMALL, World};

const RECIPE: &str = "recipe.toml";

/// What must be equal: the weights, the optimiser's state, and every logged number that does not measure time.
fn fingerprint(world: &World, run: &str) -> (Vec<u8>, Vec<u8>, Vec<String>) {
    let last = format!("{run}/step-00000012");
    let lines = String::from_utf8(world.read(&format!("{run}/metrics.jsonl"))).unwrap();
    let timeless = |line: &str| {
        let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
        let table = value.as_object_mut().unwrap();
        table.remove("tokens_per_second");
        table.remove("memory");
        value.to_string()
    };
    (
        world.read(&format!("{last}/model.safetensors")),
        world.read(&format!("{last}/optimizer.safetensors")),
        lines.lines().map(timeless).collect(),
    )
}

#[test]
fn a_run_in_two_parts_equals_a_run_in_one() {
    let world = World::new(SMALL);
    world.succeeds(&["train", RECIPE, "--out", "whole"]);
    world.succeeds(&["train", RECIPE, "--out", "parts", "lr_scheduler.decay=constant", "training.steps=12"]);
    // The same recipe, cut at a step that is no multiple of any interval.
    let whole = World::new(SMALL);
    whole.succeeds(&["train", RECIPE, "--out", "whole", "lr_scheduler.decay=constant"]);
    whole.succeeds(&[
        "train",
        RECIPE,
        "--out",
        "parts",
        "lr_scheduler.decay=constant",
        "training.steps=7",
        "validation.interval=100",
    ]);
    let (_, err) = whole.succeeds(&["train", RECIPE, "--out", "parts", "lr_scheduler.decay=constant"]);
    assert!(err.contains("resume: from") && err.contains("step 7"), "{err}");
    let (a, b) = (fingerprint(&whole, "whole"), fingerprint(&whole, "parts"));
    assert!(a.0 == b.0 && a.1 == b.1, "weights or optimiser state differ");
    assert_eq!(fingerprint(&world, "parts").0, a.0, "the same recipe gives the same weights");
}

#[test]
fn killed_at_any_moment_it_goes_on_bit_for_bit() {
    let world = World::new(SMALL);
    world.succeeds(&["train", RECIPE, "--out", "whole"]);
    for round in 0..6u64 {
        let mut child = world.command(&["train", RECIPE, "--out", "killed"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(40 + 45 * round));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    world.succeeds(&["train", RECIPE, "--out", "killed"]);
    assert!(fingerprint(&world, "whole") == fingerprint(&world, "killed"));
}

#[test]
#[cfg(unix)]
fn a_signal_saves_and_leaves_with_its_number() {
    let world = World::new(&SMALL.replace("steps = 12", "steps = 100000"));
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let mut child = world.command(&["train", RECIPE, "--out", "run"]).spawn().unwrap();
        let log = world.dir.path().join("run/metrics.jsonl");
        let before = std::fs::metadata(&log).map_or(0, |meta| meta.len());
        while std::fs::metadata(&log).map_or(0, |meta| meta.len()) <= before + 2000 {
            std::thread::sleep(Duration::from_millis(20));
            assert!(child.try_wait().unwrap().is_none(), "ended by itself");
        }
        std::process::Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code));
        let lines = String::from_utf8(world.read("run/metrics.jsonl")).unwrap();
        let last: serde_json::Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
        let saved = format!("run/step-{:08}/manifest.json", last["step"].as_u64().unwrap());
        assert!(world.dir.path().join(saved).exists(), "saved at the very step");
    }
}

#[test]
fn a_damaged_checkpoint_is_named_and_an_older_one_used() {
    let world = World::new(SMALL);
    world.succeeds(&["train", RECIPE, "--out", "whole"]);
    world.succeeds(&["train", RECIPE, "--out", "run"]);
    let path = world.dir.path().join("run/step-00000012/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let (_, err) = world.succeeds(&["train", RECIPE, "--out", "run"]);
    assert!(err.contains("step-00000012/model.safetensors") && err.contains("step 8"), "{err}");
    assert!(fingerprint(&world, "whole") == fingerprint(&world, "run"));
}

#[test]
fn a_changed_recipe_is_refused_with_the_keys_that_differ() {
    let world = World::new(SMALL);
    world.succeeds(&["train", RECIPE, "--out", "run"]);
    let err = world.fails(2, &["train", RECIPE, "--out", "run", "training.batch_size=2", "debug.seed=9"]);
    assert!(err.contains("training.batch_size: 4 -> 2") && err.contains("debug.seed: 0 -> 9"), "{err}");
    world.succeeds(&["train", RECIPE, "--out", "run", "training.steps=13", "metrics.log_freq=2"]);
    let err = world.fails(1, &["train", RECIPE, "--out", "run", "--resume", "never"]);
    assert!(err.contains("holds a run already"), "{err}");
}

#[test]
fn two_writers_are_refused() {
    let world = World::new(&SMALL.replace("steps = 12", "steps = 100000"));
    let mut first = world.command(&["train", RECIPE, "--out", "run"]).spawn().unwrap();
    while !world.dir.path().join("run/metrics.jsonl").exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let err = world.fails(1, &["train", RECIPE, "--out", "run"]);
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(err.contains(&first.id().to_string()), "names the holder: {err}");
}
