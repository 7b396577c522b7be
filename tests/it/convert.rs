//! Trained models turned into leaner ones.

use polyhead_kernels::comparison::{Tolerance, assert_close};

use crate::world::{SMALL, World};

const SOFTMAX: &str = "[model.decoder.attention.softmax]\nn_heads = 4\n";

/// A trained run of softmax attention, `parent`, and the recipe's part behind the model.
fn world() -> (World, String) {
    world_of(SOFTMAX)
}

fn world_of(attention: &str) -> (World, String) {
    let (before, rest) = SMALL.split_once("[model.decoder.attention").unwrap();
    let rest = format!("[data.markov]{}", rest.split_once("[data.markov]").unwrap().1);
    let world = World::new(&format!("{before}{attention}{rest}"));
    world.succeeds(&["train", "recipe.toml", "optimizer.adamw.lr=3e-2", "--out", "parent"]);
    (world, rest)
}

/// The logits of a few tokens, as bytes.
fn logits(world: &World, model: &str) -> Vec<f32> {
    let file = format!("logits-{}.safetensors", model.replace('/', "-"));
    world.succeeds(&["logits", model, "--tokens", "1,2,3,0,5,4,1", "--out", &file]);
    let path = world.dir.path().join(file);
    polyhead_models::weights::TensorFiles::open(&[path]).unwrap().values("logits").unwrap()
}

fn close(a: &[f32], b: &[f32]) {
    assert_close("logits", b, a, Tolerance::absolute(1e-5));
}

/// The query heads of each key/value head, in every list of them that a recipe has.
fn query_heads(recipe: &str) -> Vec<Vec<usize>> {
    let lists = recipe.split("query_heads = [").skip(1).map(|rest| rest.split(']').next().unwrap());
    let sizes = |list: &str| list.split(',').filter_map(|size| size.trim().parse().ok()).collect();
    let found: Vec<Vec<usize>> = lists.map(sizes).collect();
    assert!(!found.is_empty(), "{recipe}");
    found
}

/// A line of the printed table, as before and after.
fn row(out: &str, name: &str) -> [f64; 2] {
    let line = out.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {out}"));
    let numbers: Vec<f64> =
        line.split_whitespace().rev().take(2).map(|n| n.replace(',', "").parse().unwrap()).collect();
    [numbers[1], numbers[0]]
}

#[test]
fn fewer_key_and_value_heads() {
    let (world, rest) = world();
    for pool in ["mean", "first", "norm_restoring", "ward"] {
        let out = format!("gqa-{pool}");
        let args = ["convert", "parent", "--to", "grouped_query", "--kv-heads", "2", "--pool", pool, "--out", &out];
        let (table, _) = world.succeeds(&args);
        let [before, after] = row(&table, "KV bytes per token, measured");
        assert_eq!(after, before / 2.0, "{table}");
        assert_eq!(row(&table, "KV bytes per token, computed"), [before, after]);
        world.succeeds(&["eval", &out]);
    }
    let (table, _) =
        world.succeeds(&["convert", "parent", "--to", "grouped_query", "--kv-heads", "4", "--out", "same"]);
    let [before, after] = row(&table, "loss");
    assert_eq!(before, after, "{table}");
    std::fs::write(world.dir.path().join("child.toml"), format!("[model]\npretrained = \"gqa-mean\"\n{rest}")).unwrap();
    world.succeeds(&["train", "child.toml", "--out", "child"]);
    world.succeeds(&["export", "child", "--to", "exported"]);
    close(&logits(&world, "child"), &logits(&world, "exported"));
    assert!(
        world
            .fails(2, &["convert", "parent", "--to", "grouped_query", "--kv-heads", "3", "--out", "x"])
            .contains("must divide")
    );
    assert!(world.fails(2, &["convert", "parent", "--to", "grouped_query", "--out", "x"]).contains("--kv-heads"));
    assert!(
        world
            .fails(2, &["convert", "parent", "--to", "decoupled_head", "--kv-budget", "0.1", "--out", "x"])
            .contains("0.2500")
    );
    let differential = ["convert", "parent", "--to", "grouped_differential", "--out", "x"];
    assert!(world.fails(2, &differential).contains("published"));
    assert!(!world.dir.path().join("x").exists());
}

