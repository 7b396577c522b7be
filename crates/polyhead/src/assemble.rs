//! Recipe to parts: data, model, device. And checkpoints back to the same.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use polyhead_data::{Labelled, Opened, Paired, Tokenizer};
use polyhead_kernels::seed_random;
use polyhead_models::adapters::LoraConfig;
use polyhead_models::{Classifier, ClassifierConfig, Decoder, Embedder, EmbedderConfig, train_only};
use polyhead_training::optimizer::Optimizer;
use polyhead_training::run_folder::atomic_write;
use polyhead_training::state::{self, Companions, Progress, Saving};
use polyhead_training::{Parts, ProcedureConfig, Trainee};

use crate::allowed::allowed;
use crate::classifier::sizes;
use crate::console::talk;
use crate::costs::Known;
use crate::device;
use crate::embedder::{layers_and_dim, paired};
use crate::pretrained::{Pretrained, recipe_of, tokenizer_of, vocab_of};
use crate::recipe::{self, Loaded, ModelConfig, Recipe};
use crate::report::{Failure, Problems};
use crate::stages;

mod data;
mod trained;
pub use data::{
    RECORD, Source, changed_text, check_targets, data, data_record, known, labelled, options, project_root, record,
    record_of, world,
};
pub use polyhead_data::Data;
pub use trained::{Trained, open_trained};

/// A recipe as it is run: everything about its model is at hand.
pub struct Resolved {
    /// The recipe, `model.decoder` (or `model.classifier`) and `tokenizer` filled in.
    pub recipe: Recipe,
    tokenizer: Tokenizer,
    /// Where the first weights come from; `None` makes fresh ones.
    pretrained: Option<Pretrained>,
    /// Ids that the weights know, where there are weights already: it may be more than the data has.
    vocab_size: Option<usize>,
}

/// The recipe of a new run.
///
/// # Errors
/// If what it names is not there, or contradicts what it says itself.
pub fn resolve(loaded: &Loaded) -> Result<Resolved, Failure> {
    let mut recipe = loaded.recipe.clone();
    let Some(path) = &recipe.model.pretrained else {
        let tokenizer = open_tokenizer(&recipe)?;
        return Ok(Resolved { recipe, tokenizer, pretrained: None, vocab_size: None });
    };
    let found = Pretrained::open(path)?;
    found.check_length(recipe.training.seq_len, "training.seq_len")?;
    if let Some(stated) = recipe.model.decoder.replace(found.decoder.clone())
        && stated != found.decoder
    {
        let changed = recipe::differences_of(&found.decoder, &stated).join("\n  ");
        let problem = format!("model.decoder does not describe the weights of {}:\n  {changed}", path.display());
        let hint = "leave model.decoder out (the folder tells), or model.pretrained (for fresh weights)";
        return Err(loaded.problem("model.decoder", problem).hint(Some(hint.into())).into());
    }
    let tokenizer = match (&recipe.tokenizer, &found.tokenizer) {
        (Some(_), theirs) => {
            let ours = open_tokenizer(&recipe)?;
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
            let hint = "put its tokenizer.json there, or name it: tokenizer.huggingface.path=...";
            return Err(loaded.problem("model.pretrained", problem).hint(Some(hint.into())).into());
        }
        (None, None) => Tokenizer::bytes(),
    };
    recipe.tokenizer.get_or_insert_with(|| found.tokenizer_config());
    let vocab_size = Some(found.vocab_size);
    Ok(Resolved { recipe, tokenizer, pretrained: Some(found), vocab_size })
}

/// The recipe of a run that goes on. Its checkpoint holds all there is to know of the model: a folder that the run once
/// started from is not asked again.
///
/// # Errors
/// If the recipe describes another run, or the checkpoint is damaged.
pub fn resume(loaded: &Loaded, checkpoint: &Path) -> Result<Resolved, Failure> {
    let (before, mut recipe) = (recipe_of(checkpoint)?, loaded.recipe.clone());
    if let Some(now) = &recipe.model.pretrained {
        if before.model.pretrained.as_ref().is_some_and(|before| same_place(before, now, checkpoint)) {
            recipe.model.pretrained = before.model.pretrained.clone();
        }
        recipe.model.decoder = recipe.model.decoder.or_else(|| before.model.decoder.clone());
        recipe.tokenizer = recipe.tokenizer.or_else(|| before.tokenizer.clone());
    }
    let changed = recipe::differences(&before, &recipe);
    if !changed.is_empty() {
        let problem = format!(
            "the recipe differs from the one in {}:\n  {}\n  hint: these decide what the run is; start another one with \
             --out, or put them back. {} may change",
            checkpoint.display(),
            changed.join("\n  "),
            recipe::MAY_CHANGE.join(", ")
        );
        return Err(Problems::plain(problem).into());
    }
    let tokenizer = tokenizer_of(checkpoint)?.unwrap_or_else(Tokenizer::bytes);
    let is_decoder = recipe.model.classifier.is_none() && recipe.model.embedder.is_none();
    let vocab_size = is_decoder.then(|| vocab_of(checkpoint)).transpose()?;
    Ok(Resolved { recipe, tokenizer, pretrained: None, vocab_size })
}

