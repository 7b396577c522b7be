//! Interventions as a user has them: files on the command line, and a table of a recipe.

use polyhead_models::weights::{Named, TensorFiles, to_safetensors};

use crate::world::{SMALL, World};

fn write(world: &World, name: &str, text: &str) {
    std::fs::write(world.dir.path().join(name), text).unwrap();
}

fn loss(world: &World, args: &[&str]) -> f64 {
    let (out, _) = world.succeeds(&[&["eval"], args].concat());
    serde_json::from_str::<serde_json::Value>(&out).unwrap()["loss"].as_f64().unwrap()
}

#[test]
fn files_change_what_a_model_computes_and_recipes_what_it_is_trained_with() {
    let world = World::new(SMALL);
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    let plain = loss(&world, &["run"]);
    write(&world, "off.toml", "[[edits]]\nsite = \"attn.hook_z\"\nchange = { scale = 0 }\n");
    write(&world, "same.toml", "[[edits]]\nsite = \"layers.1.z\"\nchange = { scale = 1 }\n");
    let off = loss(&world, &["run", "--intervention", "off.toml"]);
    assert_ne!(off, plain);
    assert_eq!(loss(&world, &["run", "--intervention", "same.toml"]), plain);
    let logits = |out: &str, more: &[&str]| {
        world.succeeds(&[&["logits", "run", "--tokens", "1,2,3", "--out", out], more].concat());
        world.read(out)
    };
    assert_eq!(logits("a", &[]), logits("b", &["--intervention", "same.toml"]));
    assert_ne!(logits("c", &[]), logits("d", &["--intervention", "off.toml"]));
    world.succeeds(&["inspect", "run", "--intervention", "off.toml", "--out", "seen"]);
    let numbers: serde_json::Value = serde_json::from_slice(&world.read("seen/inspect.json")).unwrap();
    let heads = numbers.as_array().unwrap();
    // Two layers of two signal heads; what is switched off has no importance.
    assert_eq!(heads.len(), 4);
    assert!(heads.iter().all(|head| head["importance"] == 0.0 && head["previous_token"].as_f64().unwrap() > 0.0));

    let with = format!("{SMALL}[[intervention.edits]]\nsite = \"z\"\nlayers = [1]\nchange = {{ scale = 0 }}\n");
    write(&world, "with.toml", &with);
    world.succeeds(&["validate", "with.toml"]);
    world.succeeds(&["train", "with.toml", "--out", "trained"]);
    // What it was trained with is there wherever it is used, unless another one is named.
    let own = loss(&world, &["trained"]);
    write(&world, "first.toml", "[[edits]]\nsite = \"z\"\nlayers = [0]\nchange = { scale = 0 }\n");
    assert_ne!(loss(&world, &["trained", "--intervention", "first.toml"]), own);
    // Its second layer's attention learned nothing: nothing of it reached the loss.
    write(&world, "second.toml", "[[edits]]\nsite = \"attn_out\"\nlayers = [1]\nchange = { scale = 0 }\n");
    assert_eq!(loss(&world, &["trained", "--intervention", "second.toml"]), own);
    assert!(world.fails(2, &["validate", "with.toml", "intervention.edits=[]"]).contains("edits is empty"));
    let beyond = "intervention.edits=[{site=\"z\",heads=[9],change={scale=1}}]";
    let told = world.fails(2, &["train", "with.toml", "--out", "never", beyond]);
    assert!(
        told.contains("command line:1") && told.contains("heads names head 9") && told.contains("has 2, from 0"),
        "{told}"
    );
    assert!(!world.dir.path().join("never/metrics.jsonl").exists());
}

