//! The loop: what follows a step (validating, observing), saving, the next step. [`run`] has their order; each is a function
//! below. What a run is made of is `job.rs`, what it writes beside its checkpoints `record.rs`, what it is asked for from outside
//! `requests.rs`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use polyhead_models::{EvalTotals, TrainBatch};
use serde_json::json;
use tracing::info_span;

use crate::TrainError;
use crate::checkpoint::{self, Best, recover_best, write_best};
use crate::evaluate::{self, Batches, evaluate_on_ranks};
use crate::memory::peak_memory_bytes;
use crate::optimizer::Optimizer;
use crate::procedure::{HeldOut, Parts, Procedure, StepContext, StepReport};
use crate::procedures::TrainableModel;
use crate::schedule;
use crate::sharding::{gather_state, keep_own};
use crate::state::{self, Owed, Progress, Saving};

mod job;
mod observe;
mod record;
mod requests;

pub use job::{Job, Logged, Outcome, Probe, View};
pub(crate) use record::Record;
pub use requests::Requests;

use requests::PuttingOff;

/// Trains `model` (on an autodiff device) to the last step, or until told to stop.
///
/// # Errors
/// See [`TrainError`]; what was saved before stays whole, and what can be saved is.
pub fn run<M: TrainableModel>(model: M, job: Job<'_, M>, view: &mut dyn View) -> Result<Outcome<M>, TrainError> {
    let (mut run, mut model) = Run::begin(model, job, view)?;
    let signal = loop {
        let put_off = match run.settle(&model) {
            Ok(()) => false,
            Err(TrainError::PutOff) => true,
            Err(error) => return Err(run.kept_before(&model, error)),
        };
        let (signal, asked) = run.take_requests();
        run.save_if_due(&model, signal != 0 || asked)?;
        if let Some(path) = run.saved.as_ref().filter(|_| asked) {
            run.record.note(format!("saved as asked, in {}; going on", path.display()));
        }
        run.tell();
        if signal != 0 {
            break signal;
        }
        if put_off {
            continue; // saved as asked: now what was put off
        }
        if run.is_last() {
            break 0;
        }
        model = run.step(model)?;
    };
    let checkpoint = match run.saved.take() {
        Some(path) => path,
        // Stopped before the first step: there is a run to go on with all the same.
        None => run.save(&model)?,
    };
    let missing = run.record.missing();
    run.tell();
    let Run { progress, procedure, validation, best, .. } = run;
    let interrupted = (signal != 0).then_some(signal);
    let reached = || progress.reached.then(|| "the accuracy that validation.stop_accuracy asks for is reached".into());
    let ended = procedure.ended().or_else(reached);
    Ok(Outcome { model, progress, validation, best, checkpoint, ended, interrupted, missing })
}

/// A run at work.
struct Run<'a, 'v, M: TrainableModel> {
    job: Job<'a, M>,
    view: &'v mut dyn View,
    procedure: Box<dyn Procedure<M>>,
    progress: Progress,
    record: Record,
    best: Option<Best>,
    /// The last validation of this process.
    validation: Option<M::Totals>,
    /// The validation loss after this very step.
    loss_here: Option<f64>,
    /// Whether it is the smallest so far, and not saved yet.
    is_best: bool,
    /// The last checkpoint.
    saved: Option<PathBuf>,
    /// Whether a step was taken since.
    unsaved: bool,
    tokens_since: u64,
    micros_since: u64,
    /// How much of that time went into communication.
    waited_since: Duration,
}

