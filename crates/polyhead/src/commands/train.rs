//! `polyhead train`.

pub mod summary;

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::Device;
use polyhead_data::Tokenizer;
use polyhead_models::{Decoder, MOST_CONFUSED};
use polyhead_training::Trainee;
use polyhead_training::checkpoint::{clean_leftovers, list, newest_good};
use polyhead_training::evaluate::Batches;
use polyhead_training::hallucination::{Summary, ask};
use polyhead_training::run::{Job, Outcome, Probe, View, run};
use polyhead_training::run_folder::{RunLock, atomic_write};

use super::hallucination::asking;
use super::new_folder::must_not_be_data;
use crate::allowed::allowed;
use crate::assemble::{self, Data, Resolved, Source};
use crate::classifier::ExampleSource;
use crate::cli::{RecipeArgs, TrainArgs};
use crate::console::{Console, bytes, talk};
use crate::costs::{Costs, Known, tokens_per_step};
use crate::embedder::PairSource;
use crate::pretrained::locate_checkpoint;
use crate::recipe::{self, Loaded};
use crate::report::Failure;
use crate::result::{self, ClassTable};
use crate::signals::{self, Signals};

/// Trains what a recipe says, or one after the other the stages of one that has stages.
pub fn train(args: TrainArgs) -> Result<(), Failure> {
    if args.tui {
        check_dashboard()?;
    }
    let signals = signals::listen(args.tui)?;
    let mut overrides = args.recipe.overrides.clone();
    overrides.extend(args.device.iter().map(|device| format!("training.device={device}")));
    if let Some(staged) = crate::stages::read(&args.recipe.recipe, &overrides)? {
        return super::stages::train(&args, &staged, &signals);
    }
    let loaded = recipe::load(&args.recipe.recipe, &overrides)?;
    let run_dir = args.out.clone().unwrap_or_else(|| default_folder(&args.recipe.recipe));
    train_session(TrainSession {
        loaded: &loaded,
        run_dir: &run_dir,
        resume: &args.resume,
        signals,
        tui: args.tui,
        asked: Some(&args.recipe),
    })
}

/// What is done until a run is at its end, or is told to stop.
pub struct TrainSession<'a> {
    /// What to train.
    pub loaded: &'a Loaded,
    /// Where the run is written.
    pub run_dir: &'a Path,
    /// As `--resume`.
    pub resume: &'a str,
    /// What is asked for while it runs.
    pub signals: Signals,
    /// Whether a dashboard is shown.
    #[cfg_attr(not(feature = "tui"), allow(dead_code))] // what the dashboard needs
    pub tui: bool,
    /// What was typed, where the run is all that was asked for: its end is told then, with what to type next.
    pub asked: Option<&'a RecipeArgs>,
}

/// Trains what a recipe says, from where the run stands.
///
/// # Errors
/// If something is missing or wrong, or a signal came; what was saved before stays whole.
pub fn train_session(session: TrainSession<'_>) -> Result<(), Failure> {
    let TrainSession { loaded, run_dir, .. } = session;
    let device = assemble::training_device(&loaded.recipe)?;
    must_not_be_data(&loaded.recipe, run_dir)?;
    let lock = RunLock::acquire(run_dir)?;
    for left in clean_leftovers(run_dir)? {
        talk!("cleaned up after an interrupted save: {}", left.display());
    }
    let resume = choose_checkpoint(session.resume, run_dir)?;
    let resolved = match &resume {
        Some(checkpoint) => assemble::resume(loaded, checkpoint)?,
        None => assemble::resolve(loaded)?,
    };
    let task = Task { session, resume, resolved };
    let model = &task.resolved.recipe.model;
    match (model.classifier.is_some(), model.embedder.is_some()) {
        (true, _) => train_classifier(&task, lock, &device),
        (_, true) => train_embedder(&task, lock, &device),
        (false, false) => train_decoder(&task, lock, &device),
    }
}

