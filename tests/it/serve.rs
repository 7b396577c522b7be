//! A model behind HTTP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};

use polyhead_models::weights::TensorFiles;
use serde_json::{Value, json};

use crate::world::{SMALL, World};

/// A server that ends with the test.
struct Server {
    process: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
    }
}

impl Server {
    fn of(world: &World, folder: &str) -> Self {
        let args = ["serve", folder, "--port", "0"];
        let mut process = world.command(&args).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let line = lines.find(|line| line.as_ref().unwrap().contains("http://")).unwrap().unwrap();
        let address = line.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
        std::thread::spawn(move || lines.for_each(drop));
        Self { process, address }
    }

    /// The status and the text of what comes back.
    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        write!(stream, "{method} {path} HTTP/1.0\r\nhost: x\r\ncontent-length: {length}\r\n\r\n{body}").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text) = self.ask("POST", path, &body.to_string());
        (status, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")))
    }
}

/// A folder with a short run on a text.
fn trained() -> World {
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"text.txt\"]"));
    std::fs::write(world.dir.path().join("text.txt"), "the cat sat on the mat. ".repeat(80)).unwrap();
    world.succeeds(&["train", "recipe.toml", "training.seq_len=64", "--out", "run"]);
    world
}

#[test]
fn scores_are_those_of_the_logits_and_text_that_of_generate() {
    let world = trained();
    let server = Server::of(&world, "run");
    let text = "the cat sat";
    let ask = json!({ "prompt": text, "max_tokens": 1, "echo": true, "logprobs": 1, "temperature": 0, "seed": 1,
        "model": "run" });
    let (status, answer) = server.post("/v1/completions", &ask);
    assert_eq!(status, 200, "{answer}");
    let choice = &answer["choices"][0];
    assert!(choice["text"].as_str().unwrap().starts_with(text) && choice["finish_reason"] == "length");
    let scored = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!((scored.len(), &scored[0]), (text.len() + 1, &Value::Null));

    // The same from the logits.
    world.succeeds(&["logits", "run", "--text", text, "--out", "l.safetensors"]);
    let logits = TensorFiles::open(&[world.dir.path().join("l.safetensors")]).unwrap().values("logits").unwrap();
    let rows = logits.chunks(logits.len() / text.len());
    for ((row, target), (scored, best)) in rows
        .zip(text.bytes().skip(1))
        .zip(scored[1..].iter().zip(choice["logprobs"]["top_logprobs"].as_array().unwrap()[1..].iter()))
    {
        let all: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        let expected = f64::from(row[usize::from(target)]) - all.ln();
        assert!((scored.as_f64().unwrap() - expected).abs() < 1e-4, "{scored} {expected}");
        let largest = row.iter().fold(f32::MIN, |most, &logit| most.max(logit));
        let best = best.as_object().unwrap().values().next().unwrap().as_f64().unwrap();
        assert!((best - (f64::from(largest) - all.ln())).abs() < 1e-4);
    }

    // What is written is what generate writes, at once, streamed, and beside others.
    let greedy = ["--temperature", "0", "--max-new-tokens", "9"];
    let (written, _) = world.succeeds(&[&["generate", "run", "--prompt", text], &greedy[..]].concat());
    let written = written.strip_prefix(text).unwrap().trim_end_matches('\n');
    let ids: Vec<u32> = text.bytes().map(u32::from).collect();
    let several = json!({ "prompt": ["the", text, "a mat"], "max_tokens": 9, "temperature": 0 });
    let (_, answer) = server.post("/v1/completions", &several);
    assert_eq!(answer["choices"][1]["text"], json!(written));
    assert_eq!(answer["usage"], json!({ "prompt_tokens": 19, "completion_tokens": 27, "total_tokens": 46 }));
    let (_, answer) = server.post("/v1/completions", &json!({ "prompt": ids, "max_tokens": 9, "temperature": 0 }));
    assert_eq!(answer["choices"][0]["text"], json!(written));
    let stream = json!({ "prompt": text, "max_tokens": 9, "temperature": 0, "stream": true });
    let (status, events) = server.ask("POST", "/v1/completions", &stream.to_string());
    let data: Vec<&str> = events.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!((status, data.last()), (200, Some(&"[DONE]")), "{events}");
    let pieces = data[..data.len() - 1].iter().map(|piece| serde_json::from_str::<Value>(piece).unwrap());
    let pieces: Vec<Value> = pieces.collect();
    let whole: String = pieces.iter().map(|piece| piece["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!((whole.as_str(), &pieces.last().unwrap()["choices"][0]["finish_reason"]), (written, &json!("length")));
    let stop = &written[3..4];
    let (_, answer) = server.post("/v1/completions", &json!({ "prompt": text, "temperature": 0, "stop": stop }));
    assert_eq!(answer["choices"][0]["text"], json!(written.split(stop).next().unwrap()));
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    // Requests that come at once are answered together, each as alone.
    let alone: Vec<Value> = (1..7)
        .map(|length| {
            json!({ "prompt": &text[..length], "max_tokens": length,
        "temperature": 0.7, "seed": length, "logprobs": 2 })
        })
        .collect();
    let answers = |ask: &Value| server.post("/v1/completions", ask).1["choices"].clone();
    let expected: Vec<Value> = alone.iter().map(answers).collect();
    std::thread::scope(|scope| {
        let together: Vec<_> = alone.iter().map(|ask| scope.spawn(|| answers(ask))).collect();
        for (answer, expected) in together.into_iter().zip(&expected) {
            assert_eq!(answer.join().unwrap()[0]["text"], expected[0]["text"]);
        }
    });
    // A seed decides; without one, each request draws anew.
    let draw = |seed: Value| {
        let ask = json!({ "prompt": text, "max_tokens": 12, "seed": seed, "n": 2 });
        server.post("/v1/completions", &ask).1["choices"].clone()
    };
    assert_eq!(draw(json!(3)), draw(json!(3)));
    assert_ne!(draw(json!(3))[0]["text"], draw(json!(3))[1]["text"]);
    assert_ne!(draw(Value::Null), draw(Value::Null));
}

#[test]
fn a_chat_is_answered_as_generate_answers_it_at_once_and_streamed() {
    let data = "[data.chat]\npaths = [\"chats.jsonl\"]\ntemplate = \"plain\"";
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", data));
    let row = |i: usize| {
        let message = |role: &str, content: usize| json!({ "role": role, "content": format!("{content} and {i}") });
        json!({ "messages": [message("user", i), message("assistant", 2 * i)] }).to_string()
    };
    let rows: Vec<String> = (0..40).map(row).collect();
    std::fs::write(world.dir.path().join("chats.jsonl"), rows.join("\n")).unwrap();
    world.succeeds(&["train", "recipe.toml", "training.seq_len=64", "optimizer.adamw.lr=1e-2", "--out", "run"]);
    let server = Server::of(&world, "run");
    for (system, question) in [(None, "3 and 3"), (Some("be short"), "5")] {
        let greedy = ["generate", "run", "--chat", "--temperature", "0", "--max-new-tokens", "9", "--prompt", question];
        let told: Vec<&str> = system.iter().flat_map(|system| ["--system", *system]).collect();
        let (written, _) = world.succeeds(&[&greedy[..], &told].concat());
        let written = written.strip_suffix('\n').unwrap();
        assert!(!written.is_empty());
        let mut messages: Vec<Value> =
            system.iter().map(|system| json!({ "role": "system", "content": system })).collect();
        messages.push(json!({ "role": "user", "content": question }));
        let mut ask = json!({ "messages": messages, "max_tokens": 9, "temperature": 0 });
        let (status, answer) = server.post("/v1/chat/completions", &ask);
        assert_eq!((status, &answer["object"]), (200, &json!("chat.completion")), "{answer}");
        let choice = &answer["choices"][0];
        assert_eq!(choice["message"], json!({ "role": "assistant", "content": written }));
        let finish = choice["finish_reason"].clone();
        assert!(finish == "length" || finish == "stop", "{answer}");

        ask["stream"] = json!(true);
        let (status, events) = server.ask("POST", "/v1/chat/completions", &ask.to_string());
        let data: Vec<&str> = events.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let (end, pieces) = data.split_last().unwrap();
        assert_eq!((status, *end), (200, "[DONE]"), "{events}");
        let pieces: Vec<Value> = pieces.iter().map(|piece| serde_json::from_str(piece).unwrap()).collect();
        assert!(pieces.iter().all(|piece| piece["object"] == "chat.completion.chunk"), "{events}");
        let said = pieces.iter().filter_map(|piece| piece["choices"][0]["delta"]["content"].as_str());
        assert_eq!(said.collect::<String>(), written);
        assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], finish);
    }
}

