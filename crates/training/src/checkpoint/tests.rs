#![allow(clippy::unwrap_used)]
use super::draft::{Stage, utc};
use super::*;
use crate::run_folder::files::OPTIMIZER;
use serde_json::json;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};

const NAMES: [&str; 3] = ["model.safetensors", "optimizer.safetensors", "state.json"];

/// The contents of a file; `edition` tells the old from the new checkpoint of one step.
fn contents(name: &str, step: u64, edition: u64) -> Vec<u8> {
    let mut bytes = format!("{name} {step} {edition} ").into_bytes();
    bytes.extend((0..1000 + step % 1000).map(|i| (i * (step + edition + 1) % 251) as u8));
    bytes
}

fn draft(run: &Path, step: u64, edition: u64) -> Draft {
    let mut draft = Draft::begin(run, step).unwrap();
    for name in &NAMES[..2] {
        draft.file(name, &contents(name, step, edition)).unwrap();
    }
    // The third as somebody else would write it.
    let path = draft.path(NAMES[2]).unwrap();
    fs::write(path, contents(NAMES[2], step, edition)).unwrap();
    draft
}

fn save(run: &Path, step: u64) -> PathBuf {
    draft(run, step, 0).commit(json!({"loss": 1.25})).unwrap()
}

/// The step of the newest good checkpoint and which edition it is; all its files must agree.
fn newest(run: &Path) -> Option<(u64, u64)> {
    let (path, manifest) = newest_good(run).unwrap().0?;
    let step = manifest.step;
    let is_edition =
        |edition: &u64| NAMES.iter().all(|name| read_file(&path, name).unwrap() == contents(name, step, *edition));
    Some((step, (0..1000).find(is_edition).expect("a mixture of editions")))
}

fn names_in(run: &Path) -> Vec<String> {
    let entries = fs::read_dir(run).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            fs::copy(path, target).unwrap();
        }
    }
}

#[test]
fn what_is_committed_is_found_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    assert!(list(&run).unwrap().is_empty());
    assert!(newest_good(&run).unwrap().0.is_none());
    for step in [1000, 90, 123_456_789] {
        save(&run, step);
    }
    let steps: Vec<_> = list(&run).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [90, 1000, 123_456_789]);
    assert!(run.join("step-00001000/manifest.json").exists());

    let (found, skipped) = newest_good(&run).unwrap();
    let (path, manifest) = found.unwrap();
    assert!(skipped.is_empty());
    assert_eq!(path, run.join("step-123456789"));
    assert_eq!(manifest.info, json!({"loss": 1.25}));
    assert_eq!(manifest.polyhead_version, env!("CARGO_PKG_VERSION"));
    let names: Vec<_> = manifest.files.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names, NAMES);
    for file in &manifest.files {
        let bytes = read_file(&path, &file.name).unwrap();
        assert_eq!(bytes, contents(&file.name, manifest.step, 0));
        assert_eq!(blake3::hash(&bytes).to_string(), file.blake3);
    }
    let message = read_file(&path, "recipe.toml").unwrap_err().to_string();
    assert!(message.contains("recipe.toml") && message.contains("state.json"), "{message}");
}

#[test]
fn each_way_to_damage_each_file_is_told_by_name_and_the_older_checkpoint_is_taken() {
    let source = tempfile::tempdir().unwrap();
    save(source.path(), 1);
    save(source.path(), 2);
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 4] = [
        ("truncated: ", |path| {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
        }),
        ("altered: its hash differs", |path| {
            let mut bytes = fs::read(path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(path, bytes).unwrap();
        }),
        ("altered: ", |path| {
            let mut bytes = fs::read(path).unwrap();
            bytes.push(0);
            fs::write(path, bytes).unwrap();
        }),
        ("missing", |path| fs::remove_file(path).unwrap()),
    ];
    for name in NAMES.iter().chain(&[MANIFEST]) {
        for (expected, damage) in damages {
            let dir = tempfile::tempdir().unwrap();
            copy_folder(source.path(), dir.path());
            damage(&dir.path().join("step-00000002").join(name));
            let (found, skipped) = newest_good(dir.path()).unwrap();
            assert_eq!(found.unwrap().1.step, 1);
            assert_eq!(skipped.len(), 1);
            let message = skipped[0].to_string();
            assert!(message.contains(name), "{message}");
            assert!(message.contains("step-00000002"), "{message}");
            if *name != MANIFEST {
                assert!(message.contains(expected), "{expected}: {message}");
                assert!(read_file(&dir.path().join("step-00000002"), name).is_err());
            }
        }
    }
}

#[test]
fn a_truncated_file_tells_how_much_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(dir.path(), 1).join("state.json");
    let length = fs::metadata(&path).unwrap().len();
    fs::write(&path, [0; 10]).unwrap();
    let message = newest_good(dir.path()).unwrap().1[0].to_string();
    assert!(message.ends_with(&format!("truncated: 10 of {length} bytes")), "{message}");
}

