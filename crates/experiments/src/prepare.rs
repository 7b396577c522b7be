//! What a comparison makes once for every seed before its arms run: a parent to start from, models made of it.
//!
//! Each is a command of its own (`train`, `convert`, `grow`, `tune embedding`) into `OUT/prepared/NAME-seed-SEED-ID`. The id is a hash of all
//! that decides it, so that what was made before is used again, and what has changed since is made anew.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::Instant;

use polyhead_training::TrainError;
use polyhead_training::checkpoint::list;
use polyhead_training::run::Requests;
use polyhead_training::run_folder::{atomic_write, files};
use serde_json::json;

use polyhead_recipe::flags::flags_of;
use polyhead_recipe::layers::{self, Layer, parse_layer};
use polyhead_recipe::{self as recipe, Growth, Problems};
use polyhead_runs::Failure;
use polyhead_runs::result;
use polyhead_runs::text::clock;
use polyhead_runs::text::quoted;

use polyhead_recipe::folder_name;

use super::calibration::Paces;
use super::comparison::{NAMED, Preparation, Read, in_braces};
use super::processes::{Jobs, Share, ended_without, run_jobs, spawn};
use super::tune::leaves;

/// What is made, a chain for each seed, and what is measured.
pub struct Prepared {
    chains: Vec<Vec<Step>>,
    /// How long the steps of arms take, as far as it was measured.
    pub paces: Paces,
}

/// One command.
struct Step {
    name: String,
    seed: u64,
    folder: PathBuf,
    arguments: Vec<String>,
    /// What it trains, resolved.
    recipe: Option<String>,
    /// What it makes in its folder, where that is no model.
    file: Option<&'static str>,
}

/// What `tune embedding` writes.
const EMBEDDING: &str = "embedding.safetensors";

impl Prepared {
    /// Works out what a comparison, read from `file` and written to `out`, needs. Nothing is made.
    ///
    /// # Errors
    /// If a recipe or a flag is wrong.
    pub fn plan(read: &Read, (file, out): (&Path, &Path)) -> Result<Self, Failure> {
        let chain = |&seed: &u64| {
            let mut chain: Vec<Step> = Vec::new();
            for (at, preparation) in read.comparison.prepare.iter().enumerate() {
                let made_of = preparation.from.as_ref().and_then(|from| chain.iter().find(|step| step.name == *from));
                let from = made_of.map(|step| step.folder.as_path());
                let step = match &preparation.train {
                    Some(base) => {
                        let base = file.parent().unwrap_or(Path::new("")).join(base);
                        let changes = read.layer.part(&["prepare", &at.to_string(), "recipe"]);
                        training(preparation, (&base, changes, from), seed, out)?
                    }
                    None if preparation.embedding.is_some() => {
                        embedding(preparation, from.unwrap_or(Path::new("")), seed, out)
                    }
                    None => {
                        let key =
                            format!("prepare.{at}.{}", if preparation.grow.is_some() { "grow" } else { "convert" });
                        let told = |problem: String| {
                            let message = format!("prepare `{}`: {problem}", preparation.name);
                            Problems(vec![layers::at(std::slice::from_ref(&read.layer), &key, message)])
                        };
                        conversion(preparation, from.unwrap_or(Path::new("")), seed, out).map_err(told)?
                    }
                };
                chain.push(step);
            }
            Ok(chain)
        };
        let chains = read.comparison.all_seeds().iter().map(chain).collect::<Result<_, Failure>>()?;
        Ok(Self { chains, paces: Paces::default() })
    }

    /// How many commands there are, and how many of them have still to run.
    pub fn counts(&self) -> (usize, usize) {
        let all = || self.chains.iter().flatten();
        (all().count(), all().filter(|step| !step.complete()).count())
    }

    /// The commands of the first seed, as they are typed.
    pub fn commands(&self) -> Vec<String> {
        self.chains.first().into_iter().flatten().map(Step::command).collect()
    }

