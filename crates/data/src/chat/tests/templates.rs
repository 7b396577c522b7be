//! Templates as under transformers, within limits; what rows say besides what is said in them; long conversations.

use super::*;
use crate::testing::gzip;

/// Templates that we render otherwise than Jinja2, which refuses those that have no text here: iterators that are shown as lists,
/// and loops over nothing.
const OTHERWISE: [&str; 14] = [
    "{% for z in n %}<{{ z }}>{% endfor %}",
    "{% for a in n %}x{% endfor %}ok",
    "{{ nan == nan }}",
    "{{ small is lower }}",
    "{{ inf is lower }}",
    "{{ d.items() }}",
    "{{ d.keys() }}",
    "{{ d.values() }}",
    "{{ rows | groupby('v') }}",
    "{{ none < 1 }}",
    "{{ range(3) }}",
    "{{ d | attr('k') }}",
    "{{ i.real }}",
    "{{ loop is defined }}{{ self is defined }}",
];
/// What we refuse with words, as MiniJinja has no such thing.
const REFUSED: usize = 30;

#[test]
fn jinja_is_that_of_transformers() {
    let all = numbers::parse(golden("snippets.json").as_bytes()).unwrap();
    let given = numbers::value(&all["given"]);
    let (mut otherwise, mut refused) = (Vec::new(), Vec::new());
    for case in all["cases"].as_array().unwrap() {
        let source = case[0].as_str().unwrap();
        let rendered = template::rendered_with(source, given.clone());
        match (rendered, case[1].as_str()) {
            (Ok(ours), Some(theirs)) if ours == theirs => {}
            (Err(_), None) => {}
            (Err(problem), Some(_)) => refused.push(format!("{source}: {problem}")),
            // Iterators are JSON to us.
            (Ok(_), None) if source.contains("tojson") => {}
            (Ok(ours), theirs) if OTHERWISE.contains(&source) => assert_ne!(Some(ours.as_str()), theirs, "{source}"),
            (Ok(ours), theirs) => otherwise.push(format!("{source}: {ours:?}, and {theirs:?} under transformers")),
        }
    }
    assert!(otherwise.is_empty(), "{}", otherwise.join("\n"));
    assert!(refused.len() <= REFUSED, "{}: {}", refused.len(), refused.join("\n"));
}

#[test]
fn templates_are_bounded_and_errors_name_them() {
    let world = World::new(&[GOOD]);
    let file = world.dir.path().join("t.jinja");
    let refusal = |source: &str| {
        std::fs::write(&file, source).unwrap();
        world.read(100, json!({ "template": file })).unwrap_err()
    };
    let loops = "{% for i in range(10000) %}{% for j in range(10000) %}{% for k in range(10000) %}{% endfor %}{% endfor %}{% endfor %}";
    let growing = |value: &str| {
        format!(
            "{{% set ns = namespace(x=[1]) %}}{{% for i in range(99999) %}}{{% set ns.x = {value} %}}{{% endfor %}}{{{{ ns.x }}}}"
        )
    };
    for (source, words) in [
        (format!("{{{{ 1{} }}}}", "+1".repeat(20_000)), "20000 operators"),
        (format!("{{{{ {}1 }}}}", "not ".repeat(20_000)), "20000 operators"),
        (format!("{{{{ {}1{} }}}}", "(".repeat(20_000), ")".repeat(20_000)), "20000 operators"),
        (format!("{{{{ 1{} }}}}", "|int".repeat(20_000)), "20000 operators"),
        (format!("{{{{ {}1{} }}}}", "[".repeat(300), "]".repeat(300)), "recursion"),
        (loops.to_owned(), "more steps"),
        (growing("[ns.x]"), "steps"),
        (growing("[ns.x, ns.x]"), "million parts"),
        (growing("ns.x + ns.x"), "more"),
        (growing("ns.x ~ ns.x"), "more steps"),
        ("{{ '{:>20000000000}'.format('a') }}".to_owned(), "a width of 20000000000"),
        ("{{ '%20000000000s' | format('a') }}".to_owned(), "more steps"),
        ("{{ 'a'.center(20000000000) }}".to_owned(), "a width of 20000000000"),
        ("{{ 'a' * 20000000000 }}".to_owned(), "more steps"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".to_owned(), "recursion"),
        ("{{ messages | tojson(skip=1) }}".to_owned(), "no argument skip: it has ensure_ascii, indent"),
    ] {
        let problem = refusal(&source);
        assert!(problem.contains(words) && problem.contains("t.jinja"), "{words}: {problem}");
    }
    for (source, words) in [
        ("{% for m in message %}{{ m.content }}{% endfor %}", "writes nothing of it"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.contents }}{% endfor %}", "nothing of what the assistant says"),
    ] {
        let problem = refusal(source);
        assert!(problem.contains(words) && problem.contains("t.jinja"), "{problem}");
    }
}

