//! Comparisons: what runs, what is refused, what goes on, and what the reports say.

use std::process::Stdio;
use std::time::Duration;

use crate::world::{SMALL, World};

/// Two arms, two seeds, a few steps.
const TINY: &str = r#"
extends = "recipe.toml"
seeds = [3, 4]
match = "parameters"
tolerance = 0.2

[recipe]
metrics.tensorboard = false
training.gradient_accumulation_steps = 1

[[arm]]
name = "GQA <plain>"
recipe.model.decoder.attention.softmax = { n_heads = 4, n_kv_heads = 2 }

[[arm]]
name = "DIFF"

[[claim]]
claim = "Noise can be cancelled"
paper = "Nobody 2026"
arms = ["GQA <plain>", "DIFF"]
"#;

fn world(comparison: &str) -> World {
    let world = World::new(SMALL);
    write(&world, comparison);
    world
}

fn write(world: &World, comparison: impl AsRef<str>) {
    std::fs::write(world.dir.path().join("zoo.toml"), comparison.as_ref()).unwrap();
}

fn markdown(world: &World) -> String {
    String::from_utf8(world.read("checkpoints/compare/zoo/report.md")).unwrap()
}

const COMPARE: [&str; 4] = ["compare", "zoo.toml", "--jobs", "2"];

fn json(world: &World, path: &str) -> serde_json::Value {
    serde_json::from_slice(&world.read(path)).unwrap()
}

/// The results of all runs, by folder.
fn results(world: &World) -> Vec<(String, serde_json::Value)> {
    let runs = world.dir.path().join("checkpoints/compare/zoo/runs");
    let names = std::fs::read_dir(runs).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    let file = |name: &String| format!("checkpoints/compare/zoo/runs/{name}/result.json");
    names.retain(|name| world.dir.path().join(file(name)).exists());
    names.into_iter().map(|name| (name.clone(), json(world, &file(&name)))).collect()
}

#[test]
fn a_comparison_runs_once_and_reports_every_number() {
    let world = world(TINY);
    let (out, _) = world.succeeds(&["compare", "zoo.toml", "--dry-run"]);
    assert!(out.contains("runs       4") && out.contains("finished   0 of 4") && out.contains("time "), "{out}");
    assert!(!world.dir.path().join("checkpoints").exists(), "a plan writes nothing");

    let (_, err) = world.succeeds(&COMPARE);
    assert!(err.contains("match    DIFF: model.decoder.d_ff = ") && err.contains("Against GQA <plain>"), "{err}");
    let before = results(&world);
    assert_eq!(before.len(), 4, "a folder a run");
    let parameters = |arm: &str| before.iter().find(|run| run.0.starts_with(arm)).unwrap().1["parameters"].as_f64();
    let (base, other) = (parameters("gqa-plain-").unwrap(), parameters("diff-").unwrap());
    assert!((other - base).abs() / base < 0.02, "{base} and {other} were to be equal");

    // The numbers of the report are those of the runs.
    let markdown = markdown(&world);
    for (name, result) in &before {
        let loss = format!("{:.4}", result["validation"]["loss"].as_f64().unwrap());
        assert!(markdown.contains(&loss), "{name}: no {loss} in {markdown}");
    }
    let loss = |arm: &str, seed: &str| {
        let run = before.iter().find(|run| run.0.starts_with(&format!("{arm}-seed-{seed}-"))).unwrap();
        run.1["validation"]["loss"].as_f64().unwrap()
    };
    let difference = ["3", "4"].map(|seed| loss("diff", seed) - loss("gqa-plain", seed));
    let mean = format!("| DIFF | {:+.4} |", (difference[0] + difference[1]) / 2.0);
    assert!(markdown.contains(&mean), "no {mean} in {markdown}");

    crate::pages::assert_whole(&world.dir.path().join("checkpoints/compare/zoo/report.html"));

    // Nothing is trained again, and the report is the same.
    let (_, err) = world.succeeds(&COMPARE);
    assert!(err.contains("4 runs, 4 of them have finished before") && !err.contains("started"), "{err}");
    assert_eq!(results(&world), before);
    assert_eq!(world.read("checkpoints/compare/zoo/report.md"), markdown.into_bytes());

    // Another recipe is another run.
    write(&world, TINY.replace("accumulation_steps = 1", "accumulation_steps = 2"));
    let (out, _) = world.succeeds(&["compare", "zoo.toml", "--dry-run", "--no-probe", "--device", "cpu"]);
    assert!(out.contains("finished   0 of 4"), "{out}");
}

