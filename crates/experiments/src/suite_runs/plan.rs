//! What a suite will run: its points as complete recipes.

use std::collections::BTreeSet;
use std::path::Path;

use polyhead_recipe::layers::{Layer, parse_layer};
use polyhead_recipe::{self as recipe, Problems, folder_name};
use polyhead_runs::costs::Totals;
use polyhead_runs::intervention::kept;
use polyhead_runs::{Caller, Failure, Resolved, resolve, result};

use crate::plan::Run;
use crate::suites::{Point, Suite};

/// What is asked of a suite.
pub struct Asked<'a> {
    /// Which.
    pub suite: &'static Suite,
    /// A recipe whose `[model]` takes the place of the published one.
    pub model: Option<&'a Path>,
    /// Changes to every point, as `key=value`.
    pub overrides: &'a [String],
    /// Only points whose names contain all of these words.
    pub only: &'a [String],
    /// Decides weights and rows.
    pub seed: u64,
}

/// A point, ready to run.
pub struct PlannedPoint {
    /// What it is.
    pub point: Point,
    /// Its whole recipe.
    pub resolved: Resolved,
    /// What its model costs.
    pub totals: Totals,
}

/// Every point that is asked for, and its run, in the same order.
pub struct SuitePlan {
    /// The points.
    pub points: Vec<PlannedPoint>,
    /// Their runs.
    pub runs: Vec<Run>,
}

/// Plans a suite that is written to `out`. Nothing is trained.
///
/// # Errors
/// If no point is left, or a change makes a point a recipe that cannot run.
pub fn plan(asked: &Asked<'_>, out: &Path, caller: Caller) -> Result<SuitePlan, Failure> {
    let all = points(asked)?;
    if all.is_empty() {
        let names: Vec<String> = (asked.suite.points)().iter().map(Point::name).take(8).collect();
        let (suite, only) = (asked.suite.name, asked.only.join(" "));
        let problem = format!(
            "no point of {suite} has \"{only}\" in its name\n  hint: they are called {}; --dry-run lists all",
            names.join("; ")
        );
        return Err(Problems::plain(problem).into());
    }
    let (mut points, mut runs) = (Vec::new(), Vec::new());
    for (point, layer) in all {
        let mut layers = vec![layer];
        layers.extend(model_layer(asked.model)?);
        layers.extend(recipe::override_layers(asked.overrides)?);
        layers.push(parse_layer("--seed", &format!("debug.seed = {}", asked.seed))?);
        let loaded = recipe::from_layers(layers)
            .map_err(|problems| problems.about(&format!("{}, {}", asked.suite.name, point.name())))?;
        let resolved = resolve::resolve(&loaded, caller)?;
        let (text, known) = (recipe::resolved(&resolved.recipe)?, resolved.known()?);
        // Of generated rows the recipe says all, unless they have a background.
        let data = &resolved.recipe.data;
        let whole = data.is_generated() && data.source().paths().is_empty();
        let hash = if whole { None } else { resolved.text_hash()? };
        let id = result::id(&recipe::resolved(&kept(&resolved.recipe))?, hash.as_deref());
        let folder = out.join("runs").join(format!("{}-{}", folder_name(&point.name()), &id[..8]));
        let (seed, steps) = (asked.seed, resolved.recipe.training.steps);
        runs.push(Run { arm: points.len(), choice: 0, seed, trial: false, id, folder, text, steps });
        let totals = Totals::of_recipe(&resolved.recipe, known);
        points.push(PlannedPoint { point, resolved, totals });
    }
    Ok(SuitePlan { points, runs })
}

/// The points that are asked for, each with its layer. With another model, those that differ in the size of the published one
/// alone are one point.
fn points(asked: &Asked<'_>) -> Result<Vec<(Point, Layer)>, Problems> {
    let wanted = |point: &Point| asked.only.iter().all(|words| point.name().contains(words.as_str()));
    let (mut points, mut seen) = (Vec::new(), BTreeSet::new());
    for mut point in (asked.suite.points)() {
        if asked.model.is_some() {
            let mut table = point.layer()?.values().clone();
            table.remove("model");
            point.recipe = table.to_string();
            point.size = String::new();
        }
        if wanted(&point) && seen.insert(point.name()) {
            let layer = point.layer()?;
            points.push((point, layer));
        }
    }
    Ok(points)
}

/// The `[model]` of a recipe.
fn model_layer(path: Option<&Path>) -> Result<Option<Layer>, Problems> {
    let Some(path) = path else { return Ok(None) };
    let table = recipe::layers::merge(&recipe::read_layers(path, &[])?);
    let model = table
        .get("model")
        .cloned()
        .ok_or_else(|| Problems::plain(format!("--model {}: the recipe has no [model]", path.display())))?;
    let only = toml::Table::from_iter([("model".to_owned(), model)]);
    Ok(Some(parse_layer(&path.display().to_string(), &only.to_string())?))
}
