//! What a run tells on the screen: what it trains, where it starts, what it reached, and what to type next.

use std::time::Duration;

use burn::module::Module;
use polyhead_data::{Modality, Tokenizer, Yields};
use polyhead_models::{Decoder, EvalTotals, Parameter, Past, Trainable, parameters};
use polyhead_training::checkpoint::list;
use polyhead_training::run::Outcome;
use polyhead_training::{peak_memory_bytes, state};

use super::super::generate::write_text;
use super::{Task, TrainSession};
use crate::console::{bytes, clock, talk, thousands};
use polyhead_recipe::Recipe;
use polyhead_runs::Failure;
use polyhead_runs::answer::Prompt;
use polyhead_runs::kind::Kind;
use polyhead_runs::text::quoted;
use polyhead_training::run_folder::files::{CURVE, IMAGES};
use serde_json::json;

impl Task<'_> {
    /// What is trained, and from what.
    pub(super) fn tell_model(&self, model: &impl Kind) {
        let mut layers = model.layers();
        let (all, n_layers) = (model.num_params(), layers.len());
        layers.dedup();
        let learning: usize = parameters(model).iter().filter(|one| one.trainable).map(Parameter::elements).sum();
        let frozen = match all - learning {
            0 => String::new(),
            frozen => format!(" ({} of them frozen)", thousands(frozen as u64)),
        };
        let count = thousands(all as u64);
        talk!("model: {count} parameters{frozen}, {n_layers} layers, attention: {}", layers.join(", "));
        if let Some(path) = self.resolved.recipe.model.pretrained().filter(|_| self.resume.is_none()) {
            talk!("starts from the weights of {}", path.display());
        }
    }

    /// The step that the run goes on behind; 0 where it begins.
    pub(super) fn tell_start(&self) -> Result<u64, Failure> {
        let Some(checkpoint) = &self.resume else { return Ok(0) };
        let step = state::read_progress(checkpoint)?.step;
        talk!("resume: from {} (step {step})", checkpoint.display());
        let given_up = list(self.session.run_dir)?.into_iter().filter(|(later, _)| *later > step);
        let given_up: Vec<String> = given_up.map(|(_, path)| path.display().to_string()).collect();
        if !given_up.is_empty() {
            talk!("resume: what came after that step is given up: {}", given_up.join(", "));
        }
        Ok(step)
    }

    /// What was reached, where a run is all that was asked for.
    pub(super) fn tell_end<M: Trainable>(&self, outcome: &Outcome<M>, data: &str, floor: Option<f64>) {
        let TrainSession { run_dir, asked: Some(asked), .. } = self.session else { return };
        let recipe = &self.resolved.recipe;
        let progress = &outcome.progress;
        let time = Duration::from_micros(progress.microseconds);
        talk!("\ntrained  {} steps, {} targets, {}", progress.step, thousands(progress.targets), clock(time));
        talk!("on       {data}");
        if let Some(validation) = &outcome.validation {
            let sums = validation.evaluated();
            let bits = sums.bits_per_byte().map_or(String::new(), |bits| format!(", {bits:.3} bits per byte"));
            let accuracy = 100.0 * sums.accuracy();
            let floor = floor.map_or(String::new(), |floor| format!(", best possible loss {floor:.4}"));
            talk!("reached  validation loss {:.4}{bits}, accuracy {accuracy:.1} %{floor}", sums.mean_loss());
            let further = validation.numbers().into_iter().map(|(tag, value)| {
                let name = tag.split('/').next().unwrap_or_default().replace('_', " ");
                format!("{name} {value:.3}")
            });
            let further: Vec<String> = further.collect();
            if !further.is_empty() {
                talk!("         {}", further.join(", "));
            }
        }
        if let Some(memory) = peak_memory_bytes() {
            talk!("memory   {} at most", bytes(memory));
        }
        if progress.skipped > 0 {
            talk!("skipped  {} steps that were not finite", progress.skipped);
        }
        let run = run_dir.display();
        let polyhead = program();
        talk!("saved to {run} (image: {run}/{CURVE}; all curves: tensorboard --logdir {run})");
        if recipe.data.modality() == Modality::Chat {
            talk!("next     {polyhead} generate {run} --chat --prompt \"...\"");
            talk!("         {polyhead} eval {run} --task all");
        } else if recipe.data.is_text() && recipe.data.yields() == Yields::Tokens {
            talk!("next     {polyhead} generate {run} --prompt \"...\"");
        } else {
            talk!("next     {polyhead} eval {run}");
        }
        if recipe.data.yields() == Yields::Images {
            talk!("         {polyhead} upscale IMAGE --model {run} --out large.png   (images: {run}/{IMAGES})");
        }
        if outcome.ended.is_some() {
            return; // more steps change nothing
        }
        let steps = format!("training.steps={}", 2 * progress.step);
        let same = asked.overrides.iter().filter(|text| !text.starts_with("training.steps")).chain([&steps]);
        let same = same.map(|text| quoted(text)).collect::<Vec<_>>().join(" ");
        talk!("         {polyhead} train {} {same} --out {run}   # go on", asked.recipe.display());
    }
}

/// This program as it was called, so that what is suggested works when typed.
pub fn program() -> String {
    std::env::args().next().map_or_else(|| "polyhead".into(), |name| quoted(&name))
}

/// What a model that learned conversations is asked where the recipe says nothing.
const HELLO: &str = "Hello!";

/// A sample of what the model writes, on standard output; gives it. A model that learned conversations answers.
pub(super) fn sample(recipe: &Recipe, model: &Decoder, tokenizer: &Tokenizer) -> Result<String, Failure> {
    talk!("\nsample:");
    let text = &recipe.generation.prompt;
    let said = if text.is_empty() { HELLO } else { text };
    let is_chat = recipe.data.modality() == Modality::Chat;
    // A template may want more than one message.
    let chat = is_chat.then(|| Prompt::chat(tokenizer, &[json!({ "role": "user", "content": said })]).ok()).flatten();
    let (text, prompt) = match chat {
        Some(prompt) => (format!("user: {said}\nassistant: "), prompt),
        None => (text.clone(), Prompt::plain(tokenizer, text)?),
    };
    let model = model.valid();
    let how = (&recipe.generation.sampling, &[][..]);
    let answer = write_text((&model, tokenizer), &mut Past::new(&model), (&text, &prompt), how)?;
    Ok(format!("{text}{}", answer.text))
}
