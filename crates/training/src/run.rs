//! The loop. One function, top to bottom: batch, step, log, validate, save.

use polyhead_kernels::seed_random;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use polyhead_models::weights::NonFinite;
use polyhead_models::{Decoder, Evaluated, Learner, Lesson, Sums};
use serde_json::json;

use crate::checkpoint::{self, Best, read_best, write_best};
use crate::config::{CheckpointConfig, MetricsConfig, OptimizerConfig, TrainingConfig, ValidationConfig};
use crate::evaluate::{self, Batches, evaluate};
use crate::memory::peak_memory_bytes;
use crate::observe::{self, Look};
use crate::optimizer::Optimizer;
use crate::picture::matrix;
use crate::procedure::{HeldOut, Parts, Procedure, ProcedureConfig, Shown, StepContext, StepReport, Trainee};
use crate::run_folder::{MetricsLog, RunLock};
use crate::schedule;
use crate::state::{self, Companions, Progress};
use crate::tensorboard::EventWriter;
use crate::{TrainError, curve};

/// Everything that a run is made of.
pub struct Job<'a, M: Learner = Decoder> {
    /// Where the run is written; the caller holds its lock.
    pub run_dir: PathBuf,
    /// Proof that nobody else writes there.
    pub lock: RunLock,
    /// A checkpoint to go on from, already verified; `None` starts afresh.
    pub resume: Option<PathBuf>,
    /// How long, on how much.
    pub training: TrainingConfig,
    /// What a step does.
    pub procedure: ProcedureConfig,
    /// How weights move.
    pub optimizer: OptimizerConfig,
    /// How fast.
    pub lr_scheduler: crate::config::LrSchedulerConfig,
    /// When the model is validated.
    pub validation: ValidationConfig,
    /// When it is saved.
    pub checkpoint: CheckpointConfig,
    /// What is written down.
    pub metrics: MetricsConfig,
    /// Decides the device's random numbers, step by step.
    pub seed: u64,
    /// Batches to learn from.
    pub train: &'a dyn Batches<M::Batch>,
    /// Batches to validate on.
    pub held_out: &'a dyn Batches<M::Batch>,
    /// Further numbers about the model, by name: measured before the first step and with each validation.
    pub probe: Option<&'a Probe<'a, M>>,
    /// Validate before the first step too: what a model that was trained elsewhere starts from.
    pub validate_first: bool,
    /// Texts that the procedure watches the model on, a row each; no part of `train`.
    pub tracking: Vec<M::Batch>,
    /// Files that go into every checkpoint as they are: recipe, tokenizer.
    pub companions: Companions,
    /// What is done where the weights that the run goes on from are not finite.
    pub nonfinite: NonFinite,
    /// The recipe as text, for TensorBoard.
    pub recipe: String,
    /// Not 0 once the run is to be saved and left: the number of the signal.
    pub stop: &'a AtomicUsize,
}

/// Measures a model, on a device without a tape.
pub type Probe<'a, M = Decoder> = dyn Fn(&M) -> Vec<(String, f64)> + 'a;

/// Somebody who watches: a progress bar, a dashboard. Nothing that is told here changes the run.
pub trait View {
    /// A step was taken.
    fn stepped(&mut self, step: &Logged);
    /// The model was validated.
    fn validated(&mut self, step: u64, sums: &Evaluated);
    /// The run was saved.
    fn saved(&mut self, step: u64);
}

/// A step as it is logged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Logged {
    /// The step, from 1.
    pub step: u64,
    /// Mean cross-entropy in nats.
    pub loss: f64,
    /// Bits per byte, where the data is text.
    pub bits_per_byte: Option<f64>,
    /// Before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub lr: f64,
    /// Input tokens (for classifiers: examples) per second since the last logged step; time spent validating and saving does not count.
    pub tokens_per_second: f64,
    /// Largest resident set, in bytes.
    pub memory: Option<u64>,
    /// Whether the step was left out.
    pub skipped: bool,
    /// Whether this step is written to the logs.
    pub logged: bool,
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome<M: Learner = Decoder> {
    /// The trained model.
    pub model: M,
    /// Counters at the end.
    pub progress: Progress,
    /// The last validation, if there was one in this sitting.
    pub validation: Option<M::Sums>,
    /// The best checkpoint by validation loss.
    pub best: Option<Best>,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
    /// Why the procedure has ended the run, where it has: more steps change nothing.
    pub ended: Option<String>,
    /// The signal that ended the run early.
    pub interrupted: Option<usize>,
}