impl<'a, 'v, M: TrainableModel> Run<'a, 'v, M> {
    /// Reads the state of a run that goes on, and opens its logs.
    fn begin(mut model: M, job: Job<'a, M>, view: &'v mut dyn View) -> Result<(Self, M), TrainError> {
        let (ranks, device) = (job.ranks, model.device());
        let (mut progress, mut optimizer) = match &job.resume {
            None => (Progress::default(), Optimizer::new(job.optimizer.clone())),
            Some(from) => {
                let progress = state::read_progress(from)?;
                model = state::read_model(from, model, job.nonfinite)?;
                let inner = device.clone().inner();
                (progress.clone(), state::read_optimizer(from, job.optimizer.clone(), progress.updates, &inner)?)
            }
        };
        if ranks.size() > 1 {
            ranks.check_same(job.identity(&model)?)?;
        }
        if ranks.shards_optimizer() {
            keep_own(&mut optimizer, &model, ranks);
        }
        let parts = Parts {
            optimizer: optimizer.with_scalings(job.scalings.clone()),
            training: &job.training,
            model: &model,
            tracking: job.tracking,
            batches_per_epoch: job.train.per_epoch(),
        };
        let procedure = M::procedure(&job.procedure, parts, &progress.procedure)?;
        let resumed = job.resume.as_ref().map(|_| progress.step);
        if resumed.is_none() {
            progress.owed.validation = job.validate_first || job.probe.is_some();
            progress.owed.heads = job.heads.is_some();
        }
        let (best, notes) = ranks.from_first(|| {
            if let Some(step) = resumed {
                checkpoint::discard_after(&job.run_dir, step)?;
            }
            Ok::<_, TrainError>(recover_best(&job.run_dir, progress.step)?)
        })?;
        let mut record = ranks.agree(match ranks.is_first() {
            true => Record::open(&job.run_dir, job.metrics.tensorboard, resumed, (&job.recipe, &job.hyperparameters)),
            false => Ok(Record::none(&job.run_dir)),
        })?;
        notes.into_iter().for_each(|note| record.note(format!("warning: {note}")));
        let saved = job.resume.clone();
        let mut run = Self {
            job,
            view,
            procedure,
            progress,
            record,
            best,
            validation: None,
            loss_here: None,
            is_best: false,
            saved,
            unsaved: false,
            tokens_since: 0,
            micros_since: 0,
            waited_since: Duration::ZERO,
        };
        if resumed.is_some() {
            run.prune(); // a kill may have come before
        }
        Ok((run, model))
    }

    fn is_last(&self) -> bool {
        self.progress.step >= self.job.training.steps || self.progress.reached || self.procedure.ended().is_some()
    }

    /// Whether what happens every `interval` steps happens after this one.
    fn due(&self, interval: u64) -> bool {
        self.is_last() || (interval > 0 && self.progress.step.is_multiple_of(interval))
    }

    /// What is asked of any rank: the signal to leave with, and whether to save.
    fn take_requests(&self) -> (usize, bool) {
        let all = self.job.ranks.share(self.job.requests.take());
        all.into_iter().fold((0, false), |asked, (stop, save)| (asked.0.max(stop), asked.1 || save))
    }

    /// What the next step learns from.
    fn read(&self, model: &M) -> Result<Read<M::Batch>, TrainError> {
        let (ranks, train, start) = (self.job.ranks, self.job.train, self.progress.position);
        let mine = ranks.own(self.job.training.gradient_accumulation_steps as u64);
        let batches = mine.map(|pass| train.batch(start + pass)).collect::<Result<_, _>>()?;
        let lacks_first = !ranks.is_first() && model.is_due(self.progress.step);
        let first = lacks_first.then(|| train.batch(start)).transpose()?;
        Ok((batches, first))
    }

