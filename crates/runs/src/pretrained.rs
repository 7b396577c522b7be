//! A trained model as a person names it, by a folder: a run, a checkpoint, or a folder in Hugging Face's format. Opening reads
//! its settings and its tokenizer; the weights are read when they are asked for.

use std::cell::OnceCell;
use std::fs::File;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use polyhead_data::{DataError, HuggingfaceTokenizer, Tokenizer, TokenizerConfig};
use polyhead_kernels::without_drawing;
use polyhead_models::adapters::LoraConfig;
use polyhead_models::weights::{self, FrozenDtype};
use polyhead_models::{Decoder, DecoderConfig, hf};
use polyhead_recipe::nearest::{is_recipe, nearest_path, recipes_below};
use polyhead_recipe::{ModelConfig, Problems, Recipe, differences_of};
use polyhead_training::checkpoint::{Hold, hold, is_named_as_checkpoint, newest_usable, read_file, verify_usable};
use polyhead_training::run_folder::files::{
    ADAPTER, BASE, RECIPE, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, is_checkpoint,
};
use polyhead_training::state;
use polyhead_training::{BoundariesConfig, ProcedureConfig};

use crate::Caller;
use crate::base::Base;
use crate::data::recipes_folder;
use crate::hub::Reference;
use crate::intervention::{of_checkpoint, trains_intervention};

use crate::error::Failure;
use crate::stages;

/// A trained model whose weights have not been read yet.
pub struct Pretrained {
    /// The folder of the checkpoint, or the one in Hugging Face's format.
    pub path: PathBuf,
    /// What the model is.
    pub decoder: DecoderConfig,
    /// Ids that it knows.
    pub vocab_size: usize,
    /// The longest sequence that it was made for.
    pub max_positions: usize,
    /// How it reads text; `None` where it learned generated data, or the folder has none.
    pub tokenizer: Option<Tokenizer>,
    /// Tokens after which it has said what it has to say, where its folder names any besides its tokenizer.
    pub ends: Vec<u32>,
    /// The recipe that trained it, if it is one of ours.
    pub recipe: Option<Recipe>,
    /// `None` for a checkpoint of ours.
    pub(crate) foreign: Option<hf::Folder>,
    /// The model that all weights are of but the low-rank pairs, where a checkpoint of ours has those alone.
    pub(crate) base: Option<Box<Pretrained>>,
    hash: OnceCell<String>,
}

impl Pretrained {
    /// Opens the folder of a checkpoint, the newest whole one of a run, or a folder in Hugging Face's format.
    ///
    /// # Errors
    /// If there is none, or it is damaged, or does not fit together.
    pub fn open(path: &Path, caller: Caller) -> Result<Self, Failure> {
        let path = &caller.locate(path)?;
        let Some((path, recipe)) = find_own(path, caller)? else { return Self::open_foreign(path, caller) };
        let decoder = match &recipe.model {
            ModelConfig::Decoder { config: Some(decoder), .. } => decoder.clone(),
            ModelConfig::Decoder { config: None, .. } => {
                return Err(Failure::Run(format!("{}/{RECIPE}: model.decoder is missing", path.display())));
            }
            ModelConfig::Classifier { .. } => {
                let hint = "`polyhead eval` tells how well it does";
                let problem = format!("{} is a classifier, and this is for decoders\n  hint: {hint}", path.display());
                return Err(Problems::plain(problem).into());
            }
            ModelConfig::Embedder(_) => {
                let problem = format!("{} is an embedder; `polyhead embed` and eval take it", path.display());
                return Err(Problems::plain(problem).into());
            }
            ModelConfig::SuperResolution(_) => {
                let problem = format!("{} enlarges images; `polyhead upscale` and eval take it", path.display());
                return Err(Problems::plain(problem).into());
            }
        };
        let base = Self::base_of(&path, caller)?.map(Box::new);
        // What the run itself has stretched is no change of its base.
        let stretched = recipe.model.rope_scaling().is_some();
        let described = |base: &Self| match stretched {
            true => DecoderConfig { rope_scaling: decoder.rope_scaling, ..base.decoder.clone() },
            false => base.decoder.clone(),
        };
        if let Some(base) = base.as_ref().filter(|base| described(base) != decoder) {
            let changed = differences_of(&described(base), &decoder).join("\n  ");
            let problem = format!("the base model {} has changed:\n  {changed}", base.path.display());
            return Err(Failure::Run(format!("{}: {problem}", path.display())));
        }
        Ok(Self {
            vocab_size: base.as_ref().map_or_else(|| vocab_of(&path, &decoder), |base| Ok(base.vocab_size))?,
            max_positions: recipe.training.seq_len,
            tokenizer: tokenizer_of(&path)?,
            ends: Vec::new(),
            recipe: Some(recipe),
            foreign: None,
            hash: OnceCell::new(),
            base,
            decoder,
            path,
        })
    }

