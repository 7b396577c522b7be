//! From the text of a recipe to its settings.

use std::path::{Path, PathBuf};

use crate::intervention::StatedIntervention;
use crate::layers::{Layer, at, merge, parse_override, read_as, read_layer, undecided};
use crate::problem::{Problem, Problems};
use crate::settings::Recipe;
use crate::{device_name, rules, schema};

/// A recipe with where its keys stand.
pub struct Loaded {
    /// What it means.
    pub recipe: Recipe,
    /// Its intervention, where it has one, which may be in a file of its own.
    pub intervention: Option<StatedIntervention>,
    layers: Vec<Layer>,
}

impl Loaded {
    /// A problem about a key, pointed at where it stands.
    pub fn problem(&self, path: &str, message: impl Into<String>) -> Problem {
        at(&self.layers, path, message.into())
    }
}

/// Reads a recipe with overrides and checks everything.
///
/// # Errors
/// All problems of the first stage that has any: reading, unknown keys, types, rules.
pub fn load(path: &Path, overrides: &[String]) -> Result<Loaded, Problems> {
    from_layers(read_layers(path, overrides)?)
}

/// What layers of keys mean together, later ones over earlier ones.
///
/// # Errors
/// As for [`load`].
pub fn from_layers(layers: Vec<Layer>) -> Result<Loaded, Problems> {
    Problems::none(schema::unknown_keys(&layers))?;
    let merged = merge(&layers);
    let undecided = undecided(&merged);
    if !undecided.is_empty() {
        let told = undecided.into_iter().map(|(path, names)| {
            let last = names.last().map_or("", String::as_str);
            let message = format!("{path} takes one table, and {} are there: keep one of them", names.join(" and "));
            at(&layers, &format!("{path}.{last}"), message)
        });
        return Err(Problems(told.collect()));
    }
    let mut recipe: Recipe = read_as(merged, &layers)?;
    if recipe.model.pretrained().is_none() {
        recipe.tokenizer.get_or_insert_default();
    }
    recipe.training.device = device_name(&recipe.training.device).to_owned();
    let intervention = StatedIntervention::of(&mut recipe, &layers)?;
    let loaded = Loaded { recipe, intervention, layers };
    let told = rules::validate(&loaded.recipe).into_iter();
    Problems::none(told.map(|error| loaded.problem(&error.field, error.problem)).collect())?;
    Ok(loaded)
}

/// The resolved recipe as TOML: every key with its value.
///
/// # Errors
/// If a value has no TOML form, which would be our mistake.
pub fn resolved(recipe: &Recipe) -> Result<String, Problems> {
    toml::to_string_pretty(recipe).map_err(|error| Problems::plain(format!("the recipe cannot be written: {error}")))
}

/// The layers of a recipe: what it extends, the file, the overrides.
///
/// # Errors
/// If a file cannot be read, is no TOML, or is no recipe.
pub fn read_layers(path: &Path, overrides: &[String]) -> Result<Vec<Layer>, Problems> {
    let file = read_layer(path)?;
    for (key, what, hint) in [
        ("arm", "a comparison of several runs", "`polyhead compare` runs it, with --dry-run it shows its plan"),
        ("stage", "a run in stages", "train, plan, validate and cat take it"),
    ] {
        if file.values().contains_key(key) {
            let problem = format!("{} is {what}, not one recipe", path.display());
            return Err(Problems(vec![at(&[file], key, problem).hint(Some(hint.into()))]));
        }
    }
    let mut layers = with_base(path, file)?;
    layers.extend(override_layers(overrides)?);
    Ok(layers)
}

/// A file's layer, and below it that of the recipe that it extends.
///
/// # Errors
/// If that cannot be read, is no TOML, or extends another one itself.
pub fn with_base(path: &Path, mut file: Layer) -> Result<Vec<Layer>, Problems> {
    let Some(base) = file.take_extends()? else { return Ok(vec![file]) };
    let base_path = path.parent().unwrap_or(Path::new("")).join(PathBuf::from(base));
    let here = |problem: String| Problems(vec![at(std::slice::from_ref(&file), "extends", problem)]);
    if let Err(error) = std::fs::File::open(&base_path) {
        return Err(here(format!("extends: recipe {}: {error}", base_path.display())));
    }
    let mut base = read_layer(&base_path)?;
    if base.take_extends()?.is_some() {
        return Err(here(format!("{} extends another recipe itself; one level is allowed", base_path.display())));
    }
    Ok(vec![base, file])
}

/// `key=value` from the command line, a layer each.
///
/// # Errors
/// If one is no override.
pub fn override_layers(overrides: &[String]) -> Result<Vec<Layer>, Problems> {
    Ok(overrides.iter().map(|text| parse_override(text)).collect::<Result<_, _>>()?)
}
