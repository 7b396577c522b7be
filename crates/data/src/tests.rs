//! Sources as their users open them.

#![allow(clippy::unwrap_used)]
use std::path::PathBuf;

use polyhead_models::{Batch, IGNORE, Inputs, Role};

use super::*;

/// Options without tracking, files or an own folder.
pub(crate) fn options(seq_len: usize, batch_size: usize, seed: u64) -> OpenOptions {
    OpenOptions {
        seq_len,
        batch_size,
        seed,
        packing: Packing::Stream,
        augmentation: AugmentConfig::default(),
        validation_fraction: 0.1,
        tracking: None,
        validation_samples: 10,
        cache_dir: PathBuf::new(),
        project_root: PathBuf::new(),
    }
}

fn opened(data: &str, batch_size: usize) -> Result<Opened, DataError> {
    let tracking = Some(Tracking { fraction: 0.1, texts: 3 });
    let options = OpenOptions { tracking, validation_samples: 6, ..options(32, batch_size, 3) };
    let data: DataConfig = serde_json::from_str(data).unwrap();
    data.open_tokens(&Tokenizer::bytes(), &options, &mut |_, _| {})
}

#[test]
fn generated_sets_open_with_their_optimum() {
    for (data, vocab_size, floor) in
        [("induction", 64, Some(0.0)), ("copy", 65, Some(0.0)), ("associative_recall", 129, Some(0.0))]
    {
        let config = format!(r#"{{"{data}":{{}}}}"#);
        let opened = opened(&config, 4).unwrap();
        let known = serde_json::from_str::<DataConfig>(&config).unwrap().source().vocab_size(&Tokenizer::bytes());
        assert_eq!(known, vocab_size);
        assert_eq!((opened.vocab_size, opened.floor), (vocab_size, floor));
        assert_eq!((opened.validation.per_epoch(), opened.validation.batches_per_epoch()), (6, 2));
        assert_ne!(opened.train.batch(0).unwrap(), opened.validation.batch(0).unwrap());
        let rows = |batch: Batch| batch.tokens.chunks(32).map(<[u32]>::to_vec).collect::<Vec<_>>();
        assert_eq!(opened.tracking.len(), 3);
        for position in 0..2 {
            let used = [rows(opened.train.batch(position).unwrap()), rows(opened.validation.batch(position).unwrap())];
            assert!(used.concat().iter().all(|row| opened.tracking.iter().all(|tracked| tracked.tokens != *row)));
        }
    }
}

#[test]
fn files_given_to_validate_on_are_all_of_the_validation() {
    let dir = crate::testing::Folder::new();
    let path = |name: &str, contents: String| dir.write(name, contents).display().to_string();
    let chat = |word: &str| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{word}\"}}, {{\"role\": \"assistant\", \"content\": \"{word}\"}}]}}\n"
        )
    };
    let row = |word: &str| format!("{{\"text\": \"{word}\"}}\n");
    let files = [
        ("text", "".into(), path("a.txt", "q".repeat(200)), path("v.txt", "v".repeat(80))),
        (
            "jsonl",
            "".into(),
            path("a.jsonl", row(&"q".repeat(70)).repeat(3)),
            path("v.jsonl", row(&"v".repeat(40)).repeat(2)),
        ),
        (
            "chat",
            r#", "template": "plain""#.to_owned(),
            path("ac.jsonl", chat("qq").repeat(3)),
            path("vc.jsonl", chat("vv").repeat(2)),
        ),
    ];
    for (name, more, own, given) in files {
        for tracking in [None, Some(Tracking { fraction: 0.3, texts: 3 })] {
            let options = OpenOptions { tracking, cache_dir: dir.path().into(), ..options(32, 1, 3) };
            let table = format!(r#"{{"{name}": {{"paths": ["{own}"], "validation_paths": ["{given}"]{more}}}}}"#);
            let data: DataConfig = serde_json::from_str(&table).unwrap();
            assert_eq!(data.source().paths(), [own.clone(), given.clone()]);
            let opened = data.open_tokens(&Tokenizer::bytes(), &options, &mut |_, _| {}).unwrap();
            let seen = |loader: &Loader| {
                let rows = (0..loader.batches_per_epoch()).map(|at| loader.batch(at).unwrap().tokens);
                rows.flatten().collect::<std::collections::BTreeSet<u32>>()
            };
            let [trained, held_out] = [&opened.train, &opened.validation].map(seen);
            let [q, v] = [u32::from(b'q'), u32::from(b'v')];
            assert!(trained.contains(&q) && !trained.contains(&v), "{name}: {}", opened.description);
            assert!(held_out.contains(&v) && !held_out.contains(&q), "{name}: {}", opened.description);
            assert!(opened.tracking.iter().all(|text| !text.tokens.contains(&v)), "{name}");
        }
    }
    let own = path("more.txt", "q".repeat(200));
    let table = format!(
        r#"{{"source": [{{"text": {{"paths": ["{own}"], "validation_paths": ["{}"]}}}}]}}"#,
        dir.path().join("v.txt").display()
    );
    let data: DataConfig = serde_json::from_str(&table).unwrap();
    assert_eq!(
        data.documents(dir.path()).unwrap().to_train().read_all().unwrap().0.len(),
        1,
        "a tokenizer learns from what is trained on"
    );
    let options = OpenOptions { cache_dir: dir.path().into(), ..options(32, 1, 3) };
    let opened = data.open_tokens(&Tokenizer::bytes(), &options, &mut |_, _| {}).unwrap();
    assert!(opened.validation.batch(0).unwrap().tokens.iter().all(|&id| id == u32::from(b'v')));
}

