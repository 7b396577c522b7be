#![allow(clippy::unwrap_used)]
use polyhead_models::Sources;
use serde_json::{Value, json};

use super::*;
use crate::testing::Folder;
use crate::{DataConfig, Tokenizer};

const SEQ_LEN: usize = 16;

/// A folder with two sources: 60 short texts of "a" and 40 longer ones of "b".
fn two_sources() -> Folder {
    let folder = Folder::new();
    let rows = |letter: &str, count: usize, length: usize| -> String {
        // Of different lengths, and each its own, so that none is taken for another.
        let row = |i: usize| format!("{{\"text\": \"{}{i}\"}}\n", letter.repeat(length + i % 5));
        (0..count).map(row).collect()
    };
    folder.write("a.jsonl", rows("a", 60, 6));
    folder.write("b.jsonl", rows("b", 40, 30));
    folder
}

fn source(folder: &Folder, name: &str, weight: f64) -> Value {
    json!({ "weight": weight, "name": name, "jsonl": { "paths": [folder.path().join(format!("{name}.jsonl"))] } })
}

fn open(folder: &Folder, data: Value, seed: u64) -> Result<Opened, DataError> {
    let config: DataConfig = serde_json::from_value(data).unwrap();
    let options = OpenOptions {
        validation_fraction: 0.2,
        cache_dir: folder.path().join("cache"),
        ..crate::tests::options(SEQ_LEN, 2, seed)
    };
    config.open_tokens(&Tokenizer::bytes(), &options, &mut |_, _| {})
}

fn mixed(folder: &Folder, weights: [f64; 2], more: Value) -> Value {
    let mut data = json!({ "source": [source(folder, "a", weights[0]), source(folder, "b", weights[1])] });
    data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    data
}

/// Sources of the targets of the first epoch's rows.
fn sources(opened: &Opened) -> Vec<u16> {
    let batches = 0..opened.train.per_epoch() / 2;
    batches.flat_map(|at| opened.train.batch(at).unwrap().sources.unwrap().of).collect()
}

#[test]
fn shares_are_exact_from_the_first_row_on() {
    let folder = two_sources();
    let opened = open(&folder, mixed(&folder, [1.0, 3.0], json!({ "until": 2001 })), 5).unwrap();
    assert_eq!(opened.train.per_epoch(), 2000 / SEQ_LEN as u64);
    let sources = sources(&opened);
    let batch = opened.train.batch(0).unwrap();
    let Sources { names, of } = batch.sources.clone().unwrap();
    assert_eq!((&*names, of.len()), (&["a".to_owned(), "b".to_owned()][..], 2 * SEQ_LEN));
    // The source of a target is that of its text.
    for (&target, &source) in batch.targets.iter().zip(&of) {
        let letter = u8::try_from(target).unwrap_or(b' ');
        assert!(!letter.is_ascii_lowercase() || letter == b"ab"[usize::from(source)], "{target} of {source}");
    }
    let mut of_b = 0.0;
    for (count, source) in (1..).zip(&sources) {
        of_b += f64::from(*source);
        let expected: f64 = 0.75 * f64::from(count);
        // A document of each source.
        assert!((of_b - expected).abs() < 40.0, "{of_b} of {count}");
    }
    // An odd number of rows is cut to whole batches of two here; the epoch itself has 2001 tokens, 1501 of them of b.
    assert!(opened.description.contains("(500 tokens of") && opened.description.contains("(1501 tokens of"));
    assert!(opened.description.contains("2001 tokens an epoch"), "{}", opened.description);
}

#[test]
fn batches_are_functions_of_seed_and_position() {
    let folder = two_sources();
    let data = |seed| open(&folder, mixed(&folder, [1.0, 1.0], json!({})), seed).unwrap();
    let (one, other) = (data(5), data(5));
    let epoch = one.train.per_epoch() / 2;
    let all: Vec<_> = (0..3 * epoch).map(|at| one.train.batch(at).unwrap()).collect();
    for at in [2 * epoch + 1, 0, epoch, 1] {
        assert_eq!(other.train.batch(at).unwrap(), all[at as usize]);
    }
    assert_ne!(all[0], all[epoch as usize], "documents come in another order in every epoch");
    assert_ne!(data(6).train.batch(0).unwrap(), all[0]);
}

#[test]
fn epochs_end_as_asked() {
    let folder = two_sources();
    let of = |until: &str| open(&folder, mixed(&folder, [1.0, 1.0], json!({ "until": until })), 5).unwrap();
    let text = |opened: &Opened, letter: char| -> String {
        let batches = (0..opened.train.batches_per_epoch()).map(|at| opened.train.batch(at).unwrap().tokens);
        let text: String = batches.flatten().map(|id| u8::try_from(id).unwrap_or(b'\n') as char).collect();
        text.lines().filter(|line| line.starts_with(letter)).collect::<Vec<_>>().join("\n")
    };
    let (first, all) = (of("first_exhausted"), of("all_exhausted"));
    assert!(first.notes.is_empty() && all.notes.iter().any(|note| note.starts_with("in an epoch a is read ")));
    assert!(all.train.per_epoch() > first.train.per_epoch());
    // Every text of the smaller source comes once, every text of the larger one does where all are read.
    let different = |text: String| {
        let lines: std::collections::BTreeSet<String> = text.lines().map(str::to_owned).collect();
        (lines.len(), text.lines().count())
    };
    let (kinds, times) = different(text(&first, 'a'));
    assert!(kinds >= times - 4 && kinds > 35, "{kinds} of {times}: some are cut at the ends of rows");
    assert!(different(text(&all, 'b')).0 > different(text(&first, 'b')).0);
}

