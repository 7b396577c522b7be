//! What a comparison will run: every arm with every seed (and every value of a sweep), as complete recipes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use polyhead_data::{DataConfig, Yields};
use polyhead_recipe::layers::{self, Layer, merge, parse_layer};
use polyhead_recipe::{self as recipe, ModelConfig, Recipe, folder_name};
use polyhead_recipe::{Problem, Problems};
use polyhead_runs::Failure;
use polyhead_runs::costs::{Known, Totals, tokens_per_step};
use polyhead_runs::intervention::kept;
use polyhead_runs::result;
use polyhead_runs::{Caller, Resolved, resolve};

use super::calibration::Timing;
use super::comparison::{Comparison, Matched, Quality, Read, STEPS};
use super::matching::{Match, other_data, solve};
use super::prepare::Prepared;
use super::tune::{Values, words};

/// What a comparison will run.
pub struct Plan {
    /// What was asked for.
    pub comparison: Comparison,
    /// The file that asks for it.
    pub file: PathBuf,
    /// Where everything is written.
    pub out: PathBuf,
    /// The arms, in their order.
    pub arms: Vec<ArmPlan>,
    /// Every run that there may be, those of the first seed first, so that arms can be compared early. Of an arm that is tuned,
    /// the chosen setting alone is trained for the report.
    pub runs: Vec<Run>,
    /// Arms whose steps have still to be timed before it is known how many of them there are.
    pub timings: Vec<Timing>,
}

/// An arm, ready to run.
pub struct ArmPlan {
    /// Its name.
    pub name: String,
    /// Its settings to choose from; one where nothing is chosen.
    pub choices: Vec<Choice>,
}

/// An arm with one of the settings to choose from.
pub struct Choice {
    /// The keys with their values; empty where nothing is chosen.
    pub values: Values,
    /// The same, as `key = value`.
    pub words: String,
    /// The whole run, with the first seed.
    pub run: Resolved,
    /// What it costs.
    pub totals: Totals,
    /// What was sought to make it as costly as the base arm.
    pub matched: Option<Match>,
    layers: Vec<Layer>,
}

/// One training.
pub struct Run {
    /// Which arm.
    pub arm: usize,
    /// Which of its choices.
    pub choice: usize,
    /// Which seed.
    pub seed: u64,
    /// Whether it is a trial of `[tune]`, which chooses and is not reported.
    pub trial: bool,
    /// Its identity: see [`result::id`].
    pub id: String,
    /// Its folder.
    pub folder: PathBuf,
    /// Its recipe, resolved.
    pub text: String,
    /// Steps to take.
    pub steps: u64,
}

/// An arm with one choice of a sweep: its layers, and what they say together.
type Layered = (Vec<Layer>, Resolved);

/// A hash of what a recipe learns from: see [`result::id`].
pub type TextHash<'a> = dyn FnMut(&Resolved) -> Result<Option<String>, Failure> + 'a;

/// Whether all arms are recipes, and one of them starts from a folder of weights that is not there yet, or learns classes or
/// pairs from files, which tell the size of the model: then nothing can be counted.
pub fn waits_for_files(read: &Read, prepared: &Prepared) -> bool {
    let mut waits = false;
    for arm in &read.comparison.arm {
        let mut layers = read.base.clone();
        layers.push(read.layer.part(&["recipe"]));
        layers.extend(arm.layers(&read.layer));
        // What is wrong with an arm is told by `plan`, which names it.
        let layers = prepared.filled(layers, read.comparison.seeds[0]);
        let Ok(loaded) = layers.and_then(recipe::from_layers) else { return false };
        let Recipe { data, model, intervention, .. } = &loaded.recipe;
        waits |= data.yields() != Yields::Tokens && !data.is_generated();
        waits |= model.pretrained().is_some_and(|folder| !folder.exists());
        let tensors = intervention.as_ref().and_then(|own| own.tensors.as_ref());
        waits |= tensors.is_some_and(|file| !file.exists());
    }
    waits
}

