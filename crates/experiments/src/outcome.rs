//! What the runs of a comparison reached, put together per arm.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use serde_json::Value;

use polyhead_recipe as recipe;
use polyhead_runs::Failure;
use polyhead_runs::costs::tokens_per_step;
use polyhead_runs::result::{self, Environment, RunResult};

use super::comparison::{Comparison, Quality};
use super::matching::Match;
use super::metric::{METRICS, Metric};
use super::plan::{ArmPlan, Plan};
use super::runs::End;
use super::statistics::Summary;
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
    /// The value of the sweep that was chosen; empty where there is no sweep.
    pub choice: String,
    /// The values of the sweep with what they reached on the selection half, over seeds.
    pub considered: Vec<(String, Option<Summary>)>,
    /// What was sought to make it as costly as the base arm.
    pub matched: Option<Match>,
    /// Its recipe, resolved, with the first seed.
    pub recipe: String,
    /// Tokens of a step.
    pub tokens_per_step: u64,
    /// Its runs, one a seed.
    pub runs: Vec<RunOutcome>,
    /// Failed runs of other values of the sweep: which, and why.
    pub failed_elsewhere: Vec<(String, String)>,
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
    /// Puts together how a plan's runs ended.
    ///
    /// # Errors
    /// If a log cannot be read.
    pub fn gather(
        plan: &Plan,
        ends: Vec<End>,
        (prepared, command): (Vec<String>, &str),
        tell: fn(&str),
    ) -> Result<Self, Failure> {
        let mut by_arm: Vec<Vec<Vec<RunOutcome>>> =
            plan.arms.iter().map(|arm| arm.choices.iter().map(|_| Vec::new()).collect()).collect();
        for (run, end) in plan.runs.iter().zip(ends) {
            let history = result::history(&run.folder, tell)?;
            let end = match end {
                End::Finished(result) => Ok(*result),
                End::Failed(problem) => Err(problem),
            };
            by_arm[run.arm][run.choice].push(RunOutcome {
                seed: run.seed,
                folder: run.folder.clone(),
                end,
                history,
                evaluated: conversion(&run.text),
            });
        }
        let quality = plan.comparison.metric;
        let arms = plan.arms.iter().zip(by_arm).map(|(arm, runs)| arm_outcome(arm, runs, quality));
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

    /// Whether a sweep chose among settings.
    pub fn swept(&self) -> bool {
        !self.comparison.sweep.is_empty()
    }

    /// How many runs failed.
    pub fn failed(&self) -> usize {
        let failed =
            |arm: &ArmOutcome| arm.runs.iter().filter(|run| run.end.is_err()).count() + arm.failed_elsewhere.len();
        self.arms.iter().map(failed).sum()
    }

    /// A number of every finished run of an arm, with its seed.
    pub fn values(&self, arm: usize, metric: &Metric) -> Vec<(u64, f64)> {
        let runs = self.arms[arm].runs.iter();
        runs.filter_map(|run| Some((run.seed, (metric.of)(run.end.as_ref().ok()?, self.swept())?))).collect()
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

/// The runs of an arm, of the value of the sweep that did best on the selection half where all seeds finished.
fn arm_outcome(arm: &ArmPlan, runs: Vec<Vec<RunOutcome>>, quality: Quality) -> Result<ArmOutcome, Failure> {
    let selection = |runs: &[RunOutcome]| -> Option<Summary> {
        let scores = runs.iter().map(|run| quality.of_score(run.end.as_ref().ok()?.selection.as_ref()?));
        Summary::of(&scores.collect::<Option<Vec<f64>>>()?)
    };
    let considered: Vec<(String, Option<Summary>)> =
        arm.choices.iter().zip(&runs).map(|(choice, runs)| (choice.words.clone(), selection(runs))).collect();
    let worth = |mean: f64| if quality.grows() { -mean } else { mean };
    let known =
        considered.iter().enumerate().filter_map(|(at, (_, summary))| Some((at, worth(summary.as_ref()?.mean))));
    let chosen = known.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(at, _)| at);
    let (mut kept, mut failed_elsewhere) = (Vec::new(), Vec::new());
    for (at, runs) in runs.into_iter().enumerate() {
        if at == chosen {
            kept = runs;
            continue;
        }
        let words = &arm.choices[at].words;
        let failed = runs.into_iter().filter_map(|run| Some((format!("{words}, seed {}", run.seed), run.end.err()?)));
        failed_elsewhere.extend(failed);
    }
    let choice = &arm.choices[chosen];
    Ok(ArmOutcome {
        name: arm.name.clone(),
        choice: choice.words.clone(),
        considered: if arm.choices.len() > 1 { considered } else { Vec::new() },
        matched: choice.matched.clone(),
        recipe: recipe::resolved(&choice.run.recipe)?,
        tokens_per_step: tokens_per_step(&choice.run.recipe),
        runs: kept,
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
