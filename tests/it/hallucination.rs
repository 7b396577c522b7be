//! Hallucination, measured during a run and on a checkpoint.

use serde_json::Value;

use crate::world::{SMALL, World};

#[test]
fn facts_are_measured_before_along_and_after() {
    let recipe =
        SMALL.replace("[data.markov]\nstates = 6", "[data.facts]\nn_entities = 12\nn_relations = 2\nn_values = 6");
    let world = World::new(&recipe);
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    let log = String::from_utf8(world.read("run/metrics.jsonl")).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let measured: Vec<(u64, f64)> = lines
        .iter()
        .filter_map(|line| Some((line["step"].as_u64()?, line.get("facts/exact_match_taught")?.as_f64()?)))
        .collect();
    assert_eq!(measured.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 4, 8, 12]);
    let (out, err) = world.succeeds(&["eval", "run", "--task", "facts"]);
    let result: Value = serde_json::from_str(&out).unwrap();
    // Asked with the settings of the run, a checkpoint answers as the run did.
    let facts = result["facts"].as_object().unwrap();
    assert_eq!(facts["exact_match_taught"].as_f64(), Some(measured[3].1));
    assert_eq!(lines.iter().rev().find_map(|line| line.get("facts/ees")), Some(&facts["ees"]));
    assert!(err.contains("confident_wrong_untaught"), "{err}");
    assert!(facts["consistency_untaught"].as_f64().is_some_and(|share| (0.0..=1.0).contains(&share)));
    for (wrong, words) in [
        (["--samples", "1"], "--samples (1) must be at least 2 for --task facts"),
        (["--lengths", "1,2"], "--lengths says nothing about --task facts"),
        (["--prompts", "x"], "--prompts says nothing"),
    ] {
        let err = world.fails(2, &[&["eval", "run", "--task", "facts"][..], &wrong].concat());
        assert!(err.contains(words), "{err}");
    }
    let official = world.succeeds(&["eval", "run", "--task", "facts", "--ees-mode", "official"]).0;
    let official: Value = serde_json::from_str(&official).unwrap();
    assert_eq!((&official["ees"]["probes"], &official["ees"]["n_probes"]), (&"gaussian".into(), &20.into()));
    assert_ne!(official["facts"]["ees"], facts["ees"]);
    let err = world.fails(2, &["eval", "run", "--task", "facts,all"]);
    assert!(err.contains("asked for alone"), "{err}");
    let other = World::new(SMALL);
    other.succeeds(&["train", "recipe.toml", "--out", "run"]);
    assert!(other.fails(1, &["eval", "run", "--task", "facts"]).contains("did not learn generated facts"));
}

#[test]
fn prompts_are_scored_by_how_far_answers_lie_apart() {
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]"));
    let write = |name: &str, text: &str| std::fs::write(world.dir.path().join(name), text).unwrap();
    write("book.txt", &"The cat sat on the mat and thought. ".repeat(60));
    write("prompts.txt", "The cat\n\nThe mat sat\n");
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    let ask =
        ["eval", "run", "--task", "eigenscore", "--prompts", "prompts.txt", "--new-tokens", "5", "--samples", "4"];
    let result: Value = serde_json::from_str(&world.succeeds(&ask).0).unwrap();
    let prompts = result["prompts"].as_array().unwrap();
    assert_eq!(prompts.len(), 2);
    for prompt in prompts {
        let score = |name: &str| prompt[name].as_f64().unwrap();
        assert!((score("ees") - score("ees_exact")).abs() < 0.3 && score("eigenscore").is_finite());
    }
    let asked =
        |more: &[&str]| -> Value { serde_json::from_str(&world.succeeds(&[&ask[..], more].concat()).0).unwrap() };
    // As published: 20 normal probes.
    let official = asked(&["--ees-mode", "official"]);
    assert_eq!(official["mean"]["ees"], official["mean"]["ees_official"]);
    assert_eq!(official["mean"]["ees_official"], result["mean"]["ees_official"]);
    assert_ne!(asked(&["--ees-mode", "official", "--ees-probes", "exact"])["mean"]["ees"], official["mean"]["ees"]);
    let many = asked(&["--ees-mode", "shifted", "--ees-probes", "rademacher", "--ees-n-probes", "7"]);
    let expected =
        serde_json::json!({ "mode": "shifted", "terms": 20, "probes": "rademacher", "n_probes": 7, "alpha": 1e-3 });
    assert_eq!(many["ees"], expected);
    for (wrong, words) in [
        (["--samples", "1"], "must be at least 2 for --task eigenscore"),
        (["--unit", "64"], "--unit says nothing about --task eigenscore"),
        (["--lengths", "1,2,4,8"], "--lengths says nothing"),
    ] {
        let ask: Vec<&str> = ask[..6].iter().copied().chain(wrong).collect();
        assert!(world.fails(2, &ask).contains(words), "{wrong:?}");
    }
    let mean = prompts.iter().map(|prompt| prompt["eigenscore"].as_f64().unwrap()).sum::<f64>() / 2.0;
    assert!((result["mean"]["eigenscore"].as_f64().unwrap() - mean).abs() < 1e-9);
    assert!(world.fails(2, &["eval", "run", "--task", "eigenscore"]).contains("name it with --prompts"));
    assert!(world.fails(2, &[&ask[..], &["--layer", "7"]].concat()).contains("--layer (7) must be -2 to 1"));
}
