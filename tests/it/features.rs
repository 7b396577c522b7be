//! Classes from the features of another model's layers: generated, from files, and made by ourselves.

use serde_json::Value;

use crate::pages::assert_whole;
use crate::resume::fingerprint;
use crate::world::{SMALL, World, project};

/// A small run on generated features.
const FEATURES: &str = r#"
[model.classifier.gaussian_adaptive_transformer]
d_conv = 12
[model.classifier.gaussian_adaptive_transformer.mixer.gaussian_adaptive]
gates = [{ paper = { n_heads = 2 } }]
[data.layer_features]
n_layers = 6
dim = 16
n_classes = 4
train_samples = 100
noise = 0.5
[training]
steps = 12
batch_size = 16
[optimizer.adamw]
lr = 3e-3
[metrics]
log_freq = 1
[validation]
interval = 4
batches = 4
[checkpoint]
interval = 4
"#;

const BODY: &str = "model.classifier.gaussian_adaptive_transformer";

fn score(world: &World, run: &str) -> Value {
    serde_json::from_str::<Value>(&world.succeeds(&["eval", run]).0).unwrap()["score"].clone()
}

#[test]
fn every_arm_learns() {
    let world = World::new(FEATURES);
    for (run, mixer) in [
        ("paper", "gaussian_adaptive={gates = [{paper = {n_heads = 2}}]}"),
        ("product", "gaussian_adaptive={residual = true, gates = [{product = {n_heads = 2}}]}"),
        ("attention", "attention={mechanism.softmax = {n_heads = 2}}"),
        ("gqdaam", "gqdaam={gate.gates = [{paper = {n_heads = 2}}], d_attention = 64}"),
    ] {
        let mixer = format!("{BODY}.mixer.{mixer}");
        world.succeeds(&["train", "recipe.toml", "training.steps=100", "validation.interval=0", &mixer, "--out", run]);
        let accuracy = score(&world, run)["accuracy"].as_f64().unwrap();
        assert!(accuracy > 0.5, "{run}: {accuracy}, chance is a quarter");
    }
}

#[test]
fn a_run_in_two_parts_equals_a_run_in_one() {
    let world = World::new(FEATURES);
    let train = |run: &str, more: &[&str]| {
        world.succeeds(&[&["train", "recipe.toml", "lr_scheduler.decay=constant", "--out", run], more].concat())
    };
    train("whole", &[]);
    train("parts", &["training.steps=7", "validation.interval=100"]);
    train("parts", &[]);
    let (a, b) = (fingerprint(&world, "whole"), fingerprint(&world, "parts"));
    assert!(a.0 == b.0 && a.1 == b.1, "weights or optimiser state differ");
}

#[test]
fn importance_is_logged_shown_and_trained_on() {
    let world = World::new(FEATURES);
    let (out, err) = world.succeeds(&["preview", "recipe.toml", "--rows", "1"]);
    assert!(out.contains("row 0: ") && err.contains("features of 6 layers of 16 numbers"), "{out}{err}");
    assert!(world.read("preview.png").starts_with(b"\x89PNG"));
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    let log = String::from_utf8(world.read("run/metrics.jsonl")).unwrap();
    let last: Value = log
        .lines()
        .rev()
        .map(|line| serde_json::from_str(line).unwrap())
        .find(|line: &Value| line["importance/layer_00"].is_number())
        .unwrap();
    let shares: Vec<f64> = (0..6).map(|layer| last[format!("importance/layer_{layer:02}")].as_f64().unwrap()).collect();
    assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-4, "{shares:?}");

    let (out, err) = world.succeeds(&["inspect", "run", "--out", "seen"]);
    let (mut order, told): (Vec<usize>, Vec<f64>) = out
        .lines()
        .skip(1)
        .map(|line| {
            let mut cells = line.split_whitespace();
            (cells.next().unwrap().parse::<usize>().unwrap(), cells.next().unwrap().parse::<f64>().unwrap())
        })
        .unzip();
    assert!(told.is_sorted_by(|a, b| a >= b), "{out}");
    assert!(order.iter().zip(&told).all(|(layer, share)| (share - 100.0 * shares[*layer]).abs() < 0.006), "{out}");
    assert!(world.read("seen/importance.png").starts_with(b"\x89PNG"));
    assert_whole(&world.dir.path().join("seen/inspect.html"));
    // What is to be typed to train on the highest layers works as it is told, and inspect calls them by their names.
    let typed = err.split("part: ").nth(1).unwrap().split(' ').next().unwrap();
    world.succeeds(&["train", "recipe.toml", &format!("{BODY}.mixer=identity"), typed, "--out", "high"]);
    order.truncate(2);
    order.sort_unstable();
    assert!(typed.ends_with(&format!("layers=[{},{}]", order[0], order[1])), "{typed}");
    assert!(world.fails(2, &["inspect", "high"]).contains("has no gate"));
    assert!(world.fails(2, &["inspect", "run", "--heads", "1"]).contains("are for decoders"));
}

