//! `polyhead train`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use burn::module::Module;
use polyhead_data::{DataConfig, Opened, Tokenizer};
use polyhead_models::{Decoder, parameters};
use polyhead_training::checkpoint::{clean_leftovers, list, newest_good};
use polyhead_training::hallucination::{Summary, ask};
use polyhead_training::run::{Job, Outcome, Probe, View, run};
use polyhead_training::run_folder::{RunLock, atomic_write};
use polyhead_training::{peak_memory_bytes, state};

use super::hallucination::asking;
use super::trained::{plain_prompt, write_text};
use crate::assemble::{self, Source};
use crate::cli::TrainArgs;
use crate::console::{Console, bytes, clock, talk, thousands};
use crate::costs::Costs;
use crate::pretrained::find_checkpoint;
use crate::recipe::{self, Loaded, Recipe};
use crate::report::Failure;
use crate::{result, signals};

/// Trains what a recipe says, or one after the other the stages of one that has stages.
pub fn train(args: TrainArgs) -> Result<(), Failure> {
    if args.tui {
        check_dashboard()?;
    }
    let mut overrides = args.recipe.overrides.clone();
    overrides.extend(args.device.iter().map(|device| format!("training.device={device}")));
    if let Some(staged) = crate::stages::read(&args.recipe.recipe, &overrides)? {
        return super::stages::train(&args, &staged);
    }
    let loaded = recipe::load(&args.recipe.recipe, &overrides)?;
    let run_dir = args.out.clone().unwrap_or_else(|| default_folder(&args.recipe.recipe));
    let sitting = Sitting { loaded: &loaded, run_dir: &run_dir, resume: &args.resume, stop: None, tui: args.tui };
    let trained = sit(sitting)?;
    summarize(&args, &trained, &run_dir);
    if let Some(tokenizer) = &trained.tokenizer {
        sample(&trained.recipe, &trained.outcome.model, tokenizer)?;
    }
    Ok(())
}

/// What is done until a run is at its end, or is told to stop.
pub struct Sitting<'a> {
    /// What to train.
    pub loaded: &'a Loaded,
    /// Where the run is written.
    pub run_dir: &'a Path,
    /// As `--resume`.
    pub resume: &'a str,
    /// Not 0 once the run is to be saved and left; `None` where nobody listens for signals yet.
    pub stop: Option<Arc<AtomicUsize>>,
    /// Whether a dashboard is shown.
    pub tui: bool,
}

/// A run that has come to its end.
pub struct Finished {
    /// What was trained.
    pub recipe: Recipe,
    /// How it ended.
    pub outcome: Outcome,
    /// What was learnt from, in words.
    data: String,
    /// The best possible loss, where the data tells.
    floor: Option<f64>,
    /// How the model reads text.
    tokenizer: Option<Tokenizer>,
}