#[test]
fn wrong_arms_are_refused_by_name_before_anything_runs() {
    for (change, with, words) in [
        ("{ n_heads = 4,", "{ n_headz = 4,", "arm `GQA <plain>`: unknown key `n_headz`"),
        ("{ n_heads = 4,", "{ n_heads = 3,", "arm `GQA <plain>`: n_heads (3) must divide d_model (16)"),
        (
            "tolerance = 0.2",
            "solve = \"model.decoder.attention.grouped_differential.lambda_init.constant\"",
            "arm `DIFF`",
        ),
        (
            "match = \"parameters\"",
            "match = \"kv_cache\"",
            "arm `DIFF`: match = \"kv_cache\": model.decoder.d_ff does not change",
        ),
        ("name = \"DIFF\"", "name = \"DIFF\"\nrecipe.training.seq_len = 8", "arm `DIFF`: training.seq_len differs"),
        (
            "name = \"DIFF\"",
            "name = \"DIFF\"\nrecipe.model.decoder.d_ff = 8",
            "arm `DIFF`: model.decoder.d_ff is what match seeks",
        ),
        ("name = \"DIFF\"", "name = \"GQA <plain>\"", "two arms have this name"),
        ("seeds = [3, 4]", "seeds = []", "seeds is empty"),
        ("seeds = [3, 4]", "seedz = [3, 4]", "did you mean `seeds`?"),
        ("seeds = [3, 4]", "seeds = [3, 4]\nsweep.optimizer.adamw.lr = 3", "must be a list"),
        ("seeds = [3, 4]", "seeds = [3, 4]\nbase = \"MQA\"", "no arm is called \"MQA\""),
        ("seeds = [3, 4]", "seeds = [3, 4]\nmetric = \"bits_per_byte\"", "metric: data.markov has no bits per byte"),
    ] {
        let world = world(&TINY.replace(change, with));
        let err = world.fails(2, &COMPARE);
        assert!(err.contains(words), "{with}: {err}");
        assert!(!world.dir.path().join("checkpoints").exists(), "nothing runs: {with}");
        assert!(world.fails(2, &["validate", "zoo.toml"]).contains(words));
    }
    let world = world(TINY);
    assert!(world.fails(2, &["train", "zoo.toml"]).contains("`polyhead compare` runs it"));
    assert!(world.fails(2, &["compare", "recipe.toml"]).contains("`polyhead train` runs a recipe"));
}