/// Two kinds of texts, told by their letters.
fn reviews() -> String {
    let text = |at: usize| {
        let (words, label) = if at.is_multiple_of(2) { ("abba baab", "ab") } else { ("cddc dccd", "cd") };
        format!("{{\"text\": \"{} {at}\", \"label\": \"{label}\"}}\n", &words[at % 4..])
    };
    (0..60).map(text).collect()
}

#[test]
fn texts_become_features_of_a_trained_decoder_and_features_classes() {
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]"));
    let write = |name: &str, text: &str| std::fs::write(world.dir.path().join(name), text).unwrap();
    write("book.txt", &"abba baab cddc dccd ".repeat(60));
    write("reviews.jsonl", &reviews());
    let (model, rest) = (FEATURES.split_once("[data").unwrap().0, FEATURES.split_once("[training").unwrap().1);
    let data = "[data.features]\npaths = [\"reviews.safetensors\"]\n[training";
    write("features.toml", &format!("{model}{data}{rest}"));
    world.succeeds(&["train", "recipe.toml", "--out", "decoder"]);
    let make = ["features", "decoder", "--data", "reviews.jsonl", "--out", "reviews.safetensors"];
    let (_, err) = world.succeeds(&make);
    assert!(err.contains("2 classes: ab, cd") && err.contains("60 texts, 2 layers x 16 channels"), "{err}");
    assert!(world.fails(1, &make).contains("exists already"));

    // The file is what it says: the last layer of the last token, as `logits` would read it.
    world.succeeds(&[
        "features",
        "decoder",
        "--data",
        "reviews.jsonl",
        "--pool",
        "last",
        "--batch-size",
        "7",
        "--out",
        "last.safetensors",
    ]);
    let bytes = world.read("last.safetensors");
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("features").unwrap().shape(), [60, 2, 16]);
    let labels = file.tensor("labels").unwrap();
    assert_eq!((labels.shape(), labels.data()[..16].to_vec()), (&[60][..], [0u64, 1].map(u64::to_le_bytes).concat()));

    let run = [
        "train",
        "features.toml",
        &format!("{BODY}.mixer=identity"),
        "training.steps=60",
        "validation.interval=0",
        "validation.fraction=0.3",
        "--out",
        "run",
    ];
    let (_, err) = world.succeeds(&run);
    assert!(err.contains("features of 2 layers of 16 numbers, 2 classes: 42 for training, 18 for validation"), "{err}");
    let found = score(&world, "run");
    assert!(found["accuracy"].as_f64() > Some(0.9) && found["targets"] == 18, "{found}");

    for (code, arguments, words) in [
        (2, "features decoder --data reviews.jsonl --classes ab --out x", "does not name the label \"cd\""),
        (1, "features decoder --data nowhere.jsonl --out x", "matches no file"),
        (
            1,
            "features decoder --data reviews.jsonl --label-field class --out x",
            "reviews.jsonl:1: no label in field \"class\"",
        ),
        (2, "features run --data reviews.jsonl --out x", "is a classifier"),
        (1, "train features.toml data.features.paths=[\"book.txt\"] --out x", "not a safetensors file"),
        (2, "validate features.toml data.features.paths=[\"x.npy\"]", "give one each"),
    ] {
        let err = world.fails(code, &arguments.split(' ').collect::<Vec<_>>());
        assert!(err.contains(words), "{arguments}: {err}");
    }
}

#[test]
fn what_does_not_fit_is_told_with_its_key() {
    let world = World::new(FEATURES);
    for (change, words) in [
        ("mixer.gaussian_adaptive={gates = [{paper = {n_heads = 3}}]}", "leaves 2 of 6 elements a head"),
        ("mixer.gaussian_adaptive={gates = [{mixtures = {n_heads = 3}}]}", "mixtures"),
        ("layers=[0, 6]", "layers names 6, but there are 6, counted from 0"),
        ("grid=[3, 5]", "grid ([3, 5]) must hold the features of a layer (16)"),
        ("mixer.gqdaam={gate.gates = [{paper = {n_heads = 2}}], d_attention = 12}", "n_heads (8)"),
        ("mixer.attention={mechanism.softmax = {n_heads = 5}}", "n_heads (5)"),
    ] {
        let err = world.fails(2, &["validate", "recipe.toml", &format!("{BODY}.{change}")]);
        assert!(err.contains(words), "{change}: {err}");
    }
    for (change, words) in [
        ("data.layer_features.drift=2", "drift (2) must be 0 to 0.9"),
        ("data.shapes.size=16", "reads features, and the data is images"),
        ("training.seq_len=8", "seq_len"),
    ] {
        let err = world.fails(2, &["validate", "recipe.toml", change]);
        assert!(err.contains(words), "{change}: {err}");
    }
}

