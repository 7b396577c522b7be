//! Recipe to parts: data, model, device.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use polyhead_data::chat::ChatConfig;
use polyhead_data::{DataConfig, HuggingfaceTokenizer, Tokenizer, TokenizerConfig};
use polyhead_models::mup::Scalings;
use polyhead_models::weights::FrozenDtype;
use polyhead_models::{Decoder, DecoderConfig};
use polyhead_recipe::{self as recipe, Loaded, ModelConfig, Problems, Recipe};
use polyhead_training::ProcedureConfig;
use polyhead_training::optimizer::Optimizer;
use polyhead_training::run_folder::{atomic_write, files};
use polyhead_training::state::{self, Companions, Progress, Saving};

use crate::Caller;
use crate::base::Base;
use crate::device;
use crate::error::Failure;
use crate::intervention::{ReadIntervention, kept};
use crate::pretrained::{Pretrained, find_checkpoint, recipe_of, tokenizer_of, vocab_of};

/// A recipe as it is run: everything about its model is at hand.
pub struct Resolved {
    /// The recipe, `model.decoder` (or `model.classifier`) and `tokenizer` filled in.
    pub recipe: Recipe,
    pub(crate) tokenizer: Tokenizer,
    /// Where the first weights come from; `None` makes fresh ones.
    pub(crate) pretrained: Option<Pretrained>,
    /// The recipe's intervention, with its tensors.
    pub intervention: Option<ReadIntervention>,
    /// Ids that the weights know, where there are weights already: it may be more than the data has.
    pub(crate) vocab_size: Option<usize>,
    /// A token that the tokenizer has and the weights do not know yet.
    pub(crate) new_token: Option<u32>,
    /// What the caller allows.
    pub(crate) caller: Caller,
}