/// Trains what a recipe says, from where the run stands.
///
/// # Errors
/// If something is missing or wrong, or a signal came; what was saved before stays whole.
pub fn sit(sitting: Sitting<'_>) -> Result<Finished, Failure> {
    let Sitting { loaded, run_dir, resume, stop, tui } = sitting;
    let device = assemble::training_device(&loaded.recipe)?;
    let lock = RunLock::acquire(run_dir)?;
    for left in clean_leftovers(run_dir)? {
        talk!("cleaned up after an interrupted save: {}", left.display());
    }
    let resume = choose_checkpoint(resume, run_dir)?;
    let resolved = match &resume {
        Some(checkpoint) => assemble::resume(loaded, checkpoint)?,
        None => assemble::resolve(loaded)?,
    };
    let (recipe, config) = (&resolved.recipe, &resolved.decoder);

    let started = Instant::now();
    let opened = resolved.data(&mut tokenizing())?;
    talk!("data: {} ({:.1} s)", opened.description, started.elapsed().as_secs_f64());
    if let Some(checkpoint) = &resume
        && let Some(problem) = assemble::changed_text(checkpoint, &opened)?
    {
        let hint = "put it back, or start another run with --out";
        return Err(Failure::Run(format!("{problem}\n  hint: a run goes on as what it was; {hint}")));
    }
    let model = resolved.first_model(opened.vocab_size, &device)?;
    let mechanism = (0..config.n_layers).map(|layer| config.mechanism(layer).name()).collect::<Vec<_>>();
    let count = thousands(model.num_params() as u64);
    let mut distinct = mechanism.clone();
    distinct.dedup();
    let learning: usize = parameters(&model).iter().filter(|one| one.learnt).map(|one| one.numbers).sum();
    let frozen = match model.num_params() - learning {
        0 => String::new(),
        frozen => format!(" ({} of them frozen)", thousands(frozen as u64)),
    };
    talk!("model: {count} parameters{frozen}, {} layers, attention: {}", config.n_layers, distinct.join(", "));
    if let Some(path) = recipe.model.pretrained.as_ref().filter(|_| resume.is_none()) {
        talk!("starts from the weights of {}", path.display());
    }

    let start = match &resume {
        Some(checkpoint) => {
            let step = state::read_progress(checkpoint)?.step;
            talk!("resume: from {} (step {step})", checkpoint.display());
            let given_up = list(run_dir)?.into_iter().filter(|(later, _)| *later > step);
            let given_up: Vec<String> = given_up.map(|(_, path)| path.display().to_string()).collect();
            if !given_up.is_empty() {
                talk!("resume: what came after that step is given up: {}", given_up.join(", "));
            }
            step
        }
        None => 0,
    };
    let text = recipe::resolved(recipe)?;
    let about = result::About {
        id: result::id(&text, opened.text_hash.as_deref()),
        data: opened.description.clone(),
        costs: Costs::of(recipe, config, opened.vocab_size),
        environment: result::Environment::here(&recipe.training.device),
    };
    atomic_write(&run_dir.join("recipe.toml"), text.as_bytes())?;
    let mut companions = vec![
        ("recipe.toml".to_owned(), text.clone().into_bytes()),
        ("data.json".to_owned(), assemble::data_record(&opened)),
    ];
    if let Some(tokenizer) = &opened.tokenizer {
        companions.push(("tokenizer.json".into(), tokenizer.to_json().as_bytes().to_vec()));
        companions.push(("tokenizer_config.json".into(), tokenizer.config_json().into_bytes()));
    }
    let stop = stop.map_or_else(|| signals::listen(tui), Ok)?;
    let training = recipe.training.clone();
    let tokens_per_step = (training.seq_len * training.batch_size * training.gradient_accumulation_steps) as u64;
    let (train, held_out) = (Source(opened.train), Source(opened.validation));
    let asked = assemble::world(recipe).map(|world| (world.questions(), asking(&world, config.n_layers)));
    let about_facts = asked.as_ref().map(|(questions, asking)| {
        move |model: &Decoder| {
            let numbers = Summary::of(&ask(model, questions, asking), asking.confident).numbers();
            numbers.into_iter().map(|(name, value)| (format!("facts/{name}"), value)).collect()
        }
    });
    let job = Job {
        run_dir: run_dir.to_owned(),
        lock,
        resume,
        training,
        procedure: recipe.procedure.clone(),
        optimizer: recipe.optimizer.clone(),
        lr_scheduler: recipe.lr_scheduler.clone(),
        validation: recipe.validation.clone(),
        checkpoint: recipe.checkpoint.clone(),
        metrics: recipe.metrics.clone(),
        seed: recipe.debug.seed,
        train: &train,
        held_out: &held_out,
        probe: about_facts.as_ref().map(|probe| probe as &Probe<'_>),
        tracking: opened.tracking,
        companions,
        recipe: text,
        stop: &stop,
    };
    #[cfg(feature = "tui")]
    let dashboard = tui.then(|| crate::dashboard::Dashboard::open(recipe.training.steps, stop.clone()));
    #[cfg(not(feature = "tui"))]
    let dashboard: Option<Console> = None;
    let mut view: Box<dyn View> = match dashboard {
        Some(dashboard) => Box::new(dashboard),
        None => Box::new(Console::new(start, recipe.training.steps, tokens_per_step)),
    };
    let outcome = run(model, job, view.as_mut())?;
    drop(view);

    if let Some(signal) = outcome.interrupted {
        talk!("\nstopped at step {}; saved to {}", outcome.progress.step, outcome.checkpoint.display());
        talk!("the same command goes on from there");
        return Err(Failure::Interrupted(signal));
    }
    result::write(run_dir, about, &outcome, &held_out, recipe.validation.batches)?;
    let Opened { description: data, floor, tokenizer, .. } = opened;
    Ok(Finished { recipe: resolved.recipe, outcome, data, floor, tokenizer })
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
            let path = find_checkpoint(Path::new(path))?;
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

fn summarize(args: &TrainArgs, trained: &Finished, run_dir: &Path) {
    let Finished { recipe, outcome, data, floor, .. } = trained;
    let progress = &outcome.progress;
    let time = Duration::from_micros(progress.microseconds);
    talk!("\ntrained  {} steps, {} targets, {}", progress.step, thousands(progress.targets), clock(time));
    talk!("on       {data}");
    if let Some(sums) = outcome.validation {
        let bits = sums.bits_per_byte().map_or(String::new(), |bits| format!(", {bits:.3} bits per byte"));
        let accuracy = 100.0 * sums.accuracy();
        let floor = floor.map_or(String::new(), |floor| format!(", best possible loss {floor:.4}"));
        talk!("reached  validation loss {:.4}{bits}, accuracy {accuracy:.1} %{floor}", sums.mean_loss());
    }
    if let Some(memory) = peak_memory_bytes() {
        talk!("memory   {} at most", bytes(memory));
    }
    if progress.skipped > 0 {
        talk!("skipped  {} steps that were not finite", progress.skipped);
    }
    let run = run_dir.display();
    let polyhead = program();
    talk!("lies in  {run} (picture: {run}/curve.svg; all curves: tensorboard --logdir {run})");
    if matches!(recipe.data, DataConfig::Chat(_) | DataConfig::LongContext(_)) {
        talk!("next     {polyhead} generate {run} --chat --prompt \"...\"");
        talk!("         {polyhead} eval {run} --task all");
    } else if recipe.data.is_text() {
        talk!("next     {polyhead} generate {run} --prompt \"...\"");
    } else {
        talk!("next     {polyhead} eval {run}");
    }
    let steps = format!("training.steps={}", 2 * progress.step);
    let same = args.recipe.overrides.iter().filter(|text| !text.starts_with("training.steps")).chain([&steps]);
    let same = same.map(|text| quoted(text)).collect::<Vec<_>>().join(" ");
    talk!("         {polyhead} train {} {same} --out {run}   # go on", args.recipe.recipe.display());
}

/// This program as it was called, so that what is suggested works when typed.
pub fn program() -> String {
    std::env::args().next().map_or_else(|| "polyhead".into(), |name| quoted(&name))
}

/// As it is typed into a shell.
pub fn quoted(argument: &str) -> String {
    let plain = |sign: char| sign.is_ascii_alphanumeric() || "=._-/:,+".contains(sign);
    if argument.chars().all(plain) { argument.to_owned() } else { format!("'{}'", argument.replace('\'', "'\\''")) }
}

/// A sample of what the model writes, on standard output.
fn sample(recipe: &Recipe, model: &Decoder, tokenizer: &Tokenizer) -> Result<(), Failure> {
    talk!("\nsample:");
    let prompt = plain_prompt(tokenizer, &recipe.generation.prompt)?;
    write_text(&model.valid(), tokenizer, &prompt, &recipe.generation.sampling)?;
    Ok(())
}
