//! What a person types and what they are told.

use std::process::Stdio;

use polyhead_recipe::{load, resolved};
use polyhead_training::tensorboard::EventValue;

use crate::world::{SMALL, World, project};

#[test]
fn unknown_keys_are_told_all_at_once_with_place_and_way_out() {
    let recipe = SMALL
        .replace("steps = 12", "stepz = 12\nlearning_rate = 1e-3")
        .replace("n_layers = 2", "num_hidden_layers = 2");
    let err = World::new(&recipe).fails(2, &["validate", "recipe.toml"]);
    for part in [
        "recipe.toml:4:1",
        "`num_hidden_layers`",
        "model.decoder.n_layers",
        "`stepz`",
        "did you mean `steps`?",
        "optimizer.adamw.lr",
        "^^^^^",
    ] {
        assert!(err.contains(part), "no {part} in: {err}");
    }
}

#[test]
fn wrong_types_and_broken_rules_point_at_their_key() {
    let world = World::new(SMALL);
    let err = world.fails(2, &["validate", "recipe.toml", "training.seq_len=often"]);
    assert!(err.contains("command line:1:1") && err.contains("usize") || err.contains("expected"), "{err}");
    let err =
        world.fails(2, &["validate", "recipe.toml", "model.decoder.attention.grouped_differential.n_noise_heads=3"]);
    assert!(err.contains("n_noise_heads (3) must divide n_heads (4)"), "{err}");
    let err = world.fails(2, &["validate", "recipe.toml", "training.steps=0", "training.batch_size=0"]);
    assert!(err.contains("training.steps (0)") && err.contains("training.batch_size (0)"), "{err}");
    let err = world.fails(2, &["validate", "nowhere.toml"]);
    assert!(err.contains("nowhere.toml"), "{err}");
    let err = world.fails(1, &["train", "recipe.toml", "--device", "cuda", "--out", "x"]);
    assert!(err.contains("cuda"), "{err}");
}

#[test]
fn a_dashboard_that_cannot_be_shown_is_told_with_the_way_out() {
    let world = World::new(SMALL);
    let err = world.fails(2, &["train", "recipe.toml", "--tui", "--out", "run"]);
    let way_out = if cfg!(feature = "tui") { "needs a terminal" } else { "--features tui" };
    assert!(err.contains("--tui") && err.contains(way_out), "{err}");
    assert!(!world.dir.path().join("run").exists(), "nothing is written before");
}

/// What is in a recipe or in a name does not steer the terminal, and the caret stays below its sign.
#[test]
fn control_characters_are_shown_and_not_written() {
    for (recipe, shown) in [
        (format!("{SMALL}\u{1b}[31mx = 1\n"), "\u{241b}[31mx = 1"),
        (format!("{SMALL}x\u{7f} = 1\n"), "x\u{2421} = 1"),
        (format!("extends = \"a\\u001bb\"\n{SMALL}"), "a\\u{1b}b"),
    ] {
        let err = World::new(&recipe).fails(2, &["validate", "recipe.toml"]);
        assert!(err.contains(shown), "{err:?}");
        assert!(!err.contains(|sign: char| sign.is_control() && sign != '\n'), "{err:?}");
    }
}

#[test]
fn extends_and_overrides_are_layers() {
    let world = World::new(SMALL);
    std::fs::write(
        world.dir.path().join("child.toml"),
        "extends = \"recipe.toml\"\n[training]\nsteps = 3\n[data.copy]\nvocab = 5\n",
    )
    .unwrap();
    let (out, _) = world.succeeds(&["cat", "child.toml", "debug.seed=7"]);
    assert!(
        out.contains("steps = 3") && out.contains("seed = 7") && out.contains("[data.copy]") && !out.contains("markov"),
        "{out}"
    );
    std::fs::write(world.dir.path().join("resolved.toml"), &out).unwrap();
    assert_eq!(world.succeeds(&["cat", "resolved.toml"]).0, out, "what `cat` prints is a recipe");
}

