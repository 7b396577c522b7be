//! Interventions in a trained model, from a file.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use polyhead_data::Tokenizer;
use polyhead_models::Decoder;
use polyhead_models::intervention::{Context, Decode, Intervention, InterventionConfig};
use polyhead_models::weights::{Named, from_safetensors};
use polyhead_recipe::{InterventionFile, Problems, Recipe};

use crate::{Failure, Trained};

impl Trained {
    /// The model under the intervention of a file, where one is named.
    ///
    /// # Errors
    /// If the file cannot be read, or says something that the model does not have; with its place.
    pub fn intervened(self, path: Option<&Path>) -> Result<Self, Failure> {
        let Some(path) = path else { return Ok(self) };
        let file = InterventionFile::read(path)?;
        let tensors = tensors(&file.config, path.parent().unwrap_or(Path::new("")))?;
        let intervention = Intervention::new(&file.config, &tensors, &self.model, decode(self.tokenizer.as_ref()))
            .map_err(|error| Problems(vec![file.problem(&error.field, error.problem)]))?;
        Ok(Self { model: self.model.intervened(Some(intervention)), ..self })
    }
}

/// The model under the intervention of its recipe, where there is one.
///
/// # Errors
/// If its tensors cannot be read, or it says something that the model does not have.
pub fn of_recipe(recipe: &Recipe, model: Decoder, tokenizer: Option<&Tokenizer>) -> Result<Decoder, Failure> {
    let Some(config) = &recipe.intervention else { return Ok(model) };
    let tensors = tensors(config, Path::new(""))?;
    let intervention = Intervention::new(config, &tensors, &model, decode(tokenizer)).map_err(|error| {
        let error = error.within("intervention");
        Problems::plain(format!("{}: {}", error.field, error.problem))
    })?;
    Ok(model.intervened(Some(intervention)))
}

/// The tensors of the file that an intervention names, beside `folder`.
fn tensors(config: &InterventionConfig, folder: &Path) -> Result<BTreeMap<String, Named>, Failure> {
    let Some(file) = &config.tensors else { return Ok(BTreeMap::new()) };
    let file = folder.join(file);
    let bytes = std::fs::read(&file).map_err(|error| Failure::file("read", &file, error))?;
    from_safetensors(&bytes).map_err(|error| Failure::Run(format!("{}: {error}", file.display())))
}

fn decode(tokenizer: Option<&Tokenizer>) -> Option<Decode> {
    tokenizer.cloned().map(|own| -> Decode { Arc::new(move |ids: &[u32]| own.decode(ids)) })
}

/// Refuses an intervention that depends on whose tokens are whose, where nobody says so.
///
/// # Errors
/// Names the span and the way out.
pub fn check_roles(model: &Decoder, stated: bool) -> Result<(), Failure> {
    let named = model.intervention().and_then(Intervention::needs_roles).filter(|_| !stated);
    let Some(span) = named else { return Ok(()) };
    let span = serde_json::to_string(&span).unwrap_or_default();
    let problem = format!(
        "the intervention names the span {span}, and nobody says whose tokens are whose here\n  hint: conversations do (a model \
         fine-tuned on them, generate --chat); a range or a text needs no roles"
    );
    Err(Problems::plain(problem).into())
}

/// Refuses tokens in which the model's intervention finds none of what it is to change: a text that is nowhere, or roles that
/// nobody states.
///
/// # Errors
/// Names the span and the way out.
pub fn check_spans(model: &Decoder, context: &Context<'_>) -> Result<(), Failure> {
    check_roles(model, !context.roles.is_empty())?;
    let Some(intervention) = model.intervention() else { return Ok(()) };
    let told = intervention.check_tokens(context);
    told.map_err(|error| Problems::plain(format!("the intervention, {}: {}", error.field, error.problem)).into())
}