#[test]
fn a_sweep_chooses_on_one_half_and_reports_the_other_and_failures_are_told() {
    // A learning rate of 1000 breaks the loss: that choice fails, and is not silently left out.
    let comparison = TINY.replace("tolerance = 0.2", "tolerance = 0.2\nsweep.optimizer.adamw.lr = [1e-3, 1e-5, 1e3]");
    let quick = "[recipe]\nvalidation.interval = 0\ncheckpoint.interval = 0\n";
    let world = world(&comparison.replace("[recipe]\n", quick));
    let (code, err) = {
        let output = world.run(&COMPARE);
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let markdown = markdown(&world);
    let failed = err.matches("FAILED").count();
    match failed {
        0 => assert_eq!(code, Some(0), "{err}"),
        _ => assert!(code == Some(1) && markdown.matches("**FAILED").count() == failed, "{err}\n{markdown}"),
    }
    assert!(markdown.contains("chosen optimizer.adamw.lr = 0.001"), "{markdown}");
    let chosen = results(&world).into_iter().filter(|(_, result)| {
        let loss = format!("{:.4}", result["reporting"]["loss"].as_f64().unwrap());
        markdown.contains(&format!("| {loss} |"))
    });
    assert_eq!(chosen.count(), 4, "what is reported is the half that did not choose: {markdown}");
}

#[test]
#[cfg(unix)]
fn killed_or_interrupted_it_goes_on_where_it_was() {
    let steps = "steps = 12";
    // By a launcher, which signals have to pass; with the threads that runs have without one.
    let launched = [&COMPARE[..], &["--launcher", "env"]].concat();
    let threads = (std::thread::available_parallelism().unwrap().get() / 2).max(1).to_string();
    let run = |world: &World| {
        let mut command = world.command(&launched);
        command.env("RAYON_NUM_THREADS", &threads).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let long = World::new(&SMALL.replace(steps, "steps = 150").replace("interval = 4", "interval = 20"));
    write(&long, TINY);
    let logged = |world: &World| {
        let runs = std::fs::read_dir(world.dir.path().join("checkpoints/compare/zoo/runs"));
        let logs = runs.into_iter().flatten().map(|run| run.unwrap().path().join("metrics.jsonl"));
        logs.map(|log| std::fs::metadata(log).map_or(0, |meta| meta.len())).sum::<u64>()
    };
    // SIGINT to it alone: its runs save, and it says how to go on.
    for signal in ["-INT", "-KILL"] {
        let mut child = run(&long);
        let before = logged(&long);
        while logged(&long) < before + 4000 {
            std::thread::sleep(Duration::from_millis(10));
            assert!(child.try_wait().unwrap().is_none(), "ended by itself");
        }
        std::process::Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        let code = child.wait().unwrap().code();
        assert_eq!(code, (signal == "-INT").then_some(130));
    }
    let (_, err) = long.succeeds(&COMPARE);
    let went_on = std::fs::read_dir(long.dir.path().join("checkpoints/compare/zoo/runs")).unwrap().filter(|run| {
        let log = std::fs::read_to_string(run.as_ref().unwrap().path().join("log.txt")).unwrap();
        log.contains("resume: from")
    });
    assert!(went_on.count() > 0, "a run goes on from its checkpoint: {err}");
    let interrupted = results(&long);

    // What was interrupted reached exactly what a comparison without interruption reaches.
    let whole = World::new(&SMALL.replace(steps, "steps = 150").replace("interval = 4", "interval = 20"));
    write(&whole, TINY);
    whole.succeeds(&COMPARE);
    for ((name, a), (other, b)) in interrupted.iter().zip(&results(&whole)) {
        assert_eq!((name, &a["validation"]), (other, &b["validation"]));
    }
}

/// One that has no machine for a run the first time, under two names.
#[test]
#[cfg(unix)]
fn a_launcher_starts_every_run_and_what_it_lost_runs_the_next_time() {
    use std::os::unix::fs::PermissionsExt;
    let world = world(TINY);
    let here = world.dir.path();
    let script = "#!/bin/sh\necho \"$*\" >> launched\nshift 2\n\
        case \"$*\" in *diff-seed-4*) [ -e lost ] || { touch lost; echo no machine >&2; exit 137; };; esac\nexec \"$@\"\n";
    for name in ["launch", "srun"] {
        std::fs::write(here.join(name), script).unwrap();
        std::fs::set_permissions(here.join(name), PermissionsExt::from_mode(0o755)).unwrap();
    }
    let with = |launcher: &'static str| [&COMPARE[..], &["--launcher", launcher]].concat();

    let missing = world.fails(2, &with("srun-of-nobody -n 1"));
    assert!(missing.contains("--launcher") && missing.contains("no program `srun-of-nobody`"), "{missing}");
    let (out, _) = world.succeeds(&[&with("./launch -n 1")[..], &["--dry-run", "--no-probe"]].concat());
    assert!(out.contains("2 at a time, each started by `./launch -n 1`"), "{out}");
    assert!(!here.join("checkpoints").exists() && !here.join("launched").exists());

    let err = world.fails(1, &with("./launch -n 1"));
    assert!(err.contains("exit status: 137") && err.contains("no machine"), "{err}");
    assert!(err.contains("1 of 4 runs failed") && markdown(&world).contains("**FAILED"), "{err}");
    assert_eq!(results(&world).len(), 3);

    let path = std::env::join_paths([here.to_owned(), "/usr/bin".into(), "/bin".into()]).unwrap();
    let output = world.command(&with("slurm")).env("PATH", path).output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && err.contains("4 runs, 3 of them have finished before"), "{err}");
    assert_eq!(results(&world).len(), 4);
    let launched = String::from_utf8(world.read("launched")).unwrap();
    let words: Vec<&str> = launched.lines().filter_map(|line| line.split_once(" /")).map(|(words, _)| words).collect();
    assert_eq!(words, ["-n 1", "-n 1", "-n 1", "-n 1", "--ntasks=1 --exclusive"], "{launched}");

    let err = world.fails(1, &["compare", "zoo.toml", "--out", "idle", "--launcher", "true"]);
    assert!(err.contains("4 of 4 runs failed") && err.contains("ended without a result"), "{err}");
}

/// A parent for every seed, and a wider model made of it.
const PREPARED: &str = r#"
extends = "recipe.toml"
seeds = [3, 4]

[[prepare]]
name = "parent"
train = "recipe.toml"
recipe.training.steps = 4

[[prepare]]
name = "wide"
from = "parent"
grow = { width = 2 }

[[arm]]
name = "as it was"
recipe.model.pretrained = "{parent}"

[[arm]]
name = "grown"
recipe.model.pretrained = "{wide}"
"#;

#[test]
fn arms_start_from_what_is_made_once_for_every_seed() {
    let prepared = world(PREPARED);
    let (out, _) = prepared.succeeds(&["compare", "zoo.toml", "--dry-run"]);
    assert!(
        out.contains("4 preparations, 0 of them finished") && out.contains("grow checkpoints/compare/zoo/prepared"),
        "{out}"
    );
    prepared.succeeds(&["validate", "zoo.toml"]);
    assert!(!prepared.dir.path().join("checkpoints").exists(), "a plan writes nothing");

    let (_, err) = prepared.succeeds(&COMPARE);
    assert!(err.contains("finished  wide, seed 4") && err.contains("Against as it was"), "{err}");
    let parents = |name: &str| json(&prepared, &format!("checkpoints/compare/zoo/prepared/{name}/prepared.json"));
    let folders = std::fs::read_dir(prepared.dir.path().join("checkpoints/compare/zoo/prepared")).unwrap();
    let names = folders.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let names: Vec<String> = names.filter(|name| !name.ends_with(".log")).collect();
    assert_eq!(names.len(), 4, "{names:?}");
    let all = results(&prepared);
    assert_eq!(all.len(), 4);
    for (name, _) in &all {
        // Each run starts from the model of its own seed.
        let recipe =
            String::from_utf8(prepared.read(&format!("checkpoints/compare/zoo/runs/{name}/recipe.toml"))).unwrap();
        let seed = name.split("-seed-").nth(1).unwrap().split('-').next().unwrap();
        let from = names.iter().find(|made| recipe.contains(&format!("prepared/{made}\""))).unwrap();
        assert!(from.contains(&format!("-seed-{seed}-")) && parents(from)["command"].is_string(), "{name} from {from}");
        assert_eq!(from.starts_with("wide"), name.starts_with("grown"));
    }
    let markdown = markdown(&prepared);
    assert!(markdown.contains("Made before, for every seed anew (here seed 3): polyhead train"), "{markdown}");
    assert!(markdown.contains("| tokens until the last loss of the base arm |"), "{markdown}");

    // Nothing is made twice; what has changed is made anew, and with it what was made of it.
    let (_, err) = prepared.succeeds(&COMPARE);
    assert!(!err.contains("started"), "{err}");
    // Flags in a string, as they were written once, are the same preparation.
    let flags = PREPARED.replace("{ width = 2 }", "\"--width x2\"");
    write(&prepared, flags);
    let (out, err) = prepared.succeeds(&["compare", "zoo.toml", "--dry-run", "--no-probe"]);
    assert!(err.contains("warning: zoo.toml: prepare.1.grow is flags in a string"), "{err}");
    assert!(out.contains("finished   "), "what was prepared is used again: {out}");
    write(&prepared, PREPARED.replace("steps = 4", "steps = 5"));
    let (out, _) = prepared.succeeds(&["compare", "zoo.toml", "--dry-run"]);
    assert!(out.contains("4 preparations, 0 of them finished"), "{out}");

    for (change, with, words) in [
        ("\"{wide}\"", "\"{broad}\"", "arm `grown`: no preparation called \"broad\" makes a model"),
        ("from = \"parent\"", "from = \"wide\"", "prepare `wide`: from must name an earlier preparation"),
        ("{ width = 2 }", "{ girth = 2 }", "unknown key `girth` in prepare.1.grow"),
        ("{ width = 2 }", "\"--girth x2\"", "unexpected argument '--girth'"),
        ("train = \"recipe.toml\"", "grow = {}", "prepare `parent`: recipe changes what is trained"),
        ("grow = { width = 2 }", "", "prepare `wide`: give exactly one of train, convert, grow and embedding"),
        ("steps = 4", "stepz = 4", "unknown key"),
    ] {
        write(&prepared, PREPARED.replace(change, with));
        let err = prepared.fails(2, &["compare", "zoo.toml", "--dry-run"]);
        assert!(err.contains(words), "{with}: {err}");
        assert!(prepared.fails(2, &["validate", "zoo.toml"]).contains(words));
    }

    // A preparation that fails is told with the end of its log.
    let fails = PREPARED.replace("width = 2", "signal_heads = 0");
    write(&prepared, fails);
    let output = prepared.run(&COMPARE);
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && err.contains("prepare `wide`, seed "), "{err}");
}

