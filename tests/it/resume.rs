//! A run that was interrupted, killed or damaged ends with the same bits as one that was not.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::world::{SMALL, World};

const RECIPE: &str = "recipe.toml";

/// What must be equal: the weights, the optimiser's state, and every logged number that does not measure time.
pub fn fingerprint(world: &World, run: &str) -> (Vec<u8>, Vec<u8>, Vec<String>) {
    fingerprint_at(world, run, 12)
}

/// The same after another step than SMALL's last.
pub fn fingerprint_at(world: &World, run: &str, step: u64) -> (Vec<u8>, Vec<u8>, Vec<String>) {
    let last = format!("{run}/step-{step:08}");
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

/// What multiplies is no part of what a run is: on the CPU it is nothing at all.
#[test]
fn the_choice_of_kernels_may_change_when_a_run_goes_on() {
    let world = World::new(SMALL);
    let train = |run: &str, more: &[&str]| {
        world.succeeds(&[&["train", RECIPE, "lr_scheduler.decay=constant", "--out", run], more].concat())
    };
    train("plain", &[]);
    train("run", &["training.steps=7"]);
    let err = world.fails(1, &["train", RECIPE, "--out", "run", "training.products=cublaslt"]);
    assert!(err.contains("training.products = \"cublaslt\" on device flex") && err.contains("\"burn\""), "{err}");
    train("run", &["training.tensor_cores=false"]);
    let (plain, run) = (fingerprint(&world, "plain"), fingerprint(&world, "run"));
    assert!((plain.0, plain.1) == (run.0, run.1), "weights or state differ");
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
    let result =
        |run: &str| serde_json::from_slice::<serde_json::Value>(&whole.read(&format!("{run}/result.json"))).unwrap();
    let (a, b) = (result("whole"), result("parts"));
    assert_eq!(a["validation"], b["validation"], "the result is that of the weights");
    assert!(
        a["validation"]["targets"] == 128 && a["tokens"] == 12 * 2 * 4 * 16 && a["parameters"].as_u64() > Some(100)
    );
    assert!(a["selection"]["targets"] == 64 && a["tokens_per_second"].as_f64() > Some(1.0), "{a:#}");
    let a = fingerprint(&whole, "whole");
    assert_eq!(fingerprint(&world, "parts").0, a.0, "the same recipe gives the same weights");
}

#[test]
fn fast_weights_are_drawn_again_as_they_were() {
    let world = World::new(SMALL);
    let train = |run: &str, more: &[&str]| {
        let all = ["train", RECIPE, "procedure.bilevel.rank=2", "lr_scheduler.decay=constant", "--out", run];
        world.succeeds(&[&all[..], more].concat())
    };
    train("whole", &[]);
    train("parts", &["training.steps=7", "validation.interval=100"]);
    train("parts", &[]);
    let (a, b) = (fingerprint(&world, "whole"), fingerprint(&world, "parts"));
    assert!(a.0 == b.0 && a.1 == b.1, "weights or optimiser state differ");
}

/// 20 kills of running processes, at moments spread evenly but in no order over a part of the run. With a checkpoint
/// after every step most of them fall into saves; `.tmp-` folders left behind prove that some did.
#[test]
fn killed_at_any_moment_it_goes_on_bit_for_bit() {
    const STEPS: u64 = 40;
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]"));
    // Short enough that the kills fall into several epochs.
    std::fs::write(world.dir.path().join("book.txt"), "The cat sat on the mat and thought. ".repeat(60)).unwrap();
    let train = |run: &str| {
        let steps = format!("training.steps={STEPS}");
        world.command(&["train", RECIPE, &steps, "checkpoint.interval=1", "--out", run])
    };
    let started = Instant::now();
    assert!(train("whole").output().unwrap().status.success());
    let (whole, duration) = (fingerprint_at(&world, "whole", STEPS), started.elapsed());

    let (mut kills, mut inside_saves, mut folder) = (0u32, 0, 0);
    while kills < 20 || inside_saves < 3 {
        assert!(kills < 200, "no kill fell into a save");
        // A process that is quicker than thought ends by itself: then another run is killed.
        let run = format!("killed-{folder}");
        let mut child = train(&run).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(duration.mul_f64(0.005 + 0.01 * f64::from(kills * 7 % 20)));
        match child.try_wait().unwrap() {
            Some(status) => {
                assert!(status.success());
                assert!(fingerprint_at(&world, &run, STEPS) == whole, "after {kills} kills");
                folder += 1;
            }
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
                let left = std::fs::read_dir(world.dir.path().join(&run)).into_iter().flatten();
                let mut names = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
                inside_saves += u32::from(names.any(|name| name.starts_with(".tmp-step")));
            }
        }
    }
    let run = format!("killed-{folder}");
    assert!(train(&run).output().unwrap().status.success());
    assert!(fingerprint_at(&world, &run, STEPS) == whole, "after {kills} kills, {inside_saves} inside saves");
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

