#![allow(clippy::unwrap_used)]
use super::*;
use crate::image::{Options, heat_map};
use std::collections::BTreeMap;

/// All tagged events of a folder, in the order in which TensorBoard reads them.
fn read_folder(dir: &Path) -> Vec<Event> {
    let mut paths: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().contains("tfevents"))
        .collect();
    paths.sort();
    let events = paths.iter().flat_map(|path| read_events(path).unwrap());
    events.filter(|event| !event.tag.is_empty()).collect()
}

fn write_steps(dir: &Path, purge_after: Option<u64>, steps: std::ops::RangeInclusive<u64>) {
    let mut writer = EventWriter::create(dir, purge_after).unwrap();
    for step in steps {
        writer.scalar("loss/train", step, step as f32).unwrap();
        writer.histogram("weights", step, &[1.0, 2.0]).unwrap();
    }
}

fn assert_each_once(dir: &Path, steps: std::ops::RangeInclusive<u64>) {
    let mut seen = BTreeMap::new();
    for event in read_folder(dir) {
        *seen.entry((event.tag, event.step)).or_insert(0) += 1;
    }
    let expected: BTreeMap<_, _> = ["loss/train", "weights"]
        .iter()
        .flat_map(|tag| steps.clone().map(|step| ((tag.to_string(), step), 1)))
        .collect();
    assert_eq!(seen, expected);
}

#[test]
fn every_kind_comes_back_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let image = heat_map(&[0.0, 0.5, 1.0, 0.25, 0.1, 0.9], 2, 3, &Options::default()).unwrap();
    let before = now();
    let mut writer = EventWriter::create(dir.path(), None).unwrap();
    writer.scalar("loss/train", 7, 2.5).unwrap();
    writer.scalar("loss/train", 1 << 40, f32::NAN).unwrap();
    let values = [-1.0, 0.0, 0.5, 0.5, 3.0, f32::NAN, f32::INFINITY];
    assert_eq!(writer.histogram("weights", 7, &values).unwrap(), 2);
    writer.text("recipe", 0, "# Überschrift\n|a|b|").unwrap();
    writer.image_png("attention", 7, image.width, image.height, &image.bytes).unwrap();
    drop(writer);

    let events = read_folder(dir.path());
    let keys: Vec<_> = events.iter().map(|e| (e.tag.as_str(), e.step)).collect();
    let expected = [
        ("loss/train", 7),
        ("loss/train", 1 << 40),
        ("weights", 7),
        ("weights/non_finite", 7),
        ("recipe", 0),
        ("attention", 7),
    ];
    assert_eq!(keys, expected);
    for event in &events {
        assert!((before..=now()).contains(&event.wall_time));
    }
    assert_eq!(events[0].value, EventValue::Scalar(2.5));
    assert!(matches!(events[1].value, EventValue::Scalar(v) if v.is_nan()));
    let EventValue::Histogram { min, max, num, sum, sum_squares, limits, counts } = &events[2].value else {
        panic!("{:?}", events[2]);
    };
    assert_eq!((*min, *max, *num), (-1.0, 3.0, 5.0));
    assert_eq!((*sum, *sum_squares), (3.0, 10.5));
    assert_eq!(counts.iter().sum::<f64>(), 5.0);
    assert_eq!(limits.len(), counts.len());
    assert_eq!(events[3].value, EventValue::Scalar(2.0));
    let text = EventValue::Text("# Überschrift\n|a|b|".into());
    assert_eq!(events[4].value, text);
    let image = EventValue::Image { width: u64::from(image.width), height: u64::from(image.height), png: image.bytes };
    assert_eq!(events[5].value, image);
}

#[test]
fn resuming_leaves_each_step_once_however_often_it_happens() {
    let dir = tempfile::tempdir().unwrap();
    write_steps(dir.path(), None, 1..=10);
    write_steps(dir.path(), Some(6), 7..=20);
    assert_each_once(dir.path(), 1..=20);
    write_steps(dir.path(), Some(3), 4..=5);
    assert_each_once(dir.path(), 1..=5);
    // Only the files of steps 1..=3 and 4..=5 are left.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    write_steps(dir.path(), None, 1..=2);
    assert_each_once(dir.path(), 1..=2);
}

#[test]
fn resuming_after_a_kill_inside_any_byte_of_a_record_drops_only_that_record() {
    let source = tempfile::tempdir().unwrap();
    write_steps(source.path(), None, 1..=3);
    let file = fs::read_dir(source.path()).unwrap().next().unwrap();
    let path = file.unwrap().path();
    let bytes = fs::read(&path).unwrap();
    let header = 12 + bytes[0] as usize + 4; // the file version
    for cut in header..bytes.len() {
        let dir = tempfile::tempdir().unwrap();
        let torn = dir.path().join(path.file_name().unwrap());
        fs::write(&torn, &bytes[..cut]).unwrap();
        let before = read_folder(dir.path());
        let mut writer = EventWriter::create(dir.path(), Some(3)).unwrap();
        writer.scalar("loss/train", 4, 4.0).unwrap();
        drop(writer);
        let after = read_folder(dir.path());
        assert_eq!(after[..after.len() - 1], before, "cut at {cut}");
        if torn.exists() {
            let mut reader = fs::File::open(&torn).unwrap();
            while let record::Next::Record(_) = record::next(&mut reader).unwrap() {}
            assert_eq!(record::next(&mut reader).unwrap(), record::Next::End);
        }
    }
}

