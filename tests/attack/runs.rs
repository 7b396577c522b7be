//! Small trainings, and what must be equal between two that are the same run.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::case::{Broken, Case, Held, How};
use crate::events;

/// A decoder of 16 channels on text.
const DECODER: &str = r#"
[model.decoder]
d_model = 16
n_layers = 2
[model.decoder.attention.ATTENTION
[data.text]
paths = ["book.txt"]
[training]
steps = STEPS
seq_len = 16
batch_size = 4
gradient_accumulation_steps = 2
[lr_scheduler]
decay = "constant"
[metrics]
log_freq = 1
[validation]
interval = 4
batches = 2
[checkpoint]
interval = 2
keep_latest_k = 2
"#;

/// A classifier of generated pictures.
const CLASSIFIER: &str = r#"
[model.classifier.vision_transformer]
patch_size = 4
d_model = 16
n_layers = 1
[model.classifier.vision_transformer.attention.softmax]
n_heads = 2
[data.shapes]
size = 8
n_classes = 3
[augmentation]
crop = 1
flip = true
[training]
steps = STEPS
batch_size = 8
[lr_scheduler]
decay = "constant"
[metrics]
log_freq = 1
[validation]
interval = 4
batches = 2
[checkpoint]
interval = 3
keep_latest_k = 1
"#;

/// What follows a decoder's recipe: conversions between trainings.
const STAGES: &str = r#"
[[stage]]
name = "parent"
[[stage]]
name = "search"
convert = { to = "decoupled_head", kv_budget = 0.5, fusing = true }
[[stage]]
name = "fuse"
[stage.recipe.procedure.fusion]
[stage.recipe.training]
steps = 4
[stage.recipe.lr_scheduler]
warmup_steps = 0
decay = "constant"
[[stage]]
name = "collapse"
convert = { to = "decoupled_head" }
[[stage]]
name = "continue"
[stage.recipe.training]
steps = 4
"#;

/// Recipes that differ in what a checkpoint has to hold.
pub fn recipes(steps: u64) -> Vec<(&'static str, String)> {
    let decoder = |attention: &str| DECODER.replace("ATTENTION", attention);
    let softmax = decoder("softmax]\nn_heads = 4\nn_kv_heads = 2");
    let all = [
        ("softmax", softmax.clone()),
        ("grouped", decoder("grouped_differential]\nn_heads = 4\nn_noise_heads = 2")),
        ("routed", decoder("mixture_of_head]\nn_heads = 4\nshared_heads = 2\ntop_k = 1")),
        ("bilevel", softmax.clone() + "[procedure.bilevel]\nrank = 2\n"),
        ("dropout", softmax.clone() + "[procedure.neuron_dropout]\ninterval = 1\ntracking_texts = 4\n"),
        ("muon", softmax.clone() + "[optimizer.muon]\nlr = 0.01\n"),
        ("low_rank", softmax + "[lora]\nrank = 2\n"),
        ("classifier", CLASSIFIER.to_owned()),
    ];
    all.map(|(name, recipe)| (name, recipe.replace("STEPS", &steps.to_string()))).into()
}

/// The same, and one in stages.
pub fn with_stages(steps: u64) -> Vec<(&'static str, String)> {
    let mut all = recipes(steps);
    // Heads are decoupled where each query head has its own key head still.
    let staged = format!("{}{STAGES}", all[0].1.replace("n_kv_heads = 2\n", ""));
    all.push(("stages", staged));
    all
}

/// The text that the decoders learn: long enough for some steps of an epoch, short enough for several epochs.
pub fn book() -> String {
    (0..60).map(|i| format!("The cat number {i} sat on the mat and thought of {}. ", i * 7 % 13)).collect()
}

/// What a run must end with, whatever happened on the way: files by name, without what measures time.
pub fn fingerprint(run: &Path) -> Held<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    if run.join("stages.json").exists() {
        found.insert("stages.json".into(), text(&run.join("stages.json"))?);
        for entry in std::fs::read_dir(run)? {
            let path = entry?.path();
            let stage = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.join("result.json").exists() {
                found.extend(fingerprint(&path)?.into_iter().map(|(key, value)| (format!("{stage}/{key}"), value)));
            } else if path.is_dir() {
                // A conversion.
                let bytes = std::fs::read(path.join("step-00000000/model.safetensors"))?;
                found.insert(stage, blake3::hash(&bytes).to_string());
            }
        }
        return Ok(found);
    }
    let steps = checkpoints(run)?;
    let last = steps.last().ok_or_else(|| Broken(format!("{} holds no checkpoint", run.display())))?;
    for entry in std::fs::read_dir(run.join(last))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match name.as_str() {
            "manifest.json" => {}
            "state.json" => {
                let mut state = json(&path)?;
                state["microseconds"] = Value::Null;
                found.insert(name, state.to_string());
            }
            _ => drop(found.insert(name, blake3::hash(&std::fs::read(&path)?).to_string())),
        }
    }
    found.insert("last checkpoint".into(), last.clone());
    let log = text(&run.join("metrics.jsonl"))?;
    for (number, line) in log.lines().enumerate() {
        let mut value: Value = serde_json::from_str(line)
            .map_err(|error| Broken(format!("{}/metrics.jsonl:{}: {error}", run.display(), number + 1)))?;
        if let Some(fields) = value.as_object_mut() {
            fields.remove("tokens_per_second");
            fields.remove("memory");
        }
        found.insert(format!("metrics.jsonl:{:05}", number + 1), value.to_string());
    }
    for name in ["best.json", "recipe.toml"] {
        found.insert(name.into(), text(&run.join(name))?);
    }
    found.insert("tfevents".into(), events::recorded(run)?.join("\n"));
    let result = json(&run.join("result.json"))?;
    for key in ["id", "steps", "skipped", "tokens", "targets", "validation", "selection", "reporting", "classes"] {
        found.insert(format!("result.json {key}"), result[key].to_string());
    }
    let best = json(&run.join("best.json"))?["step"].as_u64().unwrap_or(0);
    let best = format!("step-{best:08}");
    if !steps.contains(&best) {
        return Err(Broken(format!("{}: the best checkpoint {best} is gone; there are {steps:?}", run.display())));
    }
    Ok(found)
}