/// Trains `model` (on an autodiff device) to the last step, or until told to stop.
///
/// # Errors
/// See [`TrainError`]; what was saved before stays whole.
pub fn run<M: Trainee>(mut model: M, job: Job<'_, M>, view: &mut dyn View) -> Result<Outcome<M>, TrainError> {
    let device = model.device();
    let steps = job.training.steps;
    let (mut progress, optimizer) = match &job.resume {
        None => (Progress::default(), Optimizer::new(job.optimizer.clone())),
        Some(from) => {
            let progress = state::read_progress(from)?;
            model = state::read_model(from, model, job.nonfinite)?;
            let inner = device.clone().inner();
            (progress.clone(), state::read_optimizer(from, job.optimizer.clone(), progress.updates, &inner)?)
        }
    };
    let parts = Parts {
        optimizer,
        training: &job.training,
        model: &model,
        tracking: &job.tracking,
        batches_per_epoch: job.train.per_epoch(),
    };
    let mut procedure = M::procedure(&job.procedure, parts, &progress.procedure)?;
    let resumed = job.resume.as_ref().map(|_| progress.step);
    if let Some(step) = resumed {
        checkpoint::discard_after(&job.run_dir, step)?;
    }
    let mut best = read_best(&job.run_dir)?.filter(|best| resumed.is_some_and(|step| best.step <= step));
    let mut metrics = MetricsLog::open(&job.run_dir, resumed)?;
    let mut events = match job.metrics.tensorboard {
        true => Some(EventWriter::create(&job.run_dir, resumed)?),
        false => None,
    };
    if let Some(events) = events.as_mut().filter(|_| resumed.is_none()) {
        events.text("recipe", 0, &format!("```toml\n{}\n```", job.recipe))?;
    }

    if resumed.is_none() {
        let probed = job.probe.map_or(Vec::new(), |probe| probe(&model.valid()));
        if job.validate_first {
            let sums = evaluate(&model, job.held_out, job.validation.batches)?;
            write_validation(&mut metrics, events.as_mut(), 0, &sums, &probed)?;
            view.validated(0, &sums.evaluated());
        } else if !probed.is_empty() {
            write_numbers(&mut metrics, events.as_mut(), (json!({ "step": 0 }), 0), &probed)?;
        }
    }

    let mut saved = job.resume.clone();
    let mut validation = None;
    let (mut tokens_since, mut micros_since) = (0u64, 0u64);
    while progress.step < steps && procedure.ended().is_none() && job.stop.load(Ordering::SeqCst) == 0 {
        let step = progress.step + 1;
        let started = Instant::now();
        let accumulation = job.training.gradient_accumulation_steps as u64;
        let positions = progress.position..progress.position + accumulation;
        let batches = positions.map(|position| job.train.batch(position)).collect::<Result<Vec<_>, _>>()?;
        let lr = job.optimizer.lr() * schedule::factor(&job.lr_scheduler, step - 1, steps);
        seed_random(seed_of_step(job.seed, step));
        let context = StepContext { step, lr, seed: job.seed, position: progress.position };
        let (new, report) = procedure.step(model, &batches, &context)?;
        model = new;

        let micros = started.elapsed().as_micros() as u64;
        tokens_since += batches.iter().map(Lesson::inputs).sum::<u64>();
        micros_since += micros;
        progress.step = step;
        progress.position += accumulation;
        progress.updates = procedure.optimizer().steps();
        progress.targets += report.targets;
        progress.skipped += u64::from(report.skipped);
        progress.microseconds += micros;

        let last = step == steps || procedure.ended().is_some();
        let due = |interval: u64| last || (interval > 0 && step.is_multiple_of(interval));
        let bytes: u64 = batches.iter().map(Lesson::target_bytes).sum();
        let bits = report.loss * report.targets as f64 / std::f64::consts::LN_2;
        let mut logged = Logged {
            step,
            loss: report.loss,
            bits_per_byte: (bytes > 0).then(|| bits / bytes as f64),
            grad_norm: report.grad_norm,
            lr,
            tokens_per_second: tokens_since as f64 / (micros_since.max(1) as f64 * 1e-6),
            memory: None,
            skipped: report.skipped,
            logged: due(job.metrics.log_freq) || step == 1 || report.skipped || report.log,
        };
        if logged.logged {
            logged.memory = peak_memory_bytes();
            write_step(&mut metrics, events.as_mut(), &logged, &report)?;
            (tokens_since, micros_since) = (0, 0);
        }
        view.stepped(&logged);

        let mut is_best = false;
        if due(job.validation.interval) {
            let sums = evaluate(&model, job.held_out, job.validation.batches)?;
            let count = evaluate::count(job.held_out, job.validation.batches);
            let held_out = HeldOut { batches: job.held_out, count, seed: job.seed, observe: job.metrics.observe };
            let mut measured = procedure.measure(&model, held_out)?;
            measured.extend(job.probe.map_or(Vec::new(), |probe| probe(&model.valid())));
            write_validation(&mut metrics, events.as_mut(), step, &sums, &measured)?;
            let told = sums.evaluated();
            let loss = told.mean_loss();
            is_best = loss.is_finite() && best.as_ref().is_none_or(|best| loss < best.validation_loss);
            if is_best {
                best = Some(Best { step, validation_loss: loss });
            }
            view.validated(step, &told);
            validation = Some(sums);
        }
        let look =
            Look { numbers: due(job.validation.interval), maps: events.is_some() && due(job.metrics.image_interval) };
        if job.metrics.observe && (look.numbers || look.maps) {
            let batch = job.held_out.batch(0)?;
            observe::write(look, (&mut metrics, events.as_mut()), (&model, &batch), step)?;
        }

        if due(job.checkpoint.interval) || is_best || job.stop.load(Ordering::SeqCst) != 0 {
            saved = Some(save(&job, &model, &*procedure, &progress, &mut metrics, events.as_mut(), best.as_ref())?);
            view.saved(step);
        }
    }

    let checkpoint = match saved {
        Some(path) => path,
        // Stopped before the first step: there is a run to go on with all the same.
        None => save(&job, &model, &*procedure, &progress, &mut metrics, events.as_mut(), best.as_ref())?,
    };
    let signal = job.stop.load(Ordering::SeqCst);
    let ended = procedure.ended();
    let interrupted = (signal != 0 && progress.step < steps && ended.is_none()).then_some(signal);
    Ok(Outcome { model, progress, validation, best, checkpoint, ended, interrupted })
}

