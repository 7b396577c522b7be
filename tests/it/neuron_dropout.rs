//! Training that drops sensitive indices, as its users run it.

use std::sync::Arc;

use burn::tensor::Device;
use polyhead_data::synthetic::{FactsConfig, Generated, Side};
use polyhead_data::{DataConfig, Loader, LoaderOptions, OpenOptions, Order, Packing, Tokenizer, Tracking};
use polyhead_evaluation::texts::Texts;
use polyhead_models::DecoderConfig;

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

/// Statements that see nothing of each other, and of which only answers are asked for.
#[test]
fn tracked_facts_are_as_likely_as_evaluation_finds_them() {
    let (seq_len, seed) = (24, 3);
    let options = OpenOptions {
        seq_len,
        batch_size: 2,
        seed,
        packing: Packing::Stream,
        augmentation: Default::default(),
        validation_fraction: 0.1,
        tracking: Some(Tracking { fraction: 0.1, texts: 5 }),
        validation_samples: 4,
        cache_dir: Default::default(),
        project_root: Default::default(),
    };
    let facts = FactsConfig { n_entities: 6, ..FactsConfig::default() };
    let opened = DataConfig::Facts(facts.clone()).open_tokens(&Tokenizer::bytes(), &options, &mut |_, _| {}).unwrap();
    let config: DecoderConfig =
        serde_json::from_str(r#"{"d_model": 16, "n_layers": 2, "attention": {"softmax": {"n_heads": 2}}}"#).unwrap();
    let model = config.init(opened.vocab_size, &Device::flex());
    let rows = Generated { task: Arc::new(facts.world(seed)), seq_len, seed, side: Side::Tracking(5) };
    let loader = LoaderOptions { batch_size: 5, seed, order: Order::Once };
    let evaluated = model.evaluate(&Loader::new(Arc::new(rows), None, loader).batch(0).unwrap());
    assert!(evaluated.targets > 0);
    let tracked = Texts::new(&opened.tracking).loss(&model);
    assert!((tracked - evaluated.mean_loss()).abs() < 1e-6, "{tracked} and {}", evaluated.mean_loss());
}

#[test]
fn text_that_is_tracked_is_not_learned_and_mistakes_are_told() {
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
        ("freeze.parameters=[\"layer.*\"]", "means no parameter; there are embedding.weight"),
        ("procedure.neuron_dropout.k=0.06", "k (0.06) of d_model (16) is less than one coordinate"),
        (
            "procedure.neuron_dropout.window=7",
            "chosen at measurement 8 (refresh is 2), after 16 steps, and the run has 12",
        ),
        ("procedure.neuron_dropout.mode=weights_compat", "sets weights of layer 0 to 0, which is frozen"),
    ] {
        assert!(world.fails(2, &["validate", "recipe.toml", change]).contains(words), "{change}");
    }
    // All at once.
    let many = ["validate", "recipe.toml", "procedure.neuron_dropout.k=2", "procedure.neuron_dropout.window=1"];
    let err = world.fails(2, &many);
    assert!(err.contains("k (2)") && err.contains("window (1)"), "{err}");
    let generated = World::new(&format!("{SMALL}{PROCEDURE}"));
    let err = generated.fails(2, &["validate", "recipe.toml", "procedure.neuron_dropout.unit=epochs"]);
    assert!(err.contains("generated data has no epochs") && err.contains("neuron_dropout.unit"), "{err}");
    let both = World::new(&format!("{SMALL}{PROCEDURE}[procedure.standard]\n"));
    let err = both.fails(2, &["validate", "recipe.toml"]);
    assert!(err.contains("procedure takes one table, and neuron_dropout and standard are there"), "{err}");
    assert!(err.contains("recipe.toml:"), "{err}");
}

#[test]
fn a_run_that_ends_early_says_why_and_is_not_gone_on_with() {
    let world = World::new(&format!("{SMALL}{PROCEDURE}"));
    let ends = ["procedure.neuron_dropout.epsilon=100", "procedure.neuron_dropout.delta=100"];
    let train = |more: &[&str]| {
        let start = ["train", "recipe.toml", "lr_scheduler.decay=constant", "--out", "run"];
        world.succeeds(&[&start[..], &ends, more].concat()).1
    };
    for more in [&[][..], &["training.steps=24"]] {
        let err = train(more);
        assert!(err.contains("ended early at step 2: loss ") && err.contains("< epsilon (100), EES "), "{err}");
        assert!(err.contains("< delta (100)") && !err.contains("# go on"), "{err}");
    }
}

#[test]
fn a_mask_that_stands_is_not_lost_unheard() {
    let world = World::new(&format!("{SMALL}{PROCEDURE}"));
    let train = ["train", "recipe.toml", "model.decoder.attention.softmax.n_heads=4", "--out"];
    world.succeeds(&[&train[..], &["run", "procedure.neuron_dropout.mask_at_eval=true"]].concat());
    let err = world.fails(2, &["export", "run", "--to", "hf"]);
    assert!(err.contains("a mask behind layer 0") && err.contains("--without-mask writes"), "{err}");
    world.succeeds(&["export", "run", "--to", "hf", "--without-mask"]);
    let convert = ["convert", "run", "--to", "grouped_query", "--kv-heads", "2", "--out", "converted"];
    let (_, err) = world.succeeds(&convert);
    assert!(err.contains("with a mask behind layer 0 (mask_at_eval), which is not taken over"), "{err}");
    world.succeeds(&[&train[..], &["plain"]].concat());
    world.succeeds(&["export", "plain", "--to", "plain-hf"]);
}
