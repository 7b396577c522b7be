//! Interventions in a file of their own.

use std::path::Path;

use polyhead_models::intervention::InterventionConfig;

use crate::layers::{Layer, at, read_as};
use crate::nearest::nearest_name;
use crate::problem::{Problem, Problems};
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
        let only = std::slice::from_ref(&layer);
        Problems::none(schema::unknown_keys_of(&root, only))?;
        let file = Self { config: read_as(layer.values().clone(), only)?, layer };
        file.config.validate(&nearest_name).map_err(|error| file.problem(&error.field, error.problem))?;
        Ok(file)
    }

    /// A problem about a key, pointed at where it stands.
    pub fn problem(&self, path: &str, message: impl Into<String>) -> Problem {
        at(std::slice::from_ref(&self.layer), path, message.into())
    }
}