    /// The layers with what was made in place of a `{name}`: of the folder that they start from, of the file of tensors.
    ///
    /// # Errors
    /// If the path cannot be in a recipe.
    pub fn filled(&self, mut layers: Vec<Layer>, seed: u64) -> Result<Vec<Layer>, Problems> {
        for [table, key] in NAMED {
            let named =
                layers.iter().rev().find_map(|layer| Some(layer.values().get(table)?.get(key)?.as_str()?.to_owned()));
            let found = named
                .as_deref()
                .and_then(in_braces)
                .and_then(|name| self.chains.iter().flatten().find(|step| step.name == name && step.seed == seed));
            if let Some(step) = found {
                layers.push(naming(&format!("{table}.{key}"), &step.made())?);
            }
        }
        Ok(layers)
    }

    /// Runs what is not complete, the chains of several seeds at a time.
    ///
    /// # Errors
    /// If a command fails, or a signal came (trainings have saved).
    pub fn make(&self, share: &Share, requests: &Requests, tell: fn(&str)) -> Result<(), Failure> {
        let (all, waiting) = self.counts();
        if waiting == 0 {
            return Ok(());
        }
        tell(&format!("{all} preparations, {} of them have finished before", all - waiting));
        let chains = self.chains.iter().map(|chain| chain.iter()).collect();
        let mut making = Making { chains, failed: None, tell };
        run_jobs(&mut making, share, requests)?;
        making.failed.map_or(Ok(()), |problem| Err(Failure::Run(problem)))
    }
}

/// Chains of which none of the steps runs at the moment; after one that failed none is started.
struct Making<'a> {
    chains: VecDeque<std::slice::Iter<'a, Step>>,
    failed: Option<String>,
    tell: fn(&str),
}

impl<'a> Jobs for Making<'a> {
    type Job = Running<'a>;

    fn next(&mut self) -> Option<Running<'a>> {
        while self.failed.is_none() {
            let mut chain = self.chains.pop_front()?;
            if let Some(step) = chain.find(|step| !step.complete()) {
                return Some(Running { step, since: Instant::now(), chain });
            }
        }
        None
    }

    fn start(&mut self, running: &Running<'a>, share: &Share) -> Result<Child, Failure> {
        let Step { name, seed, .. } = running.step;
        (self.tell)(&format!("started   {name}, seed {seed}"));
        running.step.start(share)
    }

    fn ended(&mut self, was: Running<'a>, status: ExitStatus, stopped: bool) -> Result<(), Failure> {
        let Step { name, seed, .. } = was.step;
        match status.success() && was.step.has_made()? {
            true => {
                was.step.mark()?;
                (self.tell)(&format!("finished  {name}, seed {seed}, {}", clock(was.since.elapsed())));
                self.chains.push_front(was.chain);
            }
            false if stopped => {} // saved and left
            false => {
                let problem = ended_without(status, &was.step.log());
                self.failed = Some(format!("prepare `{name}`, seed {seed}: {problem}"));
            }
        }
        Ok(())
    }
}

/// A command that runs, and what comes after it.
struct Running<'a> {
    step: &'a Step,
    since: Instant,
    chain: std::slice::Iter<'a, Step>,
}

impl Step {
    /// A step whose folder is named by all that decides its contents.
    fn new(preparation: &Preparation, seed: u64, out: &Path, decides: &str) -> Self {
        let name = preparation.name.clone();
        let id = result::id(decides, None);
        let folder = out.join("prepared").join(format!("{}-seed-{seed}-{}", folder_name(&name), &id[..8]));
        Self { name, seed, folder, arguments: Vec::new(), recipe: None, file: None }
    }

    fn complete(&self) -> bool {
        self.folder.join(files::PREPARED).exists()
    }

    /// What arms name: the folder of a model, or a file.
    fn made(&self) -> PathBuf {
        self.file.map_or_else(|| self.folder.clone(), |file| self.folder.join(file))
    }

    fn has_made(&self) -> Result<bool, Failure> {
        match self.file {
            Some(_) => Ok(self.made().exists()),
            None => Ok(!list(&self.folder).map_err(TrainError::from)?.is_empty()),
        }
    }

