//! Conversations: pretrain, fine-tune in three ways, ask, export.

use std::io::Write;
use std::process::Stdio;

use serde_json::Value;

use crate::world::{SMALL, World};

const CHAT: &str = r#"
[data.chat]
paths = ["chats.jsonl"]
template = "plain"
[training]
steps = 4
seq_len = 64
batch_size = 2
[metrics]
log_freq = 1
[validation]
interval = 4
batches = 1
fraction = 0.2
"#;

fn world() -> World {
    let world = World::new(
        &SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"chats.jsonl\"]\nsyntax = \"any\""),
    );
    let line = |i: usize| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "{i} + {i}"}}, {{"role": "assistant", "content": "{}"}}]}}"#,
            2 * i
        )
    };
    let lines: Vec<String> = (0..40).map(line).collect();
    std::fs::write(world.dir.path().join("chats.jsonl"), lines.join("\n")).unwrap();
    std::fs::write(world.dir.path().join("chat.toml"), format!("[model]\npretrained = \"base\"\n{CHAT}")).unwrap();
    world.succeeds(&["train", "recipe.toml", "--out", "base"]);
    world
}

fn last(world: &World, run: &str, key: &str) -> Value {
    let log = String::from_utf8(world.read(&format!("{run}/metrics.jsonl"))).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.rev().find_map(|line| line.get(key).cloned()).unwrap_or_else(|| panic!("{run} has no {key}"))
}

#[test]
fn a_model_is_pretrained_fine_tuned_asked_and_exported() {
    let world = world();
    let (out, err) = world.succeeds(&["preview", "chat.toml", "--rows", "1"]);
    assert!(err.contains("40 rows of chat") && err.contains("for validation"), "{err}");
    for part in ["user", "assistant", "template", "padding"] {
        assert!(out.contains(part), "no {part} in {out}");
    }
    let mut coloured = world.command(&["preview", "chat.toml", "--rows", "1", "data.chat.pack=false"]);
    let coloured = coloured.env("CLICOLOR_FORCE", "1").output().unwrap();
    let coloured = String::from_utf8_lossy(&coloured.stdout).into_owned();
    assert!(coloured.contains(", 1 document(s)"), "{coloured}");

    // SFT, low-rank pairs only, FocuSFT on what SFT gave.
    let (sample, err) = world.succeeds(&["train", "chat.toml", "--out", "sft"]);
    assert!(sample.starts_with("user: Hello!\nassistant: ") && !err.contains("model's own template"), "{sample}{err}");
    let other = ["train", "chat.toml", "model.pretrained=sft", "data.chat.template=chatml", "training.seq_len=80"];
    let (_, err) = world.succeeds(&[&other[..], &["--out", "other"]].concat());
    assert!(err.contains("data.chat.template = \"chatml\" is not the model's own template"), "{err}");
    assert!(last(&world, "sft", "plain/sink_mass").as_f64().unwrap() > 0.0);
    let (_, err) = world.succeeds(&["train", "chat.toml", "lora.rank=2", "--out", "lora"]);
    assert!(err.contains(" of them frozen)"), "{err}");
    let focus = [
        "train",
        "chat.toml",
        "model.pretrained=sft",
        "procedure.bilevel.rank=2",
        // The mask of the plain loss: what is left is what the fast weights have learned.
        "procedure.bilevel.context_mask=causal",
        "procedure.bilevel.inner_lr=0.1",
        "--out",
        "focus",
    ];
    world.succeeds(&focus);
    let inner = |k: usize| last(&world, "focus", &format!("bilevel/inner_loss_{k}")).as_f64().unwrap();
    assert!(inner(1) < inner(0));
    let [plain, adapted] = ["validation_loss", "adapted/validation_loss"].map(|key| last(&world, "focus", key));
    assert!(adapted.as_f64() < plain.as_f64(), "{adapted} {plain}");
    last(&world, "focus", "adapted/layer_01/context_engagement");

    // A run of pairs goes on, and what it exports has them folded in.
    let (_, err) = world.succeeds(&["train", "chat.toml", "lora.rank=2", "training.steps=6", "--out", "lora"]);
    assert!(err.contains("resume: from"), "{err}");
    let ask = ["generate", "lora", "--chat", "--prompt", "3 + 3", "--max-new-tokens", "5", "--seed", "1"];
    assert_eq!(world.succeeds(&ask).0, world.succeeds(&ask).0);
    // Whoever talks with it gets the same answers: to the first message, and to a first one again.
    let talk = ["chat", "lora", "--max-new-tokens", "5", "--seed", "1"];
    let mut child = world.command(&talk).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"3 + 3\n/new\n\n3 + 3\nand 4 + 4\n").unwrap();
    let said = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    let first = world.succeeds(&ask).0;
    assert!(said.starts_with(&first.repeat(2)) && said.len() > 2 * first.len(), "{said:?} {first:?}");
    let err = world.fails(2, &["generate", "base", "--chat", "--prompt", "x"]);
    assert!(err.contains("has no chat template"), "{err}");
}

