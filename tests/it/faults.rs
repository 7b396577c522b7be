//! What goes wrong in the middle of a run costs as little as it can, and is told.

use std::path::Path;

use polyhead_models::weights::{from_safetensors, to_safetensors};
use polyhead_training::checkpoint::{Draft, newest_good, verify};

use crate::world::{SMALL, World};

const RECIPE: &str = "recipe.toml";
const CONSTANT: &str = "lr_scheduler.decay=constant";

fn steps_saved(world: &World, run: &str) -> Vec<String> {
    let entries = std::fs::read_dir(world.dir.path().join(run)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut steps: Vec<String> = names.filter(|name| name.starts_with("step-")).collect();
    steps.sort();
    steps
}

#[test]
fn the_best_checkpoint_is_known_from_the_checkpoints() {
    let world = World::new(&SMALL.replace("[checkpoint]", "[checkpoint]\nkeep_latest_k = 1"));
    let train =
        |run: &str, more: &[&str]| world.succeeds(&[&["train", RECIPE, CONSTANT, "--out", run], more].concat()).1;
    train("whole", &[]);
    let (best, steps) = (world.read("whole/best.json"), steps_saved(&world, "whole"));
    let stale = r#"{"step": 4, "validation_loss": 9.5, "validation_loss_bits": 4621537642612260864}"#;
    // As a kill leaves it between a checkpoint and what follows: at the last one, and in the middle.
    for (number, marker) in [None, Some("{"), Some(stale)].into_iter().enumerate() {
        let path = |run: &str| world.dir.path().join(run).join("best.json");
        let spoil = |run: &str| match marker {
            None => std::fs::remove_file(path(run)).unwrap(),
            Some(text) => std::fs::write(path(run), text).unwrap(),
        };
        spoil("whole");
        let told = train("whole", &[]);
        assert_eq!(told.contains("best.json is damaged"), marker == Some("{"), "{told}");
        assert_eq!(world.read("whole/best.json"), best, "{marker:?}");
        let parts = format!("parts-{number}");
        train(&parts, &["training.steps=8"]);
        spoil(&parts);
        train(&parts, &[]);
        assert_eq!(
            (world.read(&format!("{parts}/best.json")), steps_saved(&world, &parts)),
            (best.clone(), steps.clone())
        );
    }
}

#[test]
fn a_best_checkpoint_that_is_gone_is_told_and_the_next_one_named() {
    let world = World::new(&SMALL.replace("[checkpoint]", "[checkpoint]\nkeep_latest_k = 0"));
    world.succeeds(&["train", RECIPE, "--out", "run"]);
    let best = || serde_json::from_slice::<serde_json::Value>(&world.read("run/best.json")).unwrap();
    let step = best()["step"].as_u64().unwrap();
    std::fs::remove_dir_all(world.dir.path().join(format!("run/step-{step:08}"))).unwrap();
    let (_, err) = world.succeeds(&["train", RECIPE, "--out", "run", "training.steps=13", "validation.interval=100"]);
    let now = best()["step"].as_u64().unwrap();
    assert!(now != step || err.contains("given up"), "{err}");
    assert!(world.dir.path().join(format!("run/step-{now:08}")).exists());
}

#[test]
fn an_image_that_cannot_be_written_costs_nothing() {
    let world = World::new(SMALL);
    std::fs::create_dir_all(world.dir.path().join("run/curve.svg/in the way")).unwrap();
    let (_, err) = world.succeeds(&["train", RECIPE, "--out", "run"]);
    assert_eq!(err.matches("curve.svg: ").count(), 1, "told once: {err}");
    assert!(err.contains("warning: cannot write") && world.dir.path().join("run/result.json").exists(), "{err}");
    assert!(steps_saved(&world, "run").contains(&"step-00000012".to_owned()));
}

#[test]
#[cfg(unix)]
fn the_limit_on_files_is_an_error_with_words() {
    let world = World::new(SMALL);
    let script = format!("ulimit -f 8; exec {} train {RECIPE} --out run", env!("CARGO_BIN_EXE_polyhead"));
    let output = std::process::Command::new("sh").args(["-c", &script]).current_dir(world.dir.path()).output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("model.safetensors") && err.contains("ulimit -f"), "{err}");
    assert!(steps_saved(&world, "run").is_empty());
}

