//! Every mechanism in every precision, observed or not, under every procedure: what `validate` accepts trains.

use std::sync::atomic::{AtomicUsize, Ordering};

use polyhead_attention::AttentionConfig;

use crate::world::World;

/// Steps, validation, observation and a checkpoint after each.
const DECODER: &str = r#"
[model.decoder]
d_model = 16
n_layers = 2
[model.decoder.attention.MECHANISM]
SETTINGS
[data.markov]
states = 6
[training]
steps = 3
seq_len = 12
batch_size = 2
precision = "PRECISION"
[validation]
interval = 1
batches = 1
[metrics]
log_freq = 1
image_interval = 1
observe = OBSERVE
"#;

/// A step of a masked diffusion model, validated, observed and saved.
const DIFFUSION: &str = r#"
[model.decoder]
d_model = 24
n_layers = 4
masked_diffusion = true
[data.markov]
states = 6
[training]
steps = 1
seq_len = 12
batch_size = 2
[validation]
interval = 1
batches = 1
[metrics]
log_freq = 1
image_interval = 1
"#;

const CLASSIFIER: &str = r#"
[model.classifier.vision_transformer]
patch_size = 4
d_model = 16
n_layers = 2
d_ff = 16
pooling = "mean"
[model.classifier.vision_transformer.attention.MECHANISM]
SETTINGS
[data.shapes]
size = 8
[training]
steps = 2
batch_size = 2
precision = "PRECISION"
[validation]
interval = 1
batches = 1
[metrics]
log_freq = 1
image_interval = 1
observe = OBSERVE
"#;

/// Mechanisms with the settings that take ways of their own through the code.
const MECHANISMS: [(&str, &str); 14] = [
    ("softmax", "n_heads = 4\nn_kv_heads = 2\nqk_norm = true"),
    ("grouped_differential", "n_heads = 4\nn_noise_heads = 2"),
    ("grouped_differential", "n_heads = 4\nn_noise_heads = 1\nsubln = false"),
    ("mixture_of_head", "n_heads = 4\nshared_heads = 1\ntop_k = 2"),
    (
        "mixture_of_head",
        "n_heads = 4\nshared_heads = 2\ntop_k = 1\nrouter.learned.gate_norm = \"paper\"\nqkv_bias = true",
    ),
    ("mixture_of_head", "n_heads = 4\nshared_heads = 4\ntop_k = 0\no_bias = true"),
    ("mixture_of_head", "n_heads = 4\nshared_heads = 1\ntop_k = 2\nrouter.query_norm.straight_through = \"all\""),
    ("mixture_of_head", "n_heads = 4\nn_kv_heads = 2\nshared_heads = 0\ntop_k = 2\nrouter.query_norm = {}"),
    ("decoupled_head", "n_heads = 4\nkey_map = [0, 0, 1, 1]\nvalue_map = [0, 1, 2, 0]"),
    ("decoupled_head", "n_heads = 4\nkey_map = [0, 0, 1, 1]\nvalue_map = [0, 0, 0, 1]\nfusing = true"),
    ("key_driven", "n_heads = 4\nn_kv_heads = 2\nallocation.even = {}\nqkv_bias = true"),
    ("key_driven", "n_heads = 4\nn_kv_heads = 2\nallocation.fixed.query_heads = [3, 1]"),
    ("key_driven", "n_heads = 4\nn_kv_heads = 2\nallocation.per_call = {}"),
    ("key_driven", "n_heads = 4\nn_kv_heads = 2\nallocation.evolving = {}\nperturb = true"),
];

/// Those that came later. As decoders they go through the first procedures alone, which is what a test has time for.
const NEWER: [(&str, &str); 6] = [
    ("sink", "n_heads = 4\nn_kv_heads = 2"),
    ("diff_v2", "n_heads = 2\nn_kv_heads = 1"),
    ("gated_attention", "n_heads = 4\nn_kv_heads = 2\ngranularity = \"headwise\""),
    ("mla", "n_heads = 4\nkv_lora_rank = 8\nq_lora_rank = 8"),
    ("gated_delta_net", "n_heads = 4"),
    ("hilo", "n_heads = 4\nwindow = 2"),
];

const WINDOW: &str = "procedure.neuron_dropout.window=2";
const INTERVAL: &str = "procedure.neuron_dropout.interval=1";
const REFRESH: &str = "procedure.neuron_dropout.refresh=1";

/// The same; SenD chooses after the second step what it drops in the third.
const PROCEDURES: [&[&str]; 12] = [
    &[],
    &["procedure.standard.context_mask=bidirectional"],
    &["procedure.bilevel.rank=2", "procedure.bilevel.layer_fraction=1.0"],
    &["procedure.bilevel.rank=2", "procedure.bilevel.targets=[\"q_proj\", \"o_proj\"]"],
    &["procedure.bilevel.rank=2", "procedure.bilevel.second_order=true", "procedure.bilevel.clip_includes_fast=true"],
    &["procedure.fusion.mode=anneal"],
    &["procedure.fusion.mode=lagrangian"],
    &[WINDOW, INTERVAL, REFRESH],
    &[WINDOW, INTERVAL, REFRESH, "procedure.neuron_dropout.mask_at_eval=true"],
    &[WINDOW, INTERVAL, REFRESH, "procedure.neuron_dropout.select=dropout"],
    &[WINDOW, INTERVAL, REFRESH, "procedure.neuron_dropout.mode=weights_compat"],
    &[WINDOW, INTERVAL, REFRESH, "procedure.neuron_dropout.ees_prompts=1", "procedure.neuron_dropout.ees_samples=2"],
];

