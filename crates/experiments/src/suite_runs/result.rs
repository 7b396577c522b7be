//! What a suite reached: a JSON file (`polyhead schema suite`), its table, and stored references that a later version is checked
//! against.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use polyhead_data::Opened;
use polyhead_runs::Failure;
use polyhead_runs::data::{open_tokens, project_root};
use polyhead_runs::result::{self, Environment, RunResult, SetScore};
use polyhead_training::run_folder::{atomic_write, files};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::plan::{Asked, PlannedPoint};
use crate::runs::End;
use crate::suites::{Point, Suite};

/// The form of the file.
const SCHEMA: &str = "polyhead.suite/1";

/// What a suite reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SuiteResult {
    /// "polyhead.suite/1".
    pub schema: String,
    /// The suite, with its version.
    pub suite: String,
    /// Where it was published.
    pub paper: String,
    /// Where its settings differ from what was published.
    pub differs: Vec<String>,
    /// What was changed of its points, as `key=value`; `model = FILE` for another model.
    pub changes: Vec<String>,
    /// Decides weights and rows.
    pub seed: u64,
    /// The mean over tasks of the mean over their settings, where every row has a score.
    pub mean: Option<f64>,
    /// A row for each task, setting and size of the model.
    pub rows: Vec<SuiteRow>,
    /// Where it ran; `None` where nothing has finished.
    pub environment: Option<Environment>,
}

/// The best of the cells of a setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SuiteRow {
    /// The task.
    pub task: String,
    /// What is varied in it.
    pub setting: String,
    /// The size of the model, where it is varied.
    pub size: String,
    /// What the score is: the measure of the last test set, or what is above chance of its accuracy.
    pub measure: String,
    /// That of the best cell; `None` where none has finished.
    pub score: Option<f64>,
    /// The best cell's name.
    pub best: Option<String>,
    /// All cells that have finished.
    pub cells: Vec<SuiteCell>,
    /// Cells that have not, and why.
    pub failed: Vec<String>,
}

/// A training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SuiteCell {
    /// Its optimiser settings.
    pub cell: String,
    /// A hash of the suite's recipe of it, without changes.
    pub recipe: String,
    /// A hash of its first rows to train and to test on.
    pub data: String,
    /// Of the last test set.
    pub score: f64,
    /// The score on each test set, with all measures.
    pub sets: Vec<SetScore>,
    /// Steps until its end.
    pub steps: u64,
    /// Weights.
    pub parameters: u64,
    /// Time of the training, in seconds.
    pub seconds: f64,
}

/// Puts together how the points ended.
///
/// # Errors
/// If rows cannot be made.
pub fn gather(asked: &Asked<'_>, points: &[PlannedPoint], ends: &[End]) -> Result<SuiteResult, Failure> {
    let suite = asked.suite;
    let mut rows: Vec<SuiteRow> = Vec::new();
    let mut environment = None;
    for (planned, end) in points.iter().zip(ends) {
        let Point { task, setting, size, cell, score, .. } = &planned.point;
        let same = |row: &SuiteRow| row.task == *task && row.setting == *setting && row.size == *size;
        let at = rows.iter().position(same).unwrap_or_else(|| {
            let (task, setting, size) = (task.clone(), setting.clone(), size.clone());
            let (measure, cells) = (score.name().to_owned(), Vec::new());
            rows.push(SuiteRow { task, setting, size, measure, score: None, best: None, cells, failed: Vec::new() });
            rows.len() - 1
        });
        match end {
            End::Finished(result) => {
                environment = Some(result.environment.clone());
                rows[at].cells.push(finished(planned, result)?);
            }
            End::Failed(problem) => rows[at].failed.push(format!("{cell}: {problem}")),
        }
    }
    for row in &mut rows {
        let best = row.cells.iter().max_by(|a, b| a.score.total_cmp(&b.score));
        (row.score, row.best) = (best.map(|best| best.score), best.map(|best| best.cell.clone()));
    }
    let model = asked.model.iter().map(|path| format!("model = {}", path.display()));
    let changes = model.chain(asked.overrides.iter().cloned()).collect();
    Ok(SuiteResult { mean: mean_of_tasks(&rows), rows, environment, ..SuiteResult::empty(suite, changes, asked.seed) })
}

