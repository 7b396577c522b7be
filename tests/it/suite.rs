//! Suites: what is listed, what runs, what is kept, and what is refused.

use polyhead_experiments::suites::{SUITES, Suite};
use serde_json::Value;

use crate::world::{SMALL, World};

/// A suite with few rows and steps.
const FEW: [&str; 6] = [
    "data.mqar.train=[{seq_len=64,n_pairs=4,rows=8}]",
    "data.mqar.test=[{seq_len=64,n_pairs=4,rows=6},{seq_len=64,n_pairs=8,rows=4}]",
    "training.batch_size=4",
    "training.steps=3",
    "validation.interval=2",
    "model.decoder.d_model=8",
];

fn args<'a>(more: &[&'a str]) -> Vec<&'a str> {
    ["suite", "mqar-zoology-v1-small"].into_iter().chain(FEW).chain(more.iter().copied()).collect()
}

#[test]
fn a_suite_runs_once_and_writes_every_cell() {
    let world = World::new(SMALL);
    let only = ["--only", "64 tokens", "--seed", "3"];
    let (out, _) = world.succeeds(&args(&[&only[..], &["--dry-run"]].concat()));
    assert!(out.contains("64 tokens, 4 pairs, width 64, lr 1.00e-3") && out.contains("2 runs"), "{out}");
    assert!(!world.dir.path().join("checkpoints").exists(), "a plan writes nothing");
    let (table, err) = world.succeeds(&args(&only));
    assert!(table.contains("| 64 tokens, 4 pairs, width 64 | row accuracy | "), "{table}");
    assert!(err.contains("2 runs, 0 of them have finished before"), "{err}");
    let result: Value =
        serde_json::from_slice(&world.read("checkpoints/suite/mqar-zoology-v1-small/result.json")).unwrap();
    assert_eq!((&result["schema"], &result["seed"]), (&"polyhead.suite/1".into(), &3.into()));
    assert_eq!(result["changes"].as_array().unwrap().len(), FEW.len());
    let [row] = &result["rows"].as_array().unwrap()[..] else { panic!("{result:#}") };
    let cells = row["cells"].as_array().unwrap();
    let sets = cells[0]["sets"].as_array().unwrap();
    let sizes: Vec<(u64, u64)> =
        sets.iter().map(|set| (set["rows"].as_u64().unwrap(), set["targets"].as_u64().unwrap())).collect();
    assert_eq!((cells.len(), sizes), (2, vec![(6, 24), (4, 32)]), "{result:#}");
    assert_eq!(row["score"], cells[0]["score"].as_f64().unwrap().max(cells[1]["score"].as_f64().unwrap()));
    assert_eq!(cells[0]["score"], sets[1]["row_accuracy"], "of the last test set");
    let (again, err) = world.succeeds(&args(&only));
    assert!(err.contains("2 runs, 2 of them have finished before") && again == table, "{err}");
    // The same measures by `eval`.
    let runs = world.dir.path().join("checkpoints/suite/mqar-zoology-v1-small/runs");
    let run = std::fs::read_dir(runs).unwrap().next().unwrap().unwrap().path();
    let (out, _) = world.succeeds(&["eval", run.to_str().unwrap()]);
    let evaluated: Value = serde_json::from_str(&out).unwrap();
    assert!(cells.iter().any(|cell| cell["sets"] == evaluated["sets"]), "{out}");
}

#[test]
fn another_model_takes_the_place_of_the_published_one() {
    let world = World::new(SMALL);
    let (out, _) = world.succeeds(&["suite", "mqar-zoology-v1", "--model", "recipe.toml", "--dry-run"]);
    assert!(out.contains("16 runs") && !out.contains("width 64"), "{out}");
}

#[test]
fn a_run_ends_once_it_is_accurate_and_stays_ended() {
    let recipe = SMALL.replace("batches = 2", "batches = 2\nstop_accuracy = 0.01");
    let world = World::new(&recipe);
    let (_, err) = world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    assert!(err.contains("ended early at step 4") && err.contains("validation.stop_accuracy"), "{err}");
    let (_, err) = world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    assert!(err.contains("trained  4 steps"), "{err}");
}