/// Random numbers of a step depend on the seed and the step only, so that a resumed run draws the same.
fn seed_of_step(seed: u64, step: u64) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"polyhead step");
    hasher.update(&seed.to_le_bytes());
    hasher.update(&step.to_le_bytes());
    let bytes = *hasher.finalize().as_bytes();
    u64::from_le_bytes(std::array::from_fn(|i| bytes[i]))
}

/// Adds numbers to a line of the log, and to the events.
fn write_numbers(
    metrics: &mut MetricsLog,
    events: Option<&mut EventWriter>,
    (mut line, step): (serde_json::Value, u64),
    numbers: &[(String, f64)],
) -> Result<(), TrainError> {
    for (name, value) in numbers {
        line[name] = json!(value);
    }
    metrics.append(&line)?;
    let Some(events) = events else { return Ok(()) };
    for (name, value) in numbers {
        events.scalar(name, step, *value as f32)?;
    }
    Ok(events.flush()?)
}

/// Logs first, so that nothing up to the saved step can be missing; then the checkpoint; then what may go.
fn save<M: Learner>(
    job: &Job<'_, M>,
    model: &M,
    procedure: &dyn Procedure<M>,
    progress: &Progress,
    metrics: &mut MetricsLog,
    events: Option<&mut EventWriter>,
    best: Option<&Best>,
) -> Result<PathBuf, TrainError> {
    metrics.sync()?;
    if let Some(events) = events {
        events.sync()?;
    }
    let progress = Progress { procedure: procedure.state(), ..progress.clone() };
    let path = state::save(&job.run_dir, model, procedure, &progress, &job.companions)?;
    curve::draw(&job.run_dir)?;
    let mut keep = Vec::new();
    if let Some(best) = best {
        write_best(&job.run_dir, best)?;
        keep.push(job.run_dir.join(checkpoint::folder_name(best.step)));
    }
    checkpoint::prune(&job.run_dir, job.checkpoint.keep_latest_k, &keep)?;
    Ok(path)
}