#[test]
fn text_is_learned_looked_at_and_generated() {
    let world = World::new(&SMALL.replace(
        "[data.markov]\nstates = 6",
        "[data.text]\npaths = [\"book.txt\"]\n[loader]\npacking = \"documents\"",
    ));
    std::fs::write(world.dir.path().join("book.txt"), "the cat sat on the mat. ".repeat(60)).unwrap();
    let (out, _) = world.succeeds(&["preview", "recipe.toml", "--rows", "1"]);
    assert!(out.contains("->") && !out.contains('\u{1b}'), "{out}");
    let preview = |variable: &str| {
        let mut command = world.command(&["preview", "recipe.toml"]);
        String::from_utf8(command.env("CLICOLOR_FORCE", "1").env(variable, "1").output().unwrap().stdout).unwrap()
    };
    let coloured = preview("CLICOLOR_FORCE");
    assert!(coloured.contains("\u{1b}[32m") && coloured.contains("t on the m"), "{coloured}");
    assert!(!preview("NO_COLOR").contains('\u{1b}'));
    let (out, _) = world.succeeds(&["plan", "recipe.toml"]);
    assert!(out.contains("grouped_differential") && out.contains("tokens per second"), "{out}");
    let (out, err) = world.succeeds(&["plan", "recipe.toml", "--no-probe"]);
    assert!(!out.contains("tokens per second") && !err.contains("probe"), "{out}{err}");
    let (out, _) =
        world.succeeds(&["plan", "recipe.toml", "model.decoder.d_model=131072", "training.batch_size=65536"]);
    assert!(out.contains("not measured: only"), "{out}");
    let (sample, err) = world.succeeds(&["train", "recipe.toml", "--out", "run", "--device", "cpu"]);
    assert!(err.contains("bits per byte") && err.contains("saved to"), "{err}");
    let events = world.events("run");
    let text = events.iter().find(|event| event.tag == "sample").expect("the sample is in TensorBoard");
    assert_eq!(text.step, 12);
    assert!(matches!(&text.value, EventValue::Text(text) if text.contains(sample.trim_end())), "{text:?}");
    let generate = ["generate", "run", "--prompt", "the ", "--max-new-tokens", "20", "--seed", "3"];
    let (first, _) = world.succeeds(&generate);
    assert!(first.starts_with("the "));
    assert_eq!(first, world.succeeds(&generate).0, "the same seed, the same text");
    let (out, _) = world.succeeds(&["eval", "run"]);
    assert!(serde_json::from_str::<serde_json::Value>(&out).unwrap()["bits_per_byte"].as_f64().unwrap() > 0.0);
    world.succeeds(&["logits", "run", "--tokens", "1,2,3", "--out", "logits.safetensors"]);
    assert!(world.fails(2, &["logits", "run", "--tokens", "999", "--out", "x"]).contains("999"));
    world.succeeds(&["tokenizer", "train", "recipe.toml", "--vocab-size", "270", "--out", "bpe/tokenizer.json"]);
    let train = ["train", "recipe.toml", "tokenizer.huggingface.path=bpe", "debug={seed = 4}", "--out", "bpe-run"];
    let (_, err) = world.succeeds(&train);
    assert!(err.contains("bits per byte"), "{err}");
    let next = "recipe.toml tokenizer.huggingface.path=bpe 'debug={seed = 4}' training.steps=24 --out bpe-run";
    assert!(err.contains(next), "the next command goes on with the same recipe: {err}");
}

#[test]
fn frozen_weights_have_no_histograms() {
    let world = World::new(&format!("{SMALL}[freeze]\nlayers = 1\n"));
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    let has = |start: &str| world.events("run").iter().any(|event| event.tag.starts_with(start));
    assert!(has("weights/layers.1.") && !has("weights/layers.0."));
}

#[test]
fn the_doctor_tells_what_there_is() {
    let (out, _) = World::new(SMALL).succeeds(&["doctor"]);
    for part in ["devices    flex", "threads", "instruction set", "text ", "checkpoints can be written"] {
        assert!(out.contains(part), "no {part} in: {out}");
    }
    assert!(out.matches("cargo build --release --features").count() <= 1, "what is missing is said once: {out}");
    assert_eq!(data(&World::new(SMALL), "doctor")["devices"][0]["device"], "flex");
}

