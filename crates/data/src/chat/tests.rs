#![allow(clippy::unwrap_used)]
mod templates;

use std::path::Path;

use polyhead_models::IGNORE;
use serde_json::json;
use std::sync::Arc;

use super::read::{Counts, notes, read_chats};
use super::rows::ChatRows;
use super::template::Given;
use super::*;
use crate::batches::Samples;
use crate::testing::texts;
use crate::texts::Documents;

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
    assert_eq!(rendered.len(), 50);
    for (name, case) in rendered {
        let file = name.split('/').next().unwrap();
        let template = ChatTemplate::new(&golden(&format!("{file}.jinja")), special()).unwrap();
        let messages = case["messages"].as_array().unwrap().clone();
        let tools = Some(case["tools"].clone()).filter(|tools| !tools.is_null());
        let chat = Conversation { messages, tools };
        let ours = template.render(&Given::of(&chat), chat.messages.len(), case["prompt"].as_bool().unwrap());
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

/// The conversation's tokens (bytes) as text, in runs of one role; those that are learned in brackets. One line for each text
/// that is learned from.
fn runs(said: &[(&str, &str)], learn: Learn, source: &str) -> Result<String, String> {
    let tokenizer = Tokenizer::bytes();
    let template = ChatTemplate::new(source, tokenizer.special()).unwrap();
    shown(&chat(said), learn, &template)
}

fn shown(chat: &Conversation, learn: Learn, template: &ChatTemplate) -> Result<String, String> {
    let tokenizer = Tokenizer::bytes();
    let lines = tokenize(chat, learn, template, &tokenizer)?.into_iter().map(|tokens| {
        let (mut out, mut last) = (String::new(), None);
        for ((&id, &role), &learned) in tokens.tokens.iter().zip(&tokens.roles).zip(&tokens.learned) {
            if last != Some((role, learned)) {
                let name = format!("{role:?}").to_lowercase();
                out.push_str(&if learned { format!(" [{name}] ") } else { format!(" {name}: ") });
            }
            last = Some((role, learned));
            out.push_str(&tokenizer.token_text(id));
        }
        out
    });
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

const TALK: [(&str, &str); 5] =
    [("system", "sys"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")];

fn built_in(name: &str) -> &'static str {
    BUILT_IN.iter().find(|(other, _)| *other == name).unwrap().1
}

#[test]
fn answers_are_trained_from_behind_their_header_to_the_end_of_the_turn() {
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
fn answers_that_are_rendered_otherwise_later_are_trained_as_they_are_written() {
    // Thoughts are kept in the last answer only.
    let strips = "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ '<a>' + m.content.split('|')[-1] }}\
                  {% else %}{{ '<' + m.role[0] + '>' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}";
    let talk = [("user", "q"), ("assistant", "hm|1"), ("user", "r"), ("assistant", "hm|2")];
    let several = " template: <u> user: q template: <a> assistant: 1 template: <u> user: r template: <a> [assistant] hm|2\n \
                   template: <u> user: q template: <a> [assistant] hm|1";
    assert_eq!(runs(&talk, Learn::Assistant, strips).unwrap(), several);
    assert_eq!(runs(&talk, Learn::Last, strips).unwrap(), several.lines().next().unwrap());
    assert_eq!(runs(&talk, Learn::All, strips).unwrap().lines().count(), 1);
    // The whole conversation ends with a question: nothing of it is written as it has to be.
    let open = [&talk[..2], &talk[2..3]].concat();
    assert_eq!(runs(&open, Learn::Assistant, strips).unwrap(), several.lines().nth(1).unwrap());
    let marked = strips.replace("{{ '<a>' + m.content.split('|')[-1] }}", "<a>{% generation %}{{ m.content.split('|')[-1] }}{% endgeneration %}")
        .replace("{{ '<' + m.role[0] + '>' + m.content }}", "{{ '<' + m.role[0] + '>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}");
    let shown = runs(&talk, Learn::Assistant, &marked).unwrap();
    assert!(shown.contains("<a> [assistant] 1 template: <u> user: r template: <a> [assistant] hm|2"), "{shown}");
    // An answer that begins otherwise than the template asks for it can be learned in no text.
    let opens = strips.replace("%}<a>{%", "%}<a><think>{%");
    let error = runs(&talk, Learn::Assistant, &opens).unwrap_err();
    assert!(error.contains("message 2") && error.contains("{% generation %}"), "{error}");
    assert_eq!(runs(&talk, Learn::All, &opens).unwrap().lines().count(), 1);
}

#[test]
fn turns_of_a_template_that_thinks_behind_the_last_question_only() {
    let talk = [("user", "q"), ("assistant", "1"), ("user", "1"), ("assistant", "<think>\nhm\n</think>\n\n2")];
    let shown = runs(&talk, Learn::Assistant, &golden("qwen3_like.jinja")).unwrap();
    let lines: Vec<&str> = shown.lines().collect();
    let both = " template: <|im_start|>user\\n user: q template: <|im_end|>\\n<|im_start|>assistant\\n";
    assert_eq!(lines.len(), 2);
    let [earlier, last] = [
        " assistant: 1 template: <|im_end|>\\n<|im_start|>user\\n user: 1 template: ",
        " [assistant] <think>\\nhm\\n</think>\\n\\n2<|im_end|>\\n",
    ];
    assert_eq!(lines[0], format!("{both}{earlier}<|im_end|>\\n<|im_start|>assistant\\n{last}"));
    assert_eq!(lines[1], format!("{both} [assistant] <think>\\n\\n</think>\\n\\n1<|im_end|>\\n"));
    // Between marks a tool's answer would be a question: it belongs to nobody then, and the others to whom they belong.
    let thinks = "<think>hm</think>1";
    let tool = [("user", "q"), ("assistant", thinks), ("user", "<tool_response>t</tool_response>"), ("assistant", "2")];
    let shown = runs(&tool, Learn::Last, &golden("qwen3_like.jinja")).unwrap();
    assert!(shown.contains(" user: q ") && shown.contains(" template: <|im_start|>user\\n<tool_response>t"), "{shown}");
    assert!(shown.contains(" assistant: <think>\\nhm") && shown.ends_with("2<|im_end|>\\n"), "{shown}");
}

#[test]
fn what_one_row_trains_stays_on_one_side() {
    let world = World::new(&[]);
    let row = |i: usize| {
        let said = |role: &str, text: String| json!({ "role": role, "content": text });
        let turn = |k: usize| [said("user", format!("{i} {k}")), said("assistant", format!("{i}{k}"))];
        json!({ "messages": (0..3).flat_map(turn).collect::<Vec<_>>() }).to_string()
    };
    let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/chat_templates/qwen3_like.jinja");
    let config = world.config(json!({ "template": template, "pack": false }));
    let open = |rows: usize| {
        let lines: Vec<String> = (0..rows).map(row).collect();
        std::fs::write(world.dir.path().join("chats.jsonl"), lines.join("\n")).unwrap();
        let options = crate::OpenOptions { validation_fraction: 0.3, ..crate::tests::options(400, 1, 1) };
        crate::DataConfig::Chat(config.clone()).open_tokens(&Tokenizer::bytes(), &options, &mut |_, _| {})
    };
    let opened = open(12).unwrap();
    assert!(
        opened.notes[0].starts_with("12 conversations are split into several samples (36 in all)"),
        "{:?}",
        opened.notes
    );
    assert!(opened.notes[1].contains("<|im_start|>, <|im_end|> are not tokens"), "{:?}", opened.notes);
    let rows = |loader: &crate::Loader| {
        let of = |position| loader.batch(position).unwrap().tokens[..20].to_vec();
        (0..loader.batches_per_epoch()).map(of).collect::<Vec<_>>()
    };
    let (train, held_out) = (rows(&opened.train), rows(&opened.validation));
    assert_eq!(train.len() + held_out.len(), 36);
    assert!(held_out.len() >= 3 && held_out.iter().all(|row| !train.contains(row)));
    assert!(open(1).err().unwrap().to_string().contains("give at least 2"));
    let two = open(2).unwrap();
    assert_eq!([&two.train, &two.validation].map(|loader| loader.batches_per_epoch()), [3, 3]);
}

/// Tokenizers that put a mark before a text have to see it whole.
#[test]
fn a_conversation_has_the_tokens_of_its_whole_text_where_beginnings_are_marked() {
    let metaspace =
        |scheme: &str| json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false });
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let prepend = json!({ "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "▁" }, replace] });
    let cases = [
        (Value::Null, metaspace("first"), true),
        (Value::Null, metaspace("always"), true),
        (prepend, Value::Null, true),
        (Value::Null, metaspace("never"), false),
    ];
    for (normalizer, pre_tokenizer, marks) in cases {
        let mut vocab: BTreeMap<String, usize> = BTreeMap::from([("<s>".into(), 0), ("</s>".into(), 1)]);
        vocab.extend("▁[]qrab".chars().enumerate().map(|(id, sign)| (sign.into(), id + 2)));
        let added = |id: u32, content: &str| {
            json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
        };
        let json = json!({ "version": "1.0", "truncation": null, "padding": null, "post_processor": null, "decoder": null,
            "added_tokens": [added(0, "<s>"), added(1, "</s>")], "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [] } });
        let tokenizer = Tokenizer::from_json(&json.to_string()).unwrap();
        let source = "{{ '<s>' }}{% for m in messages %}{{ m.content + '</s>' if m.role == 'assistant' else '[' + m.content + ']' }}\
                      {% endfor %}";
        let template = ChatTemplate::new(source, special()).unwrap();
        let talk = [("user", "q r"), ("assistant", "a b"), ("user", "r"), ("assistant", "b")];
        let tokens = tokenize(&chat(&talk), Learn::Assistant, &template, &tokenizer).unwrap().remove(0);
        assert_eq!(tokenizer.marks_beginnings(), marks);
        assert_eq!(tokens.tokens, tokenizer.encode("<s>[q r]a b</s>[r]b</s>").unwrap(), "{json}");
        let of = |wanted: &dyn Fn(usize) -> bool| -> String {
            let which = (0..tokens.tokens.len()).filter(|&at| wanted(at));
            which.map(|at| tokenizer.token_text(tokens.tokens[at])).collect()
        };
        assert_eq!(of(&|at| tokens.learned[at]), "a▁b</s>b</s>");
        assert_eq!(of(&|at| tokens.roles[at] == Role::User), "q▁rr");
    }
}

#[test]
fn variables_of_a_template_are_set_and_kept_as_defaults() {
    let tokenizer = Tokenizer::bytes();
    let variables =
        BTreeMap::from([("enable_thinking".into(), json!(false)), ("names".into(), json!({ "a": ["b\n"] }))]);
    let template =
        ChatTemplate::new(&golden("qwen3_like.jinja"), tokenizer.special()).unwrap().with_variables(&variables);
    let talk = [("user", "q"), ("assistant", "1"), ("user", "r"), ("assistant", "2")];
    let text = shown(&chat(&talk), Learn::Assistant, &template).unwrap();
    let [first, second] = text.lines().map(str::to_owned).collect::<Vec<_>>().try_into().unwrap();
    assert!(first.ends_with("assistant\\n<think>\\n\\n</think>\\n\\n [assistant] 2<|im_end|>\\n"), "{first}");
    assert!(second.ends_with("assistant\\n<think>\\n\\n</think>\\n\\n [assistant] 1<|im_end|>\\n"), "{second}");
    // As an export has it: the same, unless whoever renders says otherwise.
    let kept = ChatTemplate::new(template.source(), tokenizer.special()).unwrap();
    let question = [json!({ "role": "user", "content": "q" })];
    assert_eq!(kept.prompt(&question).unwrap(), template.prompt(&question).unwrap());
    assert!(kept.prompt(&question).unwrap().ends_with("</think>\n\n"));
    let thinks = kept.with_variables(&BTreeMap::from([("enable_thinking".into(), json!(true))]));
    assert!(thinks.prompt(&question).unwrap().ends_with("assistant\n"));
    for (name, words) in
        [("messages", "rows and tokenizer"), ("a-b", "not a name in Jinja"), ("1", "not a name in Jinja")]
    {
        let config = json!({ "paths": ["x"], "template_variables": { name: 1 } });
        let config: ChatConfig = serde_json::from_value(config).unwrap();
        assert!(config.validate(0).unwrap_err().problem.contains(words), "{name}");
    }
}

#[test]
fn whose_a_text_is_does_not_depend_on_what_it_says() {
    // The words of the user stand in the template's own system message, and in the names of roles, too.
    let template = "<|system|>You are a helpful assistant.{% for m in messages %}<|{{ m.role }}|>{{ m.content|trim }}{% endfor %}\
                    {% if add_generation_prompt %}<|assistant|>{% endif %}";
    let shown = runs(&[("user", " helpful assistant "), ("assistant", "user")], Learn::Assistant, template).unwrap();
    assert_eq!(
        shown,
        " template: <|system|>You are a helpful assistant.<|user|> user: helpful assistant template: <|assistant|> \
         [assistant] user"
    );
    // A template that looks at what is said renders marks otherwise.
    let looks = template.replace("m.content|trim", "('!' if m.content == 'abcd' else m.content)");
    let shown = runs(&[("system", "abcd"), ("user", "e"), ("assistant", "f")], Learn::Assistant, &looks).unwrap();
    assert!(
        shown.contains("<|system|> system: ! template: <|user|> user: e template: <|assistant|> [assistant] f"),
        "{shown}"
    );
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

const TOOLS: &str = r#"{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": null}], "tools": TOOLS}"#;

#[test]
fn rows_that_cannot_be_used_are_told_by_file_and_line_or_skipped_and_counted() {
    let bad = [
        ("{\"mess", "column"),
        ("[1]", "not an object"),
        ("{\"text\": \"x\"}", "no \"messages\" (the row has text)"),
        ("{\"messages\": 3}", "is a number"),
        ("{\"messages\": []}", "no messages"),
        (r#"{"messages": [{"role": "bot", "content": "x"}]}"#, "\"bot\""),
        (r#"{"messages": [{"role": "user"}]}"#, "message 1 has no content"),
        (r#"{"messages": [{"role": "user", "content": "x"}]}"#, "no answer"),
        (r#"{"messages": [{"role": "assistant", "content": null, "tool_calls": null}]}"#, "message 1 has no content"),
        (r#"{"messages": [{"role": "user", "content": [{"type": "image"}]}]}"#, "a part that is \"image\""),
        (r#"{"messages": [{"role": "user", "content": [3]}]}"#, "a part that is a number"),
        (&TOOLS.replace("TOOLS", "\"[{\""), "\"tools\" is a text that is not valid JSON"),
        (&TOOLS.replace("TOOLS", "3"), "\"tools\" is a number"),
        (&TOOLS.replace("TOOLS", "[3]"), "\"tools\" is a list that holds a number"),
        (&TOOLS.replace("TOOLS", "[{}]"), "it has tools, of which the template writes nothing\n  hint: use a template"),
        (&TOOLS.replace("TOOLS", "[]").replace("null", "[{}]"), "message 2 calls tools, of which"),
        (&TOOLS.replace("TOOLS", "[]").replace("null", "\"{}\""), "\"tool_calls\" of message 2 is an object"),
        (
            &GOOD.replace("{\"messages", "{\"system\": \"s\", \"messages").replace("user", "system"),
            "two system messages",
        ),
        (&GOOD.replace("{\"messages", "{\"system\": 3, \"messages"), "\"system\" is a number"),
    ];
    for (line, words) in bad {
        let error = World::new(&[GOOD, "", line]).read(100, json!({})).unwrap_err();
        assert!(error.contains("chats.jsonl:3: ") && error.contains(words) && error.contains("on_bad_row"), "{error}");
    }
    let lines: Vec<&str> = bad.iter().map(|(line, _)| *line).chain([GOOD]).collect();
    let (chats, counts) = World::new(&lines).read(100, json!({ "on_bad_row": "skip" })).unwrap();
    assert_eq!((chats.len(), counts), (1, Counts { rows: bad.len() + 1, bad: bad.len(), ..Counts::default() }));
    let error = World::new(&lines).read(100, json!({ "on_bad_row": "skip", "max_bad_rows": 3 })).unwrap_err();
    assert!(error.contains("max_bad_rows (3)") && error.contains("chats.jsonl:4"), "{error}");
}

#[test]
fn what_is_too_long_is_an_error_dropped_or_cut() {
    let world = World::new(&[GOOD]);
    let whole = world.read(100, json!({})).unwrap().0[0].tokens.len();
    let error = world.read(whole - 1, json!({})).unwrap_err();
    assert!(error.contains("chats.jsonl:1") && error.contains("too_long"), "{error}");
    let two = World::new(&[GOOD, &GOOD.replace("\"4\"", "\"4 of course\"")]);
    let (chats, counts) = two.read(whole, json!({ "too_long": "drop" })).unwrap();
    assert_eq!((chats.len(), counts.dropped, counts.truncated), (1, 1, 0));
    let (chats, counts) = two.read(whole, json!({ "too_long": "truncate" })).unwrap();
    assert_eq!((chats.len(), counts.dropped, counts.truncated), (2, 0, 1));
    assert_eq!(chats[1].tokens.len(), whole);
    // What is left of both has nothing to learn.
    let error = two.read(8, json!({ "too_long": "truncate" })).unwrap_err();
    assert!(error.contains("of 2 rows none is left"), "{error}");
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
fn tools_may_be_json_in_a_text_and_several_names_one_role() {
    let template = ChatTemplate::new(&golden("qwen2_like.jinja"), special()).unwrap();
    let tool = json!({ "type": "function", "function": { "name": "weather" } });
    let call = json!({ "function": { "name": "weather", "arguments": { "city": "Bern" } } });
    let messages = |calls: Value| json!([{ "role": "user", "content": "?" }, { "role": "assistant", "content": "", "tool_calls": calls }]);
    let read = |row: Value, columns: Value| {
        let columns: ColumnsConfig = serde_json::from_value(columns).unwrap();
        shown(&columns.read(&row)?, Learn::Assistant, &template)
    };
    let plain = json!({ "messages": {} });
    let row = json!({ "messages": messages(json!([call])), "tools": [tool] });
    let expected = read(row, plain.clone()).unwrap();
    assert!(
        expected.contains(r#" [assistant] <tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\""#),
        "{expected}"
    );
    let texts = json!({ "messages": messages(json!([call]).to_string().into()), "tools": json!([tool.to_string()]).to_string() });
    assert_eq!(read(texts, plain.clone()).unwrap(), expected);
    // Nothing of tools without tools; a system message of a column of its own goes first.
    let row = json!({ "messages": [{ "role": "user", "content": "?" }, { "role": "assistant", "content": "!" }], "tools": "[]",
        "system": "sys" });
    let expected = read(row, plain).unwrap();
    assert!(expected.starts_with(" template: <|im_start|>system\\n system: sys template: <|im_end|>"), "{expected}");
    let talk = json!([{ "from": "human", "value": "?" }, { "from": "gpt", "value": "!" }]);
    let row = |system: Value| json!({ "conversations": talk, "system": system, "tools": null });
    assert_eq!(read(row("sys".into()), json!({ "sharegpt": {} })).unwrap(), expected);
    assert!(read(row(3.into()), json!({ "sharegpt": {} })).unwrap_err().contains("\"system\" is a number"));
    let row = json!({ "conversations": talk, "tools": [tool] });
    assert!(read(row, json!({ "sharegpt": {} })).unwrap().contains("# Tools"));

    let calls = json!({ "conversations": [{ "from": "human", "value": "?" }, { "from": "function_call", "value": "call" },
        { "from": "observation", "value": "3" }, { "from": "gpt", "value": "!" }] });
    let error = read(calls.clone(), json!({ "sharegpt": {} })).unwrap_err();
    assert!(
        error.contains("the role \"function_call\" is unknown") && error.contains("[\"gpt\", \"function_call\"]"),
        "{error}"
    );
    let names = json!({ "sharegpt": { "assistant": ["gpt", "function_call"], "tool": "observation" } });
    let shown = read(calls, names).unwrap();
    assert!(
        shown.contains("[assistant] call") && shown.contains("tool: 3") && shown.contains("[assistant] !"),
        "{shown}"
    );
}

#[test]
fn parts_are_one_text_unless_the_template_writes_parts() {
    let parts = json!([{ "type": "text", "text": "2" }, "+2"]);
    let row = GOOD.replace("\"2+2\"", &parts.to_string());
    let expected = World::new(&[GOOD]).read(100, json!({})).unwrap().0;
    assert_eq!(World::new(&[&row]).read(100, json!({})).unwrap().0, expected);
    let of_parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }};{% endfor %}{% endfor %}";
    let template = ChatTemplate::new(of_parts, special()).unwrap();
    let parts = |text: &str| json!([{ "type": "text", "text": text }]);
    let messages = vec![
        json!({ "role": "user", "content": [{ "text": "ab" }, { "text": "cd" }] }),
        json!({ "role": "assistant", "content": parts("e") }),
    ];
    let said = Conversation { messages, tools: None };
    assert_eq!(
        shown(&said, Learn::Assistant, &template).unwrap(),
        " user: ab template: ; user: cd template: ; [assistant] e;"
    );
}

#[test]
fn a_byte_order_mark_is_skipped_and_templates_that_are_none_are_named() {
    let marked = format!("\u{FEFF}{GOOD}");
    let expected = World::new(&[GOOD]).read(100, json!({})).unwrap().0;
    assert_eq!(World::new(&[&marked]).read(100, json!({})).unwrap().0, expected);
    let error = World::new(&[GOOD]).read(100, json!({ "template": "nope" })).unwrap_err();
    assert!(error.contains("data.chat.template \"nope\": No such file"), "{error}");
    assert!(
        ["\"tokenizer\"", "\"chatml\"", "\"llama3\"", "\"plain\""].iter().all(|name| error.contains(name)),
        "{error}"
    );
    let world = World::new(&[GOOD]);
    let file = world.dir.path().join("broken.jinja");
    std::fs::write(&file, "{% for m in messages %}\n{{ m.content + 3 }}{% endfor %}").unwrap();
    let error = world.read(100, json!({ "template": file })).unwrap_err();
    assert!(error.contains("chats.jsonl:1: line 2 of the chat template: tried to use +"), "{error}");
}

#[test]
fn only_a_token_of_its_own_ends_an_answer() {
    let end = |name: &str, tokenizer: &Tokenizer| {
        let template = chat_template("data.chat.template", name, tokenizer).unwrap();
        let end = end_of_answer(&template, tokenizer).unwrap();
        (end, note(&template, tokenizer, "data.chat.template", name).unwrap())
    };
    let bytes = Tokenizer::bytes();
    assert_eq!(end("plain", &bytes), (Some(256), None));
    let (stop, note) = end("chatml", &bytes);
    assert_eq!(stop, None, "no byte ends an answer");
    let note = note.unwrap();
    assert!(note.starts_with("data.chat.template \"chatml\": <|im_start|>, <|im_end|> are not tokens"), "{note}");
    assert!(note.contains("generation does not stop") && note.contains("\"plain\" needs no markers"), "{note}");
    assert!(end("llama3", &bytes).1.unwrap().contains("<|start_header_id|>, <|end_header_id|>, <|eot_id|> are"));

    let added = |id: u32, content: &str, special: bool| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": special })
    };
    let mut with: Value = serde_json::from_str(bytes.to_json()).unwrap();
    let all = [added(258, "<|im_start|>", true), added(259, "<|im_end|>", false)];
    with["added_tokens"].as_array_mut().unwrap().extend(all);
    let with = Tokenizer::from_json(&with.to_string()).unwrap();
    assert_eq!(end("chatml", &with), (Some(259), None));

    // Words: what is not known is one token, too, and no end; an ordinary token that is all of the marker is one.
    let words = |end: &str| {
        let vocab = json!({ "[UNK]": 0, "assistant": 1, end: 2 });
        let json = json!({ "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added(0, "[UNK]", true)],
            "normalizer": null, "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]" } });
        Tokenizer::from_json(&json.to_string()).unwrap()
    };
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "{% for m in messages %}{{ m.content }} <end>\n{% endfor %}").unwrap();
    let name = file.path().to_str().unwrap();
    assert_eq!(end(name, &words("<end>")), (Some(2), None));
    assert_eq!(end(name, &words("<fin>")).0, None);
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
        let (mut tokens, mut learned) = (0, 0);
        for index in 0..rows.per_epoch() {
            let row = rows.sample(0, index).unwrap();
            let (documents, roles) = (row.documents.unwrap(), row.roles.unwrap());
            assert_eq!([row.tokens.len(), row.targets.len(), documents.len(), roles.len()], [100; 4]);
            for at in 0..100 {
                let real = roles[at] != Role::Padding;
                tokens += usize::from(real);
                assert_eq!(real, row.tokens[at] != 257);
                if row.targets[at] != IGNORE {
                    learned += 1;
                    assert_eq!(row.targets[at], i64::from(row.tokens[at + 1]));
                    assert_eq!((documents[at], roles[at + 1]), (documents[at + 1], Role::Assistant));
                }
            }
        }
        assert_eq!(tokens, total);
        assert_eq!(learned, chats.iter().flat_map(|chat| &chat.learned).filter(|&&learned| learned).count());
    }
}

#[test]
fn a_tokenizers_own_template_and_special_tokens_are_found_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let numbers = Documents::described("numbers", texts((0..20).map(|i| format!("number {i}"))));
    crate::train_bpe(&numbers, 270, &dir.path().join("tokenizer.json")).unwrap();
    let open = || {
        let path = dir.path().to_owned();
        Tokenizer::open(&crate::TokenizerConfig::Huggingface(crate::HuggingfaceTokenizer { path })).unwrap()
    };
    let error = chat_template("data.chat.template", "tokenizer", &open()).err().unwrap().to_string();
    assert!(error.contains("\"chatml\""), "{error}");
    let config = json!({
        "eos_token": { "content": "<|pad|>" }, "bos_token": "<s>", "pad_token": "<|endoftext|>",
        "chat_template": built_in("llama3"),
    });
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let with = open();
    assert_eq!(with.special(), Special { bos: "<s>".into(), eos: "<|pad|>".into(), pad: "<|endoftext|>".into() });
    assert_ne!(with.fingerprint(), Tokenizer::from_json(with.to_json()).unwrap().fingerprint());
    assert_eq!(chat_template("data.chat.template", "tokenizer", &with).unwrap().source(), built_in("llama3"));
    let again = Tokenizer::from_json(with.to_json()).unwrap().with_config(&with.config_json()).unwrap();
    assert_eq!((again.special(), again.chat_template()), (with.special(), with.chat_template()));
    std::fs::write(dir.path().join("chat_template.jinja"), built_in("plain")).unwrap();
    assert_eq!(open().chat_template(), Some(built_in("plain")), "the newer place goes first");
    assert!(ChatTemplate::new("{% for %}", special()).err().unwrap().starts_with("line 1 of the chat template: "));
}
