//! The data of a recipe, and what a checkpoint records of it.

use std::path::{Path, PathBuf};

use polyhead_data::synthetic::World;
use polyhead_data::{DataConfig, Labelled, Loader, OpenOptions, Opened, Paired, Tokenizer, Tracking};
use polyhead_models::Batch;
use polyhead_training::TrainError;
use polyhead_training::checkpoint::read_file;
use polyhead_training::evaluate::Batches;

use crate::classifier::sizes;
use crate::costs::Known;
use crate::embedder::layers_and_dim;
use crate::recipe::Recipe;
use crate::report::Failure;

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

/// The data of a recipe, opened.
pub enum Data {
    /// For decoders.
    Tokens(Box<Opened>),
    /// For classifiers.
    Examples(Box<Labelled>),
    /// For embedders.
    Pairs(Box<Paired>),
}

impl Data {
    /// What it is, in words.
    pub fn description(&self) -> &str {
        match self {
            Self::Tokens(opened) => &opened.description,
            Self::Examples(labelled) => &labelled.description,
            Self::Pairs(paired) => &paired.description,
        }
    }

    /// What else there is to know before it is learned from.
    pub fn notes(&self) -> &[String] {
        match self {
            Self::Tokens(opened) => &opened.notes,
            Self::Examples(labelled) => &labelled.notes,
            Self::Pairs(_) => &[],
        }
    }

    /// What it tells about the size of a model.
    pub fn known(&self) -> Known {
        match self {
            Self::Tokens(opened) => Known::Ids(opened.vocab_size),
            Self::Examples(labelled) => Known::Examples(sizes(labelled)),
            Self::Pairs(paired) => Known::Pairs(layers_and_dim(paired)),
        }
    }

    /// For files: a hash of what was read.
    pub fn text_hash(&self) -> Option<&str> {
        match self {
            Self::Tokens(opened) => opened.text_hash.as_deref(),
            Self::Examples(labelled) => labelled.text_hash.as_deref(),
            Self::Pairs(paired) => Some(&paired.text_hash),
        }
    }

    /// Batches until everything has been learned from once.
    pub fn batches_per_epoch(&self) -> u64 {
        match self {
            Self::Tokens(opened) => opened.train.batches_per_epoch(),
            Self::Examples(labelled) => labelled.train.batches_per_epoch(),
            Self::Pairs(paired) => paired.train.batches_per_epoch(),
        }
    }

    /// What `data.json` of a checkpoint says about what was learned from.
    pub fn record(&self) -> Vec<u8> {
        match self {
            Self::Tokens(opened) => data_record(opened),
            Self::Examples(labelled) => {
                let Labelled { description, text_hash, classes, .. } = &**labelled;
                let record = serde_json::json!({
                    "description": description, "text_hash": text_hash, "input": labelled.train.shape(), "classes": classes,
                });
                format!("{record:#}\n").into_bytes()
            }
            Self::Pairs(paired) => {
                let Paired { description, text_hash, .. } = &**paired;
                let record = serde_json::json!({
                    "description": description, "text_hash": text_hash, "input": layers_and_dim(paired),
                });
                format!("{record:#}\n").into_bytes()
            }
        }
    }
}

/// The same for tokens.
pub fn data_record(opened: &Opened) -> Vec<u8> {
    let record = serde_json::json!({ "description": opened.description, "text_hash": opened.text_hash });
    format!("{record:#}\n").into_bytes()
}

/// Opens the data of a recipe.
///
/// # Errors
/// If it is missing or malformed.
pub fn data(recipe: &Recipe, tokenizer: &Tokenizer, progress: &mut dyn FnMut(u64, u64)) -> Result<Opened, Failure> {
    Ok(polyhead_data::open(&recipe.data, tokenizer, &options(recipe), progress)?)
}