/// What they need and whether it is there, what they take, and the first sentence of what they are for.
#[test]
fn recipes_are_listed_with_what_they_need_and_take() {
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]"));
    let write = |name: &str, text: &str| std::fs::write(world.dir.path().join(name), text).unwrap();
    std::fs::create_dir_all(world.dir.path().join("recipes/more")).unwrap();
    write("book.txt", "the cat sat on the mat.");
    write("other.toml", "[package]\n");
    write(
        "zoo.toml",
        "extends = \"recipe.toml\"\nseeds = [0, 1]\n[[arm]]\nname = \"a\"\n[[arm]]\nname = \"b\"\nrecipe.training.max_norm = 0.5\n",
    );
    write("recipes/more/broken.toml", "# A recipe of\n# two lines. And more.\n[model]\n");
    write("recipes/more/gone.toml", "extends = \"../../recipe.toml\"\n[data.text]\npaths = [\"gone/*.txt\"]\n");
    let (out, err) = world.succeeds(&["ls"]);
    let rows: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["recipe", "needs", "memory", "time", "what", "it", "does"]);
    assert_eq!(rows[1][..2], ["recipe.toml", "text"]);
    assert_eq!(rows[1].last(), Some(&"0:01"), "a small run takes a second at least: {out}");
    assert_eq!(rows[2][..6], ["zoo.toml", "text;", "2", "arms,", "2", "seeds"]);
    assert_eq!(out.lines().nth(3).unwrap().trim_end().split("  ").last(), Some("A recipe of two lines."));
    assert_eq!(rows[3][..5], ["recipes/more/broken.toml", "not", "valid", "–", "–"]);
    assert_eq!(rows[4][..4], ["recipes/more/gone.toml", "text", "(no", "gone/*.txt)"]);
    assert!(rows.len() == 5 && err.contains("polyhead plan"), "{out}{err}");
    assert!(world.succeeds(&["ls", "recipes"]).0.lines().nth(1).unwrap().starts_with("recipes/more/broken.toml"));
    let listed = json(&world.succeeds(&["ls", "--json"]).0);
    let of = |key: &str| listed.as_array().unwrap().iter().map(|row| row[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("ready"), [true, true, false, false].map(serde_json::Value::from));
    let flops: Vec<f64> = of("training_flops").iter().filter_map(serde_json::Value::as_f64).collect();
    assert_eq!((flops.len(), flops[1]), (3, 4.0 * flops[0]), "a comparison is all of its runs");
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// What a command prints with `--json --quiet`: JSON, and nothing beside it.
fn data(world: &World, line: &str) -> serde_json::Value {
    let (out, err) = world.succeeds(&line.split(' ').chain(["--json", "--quiet"]).collect::<Vec<_>>());
    assert!(err.is_empty(), "{line} --quiet: {err}");
    json(&out)
}

/// With `--json` every command whose output is data prints JSON; the others refuse it.
#[test]
fn data_is_json_where_that_is_asked_for() {
    let world = World::new(SMALL);
    let data = |line: &str| data(&world, line);
    assert_eq!(data("validate recipe.toml")["valid"], true);
    assert_eq!(data("cat recipe.toml training.steps=3")["training"]["steps"], 3);
    let plan = data("plan recipe.toml --no-probe");
    assert_eq!((&plan["units"], &plan["unit"]), (&(12 * 16 * 4 * 2).into(), &"token".into()));
    let parts = plan["parts"].as_array().unwrap().iter();
    let sum: u64 = parts.map(|part| part["costs"]["parameters"].as_u64().unwrap()).sum();
    assert!(plan["costs"]["parameters"] == sum && plan["measured"].is_null(), "{plan}");
    assert!(plan["memory"]["peak"].as_u64() > plan["memory"]["weights"].as_u64(), "{plan}");
    assert_eq!(data("preview recipe.toml --rows 1")["tokens"].as_array().map(Vec::len), Some(16));
    assert!(data("suite --list").as_array().unwrap().iter().any(|suite| suite["suite"] == "mqar-zoology-v1-small"));
    let of_record = data("schema record");
    assert!(data("results").as_object().unwrap().values().all(|record| described(&of_record, record)), "{of_record}");
    for line in ["--json completions bash", "man --out pages --json", "export run --out exported --json"] {
        let told = world.fails(2, &line.split(' ').collect::<Vec<_>>());
        assert!(told.contains("--json: this command prints no data"), "{line}: {told}");
    }
    assert!(!world.dir.path().join("exported").exists(), "refused before anything is done");
    assert!(world.fails(2, &["validate", "nowhere.toml", "--quiet"]).contains("nowhere.toml"), "errors are told");
}

/// Whether a schema says what must be there, and knows every key of a file.
fn described(schema: &serde_json::Value, file: &serde_json::Value) -> bool {
    let known = |key: &String| schema["properties"].get(key).is_some();
    file.as_object().unwrap().keys().all(known) && schema["required"].is_array()
}

#[test]
fn what_runs_reached_is_json_too() {
    let world = World::new(SMALL);
    let data = |line: &str| data(&world, line);
    let trained = data("train recipe.toml --out run");
    assert_eq!((&trained["result"]["steps"], &trained["sample"]), (&12.into(), &serde_json::Value::Null));
    let of_result = data("schema result");
    assert!(described(&of_result, &trained["result"]), "{of_result}");
    data("train recipe.toml debug.seed=3 --out other");
    let loss = |told: &serde_json::Value| told["loss"].as_f64().unwrap();
    // Of the same held-out batches.
    assert!((loss(&data("eval run --batches 2")) - loss(&trained["result"]["validation"])).abs() < 1e-6);
    let diff = data("diff run other");
    assert_eq!((&diff["recipe"][0][0], &diff["recipe"][0][1][1]), (&"debug.seed".into(), &"3".into()), "{diff}");
    assert_eq!(diff["measured"][0]["validation.loss"], trained["result"]["validation"]["loss"]);
    let heads = data("inspect run --rows 1 --out seen");
    assert!(heads[0]["layer"] == 0 && heads[0]["importance"].is_f64(), "{heads}");
    let grown = data("grow run --depth 3 --out grown");
    assert!(grown["parameters"][1].as_u64() > grown["parameters"][0].as_u64(), "{grown}");
}

/// A text is typed, or handed over by a flag that says that it is a file.
#[test]
fn the_name_of_a_file_is_not_taken_for_a_text() {
    let world = World::new(SMALL);
    std::fs::write(world.dir.path().join("notes.txt"), "a note").unwrap();
    for line in [
        "inspect run --text notes.txt",
        "heads ablate run --text notes.txt",
        "heads history run --text notes.txt",
        "logits run --text notes.txt --out x",
        "generate run --prompt notes.txt",
    ] {
        let told = world.fails(2, &line.split(' ').collect::<Vec<_>>());
        assert!(told.contains("this is a file") && told.contains("$(cat notes.txt)"), "{line}: {told}");
    }
    // Old names of flags work for one version more, and say what they are called now.
    for (line, now) in [
        ("eval run --text notes.txt", "--text-file"),
        ("convert run --to grouped_query --kv-heads 1 --text notes.txt --out x", "--text-file"),
        ("export run --to x", "--out"),
        ("heads patch run pairs.jsonl --method path --to 1.0", "--receivers"),
    ] {
        let told = world.fails(2, &line.split(' ').collect::<Vec<_>>());
        assert!(
            told.contains(&format!("is called {now} now")) && told.contains("no such checkpoint"),
            "{line}: {told}"
        );
    }
}

#[test]
fn every_recipe_is_valid() {
    let world = World::new(SMALL);
    let mut folders = vec![project().join("recipes")];
    let mut count = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "toml") {
                world.succeeds(&["validate", path.to_str().unwrap()]);
                count += 1;
            }
        }
    }
    assert!(count > 0);
}