/// Plans a comparison that was read from `file`, to be written to `out`, and for which everything is prepared. Nothing is
/// trained.
///
/// # Errors
/// All arms that cannot run, each by its name; or what is wrong with the data.
pub fn plan(
    read: Read,
    prepared: &Prepared,
    (file, out): (&Path, &Path),
    text_hash: &mut TextHash<'_>,
    caller: Caller,
) -> Result<Plan, Failure> {
    let Read { comparison, layer, base: mut below, .. } = read;
    below.push(layer.part(&["recipe"]));
    let context = RunContext { prepared, caller };
    let arms = load(&comparison, &layer, &below, &context)?;

    let planning = Planning { comparison: &comparison, context: &context, arms: &arms };
    let (mut planned, mut problems, mut timings) = (Vec::new(), Vec::new(), Vec::new());
    for (at, arm) in comparison.arm.iter().enumerate() {
        let mut choices = Vec::new();
        for (choice, values) in comparison.choices().into_iter().enumerate() {
            match planning.choice((at, choice), values, &mut timings) {
                Ok(ready) => choices.push(ready),
                Err(Stop::Failed(failure)) => return Err(failure),
                Err(Stop::Refused(key, message)) => {
                    let (key, message) =
                        (format!("arm.{}.{key}", arm.place.arm), format!("arm `{}`: {message}", arm.name));
                    problems.push(layers::at(std::slice::from_ref(&layer), &key, message));
                    break;
                }
            }
        }
        planned.push(ArmPlan { name: arm.name.clone(), choices });
    }
    Problems::none(problems)?;
    let runs = runs(&comparison, &planned, (&context, out), text_hash)?;
    Ok(Plan { comparison, file: file.to_owned(), out: out.to_owned(), arms: planned, runs, timings })
}

/// What arms are planned from.
struct Planning<'a> {
    comparison: &'a Comparison,
    context: &'a RunContext<'a>,
    arms: &'a [Vec<Layered>],
}