/// Trains what `validate` accepts; whether it did.
fn trains_if_valid(world: &World, run: &str, overrides: &[&str]) -> bool {
    let train = ["train", "recipe.toml", "--out", run];
    let output = world.command(&[&train[..], overrides].concat()).env("RAYON_NUM_THREADS", "1").output().unwrap();
    if output.status.success() {
        return true;
    }
    let err = String::from_utf8_lossy(&output.stderr);
    let recipe = || String::from_utf8(world.read("recipe.toml")).unwrap();
    let refused = !world.run(&[&["validate", "recipe.toml"][..], overrides].concat()).status.success();
    assert!(refused && output.status.code() == Some(2), "valid, but {overrides:?} fails: {err}\n{}", recipe());
    false
}

/// All recipes of a kind, on both cores; how many were valid.
fn train_all(template: &str, mechanisms: &[(&str, &str)], procedures: &[&[&str]]) -> usize {
    let all: Vec<(usize, &str, bool)> = (0..mechanisms.len())
        .flat_map(|at| ["f32", "bf16"].map(|precision| (at, precision)))
        .flat_map(|(at, precision)| [true, false].map(|observe| (at, precision, observe)))
        .collect();
    let (next, valid) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(&(at, precision, observe)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (mechanism, settings) = mechanisms[at];
                    let recipe = template.replace("MECHANISM", mechanism).replace("SETTINGS", settings);
                    let recipe = recipe.replace("PRECISION", precision).replace("OBSERVE", &observe.to_string());
                    let world = World::new(&recipe);
                    for (number, procedure) in procedures.iter().enumerate() {
                        let trained = trains_if_valid(&world, &format!("run-{number}"), procedure);
                        valid.fetch_add(usize::from(trained), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    valid.into_inner()
}

#[test]
fn every_decoder_that_is_valid_trains() {
    // 12 mechanisms are for decoders, and one of them has heads to fuse; the other procedures take all of them.
    assert_eq!(train_all(DECODER, &MECHANISMS, &PROCEDURES), 2 * 2 * (12 * 10 + 2));
    let [attention, rest] = [&NEWER[..4], &NEWER[4..]];
    assert_eq!(train_all(DECODER, attention, &PROCEDURES[..4]), 2 * 2 * 4 * 4);
    // HiLo reads grids; Gated DeltaNet reads one way, where the second and, unless it is told otherwise, the third read both.
    assert_eq!(train_all(DECODER, rest, &PROCEDURES[..3]), 2 * 2);
}

#[test]
fn every_classifier_that_is_valid_trains() {
    // In f32 only.
    assert!(train_all(CLASSIFIER, &MECHANISMS, &[&[]]) >= 2 * 10);
    // All but Gated DeltaNet read both ways.
    assert_eq!(train_all(CLASSIFIER, &NEWER, &[&[]]), 2 * 2 * (NEWER.len() - 1));
}

#[test]
fn masked_diffusion_trains_with_every_mechanism_that_reads_both_sides() {
    let world = World::new(DIFFUSION);
    let mut refused = Vec::new();
    for mechanism in AttentionConfig::examples() {
        let name = mechanism.name();
        // An inline table of TOML.
        let settings = serde_json::to_string(&mechanism).unwrap().replace("\":", "\" = ");
        let attention = format!("model.decoder.attention={settings}");
        if trains_if_valid(&world, name, &[attention.as_str()]) {
            let lines = String::from_utf8(world.read(&format!("{name}/metrics.jsonl"))).unwrap();
            assert!(lines.contains("\"validation_loss\""), "{name}: {lines}");
        } else {
            let told = world.fails(2, &["validate", "recipe.toml", &attention]);
            assert!(told.contains(&format!("{name} ")), "{told}");
            refused.push(name);
        }
    }
    assert_eq!(refused, ["hilo", "gated_delta_net"]);
}

/// Gated DeltaNet reads one token after the other.
#[test]
fn recurrent_layers_are_refused_where_both_sides_are_read() {
    let one_sided = "gated_delta_net reads positions one after the other";
    let recurrent = |template: &str| {
        let recipe = template.replace("MECHANISM", "gated_delta_net").replace("SETTINGS", "n_heads = 4");
        World::new(&recipe.replace("PRECISION", "f32").replace("OBSERVE", "false"))
    };
    let told = recurrent(CLASSIFIER).fails(2, &["validate", "recipe.toml"]);
    assert!(told.contains(one_sided), "{told}");
    let decoder = recurrent(DECODER);
    decoder.succeeds(&["validate", "recipe.toml"]);
    let procedures = [("standard", &[][..]), ("bilevel", &[]), ("neuron_dropout", &[WINDOW, INTERVAL, REFRESH])];
    for (procedure, settings) in procedures {
        let asked = |mask: &str| format!("procedure.{procedure}.context_mask={mask}");
        let [both, one] = [asked("bidirectional"), asked("causal")];
        let told = decoder.fails(2, &[&["validate", "recipe.toml", &both][..], settings].concat());
        assert!(told.contains("which gated_delta_net reads one after the other: take \"causal\""), "{told}");
        decoder.succeeds(&[&["validate", "recipe.toml", &one][..], settings].concat());
    }
    // Of a model that exists its layers are known once it has been read.
    decoder.succeeds(&["train", "recipe.toml", "--out", "run"]);
    let more = ["train", "recipe.toml", "--out", "more", "model.pretrained=run"];
    let told = decoder.fails(1, &[&more[..], &["procedure.bilevel.rank=2"]].concat());
    assert!(told.contains("procedure.bilevel.context_mask"), "{told}");
}