fn finished(planned: &PlannedPoint, result: &RunResult) -> Result<SuiteCell, Failure> {
    let last = result.sets.last().ok_or_else(|| Failure::Run(format!("{}: no test set", planned.point.name())))?;
    Ok(SuiteCell {
        cell: planned.point.cell.clone(),
        recipe: result::id(&planned.point.recipe, None),
        data: data_hash(planned)?,
        score: planned.point.score.of(last),
        sets: result.sets.clone(),
        steps: result.steps,
        parameters: result.parameters,
        seconds: result.seconds,
    })
}

/// A hash of the first batch to train on and of the first of each test set.
///
/// # Errors
/// If rows cannot be made.
pub fn data_hash(planned: &PlannedPoint) -> Result<String, Failure> {
    let Opened { train, validation, .. } = open_tokens(&planned.resolved.recipe, None)?;
    let firsts = validation.parts().into_iter().map(|(_, range)| (&validation, range.start));
    let mut text = String::new();
    for (loader, position) in [(&train, 0)].into_iter().chain(firsts) {
        let batch = loader.batch(position)?;
        let _ = write!(text, "{:?} {:?} {};", batch.tokens, batch.targets, batch.seq);
    }
    Ok(result::id(&text, None))
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The mean over tasks of the mean over settings; `None` where one has no score.
pub fn mean_of_tasks(rows: &[SuiteRow]) -> Option<f64> {
    let mut tasks: Vec<&str> = rows.iter().map(|row| row.task.as_str()).collect();
    tasks.dedup();
    let of = |task: &&str| {
        let scores: Option<Vec<f64>> = rows.iter().filter(|row| row.task == **task).map(|row| row.score).collect();
        mean(&scores?)
    };
    mean(&tasks.iter().map(of).collect::<Option<Vec<f64>>>()?)
}

impl SuiteResult {
    /// That of a suite of which nothing has run yet.
    pub fn empty(suite: &Suite, changes: Vec<String>, seed: u64) -> Self {
        Self {
            schema: SCHEMA.into(),
            suite: suite.name.into(),
            paper: suite.paper.into(),
            differs: suite.differs.iter().map(|&words| words.to_owned()).collect(),
            changes,
            seed,
            mean: None,
            rows: Vec::new(),
            environment: None,
        }
    }

    /// Writes it into a folder, and its table for people.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn publish(&self, out: &Path) -> Result<(), Failure> {
        self.write(&out.join(files::RESULT))?;
        let about = format!("# {}\n\n{}\n\n{}", self.suite, self.paper, self.table());
        Ok(atomic_write(&out.join("result.md"), about.as_bytes())?)
    }

    /// Writes it.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(self).map_err(|error| Failure::Run(error.to_string()))?;
        Ok(atomic_write(path, format!("{text}\n").as_bytes())?)
    }

    /// Reads one.
    ///
    /// # Errors
    /// If it is missing, damaged, or of another form.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let bytes = std::fs::read(path).map_err(|error| Failure::file("read", path, error))?;
        let broken = |problem: String| Failure::Run(format!("{}: {problem}", path.display()));
        let result: Self = serde_json::from_slice(&bytes).map_err(|error| broken(error.to_string()))?;
        match result.schema == SCHEMA {
            true => Ok(result),
            false => Err(broken(format!("its schema is \"{}\", and \"{SCHEMA}\" is read here", result.schema))),
        }
    }

    /// How many cells have not finished.
    pub fn failed(&self) -> usize {
        self.rows.iter().map(|row| row.failed.len()).sum()
    }

    /// The best cell of each setting, as a table in Markdown.
    pub fn table(&self) -> String {
        let mut out =
            String::from("| task | measure | score, % | best of | accuracy per test set, % |\n|---|---|---|---|---|\n");
        for row in &self.rows {
            let name = [&row.task, &row.setting, &row.size].map(String::as_str);
            let name: Vec<&str> = name.into_iter().filter(|part| !part.is_empty()).collect();
            let best = row.cells.iter().find(|cell| Some(&cell.cell) == row.best.as_ref());
            let percent = |share: f64| format!("{:.1}", 100.0 * share);
            let sets = best.filter(|best| best.sets.len() > 1).map_or(String::new(), |best| {
                let of = |set: &SetScore| format!("{}: {}", set.name, percent(set.accuracy));
                best.sets.iter().map(of).collect::<Vec<_>>().join("; ")
            });
            let chosen = best.map_or(String::new(), |best| match row.cells.len() {
                1 => best.cell.clone(),
                cells => format!("{} (of {cells})", best.cell),
            });
            let score = row.score.map_or("–".into(), percent);
            let measure = row.measure.replace('_', " ");
            let _ = writeln!(out, "| {} | {measure} | {score} | {chosen} | {sets} |", name.join(", "));
        }
        if let Some(mean) = self.mean.filter(|_| self.rows.len() > 1) {
            let _ = writeln!(out, "| mean over tasks | | {:.1} | | |", 100.0 * mean);
        }
        out
    }
}

