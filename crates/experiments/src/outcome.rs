//! What the runs of a comparison reached, put together per arm.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use serde_json::Value;

use polyhead_recipe as recipe;
use polyhead_runs::Failure;
use polyhead_runs::costs::tokens_per_step;
use polyhead_runs::result::{self, Environment, RunResult, Score};

use super::best_of::{BestOf, Trial, expected_best};
use super::comparison::{Comparison, Quality};
use super::matching::Match;
use super::metric::{METRICS, Metric};
use super::plan::{Choice, Plan};
use super::runs::End;
use super::statistics::Summary;
use super::tune::{Values, best, edges};
use polyhead_training::run_folder::files::CONVERSION;

/// What a comparison found.
pub struct Outcome {
    /// What the report is called.
    pub title: String,
    /// The name of the comparison's file, without ending.
    pub name: String,
    /// The comparison's file.
    pub file: String,
    /// The command that runs it again.
    pub command: String,
    /// What was made before the arms, for the first seed, as commands.
    pub prepared: Vec<String>,
    /// What was asked for.
    pub comparison: Comparison,
    /// The arms, in their order.
    pub arms: Vec<ArmOutcome>,
}

/// What an arm's runs reached.
pub struct ArmOutcome {
    /// Its name.
    pub name: String,
    /// The setting that was chosen; empty where nothing is chosen.
    pub choice: String,
    /// The settings that it was chosen from.
    pub considered: Vec<Considered>,
    /// What to say where the chosen setting is at the edge of what was tried.
    pub edges: Vec<String>,
    /// What was sought to make it as costly as the base arm.
    pub matched: Option<Match>,
    /// Its recipe, resolved, with the first seed.
    pub recipe: String,
    /// Tokens of a step.
    pub tokens_per_step: u64,
    /// Its runs, one a seed.
    pub runs: Vec<RunOutcome>,
    /// Failed runs of other values of a sweep, and failed trials: which, and why.
    pub failed_elsewhere: Vec<(String, String)>,
}

/// A setting that was tried.
pub struct Considered {
    /// Its keys, as `key = value`.
    pub words: String,
    /// Its keys with their values.
    pub values: Values,
    /// What it reached on the half of the held-out batches that chooses, over seeds; `None` where a run failed.
    pub selection: Option<Summary>,
    /// What it reached on the other half.
    pub reporting: Option<Summary>,
}

impl ArmOutcome {
    /// What would have been reached with fewer trials.
    pub fn expected_best(&self, quality: Quality) -> Vec<BestOf> {
        let trial = |it: &Considered| Some(Trial { selection: it.selection?.mean, reporting: it.reporting?.mean });
        expected_best(&self.considered.iter().map(trial).collect::<Vec<_>>(), quality.grows())
    }
}

/// How one run ended.
pub struct RunOutcome {
    /// Its seed.
    pub seed: u64,
    /// Its folder.
    pub folder: PathBuf,
    /// What it reached, or why it failed.
    pub end: Result<RunResult, String>,
    /// Its log.
    pub history: Vec<Value>,
    /// What the comparison's tasks told, and the conversion that made what it starts from, by name.
    pub evaluated: BTreeMap<String, f64>,
}

impl Outcome {
    /// Puts together how a plan's runs ended, once each arm has the setting that was `chosen`; `ends` by their places.
    ///
    /// # Errors
    /// If a log cannot be read.
    pub fn gather(
        plan: &Plan,
        chosen: &[usize],
        ends: &BTreeMap<usize, End>,
        (prepared, command): (Vec<String>, &str),
        tell: fn(&str),
    ) -> Result<Self, Failure> {
        let arms = (0..plan.arms.len()).map(|arm| arm_outcome(plan, (arm, chosen[arm]), ends, tell));
        Ok(Self {
            title: plan.title(),
            name: plan.name(),
            file: plan.file.display().to_string(),
            command: command.to_owned(),
            prepared,
            comparison: plan.comparison.clone(),
            arms: arms.collect::<Result<_, Failure>>()?,
        })
    }

    /// How many runs failed; a trial that did counts as the worst one, which is an answer.
    pub fn failed(&self) -> usize {
        let tuned = self.comparison.tune.is_some();
        let failed = |arm: &ArmOutcome| {
            let elsewhere = if tuned { 0 } else { arm.failed_elsewhere.len() };
            arm.runs.iter().filter(|run| run.end.is_err()).count() + elsewhere
        };
        self.arms.iter().map(failed).sum()
    }