/// Weights so large that their products are none.
fn exploding() -> World {
    World::new(&SMALL.replace("steps = 12", "steps = 200\nmax_norm = 0").replace("interval = 4", "interval = 0"))
}

#[test]
fn a_run_that_ends_with_a_nan_saves_the_step_before() {
    let world = exploding();
    let train = ["train", RECIPE, "optimizer.adamw.lr=1000", "lr_scheduler.warmup_steps=150", "--out"];
    let err = world.fails(1, &[&train[..], &["stop"]].concat());
    let step: u64 = err.split("error: step ").nth(1).unwrap().split(':').next().unwrap().parse().unwrap();
    assert!(step > 1, "{err}");
    let saved = format!("stop/step-{:08}", step - 1);
    assert!(err.contains(&format!("is saved in {saved}")) && steps_saved(&world, "stop").len() == 1, "{err}");
    world.succeeds(&["eval", "stop", "--batches", "1"]);

    let skip = ["training.on_nonfinite=skip", "training.max_skipped_steps=3"];
    let err = world.fails(1, &[&train[..], &["stop"], &skip].concat());
    let last = step + 2;
    assert!(err.contains(&format!("step {last}: 3 steps in a row were left out")), "{err}");
    assert!(err.contains(&format!("is saved in stop/step-{last:08}")) && err.contains("SKIPPED"), "{err}");
    let log = String::from_utf8(world.read("stop/metrics.jsonl")).unwrap();
    assert_eq!(log.matches("\"skipped\":true").count(), 3);
    // In one go as in two.
    world.fails(1, &[&train[..], &["skip"], &skip].concat());
    let weights = |run: &str| world.read(&format!("{run}/step-{last:08}/model.safetensors"));
    assert!(weights("skip") == weights("stop"));
}