    /// The base model of a checkpoint that has only what was trained beside its weights; `None` where all weights are in it. Which of the places where
    /// it may be has it, the weights tell.
    ///
    /// # Errors
    /// If it is nowhere.
    pub fn base_of(checkpoint: &Path, caller: Caller) -> Result<Option<Self>, Failure> {
        let Some(base) = Base::read(checkpoint)? else { return Ok(None) };
        let places = base.places(checkpoint, caller);
        let mut others = Vec::new();
        for place in &places {
            let place = caller.locate(place)?;
            if !place.exists() {
                continue;
            }
            match Self::open(&place, caller) {
                Ok(found) if base.has(found.weights_hash()?) => return Ok(Some(found)),
                Ok(other) => others.push(format!("{} has other weights", other.path.display())),
                Err(error) => others.push(error.to_string().trim_start_matches("error: ").to_owned()),
            }
        }
        let looked = places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(", ");
        let told = if others.is_empty() { format!("not found ({looked})") } else { others.join("; ") };
        Err(Failure::Run(format!(
            "{} has what was trained beside the weights; its base model {} is needed besides: {told}\n  hint: put the model back that it was \
             trained from, or name its folder with --base (docs: LoRA)",
            checkpoint.display(),
            base.named().display()
        )))
    }

    fn open_foreign(path: &Path, caller: Caller) -> Result<Self, Failure> {
        let find = |name: &Path| (caller.hub)(name).map_err(|error| error.to_string());
        let folder = hf::Folder::open_with(path, &find)?;
        folder.notes().iter().for_each(|note| (caller.tell)(&format!("note: {}: {note}", path.display())));
        // An adapter may have one of its own.
        let file = [path, folder.base()].map(|folder| folder.join(TOKENIZER)).into_iter().find(|file| file.exists());
        let open = |path| Tokenizer::open(&TokenizerConfig::Huggingface(HuggingfaceTokenizer { path }));
        let tokenizer = file.map(open).transpose()?;
        for note in tokenizer.iter().flat_map(Tokenizer::notes) {
            (caller.tell)(&format!("note: {}: tokenizer: {note}", path.display()));
        }
        if let Some(known) = tokenizer.as_ref().map(Tokenizer::vocab_size).filter(|&known| known > folder.vocab_size())
        {
            return Err(Failure::Run(format!(
                "{}: {TOKENIZER} has {known} ids, the model knows {} (vocab_size in {}): put the tokenizer there that \
                 belongs to it",
                path.display(),
                folder.vocab_size(),
                hf::files::CONFIG
            )));
        }
        Ok(Self {
            path: path.to_owned(),
            decoder: folder.decoder().clone(),
            vocab_size: folder.vocab_size(),
            max_positions: folder.max_positions(),
            tokenizer,
            ends: folder.ends().to_vec(),
            recipe: None,
            foreign: Some(folder),
            base: None,
            hash: OnceCell::new(),
        })
    }

    /// The model with its weights, without an intervention; where low-rank pairs were trained, they are folded in.
    ///
    /// # Errors
    /// If they are damaged or do not fit.
    pub fn model(&self, device: &Device, caller: Caller) -> Result<Decoder, Failure> {
        if let Some(folder) = &self.foreign {
            return Ok(folder.load_with(device, caller.reading(), &mut caller.loading())?);
        }
        Ok(self.with_pairs(device, caller)?.merged().intervened(None))
    }

    /// The model with its weights and, beside them, the low-rank pairs or the tensors of its intervention that were trained.
    ///
    /// # Errors
    /// If they are damaged or do not fit.
    pub fn with_pairs(&self, device: &Device, caller: Caller) -> Result<Decoder, Failure> {
        if self.foreign.is_some() {
            return self.model(device, caller);
        }
        let model = match &self.base {
            Some(base) => {
                let base = base.model(device, self.frozen(caller))?.with_rope_scaling(self.decoder.rope_scaling);
                // What was rounded stays rounded.
                if caller.frozen == FrozenDtype::F32 { base.in_f32() } else { base }
            }
            None => without_drawing(|| self.decoder.init(self.vocab_size, device)),
        };
        let model = match self.recipe.as_ref().and_then(|recipe| recipe.lora.as_ref()) {
            Some(lora) => add_lora(model, lora, 0)?,
            None => model,
        };
        let trains = self.recipe.as_ref().filter(|recipe| trains_intervention(recipe));
        let model = match trains.map(|recipe| of_checkpoint(recipe, &self.path)).transpose()?.flatten() {
            Some(intervention) => intervention.apply(model, self.tokenizer.as_ref())?,
            None => model,
        };
        let model = match self.recipe.as_ref().map(|recipe| &recipe.procedure) {
            Some(ProcedureConfig::Boundaries(boundaries)) => with_boundaries(model, boundaries)?,
            _ => model,
        };
        // `open` has verified it.
        Ok(state::read_checked_model(&self.path, model, caller.reading(), &mut caller.loading())?)
    }