#[test]
fn mistakes_are_told_with_their_place_before_anything_runs() {
    let world = World::new(SMALL);
    world.succeeds(&["train", "recipe.toml", "--out", "run", "training.steps=2", "lr_scheduler.warmup_steps=1"]);
    let scaled = |line: &str| format!("[[edits]]\nsite = \"z\"\n{line}\nchange = {{ scale = 0 }}\n");
    for (text, code, words) in [
        (
            "[[edits]]\nsite = \"blocks.1.attn.hook_patern\"\nchange = { scale = 0 }\n".into(),
            2,
            vec!["e.toml:2", "did you mean \"blocks.1.attn.hook_pattern\""],
        ),
        (scaled("heads = [0, 2]"), 2, vec!["e.toml:3", "head 2", "has 2, from 0"]),
        (scaled("layers = [2]"), 2, vec!["e.toml:3", "layer 2", "has 2, from 0"]),
        (scaled("kv_heads = [0]"), 2, vec!["e.toml:3", "query heads, heads"]),
        (scaled("headz = [0]"), 2, vec!["e.toml:3", "unknown key `headz`", "did you mean `heads`"]),
        (scaled("tokens = \"context\""), 2, vec!["e.toml:3", "\"context\"", "whose tokens are whose"]),
        (scaled("tokens = { text = \"a\" }"), 2, vec!["e.toml:3", "no tokenizer"]),
        (
            "tensors = \"x\"\n[[edits]]\nsite = \"z\"\nchange = { scale = \"g\" }\n".into(),
            2,
            vec!["e.toml:1", "/x: No such file", "beside the file that names it"],
        ),
        ("edits = [{ site = \"z\", change = { scale = 0 } },\n{ site = \"z\", heads = [7], change = { scale = 0 } }]".into(), 2, vec![
            "e.toml:2", "heads names head 7"
        ]),
        (
            "[[edits]]\nsite = \"weights\"\nkeys = { from = 0, to = 4 }\nchange = { redistribute = { p = 2 } }\n".into(),
            2,
            vec!["e.toml:4", "p (2) must be 0 to 1"],
        ),
        ("file = \"x\"\n".into(), 2, vec!["e.toml:1", "file is for recipes"]),
        ("[train]\ng = { initial = 0 }\n".into(), 2, vec!["e.toml:2", "train.g is for recipes"]),
        ("".into(), 2, vec!["edits is empty"]),
    ] {
        write(&world, "e.toml", &text);
        let told = world.fails(code, &["eval", "run", "--intervention", "e.toml"]);
        assert!(words.iter().all(|word| told.contains(word)), "{text}: {told}");
    }
    assert!(world.fails(2, &["eval", "run", "--intervention", "nowhere.toml"]).contains("nowhere.toml"));
}

/// A safetensors file with `gamma`, a number for each head of each of two layers.
fn gamma(world: &World, name: &str, value: f32) {
    let tensor = Named { name: "gamma".into(), shape: vec![2, 2], values: vec![value; 4] };
    write(world, name, "");
    std::fs::write(world.dir.path().join(name), to_safetensors(&[tensor], &[]).unwrap()).unwrap();
}

#[test]
fn mistakes_in_recipes_are_told_with_their_place() {
    let world = World::new(SMALL);
    gamma(&world, "one.safetensors", 1.0);
    let with = |lines: &str| format!("{SMALL}[intervention]\n{lines}");
    let line = SMALL.lines().count() + 2;
    let edit = |line: &str| with(&format!("[[intervention.edits]]\nsite = \"z\"\n{line}\nchange = {{ scale = 0 }}\n"));
    let of = |lines: &str| {
        let edits = "[[intervention.edits]]\nsite = \"z\"\nchange = { scale = \"gamma\" }\n";
        with(&format!("{lines}\n{edits}"))
    };
    for (text, at, words) in [
        (edit("heads = [0, 2]"), line + 2, vec!["heads names head 2", "has 2, from 0"]),
        (edit("layers = [5]"), line + 2, vec!["layer 5", "has 2, from 0"]),
        (edit("tokens = \"context\""), line + 2, vec!["\"context\"", "whose tokens are whose"]),
        (edit("tokens = { text = \"a\" }"), line + 2, vec!["no tokenizer"]),
        (of("tensors = \"two.safetensors\""), line, vec!["two.safetensors: No such file", "beside the file"]),
        (of("tensors = \"recipe.toml\""), line, vec!["recipe.toml: not a readable safetensors file"]),
        (of("tensors = \"one.safetensors\"\nfile = \"x\""), line + 1, vec!["leave edits, tensors and train out"]),
        (with("file = \"x.toml\""), line, vec!["x.toml: No such file", "beside the recipe"]),
        (of("train.gamma = { initial = nan }"), line, vec!["initial (NaN)", "finite"]),
        (of("train.gamma = { start = 0 }"), line, vec!["unknown field `start`", "`initial`"]),
    ] {
        write(&world, "wrong.toml", &text);
        let told = world.fails(2, &["train", "wrong.toml", "--out", "never"]);
        let place = format!("wrong.toml:{at}");
        assert!(words.iter().chain([&place.as_str()]).all(|word| told.contains(word)), "{text}: {told}");
        assert!(!world.dir.path().join("never/metrics.jsonl").exists());
    }
    for other in ["lora.rank=2", "freeze.layers=1", "procedure.bilevel={}"] {
        write(&world, "train.toml", &of("train.gamma = { initial = 1 }"));
        let told = world.fails(2, &["validate", "train.toml", other]);
        assert!(told.contains("intervention.train"), "{told}");
    }
}

