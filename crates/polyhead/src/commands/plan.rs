//! `polyhead plan`: what a recipe would cost. Sizes are computed; time is measured on a few steps.

use std::time::{Duration, Instant};

use polyhead_training::evaluate::{Batches, evaluate};
use polyhead_training::optimizer::Optimizer;
use polyhead_training::{Parts, StepContext, Trainee, available_memory_bytes, peak_memory_bytes, schedule};

use crate::assemble::{self, Data, Resolved, Source, known};
use crate::classifier::ExampleSource;
use crate::console::{bytes, clock, put, talk, thousands};
use crate::costs::{self, Costs, Totals};
use crate::embedder::PairSource;
use crate::recipe::{Loaded, Recipe};
use crate::report::Failure;

/// Measured steps go on for this long, one at least; chosen by us.
const PROBE: Duration = Duration::from_secs(3);
/// Steps beyond these tell nothing new; chosen by us.
const PROBE_STEPS: u64 = 20;

/// Prints what a recipe costs; with `probe`, trains a few steps to tell the time.
pub fn plan(loaded: &Loaded, probe: bool) -> Result<(), Failure> {
    let resolved = assemble::resolve(loaded)?;
    let recipe = &resolved.recipe;
    let data = resolved.open(&mut |_, _| {})?;
    let costs = Costs::of(recipe, known(&data));
    sizes(&resolved, &data, &costs)?;
    if !probe {
        return Ok(());
    }
    // A plan is made for what may be too large; the system would end us without a word.
    if let Some(available) = available_memory_bytes().filter(|_| recipe.training.device != "cuda")
        && costs.state_bytes().saturating_add(costs.activation_bytes) > available
    {
        return put!("time       not measured: only {} of memory are available here", bytes(available));
    }
    time(&resolved, data, &costs)
}

fn sizes(resolved: &Resolved, data: &Data, all: &Costs) -> Result<(), Failure> {
    let recipe = &resolved.recipe;
    let (training, seq_len) = (&recipe.training, recipe.training.seq_len as u64);
    let unit = known(data).unit();
    let line = |name: &str, [a, b, c]: [&str; 3]| put!("{name:<34} {a:>14} {b:>18} {c:>16}");
    let numbers = |name: &str, values: [u64; 3]| line(name, values.map(thousands).each_ref().map(String::as_str));
    line(
        "part",
        ["parameters", &format!("FLOPs per {unit}"), if unit == "token" { "KV B per token" } else { "KV B" }],
    )?;
    for part in &costs::parts(recipe, known(data)) {
        let Totals { parameters, flops_per_token, cached_bytes_per_token } = Totals::of(&part.cost, seq_len);
        numbers(&part.name, [parameters, flops_per_token, cached_bytes_per_token])?;
    }
    let Totals { parameters, flops_per_token, cached_bytes_per_token } = all.totals;
    numbers("all", [parameters, flops_per_token, cached_bytes_per_token])?;
    let length = if unit == "token" { format!(" at seq_len {seq_len}") } else { String::new() };
    put!("\nFLOPs are of a forward pass{length}; training takes about three times as many.")?;
    let (steps, tokens) = (thousands(training.steps), thousands(all.tokens));
    put!("steps      {steps} of {} {unit}s: {tokens} in all", thousands(all.tokens_per_step))?;
    put!("data       {}", data.description())?;
    data.notes().iter().for_each(|note| talk!("note: {note}"));
    let epoch = data.batches_per_epoch().div_ceil(training.gradient_accumulation_steps as u64);
    put!("           one epoch is {} steps", thousands(epoch))?;
    put!("compute    {:.2e} FLOPs", all.training_flops())?;
    let (state, activations) = (bytes(all.state_bytes()), bytes(all.activation_bytes));
    put!("memory     {state} for weights, gradients and optimiser; roughly {activations} for activations")?;
    let kept = checkpoints(recipe);
    put!("disk       {} for {} checkpoints", bytes(parameters.saturating_mul(12 * kept)), thousands(kept))
}

/// Tells what all steps would take.
fn time(resolved: &Resolved, data: Data, costs: &Costs) -> Result<(), Failure> {
    let recipe = &resolved.recipe;
    let training = &recipe.training;
    talk!("probe: a few steps on {}, nothing is saved (--no-probe leaves them out)", training.device);
    let unit = known(&data).unit();
    let measured = probe(resolved, data)?;
    let (seconds, in_all) = (measured.step.as_secs_f64().max(1e-9), times(measured.step, training.steps));
    let speed = thousands((costs.tokens_per_step as f64 / seconds) as u64);
    let gigaflops = 3.0 * costs.totals.flops_per_token as f64 * costs.tokens_per_step as f64 / seconds / 1e9;
    if let Some(peak) = peak_memory_bytes().filter(|_| training.device != "cuda") {
        put!("           {} at most in the probe, everything included", bytes(peak))?;
    }
    put!("speed      {speed} {unit}s per second, {gigaflops:.1} GFLOP per second")?;
    put!(
        "time       {} for the steps and {} for validation; saving comes on top (steps measured after a warm-up: {})",
        clock(in_all),
        clock(measured.validation),
        measured.steps
    )
}