    /// What reads its base: a run whose recipe says so has learnt beside rounded weights.
    fn frozen(&self, caller: Caller) -> Caller {
        match self.recipe.as_ref().map(|recipe| recipe.model.pretrained_dtype()) {
            Some(frozen @ FrozenDtype::Bf16) => Caller { frozen, ..caller },
            _ => caller,
        }
    }

    /// The BLAKE3 hash of the files of its weights, by which a run knows its base model again.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn weights_hash(&self) -> Result<&str, Failure> {
        if let Some(hash) = self.hash.get() {
            return Ok(hash);
        }
        let of_file = |path: PathBuf| -> Result<(String, String), Failure> {
            let mut hash = blake3::Hasher::new();
            let read = File::open(&path).and_then(|file| hash.update_reader(file).map(drop));
            read.map_err(|error| Failure::file("read", &path, error))?;
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Ok((name, hash.finalize().to_string()))
        };
        let mut files: Vec<(String, String)> = match &self.foreign {
            Some(folder) => folder.weight_files().into_iter().map(of_file).collect::<Result<_, _>>()?,
            None => {
                // The manifest has them, and `open` has compared the files with it.
                let entries = verify_usable(&self.path)?.files.into_iter().map(|entry| (entry.name, entry.blake3));
                entries.filter(|(name, _)| [WEIGHTS, ADAPTER, BASE].contains(&name.as_str())).collect()
            }
        };
        files.sort();
        let text: String = files.iter().map(|(name, hash)| format!("{name} {hash}\n")).collect();
        Ok(self.hash.get_or_init(|| blake3::hash(text.as_bytes()).to_string()))
    }

    /// Its tokenizer as a recipe would name it.
    pub fn tokenizer_config(&self) -> TokenizerConfig {
        match &self.tokenizer {
            Some(tokenizer) if tokenizer.fingerprint() != Tokenizer::bytes().fingerprint() => {
                let base = self.foreign.as_ref().map(hf::Folder::base);
                let folder = base.filter(|_| !self.path.join(TOKENIZER).exists()).unwrap_or(&self.path);
                TokenizerConfig::Huggingface(HuggingfaceTokenizer { path: folder.join(TOKENIZER) })
            }
            _ => TokenizerConfig::default(),
        }
    }
}

/// The model with a fresh predictor of boundaries.
///
/// # Errors
/// If its layers do not have keys of one kind.
pub fn with_boundaries(model: Decoder, config: &BoundariesConfig) -> Result<Decoder, Failure> {
    let told = model.with_boundaries(&config.predictor);
    told.map_err(|error| Problems::plain(format!("procedure.boundaries: {}", error.problem)).into())
}

/// The model with fresh low-rank pairs.
///
/// # Errors
/// If it has no such projections.
pub fn add_lora(model: Decoder, config: &LoraConfig, seed: u64) -> Result<Decoder, Failure> {
    model.with_lora(config, seed).map_err(|error| Problems::plain(format!("lora.{error}")).into())
}

/// [`locate_checkpoint`] for whoever reads it: a training that goes on beside leaves it alone until this process ends.
///
/// # Errors
/// If there is none, or the named one is damaged.
pub fn find_checkpoint(path: &Path, caller: Caller) -> Result<PathBuf, Failure> {
    let (path, held) = locate_checkpoint(path, caller)?;
    std::mem::forget(held);
    Ok(path)
}

/// The checkpoint that a person means by a path: the folder of one, or the newest whole one of a run; of a run in stages, that
/// of the last stage that has finished. It is not pruned while it is held.
///
/// # Errors
/// If there is none, or the named one is damaged.
pub fn locate_checkpoint(path: &Path, caller: Caller) -> Result<(PathBuf, Option<Hold>), Failure> {
    if let Some(stage) = stages::last_finished(path)? {
        return locate_checkpoint(&stage, caller);
    }
    // What is named as a checkpoint is none without its manifest: the message tells that, instead of what a run lacks.
    if is_named_as_checkpoint(path) || is_checkpoint(path) {
        let held = hold(path);
        verify_usable(path)?;
        return Ok((path.to_owned(), held));
    }
    if !path.is_dir() {
        let hint = meant(path);
        let hub = match path.to_str().and_then(Reference::parse) {
            Some(reference) => format!(
                ", and no model of that name in the cache of the Hugging Face hub ({}; HF_HUB_CACHE or HF_HOME name another \
                 cache); --download fetches one",
                reference.folder(&(caller.hub_cache)()).display()
            ),
            None => String::new(),
        };
        let problem =
            format!("{}: no such checkpoint or run folder{hub}\n  hint: {hint} (docs: Use a model)", path.display());
        return Err(Problems::plain(problem).into());
    }
    loop {
        let (found, skipped) = newest_usable(path)?;
        let Some((found, _)) = found else {
            skipped.iter().for_each(|problem| (caller.tell)(&format!("warning: {problem}")));
            return Err(Failure::Run(format!("{}: contains no complete checkpoint", path.display())));
        };
        let held = hold(&found);
        // A training beside may have pruned it, or others, since the folder was listed.
        if !is_checkpoint(&found) {
            continue;
        }
        for problem in skipped {
            (caller.tell)(&format!("warning: {problem}; looking for an older checkpoint"));
        }
        return Ok((found, held));
    }
}