#[test]
fn data_that_asks_for_nothing_is_refused_before_the_first_step() {
    let chat = r#"
[model.decoder]
d_model = 16
n_layers = 1
[model.decoder.attention.softmax]
n_heads = 2
[data.chat]
paths = ["chats.jsonl"]
template = "template.jinja"
[training]
steps = 3
seq_len = 64
batch_size = 2
[validation]
batches = 1
"#;
    let world = World::new(chat);
    let write = |name: &str, text: &str| std::fs::write(world.dir.path().join(name), text).unwrap();
    let row = |i: usize| {
        format!(r#"{{"messages": [{{"role": "user", "content": "{i}?"}}, {{"role": "assistant", "content": "{i}"}}]}}"#)
    };
    write("chats.jsonl", &(0..40).map(row).collect::<Vec<_>>().join("\n"));
    write("template.jinja", "{% for m in message %}{{ m.role }}: {{ m.content }}\n{% endfor %}");
    world.fails(1, &["train", RECIPE, "--out", "none"]);
    assert!(!world.dir.path().join("none/metrics.jsonl").exists());
    write("template.jinja", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}");
    world.succeeds(&["train", RECIPE, "--out", "some"]);

    let labelled = r#"
[model.classifier.vision_transformer]
patch_size = 2
d_model = 16
n_layers = 1
d_ff = 16
pooling = "mean"
[model.classifier.vision_transformer.attention.softmax]
n_heads = 2
[data.csv_images]
paths = ["rows.csv"]
size = [2, 2]
[training]
steps = 2
batch_size = 2
"#;
    let world = World::new(labelled);
    let rows = |label: fn(usize) -> usize| {
        let row = |i: usize| format!("{i},{},0,255,{}", 2 * i, label(i));
        std::fs::write(world.dir.path().join("rows.csv"), (0..40).map(row).collect::<Vec<_>>().join("\n")).unwrap();
    };
    rows(|_| 1);
    let err = world.fails(1, &["train", RECIPE, "--out", "one"]);
    assert!(err.contains("one class (\"1\")") && err.contains("data.csv_images.label"), "{err}");
    rows(|i| i % 2);
    world.succeeds(&["train", RECIPE, "--out", "two"]);
}

#[test]
fn a_damaged_line_of_the_log_is_told_with_its_number() {
    let world = World::new(SMALL);
    world.succeeds(&["train", RECIPE, "--out", "run"]);
    let log = String::from_utf8(world.read("run/metrics.jsonl")).unwrap();
    let mut lines: Vec<&str> = log.lines().collect();
    lines[2] = "{\"step\": 3, \"lo";
    std::fs::write(world.dir.path().join("run/metrics.jsonl"), lines.join("\n") + "\n").unwrap();
    let (_, err) = world.succeeds(&["train", RECIPE, "--out", "run", "training.steps=13"]);
    assert!(err.contains("run/metrics.jsonl:3: damaged"), "{err}");
    assert_eq!(
        String::from_utf8(world.read("run/metrics.jsonl")).unwrap().lines().count(),
        lines.len() - 1 + 3,
        "step 13, its validation and its observation"
    );
}

/// The same checkpoint with a NaN and an infinity among its weights.
pub fn spoil(checkpoint: &Path) {
    let run = checkpoint.parent().unwrap();
    let manifest = verify(checkpoint).unwrap();
    let mut draft = Draft::begin(run, manifest.step).unwrap();
    for file in &manifest.files {
        let bytes = std::fs::read(checkpoint.join(&file.name)).unwrap();
        let bytes = if file.name == "model.safetensors" { not_finite(&bytes) } else { bytes };
        draft.file(&file.name, &bytes).unwrap();
    }
    draft.commit(manifest.info).unwrap();
}

fn not_finite(bytes: &[u8]) -> Vec<u8> {
    let mut tensors = from_safetensors(bytes).unwrap();
    let weight = tensors.values_mut().next().unwrap();
    weight.values[..2].copy_from_slice(&[f32::NAN, f32::INFINITY]);
    to_safetensors(&tensors.into_values().collect::<Vec<_>>(), &[("format", "polyhead".into())]).unwrap()
}

#[test]
fn weights_that_are_no_numbers_are_refused_unless_allowed() {
    let world = World::new(&SMALL.replace(
        "[model.decoder.attention.grouped_differential]\nn_heads = 4\nn_noise_heads = 2",
        "[model.decoder.attention.softmax]\nn_heads = 4",
    ));
    world.succeeds(&["train", RECIPE, "--out", "run"]);
    world.succeeds(&["export", "run", "--to", "exported"]);
    let foreign = world.dir.path().join("exported/model.safetensors");
    let mut bytes = std::fs::read(&foreign).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(foreign, bytes).unwrap();
    spoil(&newest_good(&world.dir.path().join("run")).unwrap().0.unwrap().0);
    for from in ["run", "exported"] {
        let pretrained = format!("model.pretrained={from}");
        let fresh = World::new(&SMALL.split("[data").nth(1).map(|rest| format!("[model]\n[data{rest}")).unwrap());
        std::fs::copy(fresh.dir.path().join(RECIPE), world.dir.path().join("fresh.toml")).unwrap();
        for (number, command) in [
            &["eval", "run", "--batches", "1"][..],
            &["logits", from, "--tokens", "1,2", "--out", "l.safetensors"],
            &["export", from, "--to", "again"],
            &["train", "fresh.toml", &pretrained, "--out", "new"],
            &["train", RECIPE, "--out", "run", "training.steps=14"],
        ]
        .into_iter()
        .enumerate()
        {
            let err = world.fails(1, command);
            assert!(err.contains("are not finite") && err.contains("--allow-nonfinite"), "{number}, {from}: {err}");
        }
        world.succeeds(&["logits", from, "--tokens", "1,2", "--out", &format!("{from}.st"), "--allow-nonfinite"]);
    }
}