    /// A number of every finished run of an arm, with its seed.
    pub fn values(&self, arm: usize, metric: &Metric) -> Vec<(u64, f64)> {
        let runs = self.arms[arm].runs.iter();
        runs.filter_map(|run| Some((run.seed, (metric.of)(run.end.as_ref().ok()?, self.comparison.chooses())?)))
            .collect()
    }

    /// Mean and spread over seeds.
    pub fn summary(&self, arm: usize, metric: &Metric) -> Option<Summary> {
        Summary::of(&self.values(arm, metric).into_iter().map(|(_, value)| value).collect::<Vec<_>>())
    }

    /// Arm minus other arm, seed by seed, over the seeds that both finished.
    pub fn differences(&self, arm: usize, other: usize, metric: &Metric) -> Vec<(u64, f64)> {
        let others = self.values(other, metric);
        let pair = |(seed, value)| Some((seed, value - others.iter().find(|(other, _)| *other == seed)?.1));
        self.values(arm, metric).into_iter().filter_map(pair).collect()
    }

    /// Mean and interval of [`differences`](Self::differences).
    pub fn difference(&self, arm: usize, other: usize, metric: &Metric) -> Option<Summary> {
        Summary::of(&self.differences(arm, other, metric).into_iter().map(|(_, value)| value).collect::<Vec<_>>())
    }

    /// The environments of the runs, each once.
    pub fn environments(&self) -> Vec<&Environment> {
        let mut found: Vec<&Environment> = Vec::new();
        for result in self.results() {
            if !found.contains(&&result.environment) {
                found.push(&result.environment);
            }
        }
        found
    }

    /// The results of all finished runs.
    pub fn results(&self) -> impl Iterator<Item = &RunResult> {
        self.arms.iter().flat_map(|arm| arm.runs.iter().filter_map(|run| run.end.as_ref().ok()))
    }

    /// Arms of a group that are compared, each with what it is compared with.
    pub fn pairs(&self, group: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
        group.map(|arm| (arm, self.comparison.base_of(arm))).filter(|(arm, base)| arm != base)
    }

    /// Words about tokens, in the unit that the runs count: classifiers learn from examples.
    pub fn in_units(&self, words: &str) -> String {
        let unit = self.results().next().map_or("token", |result| result.unit.as_str());
        words.replace("token", unit)
    }

    /// The numbers that every run has, as this comparison calls them.
    pub fn metrics(&self) -> Vec<Metric> {
        let named = |metric: &Metric| Metric { title: Cow::Owned(self.in_units(&metric.title)), ..metric.clone() };
        METRICS.iter().map(named).collect()
    }
}

/// What `conversion.json` says of the model that a run starts from, if a conversion made it.
fn conversion(recipe: &str) -> BTreeMap<String, f64> {
    let folder = recipe.parse::<toml::Table>().ok().and_then(|recipe| {
        let folder = recipe.get("model")?.get("pretrained")?.as_str()?;
        Some(PathBuf::from(folder))
    });
    let read = || -> Option<Value> { serde_json::from_slice(&std::fs::read(folder?.join(CONVERSION)).ok()?).ok() };
    let told = read().unwrap_or_default();
    let (before, after) = (told["before"]["loss"].as_f64(), told["after"]["loss"].as_f64());
    let jump = before.zip(after).map(|(before, after)| after - before);
    let numbers = [
        ("loss_before", before),
        ("loss_after", after),
        ("jump", jump),
        ("divergence", told["divergence"].as_f64()),
        ("scatter", told["scatter"].as_f64()),
    ];
    numbers.into_iter().filter_map(|(name, value)| Some((format!("conversion/{name}"), value?))).collect()
}

/// The setting of each arm that did best on the selection half, of those that all seeds finished with; the first where none
/// did.
///
/// # Errors
/// If runs have finished with so little held-out data that no half of it is left to choose on.
pub fn choose(plan: &Plan, ends: &BTreeMap<usize, End>) -> Result<Vec<usize>, Failure> {
    let quality = plan.comparison.metric;
    let whole = |at: &&usize| matches!(ends.get(at), Some(End::Finished(result)) if result.selection.is_none());
    if let Some(&at) = plan.choosing().iter().find(whole) {
        return Err(Failure::Run(format!(
            "{}: the held-out data is a single batch, and one half of it has to choose the setting, the other one to report it: \
             raise validation.fraction, or lower training.batch_size",
            plan.runs[at].folder.display()
        )));
    }
    let of_arm = |arm: usize| {
        let selection: Vec<Option<f64>> =
            considered(plan, arm, ends).iter().map(|it| Some(it.selection?.mean)).collect();
        best(&selection, quality.grows()).unwrap_or(0)
    };
    Ok((0..plan.arms.len()).map(of_arm).collect())
}