#[test]
fn every_byte_of_the_manifest_counts() {
    let dir = tempfile::tempdir().unwrap();
    let folder = save(dir.path(), 1);
    let path = folder.join(MANIFEST);
    let bytes = fs::read(&path).unwrap();
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        fs::write(&path, flipped).unwrap();
        assert!(verify(&folder).is_err(), "byte {at}");
    }
    for length in 0..bytes.len() {
        fs::write(&path, &bytes[..length]).unwrap();
        assert!(verify(&folder).is_err(), "length {length}");
    }
    fs::write(&path, &bytes).unwrap();
    verify(&folder).unwrap();
}

#[test]
fn sealed_manifests_of_another_version_or_step_or_with_paths_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let folder = save(dir.path(), 1);
    let good = verify(&folder).unwrap();
    let refused = |manifest: Manifest| {
        fs::write(folder.join(MANIFEST), verify::seal(&manifest)).unwrap();
        verify(&folder).unwrap_err()
    };
    let newer = Manifest { format_version: 2, ..good.clone() };
    assert!(matches!(refused(newer), CheckpointError::Format { found: 2, .. }));
    let renamed = Manifest { step: 2, ..good.clone() };
    assert!(matches!(refused(renamed), CheckpointError::WrongStep { found: 2, .. }));
    let mut escaping = good.clone();
    escaping.files[0].name = "../step-00000001/state.json".into();
    assert!(matches!(refused(escaping), CheckpointError::BadManifest { .. }));
    // What a person does: copy a checkpoint under a name of their own.
    fs::write(folder.join(MANIFEST), verify::seal(&good)).unwrap();
    copy_folder(&folder, &dir.path().join("my favourite"));
    assert_eq!(verify(&dir.path().join("my favourite")).unwrap(), good);
}

#[test]
fn a_kill_at_any_stage_leaves_the_old_or_the_new_state() {
    for replaces in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (run, snapshots) = (dir.path().join("run"), dir.path().join("snapshots"));
        save(&run, 1);
        if replaces {
            save(&run, 2);
        }
        let (old, new) = (if replaces { (2, 0) } else { (1, 0) }, (2, 7));
        // The folder is copied at each stage: that is what a kill there would leave.
        let check = |stage: &str, expected: (u64, u64)| {
            let copy = snapshots.join(stage);
            copy_folder(&run, &copy);
            assert_eq!(newest(&copy), Some(expected), "{stage}");
            clean_leftovers(&copy).unwrap();
            assert_eq!(newest(&copy), Some(expected), "{stage}, cleaned");
            let hidden = names_in(&copy).into_iter().filter(|name| name.starts_with('.'));
            assert_eq!(hidden.count(), 0, "{stage}");
            // The resumed run saves this step again, and then the next.
            draft(&copy, 2, 9).commit(json!({})).unwrap();
            assert_eq!(newest(&copy), Some((2, 9)));
            save(&copy, 3);
            assert_eq!(newest(&copy), Some((3, 0)));
        };
        let mut draft = Draft::begin(&run, 2).unwrap();
        check("begun", old);
        for name in NAMES {
            let bytes = contents(name, 2, 7);
            let path = draft.path(name).unwrap();
            fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
            check(&format!("half of {name}"), old);
            draft.file(name, &bytes).unwrap();
            check(&format!("all of {name}"), old);
        }
        let mut stages = Vec::new();
        draft
            .commit_watched(json!({}), &mut |stage| {
                stages.push(stage);
                let renamed = matches!(stage, Stage::Renamed | Stage::OldRemoved);
                check(&format!("{stage:?}"), if renamed { new } else { old });
            })
            .unwrap();
        assert_eq!(stages.len(), 5);
        let expected = ["step-00000001", "step-00000002"];
        assert_eq!(names_in(&run), expected);
    }
}

/// What the process does that the test below kills: the same test, told a folder.
fn save_as_child(run: PathBuf) {
    let first: u64 = std::env::var("POLYHEAD_TEST_FIRST").unwrap().parse().unwrap();
    clean_leftovers(&run).unwrap();
    for edition in first.. {
        // Steps are saved twice, so that kills hit replacements as well.
        draft(&run, edition / 2, edition).commit(json!({})).unwrap();
        println!("saved {edition}");
        prune(&run, 2, &[], None).unwrap();
    }
}

