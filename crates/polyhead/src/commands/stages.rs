//! A recipe in stages: run one after the other, or planned.

use std::path::Path;

use burn::module::Module;
use polyhead_training::checkpoint::newest_good;
use polyhead_training::run_folder::{RunLock, atomic_write, files};
use polyhead_training::state;
use serde_json::{Value, json};

use super::convert::{self, Measured, cached_bytes};
use super::new_folder::must_not_be_data;
use super::plan;
use super::train::{self, TrainSession};
use crate::allowed::caller;
use crate::cli::TrainArgs;
use crate::console::{put, talk, thousands, wants_json};
use crate::signals::Signals;
use polyhead_recipe::Loaded;
use polyhead_recipe::Problems;
use polyhead_recipe::stages::{Stage, Staged};
use polyhead_runs::Failure;
use polyhead_runs::costs::tokens_per_step;
use polyhead_runs::pretrained::recipe_of;
use polyhead_runs::resolve::resume;
use polyhead_runs::result;
use polyhead_runs::stages::{self, StageRecord};
use polyhead_runs::{Trained, open_trained};

/// Runs what has not finished yet, each stage from the weights of the one before.
///
/// # Errors
/// If a stage fails, has changed since it was run, or a signal came; what was saved before stays whole.
pub fn train(args: &TrainArgs, staged: &Staged, signals: &Signals) -> Result<(), Failure> {
    let out = args.out.clone().unwrap_or_else(|| train::default_folder(&args.recipe.recipe));
    let begun = (0..staged.stages.len()).any(|at| staged.folder(&out, at).exists());
    match args.resume.as_str() {
        "auto" => {}
        "never" if !begun => {}
        "never" => {
            let problem =
                format!("{} holds a run already; --resume never would lose it: name another folder", out.display());
            return Err(Failure::Run(problem));
        }
        _ => return Err(Problems::plain("--resume takes auto or never for a run in stages".into()).into()),
    }
    // Everything is checked before the first step is taken.
    for at in 0..staged.stages.len() {
        must_not_be_data(&staged.load(at, staged.before(&out, at).as_deref())?.recipe, &out)?;
    }
    let _lock = RunLock::acquire(&out)?;
    let mut records: Vec<StageRecord> = stages::read_records(&out)?;
    for (at, stage) in staged.stages.iter().enumerate() {
        let (folder, from) = (staged.folder(&out, at), staged.before(&out, at));
        let loaded = staged.load(at, from.as_deref())?;
        let next = staged.stages.get(at + 1).map(|_| staged.folder(&out, at + 1));
        let finished = match &stage.convert {
            Some(_) => converted(stage, &folder)?,
            None => trained(stage, &loaded, &folder, next.is_some_and(|next| next.exists()))?,
        };
        let what = if stage.convert.is_some() { "conversion" } else { "training" };
        let state = if finished { "finished before" } else { what };
        talk!("\nstage {} of {}, {}: {state}, in {}", at + 1, staged.stages.len(), stage.name, folder.display());
        if !finished {
            records.truncate(at);
        }
        if records.get(at).is_none() {
            let fresh = loaded.recipe.model.pretrained().is_none();
            let measured = run(args, stage, loaded, &folder, finished, signals)?;
            records.push(record(stage, &folder, (measured, fresh))?);
            let text = serde_json::to_string_pretty(&records).map_err(|error| Failure::Run(error.to_string()))?;
            atomic_write(&out.join(files::STAGES), text.as_bytes())?;
        }
        match signals.stop() {
            0 => {}
            signal => return Err(Failure::Interrupted(signal)),
        }
    }
    let last = staged.folder(&out, staged.stages.len() - 1).join(files::RESULT);
    if last.exists() {
        atomic_write(&out.join(files::RESULT), &std::fs::read(&last)?)?;
    }
    if wants_json() {
        put!("{:#}", json!(records))?;
    }
    tell(&records);
    talk!(
        "\nsaved in {0}, which stands for its last stage; next: {1} generate {0}, eval, export",
        out.display(),
        train::summary::program()
    );
    Ok(())
}

