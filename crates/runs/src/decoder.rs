//! Decoders: their data, their first weights, and trained ones.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::Device;
use polyhead_data::{Loader, Opened, Tokenizer};
use polyhead_evaluation::hallucination::{Asking, Summary, ask};
use polyhead_evaluation::head_scores::Pattern;
use polyhead_evaluation::heads::observe_layers;
use polyhead_evaluation::health::Health;
use polyhead_evaluation::sets::{SetScore, SetTotals};
use polyhead_models::adapters::is_pair;
use polyhead_models::intervention::is_intervention_tensor;
use polyhead_models::{Batch, Decoder, parameters, train_only};
use polyhead_recipe::{Problems, Recipe};
use polyhead_training::evaluate::Batches;
use polyhead_training::run::Probe;
use polyhead_training::{NamePatterns, ProcedureConfig};

use crate::Caller;
use crate::costs::Known;
use crate::data::{Source, TrainingData, options, world};
use crate::error::Failure;
use crate::intervention::{Rows, check_rows, note_phases, note_rows, trains_intervention};
use crate::kind::Kind;
use crate::pretrained::{Pretrained, add_lora, with_boundaries};
use crate::resolve::{Resolved, scalings};

impl TrainingData<Batch> for Opened {
    fn description(&self) -> &str {
        &self.description
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn known(&self) -> Known {
        Known::Ids(self.vocab_size)
    }

    fn text_hash(&self) -> Option<&str> {
        self.text_hash.as_deref()
    }

    fn record(&self) -> serde_json::Value {
        serde_json::json!({ "description": self.description, "text_hash": self.text_hash })
    }

    fn train(&self) -> Box<dyn Batches<Batch> + '_> {
        Box::new(Source(&self.train))
    }

    fn held_out(&self) -> Box<dyn Batches<Batch> + '_> {
        Box::new(Source(&self.validation))
    }

    fn tracking(&self) -> &[Batch] {
        &self.tracking
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    fn floor(&self) -> Option<f64> {
        self.floor
    }

    fn check(&self, name: &str) -> Result<Vec<String>, Failure> {
        check_targets(self, name)
    }
}

impl Kind for Decoder {
    type Data = Opened;

    fn known(resolved: &Resolved) -> Result<Known, Failure> {
        let of_data = || resolved.recipe.data.source().vocab_size(&resolved.tokenizer);
        Ok(Known::Ids(resolved.vocab_size.unwrap_or_else(of_data)))
    }

    fn open(resolved: &Resolved, progress: &mut dyn FnMut(u64, u64)) -> Result<Opened, Failure> {
        let recipe = &resolved.recipe;
        let opened = recipe.data.open_tokens(&resolved.tokenizer, &options(recipe), progress)?;
        match &resolved.pretrained {
            Some(Pretrained { path, vocab_size, .. }) if Some(opened.vocab_size) > resolved.vocab_size => {
                Err(Failure::Run(format!(
                    "the data has {} ids, the model of {} knows {vocab_size}: name data with fewer, or another model",
                    opened.vocab_size,
                    path.display()
                )))
            }
            _ => Ok(opened),
        }
    }

