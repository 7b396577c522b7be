//! `polyhead ls`: the recipes at hand, with what each needs, what it takes, and what it does.

use std::path::{Path, PathBuf};

use polyhead_data::Yields;
use polyhead_experiments::comparison;
use polyhead_recipe::nearest::{is_recipe, recipes_below};
use polyhead_recipe::{self as recipe, Loaded, Problems, stages};
use polyhead_runs::costs::Costs;
use polyhead_runs::data::recipes_folder;
use polyhead_runs::resolve::resolve;
use polyhead_runs::{Caller, Failure};
use serde_json::{Value, json};

use super::compare::check_task;
use super::train::default_folder;
use crate::allowed::caller;
use crate::console::{bytes, clock, put, talk, wants_json};

/// The keys of which every recipe, every comparison and every run in stages has one.
const KEYS: [&str; 4] = ["extends", "model", "arm", "stage"];

/// Operations a second that a core does while a small model trains, roughly: measured on one with AVX-512, 20 to 45 billion.
const FLOPS_OF_A_CORE: f64 = 20e9;

/// Lists the recipes of a folder; without one, those here and in the folder `recipes`, or else the project's.
pub fn ls(folder: Option<&Path>) -> Result<(), Failure> {
    let rows = paths(folder)?.iter().map(|path| Row::of(path)).collect::<Result<Vec<Row>, Failure>>()?;
    if wants_json() {
        return put!("{:#}", rows.iter().map(Row::as_json).collect::<Value>());
    }
    if rows.is_empty() {
        talk!("no recipes here; `polyhead new NAME` makes a project with one (docs: Quickstart)");
        return Ok(());
    }
    let width = |of: fn(&Row) -> &str| rows.iter().map(|row| of(row).chars().count()).max().unwrap_or(0);
    let (name, needs) = (width(|row| &row.name).max(6), width(|row| &row.needs).max(5));
    put!("{:<name$}  {:<needs$}  {:>9}  {:>8}  what it does", "recipe", "needs", "memory", "time")?;
    for row in &rows {
        let memory = row.takes.map_or("–".into(), |takes| bytes(takes.memory));
        let time = row.takes.map_or("–".into(), |takes| clock(takes.time()));
        put!("{:<name$}  {:<needs$}  {memory:>9}  {time:>8}  {}", row.name, row.needs, row.about)?;
    }
    talk!("memory and time are estimates for this machine's cores; `polyhead plan RECIPE` measures");
    Ok(())
}

fn paths(folder: Option<&Path>) -> Result<Vec<PathBuf>, Failure> {
    if let Some(folder) = folder {
        std::fs::read_dir(folder).map_err(|error| Failure::file("read", folder, error))?;
        return Ok(recipes_below(folder));
    }
    let is_one = |path: &PathBuf| {
        let layer = is_recipe(path).then(|| recipe::read_layer(path).ok()).flatten();
        layer.is_some_and(|layer| KEYS.iter().any(|key| layer.values().contains_key(*key)))
    };
    let mut here: Vec<_> = std::fs::read_dir(".")?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    here.retain(is_one);
    here.sort();
    here.extend(recipes_below(Path::new("recipes")));
    Ok(if here.is_empty() { recipes_below(&recipes_folder()) } else { here })
}

/// A recipe, a comparison or a run in stages.
struct Row {
    name: String,
    /// Its data and what it starts from; what is missing is said.
    needs: String,
    /// Whether all of that is there.
    ready: bool,
    takes: Option<Takes>,
    about: String,
}

/// What training takes, roughly.
#[derive(Debug, Clone, Copy)]
struct Takes {
    memory: u64,
    flops: f64,
}

impl Takes {
    fn time(self) -> std::time::Duration {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let seconds = self.flops / (FLOPS_OF_A_CORE * cores as f64);
        std::time::Duration::from_secs_f64(seconds.clamp(1.0, 1e9).round())
    }

    /// Of one after the other.
    fn and(self, other: Self) -> Self {
        Self { memory: self.memory.max(other.memory), flops: self.flops + other.flops }
    }
}

