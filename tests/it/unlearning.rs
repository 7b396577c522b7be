//! Attention shifting as its users run it: a world of facts is learned, and a part of it forgotten.

use serde_json::Value;

use crate::world::{SMALL, World};

/// Before and after: SMALL's model with plain attention.
fn worlds() -> World {
    let attention = "[model.decoder.attention.softmax]\nn_heads = 2";
    let model =
        SMALL.replace("[model.decoder.attention.grouped_differential]\nn_heads = 4\nn_noise_heads = 2", attention);
    let facts = "[data.facts]\nn_entities = 12\nn_relations = 2\nn_values = 6\nn_phrasings = 2\nuntaught = 0.2";
    let world = World::new(&model.replace("[data.markov]\nstates = 6", facts));
    let unlearn = format!(
        "[model]\npretrained = \"run\"\n{facts}\nforget = 0.25\n[procedure.attention_shifting]\nfraction = 0.2\nmemory_mib = 0\n\
         [lora]\nrank = 4\ntargets = [\"q_proj\", \"k_proj\"]\n[training]\nsteps = 6\nseq_len = 20\nbatch_size = 2\n\
         [lr_scheduler]\ndecay = \"constant\"\n[validation]\ninterval = 3\nbatches = 2\n[metrics]\nlog_freq = 1\n"
    );
    std::fs::write(world.dir.path().join("unlearn.toml"), unlearn).unwrap();
    world
}

#[test]
fn some_facts_are_forgotten_and_runs_resume() {
    let world = worlds();
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    let train = |run: &str, more: &[&str]| {
        world.succeeds(&[&["train", "unlearn.toml", "--out", run], more].concat());
    };
    train("whole", &[]);
    let text = String::from_utf8(world.read("whole/metrics.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let all = |key: &str| lines.iter().filter_map(|line| line[key].as_f64()).collect::<Vec<f64>>();
    let losses = all("attention_shifting/forget_loss");
    assert!(losses.len() == 6 && losses[5] < losses[0], "{losses:?}");
    assert_eq!(all("attention_shifting/retain_loss").len(), 6);
    assert!(all("attention_shifting/alpha").iter().all(|alpha| (0.2..=0.8).contains(alpha)));
    for key in ["facts/exact_match_forgotten", "facts/confident_wrong_forgotten", "facts/exact_match_taught"] {
        assert_eq!(all(key).len(), 3, "{key}: before, and with each validation");
    }
    train("parts", &["training.steps=4"]);
    train("parts", &[]);
    for name in ["adapter.safetensors", "optimizer.safetensors"] {
        let [whole, parts] = ["whole", "parts"].map(|run| world.read(&format!("{run}/step-00000006/{name}")));
        assert!(whole == parts, "{name} differs");
    }
}

#[test]
fn mistakes_are_told_before_anything_runs() {
    let world = worlds();
    for (change, words) in [
        ("data.facts.forget=0", "the data has no source \"forget\" (there are no sources)"),
        ("procedure.attention_shifting.forget=junk", "no source \"junk\" (there are retain, forget)"),
        ("lora.targets=[\"q_proj\", \"v_proj\"]", "\"v_proj\" does not shift the attention of its own layer"),
        (
            "lora.train_whole=[\"*norm*\"]",
            "lora.train_whole changes the model that procedure.attention_shifting compares with",
        ),
        ("training.activation_checkpointing=block", "reads the maps of all layers"),
        ("procedure.attention_shifting.lambda=1", "lambda (1) must be 0 or more and below 1"),
        ("procedure.attention_shifting.importance=ids", "ids is empty"),
        ("procedure.attention_shifting.importance=nouns", "nouns"),
        ("procedure.attention_shifting.direction=both", "both"),
        ("data.facts.forget=2", "forget (2) must be 0 to 0.9"),
    ] {
        let err = world.fails(2, &["validate", "unlearn.toml", change]);
        assert!(err.contains(words), "{change}: {err}");
    }
    let unlearn = String::from_utf8(world.read("unlearn.toml")).unwrap();
    let (before, after) = unlearn.split_once("[data.facts]").unwrap();
    let (_, after) = after.split_once("[procedure").unwrap();
    let sources = "[[data.source]]\nposts.kind = \"control\"\n[[data.source]]\nname = \"forget\"\nweight = 0\n\
                   posts.kind = \"junk\"\n";
    std::fs::write(world.dir.path().join("mixed.toml"), format!("{before}{sources}[procedure{after}")).unwrap();
    let err = world.fails(2, &["validate", "mixed.toml"]);
    assert!(err.contains("no source \"forget\" (there are posts)") && err.contains("weight is above 0"), "{err}");
    world.succeeds(&["validate", "mixed.toml", "data.source.1.weight=1"]);
    let (before, after) = unlearn.split_once("[lora]").unwrap();
    let (_, after) = after.split_once("[training]").unwrap();
    std::fs::write(world.dir.path().join("unlearn.toml"), format!("{before}[training]{after}")).unwrap();
    assert!(world.fails(2, &["validate", "unlearn.toml"]).contains("write lora.targets = [\"q_proj\", \"k_proj\"]"));
}
