//! Classifiers, from recipe to result.

use serde_json::Value;

use crate::resume::{fingerprint, fingerprint_at};
use crate::world::{SMALL, World};

/// Three large shapes, without clutter.
pub const SHAPES: &str = r#"
[model.classifier.vision_transformer]
patch_size = 4
d_model = 32
n_layers = 1
[model.classifier.vision_transformer.attention.softmax]
n_heads = 4
[data.shapes]
size = 16
n_classes = 3
radius = 0.5
turn = 0
clutter = 0
noise = 0.1
[training]
steps = 60
batch_size = 24
[optimizer.adamw]
lr = 5e-3
[metrics]
log_freq = 5
[validation]
interval = 30
batches = 4
[checkpoint]
interval = 30
"#;

const RECIPE: &str = "recipe.toml";
const ATTENTION: &str = "model.classifier.vision_transformer.attention";
const POOLING: &str = "model.classifier.vision_transformer.pooling";

fn json(world: &World, path: &str) -> Value {
    serde_json::from_slice(&world.read(path)).unwrap()
}

#[test]
fn a_vision_transformer_learns_shapes_and_everything_about_it_is_told() {
    let world = World::new(SHAPES);
    let (out, _) = world.succeeds(&["plan", RECIPE]);
    assert!(out.contains("FLOPs per example") && out.contains("examples per second"), "{out}");
    let (out, err) = world.succeeds(&["preview", RECIPE, "--rows", "1", "augmentation.flip=true"]);
    assert!(out.contains("disc, square, triangle, disc") && err.contains("preview.png"), "{out}{err}");
    assert!(world.read("preview.png").starts_with(b"\x89PNG"));

    let (_, err) = world.succeeds(&["train", RECIPE, "--out", "run"]);
    for part in ["1 layers, attention: softmax", "examples/s", "macro f1", "calibration error", "eval run"] {
        assert!(err.contains(part), "no {part} in: {err}");
    }
    let result = json(&world, "run/result.json");
    let accuracy = result["validation"]["accuracy"].as_f64().unwrap();
    assert!(accuracy > 0.75, "chance is a third: {accuracy}");
    assert!(result["validation"]["macro_f1"].as_f64() > Some(0.7) && result["unit"] == "example", "{result:#}");
    assert_eq!(result["tokens"], 60 * 24);
    assert_eq!(result["validation"]["targets"], 96);
    let (scores, confusion) = (&result["classes"]["scores"], &result["classes"]["confusion"]);
    assert!(scores[2]["name"] == "triangle" && scores[2]["examples"] == 32, "{scores}");
    let sum: u64 =
        confusion.as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap()).map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(sum, 96);
    let log = String::from_utf8(world.read("run/metrics.jsonl")).unwrap();
    assert!(log.contains("calibration_error/validation") && log.contains("attention/layer_00/entropy"), "{log}");
    let events = std::fs::read_dir(world.dir.path().join("run")).unwrap().map(|entry| entry.unwrap().path());
    let events =
        events.filter(|path| path.to_string_lossy().contains("tfevents")).map(|path| std::fs::read(path).unwrap());
    assert!(events.into_iter().any(|bytes| bytes.windows(20).any(|part| part == b"validation/confusion")));

    let (out, err) = world.succeeds(&["eval", "run"]);
    let told: Value = serde_json::from_str(&out).unwrap();
    // The weights that were trained; sums of losses differ in their last bits, being added in another order.
    assert_eq!(told["classes"], result["classes"]);
    assert_eq!(told["score"]["macro_f1"], result["validation"]["macro_f1"]);
    assert!(err.contains("precision") && err.contains("triangle"), "{err}");
}

#[test]
fn a_run_in_two_parts_equals_a_run_in_one() {
    let world = World::new(SHAPES);
    let train = |run: &str, more: &[&str]| {
        let settings = [
            "train",
            RECIPE,
            "--out",
            run,
            "training.batch_size=8",
            "training.gradient_accumulation_steps=2",
            "augmentation={crop = 2, flip = true, noise = 0.1}",
            "loss={label_smoothing = 0.1, focal_gamma = 1, worst_class = 1}",
            "lr_scheduler.decay=constant",
            "training.dropout=0.2",
            "checkpoint.interval=4",
            "metrics.log_freq=1",
        ];
        world.succeeds(&[&settings[..], more].concat())
    };
    let pooling = format!("{POOLING}={{ggem = {{n_groups = 4}}}}");
    train("whole", &["training.steps=12", &pooling]);
    train("parts", &["training.steps=7", "validation.interval=100", &pooling]);
    let (_, err) = train("parts", &["training.steps=12", &pooling]);
    assert!(err.contains("resume: from") && err.contains("step 7"), "{err}");
    let (a, b) = (fingerprint(&world, "whole"), fingerprint(&world, "parts"));
    assert!(a.0 == b.0 && a.1 == b.1, "weights or optimiser state differ");
    assert_eq!(json(&world, "whole/result.json")["validation"], json(&world, "parts/result.json")["validation"]);
}