    /// One step: batches, update, log.
    fn step(&mut self, mut model: M) -> Result<M, TrainError> {
        let ranks = self.job.ranks;
        let (steps, step) = (self.job.training.steps, self.progress.step + 1);
        let _span = info_span!("step", step).entered();
        let started = Instant::now();
        ranks.take_waited();
        let (batches, first) = match ranks.agree(info_span!("data").in_scope(|| self.read(&model))) {
            Ok(read) => read,
            Err(error) => return Err(self.kept_before(&model, error)),
        };
        let [inputs, targets, bytes] = sum(ranks.share(sum(batches.iter().map(counts))));
        let lr = self.job.optimizer.lr() * schedule::factor(&self.job.lr_scheduler, step - 1, steps);
        let (seed, position) = (self.job.seed, self.progress.position);
        let passes = self.job.training.gradient_accumulation_steps as u64;
        let context = StepContext { step, lr, seed, position, passes, targets, ranks };
        context.seed_pass(0);
        if let Some(first) = first.as_ref().or(batches.first()) {
            model.before_step(first, step - 1);
        }
        let (model, mut report) = self.procedure.step(model, &batches, &context)?;
        if report.refused {
            let StepReport { loss, grad_norm, .. } = report;
            return Err(match report.torn {
                true => TrainError::Torn { step, loss, grad_norm, kept: self.kept_earlier() },
                false => TrainError::Nonfinite { step, loss, grad_norm, kept: self.kept(&model) },
            });
        }

        let micros = started.elapsed().as_micros() as u64;
        self.tokens_since += inputs;
        self.micros_since += micros;
        self.waited_since += ranks.take_waited();
        let progress = &mut self.progress;
        progress.step = step;
        progress.position += passes;
        progress.updates = self.procedure.optimizer().steps();
        progress.targets += report.targets;
        progress.skipped += u64::from(report.skipped);
        progress.skipped_in_row = if report.skipped { progress.skipped_in_row + 1 } else { 0 };
        progress.microseconds += micros;
        (self.unsaved, self.is_best, self.loss_here) = (true, false, None);

        let bits = report.loss * report.targets as f64 / std::f64::consts::LN_2;
        let mut logged = Logged {
            step,
            loss: report.loss,
            bits_per_byte: (bytes > 0).then(|| bits / bytes as f64),
            grad_norm: report.grad_norm,
            lr,
            tokens_per_second: self.tokens_since as f64 / (self.micros_since.max(1) as f64 * 1e-6),
            memory: None,
            skipped: report.skipped,
            logged: self.due(self.job.metrics.log_freq) || step == 1 || report.skipped || report.log,
        };
        if logged.logged {
            logged.memory = peak_memory_bytes();
            if ranks.size() > 1 {
                let share = self.waited_since.as_micros() as f64 / self.micros_since.max(1) as f64;
                report.measured.push(("throughput/communication_share".into(), share));
                let peaks = ranks.share(logged.memory).into_iter().enumerate();
                report
                    .measured
                    .extend(peaks.filter_map(|(rank, peak)| Some((format!("memory/rank_{rank}"), peak? as f64))));
            }
            self.record.step(&logged, &report);
            (self.tokens_since, self.micros_since, self.waited_since) = (0, 0, Duration::ZERO);
        }
        if report.targets == 0 {
            self.record
                .note(format!("warning: step {step} had no target to learn from, so that its loss of 0 means nothing"));
        }
        self.view.stepped(&logged);
        let (validation, observe) = (self.due(self.job.validation.interval), self.job.metrics.observe);
        let maps = self.job.metrics.tensorboard && self.due(self.job.metrics.image_interval);
        let heads = self.job.heads.is_some() && self.due(self.job.metrics.heads_interval);
        self.progress.owed = Owed { validation, numbers: observe && validation, maps: observe && maps, heads };
        self.check_skipped(&model)?;
        Ok(model)
    }

    /// Ends a run whose steps are all left out.
    fn check_skipped(&mut self, model: &M) -> Result<(), TrainError> {
        let (in_row, most) = (self.progress.skipped_in_row, self.job.training.max_skipped_steps);
        match most > 0 && in_row >= most {
            true => Err(TrainError::Skipped { step: self.progress.step, in_row, kept: self.kept(model) }),
            false => Ok(()),
        }
    }