/// Why an arm cannot be planned.
enum Stop {
    /// It breaks a rule about this key.
    Refused(&'static str, String),
    /// Anything else.
    Failed(Failure),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<Problem> for Stop {
    fn from(problem: Problem) -> Self {
        Self::Failed(problem.into())
    }
}

fn totals(run: &Resolved) -> Result<Totals, Failure> {
    Ok(Totals::of_recipe(&run.recipe, run.known()?))
}

impl Planning<'_> {
    /// An arm with one of its choices, made as costly as the base arm with the same choice; what has to be timed for that is added.
    fn choice(&self, (at, choice): (usize, usize), values: Values, timings: &mut Vec<Timing>) -> Result<Choice, Stop> {
        let (comparison, arm) = (self.comparison, &self.comparison.arm[at]);
        let (base, (layers, own)) = (&self.arms[comparison.base_of(at)], &self.arms[at][choice]);
        if let Some(key) = other_data(&base[0].1.recipe, &own.recipe).filter(|_| comparison.same_data) {
            let problem = format!(
                "{key} differs from the base arm's, and arms must learn the same from the same; same_data = false allows it"
            );
            return Err(Stop::Refused("recipe", problem));
        }
        let to = &base[choice].1;
        let rung = comparison.ladder.as_ref().zip(arm.place.setting);
        let steps = match rung {
            None => to.recipe.training.steps,
            Some((ladder, rung)) => ladder
                .steps(&ladder.rungs()[rung], &totals(to)?, tokens_per_step(&to.recipe))
                .map_err(|message| Stop::Refused("name", format!("ladder: {message}")))?,
        };
        let target = comparison.matched.of(&totals(to)?);
        let sought = match comparison.matched {
            Matched::Time if at != comparison.base_of(at) => {
                let timed = timing(&arm.name, (&self.arms[at], base), (choice, &values), steps)?;
                let pace = self.context.prepared.paces.get(&timed.key);
                if pace.is_none() && !timings.contains(&timed) {
                    timings.push(timed);
                }
                pace.map(|pace| pace.equal(steps, comparison.tolerance()))
            }
            // What costs the same already is left as it is.
            Matched::None | Matched::Time => None,
            matched if matched.of(&totals(own)?) == target => None,
            _ => Some(equal(comparison, comparison.solve(arm), target, layers, own.known()?)),
        };
        let matched = sought.transpose().map_err(|message| {
            Stop::Refused("name", format!("match = \"{}\": {message}", name_of(comparison.matched)))
        })?;
        let mut layers = layers.clone();
        if rung.is_some() {
            layers.push(parse_layer("ladder", &format!("{STEPS} = {steps}"))?);
        }
        if let Some(found) = &matched {
            layers.push(parse_layer("match", &format!("{} = {}", found.key, found.value))?);
        }
        // As many steps as are sought may be fewer than the warm-up, say.
        let run = self.context.with_seed(&layers, comparison.seeds[0]).map_err(|failure| about(failure, &arm.name))?;
        Ok(Choice { words: words(&values), values, totals: totals(&run)?, run, matched, layers })
    }
}

/// Every arm's layers with every choice of the sweep, each checked as a recipe.
fn load(
    comparison: &Comparison,
    layer: &Layer,
    below: &[Layer],
    context: &RunContext<'_>,
) -> Result<Vec<Vec<Layered>>, Failure> {
    let (mut arms, mut problems) = (Vec::new(), Vec::new());
    for arm in &comparison.arm {
        let own = arm.layers(layer);
        let key = comparison.solve(arm);
        let sets = |layer: &Layer| sets_key(layer, key);
        if comparison.ladder.is_some() && own.iter().any(|layer| sets_key(layer, STEPS)) {
            let message = format!("arm `{}`: {STEPS} is what the ladder's budgets decide: leave it out", arm.name);
            problems.push(layers::at(&own, STEPS, message));
        }
        // A setting may say how long its base arm trains.
        let timed = comparison.matched == Matched::Time;
        // And a suite's point may say what is sought: it is replaced.
        let arm_alone = timed || !comparison.task.is_empty();
        if comparison.matched != Matched::None && own.iter().skip(if arm_alone { own.len() - 1 } else { 0 }).any(sets) {
            let message = format!("arm `{}`: {key} is what match seeks: leave it out here, or match nothing", arm.name);
            problems.push(layers::at(&own, key, message));
        }
        let mut choices = Vec::new();
        for choice in comparison.choices() {
            let mut layers = below.to_vec();
            layers.extend(own.clone());
            for (key, value) in &choice {
                let name = if comparison.tune.is_some() { "tune" } else { "sweep" };
                layers.push(parse_layer(name, &format!("{key} = {value}"))?);
            }
            match context.with_seed(&layers, comparison.seeds[0]) {
                Err(Failure::Run(problem)) => return Err(Failure::Run(format!("arm `{}`: {problem}", arm.name))),
                Ok(run) if comparison.metric == Quality::BitsPerByte && !has_bytes(&run.recipe.data) => {
                    let problem =
                        format!("data.{} has no bits per byte: they are of text for decoders", run.recipe.data.name());
                    problems.push(layers::at(std::slice::from_ref(layer), "metric", format!("metric: {problem}")));
                    break;
                }
                Ok(run) if comparison.chooses() && run.recipe.validation.batches == 1 => {
                    let problem = "validation.batches (1) must be 2 or more, or 0 for all: one half of them chooses the setting, the \
                                   other one reports it";
                    problems.push(layers::at(&layers, "validation.batches", format!("arm `{}`: {problem}", arm.name)));
                    break;
                }
                Err(Failure::Usage(found)) => {
                    problems.extend(found.about(&format!("arm `{}`", arm.name)).0);
                    break; // the other choices would say the same again
                }
                Ok(run) => choices.push((layers, run)),
                Err(other) => return Err(other),
            }
        }
        arms.push(choices);
    }
    Problems::none(problems)?;
    Ok(arms)
}

/// What is wrong, with the arm that it is about.
fn about(failure: Failure, arm: &str) -> Failure {
    let arm = format!("arm `{arm}`");
    match failure {
        Failure::Usage(found) => found.about(&arm).into(),
        Failure::Run(problem) => Failure::Run(format!("{arm}: {problem}")),
        other => other,
    }
}

/// Whether targets stand for bytes of text.
fn has_bytes(data: &DataConfig) -> bool {
    data.is_text() && data.yields() == Yields::Tokens
}

fn sets_key(layer: &Layer, key: &str) -> bool {
    let parts: Vec<&str> = key.split('.').collect();
    layer.find(&parts).is_some_and(|(_, depth)| depth == parts.len())
}

/// What all runs of a plan are resolved with.
struct RunContext<'a> {
    prepared: &'a Prepared,
    caller: Caller,
}

impl RunContext<'_> {
    fn with_seed(&self, layers: &[Layer], seed: u64) -> Result<Resolved, Failure> {
        let mut layers = self.prepared.filled(layers.to_vec(), seed)?;
        layers.push(parse_layer("seeds", &format!("debug.seed = {seed}"))?);
        resolve::resolve(&recipe::from_layers(layers)?, self.caller)
    }
}

fn name_of(matched: Matched) -> String {
    toml::Value::try_from(matched).ok().and_then(|name| name.as_str().map(Into::into)).unwrap_or_default()
}