/// Pairs of texts that share a number.
fn pairs() -> String {
    let text =
        |at: usize| format!("{{\"query\": \"abba {at}\", \"positive\": \"{at} cddc\", \"negative\": \"cddc\"}}\n");
    (0..80).map(text).collect()
}

const EMBEDDER: &str = r#"
[model.embedder]
pooling.mltp = { input = "last_of_each_layer", n_heads = 2, n_latents = 4 }
[data.feature_pairs]
paths = ["pairs.safetensors"]
[training]
steps = 60
batch_size = 16
[optimizer.adamw]
lr = 3e-3
[validation]
interval = 0
batches = 0
fraction = 0.25
[checkpoint]
interval = 7
"#;

#[test]
fn an_embedder_learns_which_texts_belong_together() {
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]"));
    let write = |name: &str, text: &str| std::fs::write(world.dir.path().join(name), text).unwrap();
    write("book.txt", &"abba 12 cddc 34 ".repeat(60));
    write("pairs.jsonl", &pairs());
    write("embedder.toml", EMBEDDER);
    world.succeeds(&["train", "recipe.toml", "--out", "decoder"]);
    let (_, err) =
        world.succeeds(&["features", "decoder", "--pairs", "--data", "pairs.jsonl", "--out", "pairs.safetensors"]);
    assert!(err.contains("240 texts, 2 layers x 16 channels"), "{err}");
    let (out, _) = world.succeeds(&["plan", "embedder.toml"]);
    assert!(out.contains("pooling") && out.contains("texts per second"), "{out}");
    let train = |run: &str, more: &[&str]| {
        let all = ["train", "embedder.toml", "lr_scheduler.decay=constant", "metrics.log_freq=1", "--out", run];
        world.succeeds(&[&all[..], more].concat()).1
    };
    let err = train("run", &[]);
    assert!(err.contains("60 pairs with a wrong document each for training, 20 for validation"), "{err}");
    let told: Value = serde_json::from_str(&world.succeeds(&["eval", "run"]).0).unwrap();
    assert!(told["recall_at_5"].as_f64() > Some(0.4), "chance is a quarter: {told}");

    // Comparisons know its runs by the texts they learned from; each arm is trained at every setting.
    let arms = "extends = \"embedder.toml\"\nseeds = [0]\nmetric = \"accuracy\"\nrecipe.training.steps = 2\n\
                [[setting]]\nname = \"slow\"\nrecipe.optimizer.adamw.lr = 1e-3\n[[setting]]\nname = \"fast\"\n\
                [[arm]]\nname = \"few\"\n[[arm]]\nname = \"many\"\nrecipe.model.embedder.pooling.mltp.n_latents = 8\n";
    write("arms.toml", arms);
    let (_, err) = world.succeeds(&["compare", "arms.toml", "--out", "arms"]);
    assert!(err.contains("Against few; slow (accuracy") && err.contains("Against few; fast (accuracy"), "{err}");
    let page = String::from_utf8(world.read("arms/report.html")).unwrap();
    assert!(page.contains("Accuracy at every setting") && page.contains(">\nfast\n</text>"), "{page}");

    // In two parts it is the same.
    train("whole", &["training.steps=12"]);
    train("parts", &["training.steps=5"]);
    train("parts", &["training.steps=12"]);
    let (a, b) = (fingerprint(&world, "whole"), fingerprint(&world, "parts"));
    assert!(a.0 == b.0 && a.1 == b.1, "weights or optimiser state differ");

    let (out, _) = world.succeeds(&["embed", "run", "--features", "pairs.safetensors", "--out", "made.safetensors"]);
    let measured: Value = serde_json::from_str(&out).unwrap();
    let mrr = |told: &Value| told["mrr"].as_f64().unwrap();
    let best = measured["layers"].as_array().unwrap().iter().map(mrr).fold(0.0, f64::max);
    assert!(mrr(&measured["embedder"]) > best, "training helps on what was learned from: {measured:#}");
    let bytes = world.read("made.safetensors");
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let embeddings = file.tensor("embeddings").unwrap();
    assert_eq!(embeddings.shape(), [80, 3, 16]);
    let row = embeddings.data()[..64].as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    assert!((row.map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-4);

    world.succeeds(&["preview", "embedder.toml", "--rows", "3", "--out", "pairs.png"]);
    assert!(world.read("pairs.png").starts_with(b"\x89PNG"));

    // Puzzles of eight words in two groups; the groups of the second are those of the first.
    let words: String = (0..16)
        .map(|at| format!("{{\"text\": \"{} {at}\", \"label\": \"{}\"}}\n", ["abba", "cddc"][at % 2], at % 2))
        .collect();
    write("words.jsonl", &words);
    world.succeeds(&["features", "decoder", "--data", "words.jsonl", "--out", "words.safetensors"]);
    let told: Value =
        serde_json::from_str(&world.succeeds(&["embed", "run", "--features", "words.safetensors", "--walls", "8"]).0)
            .unwrap();
    let solved = |told: &Value| told["solved"].as_u64().unwrap();
    assert_eq!(
        (told["walls"].as_u64(), told["layers"].as_array().unwrap().iter().map(solved).max()),
        (Some(2), Some(2))
    );
    assert!(told["embedder"]["ami"].as_f64().unwrap() <= 1.0 && told["layers"][0]["wasserstein"] == 0.0, "{told:#}");
    // The walls that are shipped.
    let walls = project().join("datasets/walls.jsonl");
    world.succeeds(&["features", "decoder", "--data", walls.to_str().unwrap(), "--out", "walls.safetensors"]);
    let told = world.succeeds(&["embed", "run", "--features", "walls.safetensors", "--walls", "16"]).0;
    let told: Value = serde_json::from_str(&told).unwrap();
    assert!(told["walls"] == 12 && told["embedder"]["ari"].as_f64().unwrap().abs() <= 1.0, "{told}");

    for (code, arguments, words) in [
        (2, "embed run --features words.safetensors --walls 5", "--walls 5"),
        (2, "embed run --features words.safetensors --walls 1", "one alone"),
        (2, "embed run --features pairs.safetensors --walls 8", "texts with labels are needed"),
        (2, "embed decoder --features pairs.safetensors", "a run of model.embedder is needed"),
        (1, "embed run --features book.txt", "not a safetensors file"),
        (2, "generate run", "is an embedder"),
        (2, "validate embedder.toml model.embedder.pooling=mean", "nothing of it can be trained"),
        (2, "validate embedder.toml model.embedder.pooling={ggem={}}", "nothing of it can be trained"),
        (2, "validate embedder.toml model.embedder.pooling.mltp.input=tokens_of_last_layer", "take last_of_last_layer"),
        (2, "validate embedder.toml data.layer_features.dim=8", "has no pairs for model.embedder"),
        (2, "train embedder.toml model.embedder.pooling.mltp.n_heads=3 --out x", "n_heads (3)"),
    ] {
        let err = world.fails(code, &arguments.split(' ').collect::<Vec<_>>());
        assert!(err.contains(words), "{arguments}: {err}");
    }
}