#[test]
fn line_ends_of_templates_are_one() {
    let text = "{% for m in messages %}\n<{{ m.role }}>\n{{ m.content }}\n{% endfor %}";
    let talk = [("user", "a\r\nb"), ("assistant", "c")];
    let expected = runs(&talk, Learn::All, text).unwrap();
    assert!(expected.contains("a\\r\\nb"), "{expected}");
    for other in [text.replace('\n', "\r\n"), text.replace('\n', "\r"), format!("\u{FEFF}{text}")] {
        assert_eq!(runs(&talk, Learn::All, &other).unwrap(), expected);
    }
}

#[test]
fn today_is_a_fixed_day() {
    let world = World::new(&[GOOD]);
    let file = world.dir.path().join("t.jinja");
    let text = |source: &str, more: Value| {
        std::fs::write(&file, source).unwrap();
        let mut config = json!({ "template": file });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let config = world.config(config);
        let (chats, counts) = read_chats(&config, &Tokenizer::bytes(), 400).unwrap();
        let template = config.template(&Tokenizer::bytes()).unwrap();
        let error = notes(&config, &counts, &template).join("; ");
        // Whoever uses the model is error the same day.
        let again = ChatTemplate::new(template.source(), special()).unwrap();
        assert_eq!(again.prompt(&[]).unwrap(), template.prompt(&[]).unwrap());
        (Tokenizer::bytes().decode(&chats[0].tokens), error)
    };
    let rest = "{% for m in messages %}{{ m.content }}{% endfor %}";
    let asks = format!("{{{{ strftime_now('%d %b %Y') }}}}|{rest}");
    let (shown, error) = text(&asks, json!({}));
    assert!(
        shown.starts_with("01 Jan 2025|") && error.contains("strftime_now") && error.contains("data.chat.date"),
        "{shown} {error}"
    );
    let (shown, error) = text(&asks, json!({ "date": "2024-02-29" }));
    assert!(shown.starts_with("29 Feb 2024|") && error.is_empty(), "{shown} {error}");
    let careful =
        format!("{{% if strftime_now is defined %}}{{{{ strftime_now('%Y') }}}}{{% else %}}mine{{% endif %}}|{rest}");
    assert!(text(&careful, json!({})).0.starts_with("mine|"));
    assert!(text(&careful, json!({ "date": "2024-02-29" })).0.starts_with("2024|"));
    let config: ChatConfig = serde_json::from_value(json!({ "paths": ["x"], "date": "2025-02-30" })).unwrap();
    assert!(config.validate(0).unwrap_err().problem.contains("2025-02-30"));
}

