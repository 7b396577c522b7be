#![allow(clippy::unwrap_used)]
use std::collections::BTreeMap;

use polyhead_models::IGNORE;
use serde_json::json;
use std::sync::Arc;

use super::*;
use crate::loader::Samples;

fn golden(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/chat_templates");
    std::fs::read_to_string(folder.join(name)).unwrap()
}

fn special() -> Special {
    Special { bos: "<s>".into(), eos: "</s>".into(), pad: String::new() }
}

#[test]
fn templates_render_as_in_transformers() {
    let rendered: BTreeMap<String, Value> = serde_json::from_str(&golden("rendered.json")).unwrap();
    assert_eq!(rendered.len(), 32);
    for (name, case) in rendered {
        let file = name.split('/').next().unwrap();
        let template = ChatTemplate::new(&golden(&format!("{file}.jinja")), special()).unwrap();
        let messages = case["messages"].as_array().unwrap().clone();
        let tools = Some(case["tools"].clone()).filter(|tools| !tools.is_null());
        let chat = Conversation { messages, tools };
        let ours = template.render(&chat, chat.messages.len(), case["prompt"].as_bool().unwrap());
        match case["text"].as_str() {
            None => assert!(ours.unwrap_err().contains("must alternate"), "{name}"),
            Some(text) => {
                let ours = ours.unwrap();
                assert_eq!(ours.text, text, "{name}");
                let ranges = ours.generated.map(|all| all.iter().map(|r| [r.start, r.end]).collect::<Vec<_>>());
                assert_eq!(json!(ranges), case["generated"], "{name}");
            }
        }
    }
}

fn chat(said: &[(&str, &str)]) -> Conversation {
    let message = |(role, content): &(&str, &str)| json!({ "role": role, "content": content });
    Conversation { messages: said.iter().map(message).collect(), tools: None }
}

/// The conversation's tokens (bytes) as text, in runs of one role; those that are learnt in brackets.
fn runs(said: &[(&str, &str)], learn: Learn, source: &str) -> Result<String, String> {
    let tokenizer = Tokenizer::bytes();
    let template = ChatTemplate::new(source, tokenizer.special()).unwrap();
    let tokens = tokenize(&chat(said), learn, &template, &tokenizer)?;
    let mut out = String::new();
    let mut last = None;
    for ((&id, &role), &learnt) in tokens.tokens.iter().zip(&tokens.roles).zip(&tokens.learnt) {
        if last != Some((role, learnt)) {
            let name = format!("{role:?}").to_lowercase();
            out.push_str(&if learnt { format!(" [{name}] ") } else { format!(" {name}: ") });
        }
        last = Some((role, learnt));
        out.push_str(&tokenizer.token_text(id));
    }
    Ok(out)
}

const TALK: [(&str, &str); 5] =
    [("system", "sys"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")];

fn built_in(name: &str) -> &'static str {
    BUILT_IN.iter().find(|(other, _)| *other == name).unwrap().1
}

#[test]
fn answers_are_learnt_from_behind_their_header_to_the_end_of_the_turn() {
    let plain = runs(&TALK, Learn::Assistant, built_in("plain")).unwrap();
    assert_eq!(
        plain,
        " template: System:  system: sys template: \\nUser:  user: q1 template: \\nAssistant: [assistant]  a1<|endoftext|>\\n \
         template: User:  user: q2 template: \\nAssistant: [assistant]  a2<|endoftext|>\\n"
    );
    let chatml = runs(&TALK, Learn::Last, built_in("chatml")).unwrap();
    assert!(chatml.contains("assistant\\n assistant: a1<|im_end|>\\n template: "), "{chatml}");
    assert!(chatml.ends_with(" [assistant] a2<|im_end|>\\n"), "{chatml}");
    let llama = runs(&TALK[1..3], Learn::Assistant, built_in("llama3")).unwrap();
    assert!(llama.ends_with("assistant<|end_header_id|>\\n\\n [assistant] a1<|eot_id|>"), "{llama}");
    let all = runs(&TALK[1..3], Learn::All, built_in("chatml")).unwrap();
    assert!(all.starts_with(" [template] <|im_start|>user\\n [user] q1 [template] "), "{all}");
}

#[test]
fn built_in_templates_know_how_a_turn_ends() {
    for (name, end) in [("chatml", "<|im_end|>\n"), ("llama3", "<|eot_id|>"), ("plain", "</s>\n")] {
        assert_eq!(ChatTemplate::new(built_in(name), special()).unwrap().end_of_turn().as_deref(), Some(end), "{name}");
    }
}

#[test]
fn templates_that_render_a_message_otherwise_later_are_refused_unless_they_mark_answers() {
    // Thoughts are kept in the last answer only.
    let strips = "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ '<a>' + m.content.split('|')[-1] }}\
                  {% else %}{{ '<' + m.role[0] + '>' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}";
    let talk = [("user", "q"), ("assistant", "hm|1"), ("user", "r"), ("assistant", "hm|2")];
    let error = runs(&talk, Learn::Assistant, strips).unwrap_err();
    assert!(error.contains("messages 1 to 2") && error.contains("{% generation %}"), "{error}");
    assert!(runs(&talk[..2], Learn::Assistant, strips).unwrap().ends_with("<a> [assistant] hm|1"));
    let marked = strips.replace("{{ '<a>' + m.content.split('|')[-1] }}", "<a>{% generation %}{{ m.content.split('|')[-1] }}{% endgeneration %}")
        .replace("{{ '<' + m.role[0] + '>' + m.content }}", "{{ '<' + m.role[0] + '>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}");
    let shown = runs(&talk, Learn::Assistant, &marked).unwrap();
    assert!(shown.contains("<a> [assistant] 1 template: <u> user: r template: <a> [assistant] hm|2"), "{shown}");
}

struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new(lines: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("chats.jsonl"), lines.join("\n")).unwrap();
        Self { dir }
    }

    fn config(&self, more: Value) -> ChatConfig {
        let mut config = json!({ "paths": [self.dir.path().join("chats.jsonl")], "template": "plain" });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(config).unwrap()
    }

    fn read(&self, seq_len: usize, more: Value) -> Result<(Vec<ChatTokens>, Counts), String> {
        read_chats(&self.config(more), &Tokenizer::bytes(), seq_len).map_err(|error| error.to_string())
    }
}

