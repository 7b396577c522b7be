//! `polyhead heads` and `inspect --copying` as a user has them.

use serde_json::Value;

use crate::classify::SHAPES;
use crate::pages::assert_whole;
use crate::world::{SMALL, World};

/// A small model of plain softmax attention that learned a text, byte by byte.
fn world() -> World {
    let softmax = SMALL
        .replace("grouped_differential]\nn_heads = 4\nn_noise_heads = 2", "softmax]\nn_heads = 2")
        .replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]");
    let world = World::new(&softmax);
    std::fs::write(world.dir.path().join("book.txt"), "the cat sat on the mat. ".repeat(60)).unwrap();
    world
}

fn json(world: &World, path: &str) -> Value {
    serde_json::from_slice(&world.read(path)).unwrap()
}

fn column(result: &Value, name: &str) -> Vec<f64> {
    result["heads"].as_array().unwrap().iter().map(|head| head[name].as_f64().unwrap()).collect()
}

#[test]
fn heads_of_classifiers_are_switched_off_with_their_distances() {
    let world = World::new(SHAPES);
    world.succeeds(&["train", "recipe.toml", "--out", "run", "metrics.tensorboard=false"]);
    let (out, told) = world.succeeds(&["heads", "ablate", "run", "--out", "seen"]);
    assert_eq!(out.lines().count(), 5, "four heads, and a head line: {out}");
    assert!(told.contains("matters most") && told.contains("rank correlation"), "{told}");
    let found = json(&world, "seen/ablation.json");
    assert_eq!(found["examples"], 72, "whole batches of 24");
    for (name, most) in
        [("jensen_shannon", 2f64.ln()), ("embedding_change", 2.0), ("gate", f64::MAX), ("distance", 3.0)]
    {
        assert!(column(&found, name).iter().all(|&value| value > 0.0 && value < most), "{name}: {found}");
    }
    assert!(column(&found, "true_class_drop").iter().any(|&drop| drop > 0.0), "{found}");
    for (profile, distance) in found["profiles"].as_array().unwrap().iter().zip(column(&found, "distance")) {
        let shares: Vec<f64> =
            profile["renormalised"].as_array().unwrap().iter().map(|share| share.as_f64().unwrap()).collect();
        // Patches of 4 x 4 are 3 steps apart at most, and there is no class token.
        assert!(shares.len() == 4 && (shares.iter().sum::<f64>() - 1.0).abs() < 1e-5, "{profile}");
        let mean: f64 = shares.iter().enumerate().map(|(steps, share)| steps as f64 * share).sum();
        assert!((mean - distance).abs() < 1e-6);
    }
    assert_whole(&world.dir.path().join("seen/ablation.html"));
    assert!(world.fails(2, &["heads", "ablate", "run", "--text", "a"]).contains("--text is for decoders"));

    // Heads in windows have no map of positions, and all the rest.
    let hilo = SHAPES.replace("softmax]", "hilo]\nwindow = 2");
    std::fs::write(world.dir.path().join("hilo.toml"), hilo).unwrap();
    world.succeeds(&["train", "hilo.toml", "--out", "hilo", "training.steps=2", "lr_scheduler.warmup_steps=1"]);
    world.succeeds(&["heads", "ablate", "hilo", "--rows", "24", "--heads", "0,3", "--out", "windows"]);
    let found = json(&world, "windows/ablation.json");
    assert!(column(&found, "jensen_shannon").iter().all(|&value| value > 0.0) && found["examples"] == 24);
    assert!(found["heads"].as_array().unwrap().iter().all(|head| head["distance"].is_null()));
}