#[test]
fn trained_runs_are_put_to_the_comparisons_tasks() {
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]"));
    let write = |name: &str, text: &str| std::fs::write(world.dir.path().join(name), text).unwrap();
    write("book.txt", &"the cat sat on the mat. ".repeat(60));
    write("prompts.txt", "the cat\nthe mat\n");
    let tasks = "evaluate = [\"--task eigenscore --prompts prompts.txt --samples 2 --new-tokens 4\"]\nseeds =";
    write("zoo.toml", &TINY.replace("seeds =", tasks));
    let (_, err) = world.succeeds(&COMPARE);
    assert_eq!(err.matches("evaluated ").count(), 4, "{err}");
    let markdown = markdown(&world);
    let row = markdown.lines().find(|line| line.starts_with("| eigenscore/ees |")).unwrap();
    assert_eq!(row.matches('±').count(), 2, "a mean over two seeds for each arm: {row}");
    let (_, err) = world.succeeds(&COMPARE);
    assert!(!err.contains("evaluated "), "nothing is asked twice: {err}");

    write("zoo.toml", &TINY.replace("seeds =", "evaluate = [\"--tusk facts\"]\nseeds ="));
    assert!(world.fails(2, &["validate", "zoo.toml"]).contains("evaluate: unexpected argument '--tusk'"));
    write("zoo.toml", &TINY.replace("seeds =", "evaluate = [\"--task facts\"]\nseeds ="));
    let err = world.fails(1, &COMPARE);
    assert!(err.contains(": eval --task facts: ") && err.contains("did not learn generated facts"), "{err}");
}

#[test]
fn heads_are_told_and_two_runs_lie_side_by_side() {
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]"));
    std::fs::write(world.dir.path().join("book.txt"), "the cat sat on the mat. ".repeat(60)).unwrap();
    world.succeeds(&["train", "recipe.toml", "--out", "a"]);
    world.succeeds(&["train", "recipe.toml", "--out", "b", "debug.seed=4", "optimizer.adamw.lr=3e-3"]);
    let (out, _) = world.succeeds(&["diff", "a", "b"]);
    let line = |name: &str| out.lines().find(|line| line.trim_start().starts_with(name)).unwrap().to_owned();
    assert!(line("debug.seed").contains("0") && line("optimizer.adamw.lr").contains("0.003"), "{out}");
    assert!(!out.contains("training.steps") && !line("version").contains("differs"), "{out}");
    let losses =
        ["a", "b"].map(|run| json(&world, &format!("{run}/result.json"))["validation"]["loss"].as_f64().unwrap());
    let told = line("validation.loss");
    let words: Vec<&str> = told.split_whitespace().collect();
    let (change, difference) = (words[3].parse::<f64>().unwrap(), losses[1] - losses[0]);
    assert!((change - difference).abs() <= 0.005 * difference.abs(), "three significant digits: {told}");
    assert!(told.ends_with(if difference < 0.0 { "right is better" } else { "left is better" }), "{told}");
    assert!(world.fails(2, &["diff", "a", "nowhere"]).contains("nowhere/recipe.toml"));

    let inspect = ["inspect", "a", "--text", "the <cat> sat", "--out", "seen"];
    let (out, _) = world.succeeds(&inspect);
    // 2 layers of 2 signal heads, and a head line.
    assert_eq!(out.lines().count(), 5, "{out}");
    assert!(out.lines().nth(1).unwrap().split_whitespace().all(|cell| cell != "–"), "every number is there: {out}");
    assert_eq!(&world.read("seen/maps-layer-01.png")[1..4], b"PNG");
    let page = String::from_utf8(world.read("seen/inspect.html")).unwrap();
    assert!(page.contains("the &lt;cat&gt; sat") && page.contains("lambda"), "{page}");
    // In each of 2 layers 2 maps side by side: a label on the left, one above each map, and what the colours mean.
    let (labels, legends) = (page.matches(">&lt;</text>").count(), page.matches("linear-gradient(").count());
    assert_eq!((labels, legends, page.matches("\u{2423}</text>").count()), (6, 2, 12));
    crate::pages::assert_whole(&world.dir.path().join("seen/inspect.html"));
    let (out, _) = world.succeeds(&["inspect", "a", "--layers", "1", "--heads", "0", "--rows", "3"]);
    assert!(out.lines().count() == 2 && world.dir.path().join("a/inspect/step-00000012/maps-layer-01.png").exists());
    assert!(world.fails(2, &["inspect", "a", "--layers", "2"]).contains("--layers: 2 is not below 2"));
    assert!(world.fails(2, &["inspect", "a", "--text", "t"]).contains("1 tokens long"));
}