/// What each setting of an arm reached, in the runs that choose; none where nothing is chosen.
fn considered(plan: &Plan, arm: usize, ends: &BTreeMap<usize, End>) -> Vec<Considered> {
    let (choosing, quality) = (plan.choosing(), plan.comparison.metric);
    if choosing.is_empty() {
        return Vec::new();
    }
    let of_choice = |(choice, planned): (usize, &Choice)| {
        let own = || {
            let of = choosing.iter().filter(|&&at| plan.runs[at].arm == arm && plan.runs[at].choice == choice);
            of.map(|at| match ends.get(at) {
                Some(End::Finished(result)) => Some(&**result),
                _ => None,
            })
        };
        let over = |half: fn(&RunResult) -> Option<&Score>| {
            let scores = own().map(|result| quality.of_score(half(result?)?));
            Summary::of(&scores.collect::<Option<Vec<f64>>>()?)
        };
        Considered {
            words: planned.words.clone(),
            values: planned.values.clone(),
            selection: over(|result| result.selection.as_ref()),
            reporting: over(|result| result.reporting.as_ref()),
        }
    };
    plan.arms[arm].choices.iter().enumerate().map(of_choice).collect()
}

/// The runs of an arm with the setting that was chosen.
fn arm_outcome(
    plan: &Plan,
    (arm, chosen): (usize, usize),
    ends: &BTreeMap<usize, End>,
    tell: fn(&str),
) -> Result<ArmOutcome, Failure> {
    let (planned, comparison) = (&plan.arms[arm], &plan.comparison);
    let (mut runs, mut failed_elsewhere) = (Vec::new(), Vec::new());
    for (run, end) in ends.iter().map(|(&at, end)| (&plan.runs[at], end)).filter(|(run, _)| run.arm == arm) {
        let end = match end {
            End::Finished(result) => Ok((**result).clone()),
            End::Failed(problem) => Err(problem.clone()),
        };
        if !run.trial && run.choice == chosen {
            let history = result::history(&run.folder, tell)?;
            let mut evaluated = conversion(&run.text);
            evaluated.extend(end.as_ref().map_or(Vec::new(), RunResult::set_measures));
            let folder = run.folder.clone();
            runs.push(RunOutcome { seed: run.seed, folder, end, history, evaluated });
        } else if let Err(problem) = end {
            let words = &planned.choices[run.choice].words;
            failed_elsewhere.push((format!("{words}, seed {}", run.seed), problem));
        }
    }
    let choice = &planned.choices[chosen];
    let tried: Vec<Values> = planned.choices.iter().map(|choice| choice.values.clone()).collect();
    Ok(ArmOutcome {
        name: planned.name.clone(),
        choice: choice.words.clone(),
        considered: considered(plan, arm, ends),
        edges: edges(comparison.tune.as_ref(), &tried, chosen),
        matched: choice.matched.clone(),
        recipe: recipe::resolved(&choice.run.recipe)?,
        tokens_per_step: tokens_per_step(&choice.run.recipe),
        runs,
        failed_elsewhere,
    })
}

/// A curve of a run: for each logged step the tokens and the seconds until then, and what `key` was.
pub struct Point {
    /// Tokens seen.
    pub tokens: f64,
    /// Seconds spent in steps.
    pub seconds: f64,
    /// The value.
    pub value: f64,
}

/// The curve of a key of `metrics.jsonl`. Seconds add up from the logged speeds, so that pauses do not count.
pub fn curve(history: &[Value], tokens_per_step: u64, value: impl Fn(&Value) -> Option<f64>) -> Vec<Point> {
    let (mut seconds, mut before, mut points) = (0.0, 0.0, Vec::new());
    for line in history {
        let Some(step) = line["step"].as_f64() else { continue };
        if let Some(speed) = line["tokens_per_second"].as_f64() {
            seconds += (step - before) * tokens_per_step as f64 / speed.max(1e-9);
            before = step;
        }
        if let Some(value) = value(line) {
            points.push(Point { tokens: step * tokens_per_step as f64, seconds, value });
        }
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn curves_add_up_time() {
        let history = [
            json!({ "step": 1, "tokens_per_second": 100.0, "loss": 3.0 }),
            json!({ "step": 5, "tokens_per_second": 200.0, "loss": 2.0 }),
            json!({ "step": 5, "validation_loss": 2.5 }),
        ];
        let points = curve(&history, 10, |line| line["validation_loss"].as_f64());
        assert_eq!(points.len(), 1);
        assert_eq!((points[0].tokens, points[0].value), (50.0, 2.5));
        assert!((points[0].seconds - (0.1 + 0.2)).abs() < 1e-12);
    }
}