#[test]
fn the_parts_of_a_logit_add_up_to_it() {
    let world = world();
    world.succeeds(&["train", "recipe.toml", "--out", "run", "optimizer.adamw.lr=0.01"]);
    let look = |more: &[&str]| {
        let (out, told) = world.succeeds(&[&["inspect", "run", "--lens", "--out", "seen"], more].concat());
        assert_whole(&world.dir.path().join("seen/lens.html"));
        (out, told, json(&world, "seen/lens.json"))
    };
    let (out, told, found) = look(&["--text", "the cat sat on", "--answer", " mat", "--instead", "x"]);
    assert!(told.contains("Logit of \" \", less that of \"x\""), "{told}");
    // Five points, seven parts and the sum, four heads; three lines of heads and two that are empty.
    assert_eq!(out.lines().count(), 5 + 9 + 4 + 3 + 2, "{out}");
    let logit = |text: &str| {
        world.succeeds(&["logits", "run", "--text", "the cat sat on", "--out", "logits"]);
        let bytes = world.read("logits");
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let last: Vec<f64> = file
            .tensor("logits")
            .unwrap()
            .data()
            .chunks(4)
            .map(|four| f64::from(f32::from_le_bytes(four.try_into().unwrap())))
            .collect();
        last[last.len() - 258 + usize::from(text.as_bytes()[0])]
    };
    let text = &found["texts"][0];
    let sum: f64 = ["embedding", "bias"].iter().map(|part| text[part].as_f64().unwrap()).sum::<f64>()
        + ["attention", "mlp"]
            .iter()
            .flat_map(|part| text[part].as_array().unwrap())
            .map(|part| part.as_f64().unwrap())
            .sum::<f64>();
    assert!((sum - (logit(" ") - logit("x"))).abs() < 1e-5, "{sum} {} {}", logit(" "), logit("x"));
    assert!(
        (text["lens"][4]["logit"].as_f64().unwrap() - logit(" ")).abs() < 1e-5
            && text["lens"][4]["point"] == "final_post"
    );
    assert!(found["largest_difference"].as_f64().unwrap() < 1e-5);
    // Of layers without biases attention is its heads.
    let of_heads: f64 = text["heads"][1].as_array().unwrap().iter().map(|head| head.as_f64().unwrap()).sum();
    assert!((of_heads - text["attention"][1].as_f64().unwrap()).abs() < 1e-5);
    assert_eq!(column(&found, "logit").len(), 4);

    let (_, _, rows) = look(&["--rows", "3", "--layers", "1"]);
    assert_eq!((rows["texts"].as_array().unwrap().len(), column(&rows, "logit").len()), (3, 2));
    assert!(rows["largest_difference"].as_f64().unwrap() < 1e-5);
    // A head that is switched off adds nothing.
    std::fs::write(
        world.dir.path().join("off.toml"),
        "[[edits]]\nsite = \"z\"\nlayers = [1]\nheads = [0]\nchange = { scale = 0 }\n",
    )
    .unwrap();
    let (_, _, off) = look(&["--text", "the cat", "--intervention", "off.toml"]);
    assert_eq!(
        column(&off, "logit").iter().map(|&logit| logit == 0.0).collect::<Vec<_>>(),
        [false, false, true, false]
    );
    for (args, words) in [
        (&["--lens", "--sinks"][..], "cannot be used with"),
        (&["--answer", "a"], "--lens"),
        (&["--lens", "--instead", "a"], "--answer"),
    ] {
        assert!(world.fails(2, &[&["inspect", "run"], args].concat()).contains(words), "{args:?}");
    }
}

