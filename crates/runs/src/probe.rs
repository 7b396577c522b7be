//! A few steps of a run, to tell how long all of it would take.

use std::time::{Duration, Instant};

use polyhead_models::TrainBatch;
use polyhead_recipe::Recipe;
use polyhead_training::evaluate::evaluate;
use polyhead_training::optimizer::Optimizer;
use polyhead_training::ranks::Ranks;
use polyhead_training::{Parts, StepContext, schedule};

use crate::data::TrainingData;
use crate::error::Failure;
use crate::kind::Kind;
use crate::resolve::{Resolved, training_device};

/// Measured steps go on for this long, one at least; chosen by us.
const PROBE: Duration = Duration::from_secs(3);
/// Steps beyond these tell nothing new; chosen by us.
const PROBE_STEPS: u64 = 20;

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
pub fn probe<K: Kind>(resolved: &Resolved, data: &K::Data) -> Result<Probed, Failure> {
    let recipe = &resolved.recipe;
    let training = &recipe.training;
    let mut model: K = resolved.first(data, &training_device(recipe, None)?)?;
    let (train, held_out) = (data.train(), data.held_out());
    let parts = Parts {
        optimizer: Optimizer::new(recipe.optimizer.clone()).with_scalings(model.scalings(recipe)),
        training,
        model: &model,
        tracking: data.tracking(),
        batches_per_epoch: train.per_epoch(),
    };
    let mut procedure = K::procedure(&recipe.procedure, parts, &serde_json::Value::Null)?;
    let passes = training.gradient_accumulation_steps as u64;
    let ranks = Ranks::alone(recipe.parallel);
    let (started, mut durations) = (Instant::now(), Vec::new());
    // The first step is the warm-up: it allocates what the others use again.
    let mut measured = started;
    for step in 1..=PROBE_STEPS + 1 {
        let begun = Instant::now();
        let position = (step - 1) * passes;
        let batches =
            (position..position + passes).map(|position| train.batch(position)).collect::<Result<Vec<_>, _>>()?;
        let targets = batches.iter().map(TrainBatch::targets).sum();
        let lr = recipe.optimizer.lr() * schedule::factor(&recipe.lr_scheduler, step - 1, training.steps);
        let seed = recipe.debug.seed;
        let context = StepContext { step, lr, seed, position, passes, targets, ranks: &ranks };
        model.before_step(&batches[0], step - 1);
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
    evaluate(&model, &*held_out, 1)?;
    let validation = times(begun.elapsed(), validation_batches(recipe, held_out.per_epoch()));
    Ok(Probed { step, validation, steps: durations.len() })
}

/// A duration so many times.
pub fn times(duration: Duration, count: u64) -> Duration {
    Duration::try_from_secs_f64(duration.as_secs_f64() * count as f64).unwrap_or(Duration::MAX)
}

/// Batches that all validations of a run take together.
fn validation_batches(recipe: &Recipe, per_epoch: u64) -> u64 {
    let (steps, interval) = (recipe.training.steps, recipe.validation.interval);
    let each = if recipe.validation.batches == 0 { per_epoch } else { recipe.validation.batches.min(per_epoch) };
    let at_the_end = u64::from(interval == 0 || !steps.is_multiple_of(interval));
    (steps.checked_div(interval).unwrap_or(0) + at_the_end).saturating_mul(each.max(1))
}