/// Where references are stored: in a folder of this name where the command is called.
pub const REFERENCES: &str = "recipes/results/suites";

/// Where references are read: there, or else those of the project.
pub fn references_folder() -> PathBuf {
    let here = PathBuf::from(REFERENCES);
    if here.is_dir() { here } else { project_root().join(REFERENCES) }
}

/// The stored references, by file; none where the folder is missing.
///
/// # Errors
/// If one cannot be read.
pub fn references() -> Result<Vec<(PathBuf, SuiteResult)>, Failure> {
    let folder = references_folder();
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(&folder).map_err(|error| Failure::file("read", &folder, error))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>, std::io::Error>>()?;
    paths.retain(|path| path.extension().is_some_and(|ending| ending == "json"));
    paths.sort();
    paths.into_iter().map(|path| Ok((path.clone(), SuiteResult::read(&path)?))).collect()
}

/// The schema of the file.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(SuiteResult).to_value()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use polyhead_models::weights::{FrozenDtype, NonFinite};
    use polyhead_runs::Caller;

    use super::super::plan::{SuitePlan, plan};
    use super::*;
    use crate::suites::SUITES;

    fn planned(suite: &'static Suite, seed: u64) -> SuitePlan {
        let caller = Caller {
            nonfinite: NonFinite::Refuse,
            frozen: FrozenDtype::F32,
            tell: |_| {},
            progress: |_, _, _| {},
            base: None,
            hub: |_| Ok(None),
            hub_cache: PathBuf::new,
        };
        let asked = Asked { suite, model: None, overrides: &[], only: &[], seed };
        plan(&asked, Path::new("nowhere"), caller).unwrap()
    }

    /// Such as that the shortest text of a task fits the length that is trained on.
    #[test]
    fn every_point_of_a_small_suite_can_make_its_rows() {
        for suite in SUITES.iter().filter(|suite| suite.name.ends_with("-small")) {
            for point in planned(suite, 0).points {
                if let Err(problem) = data_hash(&point) {
                    panic!("{}, {}: {problem}", suite.name, point.point.name());
                }
            }
        }
    }

    #[test]
    fn stored_references_are_of_todays_recipes_and_rows() {
        let stored = references().unwrap();
        if references_folder().exists() {
            let found: Vec<&str> = stored.iter().map(|(_, stored)| &*stored.suite).collect();
            let small: Vec<&str> =
                SUITES.iter().map(|suite| suite.name).filter(|name| name.ends_with("-small")).collect();
            assert_eq!(small.len(), 5);
            for name in small {
                assert!(found.contains(&name), "no reference of {name} is stored, but of {found:?}");
            }
        }
        for (path, stored) in stored {
            let planned = planned(Suite::find(&stored.suite).unwrap(), stored.seed);
            let cells: usize = stored.rows.iter().map(|row| row.cells.len()).sum();
            assert_eq!((cells, stored.failed()), (planned.points.len(), 0), "{}", path.display());
            for one in &planned.points {
                let Point { task, setting, size, cell, recipe, .. } = &one.point;
                let mut rows = stored.rows.iter();
                let row = rows.find(|row| (&row.task, &row.setting, &row.size) == (task, setting, size)).unwrap();
                let found = row.cells.iter().find(|found| found.cell == *cell).unwrap();
                let name = format!("{}, {}", path.display(), one.point.name());
                assert_eq!(found.recipe, result::id(recipe, None), "{name}: another recipe is another version");
                assert_eq!(found.data, data_hash(one).unwrap(), "{name}: other rows are another version");
            }
        }
    }

    #[test]
    fn means_are_over_tasks() {
        let row = |task: &str, score: Option<f64>| SuiteRow {
            task: task.into(),
            setting: String::new(),
            size: String::new(),
            measure: "accuracy".into(),
            score,
            best: None,
            cells: Vec::new(),
            failed: Vec::new(),
        };
        let rows = [row("a", Some(0.0)), row("a", Some(1.0)), row("b", Some(1.0))];
        assert_eq!(mean_of_tasks(&rows), Some(0.75));
        assert_eq!(mean_of_tasks(&[row("a", Some(0.0)), row("b", None)]), None);
    }
}
