//! Runs with LoRA keep what they learn, beside a base model that is found again.

use std::fs;

use polyhead_models::weights::TensorFiles;
use serde_json::{Value, json};

use crate::world::{SMALL, World};

const TUNE: [&str; 7] = [
    "train",
    "recipe.toml",
    "lora.rank=2",
    "lora.targets=[\"q_proj\", \"v_proj\", \"down_proj\"]",
    "lr_scheduler.decay=constant",
    "optimizer.adamw.lr=0.02",
    "checkpoint.keep_latest_k=0",
];

/// A folder with a base model, as a run (`base`) and in Hugging Face's format (`exported`), and a recipe that reads its text.
fn world() -> World {
    let recipe = SMALL
        .replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"text.txt\"]")
        .replace("grouped_differential]\nn_heads = 4\nn_noise_heads = 2", "softmax]\nn_heads = 4\nn_kv_heads = 2");
    let world = World::new(&recipe);
    fs::write(world.dir.path().join("text.txt"), "the cat sat on the mat. ".repeat(80)).unwrap();
    world.succeeds(&["train", "recipe.toml", "--out", "base"]);
    world.succeeds(&["export", "base", "--out", "exported"]);
    world
}

/// Trains pairs beside a base.
fn tune(world: &World, base: &str, run: &str, more: &[&str]) -> String {
    let base = format!("model.pretrained={base}");
    world.succeeds(&[&TUNE[..], &[&base, "--out", run], more].concat()).1
}

fn move_to(world: &World, from: &str, to: &str) {
    let path = |name: &str| world.dir.path().join(name);
    fs::create_dir_all(path(to).parent().unwrap()).unwrap();
    fs::rename(path(from), path(to)).unwrap();
}

const ASK: [&str; 4] = ["--text", "the cat", "--out", "logits"];

/// Logits of a folder.
fn logits(world: &World, args: &[&str]) -> Vec<f32> {
    let _ = fs::remove_file(world.dir.path().join("logits"));
    world.succeeds(&[&["logits"], args, &ASK[..]].concat());
    TensorFiles::open(&[world.dir.path().join("logits")]).unwrap().values("logits").unwrap()
}

#[test]
fn a_run_keeps_its_pairs_alone_and_goes_on_to_the_same_bits() {
    let world = world();
    for base in ["base", "exported"] {
        let [whole, parts] = ["whole", "parts"].map(|run| format!("{base}-{run}"));
        tune(&world, base, &whole, &[]);
        tune(&world, base, &parts, &["training.steps=7", "validation.interval=100"]);
        let err = tune(&world, base, &parts, &[]);
        assert!(err.contains("resume: from"), "{err}");
        let file = |run: &str, name: &str| world.read(&format!("{run}/step-00000012/{name}"));
        for name in ["adapter.safetensors", "optimizer.safetensors", "base.json"] {
            assert!(file(&whole, name) == file(&parts, name), "{base}: {name} differs");
        }
        let step = world.dir.path().join(&whole).join("step-00000012");
        assert!(!step.join("model.safetensors").exists());
        let adapter = TensorFiles::open(&[step.join("adapter.safetensors")]).unwrap();
        assert!(adapter.names().all(|name| name.starts_with("lora.")) && adapter.names().count() == 2 * 2 * 3);
        assert_ne!(logits(&world, &[&whole]), logits(&world, &[base]), "pairs take part");
        // What a pair learned is folded in, so that the export and a run that starts from it compute the same.
        world.succeeds(&["export", &whole, "--out", &format!("{base}-merged")]);
        assert_eq!(logits(&world, &[&format!("{base}-merged")]), logits(&world, &[&whole]));
        tune(&world, &whole, &format!("{base}-again"), &["training.steps=1", "optimizer.adamw.lr=0.0"]);
        assert_eq!(logits(&world, &[&format!("{base}-again")]), logits(&world, &[&whole]));
        world.succeeds(&["eval", &whole]);
    }
    // Beside weights that are drawn there is nothing to come back to: all are kept, as they always were.
    world.succeeds(&[&TUNE[..], &["--out", "fresh"]].concat());
    assert!(world.dir.path().join("fresh/step-00000012/model.safetensors").exists());
    world.succeeds(&["eval", "fresh"]);
    let (disk, _) =
        world.succeeds(&[&["plan", "recipe.toml", "--no-probe"], &TUNE[2..6], &["model.pretrained=base"]].concat());
    let (full, _) = world.succeeds(&["plan", "recipe.toml", "--no-probe"]);
    let bytes = |plan: &str| plan.lines().find(|line| line.starts_with("disk")).unwrap().to_owned();
    assert_ne!(bytes(&disk), bytes(&full));
}