    fn log(&self) -> PathBuf {
        self.folder.with_extension("log")
    }

    fn command(&self) -> String {
        let words = self.arguments.iter().map(|word| quoted(word));
        ["polyhead".to_owned()].into_iter().chain(words).collect::<Vec<_>>().join(" ")
    }

    fn start(&self, share: &Share) -> Result<Child, Failure> {
        let create = |folder: &Path| std::fs::create_dir_all(folder).map_err(|e| Failure::file("create", folder, e));
        match &self.recipe {
            // A training that was cut off goes on.
            Some(text) => {
                create(&self.folder)?;
                atomic_write(&self.folder.join(files::RECIPE), text.as_bytes())?;
            }
            None => {
                create(&self.folder)?;
                std::fs::remove_dir_all(&self.folder)?;
                if self.file.is_some() {
                    create(&self.folder)?;
                }
            }
        }
        spawn(&self.arguments, &self.log(), None, share)
    }

    fn mark(&self) -> Result<(), Failure> {
        let text = format!("{:#}\n", json!({ "command": self.command() }));
        Ok(atomic_write(&self.folder.join(files::PREPARED), text.as_bytes())?)
    }
}

fn training(
    preparation: &Preparation,
    (base, changes, from): (&Path, Layer, Option<&Path>),
    seed: u64,
    out: &Path,
) -> Result<Step, Failure> {
    let mut layers = recipe::read_layers(base, &[])?;
    layers.push(changes);
    if let Some(folder) = from {
        layers.push(naming("model.pretrained", folder)?);
    }
    layers.push(parse_layer("seeds", &format!("debug.seed = {seed}"))?);
    let text = recipe::resolved(&recipe::from_layers(layers)?.recipe)?;
    let mut step = Step::new(preparation, seed, out, &text);
    let folder = step.folder.display().to_string();
    step.arguments =
        vec!["train".into(), step.folder.join(files::RECIPE).display().to_string(), "--out".into(), folder];
    step.recipe = Some(text);
    Ok(step)
}

/// A command other than `train`.
fn conversion(preparation: &Preparation, from: &Path, seed: u64, out: &Path) -> Result<Step, String> {
    let (command, flags) = match (&preparation.convert, &preparation.grow) {
        (Some(conversion), _) => {
            conversion.check()?;
            ("convert", conversion.flags())
        }
        (None, growth) => ("grow", flags_of(&growth.clone().unwrap_or_default(), &Growth::default())),
    };
    let from = from.display().to_string();
    let mut step = Step::new(preparation, seed, out, &format!("{command} {from} {flags}"));
    step.arguments = [command, &from].into_iter().chain(flags.split_whitespace()).map(str::to_owned).collect();
    step.arguments.extend(["--out".into(), step.folder.display().to_string()]);
    Ok(step)
}

/// The embedding of a task, of the prompts that the changes of the model's recipe make.
fn embedding(preparation: &Preparation, from: &Path, seed: u64, out: &Path) -> Step {
    let changes = leaves(&preparation.recipe, &|_| false).into_iter().map(|(key, value)| format!("{key}={value}"));
    let random = preparation.embedding.and_then(|embedding| embedding.random);
    let random = random.into_iter().flat_map(|seed| ["--random".to_owned(), seed.to_string()]);
    let from = [from.display().to_string()];
    let words: Vec<String> = from.into_iter().chain(changes).chain(random).collect();
    let mut step = Step::new(preparation, seed, out, &format!("tune embedding {}", words.join(" ")));
    step.file = Some(EMBEDDING);
    step.arguments = ["tune", "embedding"].map(str::to_owned).into_iter().chain(words).collect();
    step.arguments.extend(["--out".into(), step.made().display().to_string()]);
    step
}

/// A layer in which a key names a path.
fn naming(key: &str, path: &Path) -> Result<Layer, Problems> {
    let path = toml::Value::String(path.display().to_string());
    Ok(parse_layer("prepare", &format!("{key} = {path}"))?)
}
