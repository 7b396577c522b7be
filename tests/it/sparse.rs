//! Sparse attention as a user has it: longer rows under LoRA, files on the command line, a predictor of boundaries, masked diffusion.

use polyhead_models::weights::TensorFiles;
use serde_json::Value;

use crate::world::{SMALL, World};

fn softmax() -> String {
    SMALL.replace("grouped_differential]\nn_heads = 4\nn_noise_heads = 2", "softmax]\nn_heads = 4\nn_kv_heads = 2")
}

fn write(world: &World, name: &str, text: &str) {
    std::fs::write(world.dir.path().join(name), text).unwrap();
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

fn loss(world: &World, args: &[&str]) -> f64 {
    json(world.succeeds(&[&["eval"], args].concat()).0.as_bytes())["loss"].as_f64().unwrap()
}

fn logits(world: &World, folder: &str, out: &str) -> Vec<f32> {
    world.succeeds(&["logits", folder, "--tokens", "1,2,3,4,5", "--out", out]);
    TensorFiles::open(&[world.dir.path().join(out)]).unwrap().values("logits").unwrap()
}

#[test]
fn longer_rows_are_learned_sparsely_and_exported_as_they_are_used() {
    let world = World::new(&softmax());
    world.succeeds(&["train", "recipe.toml", "--out", "base"]);
    let longer = [
        "train",
        "recipe.toml",
        "model.pretrained=base",
        "model.rope_scaling.linear.factor=2.0",
        "training.seq_len=32",
        "lr_scheduler.decay=constant",
        "lora.rank=2",
        "lora.train_whole=[\"embedding.*\", \"*norm*\"]",
        "intervention.sparse.shifted.chunks=4",
    ];
    let train = |out: &str, more: &[&str]| world.succeeds(&[&longer[..], &["--out", out], more].concat());
    train("long", &[]);
    let recipe = String::from_utf8(world.read("long/recipe.toml")).unwrap();
    assert!(recipe.contains("[model.decoder.rope_scaling.linear]\nfactor = 2.0"), "{recipe}");
    // Embeddings were trained, other weights stayed: all of them are saved.
    let tensors = |run: &str| {
        let runs = std::fs::read_dir(world.dir.path().join(run)).unwrap().map(|entry| entry.unwrap().path());
        let last = runs.filter(|path| path.join("model.safetensors").exists()).max().unwrap();
        TensorFiles::open(&[last.join("model.safetensors")]).unwrap()
    };
    let (before, after) = (tensors("base"), tensors("long"));
    let same = |name: &str| before.values(name).unwrap() == after.values(name).unwrap();
    assert!(!same("embedding.weight") && !same("norm.weight") && same("layers.0.attention.o_proj.weight"));
    // It goes on to the same bits.
    train("parts", &["training.steps=7"]);
    train("parts", &[]);
    assert_eq!(logits(&world, "parts", "a"), logits(&world, "long", "b"));
    // Chunks matter in training, and nowhere else.
    train("dense", &["intervention.sparse.shifted.chunks=1"]);
    assert_ne!(logits(&world, "dense", "c"), logits(&world, "long", "d"));
    world.succeeds(&["export", "long", "--out", "exported"]);
    let config = json(&world.read("exported/config.json"));
    let scaling = config.get("rope_scaling").filter(|told| !told.is_null()).unwrap_or(&config["rope_parameters"]);
    assert!(scaling["rope_type"] == "linear" && scaling["factor"] == 2.0, "{config}");
    let (ours, theirs) = (logits(&world, "long", "e"), logits(&world, "exported", "f"));
    assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-5));
    for (change, words) in [
        (
            "lora.train_whole=[\"nothing*\"]",
            "lora.train_whole: \"nothing*\" means no parameter; there are embedding.weight",
        ),
        ("intervention.sparse.shifted.shift_fraction=1.5", "shift_fraction (1.5) must be 0 to 1"),
        ("model.rope_scaling.linear.factor=0.5", "factor (0.5) must be at least 1"),
    ] {
        let told = world.fails(2, &[&longer[..], &["--out", "never", change]].concat());
        assert!(told.contains(words), "{told}");
    }
}

#[test]
fn files_make_reading_sparse_and_at_full_density_change_nothing() {
    let world = World::new(&softmax());
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    let plain = loss(&world, &["run"]);
    let under = |text: &str| {
        write(&world, "sparse.toml", text);
        loss(&world, &["run", "--intervention", "sparse.toml"])
    };
    for (few, all) in [
        (
            "blocks]\nquery_block = 4\nkey_block = 2\ndensity = 0.3",
            "blocks]\nquery_block = 4\nkey_block = 2\ndensity = 1.0",
        ),
        (
            "dhsa]\nblock_size = 4\nchunk_size = 2\ndensity = 0.2\nglobal_tokens = 0\nlocal_tokens = 2\ninstruction_tokens = 0",
            "dhsa]\nblock_size = 4\nchunk_size = 2\ndensity = 1.0\nrectify = true",
        ),
        (
            "rectified]\nblock_size = 2\nfirst_block = false\nprob_threshold = 0.0",
            "rectified]\nblock_size = 2\ntop_k = 99",
        ),
        ("h2o]\nheavy = 1\nrecent = 1", "h2o]\nheavy = 50\nrecent = 50"),
    ] {
        assert_ne!(under(&format!("[sparse.{few}\n")), plain, "{few}");
        assert!((under(&format!("[sparse.{all}\n")) - plain).abs() < 1e-5, "{all}");
    }
    for (text, words) in [
        ("[sparse.dhsa]\n", "no predictor of boundaries: train one with procedure.boundaries, or set dhsa.chunk_size"),
        ("[sparse.sparsed]\n", "sparsed is for masked diffusion models"),
        ("[sparse.blocks]\ndensity = 2.0\n", "density (2) must be 0 to 1"),
        ("[sparse.h2o]\nheavy = 1\nrecent = 0\n", "recent (0) must be 1 to"),
        ("[sparse.blocks]\nblocksize = 2\n", "blocksize"),
    ] {
        write(&world, "wrong.toml", text);
        let told = world.fails(2, &["eval", "run", "--intervention", "wrong.toml"]);
        assert!(told.contains(words), "{told}");
    }
}