#[test]
fn decoupled_heads_are_written_expanded_and_fused() {
    let (world, rest) = world();
    let convert =
        |from: &str, more: &[&str]| world.succeeds(&[&["convert", from, "--to", "decoupled_head"], more].concat()).0;
    let table = convert("parent", &["--kv-budget", "0.4", "--out", "dha"]);
    let [before, after] = row(&table, "KV bytes per token, measured");
    assert_eq!(after, before * 6.0 / 16.0, "6 of 16 heads: {table}");
    for file in ["similarity/keys_cka", "similarity/values_cosine", "similarity/keys_distance", "allocation/heads"] {
        assert!(world.read(&format!("dha/{file}.png")).starts_with(b"\x89PNG"));
    }
    world.succeeds(&["export", "dha", "--to", "expanded", "--expanded"]);
    close(&logits(&world, "dha"), &logits(&world, "expanded"));
    world.succeeds(&["export", "dha", "--to", "native"]);
    let config = String::from_utf8(world.read("native/config.json")).unwrap();
    assert!(config.contains("dha_key_map"), "{config}");
    close(&logits(&world, "native"), &logits(&world, "expanded"));

    // Fusion starts as the parent to the bit, and ends where every group acts as one head.
    convert("parent", &["--kv-budget", "0.4", "--fusing", "--out", "fusing"]);
    assert_eq!(logits(&world, "parent"), logits(&world, "fusing"));
    let err = world.fails(1, &["convert", "fusing", "--to", "decoupled_head", "--out", "early"]);
    assert!(err.contains("--scatter-limit"), "{err}");
    // Nothing that is typed is ignored.
    for (line, words) in [
        ("fusing --to decoupled_head --kv-budget 0.9 --fusing", "being fused already"),
        ("parent --to grouped_query --kv-heads 2 --shared 3", "--shared goes with --to mixture_of_head"),
        ("parent --to grouped_query --kv-heads 2 --allocation proportion", "--allocation goes with --to key_driven"),
        ("parent --to decoupled_head --kv-heads 2 --fusing --pool first", "--pool goes without --fusing"),
        ("parent --to grouped_query", "--to grouped_query needs --kv-heads N"),
    ] {
        let line: Vec<&str> = ["convert"].into_iter().chain(line.split(' ')).chain(["--out", "not"]).collect();
        let err = world.fails(2, &line);
        assert!(err.contains(words), "{line:?}: {err}");
    }
    // Equal groups are repeated too.
    world.succeeds(&["convert", "parent", "--to", "grouped_query", "--kv-heads", "2", "--out", "grouped"]);
    world.succeeds(&["export", "grouped", "--to", "repeated", "--expanded"]);
    close(&logits(&world, "grouped"), &logits(&world, "repeated"));
    let fuse = |pretrained: &str, mode: &str| {
        format!("[model]\npretrained = \"{pretrained}\"\n[procedure.fusion]\nmode = \"{mode}\"\n{rest}")
    };
    std::fs::write(world.dir.path().join("fuse.toml"), fuse("fusing", "anneal")).unwrap();
    world.succeeds(&["train", "fuse.toml", "--out", "fused"]);
    // Before its first step a run that starts from weights is validated: here it is the parent still.
    let losses = |run: &str| -> Vec<(u64, u64)> {
        let log = String::from_utf8(world.read(&format!("{run}/metrics.jsonl"))).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter_map(|line| Some((line["step"].as_u64()?, line["validation_loss_bits"].as_u64()?))).collect()
    };
    assert_eq!((losses("fused")[0].0, losses("fused")[0].1), (0, losses("parent").last().unwrap().1));
    let table = convert("fused", &["--out", "collapsed"]);
    let [before, after] = row(&table, "loss");
    assert!((before - after).abs() < 2e-4, "{table}");
    close(&logits(&world, "fused"), &logits(&world, "collapsed"));

    // Interrupted and resumed, operators and multipliers go on as they were.
    std::fs::write(world.dir.path().join("bound.toml"), fuse("fusing", "lagrangian")).unwrap();
    let last = |run: &str| format!("{run}/step-00000012");
    for (recipe, whole, parts) in [("fuse.toml", "fused", "fused-parts"), ("bound.toml", "whole", "parts")] {
        world.succeeds(&["train", recipe, "--out", whole]);
        world.succeeds(&["train", recipe, "--out", parts]);
        std::fs::remove_dir_all(world.dir.path().join(last(parts))).unwrap();
        world.succeeds(&["train", recipe, "--out", parts]);
        for file in ["model.safetensors", "optimizer.safetensors"] {
            let read = |run: &str| world.read(&format!("{}/{file}", last(run)));
            assert_eq!(read(whole), read(parts), "{file}");
        }
    }
    let progress = |run: &str| -> serde_json::Value {
        serde_json::from_slice(&world.read(&format!("{}/state.json", last(run)))).unwrap()
    };
    assert_eq!(progress("whole")["procedure"], progress("parts")["procedure"]);

    // What was left to fuse shares the budget anew, among the heads that fusion started from.
    let dynamic = ["--search", "dynamic", "--kv-budget"];
    convert("whole", &[&dynamic[..], &["0.5", "--fusing", "--out", "again"]].concat());
    assert_eq!(
        logits(&world, "parent"),
        logits(&world, "again"),
        "the parent's weights, and operators that are the identity"
    );
    let table = convert("whole", &[&dynamic[..], &["0.5", "--out", "by-need"]].concat());
    let [before, after] = row(&table, "KV bytes per token, measured");
    assert_eq!(after, before / 2.0, "{table}");
    convert("whole", &[&dynamic[..], &["1.0", "--out", "all"]].concat());
    close(&logits(&world, "parent"), &logits(&world, "all"));
    let wrong = |from: &str, more: &[&str]| {
        let args = ["convert", from, "--to", "decoupled_head", "--search", "dynamic", "--out", "x"];
        world.run(&[&args[..], more].concat())
    };
    let words = |output: std::process::Output| String::from_utf8(output.stderr).unwrap();
    for from in ["parent", "fused", "collapsed"] {
        let err = words(wrong(from, &[]));
        assert!(err.contains("lagrangian"), "{from}: {err}");
    }
    std::fs::rename(world.dir.path().join("fusing"), world.dir.path().join("moved")).unwrap();
    assert!(words(wrong("whole", &[])).contains("--original"));
    assert!(words(wrong("whole", &["--original", "fused"])).contains("begun to fuse"));
    convert("whole", &["--search", "dynamic", "--original", "moved", "--out", "found"]);
    std::fs::write(world.dir.path().join("wrong.toml"), fuse("parent", "anneal")).unwrap();
    assert!(world.fails(1, &["train", "wrong.toml", "--out", "wrong"]).contains("--fusing"));
}