/// Each file by its name, where a run falls back to an older checkpoint and where nothing else is asked for.
#[test]
fn a_checkpoint_that_lacks_its_manifest_or_holds_something_else_is_named() {
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]"));
    std::fs::write(world.dir.path().join("book.txt"), "The cat sat on the mat. ".repeat(60)).unwrap();
    world.succeeds(&["train", RECIPE, "--out", "run"]);
    world.succeeds(&["train", RECIPE, "--out", "wider", "model.decoder.d_model=32"]);
    let last = world.dir.path().join("run/step-00000012");
    // Whole, but of another model, and of another kind.
    for (name, bytes, words) in [
        ("model.safetensors", world.read("wider/step-00000012/model.safetensors"), "do not fit the model"),
        ("model.safetensors", b"no weights".to_vec(), "model.safetensors"),
        ("tokenizer.json", b"{".to_vec(), "tokenizer.json"),
        ("tokenizer_config.json", b"{".to_vec(), "tokenizer_config.json"),
    ] {
        let copy = world.dir.path().join("copy");
        std::fs::create_dir_all(&copy).unwrap();
        for entry in std::fs::read_dir(&last).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
        }
        std::fs::write(copy.join(name), bytes).unwrap();
        seal(&copy);
        let err = world.fails(1, &["generate", "copy", "--max-new-tokens", "1"]);
        assert!(err.contains(&format!("copy/{name}")) && err.contains(words), "{name}: {err}");
    }
    std::fs::remove_file(last.join("manifest.json")).unwrap();
    let err = world.fails(1, &["eval", "run/step-00000012"]);
    assert!(err.contains("run/step-00000012 is no complete checkpoint: manifest.json is missing"), "{err}");
    let (_, err) = world.succeeds(&["eval", "run"]);
    assert!(err.contains("manifest.json is missing"), "{err}");
}

/// Makes a manifest fit what the files hold.
fn seal(checkpoint: &std::path::Path) {
    let path = checkpoint.join("manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for entry in manifest["files"].as_array_mut().unwrap() {
        let bytes = std::fs::read(checkpoint.join(entry["name"].as_str().unwrap())).unwrap();
        entry["bytes"] = bytes.len().into();
        entry["blake3"] = blake3::hash(&bytes).to_string().into();
    }
    manifest["manifest_blake3"] = "0".repeat(64).into();
    let text = format!("{manifest:#}\n");
    manifest["manifest_blake3"] = blake3::hash(text.as_bytes()).to_string().into();
    std::fs::write(path, format!("{manifest:#}\n")).unwrap();
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
fn a_changed_text_is_refused() {
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]"));
    let write = |text: &str| std::fs::write(world.dir.path().join("book.txt"), text.repeat(60)).unwrap();
    write("The cat sat on the mat and thought. ");
    world.succeeds(&["train", RECIPE, "--out", "run"]);
    write("The dog sat on the mat and thought. ");
    let err = world.fails(1, &["train", RECIPE, "--out", "run", "training.steps=20"]);
    assert!(
        err.contains("the text is not the one that run/step-00000012 learned from, which was 1 text file"),
        "{err}"
    );
    assert!(world.succeeds(&["eval", "run"]).1.contains("warning: the text is not the one"));
    write("The cat sat on the mat and thought. ");
    world.succeeds(&["train", RECIPE, "--out", "run", "training.steps=13"]);
    // A run folder stands for its newest checkpoint.
    let (_, err) = world.succeeds(&["train", RECIPE, "--out", "run", "training.steps=14", "--resume", "run"]);
    assert!(err.contains("(step 13)") && !err.contains("given up"), "{err}");
    let older = ["train", RECIPE, "--out", "run", "training.steps=14", "--resume", "run/step-00000013"];
    let (_, err) = world.succeeds(&older);
    assert!(err.contains("given up: run/step-00000014"), "{err}");
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
