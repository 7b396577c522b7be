//! Training that drops sensitive indices, as its users run it.

use crate::resume::fingerprint;
use crate::world::{SMALL, World};

const PROCEDURE: &str = "[procedure.neuron_dropout]\ninterval = 2\nwindow = 2\nrefresh = 2\nk = 0.25\ntracking_texts = 5\n\
                         ees_prompts = 2\nees_samples = 3\nees_new_tokens = 4\n[freeze]\nlayers = 1\n";

/// The run is cut where a mask is in force, the window is full and an interval is half over; its first layer is frozen.
#[test]
fn a_run_in_two_parts_equals_a_run_in_one() {
    for change in ["debug.seed=0", "procedure.neuron_dropout.select=random", "procedure.neuron_dropout.select=dropout"]
    {
        let world = World::new(&format!("{SMALL}{PROCEDURE}"));
        let constant = "lr_scheduler.decay=constant";
        let (_, err) = world.succeeds(&["train", "recipe.toml", change, constant, "--out", "a"]);
        assert!(err.contains("of them frozen)"), "{err}");
        world.succeeds(&[
            "train",
            "recipe.toml",
            change,
            constant,
            "--out",
            "b",
            "training.steps=7",
            "validation.interval=100",
        ]);
        world.succeeds(&["train", "recipe.toml", change, constant, "--out", "b"]);
        let (a, b) = (fingerprint(&world, "a"), fingerprint(&world, "b"));
        assert!(a.0 == b.0 && a.1 == b.1, "{change}: weights or optimiser state differ");
        let measured = |lines: &[String]| -> Vec<String> {
            lines.iter().filter(|line| line.contains("neuron_dropout/ees")).cloned().collect()
        };
        assert_eq!(measured(&a.2), measured(&b.2), "{change}");
        assert_eq!(measured(&a.2).len(), 6);
        let state = |run: &str| String::from_utf8(world.read(&format!("{run}/step-00000012/state.json"))).unwrap();
        let procedure =
            |run: &str| serde_json::from_str::<serde_json::Value>(&state(run)).unwrap()["procedure"].clone();
        assert_eq!(procedure("a"), procedure("b"));
        assert_eq!(procedure("a")["dropped"].as_array().unwrap().len(), 3);
    }
}

#[test]
fn text_that_is_tracked_is_not_learnt_and_mistakes_are_told() {
    let recipe =
        format!("{SMALL}{PROCEDURE}").replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]");
    let world = World::new(&recipe);
    std::fs::write(world.dir.path().join("book.txt"), "The cat sat on the mat and thought. ".repeat(60)).unwrap();
    let (_, err) = world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    assert!(err.contains("the 10 % before for tracking"), "{err}");
    world.succeeds(&["eval", "run"]);
    for (change, words) in [
        ("procedure.neuron_dropout.layer=2", "layer (2) must be -2 to 1"),
        ("procedure.neuron_dropout.k=2", "k (2) must be 0 to 0.9"),
        ("procedure.neuron_dropout.ees.terms=0", "terms (0)"),
        ("procedure.neuron_dropout.epsilon=1", "belong together"),
        ("freeze.layers=3", "freeze.layers (3)"),
    ] {
        assert!(world.fails(2, &["validate", "recipe.toml", change]).contains(words), "{change}");
    }
    let err = world.fails(1, &["train", "recipe.toml", "--out", "other", "freeze.parameters=[\"layer.*\"]"]);
    assert!(err.contains("means no parameter; there are embedding.weight"), "{err}");
    let generated = World::new(&format!("{SMALL}{PROCEDURE}"));
    let err = generated.fails(1, &["train", "recipe.toml", "procedure.neuron_dropout.unit=epochs"]);
    assert!(err.contains("generated data has no epochs"), "{err}");
}