/// Everything that starts from a head for every query head starts from shared ones too: six query heads in `kv_heads` groups.
fn from_grouped_queries(kv_heads: usize) {
    let (world, rest) =
        world_of(&format!("[model.decoder.attention.softmax]\nn_heads = 6\nn_kv_heads = {kv_heads}\nhead_dim = 4\n"));
    let convert = |from: &str, line: &str| {
        let args: Vec<&str> = ["convert", from, "--to"].into_iter().chain(line.split(' ')).collect();
        world.succeeds(&args).0
    };
    let cached = |table: &str| {
        let [before, after] = row(table, "KV bytes per token, measured");
        assert_eq!(row(table, "KV bytes per token, computed"), [before, after], "{table}");
        after / before
    };
    let parent = logits(&world, "parent");

    let table = convert("parent", "decoupled_head --kv-budget 1 --out whole");
    assert!(cached(&table) == 1.0 && table.contains("layers 0 to 1"), "{table}");
    close(&logits(&world, "whole"), &parent);
    convert("parent", "decoupled_head --kv-heads 1 --fusing --out fusing");
    assert_eq!(logits(&world, "fusing"), parent);
    let share = 1.0 / kv_heads as f64;
    assert_eq!(cached(&convert("parent", "decoupled_head --kv-heads 1 --out lean")), share);
    for form in ["--to native", "--to expanded --expanded"] {
        let folder = form.split(' ').nth(1).unwrap();
        let args: Vec<&str> = ["export", "lean"].into_iter().chain(form.split(' ')).collect();
        world.succeeds(&args);
        close(&logits(&world, folder), &logits(&world, "lean"));
    }

    for mode in ["anneal", "lagrangian"] {
        let recipe = format!("[model]\npretrained = \"fusing\"\n[procedure.fusion]\nmode = \"{mode}\"\n{rest}");
        std::fs::write(world.dir.path().join("fuse.toml"), recipe).unwrap();
        world.succeeds(&["train", "fuse.toml", "--out", mode]);
    }
    assert_eq!(cached(&convert("anneal", "decoupled_head --out collapsed")), share);
    close(&logits(&world, "collapsed"), &logits(&world, "anneal"));
    let table = convert("lagrangian", "decoupled_head --search dynamic --kv-budget 1 --out all");
    assert_eq!(cached(&table), 1.0, "while heads are fused, all of them are cached: {table}");
    close(&logits(&world, "all"), &parent);

    for groups in [1, 2, 3, 6] {
        let name = format!("grouped-{groups}");
        let table = convert("parent", &format!("grouped_query --kv-heads {groups} --out {name}"));
        assert_eq!(cached(&table), groups as f64 * share, "{table}");
        if groups % kv_heads == 0 {
            assert_eq!(logits(&world, &name), parent, "heads that are repeated change nothing");
        }
        convert("parent", &format!("key_driven --kv-heads {groups} --allocation proportion --out driven-{groups}"));
        // Groups of equal sizes compute what grouped queries do, and of a parent with one head any sizes what it does.
        let sizes = query_heads(&String::from_utf8(world.read(&format!("driven-{groups}/recipe.toml"))).unwrap());
        assert!(sizes.iter().all(|sizes| sizes.len() == groups && sizes.iter().sum::<usize>() == 6), "{sizes:?}");
        let alike = kv_heads == 1 || sizes.iter().flatten().all(|&size| size == 6 / groups);
        let (driven, of_equal_groups) = (logits(&world, &format!("driven-{groups}")), logits(&world, &name));
        match alike {
            true => close(&driven, &of_equal_groups),
            false => assert_ne!(driven, of_equal_groups, "{sizes:?}"),
        }
    }
    convert("parent", &format!("grouped_query --kv-heads {kv_heads} --pool ward --out ward"));
    close(&logits(&world, "ward"), &parent);
    convert("parent", "mixture_of_head --shared 2 --top-k 4 --out all-heads");
    close(&logits(&world, "all-heads"), &parent);
    convert("parent", "mixture_of_head --shared 2 --top-k 2 --out routed");
    for child in ["routed", "lean", "driven-2"] {
        std::fs::write(world.dir.path().join("child.toml"), format!("[model]\npretrained = \"{child}\"\n{rest}"))
            .unwrap();
        world.succeeds(&["train", "child.toml", "--out", &format!("{child}-child")]);
    }
}