#[test]
fn processes_killed_at_random_moments_lose_nothing_that_was_saved() {
    if let Ok(run) = std::env::var("POLYHEAD_TEST_SAVES") {
        return save_as_child(run.into());
    }
    let dir = tempfile::tempdir().unwrap();
    let mut saved = 0;
    for round in 0..30u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["checkpoint::tests::processes_killed_at_random_moments_lose_nothing_that_was_saved", "--exact"])
            .arg("--nocapture")
            .env("POLYHEAD_TEST_SAVES", dir.path())
            .env("POLYHEAD_TEST_FIRST", (saved + 1).to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut told = |line: String| {
            // The test harness may put its own words before ours on the first line.
            if let Some((_, edition)) = line.split_once("saved ") {
                saved = edition.parse().unwrap();
            }
        };
        while let Some(Ok(line)) = lines.next() {
            let ours = line.contains("saved ");
            told(line);
            if ours {
                break;
            }
        }
        std::thread::sleep(Duration::from_micros(round * 1777 % 12_000));
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        lines.map_while(Result::ok).for_each(&mut told);
        assert!(saved > 0, "the child saved nothing");
        let (step, edition) = newest(dir.path()).unwrap();
        // The save after the last one told may have succeeded without a word.
        assert!((saved..=saved + 1).contains(&edition), "{edition}, {saved} was told");
        assert_eq!(step, edition / 2);
        saved = edition;
    }
}

#[test]
fn pruning_keeps_the_latest_the_best_the_named_and_the_last_good() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path();
    let steps = || -> Vec<u64> { list(run).unwrap().into_iter().map(|(s, _)| s).collect() };
    for step in 1..=8 {
        save(run, step);
    }
    assert!(prune(run, 0, &[], None).unwrap().is_empty());
    assert!(prune(run, 8, &[], None).unwrap().is_empty());
    let best = Best { step: 2, validation_loss: 1.5 };
    write_best(run, &best).unwrap();
    let named = run.join(".").join("step-00000004");
    let removed = prune(run, 3, &[named], None).unwrap();
    assert_eq!(removed, [1, 3, 5].map(|step| run.join(folder_name(step))));
    assert_eq!(steps(), [2, 4, 6, 7, 8]);
    for step in [7, 8] {
        fs::write(run.join(folder_name(step)).join("state.json"), "").unwrap();
    }
    prune(run, 2, &[], None).unwrap();
    assert_eq!(steps(), [2, 6, 7, 8]);
    prune(run, 1, &[], None).unwrap();
    assert_eq!(steps(), [2, 6, 8]);
    assert_eq!(newest(run), Some((6, 0)));
    assert_eq!(discard_after(run, 6).unwrap(), [run.join(folder_name(8))]);
    let expected = ["best.json", "step-00000002", "step-00000006"];
    assert_eq!(names_in(run), expected);
}

#[test]
fn what_somebody_reads_is_pruned_once_they_have_read_it() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path();
    for step in 1..=4 {
        save(run, step);
    }
    let held = [1, 2].map(|step| hold(&run.join(folder_name(step))).unwrap());
    let twice = hold(&run.join(folder_name(1))).unwrap();
    assert_eq!(prune(run, 1, &[], None).unwrap(), [run.join(folder_name(3))]);
    drop(held);
    assert_eq!(prune(run, 1, &[], None).unwrap(), [run.join(folder_name(2))]);
    drop(twice);
    assert_eq!(prune(run, 1, &[], None).unwrap(), [run.join(folder_name(1))]);
    assert!(hold(&run.join(folder_name(1))).is_none());
}

#[test]
fn every_checkpoint_says_which_step_is_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path();
    let score = |step: u64, loss: f64| Some(Best { step, validation_loss: loss });
    let third = f64::from_bits(0x3ff5_5555_5555_5555);
    for (step, loss, best) in [(1, 2.5, score(1, 2.5)), (2, third, score(2, third)), (3, 2.0, score(2, third))] {
        draft(run, step, 0).commit(info(0, score(step, loss), best)).unwrap();
    }
    let recovered = |step| {
        let (best, notes) = recover_best(run, step).unwrap();
        assert_eq!(read_best(run).unwrap(), best);
        (best, notes.len())
    };
    // No marker; a damaged one; one of a later step than the run goes on from.
    assert_eq!(recovered(3), (score(2, third), 0));
    fs::write(run.join("best.json"), "{\"step\": 2").unwrap();
    assert_eq!(recovered(3), (score(2, third), 1));
    assert_eq!(recovered(1), (score(1, 2.5), 0));
    assert_eq!(recovered(3), (score(2, third), 0));
    // Pruning goes by what the newest checkpoint says, whatever the marker says.
    fs::remove_file(run.join("best.json")).unwrap();
    prune(run, 1, &[], None).unwrap();
    assert_eq!(list(run).unwrap().into_iter().map(|(step, _)| step).collect::<Vec<_>>(), [2, 3]);
    fs::remove_dir_all(run.join(folder_name(2))).unwrap();
    assert_eq!(recovered(3), (score(3, 2.0), 1));
}