#[test]
fn arguments_that_are_a_text_are_counted_or_decoded() {
    let row = |arguments: &str| {
        json!({ "messages": [{ "role": "user", "content": "?" }, { "role": "assistant", "content": null, "tool_calls": [
            { "id": null, "function": { "name": "f", "arguments": arguments } }] }] })
        .to_string()
    };
    let template = "{% for m in messages %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ 'id' in c }}{{ c.function.name }}\
                    {{ c.function.arguments | tojson }}{% endfor %}{% endfor %}";
    let text = |arguments: &str, more: Value| {
        let world = World::new(&[&row(arguments)]);
        let file = world.dir.path().join("t.jinja");
        std::fs::write(&file, template).unwrap();
        let mut config = json!({ "template": file });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (chats, counts) = world.read(400, config)?;
        Ok::<_, String>((Tokenizer::bytes().decode(&chats[0].tokens), counts.arguments))
    };
    let arguments = r#"{"n": 12345678901234567890123, "x": 1e-7, "none": null}"#;
    let decoded = (format!("?Falsef{}", arguments.replace("1e-7", "1e-07")), 1);
    assert_eq!(text(arguments, json!({ "decode_arguments": true })).unwrap(), decoded);
    assert_eq!(text("{\"a\": 1}", json!({})).unwrap(), (r#"?Falsef"{\"a\": 1}""#.to_owned(), 1));
    assert!(text("[1", json!({ "decode_arguments": true })).unwrap_err().contains("message 2 has arguments that are"));
}

#[test]
fn loss_weights_of_messages_are_obeyed() {
    let talk = |first: Value, second: Value| {
        let mut messages = vec![
            json!({ "role": "user", "content": "q" }),
            json!({ "role": "assistant", "content": "wrong" }),
            json!({ "role": "user", "content": "no" }),
            json!({ "role": "assistant", "content": "right" }),
        ];
        for (at, more) in [(1, first), (3, second)] {
            messages[at].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        }
        json!({ "messages": messages }).to_string()
    };
    let learned = |row: &str, more: Value| {
        let (chats, counts) = World::new(&[row, GOOD]).read(200, more)?;
        let of = |chat: &ChatTokens| {
            let ids = chat.tokens.iter().zip(&chat.learned).filter(|(_, learned)| **learned).map(|(&id, _)| id);
            Tokenizer::bytes().decode(&ids.collect::<Vec<_>>()).trim().to_owned()
        };
        Ok::<_, String>((chats.iter().map(of).collect::<Vec<_>>(), counts.untrained, counts.weightless))
    };
    for no in [
        json!({ "weight": 0 }),
        json!({ "weight": 0.0 }),
        json!({ "train": false }),
        json!({ "training": false, "loss": false }),
    ] {
        let row = talk(no.clone(), json!({ "weight": 1 }));
        assert_eq!(learned(&row, json!({})).unwrap(), (vec!["right".into(), "4".into()], 1, 0), "{no}");
        let all = learned(&row, json!({ "learn": "all" })).unwrap().0;
        assert!(all[0].contains("User: no") && !all[0].contains("wrong"), "{all:?}");
        let both = talk(no.clone(), no.clone());
        assert_eq!(learned(&both, json!({})).unwrap(), (vec!["4".into()], 2, 1));
    }
    for (more, words) in [
        (json!({ "weight": 0.5 }), "message 2 has weight = 0.5, where 0"),
        (json!({ "weight": "0" }), "message 2 has weight = \"0\""),
        (json!({ "weight": 0, "train": true }), "weight says false and train says true"),
        (json!({ "train_detail": [] }), "train_detail"),
    ] {
        let problem = learned(&talk(more, json!({})), json!({})).unwrap_err();
        assert!(problem.contains(words) && problem.contains("chats.jsonl:1"), "{problem}");
    }
    let shared = r#"{"conversations": [{"from": "human", "value": "q", "train": true}, {"from": "gpt", "value": "a", "weight": 0},
        {"from": "human", "value": "r"}, {"from": "gpt", "value": "b"}]}"#.replace('\n', "");
    let (chats, counts) = World::new(&[&shared]).read(200, json!({ "columns": { "sharegpt": {} } })).unwrap();
    assert_eq!((counts.untrained, counts.asked_in_vain), (1, 1));
    assert_eq!(chats[0].learned.iter().filter(|&&learned| learned).count(), " b\n".len() + 1);
    // Marked answers, too; one whose place is not known is refused.
    let marked = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}|{{ m.content }}|{% endif %}{% endfor %}";
    let world = World::new(&[&talk(json!({ "weight": 0 }), json!({}))]);
    let file = world.dir.path().join("t.jinja");
    std::fs::write(&file, marked).unwrap();
    let (chats, _) = world.read(200, json!({ "template": file })).unwrap();
    assert_eq!(chats[0].learned.iter().filter(|&&learned| learned).count(), "right".len());
}

#[test]
fn long_conversations_are_as_short_ones_are() {
    // Long enough that not every answer is rendered by itself; each form against rendering every beginning.
    let said = |i: usize| match i % 7 {
        0 => format!("question {i}"),
        1 => format!("  spaces {i} \n"),
        2 => format!("<b>{i}</b>"),
        3 => "same".to_owned(),
        _ => format!("line {i}\nline"),
    };
    let message =
        |i: usize| json!({ "role": if i.is_multiple_of(2) { "user" } else { "assistant" }, "content": said(i) });
    let messages: Vec<Value> = (0..120).map(message).collect();
    let chat = Conversation { messages, tools: None };
    let given = Given::of(&chat);
    let numbered = "{% for m in messages %}[{{ loop.index }}]{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}\
                    [{{ messages | length + 1 }}]assistant: {% endif %}";
    let thinks = "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content | trim }}\
                  <|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}";
    let qwen = golden("qwen3_like.jinja");
    for source in [built_in("chatml"), built_in("llama3"), built_in("plain"), numbered, thinks, &qwen] {
        let template = ChatTemplate::new(source, special()).unwrap();
        let whole = template.render(&given, 120, false).unwrap().text;
        let all: Vec<usize> = (0..120).collect();
        let spans = || -> BTreeMap<usize, std::ops::Range<usize>> {
            message_spans::message_spans((&chat, &given), (&whole, 120), &all, &template)
                .into_iter()
                .map(|(range, at)| (at, range))
                .collect()
        };
        let turns = turns::turns((&chat, &given), &whole, &template, &spans).unwrap();
        assert_eq!(turns.len(), 60);
        for turn in turns {
            let upto = template.render(&given, turn.index + 1, false).unwrap().text;
            let before = template.render(&given, turn.index, true).unwrap().text;
            assert_eq!(format!("{}{}", &whole[..turn.shared], turn.tail), upto, "{}", turn.index);
            assert_eq!(turn.start, before.len(), "{}", turn.index);
        }
    }
    // Of those that are too long only what is short is kept, with and without a way to know beforehand.
    let row = json!({ "messages": chat.messages }).to_string();
    let world = World::new(&[&row, GOOD]);
    let (chats, counts) = world.read(200, json!({ "too_long": "drop" })).unwrap();
    assert_eq!((chats.len(), counts.dropped), (1, 1));
    let file = world.dir.path().join("t.jinja");
    std::fs::write(&file, thinks).unwrap();
    let (chats, counts) = world.read(300, json!({ "template": file, "too_long": "drop" })).unwrap();
    assert!(chats.len() > 3 && chats.len() + counts.dropped == 61, "{} {counts:?}", chats.len());
    assert!(chats.iter().all(|chat| chat.tokens.len() <= 300 && chat.learned.contains(&true)));
}