impl Row {
    fn of(path: &Path) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path).map_err(|error| Failure::file("read", path, error))?;
        let (needs, ready, takes) = described(path).unwrap_or_else(|_| ("not valid".into(), false, None));
        Ok(Self { name: shown(path).display().to_string(), needs, ready, takes, about: about(&text) })
    }

    fn as_json(&self) -> Value {
        let (memory, time) = (self.takes.map(|takes| takes.memory), self.takes.map(|takes| takes.time().as_secs()));
        json!({
            "recipe": self.name, "needs": self.needs, "ready": self.ready, "memory_bytes": memory, "seconds": time,
            "training_flops": self.takes.map(|takes| takes.flops), "about": self.about,
        })
    }
}

/// What a file needs, whether that is there, and what it takes, as far as that can be told without reading data.
fn described(path: &Path) -> Result<(String, bool, Option<Takes>), Problems> {
    if comparison::is_one(path) {
        return of_comparison(path);
    }
    let Some(staged) = stages::read(path, &[])? else {
        let loaded = recipe::load(path, &[])?;
        let (needs, ready) = needs(&loaded);
        return Ok((needs, ready, takes(&loaded)));
    };
    let out = default_folder(path);
    let first = staged.load(0, None)?;
    let (needs, ready) = needs(&first);
    // Of later stages only what does not start from weights that are still to be made is known.
    let known = (0..staged.stages.len()).filter(|&at| staged.stages[at].convert.is_none());
    let known = known.filter_map(|at| takes(&staged.load(at, staged.before(&out, at).as_deref()).ok()?));
    Ok((format!("{} stages: {needs}", staged.stages.len()), ready, known.reduce(Takes::and)))
}

/// A comparison as so many runs of its first arm.
fn of_comparison(path: &Path) -> Result<(String, bool, Option<Takes>), Problems> {
    let read = comparison::read(path, check_task)?;
    let (arms, seeds) = (read.comparison.arm.len(), read.comparison.seeds.len());
    let mut layers = read.base.clone();
    layers.push(read.layer.part(&["recipe"]));
    layers.extend(read.comparison.arm[0].layers(&read.layer));
    let runs = format!("{arms} arms, {seeds} {}", if seeds == 1 { "seed" } else { "seeds" });
    // One whose models are prepared first is no recipe before that.
    let Ok(first) = recipe::from_layers(layers) else { return Ok((runs, true, None)) };
    let (needs, ready) = needs(&first);
    let takes = takes(&first).map(|one| Takes { flops: one.flops * (arms * seeds) as f64, ..one });
    Ok((format!("{needs}; {runs}"), ready, takes))
}

/// The data, and the weights that are started from; and whether both are there.
fn needs(loaded: &Loaded) -> (String, bool) {
    let (data, mut ready) = (&loaded.recipe.data, true);
    let mut needs = data.name().to_owned();
    if data.is_generated() && data.source().paths().is_empty() {
        needs.push_str(" (generated)");
    } else if let Some(missing) = data.missing() {
        ready = false;
        needs.push_str(&format!(" (no {missing})"));
    }
    // A name in braces is made by the comparison itself.
    let made = |from: &&Path| comparison::in_braces(&from.to_string_lossy()).is_some();
    if let Some(from) = loaded.recipe.model.pretrained().filter(|from| !made(from)) {
        let missing = !from.exists();
        ready &= !missing;
        needs.push_str(&format!(", {}{}", if missing { "no " } else { "" }, from.display()));
    }
    (needs, ready)
}

/// What a recipe takes; `None` where weights or files have to be there to tell.
fn takes(loaded: &Loaded) -> Option<Takes> {
    let data = &loaded.recipe.data;
    if !data.is_generated() && data.yields() != Yields::Tokens {
        return None;
    }
    let silent = Caller { tell: |_| {}, progress: |_, _, _| {}, hub: |_| Ok(None), ..caller() };
    let resolved = resolve(loaded, silent).ok()?;
    let costs = Costs::of(&resolved.recipe, resolved.known().ok()?);
    Some(Takes { memory: costs.memory_of_all().peak(), flops: costs.training_flops() })
}

/// The first sentence of the comment that a recipe begins with.
fn about(text: &str) -> String {
    let lines = text.lines().map_while(|line| line.strip_prefix("# "));
    let comment = lines.collect::<Vec<_>>().join(" ");
    let sentence = comment.split_inclusive(". ").next().unwrap_or_default();
    sentence.trim_end().to_owned()
}

/// A path as a person would type it.
pub fn shown(path: &Path) -> &Path {
    path.strip_prefix("./").unwrap_or(path)
}