#[test]
fn tensors_are_found_beside_the_recipe_and_stay_with_the_run() {
    let world = World::new(SMALL);
    let path = |name: &str| world.dir.path().join(name);
    std::fs::create_dir(path("recipes")).unwrap();
    gamma(&world, "recipes/numbers.safetensors", 0.0);
    let edits = "[[intervention.edits]]\nsite = \"z\"\nlayers = [1]\nchange = { scale = \"gamma\" }\n";
    write(&world, "recipes/with.toml", &format!("{SMALL}[intervention]\ntensors = \"numbers.safetensors\"\n{edits}"));
    let train = |run: &str, steps: &str| {
        world.succeeds(&["train", "recipes/with.toml", "lr_scheduler.decay=constant", "--out", run, steps]).1
    };
    train("whole", "training.steps=12");
    train("parts", "training.steps=7");
    // What the run began with is in it: it goes on where the file is gone, and where it is as it was.
    std::fs::rename(path("recipes/numbers.safetensors"), path("elsewhere")).unwrap();
    train("parts", "training.steps=9");
    std::fs::rename(path("elsewhere"), path("recipes/numbers.safetensors")).unwrap();
    train("parts", "training.steps=12");
    for file in ["model.safetensors", "intervention.safetensors", "recipe.toml"] {
        let of = |run: &str| world.read(&format!("{run}/step-00000012/{file}"));
        assert!(of("whole") == of("parts"), "{file} differs");
    }
    gamma(&world, "recipes/numbers.safetensors", 0.5);
    let again = ["train", "recipes/with.toml", "lr_scheduler.decay=constant", "--out", "parts", "training.steps=14"];
    let told = world.fails(2, &again);
    assert!(told.contains("with.toml:") && told.contains("other numbers than the run began with"), "{told}");
    // Moved, and without the recipe: evaluated as it was trained, trained again from its own recipe.
    let before = loss(&world, &["whole"]);
    std::fs::remove_dir_all(path("recipes")).unwrap();
    std::fs::create_dir(path("moved")).unwrap();
    std::fs::rename(path("whole"), path("moved/whole")).unwrap();
    assert_eq!(loss(&world, &["moved/whole"]), before);
    write(&world, "none.toml", "[[edits]]\nsite = \"z\"\nchange = { scale = 1 }\n");
    assert_ne!(loss(&world, &["moved/whole", "--intervention", "none.toml"]), before);
    world.succeeds(&["train", "moved/whole/recipe.toml", "--out", "again"]);
    assert_eq!(loss(&world, &["again"]), before);
}

