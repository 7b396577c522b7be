//! Mixtures of texts, as their users write them.

use serde_json::Value;

use crate::resume::fingerprint;
use crate::world::{SMALL, World};

/// Junk and control posts, three to one.
fn recipe() -> String {
    let data = "[data]\nuntil = 4000\n[[data.source]]\nweight = 3\nname = \"junk\"\n\
                posts = { kind = \"junk\", documents = 300 }\n[[data.source]]\nname = \"control\"\n\
                posts = { kind = \"control\", documents = 60 }";
    SMALL.replace("[data.markov]\nstates = 6", data)
}

fn lines(world: &World, run: &str) -> Vec<Value> {
    let text = String::from_utf8(world.read(&format!("{run}/metrics.jsonl"))).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn losses_of_sources_are_told_apart_and_runs_resume() {
    let world = World::new(&recipe());
    let train = |run: &str, more: &[&str]| {
        world.succeeds(&[&["train", "recipe.toml", "lr_scheduler.decay=constant", "--out", run], more].concat()).1
    };
    let err = train("whole", &[]);
    // 249 rows of 16 and a target: 3985 tokens.
    for part in ["junk 75.01 % (2989 tokens of", "control 24.99 % (996 tokens of", "3985 tokens an epoch"] {
        assert!(err.contains(part), "no {part} in {err}");
    }
    let logged = lines(&world, "whole");
    let number = |key: &str| logged.iter().rev().find_map(|line| line[key].as_f64());
    for source in ["junk", "control"] {
        for side in ["train", "validation"] {
            let key = format!("loss/{side}/{source}");
            assert!(number(&key).is_some_and(|loss| loss > 0.0 && loss < 7.0), "{key}: {:?}", number(&key));
        }
    }
    // The loss of a step is the mean over the targets of both.
    let first = &logged.iter().find(|line| line["step"] == 1 && line["loss"].is_number()).unwrap();
    let [all, junk, control] =
        ["loss", "loss/train/junk", "loss/train/control"].map(|key| first[key].as_f64().unwrap());
    assert!(junk.min(control) < all && all < junk.max(control), "{first}");
    for skill in ["retrieval", "copy", "arithmetic", "repetition", "response_length"] {
        assert!(number(&format!("health/{skill}")).is_some(), "{skill}");
    }
    train("parts", &["training.steps=7", "validation.interval=100"]);
    train("parts", &[]);
    let (a, b) = (fingerprint(&world, "whole"), fingerprint(&world, "parts"));
    assert!(a.0 == b.0 && a.1 == b.1, "weights or optimiser state differ");
    let evaluated: Value = serde_json::from_str(&world.succeeds(&["eval", "whole"]).0).unwrap();
    assert!(evaluated["sources"]["control"]["loss"].is_number() && evaluated["sources"]["junk"]["targets"].is_u64());
}

#[test]
fn sources_are_changed_by_their_place() {
    let world = World::new(&recipe());
    let (out, _) = world.succeeds(&["cat", "recipe.toml", "data.source.0.weight=0.5", "data.until=all_exhausted"]);
    assert!(out.contains("weight = 0.5") && out.contains("until = \"all_exhausted\""), "{out}");
    std::fs::write(world.dir.path().join("resolved.toml"), &out).unwrap();
    assert_eq!(world.succeeds(&["cat", "resolved.toml"]).0, out, "what `cat` prints is a recipe");
    let (out, _) = world.succeeds(&["cat", "recipe.toml", "data.copy.vocab=5"]);
    assert!(out.contains("[data.copy]") && !out.contains("source"), "another source takes the mixture's place");
}

#[test]
fn mistakes_in_mixtures_are_told_before_anything_runs() {
    let world = World::new(&recipe());
    for (change, words) in [
        ("data.source.1.weight=-1", "weight (-1.0) must be 0, or a number from 1e-9 to 1e9"),
        ("data.source.1.weight=much", "expected a number"),
        ("data.source.1.name=junk", "two sources are called \"junk\""),
        ("data.source.1.text.paths=[\"x\"]", "takes one table, and text and posts are there"),
        ("data.source.1.wait=1", "unknown key `wait`"),
        ("data.source.7.weight=1", "data.source"),
        ("data.source=[]", "at least one [[data.source]]"),
        ("data.source=[{weight=1}]", "takes one table with texts: text, jsonl, rust_docs or posts"),
        ("data.source=[{chat={paths=[\"x\"]}}]", "unknown key `chat`"),
        ("data.until=forever", "\"first_exhausted\", \"all_exhausted\" or a number of tokens"),
        ("data.until=16", "data.until (16) must be at least the tokens of a row, training.seq_len + 1 = 17"),
        ("data.last_document=keep", "last_document"),
        ("data.source.0.posts.documents=0", "documents (0) must be 1 to"),
    ] {
        let err = world.fails(2, &["validate", "recipe.toml", change]);
        assert!(err.contains(words), "{change}: {err}");
    }
    let beside = recipe().replace("[data]\n", "[data]\ncopy = {}\n");
    let err = World::new(&beside).fails(2, &["validate", "recipe.toml"]);
    assert!(err.contains("data takes one table, and"), "{err}");
}