/// Each with its exit code, and with words that lead out.
#[test]
fn mistakes_are_told_with_a_way_out() {
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]"));
    let write = |name: &str, bytes: &[u8]| std::fs::write(world.dir.path().join(name), bytes).unwrap();
    write("book.txt", "the cat sat on the mat. ".repeat(60).as_bytes());
    write("empty.txt", b"");
    write("latin.txt", b"gr\xfc\xdfe");
    write("latin.jsonl", b"{\"text\": \"gr\xfc\xdfe\"}");
    write("broken.jsonl", b"{\"text\": \"one\"}\n{\"te");
    write("number.jsonl", b"{\"text\": 5}");
    std::fs::create_dir(world.dir.path().join("folder")).unwrap();
    std::fs::create_dir_all(world.dir.path().join("recipes/more")).unwrap();
    write("recipes/more/mine.toml", b"# A recipe of\n# two lines. And more.\n[model]\n");
    write("other.toml", b"[package]\n");
    for (code, arguments, words) in [
        (2, "cp nowhere.toml x.toml", "`polyhead ls` lists"),
        (1, "cp recipe.toml recipe.toml", "exists already"),
        (2, "cat folder", "Is a directory"),
        (2, "validate recipe.toml steps=4", "its place is training.steps"),
        (2, "validate recipe.tml", "did you mean recipe.toml?"),
        (2, "train mine.toml", "did you mean recipes/more/mine.toml?"),
        (2, "eval checkpoints/mine", "`polyhead train recipes/more/mine.toml` makes it"),
        (2, "eval foldr", "did you mean folder?"),
        (
            2,
            "validate recipe.toml lr_scheduler.warmup_steps=100",
            "set lr_scheduler.warmup_steps=1 too, or train for 100",
        ),
        (2, "validate recipe.toml training.steps=1e3", "expected a whole number"),
        (2, "validate recipe.toml training=3", "expected a table"),
        (2, "validate recipe.toml data.text.paths=book.txt", "expected a list"),
        (1, "preview recipe.toml data.text.paths=[\"empty.txt\"]", "hold no text"),
        (1, "preview recipe.toml data.text.paths=[\"latin.txt\"]", "latin.txt is not UTF-8"),
        (1, "preview recipe.toml data.text.paths=[\"folder\"]", "the folder \"folder\" holds no file"),
        (1, "preview recipe.toml data.jsonl.paths=[\"latin.jsonl\"]", "latin.jsonl:1: not UTF-8"),
        (1, "preview recipe.toml data.jsonl.paths=[\"broken.jsonl\"]", "broken.jsonl:2: column 4: invalid JSON"),
        (1, "preview recipe.toml data.jsonl.paths=[\"number.jsonl\"]", "it holds 5"),
        (1, "preview recipe.toml tokenizer.huggingface.path=nowhere", "`polyhead tokenizer train` makes one"),
        (2, "tokenizer train recipe.toml --vocab-size 10 --out t.json", "258"),
        (1, "train recipe.toml --out book.txt", "book.txt"),
        (2, "train recipe.toml --out run --resume nowhere", "no such checkpoint or run folder"),
        (2, "train recipe.toml --device gpu", "must be one of flex (or cpu), ndarray, cuda, cuda:N"),
        (2, "plan recipe.toml --device gpu", "must be one of flex (or cpu), ndarray, cuda, cuda:N"),
        (2, "export nowhere --out x --device cpu", "no such checkpoint or run folder"),
        (2, "convert nowhere --to grouped_query --kv-heads 1 --out x --device cpu", "no such checkpoint or run folder"),
        (2, "grow nowhere --out x --device cpu", "no such checkpoint or run folder"),
        (2, "logits nowhere --tokens 1 --out x --device cpu", "no such checkpoint or run folder"),
        (2, "eval recipe.toml", "this looks like a recipe"),
        (2, "generate nowhere", "no such checkpoint or run folder"),
        (2, "generate nowhere --temperature -1", "--temperature (-1) must be 0 or more"),
        (2, "export nowhere --to x", "no such checkpoint or run folder"),
        (2, "logits nowhere --tokens 1,x --out x", "invalid value 'x'"),
    ] {
        let err = world.fails(code, &arguments.split(' ').collect::<Vec<_>>());
        assert!(err.contains(words), "{arguments}: {err}");
    }
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let world = World::new(SMALL);
    for verb in [
        &["reference"][..],
        &["completions", "bash"],
        &["cat", "recipe.toml"],
        &["plan", "recipe.toml"],
        &["preview", "recipe.toml"],
        &["train", "recipe.toml"],
        &["eval", "checkpoints/recipe"],
    ] {
        let mut child = world.command(verb).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // `2>&1 | true`: both ends are closed at once.
        drop((child.stdout.take(), child.stderr.take()));
        assert_eq!(child.wait().unwrap().code(), Some(0), "{verb:?}");
    }
    assert!(world.dir.path().join("checkpoints/recipe/step-00000012/manifest.json").exists());
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_behind_standard_output_is_told() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output = World::new(SMALL).command(&["reference"]).stdout(full).output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && err.contains("cannot write to standard output"), "{err}");
}