#[test]
fn a_fine_tuned_model_is_exported_whole_and_asked_about_long_texts() {
    let world = world();
    let softmax = SMALL.replace(
        "[model.decoder.attention.grouped_differential]\nn_heads = 4\nn_noise_heads = 2",
        "[model.decoder.attention.softmax]\nn_heads = 2",
    );
    let recipe = softmax
        .replace("[data.markov]\nstates = 6", "[data.long_context]\ntasks = [\"multi_hop\", \"needles_multi\"]")
        .replace("seq_len = 16", "seq_len = 512")
        .replace("steps = 12", "steps = 2");
    std::fs::write(world.dir.path().join("long.toml"), format!("{recipe}\n[lora]\nrank = 2\n")).unwrap();
    world.succeeds(&["train", "long.toml", "--out", "long"]);
    world.succeeds(&["export", "long", "--to", "exported"]);
    let config: Value = serde_json::from_slice(&world.read("exported/tokenizer_config.json")).unwrap();
    assert!(config["chat_template"].as_str().unwrap().contains("Assistant:"));
    let stops: Value = serde_json::from_slice(&world.read("exported/generation_config.json")).unwrap();
    assert_eq!(stops["eos_token_id"], 256, "the plain template ends a turn with the end of a text");
    let names = String::from_utf8_lossy(&world.read("exported/model.safetensors")).into_owned();
    assert!(names.contains("q_proj.weight") && !names.contains("lora"));

    // Markers that are not tokens end nothing; what a recipe tells a template goes with the model.
    let chat =
        softmax.replace("[data.markov]\nstates = 6", "[data.chat]\npaths = [\"chats.jsonl\"]\ntemplate = \"chatml\"");
    let chat = chat.replace("seq_len = 16", "seq_len = 128").replace("steps = 12", "steps = 1");
    std::fs::write(world.dir.path().join("chatml.toml"), chat).unwrap();
    let variables = "data.chat.template_variables={ enable_thinking = false }";
    let (_, err) = world.succeeds(&["train", "chatml.toml", variables, "--out", "chatml"]);
    assert!(err.contains("note: data.chat.template \"chatml\": <|im_start|>, <|im_end|> are not tokens"), "{err}");
    world.succeeds(&["export", "chatml", "--to", "chatml_exported"]);
    let stops: Value = serde_json::from_slice(&world.read("chatml_exported/generation_config.json")).unwrap();
    assert_eq!(stops["eos_token_id"], 256);
    let config: Value = serde_json::from_slice(&world.read("chatml_exported/tokenizer_config.json")).unwrap();
    let template = config["chat_template"].as_str().unwrap();
    assert!(template.contains("{%- set enable_thinking = false %}") && template.contains("<|im_start|>"), "{template}");

    let eval = ["eval", "long", "--task", "needles_multi,common_words", "--lengths", "1,2", "--samples", "1"];
    let (out, err) = world.succeeds(&[&eval[..], &["--heatmap", "map.svg"]].concat());
    let result: Value = serde_json::from_str(&out).unwrap();
    let rows = result["results"].as_array().unwrap();
    let lengths: Vec<u64> = rows.iter().map(|row| row["length"].as_u64().unwrap()).collect();
    assert_eq!(lengths, [512, 1024, 512, 1024]);
    assert_eq!(rows[0]["accuracy_by_depth"].as_array().unwrap().len(), 5);
    assert!(err.contains("common_words") && String::from_utf8(world.read("map.svg")).unwrap().contains("</svg>"));
    assert_eq!(world.succeeds(&eval).0, out, "the same seed, the same problems");
    let err = world.fails(2, &["eval", "long", "--task", "all", "--lengths", "0"]);
    assert!(err.contains("at least 1"), "{err}");
    let err = world.fails(2, &["eval", "long", "--samples", "2"]);
    assert!(err.contains("--task"), "{err}");
}

#[test]
fn settings_of_fine_tuning_are_checked_before_anything_runs() {
    let world = World::new(SMALL);
    for (key, words) in [
        ("lora.rank=0", "rank (0) must be 1"),
        ("lora.targets=[]", "targets is empty"),
        ("procedure.bilevel.layer_fraction=2", "layer_fraction (2) must be 0 to 1"),
        ("procedure.bilevel.inner_lr=-1", "inner_lr (-1)"),
        ("data.long_context.tasks=[]", "tasks is empty"),
        ("data.chat.paths=[]", "paths is empty"),
        (
            "data.chat={ paths = [\"x\"], columns = \"alpaca\" }",
            "write data.chat.columns.alpaca={} (valid here: alpaca, messages",
        ),
        ("data.chat={ paths = [\"x\"], columns = \"sharegtp\" }", "write data.chat.columns.sharegpt={}"),
        ("tokenizer=bytes", "tokenizer takes a table, where the word \"bytes\" is"),
        ("data.chat={ paths = [\"x\"], date = \"2025-02-30\" }", "must be a day such as"),
        ("data.chat={ paths = [\"x\"], template_variables = { tools = 1 } }", "template_variables sets tools"),
    ] {
        let err = world.fails(2, &["validate", "recipe.toml", key]);
        assert!(err.contains(words) && err.contains("command line:1:"), "{key}: {err}");
    }
    let err = world.fails(2, &["train", "recipe.toml", "lora.targets=[\"qkv\"]", "--out", "x"]);
    assert!(err.contains("\"qkv\"") && err.contains("q_proj"), "{err}");
    let err = world.fails(1, &["train", "recipe.toml", "procedure.bilevel.targets=[\"fc\"]", "--out", "x"]);
    assert!(err.contains("procedure.bilevel.targets") && err.contains("down_proj"), "{err}");
}
