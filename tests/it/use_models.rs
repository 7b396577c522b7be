//! What a person does with a model first: measure it on a text, let it continue prompts, talk with it, name it as on the hub.

use std::io::Write;
use std::process::Stdio;

use serde_json::Value;

use crate::world::{SMALL, World};

/// Runs with something on standard input; gives standard output.
fn piped(world: &World, args: &[&str], input: &str) -> String {
    let mut child = world.command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A folder with a short run on a text.
fn trained() -> World {
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"text.txt\"]"));
    std::fs::write(world.dir.path().join("text.txt"), "the cat sat on the mat. ".repeat(80)).unwrap();
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    world
}

#[test]
fn a_text_is_measured_and_prompts_are_continued() {
    let world = trained();
    let write = |name: &str, text: &str| std::fs::write(world.dir.path().join(name), text).unwrap();
    write("other.txt", &"the mat sat on the cat. ".repeat(20));
    let json = |args: &[&str]| serde_json::from_str::<Value>(&world.succeeds(args).0).unwrap();
    let number = |value: &Value, key: &str| value[key].as_f64().unwrap();
    let measured = json(&["eval", "run", "--text-file", "other.txt"]);
    // A byte is a token here, and one that ends the text behind them.
    assert_eq!((number(&measured, "targets"), number(&measured, "texts")), (479.0, 1.0));
    assert_eq!((number(&measured, "window"), number(&measured, "stride")), (16.0, 8.0));
    let loss = number(&measured, "loss");
    assert!((number(&measured, "perplexity") - loss.exp()).abs() < 1e-9);
    let bits = loss / std::f64::consts::LN_2;
    assert!((number(&measured, "bits_per_byte") - bits).abs() < 1e-9, "{measured}");
    let both = json(&["eval", "run", "--text-file", "other.txt", "text.txt", "--window", "16", "--stride", "16"]);
    assert_eq!(number(&both, "texts"), 2.0);
    for (code, args, words) in [
        (2, "eval run --text-file other.txt --window 4 --stride 5", "--stride (5) must be at most --window (4)"),
        (1, "eval run --text-file nowhere.txt", "matches no file"),
        (2, "eval run --stride 5", "--text"),
        (2, "generate run --prompts p.txt --prompt x", "cannot be used with"),
        (1, "generate run --prompts nowhere.txt", "nowhere.txt"),
        (1, "generate run --prompts bad.jsonl", "bad.jsonl:2: needs \"prompt\""),
        (2, "chat run", "has no chat template"),
    ] {
        write("bad.jsonl", "{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n");
        let err = world.fails(code, &args.split(' ').collect::<Vec<_>>());
        assert!(err.contains(words), "{args}: {err}");
    }

    // Many prompts give what each gives alone, in their order.
    write("p.txt", "the cat\n\nthe\nthe mat\n");
    let greedy = ["--temperature", "0", "--max-new-tokens", "12"];
    let (lines, _) = world.succeeds(&[&["generate", "run", "--prompts", "p.txt"], &greedy[..]].concat());
    let answers: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.iter().map(|answer| &answer["prompt"]).collect::<Vec<_>>(), ["the cat", "the", "the mat"]);
    for answer in &answers {
        let prompt = answer["prompt"].as_str().unwrap();
        let alone = [&["generate", "run", "--prompt", prompt], &greedy[..]].concat();
        let whole = format!("{prompt}{}\n", answer["text"].as_str().unwrap());
        assert_eq!(world.succeeds(&alone).0, whole);
        assert_eq!(piped(&world, &[&["generate", "run", "--prompt", "-"], &greedy[..]].concat(), prompt), whole);
        assert_eq!((answer["tokens"].as_u64(), answer["finish"].as_str()), (Some(12), Some("length")));
    }
    let text = answers[0]["text"].as_str().unwrap();
    let stop = &text[5..6];
    let (cut, _) = world.succeeds(&[&["generate", "run", "--prompt", "the cat", "--stop", stop], &greedy[..]].concat());
    assert_eq!(cut, format!("the cat{}\n", &text[..text.find(stop).unwrap()]));
}

#[test]
fn a_model_is_named_as_on_the_hub() {
    let world = trained();
    world.succeeds(&["export", "run", "--out", "exported"]);
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let home = world.dir.path().join("cache/hub/models--org--name");
    std::fs::create_dir_all(home.join("refs")).unwrap();
    std::fs::create_dir_all(home.join("snapshots")).unwrap();
    std::fs::write(home.join("refs/main"), commit).unwrap();
    std::fs::rename(world.dir.path().join("exported"), home.join("snapshots").join(commit)).unwrap();
    let run = |args: &[&str]| {
        let output = world.command(args).env("HF_HOME", "cache").env_remove("HF_HUB_CACHE").output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let greedy = ["--prompt", "the ", "--temperature", "0", "--max-new-tokens", "8"];
    let (own, _) = world.succeeds(&[&["generate", "run"], &greedy[..]].concat());
    for name in ["org/name", &format!("org/name@{commit}")] {
        let (code, out, err) = run(&[&["generate", name], &greedy[..]].concat());
        assert_eq!((code, &out), (Some(0), &own), "{err}");
    }
    assert_eq!(run(&["eval", "org/name", "--text-file", "text.txt"]).0, Some(0));
    let train = ["train", "recipe.toml", "training.steps=2", "model.pretrained=org/name", "--out", "tuned"];
    let (code, _, err) = run(&train);
    assert_eq!(code, Some(0), "{err}");
    for (name, words) in [
        ("org/other", "cache of the Hugging Face hub (cache/hub/models--org--other; HF_HUB_CACHE or HF_HOME"),
        ("org/name@v2", "no model of that name in the cache of the Hugging Face hub (cache/hub/models--org--name;"),
        ("org/..", "no such checkpoint"),
        ("../name", "no such checkpoint"),
    ] {
        let (code, _, err) = run(&["generate", name]);
        assert!(code == Some(2) && err.contains(words), "{name}: {err}");
    }
}
