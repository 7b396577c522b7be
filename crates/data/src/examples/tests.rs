#![allow(clippy::unwrap_used)]
use std::path::Path;

use polyhead_models::{Examples, InputShape, Inputs};

use crate::testing::gzip;
use crate::{AugmentConfig, DataConfig, DataError, ExampleLoader, Labelled, OpenOptions, Tokenizer};

fn open(json: &str, augment: &AugmentConfig, batch_size: usize) -> Result<Labelled, DataError> {
    let data: DataConfig = serde_json::from_str(json).unwrap();
    let options = OpenOptions {
        validation_fraction: 0.2,
        augmentation: augment.clone(),
        ..crate::tests::options(12, batch_size, 3)
    };
    data.open_examples(&Tokenizer::bytes(), &options)
}

fn plain(json: &str) -> Labelled {
    open(json, &AugmentConfig::default(), 4).unwrap()
}

/// What is wrong with it.
fn refused(json: &str) -> String {
    open(json, &AugmentConfig::default(), 4).err().unwrap().to_string()
}

fn numbers(batch: &Examples) -> &[f32] {
    match &batch.inputs {
        Inputs::Images { pixels, .. } => pixels,
        other => panic!("{other:?}"),
    }
}

/// The labels of everything that is validated on.
fn validated(opened: &Labelled) -> Vec<u32> {
    (0..opened.validation.batches_per_epoch()).flat_map(|at| opened.validation.batch(at).unwrap().labels).collect()
}