/// Whether both paths mean the same model: by another spelling, or as the stage before this one in a folder that has moved.
fn same_place(before: &Path, now: &Path, checkpoint: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().ok();
    if before == now || real(before).is_some_and(|before| Some(before) == real(now)) {
        return true;
    }
    let beside = |path: &Path| real(path).and_then(|path| Some(path.parent()?.to_owned()));
    let stages = checkpoint.parent().and_then(beside).filter(|folder| folder.join(stages::RECORD).exists());
    stages.is_some() && stages == beside(now) && before.file_name() == now.file_name()
}

/// The tokenizer that a recipe names. Generated data needs none, and none is opened for it.
fn open_tokenizer(recipe: &Recipe) -> Result<Tokenizer, Failure> {
    match &recipe.tokenizer {
        Some(named) if recipe.data.is_text() => {
            let tokenizer = Tokenizer::open(named)?;
            tokenizer.notes().iter().for_each(|note| talk!("note: tokenizer: {note}"));
            Ok(tokenizer)
        }
        _ => Ok(Tokenizer::bytes()),
    }
}

impl Resolved {
    /// What the data tells about the size of the model: of tokens without reading them.
    ///
    /// # Errors
    /// If examples are missing or malformed.
    pub fn known(&self) -> Result<Known, Failure> {
        if self.recipe.model.embedder.is_some() {
            return Ok(Known::Pairs(layers_and_dim(&self.paired()?)));
        }
        match &self.recipe.model.classifier {
            None => {
                let of_data = || self.recipe.data.vocab_size(&self.tokenizer);
                Ok(Known::Ids(self.vocab_size.unwrap_or_else(of_data)))
            }
            Some(_) => Ok(Known::Examples(sizes(&self.labelled()?))),
        }
    }