/// Does a stage, unless it is only to be measured; gives what held-out data says of its model and of the one it started from.
fn run(
    args: &TrainArgs,
    stage: &Stage,
    loaded: Loaded,
    folder: &Path,
    finished: bool,
    signals: &Signals,
) -> Result<Measured, Failure> {
    let from = loaded.recipe.model.pretrained().map(Path::to_owned);
    if let (Some(conversion), Some(from), false) = (&stage.convert, &from, finished) {
        // What is there was left by a conversion that did not come to its end.
        if folder.exists() {
            std::fs::remove_dir_all(folder).map_err(|error| Failure::file("remove", folder, error))?;
        }
        let parent = open_trained(from, None, caller())?.unmasked(caller());
        let on = convert::On { text: false, batches: convert::BATCHES };
        return Ok(convert::perform(conversion, &parent, loaded.recipe, (folder, on))?.0);
    }
    if !finished {
        train::train_session(TrainSession {
            job: None,
            loaded: &loaded,
            run_dir: folder,
            resume: "auto",
            signals: signals.clone(),
            tui: args.tui,
            asked: None,
        })?;
    }
    let after = open_trained(folder, None, caller())?;
    let before = from.map(|from| open_trained(&from, None, caller())).transpose()?;
    let before = before.as_ref().unwrap_or(&after);
    let opened = after.data()?;
    Measured::on([&before.model, &after.model], &opened.validation, convert::BATCHES)
}

/// `fresh`: there was no model before.
fn record(stage: &Stage, folder: &Path, (measured, fresh): (Measured, bool)) -> Result<StageRecord, Failure> {
    let Trained { model, .. } = open_trained(folder, None, caller())?;
    Ok(StageRecord {
        name: stage.name.clone(),
        folder: folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        steps: result::read(folder)?.map(|result| result.steps),
        parameters: model.num_params() as u64,
        kv_bytes_per_token: cached_bytes(&model),
        loss_before: (!fresh).then(|| measured.before.mean_loss()),
        loss: measured.after.mean_loss(),
        divergence: (!fresh).then_some(measured.divergence),
    })
}

/// Whether a stage of training has come to its end as what the recipe says now.
fn trained(stage: &Stage, loaded: &Loaded, folder: &Path, left_behind: bool) -> Result<bool, Failure> {
    let Some(result) = result::read(folder)? else { return Ok(false) };
    let (Some((checkpoint, _)), _) = newest_good(folder)? else { return Ok(false) };
    resume(loaded, &checkpoint, caller())?;
    let (before, now) = (recipe_of(&checkpoint)?.training.steps, loaded.recipe.training.steps);
    if before != now && left_behind {
        return Err(Problems::plain(format!(
            "stage `{}` had training.steps = {before}, now {now}, and the stage after it has begun from there: put it back, or \
             start another run with --out",
            stage.name
        ))
        .into());
    }
    Ok(before == now && state::read_progress(&checkpoint)?.step == result.steps)
}

/// Whether a conversion has come to its end as what the recipe says now.
fn converted(stage: &Stage, folder: &Path) -> Result<bool, Failure> {
    let path = folder.join(files::CONVERSION);
    if !path.exists() || newest_good(folder)?.0.is_none() {
        return Ok(false);
    }
    let text = std::fs::read(&path).map_err(|error| Failure::file("read", &path, error))?;
    let told: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| Failure::Run(format!("{}: {error}", path.display())))?;
    let now = serde_json::to_value(&stage.convert).map_err(|error| Failure::Run(error.to_string()))?;
    match told["conversion"] == now {
        true => Ok(true),
        false => Err(Problems::plain(format!(
            "stage `{}` was another conversion when it was run:\n  {} -> {now}\n  hint: put it back, or start another run with --out",
            stage.name, told["conversion"]
        ))
        .into()),
    }
}

