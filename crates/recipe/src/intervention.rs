//! Interventions as they are written, in a file of their own or as a table of a recipe, with where their keys stand.

use std::path::{Path, PathBuf, absolute};

use polyhead_models::ConfigError;
use polyhead_models::intervention::InterventionConfig;

use crate::layers::{Layer, at, read_as, read_layer};
use crate::nearest::nearest_name;
use crate::problem::{Problem, Problems};
use crate::schema;
use crate::settings::Recipe;

/// The table of a recipe.
const TABLE: &str = "intervention";

/// An intervention as it was written, with where its keys stand.
#[derive(Clone)]
pub struct StatedIntervention {
    /// What it says; its file of tensors is where it was found.
    pub config: InterventionConfig,
    layers: Vec<Layer>,
    /// Whether it is a table of a recipe.
    in_recipe: bool,
}

impl StatedIntervention {
    /// Reads a file and checks what can be checked without a model.
    ///
    /// # Errors
    /// All problems of the first stage that has any: reading, unknown keys, types, rules.
    pub fn read(path: &Path) -> Result<Self, Problems> {
        if let Err(error) = std::fs::File::open(path) {
            return Err(Problems::plain(format!("intervention {}: {error}", path.display())));
        }
        let layers = vec![read_layer(path)?];
        let root = schemars::schema_for!(InterventionConfig).to_value();
        Problems::none(schema::unknown_keys_of(&root, &layers))?;
        let config = read_as(layers[0].values().clone(), &layers)?;
        let read = Self { config, layers, in_recipe: false };
        let trains = read.config.train.keys().next().map(|name| format!("train.{name}"));
        if let Some(key) = trains.or_else(|| read.config.file.is_some().then(|| "file".to_owned())) {
            let problem = format!("{key} is for recipes, where it is intervention.{key}: a file has edits and tensors");
            return Err(read.problem(&ConfigError::new(key, problem)).into());
        }
        read.config.validate(&nearest_name).map_err(|error| read.problem(&error))?;
        let tensors = read.config.tensors.as_deref().map(|tensors| beside(path, tensors));
        Ok(Self { config: InterventionConfig { tensors, ..read.config }, ..read })
    }

    /// That of a recipe, where there is one. A file that it names is read, and fills the table.
    ///
    /// # Errors
    /// If the file cannot be read or says something wrong.
    pub(crate) fn of(recipe: &mut Recipe, layers: &[Layer]) -> Result<Option<Self>, Problems> {
        let Some(config) = &mut recipe.intervention else { return Ok(None) };
        let Some(file) = config.file.take() else {
            config.tensors = config.tensors.take().map(|tensors| found(layers, "tensors", &tensors));
            return Ok(Some(Self { config: config.clone(), layers: layers.to_vec(), in_recipe: true }));
        };
        let here = |message: String| Problems(vec![at(layers, &format!("{TABLE}.file"), message)]);
        if *config != InterventionConfig::default() {
            let problem = "intervention.file brings edits and tensors: leave edits, tensors and train out, or file";
            return Err(here(problem.into()));
        }
        let file = found(layers, "file", &file);
        if let Err(error) = std::fs::File::open(&file) {
            return Err(here(format!("intervention.file: {}: {error}; it is found beside the recipe", file.display())));
        }
        let read = Self::read(&file)?;
        *config = read.config.clone();
        Ok(Some(read))
    }

    /// That of the recipe of a checkpoint, whose text is in `file`.
    pub fn of_checkpoint(recipe: &Recipe, file: &Path, text: &str) -> Option<Self> {
        let layers = crate::layers::parse_layer(&file.display().to_string(), text).into_iter().collect();
        recipe.intervention.clone().map(|config| Self { config, layers, in_recipe: true })
    }

    /// A problem about one of its keys, pointed at where it stands.
    pub fn problem(&self, error: &ConfigError) -> Problem {
        let table = if self.in_recipe { format!("{TABLE}.") } else { String::new() };
        at(&self.layers, &format!("{table}{}", error.field), error.problem.clone())
    }
}

/// A path that a file names, from the root on: it may be written into other files.
fn beside(file: &Path, named: &Path) -> PathBuf {
    let path = file.parent().unwrap_or(Path::new("")).join(named);
    absolute(&path).unwrap_or(path)
}

/// The same of a key of the table: beside the recipe that has it last; from the current folder where it was typed.
fn found(layers: &[Layer], key: &str, named: &Path) -> PathBuf {
    let has = |layer: &&Layer| layer.find(&[TABLE, key]).is_some_and(|(_, depth)| depth == 2);
    let file = layers.iter().rev().find(has).filter(|layer| layer.is_file());
    beside(file.map_or(Path::new(""), |layer| Path::new(&layer.name)), named)
}
