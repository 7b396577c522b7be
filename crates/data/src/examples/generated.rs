//! Labelled examples that are generated.

use std::sync::Arc;

use polyhead_models::InputShape;
use rand_chacha::ChaCha8Rng;

use crate::batches::{Content, Example, ExampleLoader, Labelled, Order, Samples};
use crate::synthetic::{EPOCH, Side};
use crate::{Data, DataError, Opening};

/// Generated examples of one side.
pub(super) struct Drawn<T> {
    /// What makes examples.
    pub task: T,
    /// Decides all of them.
    pub seed: u64,
    /// Training or validation.
    pub side: Side,
    /// Examples of an epoch.
    pub samples: u64,
}

/// A way of making examples.
pub(super) trait Maker: Clone + Send + Sync + 'static {
    /// The shape of an input.
    fn shape(&self) -> InputShape;

    /// The names of the classes.
    fn classes(&self) -> Vec<String>;

    /// The names of the groups, where there are some.
    fn groups(&self) -> Vec<String> {
        Vec::new()
    }

    /// The group of an example of a class, drawn before the example is.
    fn group(&self, _class: usize, _rng: &mut ChaCha8Rng) -> usize {
        0
    }

    /// An example of a class and a group.
    fn make(&self, class: usize, group: usize, rng: &mut ChaCha8Rng) -> Vec<f32>;
}

impl<T: Maker> Samples<Example> for Drawn<T> {
    fn per_epoch(&self) -> u64 {
        self.samples
    }

    /// Classes take turns, so that any stretch of examples has all of them equally often.
    fn sample(&self, _epoch: u64, index: u64) -> Result<Example, DataError> {
        let class = (index % self.task.classes().len() as u64) as usize;
        let mut rng = self.side.rng(self.seed, index);
        let group = self.task.group(class, &mut rng);
        let content = Content::Numbers(self.task.make(class, group, &mut rng));
        Ok(Example { content, label: class as u32, group: group as u32 })
    }
}

/// Generated examples: new ones without end, or `samples` of them again and again. `what` describes them.
pub(super) fn generated(
    task: impl Maker,
    what: &str,
    samples: Option<u64>,
    opening: Opening<'_>,
) -> Result<Data, DataError> {
    let (options, seed, classes) = (opening.options, opening.options.seed, task.classes());
    let (n, in_all) = (classes.len() as u64, samples.unwrap_or(EPOCH));
    let held_out = options.validation_samples.max(1);
    let loader = |side, samples, order| {
        let drawn = Drawn { task: task.clone(), seed, side, samples };
        ExampleLoader::new(Arc::new(drawn), task.shape(), (options, order))
    };
    let order = if samples.is_some() { Order::Shuffled } else { Order::Endless };
    let count = samples.map_or("new samples without end".into(), |samples| format!("{samples} samples to train on"));
    Ok(Data::Examples(Box::new(Labelled {
        train: loader(Side::Train, in_all, order),
        validation: loader(Side::Validation(held_out), held_out, Order::Once),
        counts: (0..n).map(|class| (in_all + n - 1 - class) / n).collect(),
        description: format!("generated: {what}, {n} classes, {count}"),
        classes,
        groups: task.groups(),
        tokenizer: None,
        notes: Vec::new(),
        text_hash: None,
    })))
}