    /// Fresh weights that the seed decides, or those of `model.pretrained`.
    fn first(resolved: &Resolved, data: &Opened, device: &Device) -> Result<Self, Failure> {
        let recipe = &resolved.recipe;
        let model = match &resolved.pretrained {
            Some(found) => {
                let scaling = recipe.model.decoder().and_then(|decoder| decoder.rope_scaling);
                let caller = Caller { frozen: resolved.frozen(), ..resolved.caller };
                let model = found.model(device, caller)?.with_rope_scaling(scaling);
                match resolved.new_token {
                    Some(id) => model.with_token(id as usize),
                    None => model,
                }
            }
            None => {
                let decoder = recipe.model.decoder();
                let decoder = decoder.ok_or_else(|| Problems::plain("model.decoder is missing".into()))?;
                let fresh = decoder.init(resolved.vocab_size.unwrap_or(data.vocab_size), device);
                scalings(recipe, &fresh).apply(fresh)
            }
        };
        let training = &recipe.training;
        let model = model.with_precision(training.precision).with_dropout(training.dropout);
        let model = model.with_embedding_dropout(training.embedding_dropout);
        let model =
            model.with_checkpointing(training.activation_checkpointing).with_head_overlap(training.head_overlap);
        let model = match &resolved.intervention {
            Some(intervention) => {
                let model = intervention.apply(model, data.tokenizer.as_ref())?;
                let train = |at| -> Result<Batch, Failure> { Ok(data.train.batch(at)?) };
                let batches = data.train.batches_per_epoch();
                // What is only for generated tokens is for those of the run, and of its samples.
                let rows = Rows { called: "rows to learn from", batches, batch: &train, generates: true };
                let mut notes = check_rows(&model, Some(&intervention.stated), &rows)?;
                let held_out = |at| -> Result<Batch, Failure> { Ok(data.validation.batch(at)?) };
                let batches = data.validation.batches_per_epoch();
                notes.extend(note_rows(
                    &model,
                    &Rows { called: "held-out rows", batches, batch: &held_out, generates: true },
                )?);
                notes.extend(note_phases(&model, Some(&intervention.stated)));
                notes.iter().for_each(|note| (resolved.caller.tell)(&format!("note: {note}")));
                model
            }
            None => model,
        };
        if let ProcedureConfig::Boundaries(boundaries) = &recipe.procedure {
            let model = with_boundaries(model, boundaries)?;
            return Ok(train_only(model, |name| name.starts_with("boundaries.")));
        }
        let model = model.without_boundaries();
        Ok(match &recipe.lora {
            Some(lora) => {
                let (model, whole) = (add_lora(model, lora, recipe.debug.seed)?, NamePatterns(&lora.train_whole));
                let names = parameters(&model);
                let names: Vec<&str> =
                    names.iter().map(|one| one.name.as_str()).filter(|name| !is_pair(name)).collect();
                whole.find(&names).map_err(|problem| Problems::plain(format!("lora.train_whole: {problem}")))?;
                train_only(model, |name| is_pair(name) || whole.mean(name))
            }
            None if trains_intervention(recipe) => train_only(model, is_intervention_tensor),
            None => model,
        })
    }

    fn layers(&self) -> Vec<&'static str> {
        let config = self.config();
        (0..config.n_layers).map(|layer| config.mechanism(layer).name()).collect()
    }

    fn as_decoder(&self) -> Option<&Decoder> {
        Some(self)
    }

    fn set_scores(&self, data: &Opened) -> Result<Vec<SetScore>, Failure> {
        set_scores(&self.valid(), &data.validation)
    }

    fn probe(&self, recipe: &Recipe, data: &Opened) -> Result<Option<Box<Probe<'static>>>, Failure> {
        if let Some(world) = world(recipe) {
            let (questions, asking) = (world.questions(), Asking::new(world.end(), self.config().n_layers));
            return Ok(Some(Box::new(move |model, go_on| {
                let numbers = Summary::of(&ask(model, &questions, &asking, go_on)?, asking.confident).numbers();
                Some(numbers.into_iter().map(|(name, value)| (format!("facts/{name}"), value)).collect())
            })));
        }
        let Some(tokenizer) = &data.tokenizer else { return Ok(None) };
        let questions = recipe.data.skill_questions(tokenizer)?;
        if questions.is_empty() {
            return Ok(None);
        }
        let health = Health { questions, end: tokenizer.end_of_text() };
        Ok(Some(Box::new(move |model, go_on| health.measure(model, go_on))))
    }

    fn head_scores(recipe: &Recipe, data: &Opened) -> Result<Option<Box<Probe<'static>>>, Failure> {
        if recipe.metrics.heads_interval == 0 {
            return Ok(None);
        }
        let batch = data.validation.batch(0)?;
        let rows: Vec<Batch> = (0..batch.batch.min(HEAD_ROWS)).map(|row| batch.row(row)).collect();
        Ok(Some(Box::new(move |model, go_on| go_on().then(|| head_scores(model, &rows)))))
    }
}

/// Held-out rows that the heads of a run are measured on; chosen by us.
const HEAD_ROWS: usize = 4;