/// A session whose beginning is known.
struct Task<'a> {
    session: TrainSession<'a>,
    /// The checkpoint to go on from.
    resume: Option<PathBuf>,
    resolved: Resolved,
}

/// What is trained on what, whatever kind of model it is.
struct Material<'a, M: Trainee> {
    model: M,
    /// What mixes positions, layer by layer.
    layers: Vec<&'static str>,
    train: &'a dyn Batches<M::Batch>,
    held_out: &'a dyn Batches<M::Batch>,
    facts: &'a Facts,
    tokenizer: Option<&'a Tokenizer>,
    tracking: Vec<M::Batch>,
    probe: Option<&'a Probe<'a, M>>,
    classes: &'a dyn Fn(&M::Totals) -> Option<ClassTable>,
}

/// What is known about the data once it is open.
struct Facts {
    description: String,
    text_hash: Option<String>,
    known: Known,
    /// `data.json`
    record: Vec<u8>,
}

impl Facts {
    fn of(data: &Data) -> Self {
        Self {
            description: data.description().to_owned(),
            text_hash: data.text_hash().map(Into::into),
            known: assemble::known(data),
            record: assemble::record_of(data),
        }
    }
}

fn train_decoder(task: &Task<'_>, lock: RunLock, device: &Device) -> Result<(), Failure> {
    let resolved = &task.resolved;
    let (data, facts) = task.open()?;
    let Data::Tokens(opened) = data else { unreachable!("a decoder reads tokens") };
    for note in assemble::check_targets(&opened, resolved.recipe.data.name())? {
        talk!("warning: {note}");
    }
    let model = resolved.first_model(opened.vocab_size, device)?;
    let config = model.config().clone();
    let asked = assemble::world(&resolved.recipe).map(|world| (world.questions(), asking(&world, config.n_layers)));
    let about_facts = asked.as_ref().map(|(questions, asking)| {
        move |model: &Decoder, go_on: &dyn Fn() -> bool| {
            let numbers = Summary::of(&ask(model, questions, asking, go_on)?, asking.confident).numbers();
            Some(numbers.into_iter().map(|(name, value)| (format!("facts/{name}"), value)).collect())
        }
    });
    let (train, held_out) = (Source(opened.train), Source(opened.validation));
    let outcome = task.learn(
        lock,
        Material {
            model,
            layers: (0..config.n_layers).map(|layer| config.mechanism(layer).name()).collect(),
            train: &train,
            held_out: &held_out,
            facts: &facts,
            tokenizer: opened.tokenizer.as_ref(),
            tracking: opened.tracking,
            probe: about_facts.as_ref().map(|probe| probe as &Probe<'_>),
            classes: &|_| None,
        },
    )?;
    task.tell_end(&outcome, &facts.description, opened.floor);
    if let Some(tokenizer) = opened.tokenizer.as_ref().filter(|_| task.session.asked.is_some()) {
        summary::sample(&resolved.recipe, &outcome.model, tokenizer)?;
    }
    Ok(())
}

fn train_classifier(task: &Task<'_>, lock: RunLock, device: &Device) -> Result<(), Failure> {
    let (data, facts) = task.open()?;
    let Data::Examples(labelled) = data else { unreachable!("a classifier learns examples") };
    if labelled.classes.len() > MOST_CONFUSED {
        talk!(
            "note: {} classes: confusions are counted, but no matrix of classes by classes is written (above {MOST_CONFUSED})",
            labelled.classes.len()
        );
    }
    let model = task.resolved.first_classifier(&labelled, device)?;
    let layers = model.config().layers();
    let (train, held_out) = (ExampleSource(labelled.train), ExampleSource(labelled.validation));
    let outcome = task.learn(
        lock,
        Material {
            model,
            layers,
            train: &train,
            held_out: &held_out,
            facts: &facts,
            tokenizer: labelled.tokenizer.as_ref(),
            tracking: Vec::new(),
            probe: None,
            classes: &|sums| Some(ClassTable::of(sums, &labelled.classes, &labelled.groups)),
        },
    )?;
    task.tell_end(&outcome, &facts.description, None);
    Ok(())
}

fn train_embedder(task: &Task<'_>, lock: RunLock, device: &Device) -> Result<(), Failure> {
    let (data, facts) = task.open()?;
    let Data::Pairs(paired) = data else { unreachable!("an embedder learns pairs") };
    let model = task.resolved.first_embedder(&paired, device)?;
    let (train, held_out) = (PairSource(paired.train), PairSource(paired.validation));
    let outcome = task.learn(
        lock,
        Material {
            model,
            layers: vec!["mltp"],
            train: &train,
            held_out: &held_out,
            facts: &facts,
            tokenizer: None,
            tracking: Vec::new(),
            probe: None,
            classes: &|_| None,
        },
    )?;
    task.tell_end(&outcome, &facts.description, None);
    Ok(())
}

impl Task<'_> {
    /// Opens the data, which must be what a run that goes on has learned from.
    fn open(&self) -> Result<(Data, Facts), Failure> {
        let started = Instant::now();
        let data = self.resolved.open(&mut tokenizing())?;
        talk!("data: {} ({:.1} s)", data.description(), started.elapsed().as_secs_f64());
        data.notes().iter().for_each(|note| talk!("note: {note}"));
        if let Some(checkpoint) = &self.resume
            && let Some(problem) = assemble::changed_text(checkpoint, data.text_hash())?
        {
            let hint = "put it back, or start another run with --out";
            return Err(Failure::Run(format!("{problem}\n  hint: a run goes on as what it was; {hint}")));
        }
        let facts = Facts::of(&data);
        self.check_memory(facts.known)?;
        Ok((data, facts))
    }

    /// Refuses what does not fit the memory of this machine.
    fn check_memory(&self, known: Known) -> Result<(), Failure> {
        let recipe = &self.resolved.recipe;
        // Nothing tells what a GPU has left.
        if recipe.training.device == "cuda" {
            return Ok(());
        }
        let hint = "`polyhead plan` tells what takes how much; a smaller model, training.batch_size or training.seq_len takes less";
        super::check_memory(Costs::of(recipe, known).least_bytes(recipe), "training", hint)
    }

    /// Trains to the end and writes what was reached.
    fn learn<M: Trainee>(&self, lock: RunLock, material: Material<'_, M>) -> Result<Outcome<M>, Failure> {
        let Material { model, layers, train, held_out, facts, tokenizer, tracking, probe, classes } = material;
        let (recipe, TrainSession { run_dir, signals, .. }) = (&self.resolved.recipe, &self.session);
        self.tell_model(&model, layers);
        let start = self.tell_start()?;
        let text = recipe::resolved(recipe)?;
        let about = result::About {
            id: result::id(&text, facts.text_hash.as_deref()),
            data: facts.description.clone(),
            unit: facts.known.unit(),
            costs: Costs::of(recipe, facts.known),
            environment: result::Environment::here(&recipe.training.device),
        };
        atomic_write(&run_dir.join("recipe.toml"), text.as_bytes())?;
        let mut companions =
            vec![("recipe.toml".to_owned(), text.clone().into_bytes()), ("data.json".to_owned(), facts.record.clone())];
        if let Some(tokenizer) = tokenizer {
            companions.push(("tokenizer.json".into(), tokenizer.to_json().as_bytes().to_vec()));
            companions.push(("tokenizer_config.json".into(), tokenizer.config_json().into_bytes()));
        }
        let job = Job {
            run_dir: run_dir.to_path_buf(),
            lock,
            resume: self.resume.clone(),
            training: recipe.training.clone(),
            procedure: recipe.procedure.clone(),
            optimizer: recipe.optimizer.clone(),
            lr_scheduler: recipe.lr_scheduler.clone(),
            validation: recipe.validation.clone(),
            checkpoint: recipe.checkpoint.clone(),
            metrics: recipe.metrics.clone(),
            seed: recipe.debug.seed,
            train,
            held_out,
            probe,
            validate_first: recipe.model.pretrained.is_some(),
            tracking,
            companions,
            nonfinite: allowed().nonfinite,
            recipe: text,
            requests: &signals.requests,
        };
        #[cfg(feature = "tui")]
        let dashboard = self
            .session
            .tui
            .then(|| crate::dashboard::Dashboard::open(recipe.training.steps, signals.requests.clone()));
        #[cfg(not(feature = "tui"))]
        let dashboard: Option<Console> = None;
        let pace = (tokens_per_step(recipe), about.unit);
        let mut view: Box<dyn View> = match dashboard {
            Some(dashboard) => Box::new(dashboard),
            None => Box::new(Console::new(start, recipe.training.steps, pace)),
        };
        let busy = signals.busy();
        let outcome = run(model, job, view.as_mut())?;
        drop((view, busy));

        if let Some(signal) = outcome.interrupted {
            talk!("\nstopped at step {}; saved to {}", outcome.progress.step, outcome.checkpoint.display());
            talk!("the same command goes on from there");
            return Err(Failure::Interrupted(signal));
        }
        if let Some(why) = &outcome.ended {
            let early = if outcome.progress.step < recipe.training.steps { " early" } else { "" };
            talk!("\nended{early} at step {}: {why}", outcome.progress.step);
        }
        result::write(run_dir, about, &outcome, (held_out, recipe.validation.batches), classes)?;
        match &outcome.missing {
            Some(problem) => Err(Failure::Run(format!(
                "the run is at its end and saved in {}, but not all of what it logged: {problem}",
                outcome.checkpoint.display()
            ))),
            None => Ok(outcome),
        }
    }
}