#[test]
fn trained_tensors_are_a_run_and_a_file() {
    let small = SMALL.replace("grouped_differential]\nn_heads = 4\nn_noise_heads = 2", "softmax]\nn_heads = 4");
    let world = World::new(&small);
    world.succeeds(&["train", "recipe.toml", "--out", "base"]);
    let train = "[intervention.train]\nbias = { initial = 0 }\ngate = { initial = 0, sigmoid = true }\n\
                 [[intervention.edits]]\nsite = \"scores\"\nkeys = \"first\"\nchange = { add = \"bias\" }\n\
                 [[intervention.edits]]\nsite = \"z\"\nchange = { blend = { gate = \"gate\", value = 0.5 } }\n";
    let rest = &small[small.find("[data").unwrap()..];
    let from = |base: &str, more: &str| format!("[model]\npretrained = \"{base}\"\n{rest}{more}");
    let recipe = from("base", &format!("[optimizer.adamw]\nlr = 0.1\n[lr_scheduler]\ndecay = \"constant\"\n{train}"));
    write(&world, "tune.toml", &recipe);
    let tune = |run: &str, steps: &str| world.succeeds(&["train", "tune.toml", "--out", run, steps]).1;
    let told = tune("whole", "training.steps=12");
    assert!(told.contains("of them frozen") && told.contains("whole/trained_intervention.toml"), "{told}");
    tune("parts", "training.steps=7");
    assert!(tune("parts", "training.steps=12").contains("resume: from"));
    let file = |run: &str, name: &str| world.read(&format!("{run}/step-00000012/{name}"));
    for name in ["adapter.safetensors", "optimizer.safetensors", "base.json"] {
        assert!(file("whole", name) == file("parts", name), "{name} differs");
    }
    let step = world.dir.path().join("whole/step-00000012");
    assert!(!step.join("model.safetensors").exists());
    let adapter = TensorFiles::open(&[step.join("adapter.safetensors")]).unwrap();
    assert_eq!(adapter.names().collect::<Vec<_>>(), ["intervention_tensors.0", "intervention_tensors.1"]);
    assert_eq!(adapter.shape("intervention_tensors.0"), Some(&[8][..]));
    // They learned something, and the base under the file is the run.
    let (base, own) = (loss(&world, &["base"]), loss(&world, &["whole"]));
    assert_ne!(own, base);
    let trained = "whole/trained_intervention.toml";
    assert_eq!(loss(&world, &["base", "--intervention", trained]), own);
    let logits = |args: &[&str]| {
        world.succeeds(&[&["logits"], args, &["--tokens", "1,2,3", "--out", "logits"]].concat());
        world.read("logits")
    };
    assert_eq!(logits(&["base", "--intervention", trained]), logits(&["whole"]));
    // A recipe takes it too: the base trained with a rate of 0 under it, and trained on from there.
    write(&world, "under.toml", &from("base", &format!("[intervention]\nfile = \"{trained}\"\n")));
    world.succeeds(&["train", "under.toml", "--out", "under", "optimizer.adamw.lr=0.0"]);
    assert_eq!(loss(&world, &["under"]), own);
    let arms = |file: &str| {
        format!(
            "title = \"t\"\nextends = \"plain.toml\"\nseeds = [0]\n[[arm]]\nname = \"plain\"\n[[arm]]\nname = \"under\"\nrecipe.intervention.file = \"{file}\"\n"
        )
    };
    write(&world, "plain.toml", &from("base", ""));
    write(&world, "arms.toml", &arms(trained));
    world.succeeds(&["compare", "arms.toml", "--dry-run"]);
    write(&world, "arms.toml", &arms("nowhere.toml"));
    let told = world.fails(2, &["compare", "arms.toml", "--dry-run"]);
    assert!(told.contains("arms.toml:8") && told.contains("nowhere.toml: No such file"), "{told}");
    // What starts from the run has the base's weights; what is exported too.
    write(&world, "plain.toml", &from("whole", ""));
    world.succeeds(&["train", "plain.toml", "--out", "plain", "optimizer.adamw.lr=0.0"]);
    assert_eq!(loss(&world, &["plain"]), base);
    let told =
        world.succeeds(&["convert", "whole", "--to", "grouped_query", "--kv-heads", "2", "--out", "converted"]).1;
    assert!(told.contains("intervention, which is not taken over"), "{told}");
    world.succeeds(&["eval", "converted"]);
    // Beside weights that are drawn all are kept.
    write(&world, "fresh.toml", &format!("{small}{train}"));
    world.succeeds(&["train", "fresh.toml", "--out", "fresh"]);
    assert!(world.dir.path().join("fresh/step-00000012/model.safetensors").exists());
    world.succeeds(&["eval", "fresh"]);
    world.succeeds(&["plan", "tune.toml", "--no-probe"]);
}