    /// Opens the data.
    ///
    /// # Errors
    /// If it is missing or malformed, or does not fit the model.
    pub fn open(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Data, Failure> {
        if self.recipe.model.embedder.is_some() {
            return Ok(Data::Pairs(Box::new(self.paired()?)));
        }
        match &self.recipe.model.classifier {
            None => Ok(Data::Tokens(Box::new(self.data(progress)?))),
            Some(_) => Ok(Data::Examples(Box::new(self.labelled()?))),
        }
    }

    /// Opens the pairs that an embedder learns.
    ///
    /// # Errors
    /// If they are missing or malformed, or do not fit the model.
    pub fn paired(&self) -> Result<Paired, Failure> {
        let paired = paired(&self.recipe)?;
        let [_, dim] = layers_and_dim(&paired);
        let checked = self.embedder()?.validate(Some(dim));
        checked.map_err(|error| Problems::plain(format!("model.embedder.{error}")))?;
        Ok(paired)
    }

    fn embedder(&self) -> Result<&EmbedderConfig, Failure> {
        let missing = || Problems::plain("model.embedder is missing".into());
        Ok(self.recipe.model.embedder.as_ref().ok_or_else(missing)?)
    }

    /// The embedder before the first step; what the recipe freezes does not learn.
    ///
    /// # Errors
    /// If what is to be frozen does not exist.
    pub fn first_embedder(&self, paired: &Paired, device: &Device) -> Result<Embedder, Failure> {
        seed_random(self.recipe.debug.seed);
        let [layers, dim] = layers_and_dim(paired);
        Ok(self.recipe.freeze.apply(self.embedder()?.init(layers, dim, device))?)
    }

    /// Opens the examples that a classifier learns.
    ///
    /// # Errors
    /// If they are missing or malformed, or do not fit the model.
    pub fn labelled(&self) -> Result<Labelled, Failure> {
        let labelled = labelled(&self.recipe, &self.tokenizer)?;
        refuse_one_class(&labelled, self.recipe.data.name())?;
        let untrained = labelled.classes.iter().zip(&labelled.counts).filter(|(_, count)| **count == 0);
        let untrained: Vec<&str> = untrained.map(|(class, _)| class.as_str()).take(5).collect();
        if !untrained.is_empty() {
            talk!(
                "warning: no example to learn from of {} (a smaller validation.fraction leaves more)",
                untrained.join(", ")
            );
        }
        let checked = self.classifier()?.validate(Some(labelled.train.shape()));
        checked.map_err(|error| Problems::plain(format!("model.classifier.{error}")))?;
        let checked = self.recipe.loss.validate(Some(labelled.classes.len()));
        checked.map_err(|(field, problem)| Problems::plain(format!("loss.{field}: {problem}")))?;
        if self.recipe.loss.worst_group > 0.0 && labelled.groups.len() < 2 {
            let problem = format!(
                "loss.worst_group ({}) needs data that tells at least two groups: data.labelled_text.group_field names the \
                 field of a text's group, data.shapes.shortcut makes two",
                self.recipe.loss.worst_group
            );
            return Err(Problems::plain(problem).into());
        }
        Ok(labelled)
    }

    fn classifier(&self) -> Result<&ClassifierConfig, Failure> {
        let missing = || Problems::plain("model.classifier is missing".into());
        Ok(self.recipe.model.classifier.as_ref().ok_or_else(missing)?)
    }

    /// The classifier before the first step; what the recipe freezes does not learn.
    ///
    /// # Errors
    /// If what is to be frozen does not exist.
    pub fn first_classifier(&self, labelled: &Labelled, device: &Device) -> Result<Classifier, Failure> {
        seed_random(self.recipe.debug.seed);
        let model = self.classifier()?.init(sizes(labelled), device);
        let model = model.with_precision(self.recipe.training.precision);
        Ok(self.recipe.freeze.apply(model.with_objective(self.recipe.loss.objective(&labelled.counts)))?)
    }

    /// Opens the data that a decoder learns.
    ///
    /// # Errors
    /// If it is missing or malformed, or has ids that the model does not know.
    pub fn data(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Opened, Failure> {
        let opened = data(&self.recipe, &self.tokenizer, progress)?;
        match &self.pretrained {
            Some(Pretrained { path, vocab_size, .. }) if opened.vocab_size > *vocab_size => Err(Failure::Run(format!(
                "the data has {} ids, the model of {} knows {vocab_size}: name data with fewer, or another model",
                opened.vocab_size,
                path.display()
            ))),
            _ => Ok(opened),
        }
    }

    /// The model before the first step: fresh weights that the seed decides, or those of `model.pretrained`. What the
    /// recipe freezes does not learn.
    ///
    /// # Errors
    /// If weights cannot be read or do not fit, or what is to be frozen or added to does not exist.
    pub fn first_model(&self, vocab_size: usize, device: &Device) -> Result<Decoder, Failure> {
        seed_random(self.recipe.debug.seed);
        let model = match &self.pretrained {
            Some(found) => found.model(device)?,
            None => {
                let decoder = self.recipe.model.decoder.as_ref();
                let decoder = decoder.ok_or_else(|| Problems::plain("model.decoder is missing".into()))?;
                decoder.init(self.vocab_size.unwrap_or(vocab_size), device)
            }
        };
        let model = model.with_precision(self.recipe.training.precision);
        let model = match &self.recipe.lora {
            Some(lora) => train_only(add_lora(model, lora, self.recipe.debug.seed)?, |name| name.starts_with("lora.")),
            None => model,
        };
        Ok(self.recipe.freeze.apply(model)?)
    }
}

/// Examples that all belong to one class teach nothing: any answer but that class would be wrong.
fn refuse_one_class(labelled: &Labelled, data: &str) -> Result<(), Failure> {
    let learned = labelled.classes.iter().zip(&labelled.counts).filter(|(_, count)| **count > 0);
    let learned: Vec<&str> = learned.map(|(class, _)| class.as_str()).collect();
    if learned.len() > 1 {
        return Ok(());
    }
    Err(Failure::Run(format!(
        "data.{data}: all {} examples to learn from are of one class ({}), so that there is nothing to tell apart\n  hint: give \
         examples of another class, or name the field that holds the classes; a smaller validation.fraction leaves more",
        labelled.counts.iter().sum::<u64>(),
        learned.join(", ")
    )))
}

/// The model with fresh low-rank pairs.
///
/// # Errors
/// If it has no such projections.
pub fn add_lora(model: Decoder, config: &LoraConfig, seed: u64) -> Result<Decoder, Failure> {
    model.with_lora(config, seed).map_err(|error| Problems::plain(format!("lora.{error}")).into())
}

/// The device of a recipe, for training.
///
/// # Errors
/// If it is not compiled in or not there.
pub fn training_device(recipe: &Recipe) -> Result<Device, Failure> {
    Ok(device::open(&recipe.training.device).map_err(Failure::Run)?.autodiff())
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
) -> Result<PathBuf, Failure> {
    let decoder = Some(model.config().clone());
    let recipe = Recipe {
        model: ModelConfig { pretrained: None, decoder, classifier: None, embedder: None },
        procedure: ProcedureConfig::default(),
        lora: None,
        ..recipe
    };
    let text = recipe::resolved(&recipe)?;
    companions.push(("recipe.toml".into(), text.clone().into_bytes()));
    let parts = Parts {
        optimizer: Optimizer::new(recipe.optimizer.clone()),
        training: &recipe.training,
        model,
        tracking: &[],
        batches_per_epoch: 1,
    };
    let procedure = Decoder::procedure(&recipe.procedure, parts, &serde_json::Value::Null)?;
    std::fs::create_dir_all(run_dir).map_err(|error| Failure::file("create", run_dir, error))?;
    let saving = Saving {
        model,
        procedure: &*procedure,
        progress: &Progress::default(),
        companions: &companions,
        validation_loss: None,
        best: None,
        nonfinite: allowed().nonfinite,
    };
    let checkpoint = state::save(run_dir, &saving)?;
    atomic_write(&run_dir.join("recipe.toml"), text.as_bytes())?;
    Ok(checkpoint)
}