#[test]
fn grouped_queries_are_converted_as_heads_of_their_own_are() {
    from_grouped_queries(3);
}

#[test]
fn one_head_for_all_queries_is_converted_too() {
    from_grouped_queries(1);
}

#[test]
fn heads_that_rest() {
    let (world, rest) = world();
    let convert = |router: &str, shared: &str, top_k: &str, out: &str| {
        let heads = ["--shared", shared, "--top-k", top_k, "--router", router, "--out", out];
        world.succeeds(&[&["convert", "parent", "--to", "mixture_of_head"], &heads[..]].concat()).0
    };
    // Where all heads take part and count alike, nothing changes.
    let table = convert("query_norm", "2", "2", "all");
    assert!(row(&table, "KL divergence")[1].abs() < 1e-6, "{table}");
    close(&logits(&world, "parent"), &logits(&world, "all"));
    let table = convert("query_norm", "2", "1", "by-norm");
    assert!(row(&table, "KL divergence")[1] > 1e-6, "{table}");
    assert!(table.contains("the first 2 heads everywhere, 1 of the other 2 at each position"), "{table}");
    let told: serde_json::Value = serde_json::from_slice(&world.read("by-norm/conversion.json")).unwrap();
    assert_eq!(told["heads"][1], serde_json::json!({ "shared": [0, 1], "routed": [2, 3], "top_k": 1 }));
    convert("learned", "2", "1", "by-router");
    convert("learned", "2", "1", "again");
    assert_eq!(logits(&world, "by-router"), logits(&world, "again"), "a fresh router follows from the seed");
    for parent in ["by-norm", "by-router"] {
        let child = format!("[model]\npretrained = \"{parent}\"\n{rest}");
        std::fs::write(world.dir.path().join("child.toml"), child).unwrap();
        world.succeeds(&["train", "child.toml", "--out", &format!("{parent}-child")]);
        world.succeeds(&["eval", &format!("{parent}-child")]);
    }
    world.succeeds(&["inspect", "by-norm", "--out", "seen"]);
    assert!(world.read("seen/gates-layer-01.png").starts_with(b"\x89PNG"), "which heads the tokens chose");
    let fails = |args: &[&str]| {
        world.fails(2, &[&["convert", "parent", "--to", "mixture_of_head", "--out", "x"], args].concat())
    };
    assert!(fails(&["--shared", "2"]).contains("--top-k"));
    assert!(fails(&["--shared", "2", "--top-k", "3"]).contains("top_k (3)"));
}

