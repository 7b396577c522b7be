//! Preferences over templates, and heads that are kept apart.

use serde_json::Value;

use crate::world::{SMALL, World, project};

const TEMPLATES: &str = r#"{"template": "{} is a", "attributes": ["he", "she"], "options": [" smith.", " nurse."]}
{"template": "then {} was", "attributes": ["he", "she"], "options": [" late.", " early, as always."]}
{"template": "a {} of", "attributes": ["man", "woman"], "options": [" iron", " letters"]}
"#;

#[test]
fn templates_with_exchanged_attributes_or_options_give_the_opposite() {
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]"));
    let write = |name: &str, text: &str| std::fs::write(world.dir.path().join(name), text).unwrap();
    write("book.txt", &"he is a smith. she is a nurse. ".repeat(40));
    write("plain.jsonl", TEMPLATES);
    let other = TEMPLATES.replace("[\"he\", \"she\"]", "[\"she\", \"he\"]");
    write("attributes.jsonl", &other.replace("[\"man\", \"woman\"]", "[\"woman\", \"man\"]"));
    write("one.jsonl", TEMPLATES.lines().next().unwrap());
    write("bad.jsonl", &TEMPLATES.replace("{} is", "is"));
    world.succeeds(&["train", "recipe.toml", "optimizer.adamw.lr=0.02", "--out", "run"]);
    let ask = |file: &str| -> Value {
        serde_json::from_str(&world.succeeds(&["eval", "run", "--task", "template_pairs", file]).0).unwrap()
    };
    let (plain, exchanged) = (ask("plain.jsonl"), ask("attributes.jsonl"));
    let rows = |told: &Value| -> Vec<f64> {
        told["rows"].as_array().unwrap().iter().map(|row| row["nats"].as_f64().unwrap()).collect()
    };
    let (values, opposite) = (rows(&plain), rows(&exchanged));
    assert!(values.iter().any(|value| value.abs() > 1e-4), "{values:?}");
    assert!(values.iter().zip(&opposite).all(|(a, b)| (a + b).abs() < 1e-4), "{values:?}, {opposite:?}");
    for unit in ["nats", "nats_per_token"] {
        let mean = plain[unit]["mean"].as_f64().unwrap();
        let [low, high] = [0, 1].map(|end| plain[unit]["interval"][end].as_f64().unwrap());
        assert!(low <= mean && mean <= high && low < high, "{plain:#}");
    }
    assert_eq!(plain["nats"]["mean"].as_f64().unwrap(), values.iter().sum::<f64>() / 3.0);
    // Those that are shipped.
    let shipped = project().join("datasets/template_pairs.jsonl");
    assert_eq!(rows(&ask(shipped.to_str().unwrap())).len(), 24);
    for (code, arguments, words) in [
        (2, "eval run --task template_pairs", "takes a file of templates"),
        (2, "eval run --task template_pairs plain.jsonl --lengths 1", "--lengths"),
        (2, "eval run --task facts plain.jsonl", "a file beside the model"),
        (2, "eval run --task template_pairs,facts plain.jsonl", "a file beside the model"),
        (2, "eval run plain.jsonl", "--task"),
        (1, "eval run --task template_pairs one.jsonl", "1 template"),
        (1, "eval run --task template_pairs bad.jsonl", "bad.jsonl:1: template \"is a\" has no {}"),
        (1, "eval run --task template_pairs nowhere.jsonl", "nowhere.jsonl"),
    ] {
        let err = world.fails(code, &arguments.split(' ').collect::<Vec<_>>());
        assert!(err.contains(words), "{arguments}: {err}");
    }
}

#[test]
fn heads_that_overlap_are_driven_apart() {
    let world = World::new(SMALL);
    let plain = "model.decoder.attention.softmax.n_heads=4";
    let train = |run: &str, weight: &str| {
        world.succeeds(&["train", "recipe.toml", plain, "optimizer.adamw.lr=0.03", weight, "--out", run]);
        let lines = String::from_utf8(world.read(&format!("{run}/metrics.jsonl"))).unwrap();
        let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter_map(|line| line["loss/head_overlap"].as_f64()).collect::<Vec<f64>>()
    };
    assert!(train("without", "training.head_overlap=0").is_empty());
    let weak = train("weak", "training.head_overlap=0.001");
    let strong = train("strong", "training.head_overlap=30");
    assert_eq!((weak.len(), strong.len(), weak[0]), (12, 12, strong[0]));
    assert!(strong[11] < 0.9 * strong[0] && strong[11] < 0.95 * weak[11], "{weak:?}, {strong:?}");
    for (changes, words) in [
        (vec!["training.head_overlap=-1"], "0 (off) to 1e6"),
        (vec!["training.head_overlap=1", "training.activation_checkpointing=\"block\""], "must leave there"),
        (vec!["training.head_overlap=1", "model.decoder.attention.gated_delta_net.n_heads=2"], "takes maps of heads"),
        (vec!["training.head_overlap=1", "procedure.boundaries={}"], "procedure.boundaries does not train on"),
    ] {
        let err = world.fails(2, &[&["validate", "recipe.toml"], &changes[..]].concat());
        assert!(err.contains(words), "{changes:?}: {err}");
    }
}