#[test]
fn tracked_rows_are_what_would_be_trained_on() {
    let rows = opened(r#"{"facts":{}}"#, 4).unwrap();
    let learned = rows.train.batch(0).unwrap().row(0);
    assert_eq!(rows.tracking.len(), 3);
    for row in rows.tracking {
        // Statements of five tokens, whose answers and ends are asked for.
        assert_eq!(row.documents, learned.documents);
        let asked = |row: &Batch| row.targets.iter().map(|&target| target != IGNORE).collect::<Vec<_>>();
        assert_eq!((asked(&row), row.seq), (asked(&learned), 32));
    }
    let file = chats(0, 40);
    let rows = opened(&chat_data(&file), 4).unwrap();
    assert!(!rows.tracking.is_empty());
    for row in rows.tracking {
        let roles = row.roles.clone().unwrap();
        assert!(!roles.contains(&Role::Padding) && roles.len() == row.seq);
        // As evaluation asks: the answer, and nothing of the question.
        for (at, &target) in row.targets.iter().enumerate() {
            let answer = roles.get(at + 1) == Some(&Role::Assistant);
            assert_eq!(target != IGNORE, answer, "{at}: {roles:?}");
        }
    }
}

#[test]
fn folders_of_the_hub_are_trained_on_by_their_splits() {
    let text = |letter: &str| {
        let row = |label| format!("{{\"text\": \"{}\", \"label\": \"{label}\"}}\n", letter.repeat(40));
        row("one") + &row("two")
    };
    let chat = |letter: &str| {
        let message = |role: &str| format!("{{\"role\": \"{role}\", \"content\": \"{letter}\"}}");
        format!("{{\"messages\": [{}, {}]}}\n", message("user"), message("assistant"))
    };
    // Letters that no template writes.
    let (q, v, z) = (u32::from(b'q'), u32::from(b'v'), u32::from(b'z'));
    for (name, more, row) in [
        ("jsonl", "", &text as &dyn Fn(&str) -> String),
        ("chat", r#", "template": "plain""#, &chat),
        ("labelled_text", "", &text),
    ] {
        let dir = testing::Folder::new();
        for (file, letter) in [("train-0", "q"), ("train-1", "q"), ("validation", "v"), ("test", "z")] {
            dir.write(&format!("data/{file}.jsonl"), row(letter).repeat(3));
        }
        let config = format!(r#"{{"{name}": {{"paths": ["{}"]{more}}}}}"#, dir.path().display());
        let data: DataConfig = serde_json::from_str(&config).unwrap();
        let options = OpenOptions { tracking: None, cache_dir: dir.path().join("cache"), ..options(32, 1, 3) };
        let (trained, held_out, notes) = match name {
            "labelled_text" => {
                let opened = data.open_examples(&Tokenizer::bytes(), &options).unwrap();
                let seen = |loader: &ExampleLoader| {
                    let rows = (0..loader.batches_per_epoch()).map(|at| match loader.batch(at).unwrap().inputs {
                        Inputs::Tokens { tokens, .. } => tokens,
                        other => panic!("{other:?}"),
                    });
                    rows.flatten().collect::<std::collections::BTreeSet<u32>>()
                };
                (seen(&opened.train), seen(&opened.validation), opened.notes)
            }
            _ => {
                let opened = data.open_tokens(&Tokenizer::bytes(), &options, &mut |_, _| {}).unwrap();
                let seen = |loader: &Loader| {
                    let rows = (0..loader.batches_per_epoch()).map(|at| loader.batch(at).unwrap().tokens);
                    rows.flatten().collect::<std::collections::BTreeSet<u32>>()
                };
                (seen(&opened.train), seen(&opened.validation), opened.notes)
            }
        };
        assert!(trained.contains(&q) && !trained.contains(&v) && !trained.contains(&z), "{name}: {notes:?}");
        assert!(held_out.contains(&v) && !held_out.contains(&q) && !held_out.contains(&z), "{name}: {notes:?}");
        let note = "train (2 files) is trained on, validation (1 file) is held out; left out: test (1 file)";
        assert!(notes.iter().any(|found| found.ends_with(note)), "{name}: {notes:?}");
    }
}

#[test]
fn columns_that_no_chat_is_made_of_are_not_read() {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/rows/chats.parquet"));
    let mut bytes = std::fs::read(&path).unwrap();
    let reader = SerializedFileReader::new(std::fs::File::open(&path).unwrap()).unwrap();
    for group in reader.metadata().row_groups() {
        let image = group.columns().iter().find(|column| column.column_path().string() == "image").unwrap();
        let (start, length) = image.byte_range();
        bytes[start as usize..(start + length) as usize].fill(0xff);
    }
    let dir = testing::Folder::new();
    let damaged = dir.write("chats.parquet", bytes);
    let data = serde_json::json!({ "chat": { "paths": [damaged], "template": "plain" } });
    let options = OpenOptions { tracking: None, ..options(32, 1, 3) };
    let data: DataConfig = serde_json::from_value(data).unwrap();
    let opened = data.open_tokens(&Tokenizer::bytes(), &options, &mut |_, _| {}).unwrap();
    assert!(opened.description.starts_with("3 rows of chat"), "{}", opened.description);
}

/// So many conversations in a file, from a number on.
fn chats(first: usize, count: usize) -> tempfile::NamedTempFile {
    let row = |i| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "{i}?"}}, {{"role": "assistant", "content": "{}"}}]}}"#,
            i % 7
        )
    };
    let file = tempfile::Builder::new().suffix(".jsonl").tempfile().unwrap();
    std::fs::write(file.path(), (first..first + count).map(row).collect::<Vec<_>>().join("\n")).unwrap();
    file
}

