//! Published suites of tasks, under versioned names: a suite is a file below and a row of [`SUITES`].
//!
//! A suite is a list of points. Each is a whole recipe: the paper's model, data, optimiser and length of training. Points of one
//! setting that differ in optimiser settings only are its cells: the best cell is what is reported, as the papers do. Any
//! number of a published suite that changes makes a new version of its name; `-small` is ours, for a laptop.

mod mad;
mod mqar;
mod state_tracking;
pub mod tasks;
mod text;

use polyhead_data::text_suites::TextTask;
use polyhead_recipe::Problems;
use polyhead_recipe::layers::{Layer, parse_layer};
use polyhead_recipe::nearest::nearest;
use polyhead_runs::result::SetScore;

/// A published suite.
pub struct Suite {
    /// Its name with its version.
    pub name: &'static str,
    /// What it asks, in a line.
    pub about: &'static str,
    /// Where it is from.
    pub paper: &'static str,
    /// Where a run here differs from what was published; empty where it does not.
    pub differs: &'static [&'static str],
    /// Its points; none where it asks trained models.
    pub points: fn() -> Vec<Point>,
    /// What it asks a trained model, where it does.
    pub questions: Option<Questions>,
}

/// Questions for trained models.
#[derive(Clone, Copy)]
pub struct Questions {
    /// The tasks.
    pub tasks: fn() -> Vec<TextTask>,
    /// Lengths of the texts, in the model's tokens.
    pub lengths: &'static [usize],
    /// Questions for each task and length.
    pub rows: u64,
    /// Decides the questions, where no other seed is asked for.
    pub seed: u64,
}

/// One training of a suite.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// The task, whose settings are averaged.
    pub task: String,
    /// What is varied in the task, where anything is.
    pub setting: String,
    /// The size of the model, where it is varied.
    pub size: String,
    /// The optimiser settings, where there are several.
    pub cell: String,
    /// What is reported of its last test set, which is the furthest from what is trained on.
    pub score: Score,
    /// The recipe, as TOML.
    pub recipe: String,
}

/// The number that a suite reports of a test set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Score {
    /// The mean over rows of the share of right answers.
    RowAccuracy,
    /// The mean of the ids' recalls, batch by batch.
    MacroAccuracy,
    /// The share of right answers.
    Accuracy,
    /// The share of rows in which all answers are right.
    Exact,
    /// The share of right answers above that of guessing: 0 for guesses, 1 where all are right.
    AboveChance(f64),
}

impl Score {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::RowAccuracy => "row_accuracy",
            Self::MacroAccuracy => "macro_accuracy",
            Self::Accuracy => "accuracy",
            Self::Exact => "exact",
            Self::AboveChance(_) => "above_chance",
        }
    }

    /// Of a test set.
    pub fn of(self, set: &SetScore) -> f64 {
        match self {
            Self::RowAccuracy => set.row_accuracy,
            Self::MacroAccuracy => set.macro_accuracy,
            Self::Accuracy => set.accuracy,
            Self::Exact => set.exact,
            Self::AboveChance(chance) => (set.accuracy - chance) / (1.0 - chance),
        }
    }
}

/// All suites.
pub static SUITES: [Suite; 10] = [
    mqar::ZOOLOGY,
    mqar::ZOOLOGY_SMALL,
    mad::MAD,
    mad::MAD_SMALL,
    state_tracking::STATE_TRACKING,
    state_tracking::STATE_TRACKING_SMALL,
    text::RULER,
    text::RULER_SMALL,
    text::BABILONG,
    text::BABILONG_SMALL,
];

impl Suite {
    /// The suite of this name.
    ///
    /// # Errors
    /// If there is none: with the nearest name.
    pub fn find(name: &str) -> Result<&'static Self, Problems> {
        SUITES.iter().find(|suite| suite.name == name).ok_or_else(|| {
            let near = nearest(name, SUITES.iter().map(|suite| suite.name));
            let meant = near.map_or(String::new(), |name| format!("did you mean {name}? "));
            Problems::plain(format!("there is no suite {name}\n  hint: {meant}`polyhead suite --list` lists all"))
        })
    }
}

impl Point {
    /// Its recipe as a layer, which others may be put over.
    ///
    /// # Errors
    /// If it is no TOML, which would be our mistake.
    pub fn layer(&self) -> Result<Layer, Problems> {
        Ok(parse_layer(&self.name(), &self.recipe)?)
    }

    /// What it is called.
    pub fn name(&self) -> String {
        joined(&[&self.without_cell(), &self.cell])
    }

    /// What all cells of its setting are called.
    pub fn without_cell(&self) -> String {
        joined(&[&self.task, &self.setting, &self.size])
    }
}

/// The end of a point's recipe: after how many steps it is validated and saved, and logged; at which accuracy it ends.
fn watched(interval: u64, log_freq: u64, stop_accuracy: Option<f64>) -> String {
    let stop = stop_accuracy.map_or(String::new(), |share| format!("stop_accuracy = {share}\n"));
    format!(
        "\
[validation]
interval = {interval}
batches = 0
{stop}
[checkpoint]
interval = {interval}
keep_latest_k = 1

[metrics]
log_freq = {log_freq}
tensorboard = false
observe = false
"
    )
}

/// What is there of these words, with commas between.
fn joined(words: &[&str]) -> String {
    words.iter().filter(|words| !words.is_empty()).copied().collect::<Vec<_>>().join(", ")
}

/// Learning rates from `10^first` to `10^last`, equally far apart in their logarithms.
fn log_spaced(first: f64, last: f64, count: usize) -> Vec<f64> {
    let exponent = |at: usize| first + (last - first) * at as f64 / (count - 1).max(1) as f64;
    (0..count).map(|at| 10f64.powf(exponent(at))).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use polyhead_recipe::from_layers;

    use super::*;

    #[test]
    fn every_point_of_every_suite_is_a_recipe_of_its_own() {
        for suite in &SUITES {
            let points = (suite.points)();
            let names: BTreeSet<String> = points.iter().map(Point::name).collect();
            assert_eq!(names.len(), points.len(), "{}: points have names of their own", suite.name);
            for point in points {
                let layer = point.layer().unwrap_or_else(|problem| panic!("{}: {problem}", suite.name));
                if let Err(problem) = from_layers(vec![layer]) {
                    panic!("{}, {}: {problem}\n{}", suite.name, point.name(), point.recipe);
                }
            }
        }
    }

    #[test]
    fn suites_are_found_by_name() {
        assert!(SUITES.iter().all(|suite| Suite::find(suite.name).is_ok_and(|found| found.name == suite.name)));
        let problem = Suite::find("mqar-zoology-v2").err().unwrap().to_string();
        assert!(problem.contains("mqar-zoology-v1"), "{problem}");
    }

    #[test]
    fn rates_are_equally_far_apart() {
        let rates = log_spaced(-4.0, -2.0, 4);
        let told: Vec<String> = rates.iter().map(|rate| format!("{rate:.3e}")).collect();
        assert_eq!(told, ["1.000e-4", "4.642e-4", "2.154e-3", "1.000e-2"]);
    }
}