#[test]
fn groups_as_large_as_their_keys_call_for() {
    let (world, rest) = world();
    let convert = |from: &str, more: &[&str]| world.succeeds(&[&["convert", from, "--to"], more].concat()).0;
    let table = convert("parent", &["key_driven", "--kv-heads", "2", "--out", "driven"]);
    let [before, after] = row(&table, "KV bytes per token, measured");
    assert_eq!(after, before / 2.0, "{table}");
    assert!(table.contains("query heads of its key/value heads: "), "{table}");
    assert!(world.read("driven/allocation/heads.png").starts_with(b"\x89PNG"));
    convert("parent", &["key_driven", "--kv-heads", "2", "--allocation", "proportion", "--out", "in-proportion"]);
    let recipe = String::from_utf8(world.read("in-proportion/recipe.toml")).unwrap();
    assert!(recipe.contains("query_heads = ["), "{recipe}");

    // Two norms leave one head unread: it goes.
    let table = convert("driven", &["decoupled_head", "--out", "lean"]);
    assert_eq!(row(&table, "KV bytes per token, measured"), [before / 2.0, before / 4.0], "{table}");
    close(&logits(&world, "driven"), &logits(&world, "lean"));
    std::fs::write(world.dir.path().join("child.toml"), format!("[model]\npretrained = \"driven\"\n{rest}")).unwrap();
    world.succeeds(&["train", "child.toml", "--out", "child"]);
    for more in [&["--to", "native"][..], &["--to", "expanded", "--expanded"]] {
        world.succeeds(&[&["export", "child"], more].concat());
        close(&logits(&world, "child"), &logits(&world, more[1]));
    }
    let attention = "model.decoder.attention.key_driven={n_heads = 4, n_kv_heads = 2, allocation = {per_call = {}}}";
    let err = world.fails(2, &["validate", "recipe.toml", attention]);
    assert!(err.contains("keys that come later") && err.contains("--to key_driven"), "{err}");
}

#[test]
fn a_folder_in_hugging_faces_format_is_compared_on_a_text() {
    let (before, rest) = SMALL.split_once("[model.decoder.attention").unwrap();
    let rest = rest.split_once("[data.markov]\nstates = 6").unwrap().1;
    let world = World::new(&format!("{before}{SOFTMAX}[data.text]\npaths = [\"book.txt\"]\n{rest}"));
    std::fs::write(world.dir.path().join("book.txt"), "the cat sat on the mat. ".repeat(90)).unwrap();
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    world.succeeds(&["export", "run", "--to", "folder"]);
    let convert = ["convert", "folder", "--to", "grouped_query", "--kv-heads", "2", "--out", "lean"];
    assert!(world.fails(2, &convert).contains("--text"));
    assert!(!world.dir.path().join("lean").exists());
    let (table, err) = world.succeeds(&[&convert[..], &["--text-file", "book.txt", "--batches", "0"]].concat());
    let again = ["--out", "again", "--text-file", "book.txt", "--json"];
    let printed = world.succeeds(&[&convert[..6], &again[..]].concat()).0;
    assert_eq!(printed.as_bytes(), world.read("again/conversion.json"), "what is printed is what is written");
    let [before, after] = row(&table, "loss");
    assert!(before > 0.0 && after > 0.0 && err.contains("1 text file"), "{table}{err}");
    // All of the text is read, but for what fills no row.
    assert!(err.contains("from the beginning") && err.contains("loss before and after: "), "{err}");
    let told: serde_json::Value = serde_json::from_slice(&world.read("lean/conversion.json")).unwrap();
    let targets = told["targets"].as_u64().unwrap();
    assert!((24 * 90 - 512..=24 * 90).contains(&targets), "{targets} targets");
    world.succeeds(&["generate", "lean", "--max-new-tokens", "3"]);
    world.succeeds(&["eval", "lean"]);
}