#[test]
fn tuned_files_are_interventions() {
    let recipe = SMALL
        .replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"text.txt\"]")
        .replace("grouped_differential]\nn_heads = 4\nn_noise_heads = 2", "softmax]\nn_heads = 4");
    let world = World::new(&recipe);
    write(&world, "text.txt", &"the cat sat on the mat. ".repeat(80));
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    let tune = ["tune", "sink", "run", "--batches", "1", "--gammas", "0.5,4"];
    for (by, each, file, units) in [("accuracy", "index", "index.toml", 4), ("entropy", "head", "head.toml", 8)] {
        let (out, _) = world.succeeds(&[&tune[..], &["--by", by, "--each", each, "--out", file]].concat());
        let told: serde_json::Value = serde_json::from_str(&out).unwrap();
        let profile = told["found"]["profile"].as_array().unwrap();
        assert_eq!(profile.len(), units);
        let other = &told["other_batches"];
        assert!(other["plain"]["loss"].as_f64().unwrap() > 0.0 && other["tuned"]["entropy"].as_f64().unwrap() > 0.0);
        let text = String::from_utf8(world.read(file)).unwrap();
        let gamma = told["found"]["gamma"].as_f64().unwrap();
        assert!(text.contains("keys = \"first\"") && text.contains(&format!("{}", gamma.ln())), "{text}");
        let under = loss(&world, &["run", "--intervention", file]);
        assert_eq!(gamma != 1.0, (under - loss(&world, &["run"])).abs() > 1e-6, "{gamma} {under}");
        assert!(world.fails(1, &[&tune[..], &["--out", file]].concat()).contains("exists already"));
    }
    // Prompts with answers, of which every other one is searched on.
    let asked = |rows: &[&str]| write(&world, "asked.jsonl", &rows.join("\n"));
    let tune = ["tune", "sink", "run", "--prompts", "asked.jsonl", "--gammas", "0.5,4", "--out", "asked.toml"];
    let [cat, mat] = [("the cat", " sat"), ("on the", " mat")]
        .map(|(prompt, answer)| format!("{{\"prompt\": \"{prompt}\", \"answer\": \"{answer}\"}}"));
    asked(&[&cat, &mat, &cat]);
    let (out, _) = world.succeeds(&tune);
    let told: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(told["batches"], 2);
    // Bytes of the answers alone: " sat" of each of the first half.
    let accuracy = told["found"]["plain"]["accuracy"].as_f64().unwrap();
    assert!((accuracy * 8.0 - (accuracy * 8.0).round()).abs() < 1e-9, "{accuracy}");
    for (rows, words) in [
        (vec![&*cat], "1 prompts, and half of them"),
        (vec![&cat, "{\"prompt\": \"a\"}"], "asked.jsonl:2: needs \"answer\", a text"),
        (vec![&cat, "{"], "asked.jsonl:2: invalid JSON"),
    ] {
        asked(&rows);
        let told = world.fails(1, &[&tune[..8], &["other.toml"]].concat());
        assert!(told.contains(words), "{told}");
    }
    let vhr = ["tune", "vhr", "run", "--prompt", "the cat sat", "--passage"];
    world.succeeds(&[&vhr[..], &["cat", "--out", "vhr.toml"]].concat());
    // Half of the heads of a layer at most are above its median.
    assert!(String::from_utf8(world.read("vhr.toml")).unwrap().contains("scale = 2"));
    world.succeeds(&[
        "generate",
        "run",
        "--prompt",
        "the cat sat",
        "--intervention",
        "vhr.toml",
        "--max-new-tokens",
        "3",
    ]);
    for (passage, words) in
        [("dog", "nowhere in the prompt"), ("t", "in the prompt once"), ("the cat sat", "a part of it")]
    {
        assert!(world.fails(2, &[&vhr[..], &[passage, "--out", "x.toml"]].concat()).contains(words));
    }
    for (args, words) in [
        (["--gammas", "0,2"], "--gammas"),
        (["--probe", "1"], "--probe (1) must be above 1"),
        (["--share", "1.5"], "--share (1.5)"),
        (["--batches", "0"], "must be at least 1"),
    ] {
        let told = world.fails(2, &[&["tune", "sink", "run", "--out", "x.toml"], &args[..]].concat());
        assert!(told.contains(words), "{told}");
    }
    // A task embedding, and gates that learn how much of it is blended in.
    write(&world, "prompts.txt", "the cat\nthe mat sat\n");
    world.succeeds(&["tune", "embedding", "run", "--prompts", "prompts.txt", "--out", "embedding.safetensors"]);
    let file = TensorFiles::open(&[world.dir.path().join("embedding.safetensors")]).unwrap();
    assert_eq!(file.shape("embedding"), Some(&[2, 4, 4][..]));
    let site = "[model]\npretrained = \"run\"\n[intervention]\ntensors = \"embedding.safetensors\"\n\
                train = { alpha = { initial = 0, sigmoid = true } }\n[[intervention.edits]]\nsite = \"z\"\n\
                tokens = \"last_prompt_token\"\nchange = { blend = { gate = \"alpha\", value = \"embedding\" } }\n";
    write(&world, "site.toml", &format!("{site}{}", &recipe[recipe.find("[data").unwrap()..]));
    world.succeeds(&["train", "site.toml", "--out", "site", "training.steps=2"]);
    let trained = TensorFiles::open(&[world.dir.path().join("site/trained_intervention.safetensors")]).unwrap();
    assert_eq!(trained.shape("alpha"), Some(&[2, 4][..]));
    assert!(trained.values("alpha").unwrap().iter().all(|alpha| (0.0..1.0).contains(alpha)));
    assert_eq!(trained.values("embedding").unwrap(), file.values("embedding").unwrap());
}