/// What each stage did, as a table.
fn tell(records: &[StageRecord]) {
    let number = |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
    talk!(
        "\n{:<20} {:>8} {:>14} {:>10} {:>12} {:>12} {:>12} {:>12}",
        "stage",
        "steps",
        "parameters",
        "KV bytes",
        "loss before",
        "loss",
        "perplexity",
        "KL, nats"
    );
    for record in records {
        talk!(
            "{:<20} {:>8} {:>14} {:>10} {:>12} {:>12} {:>12} {:>12}",
            record.name,
            record.steps.map_or("-".into(), thousands),
            thousands(record.parameters),
            thousands(record.kv_bytes_per_token),
            number(record.loss_before, 4),
            number(Some(record.loss), 4),
            number(Some(record.loss.exp()), 3),
            number(record.divergence, 4)
        );
    }
}

/// Checks every stage.
///
/// # Errors
/// If one is no valid recipe, or no possible conversion.
pub fn validate(recipe: &Path, staged: &Staged) -> Result<(), Failure> {
    each(recipe, staged, |_, _| Ok(()))
}

/// Prints every stage with every default filled in.
///
/// # Errors
/// As [`validate`].
pub fn cat(recipe: &Path, staged: &Staged) -> Result<(), Failure> {
    if wants_json() {
        return list(recipe, staged, |at, loaded| match &staged.stages[at].convert {
            Some(conversion) => Ok(("conversion", json!(conversion))),
            None => Ok(("recipe", json!(loaded.recipe))),
        });
    }
    each(recipe, staged, |at, loaded| {
        let stage = &staged.stages[at];
        put!("# stage {} of {}: {}", at + 1, staged.stages.len(), stage.name)?;
        match &stage.convert {
            Some(conversion) => {
                let text = toml::to_string_pretty(conversion).map_err(|error| Failure::Run(error.to_string()))?;
                put!("# a conversion:\n{text}")
            }
            None => super::recipes::cat(&loaded),
        }
    })
}

/// Prints what each stage costs, as far as that is known before the stages before it have run.
///
/// # Errors
/// As [`validate`]; or if the data cannot be read.
pub fn plan(recipe: &Path, staged: &Staged, probe: bool) -> Result<(), Failure> {
    let waits = |loaded: &Loaded| loaded.recipe.model.pretrained().is_some_and(|from| !from.exists());
    if wants_json() {
        return list(recipe, staged, |at, loaded| match &staged.stages[at].convert {
            Some(conversion) => Ok(("conversion", json!(conversion))),
            None if waits(&loaded) => Ok(("plan", Value::Null)),
            None => Ok(("plan", plan::numbers(&loaded, probe)?)),
        });
    }
    each(recipe, staged, |at, loaded| {
        let stage = &staged.stages[at];
        put!("{}stage {} of {}: {}", if at > 0 { "\n" } else { "" }, at + 1, staged.stages.len(), stage.name)?;
        let training = &loaded.recipe.training;
        let tokens = tokens_per_step(&loaded.recipe);
        match &stage.convert {
            Some(conversion) => {
                let text = toml::Value::try_from(conversion).map_err(|error| Failure::Run(error.to_string()))?;
                put!("conversion {text}")
            }
            None if waits(&loaded) => {
                let steps = thousands(training.steps);
                put!(
                    "steps      {steps} of {} tokens: {} in all",
                    thousands(tokens),
                    thousands(training.steps.saturating_mul(tokens))
                )?;
                put!("model      known once the stages before it have run")
            }
            None => plan::plan(&loaded, probe),
        }
    })
}

/// Prints a JSON list of all stages, each with what `what` gives for it.
fn list(
    recipe: &Path,
    staged: &Staged,
    mut what: impl FnMut(usize, Loaded) -> Result<(&'static str, Value), Failure>,
) -> Result<(), Failure> {
    let mut all = Vec::new();
    each(recipe, staged, |at, loaded| {
        let (key, value) = what(at, loaded)?;
        all.push(json!({ "stage": staged.stages[at].name, (key): value }));
        Ok(())
    })?;
    put!("{:#}", Value::Array(all))
}

fn each(
    recipe: &Path,
    staged: &Staged,
    mut what: impl FnMut(usize, Loaded) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let out = train::default_folder(recipe);
    (0..staged.stages.len()).try_for_each(|at| what(at, staged.load(at, staged.before(&out, at).as_deref())?))
}