#[test]
fn an_altered_record_is_dropped_and_the_others_stay() {
    let dir = tempfile::tempdir().unwrap();
    write_steps(dir.path(), None, 1..=3);
    let path = fs::read_dir(dir.path()).unwrap().next().unwrap();
    let path = path.unwrap().path();
    let mut bytes = fs::read(&path).unwrap();
    let tag = b"loss/train";
    let at = bytes.windows(tag.len()).position(|part| part == tag).unwrap();
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
    write_steps(dir.path(), Some(3), 4..=4);
    let events = read_folder(dir.path());
    assert!(!events.iter().any(|e| e.tag == tag.escape_ascii().to_string() && e.step == 1));
    assert_eq!(events.len(), 2 * 4 - 1);
}

#[test]
fn the_new_file_begins_with_a_session_start_and_sorts_last() {
    let dir = tempfile::tempdir().unwrap();
    // A file "from the future", as after the clock was set back.
    let future = dir.path().join("events.out.tfevents.4000000000.host.1");
    write_steps(dir.path(), None, 1..=1);
    let first = fs::read_dir(dir.path()).unwrap().next().unwrap();
    fs::rename(first.unwrap().path(), &future).unwrap();
    let writer = EventWriter::create(dir.path(), Some(1)).unwrap();
    assert!(writer.path() > future.as_path());
    let events = read_events(writer.path()).unwrap();
    let version = EventValue::FileVersion("brain.Event:2".into());
    assert_eq!(events[0].value, version);
    assert_eq!((events[1].step, &events[1].value), (2, &EventValue::SessionStart));
}

#[test]
fn pending_events_reach_the_file_on_flush() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = EventWriter::create(dir.path(), None).unwrap();
    writer.scalar("loss/train", 1, 1.0).unwrap();
    assert_eq!(read_folder(dir.path()).len(), 0);
    writer.flush().unwrap();
    assert_eq!(read_folder(dir.path()).len(), 1);
    writer.text("long", 1, &"x".repeat(BUFFER)).unwrap();
    assert_eq!(read_folder(dir.path()).len(), 2);
}

#[test]
fn a_full_disk_is_an_error_and_tears_nothing() {
    // Linux has a device that is always full; elsewhere there is nothing to test with.
    let Ok(full) = OpenOptions::new().write(true).open("/dev/full") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut writer = EventWriter::create(dir.path(), None).unwrap();
    let file = std::mem::replace(&mut writer.file, full);
    writer.scalar("loss/train", 1, 1.0).unwrap();
    assert!(matches!(writer.flush(), Err(TensorboardError::File(_))));
    writer.file = file;
    writer.flush().unwrap();
    assert_eq!(read_folder(dir.path()).len(), 1);
}

#[test]
fn bad_input_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = EventWriter::create(dir.path(), None).unwrap();
    assert!(writer.scalar("", 1, 1.0).is_err());
    let refused = writer.image_png("maps", 1, 1, 1, b"GIF89a").unwrap_err();
    assert!(refused.to_string().contains("maps"), "{refused}");
    let text = dir.path().join("notes");
    fs::write(&text, "not events, but long enough").unwrap();
    assert!(read_events(&text).is_err());
}

/// The bytes that TensorBoard's own classes write (2.21), behind wall time and step.
#[test]
fn hyperparameters_are_what_tensorboard_writes() {
    let values = [("attention", "softmax".into()), ("tied", true.into()), ("lr", 0.003.into())];
    let values = values.map(|(name, value): (&str, serde_json::Value)| (name.to_owned(), value));
    let written = message::summary(2.5, 0, message::SESSION_START_TAG, message::hyperparameters(&values, 2.5));
    let hex: String = written.iter().map(|byte| format!("{byte:02x}")).collect();
    let theirs = "2a6f0a6d0a1c5f68706172616d735f2f73657373696f6e5f73746172745f696e666f4a4d0a4b0a0768706172616d73\
                  12401a3e0a160a09617474656e74696f6e12091a07736f66746d61780a0a0a0474696564120220010a0f0a026c7212\
                  0911fa7e6abc7493683f290000000000000440";
    assert!(hex.ends_with(theirs), "{hex}");
}

#[test]
fn no_bytes_make_the_decoder_panic() {
    let wholes = [
        message::summary(1.5, 3, "recipe", message::text("lr = 1")),
        message::summary(1.5, 3, "map", message::image(1, 2, b"png")),
        message::summary(1.5, 3, "weights", message::histogram(&histogram::Histogram::of(&[1.0, 2.0]))),
        message::session_start(1.5, 3),
    ];
    for whole in wholes {
        assert_eq!(read::decode_event(&whole).unwrap().len(), 1);
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let _ = read::decode_event(&flipped);
            let _ = read::decode_event(&flipped[..bit / 8]);
        }
    }
}