/// Holds if both are the same; else names what differs first.
pub fn same(whole: &BTreeMap<String, String>, other: &BTreeMap<String, String>, how: &str) -> Held {
    for key in whole.keys().chain(other.keys()) {
        let (a, b) = (whole.get(key), other.get(key));
        if a != b {
            return Err(Broken(format!("{how}: {key} differs from the uninterrupted run's{}", difference(a, b))));
        }
    }
    Ok(())
}

/// The first lines that differ.
fn difference(a: Option<&String>, b: Option<&String>) -> String {
    let (Some(a), Some(b)) = (a, b) else { return format!(": {a:?} became {b:?}") };
    let pairs =
        a.lines().map(Some).chain(std::iter::repeat(None)).zip(b.lines().map(Some).chain(std::iter::repeat(None)));
    let first = pairs.take_while(|pair| *pair != (None, None)).find(|(a, b)| a != b);
    first.map_or(String::new(), |(a, b)| format!(": {a:?} became {b:?}"))
}

/// A run that was never interrupted.
pub struct Whole {
    pub name: &'static str,
    pub recipe: String,
    /// Its folder.
    pub run: PathBuf,
    pub fingerprint: BTreeMap<String, String>,
    pub duration: Duration,
}

impl Whole {
    /// Trains a recipe with this command, in a folder of its own.
    pub fn train(case: &Case, (name, recipe): (&'static str, String), how: &How, train: &[&str]) -> Held<Self> {
        let mut own = Case::new(&case.dir.join(name), case.binary(), case.random.clone())?;
        lay_out(&own, &recipe)?;
        let started = Instant::now();
        own.run_as(how, train)?.ends(&[0])?;
        let duration = started.elapsed();
        let out = train.iter().position(|word| *word == "--out").and_then(|at| train.get(at + 1));
        let run = own.dir.join(out.copied().unwrap_or_default());
        Ok(Self { name, recipe, fingerprint: fingerprint(&run)?, run, duration })
    }

    /// Holds if the other run ended as this one.
    pub fn equals(&self, run: &Path, how: &str) -> Held {
        same(&self.fingerprint, &fingerprint(run)?, &format!("{} {how}", self.name))
    }
}

/// Writes what a training needs.
pub fn lay_out(case: &Case, recipe: &str) -> Held {
    case.write("book.txt", book())?;
    case.write("recipe.toml", recipe)
}

/// The names of the checkpoints of a run, oldest first.
pub fn checkpoints(run: &Path) -> Held<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(run)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.starts_with("step-").then_some(name));
    }
    names.sort();
    Ok(names)
}

/// Whether a run, or a stage of one, holds a checkpoint.
pub fn holds_checkpoint(run: &Path) -> Held<bool> {
    if !checkpoints(run)?.is_empty() {
        return Ok(true);
    }
    for entry in std::fs::read_dir(run)? {
        let path = entry?.path();
        if path.is_dir() && !checkpoints(&path)?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A file of text.
fn text(path: &Path) -> Held<String> {
    std::fs::read_to_string(path).map_err(|error| Broken(format!("{}: {error}", path.display())))
}

/// A file of JSON.
pub fn json(path: &Path) -> Held<Value> {
    serde_json::from_str(&text(path)?).map_err(|error| Broken(format!("{}: {error}", path.display())))
}

/// Copies a folder with everything in it.
pub fn copy_folder(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy_folder(&entry.path(), &target)?,
            false => drop(std::fs::copy(entry.path(), target)?),
        }
    }
    Ok(())
}
