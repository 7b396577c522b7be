//! A trained model as a person names it, by a folder: a run or a checkpoint of ours. Opening reads its settings and its
//! tokenizer; the weights are read when they are asked for.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use polyhead_data::{HuggingfaceTokenizer, Tokenizer, TokenizerConfig};
use polyhead_models::{Decoder, DecoderConfig, weights};
use polyhead_training::checkpoint::{newest_good, read_file, verify};
use polyhead_training::state;

use crate::console::talk;
use crate::recipe::Recipe;
use crate::report::{Failure, Problems};

const TOKENIZER: &str = "tokenizer.json";

/// A trained model whose weights have not been read yet.
pub struct Pretrained {
    /// The checkpoint's folder.
    pub path: PathBuf,
    /// What the model is.
    pub decoder: DecoderConfig,
    /// Ids that it knows.
    pub vocab_size: usize,
    /// How it reads text; `None` where it learnt generated data.
    pub tokenizer: Option<Tokenizer>,
    /// The recipe that trained it.
    pub recipe: Recipe,
}

impl Pretrained {
    /// Opens the folder of a checkpoint, or the newest whole one of a run.
    ///
    /// # Errors
    /// If there is none, or it is damaged, or does not fit together.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let path = find_checkpoint(path)?;
        let recipe = recipe_of(&path)?;
        let Some(decoder) = recipe.model.decoder.clone() else {
            return Err(Failure::Run(format!("{}/recipe.toml: model.decoder is missing", path.display())));
        };
        Ok(Self { vocab_size: vocab_of(&path)?, tokenizer: tokenizer_of(&path)?, decoder, recipe, path })
    }

    /// The model with its weights.
    ///
    /// # Errors
    /// If they are damaged or do not fit.
    pub fn model(&self, device: &Device) -> Result<Decoder, Failure> {
        Ok(state::read_model(&self.path, self.decoder.init(self.vocab_size, device))?)
    }

    /// Its tokenizer as a recipe would name it.
    pub fn tokenizer_config(&self) -> TokenizerConfig {
        match &self.tokenizer {
            Some(tokenizer) if tokenizer.fingerprint() != Tokenizer::bytes().fingerprint() => {
                TokenizerConfig::Huggingface(HuggingfaceTokenizer { path: self.path.join(TOKENIZER) })
            }
            _ => TokenizerConfig::default(),
        }
    }
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

/// The tokenizer that lies in a checkpoint, if one does.
///
/// # Errors
/// If it is altered.
pub fn tokenizer_of(checkpoint: &Path) -> Result<Option<Tokenizer>, Failure> {
    if !checkpoint.join(TOKENIZER).exists() {
        return Ok(None);
    }
    Ok(Some(Tokenizer::from_json(&String::from_utf8_lossy(&read_file(checkpoint, TOKENIZER)?))?))
}

/// How many ids a checkpoint's model knows.
fn vocab_of(checkpoint: &Path) -> Result<usize, Failure> {
    let tensors = weights::from_safetensors(&read_file(checkpoint, "model.safetensors")?)?;
    let rows = tensors.get("embedding.weight").and_then(|tensor| tensor.shape.first().copied());
    rows.ok_or_else(|| Failure::Run(format!("{}/model.safetensors: embedding.weight is missing", checkpoint.display())))
}
