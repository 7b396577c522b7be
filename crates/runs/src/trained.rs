//! Trained decoders, from a folder that a person names.

use std::path::{Path, PathBuf};

use polyhead_data::{Opened, Tokenizer};
use polyhead_models::Decoder;
use polyhead_recipe::{Problems, Recipe, StatedIntervention};
use polyhead_training::run_folder::files::TOKENIZER;
use polyhead_training::state::read_progress;

use crate::Caller;
use crate::answer::Prompt;
use crate::data::open_tokens;
use crate::device;
use crate::error::Failure;
use crate::intervention::of_checkpoint;
use crate::pretrained::Pretrained;
use polyhead_training::run_folder::files::STATE;

/// A trained model with what belongs to it.
pub struct Trained {
    /// Its folder.
    pub path: PathBuf,
    /// The weights, on a plain device.
    pub model: Decoder,
    /// The model's intervention as it was written, where it has one.
    pub intervention: Option<StatedIntervention>,
    /// The recipe that trained it, if it is one of ours.
    pub recipe: Option<Recipe>,
    /// Its tokenizer, where it has one.
    pub tokenizer: Option<Tokenizer>,
    /// The longest sequence that it was made for.
    pub max_positions: usize,
    /// Tokens after which it has said what it has to say, where its folder names any besides its tokenizer.
    pub ends: Vec<u32>,
}

/// Loads a trained model to use, not to train, which predicts the next token from those before it.
///
/// # Errors
/// If it is missing, damaged, or does not fit together, or predicts masked tokens.
pub fn open_trained(path: &Path, device_name: Option<&str>, caller: Caller) -> Result<Trained, Failure> {
    let trained = open_decoder(path, device_name, caller)?;
    if trained.model.is_masked_diffusion() {
        let problem = "is a masked diffusion model, and this is about the next token: eval, generate and chat take it";
        return Err(Problems::plain(format!("{} {problem}", path.display())).into());
    }
    Ok(trained)
}

/// Loads a trained model to use, not to train, whether it predicts the next token or masked ones.
///
/// # Errors
/// If it is missing, damaged, or does not fit together.
pub fn open_decoder(path: &Path, device_name: Option<&str>, caller: Caller) -> Result<Trained, Failure> {
    let found = Pretrained::open(path, caller)?;
    let own = found.recipe.as_ref().map_or("flex", |recipe| recipe.training.device.as_str());
    let precision = found.recipe.as_ref().map(|recipe| recipe.training.precision).unwrap_or_default();
    let device = device::open_for(device_name.unwrap_or(own), precision).map_err(Failure::Run)?;
    let model = found.with_pairs(&device, caller)?.merged();
    let Pretrained { path, recipe, tokenizer, max_positions, ends, .. } = found;
    let mut model = model.with_precision(precision);
    if let Some(recipe) = recipe.as_ref().filter(|_| path.join(STATE).exists()) {
        let state = read_progress(&path)?.procedure;
        let gate = recipe.procedure.gate_at_eval(&state, &model)?;
        model = model.gated(gate);
    }
    let own = recipe.as_ref().map(|recipe| of_checkpoint(recipe, &path)).transpose()?.flatten();
    if let Some(own) = own.as_ref().filter(|_| model.intervention().is_none()) {
        model = own.apply(model, tokenizer.as_ref())?;
    }
    let intervention = own.map(|own| own.stated);
    Ok(Trained { path, model, intervention, recipe, tokenizer, max_positions, ends })
}

impl Trained {
    /// Its tokenizer, for what needs one.
    ///
    /// # Errors
    /// If it has none.
    pub fn text_tokenizer(&self) -> Result<&Tokenizer, Failure> {
        let path = self.path.display();
        let problem = || format!("{path} has no tokenizer: it learned generated data, or its {TOKENIZER} is missing");
        self.tokenizer.as_ref().ok_or_else(|| Failure::Run(problem()))
    }

    /// A prompt that also ends where the model's own folder says that texts end.
    pub fn ending(&self, prompt: Prompt) -> Prompt {
        prompt.ending_at(&self.ends)
    }

    /// The model without the mask that it is evaluated with and without its intervention, where it has one: what is made of it
    /// starts without, which is told.
    pub fn unmasked(mut self, caller: Caller) -> Self {
        self.model = self.model.without_boundaries();
        if self.model.intervention().is_some() {
            let path = self.path.display();
            (caller.tell)(&format!("warning: {path} is used with an intervention, which is not taken over"));
            self.model = self.model.intervened(None);
            self.intervention = None;
        }
        if let Some(gate) = self.model.gate() {
            let (path, layer) = (self.path.display(), gate.after_layer);
            (caller.tell)(&format!(
                "warning: {path} is evaluated with a mask behind layer {layer} (mask_at_eval), which is not taken over"
            ));
            self.model = self.model.gated(None);
        }
        self
    }

    /// The model without the guidance of its intervention, where it has some: what looks inside of a model looks at the one that is
    /// guided. That is told.
    pub fn unguided(self, caller: Caller) -> Self {
        if self.model.intervention().is_none_or(|own| own.guidance().is_none()) {
            return self;
        }
        let path = self.path.display();
        (caller.tell)(&format!("note: {path} is used with guidance, of which nothing is seen here"));
        let model = self.model.unguided();
        Self { model, ..self }
    }

    /// Opens the data that its recipe names.
    ///
    /// # Errors
    /// If it is missing or malformed, or the model came without a recipe.
    pub fn data(&self) -> Result<Opened, Failure> {
        let Some(recipe) = &self.recipe else {
            return Err(Failure::Run(format!(
                "{} says nothing about data: a recipe that names some, with model.pretrained = \"{0}\" and \
                 optimizer.adamw.lr = 0, evaluates it",
                self.path.display()
            )));
        };
        open_tokens(recipe, self.tokenizer.as_ref())
    }
}