/// The value of `key` that makes the arm as costly as the base arm.
fn equal(comparison: &Comparison, key: &str, target: u64, layers: &[Layer], known: Known) -> Result<Match, String> {
    let cost = |value: u64| {
        let mut layers = layers.to_vec();
        layers.push(parse_layer("match", &format!("{key} = {value}")).ok()?);
        let recipe: Recipe = toml::Value::Table(merge(&layers)).try_into().ok()?;
        match (&recipe.model, known) {
            (ModelConfig::Classifier { config: classifier, .. }, Known::Examples(sizes)) => {
                classifier.validate(Some(sizes.input)).ok()?;
            }
            (ModelConfig::Decoder { config: Some(decoder), .. }, Known::Ids(_)) => decoder.validate().ok()?,
            (ModelConfig::SuperResolution(config), _) => config.validate(None).ok()?,
            _ => return None,
        }
        Some(comparison.matched.of(&Totals::of_recipe(&recipe, known)))
    };
    solve(key, target, comparison.tolerance(), &cost)
}

/// Keys that change what a step does to the weights, and not how long it takes.
const TIMELESS: [&str; 3] = ["optimizer.adamw.", "optimizer.muon.", "lr_scheduler."];

/// The steps of an arm beside those of its base; those of its first setting, where settings take equally long.
fn timing(
    arm: &str,
    (choices, base): (&[Layered], &[Layered]),
    (choice, values): (usize, &Values),
    steps: u64,
) -> Result<Timing, Failure> {
    let timeless = values.iter().all(|(key, _)| TIMELESS.iter().any(|start| key.starts_with(start)));
    let at = if timeless { 0 } else { choice };
    let text = |of: &[Layered]| recipe::resolved(&of[at].1.recipe);
    Ok(Timing::new(arm, text(choices)?, text(base)?, steps))
}

fn runs(
    comparison: &Comparison,
    arms: &[ArmPlan],
    (context, out): (&RunContext<'_>, &Path),
    text_hash: &mut TextHash<'_>,
) -> Result<Vec<Run>, Failure> {
    let mut runs = Vec::new();
    let trials = comparison.trial_seeds().into_iter().map(|seed| (seed, true));
    for (seed, trial) in trials.chain(comparison.seeds.iter().map(|&seed| (seed, false))) {
        for (arm, planned) in arms.iter().enumerate() {
            for (choice, chosen) in planned.choices.iter().enumerate() {
                let resolved = context.with_seed(&chosen.layers, seed)?;
                let text = recipe::resolved(&resolved.recipe)?;
                let id = result::id(&recipe::resolved(&kept(&resolved.recipe))?, text_hash(&resolved)?.as_deref());
                let folder = format!("{}-seed-{seed}-{}", folder_name(&planned.name), &id[..8]);
                let folder = out.join("runs").join(folder);
                runs.push(Run { arm, choice, seed, trial, id, folder, text, steps: resolved.recipe.training.steps });
            }
        }
    }
    Ok(runs)
}

impl Plan {
    /// The runs that choose settings, by their places: trials, or all of a sweep. None where nothing is chosen.
    pub fn choosing(&self) -> Vec<usize> {
        let tuned = self.comparison.tune.is_some();
        let chooses = |run: &Run| self.comparison.chooses() && run.trial == tuned;
        (0..self.runs.len()).filter(|&at| chooses(&self.runs[at])).collect()
    }

    /// The runs that are reported, by their places, once every arm has a setting.
    pub fn reported(&self, chosen: &[usize]) -> Vec<usize> {
        let reported = |run: &Run| !run.trial && run.choice == chosen[run.arm];
        (0..self.runs.len()).filter(|&at| reported(&self.runs[at])).collect()
    }

    /// The runs that there are in the end, by their places, trials among them; for the report of arms whose setting is not chosen
    /// yet, those with the first.
    pub fn all(&self) -> BTreeSet<usize> {
        self.choosing().into_iter().chain(self.reported(&vec![0; self.arms.len()])).collect()
    }

    /// How many runs there are in the end.
    pub fn count(&self) -> usize {
        self.all().len()
    }

    /// What the report is called.
    pub fn title(&self) -> String {
        self.comparison.title.clone().unwrap_or_else(|| self.name())
    }

    /// The name of its file, without ending.
    pub fn name(&self) -> String {
        self.file.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }
}