#[test]
fn heads_of_guidance_are_searched_beside_random_ones() {
    let recipe = SMALL
        .replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"text.txt\"]")
        .replace("grouped_differential]\nn_heads = 4\nn_noise_heads = 2", "softmax]\nn_heads = 4");
    let world = World::new(&recipe);
    write(&world, "text.txt", &"the cat sat on the mat. ".repeat(80));
    world.succeeds(&["train", "recipe.toml", "--out", "run", "optimizer.adamw.lr=0.05"]);
    let tune = ["tune", "guidance", "run", "--batches", "1", "--rounds", "2", "--add", "3", "--out", "guided.toml"];
    let (out, told) = world.succeeds(&tune);
    let result: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert!(told.contains("other batches, random heads"), "{told}");
    let (found, other) = (&result["found"], &result["other_batches"]);
    assert_eq!(found["rounds"][0]["each"].as_array().unwrap().len(), 8, "two layers of four heads");
    assert!([3, 6].contains(&found["heads"].as_array().unwrap().len()));
    assert!(other["guided"]["loss"] != other["plain"]["loss"] && other["random_heads"]["loss"].is_f64(), "{other}");
    let text = String::from_utf8(world.read("guided.toml")).unwrap();
    assert!(text.contains("[guidance]\nweight = 1.0") && text.contains("to_identity = 1.0"), "{text}");
    // The file does what was measured, and what looks inside of the model takes no notice of it.
    let plain = loss(&world, &["run"]);
    assert_ne!(loss(&world, &["run", "--intervention", "guided.toml"]), plain);
    let seen = |out: &str, more: &[&str]| {
        let told = world.succeeds(&[&["inspect", "run", "--rows", "1", "--out", out][..], more].concat()).1;
        (world.read(&format!("{out}/inspect.json")), told)
    };
    let (guided, told) = seen("a", &["--intervention", "guided.toml"]);
    assert!(guided == seen("b", &[]).0 && told.contains("is used with guidance"), "{told}");
    let generate = ["generate", "run", "--prompt", "the cat", "--max-new-tokens", "3", "--intervention", "guided.toml"];
    world.succeeds(&generate);
    for (args, words) in [
        (["--weight", "0"], "--weight (0) must be a finite number other than 0"),
        (["--pull", "1.5"], "--pull (1.5) must be above 0, up to 1"),
        (["--rounds", "0"], "must be at least 1"),
    ] {
        let told = world.fails(2, &[&["tune", "guidance", "run", "--out", "x.toml"][..], &args].concat());
        assert!(told.contains(words), "{told}");
    }
    write(&world, "zero.toml", &text.replace("weight = 1.0", "weight = 0"));
    let told = world.fails(2, &["eval", "run", "--intervention", "zero.toml"]);
    assert!(told.contains("zero.toml:2") && told.contains("weight (0) must be"), "{told}");
}