#[test]
fn leftovers_go_and_everything_else_stays() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path();
    save(run, 3);
    copy_folder(&run.join("step-00000003"), &run.join(".tmp-step-00000004"));
    copy_folder(&run.join("step-00000003"), &run.join(".trash-step-00000002"));
    fs::write(run.join(".tmp-123-0"), "half a file").unwrap();
    let others = [".lock", "metrics.jsonl", "step-3", "step-abc", "notes.tmp-"];
    for name in others {
        fs::write(run.join(name), "").unwrap();
    }
    assert_eq!(list(run).unwrap().len(), 1);
    assert_eq!(clean_leftovers(run).unwrap().len(), 3);
    let mut expected = others.map(String::from).to_vec();
    expected.push("step-00000003".into());
    expected.sort();
    assert_eq!(names_in(run), expected);
}

#[test]
fn a_draft_that_fails_or_is_dropped_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    drop(draft(dir.path(), 1, 0));
    let mut promised = draft(dir.path(), 1, 0);
    promised.path("tokenizer.json").unwrap();
    let message = promised.commit(json!({})).unwrap_err().to_string();
    assert!(message.contains("tokenizer.json"), "{message}");
    assert!(names_in(dir.path()).is_empty());
    let mut draft = Draft::begin(dir.path(), 1).unwrap();
    for name in ["", ".", "..", "a/b", "../a", "a\\b", "C:", MANIFEST, ".lock", "a\nb"] {
        let refused = draft.file(name, b"").unwrap_err();
        assert!(matches!(refused, CheckpointError::BadName { .. }), "{name}");
    }
}

#[test]
fn best_comes_back_to_the_last_bit() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(read_best(dir.path()).unwrap(), None);
    let mut bits = 0x3ff5_5555_5555_5555u64;
    for step in 0..40 {
        bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(step) % (0x7fe << 52);
        let best = Best { step, validation_loss: f64::from_bits(bits) };
        write_best(dir.path(), &best).unwrap();
        let found = read_best(dir.path()).unwrap().unwrap();
        assert_eq!((found.step, found.validation_loss.to_bits()), (step, bits));
    }
    assert_eq!(info(7, None, None), json!({ "targets": 7 }));
    let nan = Best { step: 1, validation_loss: f64::NAN };
    assert!(matches!(write_best(dir.path(), &nan), Err(CheckpointError::BadLoss { .. })));
    fs::write(dir.path().join("best.json"), "{").unwrap();
    let message = read_best(dir.path()).unwrap_err().to_string();
    assert!(message.contains("best.json"), "{message}");
}

#[test]
fn moments_are_written_as_rfc_3339() {
    for (seconds, expected) in [
        (0, "1970-01-01T00:00:00Z"),
        (951_782_399, "2000-02-28T23:59:59Z"),
        (951_782_400, "2000-02-29T00:00:00Z"),
        (1_704_067_199, "2023-12-31T23:59:59Z"),
        (4_107_542_400, "2100-03-01T00:00:00Z"),
    ] {
        assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
    }
}

#[test]
fn what_was_hashed_is_hashed_again_only_when_it_has_changed() {
    let dir = tempfile::tempdir().unwrap();
    let folder = save(dir.path(), 1);
    verify(&folder).unwrap();
    // Once its time of change tells changes.
    std::thread::sleep(std::time::Duration::from_millis(2100));
    (0..2).for_each(|_| drop(verify(&folder).unwrap()));
    let file = folder.join("state.json");
    let mut bytes = fs::read(&file).unwrap();
    bytes[0] ^= 1;
    fs::write(&file, &bytes).unwrap();
    assert!(verify(&folder).unwrap_err().to_string().contains("its hash differs"));
    bytes[0] ^= 1;
    fs::write(&file, &bytes).unwrap();
    verify(&folder).unwrap();
}

#[test]
fn a_model_is_usable_whatever_the_optimizers_state_holds_but_not_without_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut draft = Draft::begin(dir.path(), 1).unwrap();
    for name in ["model.safetensors", OPTIMIZER] {
        draft.file(name, name.as_bytes()).unwrap();
    }
    let folder = draft.commit(serde_json::Value::Null).unwrap();
    fs::write(folder.join(OPTIMIZER), OPTIMIZER.to_uppercase()).unwrap();
    assert!(verify(&folder).is_err() && newest_good(dir.path()).unwrap().0.is_none());
    assert_eq!(verify_usable(&folder).unwrap(), newest_usable(dir.path()).unwrap().0.unwrap().1);
    fs::write(folder.join(OPTIMIZER), "short").unwrap();
    assert!(verify_usable(&folder).is_err());
    fs::remove_file(folder.join(OPTIMIZER)).unwrap();
    assert!(verify_usable(&folder).is_err());
}