/// Every arm tries the same settings; a rate of 1e3 breaks the loss.
const TUNED: &str = r#"
extends = "recipe.toml"
seeds = [3, 4]
[tune]
trials = 4
search = "grid"
[tune.ranges]
optimizer.adamw.lr = [1e-5, 1e-3, 3e-3, 1e3]
[recipe]
metrics.tensorboard = false
training.gradient_accumulation_steps = 1
validation.interval = 0
checkpoint.interval = 0
[[arm]]
name = "GQA"
recipe.model.decoder.attention.softmax = { n_heads = 4, n_kv_heads = 2 }
[[arm]]
name = "DIFF"
"#;

#[test]
fn arms_are_tuned_alike_before_they_are_compared() {
    let world = world(TUNED);
    let (out, _) = world.succeeds(&["compare", "zoo.toml", "--dry-run", "--no-probe"]);
    for words in [
        "trials     4 for each arm, 2 seeds:",
        "optimizer.adamw.lr = 0.003",
        "runs       20: 16 trials first; 2 arms, 2 seeds",
    ] {
        assert!(out.contains(words), "no {words} in {out}");
    }
    let (_, err) = world.succeeds(&COMPARE);
    assert_eq!(err.matches("chosen   ").count(), 2, "{err}");
    let report = json(&world, "checkpoints/compare/zoo/report.json");
    let markdown = markdown(&world);
    let mut runs = results(&world);
    for arm in report["arms"].as_array().unwrap() {
        let tuning = &arm["tuning"];
        let considered = tuning["considered"].as_array().unwrap();
        assert_eq!(considered.len(), 4);
        // The best mean over the seeds of the trials, which are not those of the report.
        let mean = |it: &serde_json::Value| it["selection"]["mean"].as_f64().unwrap_or(f64::INFINITY);
        let best = considered.iter().min_by(|a, b| mean(a).total_cmp(&mean(b))).unwrap();
        let rate = best["setting"]["optimizer.adamw.lr"].as_f64().unwrap();
        assert_eq!(tuning["chosen"], format!("optimizer.adamw.lr = {rate}"));
        let name = arm["name"].as_str().unwrap();
        assert!(err.contains(&format!("chosen   {name}: optimizer.adamw.lr = {rate}")), "{err}");
        let of = |seed: u64| {
            move |(folder, _): &(String, serde_json::Value)| {
                folder.starts_with(&format!("{}-seed-{seed}-", name.to_lowercase()))
            }
        };
        for (seed, count) in [(3, 1), (4, 1)] {
            let own: Vec<_> = runs.iter().filter(|run| of(seed)(run)).collect();
            assert_eq!(own.len(), count, "only the chosen setting is trained for the report");
            let loss = own[0].1["reporting"]["loss"].as_f64().unwrap();
            let told = arm["values"]["validation_loss"].as_array().unwrap();
            assert!(told.iter().any(|it| it["seed"] == seed && it["value"].as_f64() == Some(loss)), "{told:?}");
        }
        let trials = runs.iter().filter(|run| of(5)(run) || of(6)(run)).count();
        assert!((6..=8).contains(&trials), "trials of two seeds, of which a rate of 1000 may fail: {trials}");
        // Of all trials, the expected best is what the chosen one reached.
        let curve = tuning["expected_best"].as_array().unwrap();
        assert_eq!(curve.len(), 4);
        let last = curve[3]["mean"].as_f64().unwrap();
        assert!((last - best["reporting"]["mean"].as_f64().unwrap()).abs() < 1e-12, "{curve:?}");
    }
    assert!(
        markdown.contains("Every arm tried the same 4 settings")
            && markdown.contains("Expected best of so many trials")
    );
    crate::pages::assert_whole(&world.dir.path().join("checkpoints/compare/zoo/report.html"));

    // Nothing that finished is trained again, and what is chosen stays; a wider range is more trials, not other ones.
    let (_, err) = world.succeeds(&COMPARE);
    assert!(!err.contains("finished  "), "{err}");
    runs.retain(|(name, _)| results(&world).iter().any(|(other, _)| other == name));
    assert_eq!(runs, results(&world));
    let narrow = TUNED.replace("trials = 4", "trials = 2").replace("[1e-5, 1e-3, 3e-3, 1e3]", "[1e-5, 1e-4]");
    write(&world, narrow);
    let (_, err) = world.succeeds(&COMPARE);
    let beware = "warning: DIFF: optimizer.adamw.lr = 0.0001 is the largest of what was tried";
    assert!(err.contains(beware) && err.contains("runs, 4 of them have finished before"), "{err}");

    for (change, with, words) in [
        ("trials = 4", "trials = 3", "tune: trials (3) does not fit a grid of 1 keys: 4 would"),
        ("trials = 4", "trials = 4\nsweep.optimizer.adamw.lr = [1e-3]", "unknown key `sweep`"),
        (
            "[1e-5, 1e-3, 3e-3, 1e3]",
            "{ low = 1.0, high = 0.1 }",
            "optimizer.adamw.lr: low (1) must be below high (0.1)",
        ),
        ("optimizer.adamw.lr", "optimizer.adamw.rate", "arm `GQA`: unknown key `rate`"),
        ("trials = 4", "trails = 4", "did you mean `trials`?"),
        ("seeds = [3, 4]", "seeds = [3, 4]\nsweep.optimizer.adamw.lr = [1e-3]", "sweep: tune tries settings already"),
        (
            "tensorboard = false",
            "tensorboard = false\nvalidation.batches = 1",
            "validation.batches (1) must be 2 or more",
        ),
    ] {
        write(&world, TUNED.replace(change, with));
        let err = world.fails(2, &["validate", "zoo.toml"]);
        assert!(err.contains(words), "{with}: {err}");
    }
}