#[test]
fn heads_are_switched_off_patched_and_compared() {
    let world = world();
    world.succeeds(&["train", "recipe.toml", "--out", "run", "training.steps=4"]);
    let (out, _) = world.succeeds(&["heads", "ablate", "run", "--out", "seen"]);
    assert_eq!(out.lines().count(), 5, "two layers of two heads, and a head line: {out}");
    let ablation = json(&world, "seen/ablation.json");
    for kind in ["zero_kl", "mean_kl", "resample_kl", "gate"] {
        assert!(column(&ablation, kind).iter().all(|&value| value > 0.0), "{kind}: {ablation}");
    }
    assert!(ablation["rank_correlation_of_gate_and_kl"]["zero"].is_f64());
    assert_whole(&world.dir.path().join("seen/ablation.html"));
    // A file that replaces a head by its mean does what the table says of the same rows.
    world.succeeds(&["heads", "ablate", "run", "--out", "seen", "--write-means", "means.safetensors"]);
    let mean = "tensors = \"means.safetensors\"\n[[edits]]\nsite = \"z\"\nlayers = [0]\nheads = [1]\nchange = { replace = \"mean\" }\n";
    std::fs::write(world.dir.path().join("mean.toml"), mean).unwrap();
    let eval = |more: &[&str]| {
        let (out, _) = world.succeeds(&[&["eval", "run", "--batches", "1"], more].concat());
        serde_json::from_str::<Value>(&out).unwrap()["loss"].as_f64().unwrap()
    };
    let moved = eval(&["--intervention", "mean.toml"]) - eval(&[]);
    assert!((moved - column(&ablation, "mean_loss")[1]).abs() < 1e-5 && moved != 0.0, "{moved} {ablation}");
    let one = ["heads", "ablate", "run", "--text", "the cat", "--heads", "1", "--out", "one", "--json"];
    let printed = world.succeeds(&one).0;
    assert_eq!(printed.as_bytes(), world.read("one/ablation.json"), "what is printed is what is written");
    assert!(json(&world, "one/ablation.json")["heads"][0]["resample_kl"].is_null(), "there is no other text");

    for (task, out) in
        [("indirect_object", "io.jsonl"), ("induction", "induction.jsonl"), ("greater_than", "years.jsonl")]
    {
        world.succeeds(&["heads", "pairs", "run", "--task", task, "--count", "3", "--out", out]);
        assert_eq!(String::from_utf8(world.read(out)).unwrap().lines().count(), 3);
    }
    let patch = ["heads", "patch", "run", "induction.jsonl", "--out", "seen"];
    let (first, _) = world.succeeds(&patch);
    let whole = world.read("seen/patch.json");
    // As if it had been killed in the middle of a line: the rest is done again, to the same result.
    let log = String::from_utf8(world.read("seen/patch.log.jsonl")).unwrap();
    let lines = log.lines().count();
    std::fs::write(world.dir.path().join("seen/patch.log.jsonl"), &log[..log.len() - 20]).unwrap();
    let (second, told) = world.succeeds(&patch);
    assert_eq!((second, world.read("seen/patch.json")), (first, whole));
    assert!(told.contains(&format!("going on behind {} runs", lines - 2)), "{told}");
    assert_eq!(String::from_utf8(world.read("seen/patch.log.jsonl")).unwrap(), log);
    assert!(world.fails(1, &["heads", "patch", "run", "io.jsonl", "--out", "seen"]).contains("of other pairs"));

    let path = ["--method", "path", "--receivers", "1.0", "--input", "k", "--out", "path"];
    world.succeeds(&[&["heads", "patch", "run", "io.jsonl"][..], &path].concat());
    let effects = column(&json(&world, "path/patch.json"), "effect");
    assert!(effects[2] == 0.0 && effects[3] == 0.0, "heads of the receiver's layer are not below it: {effects:?}");
    world.succeeds(&[
        "heads",
        "patch",
        "run",
        "io.jsonl",
        "--method",
        "attribution",
        "--position",
        "-3",
        "--out",
        "last",
    ]);
    world.succeeds(&["heads", "edges", "run", "io.jsonl", "--top", "4,1000", "--out", "seen"]);
    let circuits = json(&world, "seen/edges.json")["circuits"].clone();
    let kept = circuits[1]["faithfulness"].as_f64().unwrap();
    assert!((kept - 1.0).abs() < 1e-3, "all edges keep everything: {circuits}");
    assert!(circuits[0]["edges"].as_u64().unwrap() <= 4);
    let (out, _) = world.succeeds(&["heads", "overlap", "seen/patch.json", "seen/edges.json", "--share", "1"]);
    assert!(out.contains("\"overlap\": 1.0"), "{out}");
    let both: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(both["columns"], serde_json::json!(["effect", "node"]), "no column of both: the first of each");
    let same = ["heads", "overlap", "seen/patch.json", "seen/patch.json", "--share", "0.5"];
    assert!(world.succeeds(&same).1.contains("by effect are in both"));
    let told = world.fails(2, &[&same[..], &["--column", "node"]].concat());
    assert!(told.contains("seen/patch.json has no numbers in node; it has"), "{told}");
    world.succeeds(&["heads", "decisions", "run", "io.jsonl", "--out", "seen"]);
    let decisions = json(&world, "seen/decisions.json");
    assert!(decisions["decisions"].as_u64().unwrap() > 0 && decisions["knock_out"]["random_heads"].is_f64());
    world.succeeds(&["heads", "repair", "run", "induction.jsonl", "--off", "0.1", "--out", "seen"]);
    let parts = json(&world, "seen/repair.json")["parts"].as_array().unwrap().len();
    assert_eq!(parts, 4, "two feed-forward layers and the heads of the second layer");
    world.succeeds(&["inspect", "run", "--copying", "--tokens", "50", "--out", "seen"]);
    let copying = json(&world, "seen/copying.json");
    assert!(column(&copying, "suppressed").len() == 4 && copying["heads"][0]["explained"].is_f64(), "{copying}");
    // A folder without a recipe has no texts: its weights are told of all the same.
    world.succeeds(&["export", "run", "--out", "exported"]);
    world.succeeds(&["inspect", "exported", "--copying", "--tokens", "50", "--out", "bare"]);
    let bare = json(&world, "bare/copying.json");
    assert_eq!(column(&bare, "suppressed"), column(&copying, "suppressed"));
    assert!(bare["heads"][0]["explained"].is_null(), "{bare}");
}