#[cfg(feature = "tui")]
fn check_dashboard() -> Result<(), Failure> {
    Ok(crate::dashboard::check()?)
}

#[cfg(not(feature = "tui"))]
fn check_dashboard() -> Result<(), Failure> {
    let problem = "--tui: this binary was built without the dashboard; build with `cargo build --release --features tui`, \
                   or leave it out: a terminal gets a progress bar";
    Err(crate::report::Problems::plain(problem.into()).into())
}

/// Where a recipe's run is written if nothing else is said.
pub fn default_folder(recipe: &Path) -> PathBuf {
    Path::new("checkpoints").join(recipe.file_stem().unwrap_or("run".as_ref()))
}

/// A bar for turning text into tokens, shown only where it takes a while.
fn tokenizing() -> impl FnMut(u64, u64) {
    let started = Instant::now();
    let mut told = 0;
    move |done, all| {
        let seconds = started.elapsed().as_secs();
        if seconds > told && done < all {
            told = seconds;
            talk!("tokens: {} of {}", bytes(done), bytes(all));
        }
    }
}

/// The checkpoint to go on from.
fn choose_checkpoint(resume: &str, run_dir: &Path) -> Result<Option<PathBuf>, Failure> {
    match resume {
        "never" => match list(run_dir)?.is_empty() {
            true => Ok(None),
            false => Err(Failure::Run(format!(
                "{} holds a run already; --resume never would lose it: name another folder with --out, or remove it",
                run_dir.display()
            ))),
        },
        "auto" => {
            let (found, damaged) = newest_good(run_dir)?;
            for problem in &damaged {
                talk!("warning: {problem}");
            }
            match found {
                Some((path, _)) => Ok(Some(path)),
                None if damaged.is_empty() => Ok(None),
                None => Err(Failure::Run(format!(
                    "every checkpoint in {} is damaged; start afresh in another folder with --out",
                    run_dir.display()
                ))),
            }
        }
        path => {
            let path = locate_checkpoint(Path::new(path))?.0;
            let inside = path.canonicalize()?.parent() == Some(&run_dir.canonicalize()?);
            match inside {
                true => Ok(Some(path)),
                false => Err(Failure::Run(format!(
                    "{} lies outside the run folder {}: name its run folder with --out",
                    path.display(),
                    run_dir.display()
                ))),
            }
        }
    }
}