#[test]
fn weights_beside_which_pairs_are_trained_may_be_rounded_and_stay_so() {
    let world = world();
    let rounded = ["model.pretrained_dtype=bf16"];
    for base in ["base", "exported"] {
        let [whole, parts, exact] = ["whole", "parts", "exact"].map(|run| format!("{base}-{run}"));
        tune(&world, base, &whole, &rounded);
        tune(&world, base, &parts, &[&rounded[..], &["training.steps=7", "validation.interval=100"]].concat());
        tune(&world, base, &parts, &rounded);
        tune(&world, base, &exact, &[]);
        let adapter = |run: &str| world.read(&format!("{run}/step-00000012/adapter.safetensors"));
        assert!(adapter(&whole) == adapter(&parts), "{base}: a resumed run differs");
        assert!(adapter(&whole) != adapter(&exact), "{base}: nothing was rounded");
        // Whoever reads the run reads rounded weights, in whichever type: here with pairs that have learned nothing.
        let still = format!("{base}-still");
        tune(&world, base, &still, &[rounded[0], "training.steps=1", "optimizer.adamw.lr=0.0"]);
        assert!(logits(&world, &[&still]) != logits(&world, &[base]), "{base}: read without rounding");
        world.succeeds(&["export", &whole, "--out", &format!("{base}-merged")]);
        assert_eq!(logits(&world, &[&format!("{base}-merged")]), logits(&world, &[&whole]));
        world.succeeds(&["eval", &whole]);
    }
    let weights = |args: &[&str]| {
        let plan = world.succeeds(&[&["plan", "recipe.toml", "--no-probe"], &TUNE[2..6], args].concat()).0;
        plan.lines().find(|line| line.starts_with("memory")).unwrap().to_owned()
    };
    assert_ne!(weights(&["model.pretrained=base"]), weights(&["model.pretrained=base", rounded[0]]));
    let err = world.fails(2, &["train", "recipe.toml", "model.pretrained=base", rounded[0]]);
    assert!(err.contains("model.pretrained_dtype = \"bf16\" is for weights that stay as they are"), "{err}");
    let err = world.fails(2, &["train", "recipe.toml", rounded[0]]);
    assert!(err.contains("model.pretrained_dtype is for a decoder in model.pretrained"), "{err}");
}

#[test]
fn the_base_is_found_where_it_was_moved_to_and_known_by_its_weights() {
    let world = world();
    move_to(&world, "exported", "old/exported");
    tune(&world, "old/exported", "old/tuned", &["training.steps=2"]);
    let expected = logits(&world, &["old/tuned"]);
    // Both moved together.
    move_to(&world, "old", "new");
    assert_eq!(logits(&world, &["new/tuned"]), expected);
    // The base alone.
    move_to(&world, "new/exported", "elsewhere");
    for args in [&["logits", "new/tuned"][..], &["generate", "new/tuned", "--prompt", "x"], &["export", "new/tuned"]] {
        let more: &[&str] = match args[0] {
            "logits" => &ASK,
            "export" => &["--out", "x"],
            _ => &[],
        };
        let err = world.fails(1, &[args, more].concat());
        assert!(
            err.contains("base model old/exported") && err.contains("--base") && err.contains("not found"),
            "{err}"
        );
    }
    // Another model is not it.
    world.succeeds(&["train", "recipe.toml", "training.steps=3", "--out", "other"]);
    let err = world.fails(1, &["eval", "new/tuned", "--base", "other"]);
    assert!(err.contains("other/step-00000003 has other weights"), "{err}");
    assert_eq!(logits(&world, &["new/tuned", "--base", "elsewhere"]), expected);
    let more = ["model.pretrained=old/exported", "--out", "new/tuned", "training.steps=4"];
    let err = world.fails(1, &[&TUNE[..], &more].concat());
    assert!(err.contains("--base"), "{err}");
    world.succeeds(&[&TUNE[..], &more, &["--base", "elsewhere"]].concat());
    // It is known to be at its new place from now on.
    world.succeeds(&["eval", "new/tuned"]);
    // The same folder with other weights, and without a model.
    let weights = world.dir.path().join("elsewhere/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    let err = world.fails(1, &["eval", "new/tuned"]);
    assert!(err.contains("elsewhere has other weights"), "{err}");
    let config = world.dir.path().join("elsewhere/config.json");
    fs::remove_file(config).unwrap();
    assert!(world.fails(1, &["eval", "new/tuned"]).contains("base model"), "no model at all");
}

#[test]
fn pairs_become_an_adapter_of_peft() {
    let world = world();
    tune(&world, "exported", "tuned", &[]);
    world.succeeds(&["export", "tuned", "--adapter", "--out", "adapter"]);
    let config: Value = serde_json::from_slice(&world.read("adapter/adapter_config.json")).unwrap();
    let folder = world.dir.path().canonicalize().unwrap().join("exported");
    assert_eq!(config["base_model_name_or_path"], json!(folder));
    assert_eq!(config["target_modules"], json!(["down_proj", "q_proj", "v_proj"]));
    assert_eq!((&config["r"], &config["lora_alpha"], &config["peft_type"]), (&json!(2), &json!(16.0), &json!("LORA")));
    let tensors = TensorFiles::open(&[world.dir.path().join("adapter/adapter_model.safetensors")]).unwrap();
    let shape = |half: &str| {
        let name = format!("base_model.model.model.layers.1.self_attn.v_proj.{half}.weight");
        tensors.shape(&name).unwrap().to_vec()
    };
    assert_eq!((shape("lora_A"), shape("lora_B")), (vec![2, 16], vec![8, 2]));
    // Read as PEFT's adapters are, it computes what the run does.
    let (ours, read) = (logits(&world, &["tuned"]), logits(&world, &["adapter"]));
    assert!(ours.iter().zip(&read).all(|(a, b)| (a - b).abs() < 1e-5), "{ours:?} {read:?}");
    assert!(ours.iter().zip(&logits(&world, &["exported"])).any(|(a, b)| (a - b).abs() > 1e-3));

    for (args, words) in [
        (["base", "--adapter"], "was not trained with [lora]"),
        (["tuned", "--adapter --native"], "cannot be used with"),
    ] {
        let args: Vec<&str> = args.iter().flat_map(|arg| arg.split(' ')).collect();
        let err = world.fails(2, &[&["export"], &args[..], &["--out", "x"]].concat());
        assert!(err.contains(words), "{err}");
    }
    tune(&world, "base", "of-run", &["training.steps=1"]);
    let err = world.fails(2, &["export", "of-run", "--adapter", "--out", "x"]);
    assert!(err.contains("which PEFT cannot read") && err.contains("export the base model"), "{err}");
}