#[test]
fn what_is_allowed_is_allowed_for_every_run() {
    let world = world(
        "extends = \"recipe.toml\"\nseeds = [0]\n[recipe]\nmodel.pretrained = \"run\"\n[[arm]]\nname = \"a\"\n\
                       [[arm]]\nname = \"b\"\nrecipe.optimizer.adamw.lr = 1e-5\n",
    );
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    crate::faults::spoil(&world.dir.path().join("run/step-00000012"));
    let told = "--allow-nonfinite takes it";
    assert!(world.fails(1, &COMPARE).contains(told));
    // Allowed, the runs read the weights, and stop where the loss is none.
    let err = world.fails(1, &[&COMPARE[..], &["--allow-nonfinite"]].concat());
    assert!(!err.contains(told) && err.contains("FAILED    a, seed 0"), "{err}");
    // Where every step is left out, the held-out loss is none at the end: the runs have no result, and that is told again and again.
    let comparison = String::from_utf8(world.read("zoo.toml")).unwrap();
    let skipping = "[recipe]\ntraining.on_nonfinite = \"skip\"\ntraining.max_skipped_steps = 0\n";
    write(&world, comparison.replace("[recipe]\n", skipping));
    for _ in 0..2 {
        let err = world.fails(1, &[&COMPARE[..], &["--allow-nonfinite"]].concat());
        assert!(
            err.contains("FAILED    a, seed 0") && err.contains("held-out data is NaN after the last step"),
            "{err}"
        );
    }
}

/// Every arm trains as long as the first, by the clock.
const TIMED: &str = r#"
extends = "recipe.toml"
seeds = [3, 4]
match = "time"
tolerance = 0.9
[recipe]
metrics.tensorboard = false
training.steps = 60
validation.interval = 0
checkpoint.interval = 0
[[arm]]
name = "GQA"
recipe.model.decoder.attention.softmax = { n_heads = 4, n_kv_heads = 2 }
[[arm]]
name = "deep"
recipe.model.decoder.n_layers = 6
"#;

#[test]
fn arms_of_equal_time_take_as_many_steps_as_fit() {
    let world = world(TIMED);
    let (out, _) = world.succeeds(&["compare", "zoo.toml", "--dry-run", "--no-probe"]);
    assert!(out.contains("steps      of the arms are set once they have been timed"), "{out}");
    assert!(!world.dir.path().join("checkpoints").exists(), "a plan writes nothing");
    let (_, err) = world.succeeds(&COMPARE);
    let paces = json(&world, "checkpoints/compare/zoo/calibration.json");
    let pace = paces["paces"].as_object().unwrap().values().next().unwrap();
    let ratio = pace["ratio"].as_f64().unwrap();
    assert!(ratio > 1.2 && pace["rounds"].as_array().unwrap().len() >= 3, "{paces}");
    let all = results(&world);
    assert_eq!(all.len(), 4);
    for (name, result) in &all {
        let steps = result["steps"].as_u64().unwrap();
        let expected = if name.starts_with("gqa-") { 60 } else { (60.0 / ratio).round() as u64 };
        assert_eq!(steps, expected, "{name}, {ratio}");
    }
    assert!(
        err.contains("calibration: deep: a step takes") && err.contains("match    deep: training.steps ="),
        "{err}"
    );
    let report = json(&world, "checkpoints/compare/zoo/report.json");
    let seconds = |arm: &str| {
        let own = all.iter().filter(|(name, _)| name.starts_with(arm)).map(|(_, run)| run["seconds"].as_f64().unwrap());
        own.sum::<f64>()
    };
    let off = report["time_off"]["deep"].as_f64().unwrap();
    assert!((off - (seconds("deep") / seconds("gqa") - 1.0)).abs() < 1e-9, "{off}");
    let markdown = markdown(&world);
    assert!(markdown.contains(&format!("deep: {:+.2} %", 100.0 * off)), "{markdown}");

    // What was timed decides what a run is: it is not timed again.
    let (_, err) = world.succeeds(&COMPARE);
    // A busy machine may make it warn, which is no timing.
    let timed = err.lines().any(|line| !line.starts_with("warning") && line.contains("calibration"));
    assert!(!timed && err.contains("4 runs, 4 of them have finished before"), "{err}");
    for (change, with, words) in [
        (
            "tolerance = 0.9",
            "solve = \"model.decoder.d_ff\"",
            "match = \"time\" seeks training.steps, and no other key",
        ),
        ("n_layers = 6", "n_layers = 6\nrecipe.training.steps = 9", "arm `deep`: training.steps is what match seeks"),
    ] {
        write(&world, TIMED.replace(change, with));
        assert!(world.fails(2, &["validate", "zoo.toml"]).contains(words), "{with}");
    }
    // So few steps that one more or less is too much.
    write(&world, TIMED.replace("= 0.9", "= 0.0001"));
    assert!(world.fails(2, &COMPARE).contains("train for more steps"));
}

