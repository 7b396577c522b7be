//! The data of a recipe, and what a checkpoint records of it.

use std::path::{Path, PathBuf};

use polyhead_data::synthetic::World;
use polyhead_data::{Data, Labelled, Loader, OpenOptions, Opened, Tokenizer, Tracking};
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

/// What data tells about the size of a model.
pub fn known(data: &Data) -> Known {
    match data {
        Data::Tokens(opened) => Known::Ids(opened.vocab_size),
        Data::Examples(labelled) => Known::Examples(sizes(labelled)),
        Data::Pairs(paired) => Known::Pairs(layers_and_dim(paired)),
    }
}

/// What `data.json` of a checkpoint says about what it was trained on.
pub fn record_of(data: &Data) -> Vec<u8> {
    let mut record = serde_json::json!({ "description": data.description(), "text_hash": data.text_hash() });
    match data {
        Data::Tokens(_) => {}
        Data::Examples(labelled) => {
            record["input"] = serde_json::json!(labelled.train.shape());
            record["classes"] = serde_json::json!(labelled.classes);
        }
        Data::Pairs(paired) => record["input"] = serde_json::json!(layers_and_dim(paired)),
    }
    format!("{record:#}\n").into_bytes()
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
    Ok(recipe.data.open_tokens(tokenizer, &options(recipe), progress)?)
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
    Ok(recipe.data.open_examples(tokenizer, &options(recipe))?)
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
