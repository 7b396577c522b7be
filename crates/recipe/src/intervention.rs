//! Interventions in a file of their own.

use std::path::Path;

use polyhead_models::intervention::InterventionConfig;

use crate::layers::{Layer, at};
use crate::nearest::nearest_name;
use crate::problem::{Problem, Problems, in_words};
use crate::{load, schema};

/// An intervention that was read, with where its keys stand.
pub struct InterventionFile {
    /// What it means.
    pub config: InterventionConfig,
    layer: Layer,
}

impl InterventionFile {
    /// Reads a file and checks what can be checked without a model.
    ///
    /// # Errors
    /// All problems of the first stage that has any: reading, unknown keys, types, rules.
    pub fn read(path: &Path) -> Result<Self, Problems> {
        if let Err(error) = std::fs::File::open(path) {
            return Err(Problems::plain(format!("intervention {}: {error}", path.display())));
        }
        let layer = load::read_layer(path)?;
        let root = schemars::schema_for!(InterventionConfig).to_value();
        let unknown = schema::unknown_keys_of(&root, std::slice::from_ref(&layer));
        if !unknown.is_empty() {
            return Err(Problems(unknown));
        }
        let config = serde_path_to_error::deserialize(toml::Value::Table(layer.values().clone()));
        let config: InterventionConfig = config.map_err(|error| {
            let path = error.path().to_string();
            Problems(vec![at(std::slice::from_ref(&layer), &path, in_words(&error.into_inner().to_string()))])
        })?;
        let file = Self { config, layer };
        file.config
            .validate(&nearest_name)
            .map_err(|error| Problems(vec![file.problem(&error.field, error.problem)]))?;
        Ok(file)
    }

    /// A problem about a key, pointed at where it stands.
    pub fn problem(&self, path: &str, message: impl Into<String>) -> Problem {
        at(std::slice::from_ref(&self.layer), path, message.into())
    }
}