const GOOD: &str = r#"{"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}"#;

#[test]
fn rows_that_cannot_be_used_are_told_by_file_and_line_or_skipped_and_counted() {
    let bad = [
        ("{\"mess", "column"),
        ("[1]", "no object"),
        ("{\"text\": \"x\"}", "no \"messages\" (the row has text)"),
        ("{\"messages\": 3}", "is a number"),
        ("{\"messages\": []}", "no messages"),
        (r#"{"messages": [{"role": "bot", "content": "x"}]}"#, "\"bot\""),
        (r#"{"messages": [{"role": "user"}]}"#, "message 1 has no content"),
        (r#"{"messages": [{"role": "user", "content": "x"}]}"#, "no answer"),
    ];
    for (line, words) in bad {
        let told = World::new(&[GOOD, "", line]).read(100, json!({})).unwrap_err();
        assert!(told.contains("chats.jsonl:3: ") && told.contains(words) && told.contains("on_bad_row"), "{told}");
    }
    let lines: Vec<&str> = bad.iter().map(|(line, _)| *line).chain([GOOD]).collect();
    let (chats, counts) = World::new(&lines).read(100, json!({ "on_bad_row": "skip" })).unwrap();
    assert_eq!((chats.len(), counts), (1, Counts { rows: 9, bad: 8, ..Counts::default() }));
    let told = World::new(&lines).read(100, json!({ "on_bad_row": "skip", "max_bad_rows": 3 })).unwrap_err();
    assert!(told.contains("max_bad_rows (3)") && told.contains("chats.jsonl:4"), "{told}");
}

#[test]
fn what_is_too_long_is_an_error_dropped_or_cut() {
    let world = World::new(&[GOOD]);
    let whole = world.read(100, json!({})).unwrap().0[0].tokens.len();
    let told = world.read(whole - 1, json!({})).unwrap_err();
    assert!(told.contains("chats.jsonl:1") && told.contains("too_long"), "{told}");
    let two = World::new(&[GOOD, &GOOD.replace("\"4\"", "\"4 of course\"")]);
    let (chats, counts) = two.read(whole, json!({ "too_long": "drop" })).unwrap();
    assert_eq!((chats.len(), counts.dropped, counts.truncated), (1, 1, 0));
    let (chats, counts) = two.read(whole, json!({ "too_long": "truncate" })).unwrap();
    assert_eq!((chats.len(), counts.dropped, counts.truncated), (2, 0, 1));
    assert_eq!(chats[1].tokens.len(), whole);
    // What is left of both has nothing to learn.
    let told = two.read(8, json!({ "too_long": "truncate" })).unwrap_err();
    assert!(told.contains("of 2 rows none is left"), "{told}");
}

#[test]
fn other_columns_mean_the_same_conversation() {
    let expected = World::new(&[GOOD]).read(100, json!({})).unwrap().0;
    let sharegpt = r#"{"conversations": [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]}"#;
    let columns = json!({ "columns": { "sharegpt": {} } });
    assert_eq!(World::new(&[sharegpt]).read(100, columns).unwrap().0, expected);
    let columns = json!({ "columns": { "sharegpt": { "messages": "c", "user": "me", "content": "text" } } });
    let renamed = sharegpt.replace("conversations", "c").replace("human", "me").replace("value", "text");
    assert_eq!(World::new(&[&renamed]).read(100, columns).unwrap().0, expected);
    let alpaca = r#"{"instruction": "2+2", "input": "", "output": "4"}"#;
    let columns = json!({ "columns": { "alpaca": {} } });
    assert_eq!(World::new(&[alpaca]).read(100, columns.clone()).unwrap().0, expected);
    let with_input =
        World::new(&[&alpaca.replace("\"input\": \"\"", "\"input\": \"x\"")]).read(100, columns).unwrap().0;
    assert!(Tokenizer::bytes().decode(&with_input[0].tokens).starts_with("User: 2+2\n\nx\nAssistant: 4"));
}

#[test]
fn packed_rows_hold_every_conversation_once_and_predict_across_no_border() {
    let lines: Vec<String> = (0..12).map(|i| GOOD.replace("2+2", &"x".repeat(3 * i))).collect();
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    let (chats, _) = World::new(&lines).read(100, json!({})).unwrap();
    let total: usize = chats.iter().map(|chat| chat.tokens.len()).sum();
    let (chats, all) = (Arc::new(chats), (0..12).collect::<Vec<_>>());
    let loose = ChatRows::new(chats.clone(), all.clone(), (100, false, 257));
    let packed = ChatRows::new(chats.clone(), all, (100, true, 257));
    assert_eq!(loose.per_epoch(), 12);
    assert!(packed.per_epoch() < 9 && packed.padding() < loose.padding());
    for rows in [loose, packed] {
        let (mut tokens, mut learnt) = (0, 0);
        for index in 0..rows.per_epoch() {
            let row = rows.sample(0, index).unwrap();
            let (documents, roles) = (row.documents.unwrap(), row.roles.unwrap());
            assert_eq!([row.tokens.len(), row.targets.len(), documents.len(), roles.len()], [100; 4]);
            for at in 0..100 {
                let real = roles[at] != Role::Padding;
                tokens += usize::from(real);
                assert_eq!(real, row.tokens[at] != 257);
                if row.targets[at] != IGNORE {
                    learnt += 1;
                    assert_eq!(row.targets[at], i64::from(row.tokens[at + 1]));
                    assert_eq!((documents[at], roles[at + 1]), (documents[at + 1], Role::Assistant));
                }
            }
        }
        assert_eq!(tokens, total);
        assert_eq!(learnt, chats.iter().flat_map(|chat| &chat.learnt).filter(|&&learnt| learnt).count());
    }
}

#[test]
fn a_tokenizers_own_template_and_special_tokens_are_found_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let texts = (0..20).map(|i| format!("number {i}"));
    crate::train_bpe(texts, 270, &dir.path().join("tokenizer.json")).unwrap();
    let open = || {
        let path = dir.path().to_owned();
        Tokenizer::open(&crate::TokenizerConfig::Huggingface(crate::HuggingfaceTokenizer { path })).unwrap()
    };
    let told = chat_template("tokenizer", &open()).err().unwrap().to_string();
    assert!(told.contains("\"chatml\""), "{told}");
    let config =
        json!({ "eos_token": { "content": "<|pad|>" }, "bos_token": "<s>", "chat_template": built_in("llama3") });
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let with = open();
    assert_eq!(with.special(), Special { bos: "<s>".into(), eos: "<|pad|>".into(), pad: "<|pad|>".into() });
    assert_ne!(with.fingerprint(), Tokenizer::from_json(with.to_json()).unwrap().fingerprint());
    assert_eq!(chat_template("tokenizer", &with).unwrap().source(), built_in("llama3"));
    let again = Tokenizer::from_json(with.to_json()).unwrap().with_config(&with.config_json()).unwrap();
    assert_eq!((again.special(), again.chat_template()), (with.special(), with.chat_template()));
    std::fs::write(dir.path().join("chat_template.jinja"), built_in("plain")).unwrap();
    assert_eq!(open().chat_template(), Some(built_in("plain")), "the newer place goes first");
    assert!(ChatTemplate::new("{% for %}", special()).err().unwrap().starts_with("line 1: "));
}
