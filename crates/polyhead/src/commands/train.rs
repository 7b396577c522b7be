//! `polyhead train`.

pub mod summary;

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::Device;
use polyhead_data::Tokenizer;
use polyhead_models::{Decoder, Trainable};
use polyhead_training::TrainError;
use polyhead_training::checkpoint::{clean_leftovers, list, newest_good};
use polyhead_training::ranks::{Communicator, Ranks};
use polyhead_training::run::{Job, Outcome, View, run};
use polyhead_training::run_folder::{RunLock, atomic_write, files};
use polyhead_training::tensorboard::EventWriter;
use serde_json::json;

use super::new_folder::must_not_be_data;
use crate::allowed::{allowed, caller};
use crate::cli::{RecipeArgs, TrainArgs};
use crate::console::{Console, put, reading, say, talk, wants_json};
use crate::profile::Profile;
use crate::ranks::{check, local_rank, within};
use crate::signals::{self, Signals};
use polyhead_recipe::{self as recipe, Loaded};
use polyhead_runs::Failure;
use polyhead_runs::Resolved;
use polyhead_runs::base::Base;
use polyhead_runs::costs::{Costs, Known, tokens_per_step};
use polyhead_runs::data::{TrainingData, changed_text, record_text};
use polyhead_runs::intervention::{ReadIntervention, kept};
use polyhead_runs::kind::{ForAnyKind, Kind, for_kind};
use polyhead_runs::pretrained::{locate_checkpoint, tokenizer_files};
use polyhead_runs::resolve::{self, training_device};
use polyhead_runs::result;

/// Trains what a recipe says, alone or as one of the ranks of a job; rank 0 writes a profile where one is asked for.
pub fn train(args: TrainArgs) -> Result<(), Failure> {
    if args.tui {
        check_dashboard()?;
    }
    within(|job| {
        let is_first = job.is_none_or(|job| job.rank() == 0);
        let profile = args.profile.as_deref().filter(|_| is_first).map(Profile::begin).transpose()?;
        let trained = train_unprofiled(args, job);
        let written = profile.map_or(Ok(()), Profile::finish);
        trained.and(written)
    })
}

/// Trains what a recipe says, or one after the other the stages of one that has stages.
fn train_unprofiled(args: TrainArgs, job: Option<&dyn Communicator>) -> Result<(), Failure> {
    let alone_or = |problem: &str| match job {
        Some(job) if job.size() > 1 => Err(recipe::Problems::plain(problem.into())),
        _ => Ok(()),
    };
    if args.tui {
        alone_or("--tui shows a run of one process: leave it out")?;
    }
    let signals = signals::listen(args.tui)?;
    let mut overrides = args.recipe.overrides.clone();
    overrides.extend(args.device.iter().map(|device| format!("training.device={device}")));
    if let Some(staged) = polyhead_recipe::stages::read(&args.recipe.recipe, &overrides)? {
        alone_or(
            "a recipe in stages is run by one process; train its stages one by one, each from the weights of the one before",
        )?;
        return super::stages::train(&args, &staged, &signals);
    }
    let loaded = recipe::load(&args.recipe.recipe, &overrides)?;
    let run_dir = args.out.clone().unwrap_or_else(|| default_folder(&args.recipe.recipe));
    train_session(TrainSession {
        job,
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
    /// The other ranks, where a launcher has started some.
    pub job: Option<&'a dyn Communicator>,
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
    let parallel = loaded.recipe.parallel;
    let ranks = session.job.map_or_else(|| Ranks::alone(parallel), |job| Ranks::new(job, parallel));
    check(loaded, ranks.size())?;
    let device = training_device(&loaded.recipe, (ranks.size() > 1).then(local_rank))?;
    must_not_be_data(&loaded.recipe, run_dir)?;
    let mut lock = None;
    let resume = ranks.from_first(|| {
        lock = Some(RunLock::acquire(run_dir)?);
        for left in clean_leftovers(run_dir)? {
            talk!("cleaned up after an interrupted save: {}", left.display());
        }
        choose_checkpoint(session.resume, run_dir)
    })?;
    let resolved = match &resume {
        Some(checkpoint) => resolve::resume(loaded, checkpoint, caller())?,
        None => resolve::resolve(loaded, caller())?,
    };
    let task = Task { session, ranks: &ranks, resume, resolved };
    for_kind(&task.resolved.recipe.model, Train { task: &task, lock, device: &device })
}

/// A session whose beginning is known.
struct Task<'a> {
    session: TrainSession<'a>,
    ranks: &'a Ranks<'a>,
    /// The checkpoint to go on from.
    resume: Option<PathBuf>,
    resolved: Resolved,
}

/// Trains a model of any kind.
struct Train<'a> {
    task: &'a Task<'a>,
    lock: Option<RunLock>,
    device: &'a Device,
}

