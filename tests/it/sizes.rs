//! What is too large, too many or nowhere: told before it is tried, with the figure and the place.

use std::time::Instant;

use crate::world::{SMALL, World};

#[test]
fn sizes_beyond_any_machine_are_refused_by_name() {
    let world = World::new(SMALL);
    let softmax = "model.decoder.attention={softmax={n_heads=4}}";
    for (key, value, words) in [
        ("model.decoder.attention.softmax.head_dim", "4294967296", "head_dim (4294967296) times n_heads (4)"),
        ("model.decoder.attention.softmax.head_dim", "9223372036854775807", "must be at most 16777216"),
        ("model.decoder.attention.softmax.n_heads", "9223372036854775807", "n_heads (9223372036854775807)"),
        ("model.decoder.d_model", "1000000000000", "model.decoder.d_model (1000000000000) must be at most"),
        ("model.decoder.n_layers", "9223372036854775807", "n_layers (9223372036854775807) must be at most"),
        ("model.decoder.d_ff", "9223372036854775807", "d_ff (9223372036854775807) must be at most"),
        ("training.seq_len", "1000000000", "training.seq_len (1000000000) must be at most"),
        ("training.batch_size", "1000000000", "training.batch_size (1000000000) must be at most"),
        ("validation.batches", "1000000000000", "validation.batches (1000000000000) must be at most"),
        ("generation.sampling.max_new_tokens", "9223372036854775807", "max_new_tokens"),
    ] {
        let err = world.fails(2, &["validate", "recipe.toml", softmax, &format!("{key}={value}")]);
        assert!(err.contains(words), "{key}={value}: {err}");
    }
    let err = world.fails(2, &["validate", "recipe.toml", "training.seq_len=1048576", "training.batch_size=65536"]);
    assert!(err.contains("times training.seq_len (1048576) must be at most"), "{err}");
}

#[test]
fn what_does_not_fit_the_memory_is_planned_and_not_trained() {
    let world = World::new(SMALL);
    // 17 million million weights: valid, and more than any machine holds.
    let wide = ["model.decoder.d_model=131072", "model.decoder.n_layers=128", "model.decoder.d_ff=1048576"];
    world.succeeds(&[&["validate", "recipe.toml"], &wide[..]].concat());
    let (out, _) = world.succeeds(&[&["plan", "recipe.toml"], &wide[..]].concat());
    assert!(out.contains("TiB for weights, gradients and optimiser") && out.contains("not measured"), "{out}");
    let started = Instant::now();
    let err = world.fails(1, &[&["train", "recipe.toml", "--out", "run"], &wide[..]].concat());
    assert!(err.contains("of memory, and") && err.contains("--ignore-memory"), "{err}");
    assert!(started.elapsed().as_secs() < 20);
    let long = ["training.seq_len=262144", "training.batch_size=4096", "model.decoder.n_layers=64"];
    let err = world.fails(1, &[&["train", "recipe.toml", "--out", "long"], &long[..]].concat());
    assert!(err.contains("TiB of memory, and"), "{err}");
    world.succeeds(&["train", "recipe.toml", "--out", "small", "--ignore-memory"]);
}

#[test]
fn very_many_classes_are_learned_without_a_matrix_of_them() {
    let world = World::new(
        "[model.classifier.text_encoder]\nd_model = 8\nn_layers = 1\n[model.classifier.text_encoder.attention.softmax]\n\
         n_heads = 2\n[data.labelled_text]\npaths = [\"rows.jsonl\"]\n[training]\nsteps = 1\nseq_len = 4\nbatch_size = 2\n\
         [validation]\nbatches = 1\n",
    );
    let row = |at: usize| format!("{{\"text\": \"t{at}\", \"label\": \"c{}\"}}\n", at % 5000);
    std::fs::write(world.dir.path().join("rows.jsonl"), (0..10_000).map(row).collect::<String>()).unwrap();
    let (_, err) = world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    assert!(err.contains("5000 classes: confusions are counted, but no matrix"), "{err}");
    let result: serde_json::Value = serde_json::from_slice(&world.read("run/result.json")).unwrap();
    assert_eq!(result["classes"]["scores"].as_array().unwrap().len(), 5000);
    assert_eq!(result["classes"]["confusion"], serde_json::json!([]));
}

#[test]
fn mistakes_without_a_key_have_a_place_too() {
    let world = World::new(SMALL);
    let write = |name: &str, text: &[u8]| std::fs::write(world.dir.path().join(name), text).unwrap();
    write("child.toml", b"# a child\nextends = \"no/such.toml\"\n");
    let err = world.fails(2, &["validate", "child.toml"]);
    assert!(err.contains("child.toml:2:1") && err.contains("no/such.toml: No such file"), "{err}");
    write("grandchild.toml", b"\n\nextends = \"child.toml\"\n");
    let err = world.fails(2, &["validate", "grandchild.toml"]);
    assert!(err.contains("grandchild.toml:3:1") && err.contains("one level is allowed"), "{err}");
    write("latin.toml", b"[training]\nsteps = 1 # caf\xe9\n");
    let err = world.fails(2, &["validate", "latin.toml"]);
    assert!(err.contains("latin.toml:2:16") && err.contains("byte 0xe9 is not valid UTF-8"), "{err}");
    write("bad_base.toml", b"extends = \"latin.toml\"\n");
    assert!(world.fails(2, &["validate", "bad_base.toml"]).contains("latin.toml:2:16"));
    write("missing.toml", SMALL.replace("seq_len = 16", "").as_bytes());
    let err = world.fails(2, &["validate", "missing.toml", "debug.seed=3"]);
    assert!(err.contains("missing.toml:") && !err.contains("command line") && err.contains("seq_len"), "{err}");
    write("no_data.toml", SMALL.replace("[data.markov]\nstates = 6", "").as_bytes());
    let err = world.fails(2, &["validate", "no_data.toml", "debug.seed=3"]);
    assert!(err.contains("missing field `data`") && err.contains("no_data.toml:1:1"), "{err}");
}

#[test]
fn very_long_recipes_take_time_in_proportion() {
    let world = World::new(SMALL);
    let keys: String = (0..50_000).map(|at| format!("unknown_{at} = {at}\n")).collect();
    std::fs::write(world.dir.path().join("keys.toml"), format!("{keys}{SMALL}")).unwrap();
    let started = Instant::now();
    let err = world.fails(2, &["validate", "keys.toml"]);
    assert!(
        err.contains("unknown key `unknown_7`") && err.contains("49900 more unknown keys"),
        "{}",
        &err[err.len() - 400..]
    );
    assert!(err.len() < 100_000);
    let stages: String =
        (0..1000).map(|at| format!("[[stage]]\nname = \"s{at}\"\nrecipe.training.steps = {}\n", at + 1)).collect();
    std::fs::write(world.dir.path().join("stages.toml"), format!("{SMALL}{stages}")).unwrap();
    world.succeeds(&["validate", "stages.toml"]);
    // A tenth of a second each, and more, when it was not.
    assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
}
