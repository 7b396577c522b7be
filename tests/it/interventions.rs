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
    assert!(told.contains("intervention.edits.0.heads") && told.contains("has 2, from 0"), "{told}");
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
            "e.toml:2", "edits.1.heads",
        ]),
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
        (edit("heads = [0, 2]"), line + 2, vec!["intervention.edits.0.heads", "head 2", "has 2, from 0"]),
        (edit("layers = [5]"), line + 2, vec!["layer 5", "has 2, from 0"]),
        (edit("tokens = \"context\""), line + 2, vec!["\"context\"", "whose tokens are whose"]),
        (edit("tokens = { text = \"a\" }"), line + 2, vec!["no tokenizer"]),
        (of("tensors = \"two.safetensors\""), line, vec!["two.safetensors: No such file", "beside the file"]),
        (of("tensors = \"recipe.toml\""), line, vec!["recipe.toml: not a readable safetensors file"]),
        (of("tensors = \"one.safetensors\"\nfile = \"x\""), line + 1, vec!["leave edits, tensors and train out"]),
        (with("file = \"x.toml\""), line, vec!["x.toml: No such file", "beside the recipe"]),
        (of("train.gamma = { initial = nan }"), line, vec!["intervention.train.gamma.initial", "finite"]),
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
    let train = |run: &str, steps: &str| world.succeeds(&["train", "recipes/with.toml", "--out", run, steps]).1;
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
    let told = world.fails(2, &["train", "recipes/with.toml", "--out", "parts", "training.steps=14"]);
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
    let recipe = from("base", &format!("[optimizer.adamw]\nlr = 0.1\n{train}"));
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