/// Refuses tokens of which none is a target, so that nothing would be learned; gives what else there is to know about them.
///
/// # Errors
/// If no token is a target, or the data cannot be read.
pub fn check_targets(opened: &Opened, data: &str) -> Result<Vec<String>, Failure> {
    let mut notes = Vec::new();
    let (tokens, targets) = count_targets(&opened.train)?;
    if targets == 0 {
        return Err(Failure::Run(format!(
            "data.{data}: none of {tokens} tokens to learn from is a target, so that nothing would be learned\n  hint: `polyhead \
             preview RECIPE` shows what is learned of each row; a chat template that finds no messages, and rows cut before \
             the first answer (training.seq_len), leave none"
        )));
    }
    if (targets as f64) < FEW * tokens as f64 {
        let percent = 100.0 * targets as f64 / tokens as f64;
        notes.push(format!(
            "data.{data}: only {targets} of {tokens} tokens looked at ({percent:.2} %) are targets; the rest is read and teaches \
             nothing. `polyhead preview RECIPE` shows which"
        ));
    }
    let (tokens, targets) = count_targets(&opened.validation)?;
    if targets == 0 {
        notes.push(format!(
            "data.{data}: none of {tokens} held-out tokens is a target, so that validation measures nothing (a larger \
             validation.fraction holds out more)"
        ));
    }
    Ok(notes)
}

/// Below this share of tokens that are targets something is told (the share of a short answer to a page of context is above it).
const FEW: f64 = 0.01;

/// Tokens and targets of some batches, spread over an epoch: of few, of more where hardly any is a target, and where none is,
/// of as many as it takes to find one.
fn count_targets(loader: &Loader) -> Result<(u64, u64), Failure> {
    // Chosen by us: the last takes seconds.
    const SOME: u64 = 4;
    const MORE: u64 = 64;
    const MOST: u64 = 10_000;
    let all = loader.batches_per_epoch().max(1);
    let count = |batches: u64, enough: u64| -> Result<(u64, u64), Failure> {
        let (batches, mut tokens, mut targets) = (batches.min(all), 0, 0);
        for index in 0..batches {
            let batch = loader.batch(index * all / batches)?;
            tokens += batch.tokens.len() as u64;
            targets += batch.target_tokens();
            if targets >= enough {
                break;
            }
        }
        Ok((tokens, targets))
    };
    let (mut tokens, mut targets) = count(SOME, u64::MAX)?;
    if all > SOME && (targets as f64) < FEW * tokens as f64 {
        (tokens, targets) = count(MORE, u64::MAX)?;
    }
    if all > MORE && targets == 0 {
        (tokens, targets) = count(MOST, 1)?;
    }
    Ok((tokens, targets))
}

/// Opens the examples of a recipe.
///
/// # Errors
/// If they are missing or malformed.
pub fn labelled(recipe: &Recipe, tokenizer: &Tokenizer) -> Result<Labelled, Failure> {
    Ok(polyhead_data::open_labelled(&recipe.data, tokenizer, &recipe.augmentation, &options(recipe))?)
}

/// Everything about data besides what it is.
pub fn options(recipe: &Recipe) -> OpenOptions {
    OpenOptions {
        seq_len: recipe.training.seq_len,
        batch_size: recipe.training.batch_size,
        seed: recipe.debug.seed,
        packing: recipe.loader.packing,
        validation_fraction: recipe.validation.fraction,
        tracking: recipe.procedure.tracking().map(|(fraction, texts)| Tracking { fraction, texts }),
        validation_samples: recipe.validation.batches.max(1).saturating_mul(recipe.training.batch_size as u64),
        cache_dir: PathBuf::from("datasets/cache"),
        project_root: project_root(),
    }
}

/// The world of facts that a recipe's model learns, if it does.
pub fn world(recipe: &Recipe) -> Option<World> {
    match &recipe.data {
        DataConfig::Facts(config) => Some(config.world(recipe.debug.seed)),
        _ => None,
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

/// How the text is another one than a checkpoint learned from, if it is: its files may have changed since.
///
/// # Errors
/// If the checkpoint's record is damaged. One without a record is taken at its word.
pub fn changed_text(checkpoint: &Path, text_hash: Option<&str>) -> Result<Option<String>, Failure> {
    if !checkpoint.join(RECORD).exists() {
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

/// What a checkpoint says about what was learned from.
pub const RECORD: &str = "data.json";

/// What it says.
///
/// # Errors
/// If it is missing or damaged.
pub fn record(checkpoint: &Path) -> Result<serde_json::Value, Failure> {
    serde_json::from_slice(&read_file(checkpoint, RECORD)?)
        .map_err(|error| Failure::Run(format!("{}/{RECORD}: {error}", checkpoint.display())))
}
