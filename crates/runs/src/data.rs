//! The data of a recipe, and what a checkpoint records of it.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use polyhead_data::synthetic::World;
use polyhead_data::{ExampleLoader, ImageLoader, Loader, OpenOptions, Opened, PairLoader, Tokenizer, Tracking};
use polyhead_models::{Batch, Examples, Images, Pairs};
use polyhead_recipe::Recipe;
use polyhead_training::TrainError;
use polyhead_training::checkpoint::read_file;
use polyhead_training::evaluate::Batches;

use crate::Caller;
use crate::costs::Known;
use crate::error::Failure;
use polyhead_training::run_folder::files::DATA;

/// A loader as the loop sees it.
pub struct Source<'a, L>(pub &'a L);

macro_rules! source {
    ($($loader:ty => $batch:ty),+) => { $(impl Batches<$batch> for Source<'_, $loader> {
        fn batch(&self, position: u64) -> Result<$batch, TrainError> {
            self.0.batch(position).map_err(|error| TrainError::Data(Box::new(error)))
        }

        fn per_epoch(&self) -> u64 {
            self.0.batches_per_epoch()
        }
    })+ };
}
source!(Loader => Batch, ExampleLoader => Examples, PairLoader => Pairs, ImageLoader => Images);

/// The first batches of some, of which a caller is told how many have been taken.
pub struct Watched<'a, B> {
    batches: &'a dyn Batches<B>,
    count: u64,
    caller: Caller,
}

impl<'a, B> Watched<'a, B> {
    /// The first `limit` batches (0: one epoch).
    pub fn first(batches: &'a dyn Batches<B>, limit: u64, caller: Caller) -> Self {
        let all = batches.per_epoch().max(1);
        Self { batches, count: if limit == 0 { all } else { limit.min(all) }, caller }
    }
}

impl<B> Drop for Watched<'_, B> {
    fn drop(&mut self) {
        (self.caller.progress)("evaluating", self.count, self.count);
    }
}

impl<B> Batches<B> for Watched<'_, B> {
    fn batch(&self, position: u64) -> Result<B, TrainError> {
        (self.caller.progress)("evaluating", position, self.count);
        self.batches.batch(position)
    }

    fn per_epoch(&self) -> u64 {
        self.count
    }
}

/// The data of a recipe, opened: what a model of some kind is trained and validated on, in batches `B`.
pub trait TrainingData<B> {
    /// What it is, in words.
    fn description(&self) -> &str;

    /// What else there is to know before it is trained on.
    fn notes(&self) -> &[String] {
        &[]
    }

    /// What it tells about the size of a model.
    fn known(&self) -> Known;

    /// For files: a hash of what was read.
    fn text_hash(&self) -> Option<&str>;

    /// What `data.json` of a checkpoint says about it.
    fn record(&self) -> serde_json::Value;

    /// Batches to train on.
    fn train(&self) -> Box<dyn Batches<B> + '_>;

    /// Batches to validate on.
    fn held_out(&self) -> Box<dyn Batches<B> + '_>;

    /// Texts that are kept out of training, a row each, for procedures that watch the model on some.
    fn tracking(&self) -> &[B] {
        &[]
    }

    /// For text.
    fn tokenizer(&self) -> Option<&Tokenizer> {
        None
    }

    /// The best possible loss, where it is known.
    fn floor(&self) -> Option<f64> {
        None
    }

    /// Refuses data from which nothing would be learned; `name` is that of its table. Gives warnings.
    ///
    /// # Errors
    /// If it is such data, or cannot be read.
    fn check(&self, name: &str) -> Result<Vec<String>, Failure> {
        let _ = name;
        Ok(Vec::new())
    }
}

/// `data.json` as it is written.
pub fn record_text(record: &serde_json::Value) -> Vec<u8> {
    format!("{record:#}\n").into_bytes()
}

/// Everything about data besides what it is.
pub fn options(recipe: &Recipe) -> OpenOptions {
    OpenOptions {
        seq_len: recipe.training.seq_len,
        batch_size: recipe.training.batch_size,
        seed: recipe.debug.seed,
        packing: recipe.loader.packing,
        augmentation: recipe.augmentation.clone(),
        validation_fraction: recipe.validation.fraction,
        tracking: recipe.procedure.tracking().map(|(fraction, texts)| Tracking { fraction, texts }),
        validation_samples: recipe.validation.batches.max(1).saturating_mul(recipe.training.batch_size as u64),
        cache_dir: PathBuf::from("datasets/cache"),
        project_root: project_root(),
    }
}

/// Opens the tokens of a recipe.
///
/// # Errors
/// If they are missing or malformed.
pub fn open_tokens(recipe: &Recipe, tokenizer: Option<&Tokenizer>) -> Result<Opened, Failure> {
    let tokenizer = tokenizer.map_or_else(|| Cow::Owned(Tokenizer::bytes()), Cow::Borrowed);
    Ok(recipe.data.open_tokens(&tokenizer, &options(recipe), &mut |_, _| {})?)
}

/// The world of facts that a recipe's model learns, if it does.
pub fn world(recipe: &Recipe) -> Option<World> {
    recipe.data.facts(recipe.debug.seed)
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

/// The recipes at hand: the folder `recipes` here, or else the project's.
pub fn recipes_folder() -> PathBuf {
    let here = PathBuf::from("recipes");
    if here.is_dir() { here } else { project_root().join("recipes") }
}

/// How the text is another one than a checkpoint learned from, if it is: its files may have changed since.
///
/// # Errors
/// If the checkpoint's record is damaged. One without a record is taken at its word.
pub fn changed_text(checkpoint: &Path, text_hash: Option<&str>) -> Result<Option<String>, Failure> {
    if !checkpoint.join(DATA).exists() {
        return Ok(None);
    }
    let record = record(checkpoint)?;
    let same = record["text_hash"].as_str() == text_hash;
    Ok((!same).then(|| {
        format!(
            "the text is not the one that {} learned from, which was {}",
            checkpoint.display(),
            record["description"].as_str().unwrap_or("another")
        )
    }))
}

/// What a checkpoint says about the data it was trained on.
///
/// # Errors
/// If it is missing or damaged.
pub fn record(checkpoint: &Path) -> Result<serde_json::Value, Failure> {
    serde_json::from_slice(&read_file(checkpoint, DATA)?)
        .map_err(|error| Failure::Run(format!("{}/{DATA}: {error}", checkpoint.display())))
}