#[test]
fn mistakes_about_heads_and_pairs_are_told_before_anything_runs() {
    let world = world();
    world.succeeds(&["train", "recipe.toml", "--out", "run", "training.steps=1", "lr_scheduler.warmup_steps=0"]);
    let good = r#"{"clean": "ab a", "corrupt": "cb c", "right": "b", "wrong": "c"}"#;
    let pairs = |line: &str| std::fs::write(world.dir.path().join("p.jsonl"), format!("{good}\n{line}\n")).unwrap();
    pairs(r#"{"clean": "abc", "corrupt": "ab", "right": "b", "wrong": "c"}"#);
    for command in ["patch", "edges", "decisions"] {
        let told = world.fails(1, &["heads", command, "run", "p.jsonl"]);
        assert!(told.contains("p.jsonl:2: its clean prompt has 3 tokens and its corrupt one 2"), "{told}");
    }
    pairs(r#"{"clean": "a", "corrupt": "b", "right": "b", "wrong": "c"}"#);
    for (args, words) in [
        (vec!["patch", "run", "p.jsonl", "--receivers", "1.0"], "--receivers is for --method path"),
        (vec!["patch", "run", "p.jsonl", "--method", "path", "--receivers", "2.0"], "no layer 2"),
        (vec!["patch", "run", "p.jsonl", "--method", "path", "--receivers", "1.2"], "has no head 2; it has 2, from 0"),
        (vec!["patch", "run", "p.jsonl", "--method", "path", "--receivers", "first"], "a layer and a head such as 3.1"),
        (vec!["patch", "run", "p.jsonl", "--position", "3"], "3 is in no prompt of 1 tokens"),
        (vec!["patch", "run", "p.jsonl", "--method", "path", "--position", "all"], "last position alone"),
        (vec!["decisions", "run", "p.jsonl", "--threshold", "1.5"], "1.5 must be above 0 and at most 1"),
        (vec!["repair", "run", "p.jsonl", "--off", "0.2"], "no head 0.2"),
        (vec!["repair", "run", "p.jsonl", "--off", "0.1"], "all of one length"),
        (vec!["ablate", "run", "--layers", "2"], "--layers: 2 is not below 2"),
        (vec!["history", "nowhere"], "has no checkpoints"),
        (vec!["history", "run"], "one checkpoint alone"),
        (vec!["pairs", "run", "--task", "induktion"], "did you mean"),
    ] {
        let told = world.fails(2, &[&["heads"], &args[..]].concat());
        let similar = words == "did you mean" && told.contains("induction");
        assert!(told.contains(words) || similar, "{args:?}: {told}");
    }
    std::fs::write(world.dir.path().join("a.json"), "{}").unwrap();
    assert!(world.fails(1, &["heads", "overlap", "a.json", "a.json"]).contains("it has no heads"));
    let told = world.fails(1, &["heads", "patch", "run", "nowhere.jsonl"]);
    assert!(told.contains("nowhere.jsonl"), "{told}");
}

#[test]
fn heads_of_a_run_are_followed_and_nothing_of_it_changes() {
    let world = world();
    let train = |out: &str, more: &[&str]| {
        world.succeeds(&[&["train", "recipe.toml", "--out", out, "checkpoint.keep_latest_k=0"][..], more].concat());
    };
    train("plain", &["training.dropout=0.1"]);
    train("run", &["training.dropout=0.1", "metrics.heads_interval=5"]);
    let weights = |run: &str| world.read(&format!("{run}/step-00000012/model.safetensors"));
    assert!(weights("plain") == weights("run"), "measuring heads changed the weights");
    let lines = |run: &str| -> Vec<Value> {
        let text = String::from_utf8(world.read(&format!("{run}/metrics.jsonl"))).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let name = "heads/layer_01/head_00/importance";
    let steps: Vec<u64> =
        lines("run").iter().filter(|line| line[name].is_f64()).map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [0, 5, 10, 12]);
    assert!(lines("plain").iter().all(|line| line[name].is_null()));
    assert!(
        world
            .events("run")
            .iter()
            .any(|event| event.tag == "validation/heads/layer_00/head_01/induction" && event.step == 5)
    );

    let (out, _) = world.succeeds(&["heads", "history", "run", "--share", "0.5", "--out", "seen"]);
    assert_eq!(out.lines().count(), 5, "{out}");
    let history = json(&world, "seen/history.json");
    let checkpoints = history["checkpoints"].as_array().unwrap();
    assert_eq!(checkpoints.len(), 3);
    for (at, checkpoint) in checkpoints.iter().enumerate() {
        let cohorts: u64 = checkpoint["cohorts"].as_array().unwrap().iter().map(|count| count.as_u64().unwrap()).sum();
        assert!(cohorts == 2 && checkpoint["cohorts"].as_array().unwrap().len() == at + 1, "{checkpoint}");
        assert!(checkpoint["random"]["jaccard_with_base"].is_f64() && checkpoint["loss_without_random_heads"].is_f64());
    }
    assert_eq!(checkpoints[0]["jaccard_with_base"], 1.0);
    assert_whole(&world.dir.path().join("seen/history.html"));
    let told = world.fails(2, &["validate", "recipe.toml", "metrics.heads_interval=-1"]);
    assert!(told.contains("heads_interval"), "{told}");
}

#[test]
fn maps_are_swapped_beside_controls_and_models_that_do_not_fit_are_refused() {
    let world = world();
    let train = |out: &str, more: &str| {
        let rate = "optimizer.adamw.lr=0.05";
        world.succeeds(&["train", "recipe.toml", "lr_scheduler.warmup_steps=1", rate, "--out", out, more]);
    };
    train("run", "debug.seed=0");
    train("other", "debug.seed=1");
    let swap = ["heads", "swap", "run", "other", "--rows", "2", "--out", "seen"];
    let (out, told) = world.succeeds(&[&swap[..], &["--shares", "0.5,1"]].concat());
    assert_eq!(out.lines().count(), 16, "both layers alone and together, two shares and three controls of each: {out}");
    assert!(
        told.contains("maps in layers 0+1 accuracy goes from") && told.contains("own maps change nothing"),
        "{told}"
    );
    let result = json(&world, "seen/swap.json");
    let swaps = result["swaps"].as_array().unwrap();
    assert_eq!(swaps.len(), 15);
    for own in swaps.iter().filter(|swap| swap["maps"] == "own") {
        assert!(own["kl"] == 0.0 && own["loss"] == result["loss"], "{own}");
    }
    let together = &swaps[11];
    assert_eq!((&together["layers"], &together["maps"]), (&serde_json::json!([0, 1]), &"donor".into()));
    assert!(together["kl"].as_f64().unwrap() > 1e-9, "{together}");
    assert_whole(&world.dir.path().join("seen/swap.html"));
    // Of one text there is no other.
    world.succeeds(&[
        "heads", "swap", "run", "other", "--text", "the cat", "--layers", "1", "--shares", "1", "--out", "one",
    ]);
    let one = json(&world, "one/swap.json")["swaps"].clone();
    assert!(one[2]["maps"] == "other_text" && one[2]["loss"].is_null() && one[0]["loss"].is_f64(), "{one}");

    train("narrow", "model.decoder.attention.softmax.n_heads=1");
    train("deep", "model.decoder.n_layers=3");
    for (args, words) in [
        (vec!["run", "narrow"], "the receiver has 2 maps in layer 0 and the donor 1"),
        (vec!["run", "deep"], "the receiver has 2 layers and the donor 3"),
        (vec!["run", "other", "--layers", "2"], "--layers: 2 is not below 2"),
        (vec!["run", "other", "--shares", "0"], "0 must be above 0 and at most 1"),
    ] {
        let told = world.fails(2, &[&["heads", "swap"], &args[..]].concat());
        assert!(told.contains(words), "{args:?}: {told}");
    }
}