/// What may have been meant by a run that is not there: a recipe, the run that a recipe makes, or one with such a name.
fn meant(path: &Path) -> String {
    if is_recipe(path) {
        return "this looks like a recipe, from which `polyhead train` makes one".into();
    }
    let known = recipes_below(&recipes_folder());
    let is_default = path.parent().and_then(Path::file_name).is_some_and(|folder| folder == "checkpoints");
    if let Some(recipe) = known.iter().find(|recipe| is_default && recipe.file_stem() == path.file_name()) {
        return format!("`polyhead train {}` makes it", recipe.display());
    }
    match nearest_path(path, Path::is_dir) {
        Some(near) => format!("did you mean {}?", near.display()),
        None => "`ls checkpoints` shows yours".into(),
    }
}

/// The checkpoint that a person means by a path, with its recipe; `None` for a folder in Hugging Face's format.
///
/// # Errors
/// If there is none, or it is damaged.
pub fn find_own(path: &Path, caller: Caller) -> Result<Option<(PathBuf, Recipe)>, Failure> {
    if hf::files::is_folder(path) {
        return Ok(None);
    }
    let path = find_checkpoint(path, caller)?;
    let recipe = recipe_of(&path)?;
    Ok(Some((path, recipe)))
}

/// The recipe of a checkpoint.
///
/// # Errors
/// If it is missing, altered or of another version.
pub fn recipe_of(checkpoint: &Path) -> Result<Recipe, Failure> {
    let text = String::from_utf8_lossy(&read_file(checkpoint, RECIPE)?).into_owned();
    toml::from_str(&text).map_err(|error| Failure::Run(format!("{}/{RECIPE}: {error}", checkpoint.display())))
}

/// The tokenizer in a checkpoint, if there is one.
///
/// # Errors
/// If it is altered.
pub fn tokenizer_of(checkpoint: &Path) -> Result<Option<Tokenizer>, Failure> {
    if !checkpoint.join(TOKENIZER).exists() {
        return Ok(None);
    }
    let read = |name| Ok::<_, Failure>(String::from_utf8_lossy(&read_file(checkpoint, name)?).into_owned());
    let of = |name: &'static str| {
        let path = checkpoint.join(name);
        move |error: DataError| Failure::Run(format!("{}: {error}", path.display()))
    };
    let tokenizer = Tokenizer::from_json(&read(TOKENIZER)?).map_err(of(TOKENIZER))?.at(&checkpoint.join(TOKENIZER));
    match checkpoint.join(TOKENIZER_CONFIG).exists() {
        true => Ok(Some(tokenizer.with_config(&read(TOKENIZER_CONFIG)?).map_err(of(TOKENIZER_CONFIG))?)),
        false => Ok(Some(tokenizer)),
    }
}

/// The files of a tokenizer, as checkpoints and Hugging Face's folders contain them.
pub fn tokenizer_files(tokenizer: &Tokenizer) -> [(String, Vec<u8>); 2] {
    [
        (TOKENIZER.into(), tokenizer.to_json().as_bytes().to_vec()),
        (TOKENIZER_CONFIG.into(), tokenizer.config_json().into_bytes()),
    ]
}

/// How many ids a checkpoint's model, which `decoder` describes, knows.
///
/// # Errors
/// If it has no embedding.
pub fn vocab_of(checkpoint: &Path, decoder: &DecoderConfig) -> Result<usize, Failure> {
    let file = checkpoint.join(WEIGHTS);
    let files = weights::TensorFiles::open(std::slice::from_ref(&file))?;
    let rows = files.shape("embedding.weight").and_then(|shape| shape.first().copied()).filter(|&rows| rows > 0);
    let rows = rows.and_then(|rows| rows.checked_sub(decoder.rows(0)));
    rows.ok_or_else(|| Failure::Run(format!("{}: embedding.weight is missing, or empty", file.display())))
}