#[test]
fn generated_examples_depend_on_seed_side_and_position_only() {
    for name in ["shapes", "chirps"] {
        let json = format!(r#"{{"{name}":{{}}}}"#);
        let (a, b) = (plain(&json), plain(&json));
        let late = a.train.batch(7).unwrap();
        assert_eq!(late, b.train.batch(7).unwrap());
        assert_ne!(late, a.train.batch(8).unwrap());
        assert_ne!(a.train.batch(0).unwrap(), a.validation.batch(0).unwrap());
        assert_eq!(late.labels, [4, 5, 6, 7], "classes come in turn");
        assert!(numbers(&late).iter().all(|pixel| pixel.is_finite() && pixel.abs() < 20.0));
        assert_eq!((a.classes.len(), validated(&a).len()), (8, 10));
        let size = numbers(&late).len() / 4;
        let InputShape::Images { channels, height, width } = a.train.shape() else { panic!() };
        assert_eq!(size, channels * height * width);
    }
}

#[test]
fn noise_is_a_dial_and_shapes_differ() {
    let image = |noise: f64| {
        let json = format!(r#"{{"shapes":{{"clutter": 0, "noise": {noise}, "turn": 0}}}}"#);
        plain(&json).train.batch(0).unwrap()
    };
    let [clean, noisy] = [image(0.0), image(0.5)];
    let differences: Vec<f32> = numbers(&clean).iter().zip(numbers(&noisy)).map(|(a, b)| a - b).collect();
    let deviation = (differences.iter().map(|x| x * x).sum::<f32>() / differences.len() as f32).sqrt();
    assert!((deviation - 0.5).abs() < 0.02, "{deviation}");
    // Areas that are bright: a bar is thinner than a square.
    let json = r#"{"shapes":{"clutter": 0, "noise": 0, "turn": 0}}"#;
    let batches: Vec<Examples> = [0, 1].map(|at| plain(json).train.batch(at).unwrap()).into();
    let bright = |class: usize| {
        let pixels = &numbers(&batches[class / 4])[class % 4 * 1024..][..1024];
        let top = pixels.iter().copied().fold(f32::MIN, f32::max);
        let low = pixels.iter().copied().fold(f32::MAX, f32::min);
        pixels.iter().filter(|&&pixel| pixel > 0.5 * (top + low)).count()
    };
    let areas: Vec<usize> = (0..8).map(bright).collect();
    assert!(areas.iter().all(|&area| area > 15 && area < 250), "{areas:?}");
    assert!(areas[6] < areas[1] && areas[4] < areas[0], "{areas:?}");
}

#[test]
fn augmentation_is_drawn_anew_each_epoch_and_never_on_what_is_validated() {
    let dir = tempfile::tempdir().unwrap();
    write_idx(dir.path(), 10);
    let json = idx_json(dir.path());
    let augment = AugmentConfig { crop: 1, flip: true, noise: 0.1 };
    let (augmented, plain) = (open(&json, &augment, 8).unwrap(), open(&json, &AugmentConfig::default(), 8).unwrap());
    assert_eq!(plain.train.batches_per_epoch(), 1);
    assert_ne!(augmented.train.batch(0).unwrap(), plain.train.batch(0).unwrap());
    assert_eq!(augmented.train.batch(5).unwrap(), open(&json, &augment, 8).unwrap().train.batch(5).unwrap());
    assert_eq!(augmented.validation.batch(0).unwrap(), plain.validation.batch(0).unwrap());
    // Only moved and mirrored: each image holds no other values than before, and black.
    let moved = open(&json, &AugmentConfig { crop: 1, flip: true, noise: 0.0 }, 8).unwrap();
    let (batch, before) = (moved.train.batch(0).unwrap(), plain.train.batch(0).unwrap());
    assert_eq!(batch.labels, before.labels);
    for (image, before) in numbers(&batch).chunks(6).zip(numbers(&before).chunks(6)) {
        assert!(image.iter().all(|pixel| *pixel == -1.0 || before.contains(pixel)), "{image:?} of {before:?}");
    }
    assert_ne!(batch, before);
}

fn idx_json(dir: &Path) -> String {
    let path = |name: &str| dir.join(name).display().to_string();
    format!(r#"{{"idx":{{"images": "{}", "labels": "{}"}}}}"#, path("images.gz"), path("labels"))
}

/// Images of 2 x 3 pixels, the first packed: image i holds 6 i, 6 i + 1, ...; its class is i mod 3.
fn write_idx(dir: &Path, count: u8) {
    let mut images = vec![0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 2, 0, 0, 0, 3];
    images.extend((0..6 * u16::from(count)).map(|i| i as u8));
    std::fs::write(dir.join("images.gz"), gzip(images)).unwrap();
    let mut labels = vec![0, 0, 8, 1, 0, 0, 0, count];
    labels.extend((0..count).map(|i| i % 3));
    std::fs::write(dir.join("labels"), labels).unwrap();
}

#[test]
fn idx_files_are_divided_and_nothing_is_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    write_idx(dir.path(), 10);
    let opened = plain(&idx_json(dir.path()));
    assert_eq!(opened.train.shape(), InputShape::Images { channels: 1, height: 2, width: 3 });
    assert_eq!((opened.classes.len(), opened.counts.iter().sum::<u64>()), (3, 8));
    let pixels = |loader: &ExampleLoader| -> Vec<u32> {
        let batches = (0..2).map(|at| loader.batch(at).unwrap());
        let firsts = batches.flat_map(|batch| {
            let firsts: Vec<f32> = numbers(&batch).chunks(6).map(|image| image[0]).collect();
            for (first, &label) in firsts.iter().zip(&batch.labels) {
                assert_eq!(((first + 1.0) * 127.5).round() as u32 / 6 % 3, label);
            }
            firsts
        });
        let mut all: Vec<u32> = firsts.map(|first| ((first + 1.0) * 127.5).round() as u32 / 6).collect();
        all.sort_unstable();
        all.dedup();
        all
    };
    let (train, validation) = (pixels(&opened.train), pixels(&opened.validation));
    assert_eq!((train.len(), validation.len()), (8, 2));
    assert!(validation.iter().all(|image| !train.contains(image)));
    assert_eq!(validated(&opened).len(), 2, "the last batch is short");
    // Cut off, or of another type.
    for (bytes, words) in [(&[0u8, 0, 8, 1, 0, 0, 0, 9, 1][..], "do not fit"), (&[0, 0, 13, 1, 0, 0, 0, 9], "0x0d")] {
        std::fs::write(dir.path().join("labels"), bytes).unwrap();
        let error = refused(&idx_json(dir.path()));
        assert!(error.contains(words) && error.contains("labels"), "{error}");
    }
}

#[test]
fn cifar_and_tables_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let rows: Vec<u8> = (0..6u8).flat_map(|i| [vec![9, i], vec![i; 3072]].concat()).collect();
    std::fs::write(dir.path().join("train.bin"), &rows).unwrap();
    let json = |labels: &str| format!(r#"{{"cifar":{{"paths": ["{}"], "labels": "{labels}"}}}}"#, dir.path().display());
    let opened = plain(&json("fine"));
    let batch = opened.train.batch(0).unwrap();
    assert_eq!(opened.classes.len(), 100);
    assert!((0..4).all(|i| numbers(&batch)[i * 3072] == batch.labels[i] as f32 / 127.5 - 1.0));
    let error = refused(&json("cifar10"));
    assert!(error.contains("data.cifar.labels"), "{error}");

    let path = dir.path().join("digits.csv");
    std::fs::write(&path, "a,b,c\n0,16,1\n8,4,0\n16,16,2\n").unwrap();
    let json = format!(r#"{{"csv_images":{{"paths": ["{}"], "size": [1, 2], "white": 16}}}}"#, path.display());
    let opened = plain(&json);
    assert_eq!((opened.classes.len(), opened.counts.iter().sum::<u64>()), (3, 2));
    std::fs::write(&path, "0,16,1\n8,4\n").unwrap();
    let error = refused(&json);
    assert!(error.contains("digits.csv:2") && error.contains("2 cells"), "{error}");
}

#[test]
fn folders_of_images_and_audio_are_read() {
    let dir = tempfile::tempdir().unwrap();
    for (class, grey) in [("black", 0u8), ("white", 255)] {
        let folder = dir.path().join(class);
        std::fs::create_dir(&folder).unwrap();
        for index in 0..3 {
            let file = std::fs::File::create(folder.join(format!("{index}.png"))).unwrap();
            let mut encoder = png::Encoder::new(file, 4, 2);
            encoder.set_color(png::ColorType::Grayscale);
            encoder.write_header().unwrap().write_image_data(&[grey; 8]).unwrap();
            let audio: Vec<u8> = (0..4000)
                .flat_map(|i| ((1000.0 * (f64::from(i) * f64::from(grey)).sin()) as i16).to_le_bytes())
                .collect();
            let mut wav =
                b"RIFF\x64\x1f\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x40\x1f\0\0\x80\x3e\0\0\x02\0\x10\0data".to_vec();
            wav.extend((audio.len() as u32).to_le_bytes());
            wav.extend(audio);
            std::fs::write(folder.join(format!("{index}.wav")), wav).unwrap();
        }
    }
    let path = dir.path().display();
    let opened = plain(&format!(r#"{{"image_folder":{{"path": "{path}", "size": [2, 2]}}}}"#));
    assert_eq!(opened.classes, ["black", "white"]);
    let batch = opened.train.batch(0).unwrap();
    for (image, &label) in numbers(&batch).chunks(12).zip(&batch.labels) {
        assert!(image.iter().all(|&pixel| pixel == [-1.0, 1.0][label as usize]));
    }
    let json = |rate: u32| format!(r#"{{"wav_folder":{{"path": "{path}", "sample_rate": {rate}}}}}"#);
    let opened = plain(&json(8000));
    assert_eq!(opened.train.shape(), InputShape::Images { channels: 1, height: 32, width: 32 });
    assert_eq!(opened.counts.iter().sum::<u64>() + opened.validation.per_epoch(), 6);
    let error = refused(&json(16000));
    assert!(error.contains("8000 samples per second, not 16000"), "{error}");
    std::fs::write(dir.path().join("white/0.png"), b"no image").unwrap();
    let json = format!(r#"{{"image_folder":{{"path": "{path}", "size": [2, 2]}}}}"#);
    let error = refused(&json);
    assert!(error.contains("white/0.png"), "{error}");
    // Skipped, it is counted and named, as is what else lies about.
    std::fs::write(dir.path().join("white/0.wav"), b"RIFF").unwrap();
    std::fs::write(dir.path().join("white/photo.heic"), b"").unwrap();
    std::fs::write(dir.path().join("readme.txt"), b"").unwrap();
    let skipping = |json: &str| plain(&json.replace("}}", ", \"on_bad_file\": \"skip\"}}"));
    let opened = skipping(&json);
    assert_eq!(opened.counts.iter().sum::<u64>() + opened.validation.per_epoch(), 5);
    for part in [
        "1 that could not be read: not a readable image",
        "white/0.png",
        "1 that end in .heic",
        "1 in no folder of a class",
    ] {
        assert!(opened.notes[0].contains(part), "no {part} in {:?}", opened.notes);
    }
    let wavs = format!(r#"{{"wav_folder":{{"path": "{path}", "sample_rate": 8000}}}}"#);
    let error = refused(&wavs);
    assert!(error.contains("white/0.wav: not a WAV file") && error.contains("on_bad_file"), "{error}");
    assert!(skipping(&wavs).notes[0].contains("white/0.wav"));
}

#[test]
fn a_set_of_one_class_is_refused_with_that_class() {
    let dir = tempfile::tempdir().unwrap();
    let open = |json: String| refused(&json);
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(dir.path().join(name), bytes).unwrap();
        dir.path().join(name).display().to_string()
    };
    let path = write("t.csv", b"0,1,3\n1,0,3\n1,1,3\n");
    let error = open(format!(r#"{{"csv_images":{{"paths": ["{path}"], "size": [1, 2]}}}}"#));
    assert!(error.contains("one class (\"3\")") && error.contains("data.csv_images.label"), "{error}");
    let path = write("t.jsonl", b"{\"text\": \"a\", \"label\": \"good\"}\n{\"text\": \"b\", \"label\": \"good\"}\n");
    let error = open(format!(r#"{{"labelled_text":{{"paths": ["{path}"]}}}}"#));
    assert!(error.contains("one class (\"good\")") && error.contains("label_field"), "{error}");
    let images = write("i", &[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 7, 9]);
    let labels = write("l", &[0, 0, 8, 1, 0, 0, 0, 2, 0, 0]);
    assert!(open(format!(r#"{{"idx":{{"images": "{images}", "labels": "{labels}"}}}}"#)).contains("one class (\"0\")"));
    std::fs::create_dir(dir.path().join("only")).unwrap();
    let folder = dir.path().display();
    for (table, more) in [("image_folder", "\"size\": [2, 2]"), ("wav_folder", "\"sample_rate\": 8000")] {
        let error = open(format!(r#"{{"{table}":{{"path": "{folder}", {more}}}}}"#));
        assert!(error.contains("two are needed (found: \"only\")"), "{error}");
    }
}

#[test]
fn a_packed_file_is_read_as_far_as_its_header_promises() {
    let dir = tempfile::tempdir().unwrap();
    write_idx(dir.path(), 10);
    let mut endless = vec![0, 0, 8, 3, 0, 0, 0, 10, 0, 0, 0, 2, 0, 0, 0, 3];
    endless.resize(16 << 20, 0);
    std::fs::write(dir.path().join("images.gz"), gzip(endless)).unwrap();
    let error = refused(&idx_json(dir.path()));
    assert!(error.contains("images.gz: more than 60 bytes behind the header"), "{error}");
    let header = [0, 0, 8, 3, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 1];
    std::fs::write(dir.path().join("images.gz"), header).unwrap();
    let error = refused(&idx_json(dir.path()));
    assert!(error.contains("images.gz: its header promises"), "{error}");
}

#[test]
fn a_shortcut_holds_for_its_share_and_misleads_the_others() {
    let open = |share: f64| {
        plain(&format!(
            r#"{{"shapes":{{"n_classes": 4, "size": 8, "radius": 0.3, "clutter": 0, "noise": 0, "shortcut": {share}}}}}"#
        ))
    };
    let opened = open(0.75);
    assert_eq!(opened.groups, ["the shortcut holds", "the shortcut misleads"]);
    let mut misled = 0;
    for batch in (0..100).map(|at| opened.train.batch(at).unwrap()) {
        for (row, (&label, &group)) in numbers(&batch).chunks(64).zip(batch.labels.iter().zip(&batch.groups)) {
            let ground = row.iter().copied().fold(f32::MAX, f32::min);
            let shown = (ground / -0.8 * 3.0).round() as u32;
            assert_eq!(shown != label, group == 1, "{ground} of class {label}");
            misled += group;
        }
    }
    assert!((70..130).contains(&misled), "a quarter of 400: {misled}");
    assert!(open(1.0).train.batch(3).unwrap().groups.iter().all(|&group| group == 0));
}

#[test]
fn labelled_texts_are_padded_to_the_longest_of_a_batch() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("texts.jsonl");
    let line = |i: usize| format!(r#"{{"text": "{}", "label": {}}}"#, "ab".repeat(i), [10, 9][i % 2]);
    std::fs::write(&path, (1..=10).map(line).collect::<Vec<_>>().join("\n")).unwrap();
    let json = format!(r#"{{"labelled_text":{{"paths": ["{}"]}}}}"#, path.display());
    let opened = plain(&json);
    assert_eq!(opened.classes, ["9", "10"], "numbers by their size");
    assert!(opened.description.contains("4 cut to 12 tokens"), "{}", opened.description);
    for at in 0..4 {
        let batch = opened.train.batch(at).unwrap();
        let Inputs::Tokens { tokens, lengths, seq_len } = &batch.inputs else { panic!() };
        assert_eq!((tokens.len(), Some(*seq_len as u32)), (4 * seq_len, lengths.iter().copied().max()));
        for (row, (&length, &label)) in tokens.chunks(*seq_len).zip(lengths.iter().zip(&batch.labels)) {
            assert!(row[length as usize..].iter().all(|&id| id == 0) && row[0] == u32::from(b'a'));
            assert!(length == 12 || label == 1 - length / 2 % 2, "{length} {label}");
        }
    }
    assert!(opened.groups.is_empty() && opened.train.batch(0).unwrap().groups == [0; 4]);
    // The label as the group, too.
    let grouped = format!(r#"{{"labelled_text":{{"paths": ["{}"], "group_field": "label"}}}}"#, path.display());
    let opened = plain(&grouped);
    let batch = opened.train.batch(0).unwrap();
    assert_eq!(
        (opened.groups.as_slice(), &batch.groups),
        (["9".to_owned(), "10".to_owned()].as_slice(), &batch.labels)
    );
    let grouped = grouped.replace("\"group_field\": \"label\"", "\"group_field\": \"who\"");
    let error = refused(&grouped);
    assert!(error.contains("texts.jsonl:1: no group in field \"who\"") && error.contains("group_field"), "{error}");
    std::fs::write(&path, "{\"text\": \"a\", \"label\": 0.5}\n").unwrap();
    let error = refused(&json);
    assert!(error.contains("texts.jsonl:1") && error.contains("label_field"), "{error}");
}
