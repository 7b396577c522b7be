//! Spans of interventions that the tokens do not have are told before anything runs.

use crate::world::{SMALL, World};

/// A text of short sentences, on which a run was trained.
fn world() -> World {
    let text = SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"text.txt\"]");
    let world = World::new(&text);
    write(&world, "text.txt", &"the cat sat on the mat. ".repeat(200));
    world.succeeds(&["train", "recipe.toml", "--out", "run", "training.steps=2", "lr_scheduler.warmup_steps=1"]);
    world
}

fn write(world: &World, name: &str, text: &str) {
    std::fs::write(world.dir.path().join(name), text).unwrap();
}

fn edit(keys: &str) -> String {
    format!("[[edits]]\nsite = \"scores\"\nkeys = {keys}\nchange = {{ add = 1 }}\n")
}

#[test]
fn a_span_that_no_row_has_is_refused_before_anything_runs() {
    let world = world();
    for (keys, words) in [
        ("{ text = \"dog\" }", ["\"dog\"", "held-out rows: it is searched to the letter"]),
        ("{ from = 16, to = 20 }", ["from (16) is behind the end of", "held-out rows"]),
        ("{ outside = [\"first\", { text = \"dog\" }] }", ["\"dog\"", "held-out rows"]),
    ] {
        write(&world, "e.toml", &edit(keys));
        for command in [&["eval", "run"][..], &["inspect", "run", "--out", "seen"]] {
            let told = world.fails(2, &[command, &["--intervention", "e.toml"]].concat());
            assert!(told.contains("e.toml:3") && words.iter().all(|word| told.contains(word)), "{command:?}: {told}");
        }
        let told =
            world.fails(2, &["eval", "run", "--text-file", "text.txt", "--window", "16", "--intervention", "e.toml"]);
        assert!(told.contains("e.toml:3") && told.contains("windows"), "{told}");
        let told = world.fails(2, &["train", "recipe.toml", "--out", "never", "intervention.file=e.toml"]);
        assert!(told.contains("e.toml:3") && told.contains("rows to learn from"), "{told}");
        assert!(!world.dir.path().join("never/metrics.jsonl").exists());
    }
    // In a longer text there is such a position.
    write(&world, "e.toml", &edit("{ from = 16, to = 20 }"));
    world.succeeds(&["eval", "run", "--text-file", "text.txt", "--window", "24", "--intervention", "e.toml"]);
    world.succeeds(&["generate", "run", "--prompt", "the cat", "--max-new-tokens", "12", "--intervention", "e.toml"]);
    let told =
        world.fails(2, &["generate", "run", "--prompt", "a", "--max-new-tokens", "3", "--intervention", "e.toml"]);
    assert!(told.contains("e.toml:3") && told.contains("from (16) is behind the end of the text"), "{told}");
}

#[test]
fn a_span_that_some_rows_have_is_told_with_counts() {
    let world = world();
    // Rows of 16 tokens out of sentences of 24: some are without.
    write(&world, "e.toml", &edit("{ text = \"cat sat\" }"));
    let (_, told) = world.succeeds(&["eval", "run", "--intervention", "e.toml"]);
    let note = told.lines().find(|line| line.contains("note: edits.0.keys")).unwrap_or_else(|| panic!("{told}"));
    let numbers: Vec<u64> = note.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    assert!(numbers.len() == 2 && 0 < numbers[0] && numbers[0] < numbers[1], "{note}");
    let (_, told) = world.succeeds(&["train", "recipe.toml", "--out", "with", "intervention.file=e.toml"]);
    assert_eq!(told.matches("note: edits.0.keys").count(), 2, "rows to learn from, held-out rows: {told}");
    write(&world, "e.toml", &edit("\"first\""));
    let (_, told) = world.succeeds(&["eval", "run", "--intervention", "e.toml"]);
    assert!(!told.contains("note: edits"), "{told}");
}

#[test]
fn an_edit_of_generated_tokens_is_told_where_none_are() {
    let world = world();
    let decodes = "[[edits]]\nsite = \"z\"\nphase = \"decode\"\nchange = { scale = -300 }\n";
    write(&world, "e.toml", decodes);
    for command in [
        &["eval", "run"][..],
        &["eval", "run", "--text-file", "text.txt"],
        &["inspect", "run", "--out", "seen"],
        &["logits", "run", "--text", "the cat", "--out", "l.safetensors"],
    ] {
        let told = world.fails(2, &[command, &["--intervention", "e.toml"]].concat());
        let words = ["e.toml:3", "phase (\"decode\") is that of every edit", "generate"];
        assert!(words.iter().all(|word| told.contains(word)), "{command:?}: {told}");
    }
    let note = |told: &str, file: &str| {
        let words = format!("{file}:3: edits.0.phase of the intervention is \"decode\"");
        assert!(told.lines().any(|line| line.starts_with("note: ") && line.contains(&words)), "{told}");
    };
    // A run may be made with it: what it generates is changed.
    let train = ["train", "recipe.toml", "--out", "with", "training.steps=2", "lr_scheduler.warmup_steps=1"];
    note(&world.succeeds(&[&train[..], &["intervention.file=e.toml"]].concat()).1, "e.toml");
    write(&world, "both.toml", &format!("{decodes}{}", edit("\"first\"")));
    note(&world.succeeds(&["eval", "run", "--intervention", "both.toml"]).1, "both.toml");
    let generate = ["generate", "run", "--prompt", "the cat", "--max-new-tokens", "8", "--temperature", "0"];
    let (plain, _) = world.succeeds(&generate);
    let (changed, told) = world.succeeds(&[&generate[..], &["--intervention", "e.toml"]].concat());
    assert!(!told.contains("no token is generated"), "{told}");
    assert_ne!(plain, changed);
}

#[test]
fn problems_of_a_task_are_searched_for_spans() {
    let world = world();
    let task = ["eval", "run", "--task", "needles_multi", "--lengths", "1", "--unit", "400", "--samples", "1"];
    let with = [&task[..], &["--intervention", "e.toml"]].concat();
    write(&world, "e.toml", &edit("{ text = \"zzz\" }"));
    let told = world.fails(2, &with);
    assert!(told.contains("e.toml:3") && told.contains("(\"zzz\") is nowhere in 5 problems"), "{told}");
    write(&world, "e.toml", &edit("{ from = 0, to = 4 }"));
    assert!(!world.succeeds(&with).1.contains("note: edits"));
}
