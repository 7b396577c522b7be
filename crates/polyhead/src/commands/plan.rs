//! `polyhead plan`: what a recipe would cost. Sizes are computed; time is measured on a few steps.

use burn::tensor::Device;
use polyhead_kernels::without_drawing;
use polyhead_models::{Part, parameters};
use polyhead_training::peak_memory_bytes;
use serde_json::{Value, json};

use crate::allowed::caller;
use crate::console::{bytes, clock, put, reading, talk, thousands, wants_json};
use polyhead_recipe::{Loaded, Recipe, has_own_memory};
use polyhead_runs::Failure;
use polyhead_runs::Resolved;
use polyhead_runs::costs::{self, Costs, Memory, Totals};
use polyhead_runs::data::TrainingData;
use polyhead_runs::device::memory_bytes;
use polyhead_runs::kind::{ForAnyKind, Kind, for_kind};
use polyhead_runs::probe::{probe, times};
use polyhead_runs::resolve::resolve;

/// Prints what a recipe costs; with `probe`, trains a few steps to tell the time.
pub fn plan(loaded: &Loaded, probe: bool) -> Result<(), Failure> {
    if wants_json() {
        return put!("{:#}", numbers(loaded, probe)?);
    }
    let resolved = resolve(loaded, caller())?;
    for_kind(&resolved.recipe.model, Plan { resolved: &resolved, probe })
}

/// What a recipe costs, for programs.
pub fn numbers(loaded: &Loaded, probe: bool) -> Result<Value, Failure> {
    let resolved = resolve(loaded, caller())?;
    for_kind(&resolved.recipe.model, Numbers { resolved: &resolved, probe })
}

/// What is known before any step is taken.
struct Estimate<K: Kind> {
    data: K::Data,
    costs: Costs,
    memory: Memory,
    /// What there is of memory, where that is known.
    available: Option<u64>,
}

impl<K: Kind> Estimate<K> {
    fn of(resolved: &Resolved) -> Result<Self, Failure> {
        let recipe = &resolved.recipe;
        let data = K::open(resolved, &mut reading)?;
        let costs = Costs::of(recipe, data.known());
        let available = memory_bytes(&recipe.training.device);
        let memory = match costs.totals.parameters.saturating_mul(4) < available.unwrap_or(u64::MAX) {
            // Weights that nobody draws take no memory, and the model knows best what of it is trained.
            true => {
                let device = Device::flex().autodiff();
                costs.memory(recipe, &parameters(&without_drawing(|| resolved.first::<K>(&data, &device))?))
            }
            false => costs.memory_of_all(),
        };
        Ok(Self { data, costs, memory, available })
    }

    /// Whether steps can be tried. A plan is made for what may be too large; the system would end us without a word.
    fn fits(&self) -> bool {
        self.available.is_none_or(|available| self.memory.peak() <= available)
    }
}

struct Plan<'a> {
    resolved: &'a Resolved,
    probe: bool,
}

impl ForAnyKind for Plan<'_> {
    type Output = Result<(), Failure>;

    fn run<K: Kind>(self) -> Self::Output {
        let estimate = Estimate::<K>::of(self.resolved)?;
        sizes(self.resolved, &estimate.data, &estimate.costs, &estimate.memory)?;
        match estimate.available {
            _ if !self.probe => Ok(()),
            Some(available) if !estimate.fits() => {
                put!("time       not measured: only {} of memory are available here", bytes(available))
            }
            _ => time::<K>(self.resolved, &estimate.data, &estimate.costs),
        }
    }
}

struct Numbers<'a> {
    resolved: &'a Resolved,
    probe: bool,
}

impl ForAnyKind for Numbers<'_> {
    type Output = Result<Value, Failure>;

    fn run<K: Kind>(self) -> Self::Output {
        let (resolved, recipe) = (self.resolved, &self.resolved.recipe);
        let estimate = Estimate::<K>::of(resolved)?;
        let Estimate { data, costs, memory, available } = &estimate;
        let seq_len = recipe.training.seq_len as u64;
        let part = |part: &Part| json!({ "name": part.name, "costs": Totals::of(&part.cost, seq_len) });
        let probed = match self.probe && estimate.fits() {
            true => Some(probe::<K>(resolved, data)?),
            false => None,
        };
        let measured = probed.map(|probed| {
            let (step, all) = (probed.step.as_secs_f64(), probed.whole(recipe).as_secs_f64());
            json!({ "steps": probed.steps, "seconds_per_step": step, "seconds_in_all": all })
        });
        Ok(json!({
            "data": data.description(), "unit": data.known().unit(), "seq_len": seq_len,
            "parts": costs::parts(recipe, data.known()).iter().map(part).collect::<Vec<_>>(),
            "costs": costs.totals, "steps": recipe.training.steps, "units_per_step": costs.tokens_per_step, "units": costs.tokens,
            "training_flops": costs.training_flops(), "checkpoints": checkpoints(recipe),
            "memory": {
                "weights": memory.weights, "gradients": memory.gradients, "moments": memory.moments,
                "activations": memory.activations, "peak": memory.peak(), "available": available,
            },
            "disk": disk(resolved, memory), "measured": measured,
        }))
    }
}