/// Two arms on a ladder of three sizes.
const LADDER: &str = r#"
extends = "recipe.toml"
seeds = [3, 4]
[recipe]
metrics.tensorboard = false
training.gradient_accumulation_steps = 1
validation.interval = 0
checkpoint.interval = 0
[ladder]
tokens_per_parameter = 0.1
[[ladder.size]]
name = "8"
recipe.model.decoder.d_model = 8
[[ladder.size]]
name = "16"
[[ladder.size]]
name = "32"
recipe.model.decoder.d_model = 32
[[arm]]
name = "GQA"
recipe.model.decoder.attention.softmax = { n_heads = 4, n_kv_heads = 2 }
[[arm]]
name = "DIFF"
"#;

#[test]
fn a_ladder_trains_sizes_as_long_as_they_are_large_and_fits_a_law() {
    let world = world(LADDER);
    let (out, _) = world.succeeds(&["compare", "zoo.toml", "--dry-run", "--no-probe"]);
    assert!(out.contains("runs       12: 6 arms, 2 seeds") && out.contains("DIFF; 32"), "{out}");
    world.succeeds(&COMPARE);
    let all = results(&world);
    assert_eq!(all.len(), 12);
    // Tokens follow the base arm's parameters, for both arms of a size.
    for size in ["8", "16", "32"] {
        let of = |arm: &str| &all.iter().find(|(name, _)| name.starts_with(&format!("{arm}-{size}-"))).unwrap().1;
        let parameters = of("gqa")["parameters"].as_f64().unwrap();
        let steps = (0.1 * parameters / 64.0).round() as u64;
        assert_eq!([of("gqa"), of("diff")].map(|run| run["steps"].as_u64().unwrap()), [steps; 2], "{size}");
    }
    let report = json(&world, "checkpoints/compare/zoo/report.json");
    let laws = report["laws"].as_array().unwrap();
    assert_eq!(laws.len(), 2);
    for law in laws {
        assert_eq!(law["rungs"].as_array().unwrap().len(), 3);
        let [low, high] = [0, 1].map(|end| law["law"]["interval"][end].as_f64().unwrap());
        let exponent = law["law"]["exponent"].as_f64().unwrap();
        assert!(low <= exponent && exponent <= high && law["law"]["n"] == 6, "{law}");
    }
    let first = &laws[0]["rungs"][0];
    let run = &all.iter().find(|(name, _)| name.starts_with("gqa-8-")).unwrap().1;
    let flops = 3.0 * run["flops_per_token"].as_f64().unwrap() * run["tokens"].as_f64().unwrap();
    assert!((first["flops"].as_f64().unwrap() - flops).abs() < 1e-6 * flops, "{first}");
    let markdown = markdown(&world);
    assert!(markdown.contains("## Power laws over training FLOPs"), "{markdown}");
    crate::pages::assert_whole(&world.dir.path().join("checkpoints/compare/zoo/report.html"));

    for (change, with, words) in [
        ("tokens_per_parameter = 0.1", "flops = [1e6, 1e7]", "a law takes 3 points or more; flops gives 2"),
        ("tokens_per_parameter = 0.1", "tokens_per_parameter = 1e-3", "less than a step of 64"),
        ("tokens_per_parameter = 0.1", "irreducible = \"fitt\"", "a number, or \"fit\""),
        (
            "name = \"DIFF\"",
            "name = \"DIFF\"\nrecipe.training.steps = 3",
            "training.steps is what the ladder's budgets decide",
        ),
        ("name = \"16\"", "name = \"16\"\nrecipe.model.decoder.d_modl = 16", "did you mean `d_model`?"),
        (
            "[[arm]]\nname = \"GQA\"",
            "[[setting]]\nname = \"x\"\n[[arm]]\nname = \"GQA\"",
            "ladder makes settings of its sizes",
        ),
    ] {
        write(&world, LADDER.replace(change, with));
        let err = world.fails(2, &["validate", "zoo.toml"]);
        assert!(err.contains(words), "{with}: {err}");
    }
    // Sizes times budgets, each with the tokens that the budget buys.
    write(&world, LADDER.replace("tokens_per_parameter = 0.1", "flops = [1e8, 2e8, 4e8]"));
    let (out, _) = world.succeeds(&["compare", "zoo.toml", "--dry-run", "--no-probe"]);
    assert!(out.contains("runs       36: 18 arms, 2 seeds") && out.contains("GQA; 8, 1e8 FLOPs"), "{out}");
}

