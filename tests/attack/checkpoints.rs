//! Damaged checkpoints: every damage is found and the file named, nothing damaged is used, and a run goes on from an older whole
//! checkpoint to the same end.

use std::collections::BTreeMap;
use std::path::Path;

use crate::case::{Case, Held, How, Tried, ensure};
use crate::runs::Whole;
use crate::{Kind, mutate, runs};

/// Steps of the runs that are damaged.
const STEPS: u64 = 8;

/// Runs whose files are cut, flipped, emptied, removed, or exchanged.
#[derive(Default)]
pub struct Checkpoints {
    wholes: Vec<Whole>,
}

impl Kind for Checkpoints {
    fn name(&self) -> &'static str {
        "checkpoints"
    }

    fn prepare(&mut self, case: &mut Case) -> Held {
        for recipe in runs::recipes(STEPS) {
            self.wholes.push(Whole::train(case, recipe, &How::default(), &TRAIN)?);
        }
        Ok(())
    }

    fn attack(&mut self, case: &mut Case) -> Held<Tried> {
        let whole = &self.wholes[case.random.below(self.wholes.len())];
        runs::copy_folder(&whole.run, &case.dir.join("run"))?;
        runs::lay_out(case, &whole.recipe)?;
        match case.random.below(6) {
            0 => beside(case, whole)?,
            1 => all(case)?,
            _ => newest(case, whole)?,
        }
        Ok(Tried::Held)
    }
}

const TRAIN: [&str; 5] = ["train", "recipe.toml", "checkpoint.keep_latest_k=0", "--out", "run"];

/// One file of the newest checkpoint is damaged: told by name; the one before is used.
fn newest(case: &mut Case, whole: &Whole) -> Held {
    let steps = runs::checkpoints(&case.dir.join("run"))?;
    let last = format!("run/{}", steps.last().cloned().unwrap_or_default());
    let is_decoder = whole.name != "classifier";
    let Some(name) = damage(case, &last)? else { return Ok(()) };
    // Asked for by its own name it is refused; the run falls back, and says so.
    let file = name.rsplit('/').next().unwrap_or_default().to_owned();
    let named = |err: &str| err.contains(&file) || err.contains("manifest.json");
    let mut questions = vec![vec!["eval", "PATH"], vec!["inspect", "PATH"]];
    if is_decoder {
        questions.push(vec!["generate", "PATH", "--prompt", "the", "--max-new-tokens", "2"]);
        questions.push(vec!["logits", "PATH", "--tokens", "1", "--out", "l.safetensors"]);
    }
    let question = case.random.pick(&questions).clone();
    let ask = |path: &str| question.iter().map(|word| word.replace("PATH", path)).collect::<Vec<_>>();
    let direct = ask(&last);
    let answer = case.run(&[1, 2], &direct.iter().map(String::as_str).collect::<Vec<_>>())?;
    ensure!(named(&answer.err), "{name} is not named: {}", answer.err);
    let of_run = ask("run");
    // The classifiers here have nothing to inspect.
    let codes: &[i32] = if question[0] == "inspect" && !is_decoder { &[2] } else { &[0] };
    let answer = case.run(codes, &of_run.iter().map(String::as_str).collect::<Vec<_>>())?;
    ensure!(named(&answer.err), "{name} is not named: {}", answer.err);
    let answer = case.run(&[0], &TRAIN)?;
    ensure!(named(&answer.err) && answer.err.contains("resume: from"), "{name} is not told: {}", answer.err);
    whole.equals(&case.dir.join("run"), &format!("after damage of {name}"))
}

/// Every checkpoint is damaged: refused, and nothing is written over.
fn all(case: &mut Case) -> Held {
    let run = case.dir.join("run");
    let steps = runs::checkpoints(&run)?;
    for step in &steps {
        if damage(case, &format!("run/{step}"))?.is_none() {
            return Ok(());
        }
    }
    let answer = case.run(&[1], &TRAIN)?;
    ensure!(answer.err.contains("damaged"), "not told: {}", answer.err);
    ensure!(runs::checkpoints(&run)? == steps, "checkpoints are gone");
    case.run(&[1, 2], &["eval", "run"]).map(drop)
}

/// Files of the run folder itself: mended, or refused with their name and a way out.
fn beside(case: &mut Case, whole: &Whole) -> Held {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(case.dir.join("run"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        names.extend((entry.file_type()?.is_file() && name != ".lock").then_some(name));
    }
    names.sort();
    let name = case.random.pick(&names).clone();
    let path = case.dir.join("run").join(&name);
    let good = std::fs::read(&path)?;
    let bad = mutate::bytes(&mut case.random, &good);
    case.note(&format!("run/{name} is damaged"));
    std::fs::write(&path, &bad)?;
    case.run(&[0, 1, 2], &["diff", "run", "run"])?;
    case.run(&[0, 1, 2], &["inspect", "run"])?;
    let answer = case.run(&[0, 1], &TRAIN)?;
    if answer.code == Some(1) {
        ensure!(answer.err.contains(&name), "run/{name} is not named: {}", answer.err);
        return Ok(());
    }
    // Lines of the log that were lost are lost; the weights are what they were.
    let is_of_weights = |key: &String| !["metrics.jsonl", "tfevents"].iter().any(|log| key.starts_with(log));
    let parts = |found: BTreeMap<String, String>| found.into_iter().filter(|(key, _)| is_of_weights(key)).collect();
    if name == "best.json" {
        return Ok(());
    }
    let now = runs::fingerprint(&case.dir.join("run"))?;
    runs::same(&parts(whole.fingerprint.clone()), &parts(now), &format!("after damage of run/{name}"))
}

/// Damages one file of a checkpoint and gives its path, or `None` where it became what it was.
fn damage(case: &mut Case, checkpoint: &str) -> Held<Option<String>> {
    let folder = case.dir.join(checkpoint);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&folder)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    let name = case.random.pick(&names).clone();
    let path = folder.join(&name);
    let good = std::fs::read(&path)?;
    let random = &mut case.random;
    let (what, changed) = match random.below(8) {
        0 => ("removed", std::fs::remove_file(&path).map(|()| true)),
        1 => ("emptied", std::fs::write(&path, []).map(|()| !good.is_empty())),
        2 => ("cut", std::fs::write(&path, &good[..random.below(good.len())]).map(|()| true)),
        3 => ("lengthened", std::fs::write(&path, [&good[..], &[random.byte()]].concat()).map(|()| true)),
        4 => ("a folder", exchange(&path)),
        5 => {
            let mut bytes = good.clone();
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
            ("flipped in a bit", std::fs::write(&path, bytes).map(|()| true))
        }
        6 => ("zeros", std::fs::write(&path, vec![0; good.len()]).map(|()| true)),
        _ => {
            let bytes = mutate::bytes(random, &good);
            ("changed", std::fs::write(&path, &bytes).map(|()| bytes != good))
        }
    };
    let changed = changed?;
    case.note(&format!("{checkpoint}/{name} is {what}"));
    Ok(changed.then(|| format!("{checkpoint}/{name}")))
}

/// A folder where a file was.
fn exchange(path: &Path) -> std::io::Result<bool> {
    std::fs::remove_file(path)?;
    std::fs::create_dir(path)?;
    Ok(true)
}