/// The numbers of every head by their names in the logs.
fn head_scores(model: &Decoder, rows: &[Batch]) -> Vec<(String, f64)> {
    let trained = model.clone().fork(&model.device().autodiff()).train();
    let mut numbers = Vec::new();
    for (layer, seen) in observe_layers(&trained, rows, &mut |_, _| {}).into_iter().enumerate() {
        for (head, of) in seen.heads.into_iter().enumerate() {
            let told = [("importance", of.importance), ("first_key", of.first_key)];
            let patterns = Pattern::ALL.iter().zip(of.patterns).map(|(pattern, share)| (pattern.name(), Some(share)));
            numbers.extend(told.into_iter().chain(patterns).filter_map(|(name, value)| {
                Some((format!("heads/layer_{layer:02}/head_{head:02}/{name}"), f64::from(value?)))
            }));
        }
    }
    numbers
}

/// The score of a decoder, on a plain device, on each named part of some batches.
///
/// # Errors
/// If the data cannot be read.
pub fn set_scores(model: &Decoder, batches: &Loader) -> Result<Vec<SetScore>, Failure> {
    // What they score is the next token.
    if model.is_masked_diffusion() {
        return Ok(Vec::new());
    }
    let score = |(name, range): (String, Range<u64>)| {
        let mut totals = SetTotals::default();
        for position in range {
            totals.add(model, &batches.batch(position)?);
        }
        Ok(totals.score(name))
    };
    batches.parts().into_iter().map(score).collect()
}

/// Refuses tokens of which none is a target, so that nothing would be learned; gives what else there is to know about them.
///
/// # Errors
/// If no token is a target, or the data cannot be read.
fn check_targets(opened: &Opened, data: &str) -> Result<Vec<String>, Failure> {
    let mut notes = Vec::new();
    let (tokens, targets) = count_targets(&opened.train)?;
    if targets == 0 {
        return Err(Failure::Run(format!(
            "data.{data}: none of {tokens} tokens to learn from is a target, so that nothing would be learned\n  hint: `polyhead \
             preview RECIPE` shows what is learned of each row; a chat template that finds no messages, and rows cut before \
             the first answer (training.seq_len), leave none"
        )));
    }
    if (targets as f64) < FEW * tokens as f64 {
        let percent = 100.0 * targets as f64 / tokens as f64;
        notes.push(format!(
            "data.{data}: only {targets} of {tokens} tokens looked at ({percent:.2} %) are targets; the rest is read and teaches \
             nothing. `polyhead preview RECIPE` shows which"
        ));
    }
    let (tokens, targets) = count_targets(&opened.validation)?;
    if targets == 0 {
        notes.push(format!(
            "data.{data}: none of {tokens} held-out tokens is a target, so that validation measures nothing (a larger \
             validation.fraction holds out more)"
        ));
    }
    Ok(notes)
}

/// Below this share of tokens that are targets something is told (the share of a short answer to a page of context is above it).
const FEW: f64 = 0.01;

/// Tokens and targets of some batches, spread over an epoch: of few, of more where hardly any is a target, and where none is,
/// of as many as it takes to find one.
fn count_targets(loader: &Loader) -> Result<(u64, u64), Failure> {
    // Chosen by us: the last takes seconds.
    const SOME: u64 = 4;
    const MORE: u64 = 64;
    const MOST: u64 = 10_000;
    let all = loader.batches_per_epoch().max(1);
    let count = |batches: u64, enough: u64| -> Result<(u64, u64), Failure> {
        let (batches, mut tokens, mut targets) = (batches.min(all), 0, 0);
        for index in 0..batches {
            let batch = loader.batch(index * all / batches)?;
            tokens += batch.tokens.len() as u64;
            targets += batch.target_tokens();
            if targets >= enough {
                break;
            }
        }
        Ok((tokens, targets))
    };
    let (mut tokens, mut targets) = count(SOME, u64::MAX)?;
    if all > SOME && (targets as f64) < FEW * tokens as f64 {
        (tokens, targets) = count(MORE, u64::MAX)?;
    }
    if all > MORE && targets == 0 {
        (tokens, targets) = count(MOST, 1)?;
    }
    Ok((tokens, targets))
}
