//! Tokenizers of all kinds: what their tokens stand for, what they put around texts, and what is refused.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;
use crate::testing::texts;
use crate::texts::Documents;

const TEXT: &str = "Hello, wörld! 🦀 naïve\n\ttabs \u{7f} end";

/// A tokenizer.json around a model.
fn around(model: Value, more: Value) -> String {
    let mut json = json!({ "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null, "model": model });
    for (key, value) in more.as_object().unwrap() {
        json[key] = value.clone();
    }
    json.to_string()
}

fn vocab(tokens: &[&str]) -> Value {
    tokens
        .iter()
        .enumerate()
        .map(|(id, token)| ((*token).to_owned(), json!(id)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn letters(more: &[&str]) -> Value {
    let letters: Vec<String> = ('a'..='z').map(String::from).collect();
    vocab(&letters.iter().map(String::as_str).chain(more.iter().copied()).collect::<Vec<_>>())
}

fn special(id: u32, content: &str) -> Value {
    json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true })
}

/// What the tokens of a text add up to, by the table that fits it; `None` where none does.
fn sum(json: &str, text: &str) -> Option<u64> {
    let tokenizer = Tokenizer::from_json(json).unwrap();
    let table = tokenizer.token_bytes_of(std::iter::once(text)).0?;
    Some(tokenizer.encode(text).unwrap().into_iter().map(|id| u64::from(table[id as usize])).sum())
}

#[test]
fn tokens_add_up_to_texts_where_that_can_be_known() {
    let lower = "the naive quick fox jumps over the lazy dog again and again and again ".repeat(20);
    let lower = lower.trim();
    // Bytes as GPT-2 spells them.
    let bytes: Value = serde_json::from_str(&bytes_json()).unwrap();
    assert_eq!(sum(&bytes.to_string(), TEXT), Some(TEXT.len() as u64));
    let mut shortened = bytes.clone();
    // A normalizer that changes lengths: tokens say nothing of what the text was.
    shortened["normalizer"] = json!({ "type": "Replace", "pattern": { "String": "again" }, "content": "a" });
    assert_eq!(sum(&shortened.to_string(), lower), None);
    shortened["normalizer"] = json!({ "type": "NFC" });
    assert_eq!(sum(&shortened.to_string(), TEXT), Some(TEXT.len() as u64));

    // Llama's: a mark for spaces, one put in front, bytes for what has no token.
    let fallback: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let mut tokens: Vec<&str> = fallback.iter().map(String::as_str).collect();
    tokens.extend(["\u{2581}", "a", "b", "\u{2581}a", "é"]);
    let merges = json!([["\u{2581}", "a"]]);
    let model =
        json!({ "type": "BPE", "vocab": vocab(&tokens), "merges": merges, "byte_fallback": true, "fuse_unk": true });
    let llama = around(
        model.clone(),
        json!({ "normalizer": { "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "\u{2581}" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" }] } }),
    );
    // The mark in front is one byte too many, as of every text.
    assert_eq!(sum(&llama, "a ba  é 🦀\n"), Some("a ba  é 🦀\n".len() as u64 + 1));
    for mark in ["\u{2581}", "_"] {
        let metaspace = json!({ "type": "Metaspace", "replacement": mark, "prepend_scheme": "never", "split": false });
        let model: Value = serde_json::from_str(&model.to_string().replace('\u{2581}', mark)).unwrap();
        assert_eq!(sum(&around(model, json!({ "pre_tokenizer": metaspace })), "a b a é"), Some("a b a é".len() as u64));
    }

    // Word ends: the space between words is in no token. Where texts are words with single spaces, each word has one.
    let ends: Vec<String> = ('a'..='z').map(|letter| format!("{letter}</w>")).collect();
    let model = json!({ "type": "BPE", "vocab": letters(&ends.iter().map(String::as_str).collect::<Vec<_>>()), "merges": [],
        "end_of_word_suffix": "</w>" });
    let more =
        |pre: &str| json!({ "pre_tokenizer": { "type": pre }, "decoder": { "type": "BPEDecoder", "suffix": "</w>" } });
    assert_eq!(sum(&around(model.clone(), more("WhitespaceSplit")), lower), Some(lower.len() as u64 + 1));
    let spaced = lower.replace(' ', "   ");
    assert_eq!(sum(&around(model, more("WhitespaceSplit")), &spaced), None, "how many spaces there were is lost");

    // WordPiece: the same, by a mark in front of what goes on.
    let pieces: Vec<String> = ('a'..='z').map(|letter| format!("##{letter}")).collect();
    let vocab = letters(&[&pieces.iter().map(String::as_str).collect::<Vec<_>>()[..], &["[UNK]"]].concat());
    let model = json!({ "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100, "vocab": vocab });
    let bert = around(model, json!({ "pre_tokenizer": { "type": "BertPreTokenizer" } }));
    assert_eq!(sum(&bert, lower), Some(lower.len() as u64 + 1));
    // Punctuation has no space before it: what it has too many makes up for what double spaces have too few.
    assert_eq!(sum(&bert, &lower.replace("fox jumps", "fox, jumps").replace("lazy dog", "lazy  dog")), None);
    assert_eq!(sum(&bert, &lower.replace("fox", "föx")), None, "an unknown word stands for any number of bytes");
}

#[test]
fn what_goes_around_a_text_is_told_from_it() {
    let tokens = json!([special(26, "<s>"), special(27, "</s>")]);
    let piece = |name: &str| json!({ "SpecialToken": { "id": name, "type_id": 0 } });
    let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
    let template = |single: Value| {
        json!({ "type": "TemplateProcessing", "single": single, "pair": [text],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [26], "tokens": ["<s>"] },
                "</s>": { "id": "</s>", "ids": [27], "tokens": ["</s>"] } } })
    };
    let open = |processor: Value| {
        let model = json!({ "type": "BPE", "vocab": letters(&[]), "merges": [] });
        Tokenizer::from_json(&around(model, json!({ "added_tokens": tokens, "post_processor": processor })))
    };
    let begins = template(json!([piece("<s>"), text]));
    let both = template(json!([piece("<s>"), text, piece("</s>")]));
    let nested = json!({ "type": "Sequence", "processors": [begins] });
    let roberta = json!({ "type": "RobertaProcessing", "sep": ["</s>", 27], "cls": ["<s>", 26], "trim_offsets": true,
        "add_prefix_space": false });
    for (processor, prompt, whole) in [
        (Value::Null, vec![1], vec![1]),
        (begins.clone(), vec![26, 1], vec![26, 1]),
        (nested, vec![26, 1], vec![26, 1]),
        (both, vec![26, 1], vec![26, 1, 27]),
        (roberta, vec![26, 1], vec![26, 1, 27]),
    ] {
        let tokenizer = open(processor.clone()).unwrap();
        assert_eq!(tokenizer.encode_prompt("b").unwrap(), prompt, "{processor}");
        assert_eq!(tokenizer.encode_whole("b").unwrap(), whole, "{processor}");
        // A chat template writes what it wants itself.
        let template: Vec<u32> = tokenizer.encode_template("<s>b").unwrap().into_iter().map(|(id, _)| id).collect();
        assert_eq!(template, [26, 1]);
    }
    let added = "{\"bos_token\": \"<s>\", \"add_bos_token\": true}";
    let tokenizer = open(Value::Null).unwrap().with_config(added).unwrap();
    assert_eq!((tokenizer.encode_prompt("b").unwrap(), tokenizer.notes().len()), (vec![26, 1], 1));
    let again = open(Value::Null).unwrap().with_config(&tokenizer.config_json()).unwrap();
    assert_eq!(again.beginning(), [26]);
    // The post-processor decides where it adds something.
    assert_eq!(open(begins).unwrap().with_config(added).unwrap().encode_prompt("b").unwrap(), [26, 1]);
    let error = open(json!([26])).err().unwrap();
    assert!(error.to_string().contains("not a valid tokenizer.json"), "{error}");
}

#[test]
fn dropout_is_switched_off_and_said_so() {
    let model = json!({ "type": "BPE", "dropout": 0.5, "vocab": letters(&["ab", "abab"]),
        "merges": [["a", "b"], ["ab", "ab"]] });
    let tokenizer = Tokenizer::from_json(&around(model.clone(), json!({}))).unwrap();
    assert!(tokenizer.notes()[0].contains("model.dropout (0.5)"), "{:?}", tokenizer.notes());
    for _ in 0..50 {
        assert_eq!(tokenizer.encode("abab").unwrap(), [27]);
    }
    // What a run keeps has none, and needs no word.
    assert!(Tokenizer::from_json(tokenizer.to_json()).unwrap().notes().is_empty());
    let mut none = model;
    none["dropout"] = json!(0.0);
    assert!(Tokenizer::from_json(&around(none, json!({}))).unwrap().notes().is_empty());
}

#[test]
fn hostile_files_are_refused_with_the_place() {
    let model = || json!({ "type": "BPE", "vocab": letters(&[]), "merges": [] });
    let replace = |pattern: Value| json!({ "type": "Replace", "pattern": pattern, "content": "x" });
    let split =
        |pattern: Value| json!({ "type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false });
    let huge =
        letters(&[]).as_object().unwrap().clone().into_iter().chain([("zz".to_owned(), json!(u32::MAX))]).collect();
    let huge = Value::Object(huge);
    let processor = json!({ "type": "BertProcessing", "sep": ["</s>", 4_000_000_000u32], "cls": ["<s>", 1] });
    let unigram = json!({ "type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["", -1.0], ["a", -2.0]] });
    for (json, words) in [
        (
            around(model(), json!({ "normalizer": replace(json!({ "String": "" })) })),
            "normalizer.pattern.String is empty",
        ),
        (around(model(), json!({ "decoder": replace(json!({ "Regex": "" })) })), "decoder.pattern.Regex is empty"),
        (
            around(
                model(),
                json!({ "pre_tokenizer": { "type": "Sequence", "pretokenizers": [split(json!({ "String": "" }))] } }),
            ),
            "pre_tokenizer.pretokenizers.0.pattern.String is empty",
        ),
        (
            around(model(), json!({ "pre_tokenizer": split(json!({ "Regex": "(?=((a{1000}){1000}){1000})" })) })),
            "repeats 1000000000 times",
        ),
        (around(model(), json!({ "pre_tokenizer": split(json!({ "Regex": "(" })) })), "not a valid tokenizer.json"),
        (around(model(), json!({ "pre_tokenizer": { "type": "FixedLength", "length": 0 } })), "length (0) must be"),
        (
            around(model(), json!({ "added_tokens": [special(u32::MAX, "<s>")] })),
            "added_tokens.0.id (4294967295) must be",
        ),
        (
            around(json!({ "type": "BPE", "vocab": huge, "merges": [] }), json!({})),
            "model.vocab.\"zz\" (4294967295) must be 0 or more and below 16777216",
        ),
        (around(model(), json!({ "post_processor": processor })), "post_processor.sep (4000000000) must be an id"),
        (around(unigram, json!({})), "model.vocab.1 is an empty token"),
        (
            around(model(), json!({ "normalizer": { "type": "Precompiled", "precompiled_charsmap": "/////wECAwQ=" } })),
            "precompiled_charsmap begins with a table of 4294967295 bytes",
        ),
        ("{}".into(), "it has no table `model`"),
        ("[".into(), "not a valid tokenizer.json"),
    ] {
        let error = Tokenizer::from_json(&json).err().unwrap_or_else(|| panic!("not refused: {words}")).to_string();
        assert!(error.contains(words), "{error} does not say {words}");
    }
    // Merges that reach beyond a token make the library panic.
    let model = json!({ "type": "BPE", "vocab": vocab(&["a", "b", "ab"]), "merges": [["a", "b"]],
        "continuing_subword_prefix": "####" });
    let error = Tokenizer::from_json(&around(model, json!({}))).err().unwrap().to_string();
    assert!(error.contains("the tokenizers library breaks on it"), "{error}");
}

#[test]
fn bytes_round_trip_and_agree_with_their_json() {
    let bytes = Tokenizer::bytes();
    let ids = bytes.encode(TEXT).unwrap();
    assert_eq!(bytes.decode(&ids), TEXT);
    let hf = HfTokenizer::from_bytes(bytes.to_json()).unwrap();
    assert_eq!(hf.encode(TEXT, false).unwrap().get_ids(), ids);
    assert_eq!(hf.decode(&ids, true).unwrap(), TEXT);
    assert_eq!(hf.token_to_id(END_OF_TEXT), bytes.end_of_text());
    assert_eq!(hf.get_vocab_size(true), bytes.vocab_size());
}

/// No half a tokenizer of the texts in front of a broken one.
#[test]
fn a_text_that_cannot_be_read_leaves_no_tokenizer_behind() {
    let dir = tempfile::tempdir().unwrap();
    let broken = Documents::counted("text", "text", |take| {
        texts((0..500).map(|i| format!("number {i}"))).into_iter().try_for_each(take)?;
        Err(crate::DataError::Unusable("the 500th is broken".into()))
    });
    let path = dir.path().join("tokenizer.json");
    assert!(train_bpe(&broken, 270, &path).unwrap_err().to_string().contains("the 500th is broken"));
    assert!(train_bpe(&broken, 200, &path).unwrap_err().to_string().contains("at least 258"));
    assert!(!path.exists());
}

#[test]
fn bpe_is_deterministic_and_counts_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let train = |name: &str| {
        let numbers = texts((0..500).map(|i| format!("{TEXT} number {i} and again number {i}")));
        let path = dir.path().join(name);
        assert_eq!(train_bpe(&Documents::described("numbers", numbers), 300, &path).unwrap().0, 300);
        std::fs::read_to_string(path).unwrap()
    };
    let json = train("a.json");
    assert_eq!(json, train("b.json"));
    let tokenizer = Tokenizer::from_json(&json).unwrap();
    let ids = tokenizer.encode(TEXT).unwrap();
    assert!(ids.len() < TEXT.len());
    assert_eq!(tokenizer.decode(&ids), TEXT);
    let bytes = tokenizer.token_bytes();
    assert_eq!(ids.iter().map(|&id| bytes[id as usize] as usize).sum::<usize>(), TEXT.len());
}

#[test]
fn published_files_are_read_whole_with_gaps_and_added_tokens() {
    let mut json: serde_json::Value = serde_json::from_str(&bytes_json()).unwrap();
    json["truncation"] = json!({ "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0 });
    json["padding"] = json!({ "strategy": { "Fixed": 64 }, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 257, "pad_type_id": 0, "pad_token": PAD });
    json["model"]["vocab"]["ab"] = json!(400);
    json["model"]["merges"] = json!([["a", "b"]]);
    json["added_tokens"].as_array_mut().unwrap().push(json!({ "id": 401, "content": "é", "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false, "special": false }));
    let tokenizer = Tokenizer::from_json(&json.to_string()).unwrap();
    let text = "ab, and more 🦀\nend";
    // The library's decoder takes an added é for the byte E9, so it is counted but not decoded here.
    for text in [text, "é ab"] {
        let ids = tokenizer.encode(text).unwrap();
        assert!(ids.contains(&400), "{ids:?}");
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()), "{ids:?}");
        let bytes = tokenizer.token_bytes();
        assert_eq!(ids.iter().map(|&id| bytes[id as usize] as usize).sum::<usize>(), text.len());
    }
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!(tokenizer.decode(&ids), text);
    let mut stream = StreamDecoder::new(&tokenizer);
    let parts: Vec<String> = ids.iter().filter_map(|&id| stream.push(id)).collect();
    assert_eq!(parts.concat(), text);
}

#[test]
fn what_is_no_tokenizer_is_said_so() {
    let config = TokenizerConfig::Huggingface(HuggingfaceTokenizer { path: "/nowhere/tokenizer.json".into() });
    assert!(Tokenizer::open(&config).err().unwrap().to_string().contains("/nowhere/tokenizer.json"));
    assert!(Tokenizer::from_json("{}").is_err());
}