#[test]
fn what_is_wrong_is_told_before_anything_runs() {
    let world = World::new(SMALL);
    for (args, words) in [
        (&["suite", "mqar-zoology-v2"][..], "did you mean mqar-zoology-v1?"),
        (&["suite"], "polyhead suite --list"),
        (&["suite", "mad-v1-small", "training.stepz=3"], "did you mean `steps`?"),
        (&["suite", "mad-v1-small", "training.steps=0"], "mad-v1-small, in-context recall, baseline"),
        (&["suite", "mad-v1-small", "--only", "nonsense"], "no point of mad-v1-small has \"nonsense\""),
        (&["suite", "mad-v1-small", "--record", "--only", "copying"], "--record stores a suite as it is"),
        (&["suite", "ruler-synthetic-v1"], "name it with --model"),
        (&["suite", "mad-v1-small", "--model", "recipe.toml", "--lengths", "64"], "trains its own"),
        (&["suite", "babilong-like-v1", "--dry-run", "--only", "qa9"], "there are qa1"),
    ] {
        let err = world.fails(2, args);
        assert!(err.contains(words), "{args:?}: {err}");
        assert!(!world.dir.path().join("checkpoints").exists(), "{args:?}");
    }
}

#[test]
fn points_are_settings_of_a_comparison() {
    let task = "seeds = [0]\nmetric = \"accuracy\"\n[[task]]\nsuite = \"mqar-zoology-v1-small\"\nonly = [\"64 tokens\"]\n\
                [recipe]\ntraining.steps = 7\n[[arm]]\nname = \"softmax\"\n[[arm]]\nname = \"two heads\"\n\
                recipe.model.decoder.attention.softmax = { n_heads = 2 }\n";
    let world = World::new(SMALL);
    let write = |text: &str| std::fs::write(world.dir.path().join("zoo.toml"), text).unwrap();
    write(task);
    world.succeeds(&["validate", "zoo.toml"]);
    let (out, _) = world.succeeds(&["compare", "zoo.toml", "--dry-run", "--no-probe"]);
    assert!(out.contains("two heads; 64 tokens, 4 pairs, width 64") && out.contains("runs       2"), "{out}");
    assert!(out.contains("28,672 a run"), "what [recipe] says changes the points: {out}");
    for (change, words) in [
        (("mqar-zoology-v1-small", "mqar-zoologie"), "did you mean"),
        (("64 tokens", "63 tokens"), "no point of"),
        (("mqar-zoology-v1-small", "ruler-synthetic-v1"), "asks trained models"),
        (("[recipe]", "[[setting]]\nname = \"a\"\n[recipe]"), "setting cannot stand beside task"),
    ] {
        write(&task.replace(change.0, change.1));
        let err = world.fails(2, &["compare", "zoo.toml", "--dry-run"]);
        assert!(err.contains(words), "{change:?}: {err}");
    }
}

#[test]
fn a_trained_model_is_asked() {
    let world = World::new(SMALL);
    let recipe = SMALL.replace("[data.markov]\nstates = 6", "[data.babilong_like]\ntask = \"qa1\"\ntest_rows = 4");
    std::fs::write(world.dir.path().join("recipe.toml"), recipe.replace("seq_len = 16", "seq_len = 512")).unwrap();
    world.succeeds(&[
        "train",
        "recipe.toml",
        "--out",
        "run",
        "training.steps=1",
        "training.gradient_accumulation_steps=1",
    ]);
    let ask =
        ["suite", "babilong-like-v1", "--model", "run", "--lengths", "512,600", "--samples", "2", "--only", "qa1"];
    let (table, err) = world.succeeds(&ask);
    assert!(table.contains("| qa1, 512 tokens | labels right | ") && table.contains("qa1, 600 tokens"), "{table}");
    assert!(err.contains("qa1"), "{err}");
    assert_eq!(world.succeeds(&ask).0, table, "what was asked is kept");
}

#[test]
fn suites_have_versions() {
    for Suite { name, about, .. } in &SUITES {
        let plain = name.strip_suffix("-small").unwrap_or(name);
        assert!(plain.ends_with("-v1") && !about.ends_with('.'), "{name}: {about}");
    }
    let world = World::new(SMALL);
    let (out, _) = world.succeeds(&["suite", "--list"]);
    assert!(SUITES.iter().all(|suite| out.contains(suite.name)), "{out}");
}