#[test]
fn a_passage_is_looked_at_more_and_its_answer_is_measured() {
    let recipe = SMALL
        .replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"text.txt\"]")
        .replace("grouped_differential]\nn_heads = 4\nn_noise_heads = 2", "softmax]\nn_heads = 4");
    let world = World::new(&recipe);
    write(&world, "text.txt", &"the cat sat on the mat. ".repeat(80));
    world.succeeds(&["train", "recipe.toml", "--out", "run", "optimizer.adamw.lr=0.01"]);
    let asked = ["run", "--prompt", "the cat sat. what sat?", "--passage", "the cat sat", "--answer", " cat"];
    let tune = |method: &str, out: &str, more: &[&str]| {
        let args = [&["tune", method][..], &asked, &["--out", out], more].concat();
        serde_json::from_str::<serde_json::Value>(&world.succeeds(&args).0).unwrap()
    };
    let generate = |file: &str| {
        let prompt = ["generate", "run", "--prompt", "the cat sat. what sat?", "--max-new-tokens", "3"];
        world.succeeds(&[&prompt[..], &["--intervention", file]].concat());
    };
    for (method, more) in [
        ("var", vec!["--channels", "2", "--tau", "1", "--rho", "1", "--least-mass", "0"]),
        ("gift", vec!["--question", "what sat?"]),
        ("vhr", vec![]),
    ] {
        let file = format!("{method}.toml");
        let told = tune(method, &file, &more);
        let answer = |key: &str| told["answer"][key].as_f64().unwrap();
        assert!(answer("plain") != answer("tuned") && answer("elsewhere") > 0.0, "{method}: {told}");
        generate(&file);
    }
    let text = |file: &str| String::from_utf8(world.read(file)).unwrap();
    assert!(text("var.toml").contains("redistribute") && text("var.toml").contains("layers = [1]"), "the second layer");
    assert!(text("gift.toml").contains("gaze") && text("gift.toml").contains("from = 22"), "what follows the prompt");
    for (method, more, words) in [
        ("var", vec!["--channels", "16"], "--channels: 16 is not below 16"),
        ("var", vec!["--p", "2"], "--p (2) must be 0 to 1"),
        ("gift", vec!["--question", "sat. what"], "--question and --passage must be apart"),
        ("gift", vec!["--question", "who sat?"], "--question (\"who sat?\") is nowhere in the prompt"),
        ("gift", vec!["--question", "what sat?", "--layers", "2"], "--layers: 2 is not below 2"),
    ] {
        let args = [&["tune", method][..], &asked, &["--out", "x.toml"], &more].concat();
        let told = world.fails(2, &args);
        assert!(told.contains(words), "{method} {more:?}: {told}");
    }
    let none = [&["tune", "var"][..], &asked, &["--out", "x.toml", "--tau", "5"]].concat();
    assert!(world.fails(1, &none).contains("no channel of the residual stream is above --tau (5)"));

    let sgrs = ["generate", "run", "--prompt", "the cat", "--max-new-tokens", "3", "--sgrs"];
    let (out, told) = world.succeeds(&[&sgrs[..], &["0"]].concat());
    assert!(
        out.starts_with("the cat") && told.contains("tokens: ") && told.contains(" 0 after rejections, 0 taken"),
        "{told}"
    );
    assert_eq!(world.succeeds(&[&sgrs[..], &["0"]].concat()).0, out);
    world.succeeds(&[&sgrs[..], &["0.6"]].concat());
    for (more, words) in
        [(&["-1"][..], "--sgrs (-1) must be 0 or more"), (&["1", "--top-k", "3"], "cannot be used with")]
    {
        let told = world.fails(2, &[&sgrs[..], more].concat());
        assert!(told.contains(words), "{told}");
    }

    let (out, told) = world.succeeds(&["inspect", "run", "--sinks", "--tau", "0.5", "--out", "seen"]);
    assert_eq!(out.lines().count(), 3, "a line for each of two layers, and a head line: {out}");
    let sinks: serde_json::Value = serde_json::from_slice(&world.read("seen/sinks.json")).unwrap();
    assert!(told.contains("Sink channels: ") && !sinks["channels"].as_array().unwrap().is_empty(), "{told}");
    assert_eq!(sinks["layers"].as_array().unwrap().len(), 2);
    crate::pages::assert_whole(&world.dir.path().join("seen/sinks.html"));
    assert!(world.fails(2, &["inspect", "run", "--sinks", "--tau", "0"]).contains("--tau (0) must be above 0"));
}

