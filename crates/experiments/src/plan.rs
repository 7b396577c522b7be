//! What a comparison will run: every arm with every seed (and every value of a sweep), as complete recipes.

use std::path::{Path, PathBuf};

use polyhead_data::Yields;
use polyhead_recipe::Problems;
use polyhead_recipe::layers::{self, Layer, merge, parse_layer};
use polyhead_recipe::{self as recipe, ModelConfig, Recipe, folder_name};
use polyhead_runs::Failure;
use polyhead_runs::costs::{Known, Totals};
use polyhead_runs::result;
use polyhead_runs::{Caller, Resolved, resolve};

use super::comparison::{Comparison, Matched, Read};
use super::matching::{Match, other_data, solve};
use super::prepare::Prepared;

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
    /// Every run, those of the first seed first, so that arms can be compared early.
    pub runs: Vec<Run>,
}

/// An arm, ready to run.
pub struct ArmPlan {
    /// Its name.
    pub name: String,
    /// Its settings to choose from; one where there is no sweep.
    pub choices: Vec<Choice>,
}

/// An arm with one of the values of a sweep.
pub struct Choice {
    /// The swept keys, as `key = value`; empty where there is no sweep.
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
        let Recipe { data, model, .. } = &loaded.recipe;
        waits |= data.yields() != Yields::Tokens && !data.is_generated();
        waits |= model.pretrained().is_some_and(|folder| !folder.exists());
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

    let totals = |run: &Resolved| Ok::<_, Failure>(Totals::of_recipe(&run.recipe, run.known()?));
    let (mut planned, mut problems) = (Vec::new(), Vec::new());
    for (at, choices) in arms.iter().enumerate() {
        let (arm, base) = (&comparison.arm[at], &arms[comparison.base_of(at)]);
        let mut refuse = |key: &str, message: String| {
            let message = format!("arm `{}`: {message}", arm.name);
            problems.push(layers::at(std::slice::from_ref(&layer), &format!("arm.{}.{key}", arm.place.arm), message));
        };
        let words = comparison.choices();
        let mut ready = Vec::new();
        for ((layers, own), (words, (_, to))) in choices.iter().zip(words.iter().zip(base)) {
            let target = comparison.matched.of(&totals(to)?);
            if let Some(key) = other_data(&base[0].1.recipe, &own.recipe).filter(|_| comparison.same_data) {
                refuse(
                    "recipe",
                    format!(
                        "{key} differs from the base arm's, and arms must learn the same from the same; same_data = false allows it"
                    ),
                );
                break;
            }
            let (key, known) = (arm.solve.as_ref().unwrap_or(&comparison.solve), own.known()?);
            // What costs the same already is left as it is.
            let seek = comparison.matched != Matched::None && comparison.matched.of(&totals(own)?) != target;
            let matched = match seek.then(|| equal(&comparison, key, target, layers, known)) {
                None => None,
                Some(Ok(found)) => Some(found),
                Some(Err(message)) => {
                    refuse("name", format!("match = \"{}\": {message}", name_of(comparison.matched)));
                    break;
                }
            };
            let mut layers = layers.clone();
            if let Some(found) = &matched {
                layers.push(line("match", &format!("{} = {}", found.key, found.value))?);
            }
            let run = context.with_seed(&layers, comparison.seeds[0])?;
            let totals = totals(&run)?;
            ready.push(Choice { words: words.join(", "), run, totals, matched, layers });
        }
        planned.push(ArmPlan { name: arm.name.clone(), choices: ready });
    }
    if !problems.is_empty() {
        return Err(Problems(problems).into());
    }
    let runs = runs(&comparison, &planned, (&context, out), text_hash)?;
    Ok(Plan { comparison, file: file.to_owned(), out: out.to_owned(), arms: planned, runs })
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
        let key = arm.solve.as_ref().unwrap_or(&comparison.solve);
        let parts: Vec<&str> = key.split('.').collect();
        let sets = |layer: &Layer| layer.find(&parts).is_some_and(|(_, depth)| depth == parts.len());
        if comparison.matched != Matched::None && own.iter().any(sets) {
            let message = format!("arm `{}`: {key} is what match seeks: leave it out here, or match nothing", arm.name);
            problems.push(layers::at(&own, key, message));
        }
        let mut choices = Vec::new();
        for choice in comparison.choices() {
            let mut layers = below.to_vec();
            layers.extend(own.clone());
            for words in &choice {
                layers.push(line("sweep", words)?);
            }
            match context.with_seed(&layers, comparison.seeds[0]) {
                Ok(run) => choices.push((layers, run)),
                Err(Failure::Run(problem)) => return Err(Failure::Run(format!("arm `{}`: {problem}", arm.name))),
                Err(Failure::Usage(found)) => {
                    problems.extend(found.0.into_iter().map(|problem| problem.about(&format!("arm `{}`", arm.name))));
                    break; // the other choices would say the same again
                }
                Err(other) => return Err(other),
            }
        }
        arms.push(choices);
    }
    if problems.is_empty() { Ok(arms) } else { Err(Problems(problems).into()) }
}

fn line(name: &str, text: &str) -> Result<Layer, Problems> {
    parse_layer(name, text).map_err(|problem| Problems(vec![problem]))
}

/// What all runs of a plan are resolved with.
struct RunContext<'a> {
    prepared: &'a Prepared,
    caller: Caller,
}

impl RunContext<'_> {
    fn with_seed(&self, layers: &[Layer], seed: u64) -> Result<Resolved, Failure> {
        let mut layers = self.prepared.filled(layers.to_vec(), seed)?;
        layers.push(line("seeds", &format!("debug.seed = {seed}"))?);
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
            _ => return None,
        }
        Some(comparison.matched.of(&Totals::of_recipe(&recipe, known)))
    };
    solve(key, target, comparison.tolerance, &cost)
}

fn runs(
    comparison: &Comparison,
    arms: &[ArmPlan],
    (context, out): (&RunContext<'_>, &Path),
    text_hash: &mut TextHash<'_>,
) -> Result<Vec<Run>, Failure> {
    let mut runs = Vec::new();
    for &seed in &comparison.seeds {
        for (arm, planned) in arms.iter().enumerate() {
            for (choice, chosen) in planned.choices.iter().enumerate() {
                let resolved = context.with_seed(&chosen.layers, seed)?;
                let text = recipe::resolved(&resolved.recipe)?;
                let id = result::id(&text, text_hash(&resolved)?.as_deref());
                let folder = format!("{}-seed-{seed}-{}", folder_name(&planned.name), &id[..8]);
                let folder = out.join("runs").join(folder);
                runs.push(Run { arm, choice, seed, id, folder, text, steps: resolved.recipe.training.steps });
            }
        }
    }
    Ok(runs)
}

impl Plan {
    /// What the report is called.
    pub fn title(&self) -> String {
        self.comparison.title.clone().unwrap_or_else(|| self.name())
    }

    /// The name of its file, without ending.
    pub fn name(&self) -> String {
        self.file.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }
}