fn write_step(
    metrics: &mut MetricsLog,
    events: Option<&mut EventWriter>,
    logged: &Logged,
    report: &StepReport,
) -> Result<(), TrainError> {
    let penalty = report.penalty;
    let Logged { step, loss, bits_per_byte, grad_norm, lr, tokens_per_second, memory, skipped, .. } = *logged;
    let mut line = json!({
        "step": step, "loss": loss, "loss_bits": loss.to_bits(), "bits_per_byte": bits_per_byte, "penalty": penalty,
        "grad_norm": grad_norm, "learning_rate": lr, "tokens_per_second": tokens_per_second, "memory": memory,
        "skipped": skipped,
    });
    for (name, value) in &report.measured {
        line[name] = json!(value);
    }
    metrics.append(&line)?;
    let Some(events) = events else { return Ok(()) };
    let mut scalar = |tag: &str, value: f64| events.scalar(tag, step, value as f32);
    scalar("loss/train", loss)?;
    scalar("grad_norm", grad_norm)?;
    scalar("learning_rate", lr)?;
    scalar("throughput/tokens_per_second", tokens_per_second)?;
    for (tag, value) in [("loss/train_bits_per_byte", bits_per_byte), ("loss/penalty", penalty)] {
        if let Some(value) = value {
            scalar(tag, value)?;
        }
    }
    for (name, value) in &report.measured {
        scalar(name, *value)?;
    }
    if let Some(memory) = memory {
        scalar("memory/peak_bytes", memory as f64)?;
    }
    for (name, shown) in &report.shown {
        match shown {
            Shown::Histogram(values) => {
                events.histogram(name, step, values)?;
            }
            Shown::Picture(png) => events.image_png(name, step, png.width, png.height, &png.bytes)?,
        }
    }
    Ok(events.flush()?)
}

fn write_validation(
    metrics: &mut MetricsLog,
    mut events: Option<&mut EventWriter>,
    step: u64,
    sums: &impl Sums,
    measured: &[(String, f64)],
) -> Result<(), TrainError> {
    let told = sums.evaluated();
    let (loss, bits, accuracy) = (told.mean_loss(), told.bits_per_byte(), told.accuracy());
    let line = json!({
        "step": step, "validation_loss": loss, "validation_loss_bits": loss.to_bits(),
        "validation_bits_per_byte": bits, "validation_accuracy": accuracy, "validation_targets": told.targets,
    });
    let mut numbers: Vec<(String, f64)> =
        sums.numbers().iter().map(|(name, value)| (name.to_string(), *value)).collect();
    numbers.extend(sums.of_layers());
    numbers.extend_from_slice(measured);
    write_numbers(metrics, events.as_deref_mut(), (line, step), &numbers)?;
    let Some(events) = events else { return Ok(()) };
    events.scalar("loss/validation", step, loss as f32)?;
    events.scalar("accuracy/validation", step, accuracy as f32)?;
    if let Some(bits) = bits {
        events.scalar("loss/validation_bits_per_byte", step, bits as f32)?;
    }
    for (name, shown) in sums.matrices() {
        let png = matrix(&shown)?;
        events.image_png(name, step, png.width, png.height, &png.bytes)?;
    }
    Ok(events.flush()?)
}