    /// Does what is owed to the last step: validates, observes. [`TrainError::PutOff`] where the run is to be saved first.
    fn settle(&mut self, model: &M) -> Result<(), TrainError> {
        if self.progress.owed.is_nothing() {
            return Ok(());
        }
        let step = self.progress.step;
        if self.progress.owed.validation {
            let _span = info_span!("validation").entered();
            if step == 0 {
                self.measure_first(model)?
            } else {
                self.validate(model)?
            }
            self.progress.owed.validation = false;
        }
        if let Some(heads) = self.job.heads.filter(|_| self.progress.owed.heads) {
            let measured = self.job.ranks.on_first(|| self.measured(heads, model))?;
            self.record.numbers(json!({ "step": step }), step, &measured);
            self.progress.owed.heads = false;
        }
        let Owed { numbers, maps, .. } = self.progress.owed;
        if numbers || maps {
            let _span = info_span!("observe").entered();
            let (held_out, record) = (self.held_out(), &mut self.record);
            self.job.ranks.on_first(|| {
                let batch = held_out.batch(0)?;
                observe::write(observe::Look { numbers, maps }, record, (model, &batch), step);
                Ok(())
            })?;
        }
        self.progress.owed = Owed::default();
        Ok(())
    }

    /// What is validated on, for as long as nothing is asked for.
    fn held_out(&self) -> PuttingOff<'a, M::Batch> {
        PuttingOff { batches: self.job.held_out, requests: self.job.requests }
    }

    fn probe(&self, model: &M) -> Result<Vec<(String, f64)>, TrainError> {
        self.job.probe.map_or(Ok(Vec::new()), |probe| self.measured(probe, model))
    }

    fn measured(&self, probe: &Probe<'_, M>, model: &M) -> Result<Vec<(String, f64)>, TrainError> {
        probe(&model.valid(), &|| !self.job.requests.any()).ok_or(TrainError::PutOff)
    }

    /// What the model starts from.
    fn measure_first(&mut self, model: &M) -> Result<(), TrainError> {
        let probed = self.job.ranks.on_first(|| self.probe(model))?;
        if self.job.validate_first {
            let sums = evaluate_on_ranks(model, &self.held_out(), self.job.validation.batches, self.job.ranks)?;
            self.record.validation(0, &sums, &probed);
            self.view.validated(0, &sums.evaluated());
        } else if !probed.is_empty() {
            self.record.numbers(json!({ "step": 0 }), 0, &probed);
        }
        Ok(())
    }

    fn validate(&mut self, model: &M) -> Result<(), TrainError> {
        let (step, limit, held_out) = (self.progress.step, self.job.validation.batches, self.held_out());
        let sums = evaluate_on_ranks(model, &held_out, limit, self.job.ranks)?;
        let count = evaluate::count(&held_out, limit);
        let observe = self.job.metrics.observe;
        let held_out = HeldOut { batches: &held_out, count, seed: self.job.seed, observe };
        let measured = self.job.ranks.on_first(|| {
            let mut measured = self.procedure.measure(model, held_out)?;
            measured.extend(self.probe(model)?);
            Ok(measured)
        })?;
        self.record.validation(step, &sums, &measured);
        let told = sums.evaluated();
        let loss = told.mean_loss();
        if told.targets > 0 && loss.is_finite() {
            self.loss_here = Some(loss);
            self.is_best = self.best.is_none_or(|best| loss < best.validation_loss);
        } else if told.targets == 0 {
            self.record.note(format!(
                "warning: the validation at step {step} had no target, so that its loss of 0 means nothing"
            ));
        }
        if self.is_best {
            self.best = Some(Best { step, validation_loss: loss });
        }
        self.view.validated(step, &told);
        self.validation = Some(sums);
        self.progress.reached |= self.job.validation.stop_accuracy.is_some_and(|asked| told.accuracy() >= asked);
        Ok(())
    }

    /// Saves at every interval, at the end, what is the best so far, and what is asked for.
    fn save_if_due(&mut self, model: &M, asked: bool) -> Result<(), TrainError> {
        let due = self.unsaved && (asked || self.due(self.job.checkpoint.interval));
        if due || self.is_best || (asked && self.saved.is_none()) {
            self.save(model)?;
            self.view.saved(self.progress.step);
        }
        Ok(())
    }

    /// Logs first, so that nothing up to the saved step can be missing; then the checkpoint, which counts; then what is made
    /// from it, and what may go.
    fn save(&mut self, model: &M) -> Result<PathBuf, TrainError> {
        let _span = info_span!("checkpoint").entered();
        let (ranks, run_dir) = (self.job.ranks, self.job.run_dir.clone());
        self.record.sync();
        let saving = Saving {
            model,
            progress: &Progress { procedure: self.procedure.state(), ..self.progress.clone() },
            companions: &self.job.companions,
            validation_loss: self.loss_here,
            best: self.best,
            adapter_only: self.job.adapter_only,
            nonfinite: self.job.nonfinite,
        };
        let optimizer = self.procedure.optimizer();
        let gathered = ranks.shards_optimizer().then(|| gather_state(optimizer, ranks)).transpose()?;
        ranks.on_first(|| match &gathered {
            Some(tensors) => state::save(&run_dir, &saving, tensors),
            None => state::save(&run_dir, &saving, &optimizer.tensors()),
        })?;
        let path = run_dir.join(checkpoint::folder_name(self.progress.step));
        (self.unsaved, self.is_best, self.saved) = (false, false, Some(path.clone()));
        self.record.draw();
        if let Some(best) = self.best.filter(|_| ranks.is_first()) {
            self.record.heed(write_best(&run_dir, &best).map_err(Into::into));
        }
        self.prune();
        Ok(path)
    }

    /// Removes the checkpoints that are not to be kept.
    fn prune(&mut self) {
        if !self.job.ranks.is_first() {
            return;
        }
        let run_dir = &self.job.run_dir;
        let keep: Vec<PathBuf> =
            self.best.iter().map(|best| run_dir.join(checkpoint::folder_name(best.step))).collect();
        let pruned = checkpoint::prune(run_dir, self.job.checkpoint.keep_latest_k, &keep, self.saved.as_deref());
        self.record.heed(pruned.map(drop).map_err(Into::into));
    }

    /// Saves what an error would lose; where it is then, in words.
    fn kept(&mut self, model: &M) -> String {
        let step = self.progress.step;
        let kept = match (self.unsaved, &self.saved) {
            (false, None) => return "Nothing had been trained before it, so nothing is saved.".into(),
            (false, Some(path)) => Ok(path.clone()),
            (true, _) => self.save(model),
        };
        self.tell();
        match kept {
            Ok(path) => format!("The state after step {step} is saved in {}.", path.display()),
            Err(error) => format!("The state after step {step} could not be saved: {error}"),
        }
    }

    /// Where the last state is that was saved, in words.
    fn kept_earlier(&self) -> String {
        match &self.saved {
            Some(path) => format!("The last one that is saved is {}.", path.display()),
            None => "Nothing had been saved before it.".into(),
        }
    }

    /// An error that ends the run, which is saved before.
    fn kept_before(&mut self, model: &M, error: TrainError) -> TrainError {
        let kept = self.kept(model);
        self.view.note(&kept);
        error
    }

    fn tell(&mut self) {
        for note in self.record.take_notes() {
            self.view.note(&note);
        }
    }
}

/// The batches of a step's passes on this rank; and the first of all ranks, where the model needs it and it is another's.
type Read<B> = (Vec<B>, Option<B>);

/// What a batch counts: inputs, targets, bytes of text.
fn counts<B: TrainBatch>(batch: &B) -> [u64; 3] {
    [batch.inputs(), batch.targets(), batch.target_bytes()]
}

/// The sums of such counts.
fn sum(all: impl IntoIterator<Item = [u64; 3]>) -> [u64; 3] {
    all.into_iter().fold([0; 3], |sum, more| std::array::from_fn(|at| sum[at] + more[at]))
}

#[cfg(test)]
mod tests;