impl ForAnyKind for Train<'_> {
    type Output = Result<(), Failure>;

    fn run<K: Kind>(self) -> Self::Output {
        let Self { task, lock, device } = self;
        let data = task.ranks.first_before_others(|| task.open::<K>())?;
        for note in data.check(task.resolved.recipe.data.name())? {
            talk!("warning: {note}");
        }
        let model: K = task.resolved.first(&data, device)?;
        let outcome = task.learn(lock, model, &data)?;
        if !task.ranks.is_first() {
            return Ok(());
        }
        task.tell_end(&outcome, data.description(), data.floor());
        if task.session.asked.is_none() {
            return Ok(());
        }
        let sample = match (outcome.model.as_decoder(), data.tokenizer()) {
            (Some(model), Some(tokenizer)) => Some(task.sample(&outcome, model, tokenizer)?),
            _ => None,
        };
        match wants_json() {
            true => put!("{:#}", json!({ "result": result::read(task.session.run_dir)?, "sample": sample })),
            false => Ok(()),
        }
    }
}

impl Task<'_> {
    /// Opens the data, which must be what a run that goes on has been trained on.
    fn open<K: Kind>(&self) -> Result<K::Data, Failure> {
        let started = Instant::now();
        let data = K::open(&self.resolved, &mut reading)?;
        talk!("data: {} ({:.1} s)", data.description(), started.elapsed().as_secs_f64());
        data.notes().iter().for_each(|note| talk!("note: {note}"));
        if let Some(checkpoint) = &self.resume
            && let Some(problem) = changed_text(checkpoint, data.text_hash())?
        {
            let hint = "put it back, or start another run with --out";
            return Err(Failure::Run(format!("{problem}\n  hint: a run goes on as what it was; {hint}")));
        }
        self.check_memory(data.known())?;
        Ok(data)
    }

    /// A sample of what the model writes, for the screen and, where the run has just come to its end, for TensorBoard.
    fn sample<M: Trainable>(
        &self,
        outcome: &Outcome<M>,
        model: &Decoder,
        tokenizer: &Tokenizer,
    ) -> Result<String, Failure> {
        let recipe = &self.resolved.recipe;
        let sample = || summary::sample(recipe, model, tokenizer);
        let sample = tracing::info_span!("sample").in_scope(sample)?;
        if recipe.metrics.tensorboard && outcome.validation.is_some() {
            let step = outcome.progress.step;
            let mut events = EventWriter::create(self.session.run_dir, Some(step)).map_err(TrainError::from)?;
            events.text("sample", step, &format!("```text\n{sample}\n```")).map_err(TrainError::from)?;
            events.flush().map_err(TrainError::from)?;
        }
        Ok(sample)
    }

    /// Refuses what does not fit the memory of the device.
    fn check_memory(&self, known: Known) -> Result<(), Failure> {
        let recipe = &self.resolved.recipe;
        let hint = "`polyhead plan` tells what takes how much; a smaller model, training.batch_size or training.seq_len takes less";
        super::check_memory(&recipe.training.device, Costs::of(recipe, known).least_bytes(recipe), "training", hint)
    }

    /// Trains to the end and writes what was reached.
    fn learn<K: Kind>(&self, lock: Option<RunLock>, model: K, data: &K::Data) -> Result<Outcome<K>, Failure> {
        let (train, held_out, known) = (data.train(), data.held_out(), data.known());
        let (recipe, TrainSession { run_dir, signals, .. }) = (&self.resolved.recipe, &self.session);
        self.tell_model(&model);
        let (probe, heads) = (model.probe(recipe, data)?, K::head_scores(recipe, data)?);
        let start = self.tell_start()?;
        let text = recipe::resolved(&kept(recipe))?;
        let about = result::About {
            id: result::id(&text, data.text_hash()),
            data: data.description().to_owned(),
            unit: known.unit(),
            costs: Costs::of(recipe, known),
            environment: result::Environment::here(&recipe.training.device),
            sets: Vec::new(),
        };
        if self.ranks.is_first() {
            atomic_write(&run_dir.join(files::RECIPE), text.as_bytes())?;
        }
        let mut companions = vec![
            (files::RECIPE.to_owned(), text.clone().into_bytes()),
            (files::DATA.to_owned(), record_text(&data.record())),
        ];
        if let Some(tokenizer) = data.tokenizer() {
            companions.extend(tokenizer_files(tokenizer));
        }
        if let Some((name, bytes)) = self.resolved.intervention.as_ref().and_then(ReadIntervention::file) {
            atomic_write(&run_dir.join(&name), &bytes)?;
            companions.push((name, bytes));
        }
        let base = self.resolved.base(run_dir)?;
        companions.extend(base.iter().map(Base::file));
        let job = Job {
            ranks: self.ranks,
            run_dir: run_dir.to_path_buf(),
            lock,
            resume: self.resume.clone(),
            training: recipe.training.clone(),
            procedure: recipe.procedure.clone(),
            optimizer: recipe.optimizer.clone(),
            scalings: model.scalings(recipe),
            lr_scheduler: recipe.lr_scheduler.clone(),
            validation: recipe.validation.clone(),
            checkpoint: recipe.checkpoint.clone(),
            metrics: recipe.metrics.clone(),
            seed: recipe.debug.seed,
            train: &*train,
            held_out: &*held_out,
            probe: probe.as_deref(),
            heads: heads.as_deref(),
            validate_first: recipe.model.pretrained().is_some(),
            tracking: data.tracking(),
            companions,
            adapter_only: base.is_some(),
            nonfinite: allowed().nonfinite,
            recipe: text,
            hyperparameters: recipe::hyperparameters(recipe),
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
        if !self.ranks.is_first() {
            return Ok(outcome);
        }
        if let (Some(model), Some(own)) = (outcome.model.as_decoder(), &self.resolved.intervention)
            && !model.intervention_tensors.is_empty()
        {
            own.write_trained(model, run_dir)?;
            talk!("intervention: {}", run_dir.join(files::TRAINED_INTERVENTION).display());
        }
        let classes = |totals: &_| K::class_table(data, totals);
        let about = result::About { sets: outcome.model.set_scores(data)?, ..about };
        result::write(run_dir, about, &outcome, (&*held_out, recipe.validation.batches), &classes, say)?;
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
    Err(polyhead_recipe::Problems::plain(problem.into()).into())
}

/// Where a recipe's run is written if nothing else is said.
pub fn default_folder(recipe: &Path) -> PathBuf {
    Path::new("checkpoints").join(recipe.file_stem().unwrap_or("run".as_ref()))
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
            let path = locate_checkpoint(Path::new(path), caller())?.0;
            let inside = path.canonicalize()?.parent() == Some(&run_dir.canonicalize()?);
            match inside {
                true => Ok(Some(path)),
                false => Err(Failure::Run(format!(
                    "{} is outside the run folder {}: name its run folder with --out",
                    path.display(),
                    run_dir.display()
                ))),
            }
        }
    }
}