#[test]
fn what_is_not_known_is_refused_and_a_signal_ends_it() {
    let world = trained();
    let mut server = Server::of(&world, "run");
    let long = "x".repeat(65);
    for (body, key, words) in [
        (json!({}), "prompt", "prompt is missing"),
        (json!({ "prompt": "a", "logit_bias": { "5": 1 } }), "logit_bias", "is not supported"),
        (json!({ "prompt": "a", "presence_penalty": 0.5 }), "presence_penalty", "(0.5) is not supported"),
        (json!({ "prompt": "a", "beam": 3 }), "beam", "beam is not known"),
        (json!({ "prompt": "a", "max_tokens": 64 }), "max_tokens", "max_tokens (64)"),
        (json!({ "prompt": "a", "max_tokens": -1 }), "max_tokens", "must be a number of tokens"),
        (json!({ "prompt": long }), "prompt", "65 tokens"),
        (json!({ "prompt": [1, 999] }), "prompt", "token 999"),
        (json!({ "prompt": [] }), "prompt", "prompt (0) must be 1 to 256 prompts"),
        (json!({ "prompt": "a", "temperature": -1 }), "temperature", "temperature (-1) must be 0 to 100"),
        (json!({ "prompt": "a", "n": 0 }), "n", "n (0)"),
        (json!({ "prompt": ["a", "b"], "stream": true }), "stream", "one prompt"),
    ] {
        let (status, answer) = server.post("/v1/completions", &body);
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(key)), "{body}: {answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(words), "{body}: {answer}");
    }
    let (status, text) = server.ask("POST", "/v1/completions", "{");
    assert!(status == 400 && text.contains("invalid JSON"), "{text}");
    let chat = json!({ "messages": [{ "role": "user", "content": "a" }] });
    let (status, answer) = server.post("/v1/chat/completions", &chat);
    assert!(status == 400 && answer["error"]["message"].as_str().unwrap().contains("no chat template"), "{answer}");
    // What changes nothing is taken.
    let neutral = json!({ "prompt": "a", "presence_penalty": 0, "best_of": 1, "logit_bias": null, "suffix": "" });
    assert_eq!(server.post("/v1/completions", &neutral).0, 200);
    assert_eq!(server.ask("GET", "/v1/models", "").0, 200);
    assert_eq!(server.ask("GET", "/v2", "").0, 404);
    assert!(world.fails(1, &["serve", "run", "--port", server.address.rsplit(':').next().unwrap()]).contains("--port"));
    // Who still waits is answered, or told; the server leaves cleanly.
    #[cfg(unix)]
    {
        let ask = |more: Value| {
            let mut ask = json!({ "prompt": "a", "max_tokens": 60 });
            ask.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            ask.to_string()
        };
        let (many, stream) = (ask(json!({ "n": 250 })), ask(json!({ "stream": true })));
        let process = server.process.id().to_string();
        std::thread::scope(|scope| {
            let waiting: Vec<_> = [&many, &many, &stream]
                .into_iter()
                .map(|body| scope.spawn(|| server.ask("POST", "/v1/completions", body)))
                .collect();
            std::thread::sleep(std::time::Duration::from_millis(300));
            assert!(std::process::Command::new("kill").arg(&process).status().unwrap().success());
            for (status, text) in waiting.into_iter().map(|waiting| waiting.join().unwrap()) {
                let told = text.contains("the server is stopping");
                assert!(status == 200 && (text.contains("finish_reason") || told) || status == 503 && told, "{text}");
            }
        });
        assert!(server.process.wait().unwrap().success());
    }
}

#[test]
fn a_prompt_without_a_span_of_the_intervention_is_refused() {
    let world = trained();
    let edit = "[[edits]]\nsite = \"scores\"\nkeys = { text = \"cat\" }\nchange = { add = 1 }\n";
    std::fs::write(world.dir.path().join("e.toml"), edit).unwrap();
    world.succeeds(&["train", "recipe.toml", "training.seq_len=64", "intervention.file=e.toml", "--out", "with"]);
    let server = Server::of(&world, "with");
    let ask =
        |prompt: &str| server.post("/v1/completions", &json!({ "prompt": prompt, "max_tokens": 2, "temperature": 0 }));
    assert_eq!(ask("the cat sat").0, 200);
    let (status, told) = ask("the dog sat");
    let message = told["error"]["message"].as_str().unwrap_or_else(|| panic!("{told}"));
    assert_eq!((status, &told["error"]["param"]), (400, &json!("prompt")), "{told}");
    assert!(message.contains("\"cat\"") && message.contains("nowhere in the text"), "{message}");
}