#[test]
fn a_predictor_is_trained_beside_a_model_that_stays() {
    let world = World::new(&softmax());
    world.succeeds(&["train", "recipe.toml", "--out", "base"]);
    let train = [
        "train",
        "recipe.toml",
        "model.pretrained=base",
        "procedure.boundaries.predictor.window=1",
        "procedure.boundaries.predictor.hidden=8",
        "procedure.boundaries.labels.ratio=1.2",
        "--out",
        "run",
    ];
    world.succeeds(&[&train[..], &["training.steps=5"]].concat());
    world.succeeds(&train);
    let lines = String::from_utf8(world.read("run/metrics.jsonl")).unwrap();
    assert!(lines.contains("boundaries/f1") && lines.contains("boundaries/validation_loss"), "{lines}");
    assert_eq!(logits(&world, "run", "a"), logits(&world, "base", "b"));
    write(
        &world,
        "dhsa.toml",
        "[sparse.dhsa]\nblock_size = 4\ndensity = 0.2\nlocal_tokens = 2\nglobal_tokens = 0\ninstruction_tokens = 0\nthreshold = -5.0\n",
    );
    let told = loss(&world, &["run", "--intervention", "dhsa.toml"]);
    assert!(told.is_finite());
    // What goes on from it is the model alone.
    world.succeeds(&["export", "run", "--out", "exported"]);
    world.succeeds(&[
        "train",
        "recipe.toml",
        "model.pretrained=run",
        "--out",
        "next",
        "training.steps=2",
        "lr_scheduler.warmup_steps=1",
    ]);
    world.succeeds(&["eval", "next"]);
    let told = world.fails(2, &[&train[..], &["lora.rank=2"]].concat());
    assert!(told.contains("lora: procedure.boundaries trains a predictor"), "{told}");
}

#[test]
fn masked_diffusion_trains_resumes_evaluates_and_generates() {
    let text = softmax().replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"text.txt\"]");
    let world = World::new(&text);
    write(&world, "text.txt", &"the cat sat on the mat. ".repeat(80));
    let diffuses = "model.decoder.masked_diffusion=true";
    let short = ["generation.sampling.max_new_tokens=6", "lr_scheduler.decay=constant"];
    let train = |more: &[&str]| world.succeeds(&[&["train", "recipe.toml", diffuses][..], &short, more].concat());
    train(&["--out", "whole"]);
    train(&["--out", "parts", "training.steps=7"]);
    train(&["--out", "parts"]);
    assert_eq!(loss(&world, &["whole"]), loss(&world, &["parts"]));
    let generate = |model: &str, more: &[&str]| {
        let how = ["--max-new-tokens", "12", "--block-length", "4", "--diffusion-steps", "6", "--seed", "3"];
        world.succeeds(&[&["generate", model, "--prompt", "the "][..], &how, more].concat()).0
    };
    let one = generate("whole", &[]);
    assert!(one.starts_with("the ") && one == generate("whole", &[]));
    world.succeeds(&["export", "whole", "--out", "exported"]);
    assert_eq!(generate("exported", &[]), one);
    write(&world, "sparsed.toml", "[sparse.sparsed]\nblock_size = 4\nratio = 1.0\n");
    assert_eq!(generate("whole", &["--intervention", "sparsed.toml"]), one);
    write(&world, "few.toml", "[sparse.sparsed]\nblock_size = 4\nratio = 0.1\n");
    generate("whole", &["--intervention", "few.toml"]);
    assert_ne!(loss(&world, &["whole", "--intervention", "few.toml"]), loss(&world, &["whole"]));
    write(&world, "blocks.toml", "[sparse.blocks]\n");
    let told = world.fails(2, &["generate", "whole", "--intervention", "blocks.toml"]);
    assert!(told.contains("a masked diffusion model takes sparse.sparsed"), "{told}");
    let told = world.fails(2, &["train", "recipe.toml", diffuses, "procedure.bilevel.inner_steps=1", "--out", "never"]);
    assert!(told.contains("is trained by procedure.standard"), "{told}");
    assert!(world.fails(2, &["inspect", "whole", "--out", "seen"]).contains("is a masked diffusion model"));
}