/// Dropout is for training: it changes what is trained, and not how a trained model is evaluated.
#[test]
fn dropout_works_while_training_only() {
    let world = World::new(SHAPES);
    let train = |run: &str, setting: &str| {
        world.succeeds(&["train", RECIPE, "--out", run, "training.steps=4", setting]);
        fingerprint_at(&world, run, 4).0
    };
    let (without, zero, with) =
        (train("a", "debug.seed=0"), train("b", "training.dropout=0"), train("c", "training.dropout=0.3"));
    assert!(without == zero && with != zero, "0 is off, and 0.3 is not");
    let eval = || world.succeeds(&["eval", "c"]).0;
    assert_eq!(eval(), eval());
    let err = world.fails(2, &["validate", RECIPE, "training.dropout=1"]);
    assert!(err.contains("training.dropout (1) must be 0 (off) to 0.99"), "{err}");
}

#[test]
fn a_classifier_starts_from_a_trained_one() {
    let world = World::new(SHAPES);
    world.succeeds(&["train", RECIPE, "--out", "parent", "training.steps=20"]);
    let parent = json(&world, "parent/result.json");
    let from = ["train", RECIPE, "model.pretrained=parent", "training.steps=1", "optimizer.adamw.lr=0"];
    let (_, err) = world.succeeds(&[&from[..], &["--out", "same"]].concat());
    assert!(err.contains("starts from the weights of parent"), "{err}");
    assert_eq!(json(&world, "same/result.json")["validation"], parent["validation"]);
    // Other classes: all but the head are the parent's.
    let (_, err) = world.succeeds(&[&from[..], &["--out", "other", "data.shapes.n_classes=4"]].concat());
    assert!(err.contains("the head is newly initialized") && err.contains("3 classes"), "{err}");
    let tensors = |run: &str| {
        let bytes = world.read(&format!("{run}/step-00000001/model.safetensors"));
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let all: Vec<(String, Vec<u8>)> =
            tensors.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect();
        all
    };
    let (same, other) = (tensors("same"), tensors("other"));
    let differ: Vec<&str> = same.iter().filter(|one| !other.contains(one)).map(|one| one.0.as_str()).collect();
    assert!(!differ.is_empty() && differ.iter().all(|name| name.contains("head")), "{differ:?}");
    // It goes on like any run.
    world.succeeds(
        &[&from[..3], &["--out", "other", "data.shapes.n_classes=4", "training.steps=2", "optimizer.adamw.lr=0"]]
            .concat(),
    );
    for (setting, words) in [
        ("model.classifier.vision_transformer.d_model=16", "d_model: 32 -> 16"),
        ("data.shapes.size=32", "was trained on inputs"),
    ] {
        let err = world.fails(2, &[&from[..], &["--out", "no", setting]].concat());
        assert!(err.contains(words), "{setting}: {err}");
    }
    std::fs::write(world.dir.path().join("decoder.toml"), SMALL).unwrap();
    world.succeeds(&["train", "decoder.toml", "--out", "decoder", "training.steps=1"]);
    let err = world.fails(2, &["train", RECIPE, "model.pretrained=decoder", "--out", "no"]);
    assert!(err.contains("is not a classifier"), "{err}");
}

#[test]
fn every_mechanism_and_pooling_drops_in() {
    let world = World::new(SHAPES);
    for (run, attention, pooling) in [
        ("hilo", "hilo={n_heads = 4, alpha = 0.5}", "\"mean\""),
        ("grouped", "grouped_differential={n_heads = 4, n_noise_heads = 2}", "{ggem = {n_groups = 1}}"),
        ("routed", "mixture_of_head={n_heads = 4, shared_heads = 2, top_k = 1}", "\"class_token\""),
        ("pooled", "softmax={n_heads = 2}", "{mltp = {n_heads = 2, n_latents = 4}}"),
    ] {
        let attention = format!("{ATTENTION}.{attention}");
        let pooling = format!("{POOLING}={pooling}");
        let (_, err) = world.succeeds(&[
            "train",
            RECIPE,
            "--out",
            run,
            "training.steps=2",
            &attention,
            &pooling,
            "optimizer.muon.lr=1e-3",
        ]);
        assert!(err.contains("accuracy"), "{err}");
        world.succeeds(&["eval", run]);
    }
}