impl Resolved {
    /// The base model of a run that saves only what is beside the weights; `None` where these are saved, because they are
    /// trained, or there is no model to come back to.
    ///
    /// # Errors
    /// If its weights cannot be read.
    pub fn base(&self, run_dir: &Path) -> Result<Option<Base>, Failure> {
        match (&self.pretrained, self.recipe.model.pretrained()) {
            (Some(found), Some(named)) if self.saves_adapter_only() => {
                Base::of(&found.path, found.weights_hash()?, named, run_dir).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// The type in which the weights of `model.pretrained` are kept: f32 where any of them is trained.
    pub(crate) fn frozen(&self) -> FrozenDtype {
        if self.saves_adapter_only() { self.recipe.model.pretrained_dtype() } else { FrozenDtype::F32 }
    }

    /// Whether low-rank pairs or tensors of the intervention are saved alone.
    pub fn saves_adapter_only(&self) -> bool {
        self.pretrained.is_some() && self.recipe.keeps_weights()
    }
}

/// The recipe of a new run.
///
/// # Errors
/// If what it names is not there, or contradicts what it says itself.
pub fn resolve(loaded: &Loaded, caller: Caller) -> Result<Resolved, Failure> {
    let mut recipe = loaded.recipe.clone();
    let intervention = loaded.intervention.clone().map(ReadIntervention::open).transpose()?;
    if let (ModelConfig::Classifier { pretrained: Some(path), .. }, None) = (&recipe.model, &recipe.tokenizer) {
        let file = find_checkpoint(path, caller)?.join(files::TOKENIZER);
        let its_own = match file.exists() {
            true => TokenizerConfig::Huggingface(HuggingfaceTokenizer { path: file }),
            false => TokenizerConfig::default(),
        };
        recipe.tokenizer = Some(its_own);
    }
    let rope_scaling = recipe.model.rope_scaling();
    let ModelConfig::Decoder { pretrained: Some(path), config, .. } = &mut recipe.model else {
        let (tokenizer, _) = with_indicator(&recipe, open_tokenizer(&recipe, caller)?)?;
        return Ok(Resolved {
            recipe,
            tokenizer,
            pretrained: None,
            intervention,
            vocab_size: None,
            new_token: None,
            caller,
        });
    };
    let path = &path.clone();
    let found = Pretrained::open(path, caller)?;
    let described = match rope_scaling {
        Some(_) => DecoderConfig { rope_scaling, ..found.decoder.clone() },
        None => found.decoder.clone(),
    };
    if let Some(stated) = config.replace(described.clone())
        && stated != described
    {
        let changed = recipe::differences_of(&described, &stated).join("\n  ");
        let problem = format!("model.decoder does not describe the weights of {}:\n  {changed}", path.display());
        let hint = "leave model.decoder out (the folder tells), or model.pretrained (for fresh weights)";
        return Err(loaded.problem("model.decoder", problem).hint(Some(hint.into())).into());
    }
    let tokenizer = match (&recipe.tokenizer, &found.tokenizer) {
        (Some(_), theirs) => {
            let ours = open_tokenizer(&recipe, caller)?;
            if theirs.as_ref().is_some_and(|theirs| theirs.fingerprint() != ours.fingerprint()) {
                let problem = format!("tokenizer is not the one that {} learned with", path.display());
                let hint = "leave [tokenizer] out: the folder's own is used";
                return Err(loaded.problem("tokenizer", problem).hint(Some(hint.into())).into());
            }
            ours
        }
        (None, Some(theirs)) => theirs.clone(),
        (None, None) if recipe.data.is_text() => {
            let problem = format!("{} has no tokenizer, and the recipe names none", path.display());
            let hint = format!("put its {} there, or name it: tokenizer.huggingface.path=...", files::TOKENIZER);
            return Err(loaded.problem("model.pretrained", problem).hint(Some(hint)).into());
        }
        (None, None) => Tokenizer::bytes(),
    };
    recipe.tokenizer.get_or_insert_with(|| found.tokenizer_config());
    let (tokenizer, new_token) = with_indicator(&recipe, tokenizer)?;
    let vocab_size = Some(new_token.map_or(found.vocab_size, |id| found.vocab_size.max(id as usize + 1)));
    Ok(Resolved { recipe, tokenizer, pretrained: Some(found), intervention, vocab_size, new_token, caller })
}

/// The recipe of a run that goes on. Its checkpoint holds all there is to know of the model: a folder that the run once
/// started from is asked again only where the checkpoint has low-rank pairs alone.
///
/// # Errors
/// If the recipe describes another run, the checkpoint is damaged, or its base model is not there.
pub fn resume(loaded: &Loaded, checkpoint: &Path, caller: Caller) -> Result<Resolved, Failure> {
    let (before, mut recipe) = (recipe_of(checkpoint)?, loaded.recipe.clone());
    if let ModelConfig::Decoder { pretrained: Some(now), config, .. } = &mut recipe.model {
        if let Some(before) = before.model.pretrained().filter(|before| same_place(before, now, checkpoint)) {
            *now = before.to_owned();
        }
        *config = config.take().or_else(|| before.model.decoder().cloned());
    }
    if recipe.model.pretrained().is_some() {
        recipe.tokenizer = recipe.tokenizer.or_else(|| before.tokenizer.clone());
    }
    let changed = recipe::differences(&kept(&before), &kept(&recipe));
    if !changed.is_empty() {
        let problem = format!(
            "the recipe differs from the one in {}:\n  {}\n  hint: these decide what the run is; start another one with \
             --out, or put them back. {} may change (docs: Runs)",
            checkpoint.display(),
            changed.join("\n  "),
            recipe::MAY_CHANGE.join(", ")
        );
        return Err(Problems::plain(problem).into());
    }
    let stated = loaded.intervention.clone();
    let intervention = stated.map(|stated| ReadIntervention::resumed(stated, checkpoint)).transpose()?;
    let tokenizer = tokenizer_of(checkpoint)?.unwrap_or_else(Tokenizer::bytes);
    let pretrained = Pretrained::base_of(checkpoint, caller)?;
    let vocab_size = match &pretrained {
        Some(base) => Some(base.vocab_size),
        None => recipe.model.decoder().map(|decoder| vocab_of(checkpoint, decoder)).transpose()?,
    };
    Ok(Resolved { recipe, tokenizer, pretrained, intervention, vocab_size, new_token: None, caller })
}

/// The tokenizer with the token of `data.chat.indicator`, and its id where it is new.
fn with_indicator(recipe: &Recipe, tokenizer: Tokenizer) -> Result<(Tokenizer, Option<u32>), Failure> {
    match &recipe.data {
        DataConfig::Chat(ChatConfig { indicator: Some(indicator), .. }) => Ok(tokenizer.with_token(&indicator.token)?),
        _ => Ok((tokenizer, None)),
    }
}

/// Whether both paths mean the same model: by another spelling, or as the stage before this one in a folder that has moved.
fn same_place(before: &Path, now: &Path, checkpoint: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().ok();
    if before == now || real(before).is_some_and(|before| Some(before) == real(now)) {
        return true;
    }
    let beside = |path: &Path| real(path).and_then(|path| Some(path.parent()?.to_owned()));
    let stages = checkpoint.parent().and_then(beside).filter(|folder| folder.join(files::STAGES).exists());
    stages.is_some() && stages == beside(now) && before.file_name() == now.file_name()
}

/// The tokenizer that a recipe names. Generated data needs none, and none is opened for it.
fn open_tokenizer(recipe: &Recipe, caller: Caller) -> Result<Tokenizer, Failure> {
    match &recipe.tokenizer {
        Some(named) if recipe.data.is_text() => {
            let tokenizer = Tokenizer::open(named)?;
            tokenizer.notes().iter().for_each(|note| (caller.tell)(&format!("note: tokenizer: {note}")));
            Ok(tokenizer)
        }
        _ => Ok(Tokenizer::bytes()),
    }
}

/// The device of a recipe, for training; of the rank of this number on its machine, where there are several.
///
/// # Errors
/// If it is not compiled in or not there, or does not compute in the recipe's precision.
pub fn training_device(recipe: &Recipe, rank: Option<usize>) -> Result<Device, Failure> {
    Ok(device::open_for_training(&recipe.training, rank).map_err(Failure::Run)?.autodiff())
}

/// What a recipe multiplies the initial weights and the learning rates of its model by.
pub fn scalings(recipe: &Recipe, model: &Decoder) -> Scalings {
    recipe.model.mup().map_or_else(Scalings::default, |mup| Scalings::of(model, mup))
}

/// Writes a model that was made of another one as step 0 of a run of `recipe`: plain training with a fresh optimiser. Gives
/// the checkpoint.
///
/// # Errors
/// If the folder cannot be written.
pub fn begin_run(
    run_dir: &Path,
    model: &Decoder,
    recipe: Recipe,
    mut companions: Companions,
    caller: Caller,
) -> Result<PathBuf, Failure> {
    let recipe = Recipe {
        model: ModelConfig::decoder_of(model.config().clone()),
        procedure: ProcedureConfig::default(),
        lora: None,
        intervention: None,
        ..recipe
    };
    let text = recipe::resolved(&recipe)?;
    companions.push((files::RECIPE.into(), text.clone().into_bytes()));
    std::fs::create_dir_all(run_dir).map_err(|error| Failure::file("create", run_dir, error))?;
    let saving = Saving {
        model,
        progress: &Progress::default(),
        companions: &companions,
        validation_loss: None,
        best: None,
        adapter_only: false,
        nonfinite: caller.nonfinite,
    };
    let checkpoint = state::save(run_dir, &saving, &Optimizer::new(recipe.optimizer.clone()).tensors())?;
    atomic_write(&run_dir.join(files::RECIPE), text.as_bytes())?;
    Ok(checkpoint)
}
