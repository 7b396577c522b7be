//! `[[task]]` in comparisons: the points of a suite as settings that every arm is trained at.

use std::collections::BTreeSet;
use std::path::Path;

use polyhead_recipe::layers::{self, Layer, parse_layer};
use polyhead_recipe::{self as recipe, Problems};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Suite;

/// A suite, or some points of it. Of points that differ in optimiser settings alone, the first is taken: `[sweep]` chooses
/// among others for every arm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// The suite's name, as `polyhead suite --list` shows it: "mqar-zoology-v1-small".
    pub suite: String,
    /// Only points whose names contain all of these words. Default: every point.
    #[serde(default)]
    pub only: Vec<String>,
}

/// A comparison's layer with a `[[setting]]` for each point of its tasks.
///
/// # Errors
/// If there are settings besides, a suite is not known, or no point is left.
pub fn expanded(path: &Path, layer: Layer) -> Result<Layer, Problems> {
    let refused = |key: &str, message: String| Problems(vec![layers::at(std::slice::from_ref(&layer), key, message)]);
    let Some(tasks) = layer.values().get("task") else { return Ok(layer) };
    let tasks: Vec<Task> = tasks
        .clone()
        .try_into()
        .map_err(|error: toml::de::Error| refused("task", format!("task: {}", error.message())))?;
    if layer.values().contains_key("setting") {
        return Err(refused("setting", "setting cannot stand beside task, whose points are settings: keep one".into()));
    }
    let mut settings = Vec::new();
    for (at, task) in tasks.iter().enumerate() {
        let suite =
            Suite::find(&task.suite).map_err(|problem| refused(&format!("task.{at}.suite"), problem.to_string()))?;
        if suite.questions.is_some() {
            let message =
                format!("{0} asks trained models: `polyhead suite {0} --model RUN` asks each run", task.suite);
            return Err(refused(&format!("task.{at}.suite"), message));
        }
        let found = settings_of(suite, &task.only)?;
        if found.is_empty() {
            let message = format!("no point of {} has \"{}\" in its name", task.suite, task.only.join("\" and \""));
            return Err(refused(&format!("task.{at}.only"), message));
        }
        settings.extend(found);
    }
    let all = toml::Table::from_iter([("setting".to_owned(), toml::Value::Array(settings))]);
    let text = format!("{}\n{all}", recipe::read_file(path)?);
    Ok(parse_layer(&path.display().to_string(), &text)?)
}

fn settings_of(suite: &Suite, only: &[String]) -> Result<Vec<toml::Value>, Problems> {
    let (mut settings, mut seen) = (Vec::new(), BTreeSet::new());
    for point in (suite.points)() {
        let name = point.without_cell();
        if only.iter().all(|words| point.name().contains(words.as_str())) && seen.insert(name.clone()) {
            let recipe = toml::Value::Table(point.layer()?.values().clone());
            let setting = [("name".to_owned(), name.into()), ("recipe".to_owned(), recipe)];
            settings.push(toml::Value::Table(toml::Table::from_iter(setting)));
        }
    }
    Ok(settings)
}