fn chat_data(file: &tempfile::NamedTempFile) -> String {
    serde_json::json!({ "chat": { "paths": [file.path()], "template": "plain" } }).to_string()
}

#[test]
fn few_conversations_are_each_on_one_side() {
    // Some of these sets leave nothing to validation, and their last one to tracking, before it is put right.
    for (first, count) in (0..40).flat_map(|first| [(10 * first, 5), (10 * first, 8)]) {
        let rows = opened(&chat_data(&chats(first, count)), 1).unwrap();
        let sizes = [rows.train.per_epoch(), rows.validation.per_epoch(), rows.tracking.len() as u64];
        assert!(sizes.iter().all(|&side| side > 0), "{first}, {count}: {sizes:?}");
        assert!(rows.description.ends_with(" for tracking"), "{}", rows.description);
    }
    let message = |count| opened(&chat_data(&chats(0, count)), 1).err().unwrap().to_string();
    assert!(message(1).contains("one conversation") && message(1).contains("at least 2"), "{}", message(1));
    assert!(message(2).contains("of 2 conversations none is left for "), "{}", message(2));
}

#[test]
fn a_setting_that_breaks_a_rule_is_named() {
    let message = |data, batch_size| opened(data, batch_size).err().unwrap().to_string();
    let error = message(r#"{"needles":{"n_distractors":9}}"#, 4);
    assert!(error.starts_with("data.needles.n_needles: 3 * "), "{error}");
    assert!(message(r#"{"copy":{}}"#, 0).contains("batch_size (0)"));
}

#[cfg(unix)]
#[test]
fn pipes_are_refused_as_tokenizers_and_templates() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let tokenizer = TokenizerConfig::Huggingface(HuggingfaceTokenizer { path: pipe.clone() });
    let bytes = Tokenizer::bytes();
    for error in [
        Tokenizer::open(&tokenizer).err().unwrap(),
        chat::chat_template("data.chat.template", &pipe.display().to_string(), &bytes).err().unwrap(),
    ] {
        let error = error.to_string();
        assert!(error.contains("pipe") && error.contains("it is a named pipe: only files are read"), "{error}");
    }
}