#[test]
fn a_text_encoder_learns_what_a_text_is_about() {
    let recipe = r#"
[model.classifier.text_encoder]
d_model = 24
n_layers = 1
[model.classifier.text_encoder.attention.softmax]
n_heads = 4
[data.labelled_text]
paths = ["texts.jsonl"]
[training]
steps = 80
seq_len = 32
batch_size = 16
[loss]
class_weights = "balanced"
[optimizer.adamw]
lr = 3e-3
[validation]
batches = 0
fraction = 0.2
"#;
    let world = World::new(recipe);
    let words = ["the cat", "a dog", "my old horse", "some bird"];
    let row = |i: usize| {
        let (sound, label) = [("is glad", "good"), ("is sad", "bad")][i % 2];
        let (who, word) = (i / 2 % 4, words[i / 2 % 4].repeat(1 + i % 3));
        format!("{{\"text\": \"{word} {sound} today\", \"label\": \"{label}\", \"who\": {who}}}\n")
    };
    std::fs::write(world.dir.path().join("texts.jsonl"), (0..120).map(row).collect::<String>()).unwrap();
    let (out, _) = world.succeeds(&["preview", RECIPE]);
    assert!(out.contains("\tthe cat") || out.contains("today"), "{out}");
    world.succeeds(&["train", RECIPE, "--out", "run"]);
    let result = json(&world, "run/result.json");
    assert!(result["validation"]["accuracy"].as_f64() > Some(0.9), "{result:#}");
    assert_eq!(result["classes"]["scores"][0]["name"], "bad");
    let (out, _) = world.succeeds(&["eval", "run"]);
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["classes"], result["classes"]);
    // Groups are told apart, and the worst of them is learned from the most.
    let groups = ["data.labelled_text.group_field=who", "loss.worst_group=5"];
    world.succeeds(&[["train", RECIPE, "--out", "groups"].as_slice(), &groups].concat());
    let result = json(&world, "groups/result.json");
    let told = result["classes"]["groups"].as_array().unwrap();
    let accuracy = |group: &Value| group["accuracy"].as_f64().unwrap();
    let worst = told.iter().map(accuracy).fold(1.0, f64::min);
    assert_eq!((told.len(), &told[3]["name"]), (4, &Value::from("3")));
    assert_eq!(result["validation"]["worst_group_accuracy"].as_f64(), Some(worst), "{result:#}");
    assert!(worst > 0.8, "{result:#}");
    assert!(world.succeeds(&["eval", "groups"]).1.contains("group                     examples   accuracy"));
    // Other texts are another run.
    std::fs::write(world.dir.path().join("texts.jsonl"), (0..60).map(row).collect::<String>()).unwrap();
    let err = world.fails(1, &["train", RECIPE, "--out", "run", "training.steps=90"]);
    assert!(err.contains("is not the one that"), "{err}");
}

#[test]
fn what_makes_no_sense_for_classifiers_is_refused() {
    let world = World::new(SHAPES);
    world.succeeds(&["train", RECIPE, "--out", "run", "training.steps=1"]);
    std::fs::write(world.dir.path().join("decoder.toml"), SMALL).unwrap();
    for (code, arguments, words) in [
        (2, "generate run", "is a classifier"),
        (2, "export run --to x", "is a classifier"),
        (2, "inspect run", "has no gate over layers"),
        (2, "logits run --tokens 1 --out x", "is a classifier"),
        (2, "convert run --to grouped_query --kv-heads 1 --out x", "is a classifier"),
        (2, "grow run --signal-heads x2 --out x", "is a classifier"),
        (2, "eval run --task all", "is a classifier"),
        (2, "validate decoder.toml data.shapes.size=16", "model.classifier learns"),
        (2, "validate decoder.toml loss.focal_gamma=1", "loss is for model.classifier"),
        (2, "validate recipe.toml data.markov.states=6", "no classes"),
        (2, "validate recipe.toml training.seq_len=16", "training.seq_len (16) has no meaning"),
        (2, "validate recipe.toml lora.rank=2", "lora is for decoders"),
        (2, "validate recipe.toml procedure.bilevel.rank=2", "procedure.bilevel is for decoders"),
        (2, "validate recipe.toml data.shapes.size=18", "patch_size (4) must divide the images, 18 x 18"),
        (2, "validate recipe.toml data.shapes.noise=-1", "noise (-1)"),
        (2, "validate recipe.toml augmentation.crop=5000", "crop (5000)"),
        (2, "validate recipe.toml loss.label_smoothing=2", "label_smoothing (2)"),
        (2, "train recipe.toml --out x loss.worst_group=1", "needs data that tells at least two groups"),
        (2, "validate recipe.toml loss.worst_group=1 loss.worst_class=1", "tilted one way"),
        (2, "train recipe.toml --out x loss.class_weights.listed=[1]", "lists 1 numbers for 3 classes"),
        (
            2,
            "validate recipe.toml model.classifier.vision_transformer.attention.hilo.windows=3",
            "unknown key `windows`",
        ),
        (2, "validate recipe.toml model.classifier.vision_transformer.attention.softmax.n_heads=5", "n_heads (5)"),
        (1, "train recipe.toml --out x data.idx.images=a data.idx.labels=b", "a: No such file"),
    ] {
        let err = world.fails(code, &arguments.split(' ').collect::<Vec<_>>());
        assert!(err.contains(words), "{arguments}: {err}");
    }
}
