//! Recipe to parts: data, model, device. And checkpoints back to the same.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use polyhead_data::{Loader, OpenOptions, Opened, Tokenizer};
use polyhead_models::{Batch, Decoder};
use polyhead_training::checkpoint::{newest_good, read_file, verify};
use polyhead_training::evaluate::Batches;
use polyhead_training::{TrainError, state};

use crate::console::talk;
use crate::device;
use crate::recipe::Recipe;
use crate::report::{Failure, Problems};

/// A loader as the loop sees it.
pub struct Source(pub Loader);

impl Batches for Source {
    fn batch(&self, position: u64) -> Result<Batch, TrainError> {
        self.0.batch(position).map_err(|error| TrainError::Data(Box::new(error)))
    }

    fn per_epoch(&self) -> u64 {
        self.0.batches_per_epoch()
    }
}

/// The project's folder: where we stand if it looks like it, else where the binary was built.
pub fn project_root() -> PathBuf {
    let here = PathBuf::from(".");
    if here.join("crates/polyhead").is_dir() {
        return here;
    }
    let built = Path::new(env!("CARGO_MANIFEST_DIR"));
    built.ancestors().nth(2).unwrap_or(built).to_owned()
}

/// Opens the data of a recipe.
///
/// # Errors
/// If it is missing or malformed.
pub fn data(recipe: &Recipe, progress: &mut dyn FnMut(u64, u64)) -> Result<Opened, Failure> {
    let options = OpenOptions {
        seq_len: recipe.training.seq_len,
        batch_size: recipe.training.batch_size,
        seed: recipe.debug.seed,
        packing: recipe.loader.packing,
        validation_fraction: recipe.validation.fraction,
        validation_samples: recipe.validation.batches.max(1) * recipe.training.batch_size as u64,
        cache_dir: PathBuf::from("datasets/cache"),
        project_root: project_root(),
    };
    Ok(polyhead_data::open(&recipe.data, &recipe.tokenizer, &options, progress)?)
}

/// The device of a recipe, for training.
///
/// # Errors
/// If it is not compiled in or not there.
pub fn training_device(recipe: &Recipe) -> Result<Device, Failure> {
    Ok(device::open(&recipe.training.device).map_err(Failure::Run)?.autodiff())
}

/// A model with fresh weights that the recipe's seed decides.
pub fn fresh_model(recipe: &Recipe, vocab_size: usize, device: &Device) -> Decoder {
    device.seed(recipe.debug.seed);
    recipe.model.decoder().init(vocab_size, device)
}

/// A trained model with what belongs to it.
pub struct Trained {
    /// The checkpoint's folder.
    pub path: PathBuf,
    /// The weights, on a plain device.
    pub model: Decoder,
    /// The recipe that trained it.
    pub recipe: Recipe,
    /// Its tokenizer, where it learnt text.
    pub tokenizer: Option<Tokenizer>,
}

/// The checkpoint that a person means by a path: the folder of one, or the newest whole one of a run.
///
/// # Errors
/// If there is none, or the named one is damaged.
pub fn find_checkpoint(path: &Path) -> Result<PathBuf, Failure> {
    if path.join("manifest.json").exists() {
        verify(path)?;
        return Ok(path.to_owned());
    }
    if !path.is_dir() {
        let hint = match path.extension().is_some_and(|ending| ending == "toml") {
            true => "this looks like a recipe, from which `polyhead train` makes one",
            false => "`ls checkpoints` shows yours",
        };
        let problem = format!("{}: no such checkpoint or run folder\n  hint: {hint}", path.display());
        return Err(Problems::plain(problem).into());
    }
    let (found, skipped) = newest_good(path)?;
    for problem in skipped {
        talk!("warning: {problem}; looking for an older checkpoint");
    }
    match found {
        Some((path, _)) => Ok(path),
        None => Err(Failure::Run(format!("{}: holds no whole checkpoint", path.display()))),
    }
}

/// The recipe of a checkpoint.
///
/// # Errors
/// If it is missing, altered or of another version.
pub fn recipe_of(checkpoint: &Path) -> Result<Recipe, Failure> {
    let text = String::from_utf8_lossy(&read_file(checkpoint, "recipe.toml")?).into_owned();
    toml::from_str(&text).map_err(|error| Failure::Run(format!("{}/recipe.toml: {error}", checkpoint.display())))
}

/// What `data.json` of a checkpoint says about what was learnt from.
pub fn data_record(opened: &Opened) -> Vec<u8> {
    let record = serde_json::json!({ "description": opened.description, "text_hash": opened.text_hash });
    format!("{record:#}\n").into_bytes()
}

/// How the text is another one than a checkpoint learnt from, if it is: its files may have changed since.
///
/// # Errors
/// If the checkpoint's record is damaged. One without a record is taken at its word.
pub fn changed_text(checkpoint: &Path, opened: &Opened) -> Result<Option<String>, Failure> {
    const RECORD: &str = "data.json";
    if !checkpoint.join(RECORD).exists() {
        return Ok(None);
    }
    let record: serde_json::Value = serde_json::from_slice(&read_file(checkpoint, RECORD)?)
        .map_err(|error| Failure::Run(format!("{}/{RECORD}: {error}", checkpoint.display())))?;
    let same = record["text_hash"].as_str() == opened.text_hash.as_deref();
    Ok((!same).then(|| {
        format!(
            "the text is not the one that {} learnt from, which was {}",
            checkpoint.display(),
            record["description"].as_str().unwrap_or("another")
        )
    }))
}

/// Loads a checkpoint to use, not to train.
///
/// # Errors
/// If it is missing, damaged, or does not fit together.
pub fn open_trained(path: &Path, device_name: Option<&str>) -> Result<Trained, Failure> {
    let path = find_checkpoint(path)?;
    let recipe = recipe_of(&path)?;
    let device = device::open(device_name.unwrap_or(&recipe.training.device)).map_err(Failure::Run)?;
    let tokenizer = match recipe.data.is_text() {
        true => Some(Tokenizer::from_json(&String::from_utf8_lossy(&read_file(&path, "tokenizer.json")?))?),
        false => None,
    };
    let vocab_size = vocab_of(&path)?;
    let model = state::read_model(&path, recipe.model.decoder().init(vocab_size, &device))?;
    Ok(Trained { path, model, recipe, tokenizer })
}

/// How many ids a checkpoint's model knows.
fn vocab_of(checkpoint: &Path) -> Result<usize, Failure> {
    let tensors = polyhead_models::weights::from_safetensors(&read_file(checkpoint, "model.safetensors")?)?;
    let rows = tensors.get("embedding.weight").and_then(|tensor| tensor.shape.first().copied());
    rows.ok_or_else(|| Failure::Run(format!("{}/model.safetensors: embedding.weight is missing", checkpoint.display())))
}