#[test]
fn gates_inside_a_decoder_are_trained_and_refused_along_the_tokens() {
    let world = World::new(SMALL);
    let gate = |gate: &str| format!("model.decoder.attention_gate={{residual = true, gates = [{gate}]}}");
    let channels = gate("{product = {axis = -1, n_heads = 4}}");
    let (_, err) = world.succeeds(&["train", "recipe.toml", &channels, "--out", "run"]);
    assert!(err.contains("reached"), "{err}");
    world.succeeds(&["eval", "run"]);
    let (_, err) = world.succeeds(&["export", "run", "--to", "exported"]);
    assert!(err.contains("PolyheadForCausalLM") && err.contains("attention_gate"), "{err}");
    let logits = |model: &str| {
        world.succeeds(&["logits", model, "--tokens", "1,2,3", "--out", &format!("{model}.safetensors")]);
        world.read(&format!("{model}.safetensors"))
    };
    assert_eq!(logits("run"), logits("exported"));
    assert!(world.fails(2, &["grow", "run", "--width", "x2", "--out", "grown"]).contains("cannot grow"));
    let err = world.fails(2, &["validate", "recipe.toml", &gate("{product = {n_heads = 1}}")]);
    assert!(err.contains("a causal model must not look ahead") && err.contains("axis = -1"), "{err}");
}