fn sizes<B>(resolved: &Resolved, data: &impl TrainingData<B>, all: &Costs, memory: &Memory) -> Result<(), Failure> {
    let recipe = &resolved.recipe;
    let (training, seq_len) = (&recipe.training, recipe.training.seq_len as u64);
    let unit = data.known().unit();
    let line = |name: &str, [a, b, c]: [&str; 3]| put!("{name:<34} {a:>14} {b:>18} {c:>16}");
    let numbers = |name: &str, values: [u64; 3]| line(name, values.map(thousands).each_ref().map(String::as_str));
    line(
        "part",
        ["parameters", &format!("FLOPs per {unit}"), if unit == "token" { "KV B per token" } else { "KV B" }],
    )?;
    for part in &costs::parts(recipe, data.known()) {
        let Totals { parameters, flops_per_token, cached_bytes_per_token, .. } = Totals::of(&part.cost, seq_len);
        numbers(&part.name, [parameters, flops_per_token, cached_bytes_per_token])?;
    }
    let Totals { parameters, flops_per_token, cached_bytes_per_token, state_bytes } = all.totals;
    numbers("all", [parameters, flops_per_token, cached_bytes_per_token])?;
    if state_bytes > 0 {
        put!(
            "\nDecoding keeps {} B of recurrent state besides, however many tokens there are.",
            thousands(state_bytes)
        )?;
    }
    let length = if unit == "token" { format!(" at seq_len {seq_len}") } else { String::new() };
    put!("\nFLOPs are of a forward pass{length}; training takes about three times as many.")?;
    let (steps, tokens) = (thousands(training.steps), thousands(all.tokens));
    put!("steps      {steps} of {} {unit}s: {tokens} in all", thousands(all.tokens_per_step))?;
    put!("data       {}", data.description())?;
    data.notes().iter().for_each(|note| talk!("note: {note}"));
    let epoch = data.train().per_epoch().div_ceil(training.gradient_accumulation_steps as u64);
    put!("           one epoch is {} steps", thousands(epoch))?;
    put!("compute    {:.2e} FLOPs", all.training_flops())?;
    let (state, activations) = (bytes(memory.state()), bytes(memory.activations));
    put!("memory     {state} for weights, gradients and optimiser; roughly {activations} for activations")?;
    put!("           at most {} at once: activations go while gradients come", bytes(memory.peak()))?;
    put!("disk       {} for {} checkpoints", bytes(disk(resolved, memory)), thousands(checkpoints(recipe)))
}

/// Bytes of all checkpoints. Beside a base model, what is trained is saved alone: as much as its gradients.
fn disk(resolved: &Resolved, memory: &Memory) -> u64 {
    let weights = if resolved.saves_adapter_only() { memory.gradients } else { memory.weights };
    weights.saturating_add(memory.moments).saturating_mul(checkpoints(&resolved.recipe))
}

/// Tells what all steps would take.
fn time<K: Kind>(resolved: &Resolved, data: &K::Data, costs: &Costs) -> Result<(), Failure> {
    let recipe = &resolved.recipe;
    let training = &recipe.training;
    talk!("probe: a few steps on {}, nothing is saved (--no-probe leaves them out)", training.device);
    let unit = data.known().unit();
    let measured = probe::<K>(resolved, data)?;
    let (seconds, in_all) = (measured.step.as_secs_f64().max(1e-9), times(measured.step, training.steps));
    let speed = thousands((costs.tokens_per_step as f64 / seconds) as u64);
    let gigaflops = 3.0 * costs.totals.flops_per_token as f64 * costs.tokens_per_step as f64 / seconds / 1e9;
    if let Some(peak) = peak_memory_bytes().filter(|_| !has_own_memory(&training.device)) {
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

/// Checkpoints on the disk at most: those kept, the best one, and the one being written.
fn checkpoints(recipe: &Recipe) -> u64 {
    let in_all = recipe.training.steps.checked_div(recipe.checkpoint.interval).unwrap_or(0).saturating_add(1);
    match recipe.checkpoint.keep_latest_k as u64 {
        0 => in_all.min(u64::MAX / 12),
        kept => kept.min(in_all).min(u64::MAX / 12 - 2) + 2,
    }
}