/// What a short probe measured.
pub struct Probed {
    /// The median step.
    pub step: Duration,
    /// All validations of the run.
    pub validation: Duration,
    /// Steps measured.
    pub steps: usize,
}

impl Probed {
    /// What the whole run would take.
    pub fn whole(&self, recipe: &Recipe) -> Duration {
        times(self.step, recipe.training.steps).saturating_add(self.validation)
    }
}

/// Trains the real model on the real data for a few steps; nothing is saved.
///
/// # Errors
/// If the device is not there, or a step fails.
pub fn probe(resolved: &Resolved, data: Data) -> Result<Probed, Failure> {
    let recipe = &resolved.recipe;
    let device = assemble::training_device(recipe)?;
    match data {
        Data::Tokens(opened) => {
            let model = resolved.first_model(opened.vocab_size, &device)?;
            let (train, held_out) = (Source(opened.train), Source(opened.validation));
            steps_of(recipe, model, [&train, &held_out], &opened.tracking)
        }
        Data::Examples(labelled) => {
            let model = resolved.first_classifier(&labelled, &device)?;
            let (train, held_out) = (ExampleSource(labelled.train), ExampleSource(labelled.validation));
            steps_of(recipe, model, [&train, &held_out], &[])
        }
        Data::Pairs(paired) => {
            let model = resolved.first_embedder(&paired, &device)?;
            let (train, held_out) = (PairSource(paired.train), PairSource(paired.validation));
            steps_of(recipe, model, [&train, &held_out], &[])
        }
    }
}

fn steps_of<M: Trainee>(
    recipe: &Recipe,
    mut model: M,
    [train, held_out]: [&dyn Batches<M::Batch>; 2],
    tracking: &[M::Batch],
) -> Result<Probed, Failure> {
    let training = &recipe.training;
    let parts = Parts {
        optimizer: Optimizer::new(recipe.optimizer.clone()),
        training,
        model: &model,
        tracking,
        batches_per_epoch: train.per_epoch(),
    };
    let mut procedure = M::procedure(&recipe.procedure, parts, &serde_json::Value::Null)?;
    let accumulation = training.gradient_accumulation_steps as u64;
    let (started, mut durations) = (Instant::now(), Vec::new());
    // The first step is the warm-up: it allocates what the others use again.
    let mut measured = started;
    for step in 1..=PROBE_STEPS + 1 {
        let begun = Instant::now();
        let position = (step - 1) * accumulation;
        let batches =
            (position..position + accumulation).map(|position| train.batch(position)).collect::<Result<Vec<_>, _>>()?;
        let lr = recipe.optimizer.lr() * schedule::factor(&recipe.lr_scheduler, step - 1, training.steps);
        let context = StepContext { step, lr, seed: recipe.debug.seed, position };
        (model, _) = procedure.step(model, &batches, &context)?;
        match step {
            1 => measured = Instant::now(),
            _ => durations.push(begun.elapsed()),
        }
        if step > 1 && measured.elapsed() > PROBE {
            break;
        }
    }
    // The median: other work on the machine disturbs some steps, not most.
    durations.sort_unstable();
    let step = durations[durations.len() / 2];
    let begun = Instant::now();
    evaluate(&model, held_out, 1)?;
    let validation = times(begun.elapsed(), validation_batches(recipe, held_out.per_epoch()));
    Ok(Probed { step, validation, steps: durations.len() })
}

fn times(duration: Duration, count: u64) -> Duration {
    Duration::try_from_secs_f64(duration.as_secs_f64() * count as f64).unwrap_or(Duration::MAX)
}

/// Checkpoints that lie side by side at most: those kept, the best one, and the one being written.
fn checkpoints(recipe: &Recipe) -> u64 {
    let in_all = recipe.training.steps.checked_div(recipe.checkpoint.interval).unwrap_or(0).saturating_add(1);
    match recipe.checkpoint.keep_latest_k as u64 {
        0 => in_all.min(u64::MAX / 12),
        kept => kept.min(in_all).min(u64::MAX / 12 - 2) + 2,
    }
}

/// Batches that all validations of a run take together.
fn validation_batches(recipe: &Recipe, per_epoch: u64) -> u64 {
    let (steps, interval) = (recipe.training.steps, recipe.validation.interval);
    let each = if recipe.validation.batches == 0 { per_epoch } else { recipe.validation.batches.min(per_epoch) };
    let at_the_end = u64::from(interval == 0 || !steps.is_multiple_of(interval));
    (steps.checked_div(interval).unwrap_or(0) + at_the_end).saturating_mul(each.max(1))
}