#[test]
fn with_mup_a_wider_model_starts_smaller_and_the_base_is_plain() {
    let world = World::new(SMALL);
    let train = |out: &str, changes: &[&str]| {
        world.succeeds(&[&["train", "recipe.toml", "--out", out], changes].concat());
        json(&world, &format!("{out}/result.json"))["validation"]["loss"].as_f64().unwrap()
    };
    let mup = ["model.parametrization=mup", "model.base_width=16"];
    let plain = train("plain", &[]);
    assert_eq!(train("base", &mup), plain, "at the base width nothing changes");
    let muon = ["optimizer.muon.lr=1e-3"];
    assert_eq!(train("base-muon", &[&mup[..], &muon].concat()), train("plain-muon", &muon));
    let narrower = ["model.parametrization=mup", "model.base_width=8"];
    assert_ne!(train("wide", &narrower), plain);
    // Cut off and continued it is the same run.
    train("half", &[&narrower[..], &["training.steps=6"]].concat());
    world.succeeds(&[&["train", "recipe.toml", "--out", "half"], &narrower[..]].concat());
    for (changes, words) in [
        (&["model.parametrization=mup"][..], "takes model.base_width"),
        (&["model.parametrization=mupp", "model.base_width=8"], "mupp"),
        (&["model.base_width=8"], "are for model.parametrization = \"mup\""),
        (&["model.parametrization=mup", "model.base_width=0"], "base_width (0) must be at least 1"),
        (&["model.parametrization=mup", "model.base_width=8", "lora.rank=2"], "lora has pairs of its own"),
    ] {
        let err = world.fails(2, &[&["validate", "recipe.toml"], changes].concat());
        assert!(err.contains(words), "{changes:?}: {err}");
    }
    let resumed = world.fails(2, &["train", "recipe.toml", "--out", "wide"]);
    assert!(resumed.contains("model.parametrization"), "{resumed}");
}

/// A parent, the embedding of its rows, and one that points anywhere.
const EMBEDDED: &str = r#"
extends = "recipe.toml"
seeds = [3, 4]

[[prepare]]
name = "parent"
train = "recipe.toml"

[[prepare]]
name = "mean"
from = "parent"
embedding = {}
recipe.training.batch_size = 2

[[prepare]]
name = "anywhere"
from = "parent"
embedding = { random = 1 }

[[arm]]
name = "as it was"
recipe.model.pretrained = "{parent}"

[[arm]]
name = "embedded"
recipe.model.pretrained = "{parent}"
recipe.intervention = { tensors = "{mean}", edits = [{ site = "z", tokens = "first", change = { replace = "embedding" } }] }

[[arm]]
name = "moved"
recipe.model.pretrained = "{parent}"
recipe.intervention = { tensors = "{anywhere}", edits = [{ site = "z", tokens = "first", change = { replace = "embedding" } }] }
"#;

#[test]
fn arms_blend_in_embeddings_that_are_made_for_every_seed() {
    let world = world(EMBEDDED);
    let (out, _) = world.succeeds(&["compare", "zoo.toml", "--dry-run"]);
    assert!(out.contains("6 preparations, 0 of them finished") && out.contains("tune embedding checkpoints"), "{out}");
    world.succeeds(&COMPARE);
    let all = results(&world);
    assert_eq!(all.len(), 6);
    let mut embeddings = std::collections::BTreeSet::new();
    for (name, _) in all.iter().filter(|(name, _)| !name.starts_with("as-it-was")) {
        let seed = name.split("-seed-").nth(1).unwrap().split('-').next().unwrap();
        let recipe =
            String::from_utf8(world.read(&format!("checkpoints/compare/zoo/runs/{name}/recipe.toml"))).unwrap();
        assert!(!recipe.contains('{'), "{recipe}");
        let made = if name.starts_with("embedded") { "mean" } else { "anywhere" };
        let kept = world.read(&format!("checkpoints/compare/zoo/runs/{name}/intervention.safetensors"));
        let folders = std::fs::read_dir(world.dir.path().join("checkpoints/compare/zoo/prepared")).unwrap();
        let own = folders.map(|entry| entry.unwrap().path()).find(|path| {
            path.is_dir() && path.file_name().unwrap().to_string_lossy().starts_with(&format!("{made}-seed-{seed}-"))
        });
        let own = std::fs::read(own.unwrap().join("embedding.safetensors")).unwrap();
        assert_eq!(kept, own, "{name} has the embedding of its own seed");
        embeddings.insert(own);
    }
    assert_eq!(embeddings.len(), 4, "each seed has its own, and each random one another");
    let (_, err) = world.succeeds(&COMPARE);
    assert!(!err.contains("started"), "{err}");
    for (change, with, words) in [
        (
            "tensors = \"{mean}\"",
            "tensors = \"{parent}\"",
            "arm `embedded`: no preparation called \"parent\" makes an embedding",
        ),
        ("pretrained = \"{parent}\"", "pretrained = \"{mean}\"", "no preparation called \"mean\" makes a model"),
        (
            "from = \"parent\"\nembedding = { random",
            "from = \"mean\"\nembedding = { random",
            "must name an earlier preparation of a model",
        ),
    ] {
        write(&world, EMBEDDED.replace(change, with));
        let err = world.fails(2, &["compare", "zoo.toml", "--dry-run"]);
        assert!(err.contains(words), "{with}: {err}");
    }
}
