//! Labelled examples that are found in files: checked and divided.

use std::sync::Arc;

use polyhead_models::InputShape;

use super::classes::Classes;
use crate::batches::{Example, ExampleLoader, Labelled, Order, Samples};
use crate::{Data, DataError, Opening};

/// Labelled examples that were found in files, not yet divided.
pub(super) struct Found {
    /// What they are, in words: goes before ", 10 classes".
    pub what: String,
    /// Of each example.
    pub shape: InputShape,
    /// The class of each example.
    pub labels: Vec<u32>,
    /// So many at the beginning are to train on. If these are all, some of them are held out.
    pub to_train: usize,
    /// The names of the classes.
    pub classes: Vec<String>,
    /// The key of the recipe that says where classes are, where there is one.
    pub label_field: Option<&'static str>,
    /// The names of the groups, where there are some.
    pub groups: Vec<String>,
    /// Reads an example by its number.
    pub example: Box<dyn Fn(usize) -> Result<Example, DataError> + Send + Sync>,
    /// What was left out, changed or guessed.
    pub notes: Vec<String>,
    /// Of everything that was read.
    pub hash: blake3::Hasher,
}

/// Some of the examples that were found.
struct Part {
    found: Arc<Found>,
    indices: Vec<u32>,
}

impl Samples<Example> for Part {
    fn per_epoch(&self) -> u64 {
        self.indices.len() as u64
    }

    fn sample(&self, _epoch: u64, index: u64) -> Result<Example, DataError> {
        (self.found.example)(self.indices[index as usize] as usize)
    }
}

impl Found {
    /// Checks the classes and divides the examples. `also` ends the description.
    pub(super) fn open(mut self, also: &str, opening: Opening<'_>) -> Result<Data, DataError> {
        let Opening { name, options, tokenizer, .. } = opening;
        let mut notes = std::mem::take(&mut self.notes);
        if self.to_train == 0 || self.labels.is_empty() {
            return Err(unusable!("data.{name}: no example to train on can be read; {}", notes.join("; ")));
        }
        let classes = Classes { names: &self.classes, data: name, field: self.label_field };
        notes.extend(classes.check(self.labels[..self.to_train].iter().copied())?);
        let [train, validation] = divide(self.labels.len(), self.to_train, options.validation_fraction)?;
        let mut counts = vec![0; self.classes.len()];
        train.iter().for_each(|&index| counts[self.labels[index as usize] as usize] += 1);
        let description = format!(
            "{}, {} classes: {} for training, {} for validation{also}",
            self.what,
            self.classes.len(),
            train.len(),
            validation.len()
        );
        let (classes, groups) = (self.classes.clone(), self.groups.clone());
        let is_text = matches!(self.shape, InputShape::Tokens { .. });
        let text_hash = Some(self.hash.finalize().to_hex().to_string());
        let (shape, found) = (self.shape, Arc::new(self));
        let part = |indices| Arc::new(Part { found: found.clone(), indices });
        let loader = |indices, order| ExampleLoader::new(part(indices), shape, (options, order));
        Ok(Data::Examples(Box::new(Labelled {
            train: loader(train, Order::Shuffled),
            validation: loader(validation, Order::Once),
            classes,
            counts,
            groups,
            tokenizer: is_text.then(|| tokenizer.clone()),
            description,
            notes,
            text_hash,
        })))
    }
}

/// Which of `n` examples are to train on and which to validate on: the first `to_train` and the others, or if these are all, a
/// share of them. The same whatever the seed, so that runs are compared on the same.
///
/// # Errors
/// If there are too few for both sides.
pub(crate) fn divide(n: usize, to_train: usize, fraction: f64) -> Result<[Vec<u32>; 2], DataError> {
    const KEY: u64 = 0x0064_6976_6964_6564; // "divided"
    if n > to_train {
        return Ok([(0..to_train as u32).collect(), (to_train as u32..n as u32).collect()]);
    }
    if n < 2 {
        return Err(unusable!("{n} examples cannot be both trained and validated on: give more"));
    }
    let kept = ((n as f64 * fraction).ceil() as u64).clamp(1, n as u64 - 1);
    let (validation, train) =
        (0..n as u32).partition(|&index| crate::random::permute(n as u64, KEY, u64::from(index)) < kept);
    Ok([train, validation])
}