#[test]
fn every_answer_of_a_conversation_has_a_score() {
    let recipe = SMALL
        .replace("[data.markov]\nstates = 6", "[data.chat]\npaths = [\"chats.jsonl\"]\ntemplate = \"chatml\"")
        .replace("grouped_differential]\nn_heads = 4\nn_noise_heads = 2", "softmax]\nn_heads = 4")
        .replace("seq_len = 16", "seq_len = 256");
    let world = World::new(&recipe);
    let chat = |first: &str| {
        let said = |role: &str, text: &str| serde_json::json!({ "role": role, "content": text });
        let messages =
            [said("user", first), said("assistant", "It is 5."), said("user", "And 3?"), said("assistant", "6")];
        serde_json::json!({ "messages": messages }).to_string() + "\n"
    };
    write(&world, "chats.jsonl", &(chat("What is 2 and 3").repeat(12)));
    world.succeeds(&["train", "recipe.toml", "--out", "run", "training.steps=2", "lr_scheduler.warmup_steps=1"]);
    let ask = ["score-context", "run", "--data", "chats.jsonl", "--layer", "1", "--indicator", "[IND]"];
    let (out, _) = world.succeeds(&[&ask[..], &["--beta", "0"]].concat());
    let lines: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 24);
    let score = |at: usize| lines[at]["score"].as_f64().unwrap();
    assert!((0..24).all(|at| score(at) > 0.0 && score(at) < 1.0 && score(at) == score(at % 2)));
    assert_eq!((&lines[0]["row"], &lines[0]["message"], &lines[3]["message"]), (&1.into(), &1.into(), &3.into()));
    // Bytes are tokens: those of the answer, and what the template ends it with.
    assert!(lines[0]["tokens"].as_u64().unwrap() >= 8 && lines[1]["tokens"].as_u64().unwrap() < 8);
    assert_eq!((&lines[0]["marked"], &lines[1]["marked"]), (&"What is 2 and 3. [IND]".into(), &"And 3? [IND]".into()));
    let (out, _) = world.succeeds(&[&ask[..], &["--beta", "1"]].concat());
    assert!(out.lines().all(|line| line.contains("\"depends\":false") && !line.contains("3. [IND]")), "{out}");
    let label = ["score-context", "run", "--data", "labelled.jsonl", "--label", "depends"];
    let labelled =
        |depends: &str| chat("What").replace("\n", "").replacen('{', &format!("{{\"depends\": {depends}, "), 1) + "\n";
    write(&world, "labelled.jsonl", &(labelled("true") + &labelled("false")));
    let (_, err) = world.succeeds(&label);
    assert!(err.contains("AUROC 0.5000: 2 answers of which \"depends\" is true against 2 answers"), "{err}");
    write(&world, "labelled.jsonl", &labelled("1"));
    assert!(world.fails(1, &label).contains("labelled.jsonl:1: needs \"depends\", true or false"));
    write(&world, "chats.jsonl", &(chat("x") + "{\"messages\": []}\n"));
    assert!(world.fails(1, &ask).contains("chats.jsonl:2: needs \"messages\""));
    assert!(
        world
            .fails(2, &["score-context", "run", "--data", "chats.jsonl", "--layer", "2"])
            .contains("--layer (2) must be below 2")
    );
}