/// 1,000 recipes with one or two changes, made from resolved ones so that every key takes part. Those that are
/// accepted must say what they say: each of their keys comes back with its value.
#[test]
fn mutated_recipes_never_panic_and_no_key_is_ignored() {
    // A cheap generator is enough to choose mutations.
    let mut state = 1u64;
    let mut draw = move |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    };
    let values = ["-1", "0", "7", "1e308", "nan", "\"x\"", "[]", "{}", "true", "18446744073709551616", "1.5", "''"];
    let world = World::new(SMALL);
    let texts = ["tokenizer.huggingface.path=t", "data.text.paths=[\"a\", \"b\"]", "optimizer.muon.lr=0.01"];
    let bases = [
        world.succeeds(&["cat", "recipe.toml"]).0,
        world.succeeds(&[&["cat", "recipe.toml"][..], &texts].concat()).0,
        world.succeeds(&["cat", "recipe.toml", "data.needles.n_needles=2", "training.seq_len=32"]).0,
    ];
    let file = world.dir.path().join("mutated.toml");
    let (mut accepted, mut refused) = (0, 0);
    for round in 0..1000 {
        let mut lines: Vec<String> = bases[round % 3].lines().map(Into::into).collect();
        for _ in 0..1 + draw(2) {
            let (at, other) = (draw(lines.len()), draw(lines.len()));
            let key = lines[at].split(" =").next().unwrap().to_owned();
            match draw(9) {
                0 => drop(lines.remove(at)),
                1 => lines[at] = lines[at].chars().rev().collect(),
                2 | 3 => lines[at] = format!("{key} = {}", values[draw(values.len())]),
                4 => lines.insert(at, format!("zz{round} = 1")),
                5 => lines.swap(at, other),
                6 => lines.insert(at, lines[other].clone()),
                7 => lines[at] = lines[at].replacen(['0', '1', '2', '4'], &draw(10).to_string(), 1),
                _ => lines[at] = lines[at].replacen(['a', 'e', 's'], "q", 1),
            }
        }
        let text = lines.join("\n");
        std::fs::write(&file, &text).unwrap();
        // What `cat` prints, without a process each; a panic would be one of the test.
        let found = load(&file, &[]).and_then(|loaded| resolved(&loaded.recipe));
        if round % 50 == 0 {
            let output = world.run(&["cat", "mutated.toml"]);
            assert_eq!(output.status.code(), Some(if found.is_ok() { 0 } else { 2 }), "{text}");
            let told = String::from_utf8(output.stdout).unwrap();
            assert_eq!(told.trim_end(), found.as_deref().unwrap_or_default().trim_end(), "{text}");
        }
        match found {
            Ok(meant) => {
                let table = |text: &str| toml::Value::Table(text.parse().unwrap());
                assert_says(&table(&meant), &table(&text), &text);
                accepted += 1;
            }
            Err(problems) => {
                assert!(problems.to_string().contains("error: "), "{text}\n{problems}");
                refused += 1;
            }
        }
    }
    assert!(accepted > 100 && refused > 100, "{accepted} accepted, {refused} refused: too one-sided to tell much");
}

/// Every value of `typed` stands in `meant`; a whole number may have become a fraction.
fn assert_says(meant: &toml::Value, typed: &toml::Value, text: &str) {
    use toml::Value::{Float, Integer, Table};
    match (meant, typed) {
        (Table(meant), Table(typed)) => {
            for (key, value) in typed {
                let meant = meant.get(key).unwrap_or_else(|| panic!("the key {key} was ignored:\n{text}"));
                assert_says(meant, value, text);
            }
        }
        (Float(meant), Integer(typed)) => assert_eq!(*meant, *typed as f64, "{text}"),
        _ => assert_eq!(meant, typed, "{text}"),
    }
}

#[test]
fn flags_that_were_renamed_work_with_a_warning() {
    let world = World::new(SMALL);
    world.succeeds(&["train", "recipe.toml", "--out", "run", "training.steps=1"]);
    let (_, err) = world.succeeds(&["export", "run", "--to", "there"]);
    assert!(err.contains("warning: --to is called --out now"), "{err}");
    let (_, err) = world.succeeds(&["export", "run", "--out", "here"]);
    assert!(!err.contains("warning"), "{err}");
    assert_eq!(world.read("there/model.safetensors"), world.read("here/model.safetensors"));
}