#[test]
fn files_of_other_kinds_are_named() {
    let world = World::new(&[GOOD]);
    let path = world.dir.path().join("chats.jsonl");
    let expected = world.read(100, json!({})).unwrap().0;
    let utf16 = |mark: &str| -> Vec<u8> { format!("{mark}{GOOD}").encode_utf16().flat_map(u16::to_le_bytes).collect() };
    for (bytes, words) in [
        (utf16("\u{FEFF}"), "UTF-16"),
        (utf16(""), "UTF-16"),
        (b"PAR1....".to_vec(), "Parquet"),
        (b"\x28\xB5\x2F\xFD....".to_vec(), "cannot be unpacked"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = world.read(100, json!({})).unwrap_err();
        assert!(error.contains(words) && error.contains("chats.jsonl"), "{error}");
    }
    std::fs::write(&path, gzip(GOOD)).unwrap();
    assert_eq!(world.read(100, json!({})).unwrap().0, expected);
    std::fs::write(&path, gzip(vec![b' '; 80 << 20])).unwrap();
    assert!(world.read(100, json!({})).unwrap_err().contains("unpacks to more than 100 times"));
}

#[test]
fn a_template_that_needs_a_package_or_another_file_is_refused_with_the_way_out() {
    let world = World::new(&[GOOD]);
    let file = world.dir.path().join("t.jinja");
    for source in [
        "{% import 'mistral_common' as tools %}{{ tools.render(messages) }}",
        "{% from 'macros.jinja' import turn %}{{ turn(messages) }}",
        "{% include 'other.jinja' %}",
        "{% extends 'base.jinja' %}",
    ] {
        std::fs::write(&file, format!("{{{{ bos_token }}}}\n{source}")).unwrap();
        let error = world.read(100, json!({ "template": file })).unwrap_err();
        let way_out = "a template is one file, and has no packages: write into it what it takes from elsewhere";
        assert!(error.contains("t.jinja") && error.contains("line 2") && error.contains(way_out), "{source}: {error}");
    }
    // A function that only a package gives is named with the line, too.
    std::fs::write(&file, "{{ mistral_common.render(messages) }}").unwrap();
    let error = world.read(100, json!({ "template": file })).unwrap_err();
    assert!(error.contains("line 1 of the chat template") && error.contains("no method named render"), "{error}");
}

#[test]
fn null_keys_are_absent() {
    let row = r#"{"messages": [{"role": "user", "content": "2+2", "tool_calls": null, "name": null},
        {"role": "assistant", "content": "4", "tool_calls": null, "weight": null}], "tools": null, "system": null}"#
        .replace('\n', "");
    let world = World::new(&[&row]);
    let file = world.dir.path().join("t.jinja");
    let strict = "{% for m in messages %}{% if 'tool_calls' in m or m.name is defined %}{{ raise_exception('null') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}";
    std::fs::write(&file, strict).unwrap();
    let config = json!({ "template": file });
    let plain = World::new(&[GOOD]);
    assert_eq!(world.read(100, config.clone()).unwrap().0, plain.read(100, config).unwrap().0);
    let shared = r#"{"conversations": [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": null}]}"#;
    let error = World::new(&[shared]).read(100, json!({ "columns": { "sharegpt": {} } })).unwrap_err();
    assert!(error.contains("chats.jsonl:1: a message has no text in \"value\""), "{error}");
}
