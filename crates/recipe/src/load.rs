//! From the text of a recipe to its settings.

use std::path::{Path, PathBuf};

use crate::intervention::StatedIntervention;
use crate::layers::{Layer, at, merge, parse_layer, parse_override, read_as, undecided};
use crate::nearest::{is_recipe, nearest, nearest_path, recipes_below};
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

/// What may have been meant by a recipe that is not there: one with such a name beside it, or below the folder `recipes`.
fn meant(path: &Path) -> String {
    let known = recipes_below(Path::new("recipes"));
    let stem = |path: &Path| path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let named = |name: &str| known.iter().find(|path| stem(path) == name).cloned();
    let alike = || named(&nearest(&stem(path), known.iter().map(|path| stem(path)))?);
    match named(&stem(path)).or_else(|| nearest_path(path, is_recipe)).or_else(alike) {
        Some(near) if !path.exists() => format!("did you mean {}?", near.display()),
        _ => "recipes are files that end in .toml; `polyhead ls` lists those at hand".to_owned(),
    }
}

/// The text of a recipe's file.
///
/// # Errors
/// If there is none, or it is no text, with the line where it is none.
pub fn read_file(path: &Path) -> Result<String, Problems> {
    let bytes = std::fs::read(path)
        .map_err(|error| Problems::plain(format!("recipe {}: {error}\n  hint: {}", path.display(), meant(path))))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let bytes = error.into_bytes();
        let text = String::from_utf8_lossy(&bytes[..at]).into_owned() + "\u{fffd}";
        let message = format!("byte {:#04x} is not valid UTF-8: recipes are UTF-8 text", bytes[at]);
        Problems(vec![Problem::in_text(&path.display().to_string(), &text, Some(at..at), message)])
    })
}

/// The file's layer.
///
/// # Errors
/// If it cannot be read or is no TOML.
pub fn read_layer(path: &Path) -> Result<Layer, Problems> {
    let text = read_file(path)?;
    Ok(parse_layer(&path.display().to_string(), &text)?)
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