#[test]
fn one_source_with_a_weight_is_that_source_alone() {
    let folder = two_sources();
    let rows = |data| open(&folder, data, 5).unwrap();
    for (weights, name) in [([0.0, 2.0], "b"), ([1.0, 0.0], "a")] {
        let mixture = rows(mixed(&folder, weights, json!({})));
        let alone = rows(json!({ "jsonl": { "paths": [folder.path().join(format!("{name}.jsonl"))] } }));
        assert_eq!(mixture.train.per_epoch(), alone.train.per_epoch());
        for at in 0..alone.train.per_epoch() {
            let (batch, plain) = (mixture.train.batch(at).unwrap(), alone.train.batch(at).unwrap());
            assert_eq!((batch.tokens, batch.targets), (plain.tokens, plain.targets));
        }
    }
}

#[test]
fn all_sources_are_validated_on_alike() {
    let folder = two_sources();
    let validation = |weights| open(&folder, mixed(&folder, weights, json!({})), 5).unwrap().validation;
    let (one, other) = (validation([1.0, 0.0]), validation([1.0, 3.0]));
    assert_eq!(one.batches_per_epoch(), other.batches_per_epoch());
    for at in 0..one.batches_per_epoch() {
        assert_eq!(one.batch(at).unwrap(), other.batch(at).unwrap());
    }
    let of = one.batch(0).unwrap().sources.unwrap().of;
    assert_eq!((of[0], of[2 * SEQ_LEN - 1]), (0, 1), "a row of each source in the first batch of two");
}

#[test]
fn whole_documents_end_at_or_behind_the_share() {
    let lengths = || [3, 4, 5].into_iter();
    let taken = |cap, rule| documents_within(lengths(), cap, rule);
    assert_eq!(taken(7, LastDocument::Cut), [3, 4]);
    assert_eq!(taken(6, LastDocument::Cut), [3, 3]);
    assert_eq!(taken(7, LastDocument::LeaveOut), [3, 4]);
    assert_eq!(taken(6, LastDocument::LeaveOut), [3]);
    assert_eq!(taken(7, LastDocument::Overshoot), [3, 4, 5], "a total equal to the share takes one more");
    assert_eq!(taken(6, LastDocument::Overshoot), [3, 4]);
    for rule in [LastDocument::Cut, LastDocument::LeaveOut, LastDocument::Overshoot] {
        assert!(taken(0, rule).is_empty());
    }
    let folder = two_sources();
    let tokens = |rule: &str| {
        let data = mixed(&folder, [1.0, 1.0], json!({ "until": 1001, "last_document": rule }));
        let description = open(&folder, data, 5).unwrap().description;
        let (_, end) = description.rsplit_once("; ").unwrap();
        end.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    assert!(tokens("leave_out") <= 993 && tokens("cut") == 993 && tokens("overshoot") > 993);
}

#[test]
fn quotas_add_up() {
    assert_eq!(quotas(&[0.2, 0.8], 4000), [800, 3200]);
    assert_eq!(quotas(&[1.0, 1.0, 1.0], 100), [34, 33, 33]);
    assert_eq!(quotas(&[0.0, 3.0, 1.0], 101), [0, 76, 25]);
    assert_eq!(quotas(&[1.0, 2.0], 100), [33, 67]);
}

#[test]
fn settings_that_cannot_be_are_named() {
    let folder = two_sources();
    let message = |data: Value| open(&folder, data, 5).err().unwrap().to_string();
    let with = |key: &str, value: Value| {
        let mut one = source(&folder, "a", 1.0);
        one[key] = value;
        message(json!({ "source": [one, source(&folder, "b", 1.0)] }))
    };
    assert!(
        with("weight", json!(-1.0))
            .contains("data.source.0.weight: weight (-1.0) must be 0, or a number from 1e-9 to 1e9")
    );
    // Two of these would add up to infinity, and an epoch to no number of tokens.
    assert!(with("weight", json!(1e308)).contains("weight (1e308)"));
    assert!(with("name", json!(" ")).contains("name is empty"));
    assert!(with("name", json!("b")).contains("two sources are called \"b\""));
    assert!(with("rust_docs", json!({})).contains("jsonl and rust_docs are there"));
    assert!(with("jsonl", Value::Null).contains("takes one table with texts"));
    assert!(message(json!({ "source": [] })).contains("at least one [[data.source]]"));
    assert!(message(mixed(&folder, [0.0, 0.0], json!({}))).contains("every source has weight 0"));
    assert!(message(mixed(&folder, [1.0, 1.0], json!({ "until": 16 }))).contains("data.until (16) must be at least"));
    let often = message(mixed(&folder, [1.0, 1e-9], json!({ "until": "all_exhausted" })));
    assert!(often.contains("\"a\" would be read ") && often.contains("raise its weight"), "{often}");
    let wrong = |until: Value| {
        serde_json::from_value::<DataConfig>(mixed(&folder, [1.0, 1.0], json!({ "until": until })))
            .unwrap_err()
            .to_string()
    };
    for until in [json!("never"), json!(-3), json!(1.5)] {
        assert!(
            wrong(until.clone()).contains("\"first_exhausted\", \"all_exhausted\" or a number of tokens"),
            "{until}"
        );
    }
}
