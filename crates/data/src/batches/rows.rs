//! Batches of rows of tokens, for decoders.

use std::ops::Range;
use std::sync::Arc;

use polyhead_models::{Batch, IGNORE, Role, Sources};

use super::{LoaderOptions, Samples, Stream};
use crate::{DataError, Tokenizer};

/// One row of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sample {
    /// Token ids, as many as the sequence is long.
    pub tokens: Vec<u32>,
    /// The id to be predicted at each position, or [`IGNORE`].
    pub targets: Vec<i64>,
    /// Which document each token belongs to, where rows hold several.
    pub documents: Option<Vec<u32>>,
    /// Whose each token is, where rows are conversations or say it of a generated task.
    pub roles: Option<Vec<Role>>,
    /// Which source each target comes from, where samples are of a mixture: numbers in [`Samples::sources`].
    pub sources: Option<Vec<u16>>,
}

/// The first samples, `most` or as many as there are, to track a model on: as in training, without padding.
pub(crate) fn first_rows(samples: &dyn Samples, most: u64) -> Result<Vec<Batch>, DataError> {
    let row = |index: u64| {
        let Sample { mut tokens, mut targets, mut documents, mut roles, .. } = samples.sample(0, index)?;
        let filled = roles.as_ref().and_then(|roles| roles.iter().rposition(|&role| role != Role::Padding));
        let seq = filled.map_or(tokens.len(), |last| last + 1);
        tokens.truncate(seq);
        targets.truncate(seq);
        documents.iter_mut().for_each(|documents| documents.truncate(seq));
        roles.iter_mut().for_each(|roles| roles.truncate(seq));
        Ok(Batch { batch: 1, seq, tokens, targets, documents, roles, ..Batch::default() })
    };
    (0..most.min(samples.per_epoch())).map(row).collect()
}

/// Batches of rows by position.
#[derive(Clone)]
pub struct Loader {
    stream: Stream<Sample>,
    token_bytes: Option<Arc<[u32]>>,
}

impl Loader {
    /// A loader over `samples`; `token_bytes` says how many bytes of text each id stands for, where the data is text.
    pub fn new(samples: Arc<dyn Samples>, token_bytes: Option<Vec<u32>>, options: LoaderOptions) -> Self {
        Self { stream: Stream { samples, options }, token_bytes: token_bytes.map(Into::into) }
    }

    /// Samples of an epoch.
    pub fn per_epoch(&self) -> u64 {
        self.stream.samples.per_epoch()
    }

    /// Batches until every sample has come once.
    pub fn batches_per_epoch(&self) -> u64 {
        self.stream.batches_per_epoch()
    }

    /// Its parts by name, each with its batches of the first epoch; empty where samples have none.
    pub fn parts(&self) -> Vec<(String, Range<u64>)> {
        let parts = self.stream.samples.parts();
        let mut first = 0;
        let range = |batches: u64| {
            first += batches;
            first - batches..first
        };
        let ranges: Vec<Range<u64>> = self.stream.options.batches(&parts).into_iter().map(range).collect();
        let named = parts.into_iter().zip(ranges).map(|((name, _), range)| (name, range));
        named.filter(|(name, _)| !name.is_empty()).collect()
    }

    /// Batch number `position` since the start.
    ///
    /// # Errors
    /// If a sample cannot be read, samples do not fit together, or there are none.
    pub fn batch(&self, position: u64) -> Result<Batch, DataError> {
        let rows = self.stream.batch(position)?;
        let first = &rows[0];
        let mut batch = Batch {
            batch: rows.len(),
            seq: first.tokens.len(),
            documents: first.documents.as_ref().map(|_| Vec::new()),
            roles: first.roles.as_ref().map(|_| Vec::new()),
            sources: first.sources.as_ref().map(|_| Sources { names: self.stream.samples.sources(), of: Vec::new() }),
            ..Batch::default()
        };
        let numbers = self.stream.options.rows(&self.stream.samples.parts(), position);
        for (number, row) in numbers.zip(rows) {
            fits(&row, &batch, number)?;
            batch.tokens.extend(row.tokens);
            batch.targets.extend(row.targets);
            batch.documents.iter_mut().zip(row.documents).for_each(|(all, own)| all.extend(own));
            batch.roles.iter_mut().zip(row.roles).for_each(|(all, own)| all.extend(own));
            batch.sources.iter_mut().zip(row.sources).for_each(|(all, own)| all.of.extend(own));
        }
        if let Some(bytes) = &self.token_bytes {
            for &target in batch.targets.iter().filter(|&&target| target != IGNORE) {
                let known = usize::try_from(target).ok().and_then(|id| bytes.get(id));
                batch.target_bytes += u64::from(*known.ok_or_else(|| {
                    let most = bytes.len();
                    unusable!("target {target} is not below the vocabulary size ({most})")
                })?);
            }
        }
        Ok(batch)
    }
}

/// Rows come from any set of samples, so that their shapes are not certain.
fn fits(row: &Sample, batch: &Batch, number: u64) -> Result<(), DataError> {
    let problem = |problem: String| Err(unusable!("sample {number}: {problem}"));
    let (tokens, seq) = (row.tokens.len(), batch.seq);
    if tokens != seq || tokens == 0 {
        return problem(format!("{tokens} tokens in a batch of rows of {seq}: pad or cut samples to one length"));
    }
    if row.targets.len() != tokens {
        return problem(format!("{} targets for {tokens} tokens: give one each, or {IGNORE}", row.targets.len()));
    }
    if row.documents.is_some() != batch.documents.is_some() {
        return problem("documents are given for some samples only: give them for all or for none".into());
    }
    if row.roles.is_some() != batch.roles.is_some() {
        return problem("roles are given for some samples only: give them for all or for none".into());
    }
    match (&row.documents, &row.roles) {
        (Some(documents), _) if documents.len() != tokens => {
            problem(format!("{} document ids for {tokens} tokens: give one each", documents.len()))
        }
        (_, Some(roles)) if roles.len() != tokens => {
            problem(format!("{} roles for {tokens} tokens: give one each", roles.len()))
        }
        _ => Ok(()),
    }
}

/// Rows of tokens, ready to use.
pub struct Opened {
    /// Batches to train on, without end.
    pub train: Loader,
    /// Batches to validate on.
    pub validation: Loader,
    /// Texts to track a model on, a batch of one row each, without padding; empty where nobody does.
    pub tracking: Vec<Batch>,
    /// For text.
    pub tokenizer: Option<Tokenizer>,
    /// Ids that occur.
    pub vocab_size: usize,
    /// What the data is, in words.
    pub description: String,
    /// What else there is to know before training on it.
    pub notes: Vec<String>,
    /// For text: a hash of the texts and the tokenizer, which tells whether files have changed.
    pub text_hash: Option<String>,
    /// The lowest loss that any model can reach, in nats per target, where it is known.
    pub floor: Option<f64>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Order;

    impl Samples for Vec<Sample> {
        fn per_epoch(&self) -> u64 {
            self.len() as u64
        }

        fn sample(&self, _epoch: u64, index: u64) -> Result<Sample, DataError> {
            Ok(self[index as usize].clone())
        }
    }

    fn loader(n: u32, batch_size: usize, order: Order) -> Loader {
        let sample = |i| Sample { tokens: vec![i], targets: vec![i64::from(i)], ..Sample::default() };
        let set: Vec<Sample> = (0..n).map(sample).collect();
        Loader::new(Arc::new(set), Some(vec![1; 100]), LoaderOptions { batch_size, seed: 5, order })
    }

    #[test]
    fn an_epoch_holds_every_sample_once_even_across_batches() {
        let loader = loader(10, 4, Order::Shuffled);
        let tokens: Vec<u32> = (0..5).flat_map(|p| loader.batch(p).unwrap().tokens).collect();
        for epoch in tokens.chunks(10) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(tokens[..10], tokens[10..]);
    }

    #[test]
    fn a_batch_depends_on_its_position_only() {
        let (a, b) = (loader(10, 4, Order::Shuffled), loader(10, 4, Order::Shuffled));
        let late = a.batch(7).unwrap();
        assert_eq!(late, b.batch(7).unwrap());
        assert_eq!(late.target_bytes, 4);
        assert_eq!(loader(10, 4, Order::Endless).batch(0).unwrap().tokens, [0, 1, 2, 3]);
    }

    #[test]
    fn what_is_validated_on_counts_once() {
        let once = loader(10, 4, Order::Once);
        let tokens: Vec<u32> = (0..once.batches_per_epoch()).flat_map(|at| once.batch(at).unwrap().tokens).collect();
        assert_eq!(tokens, (0..10).collect::<Vec<_>>());
        assert_eq!(once.batch(2).unwrap().batch, 2);
        let endless = loader(10, 4, Order::Endless);
        assert_eq!(endless.batch(2).unwrap().tokens, [8, 9, 0, 1]);
    }

    #[test]
    fn batches_end_where_parts_do() {
        struct InParts(Vec<Sample>);
        impl Samples for InParts {
            fn per_epoch(&self) -> u64 {
                self.0.len() as u64
            }

            fn sample(&self, epoch: u64, index: u64) -> Result<Sample, DataError> {
                self.0.sample(epoch, index)
            }

            fn parts(&self) -> Vec<(String, u64)> {
                vec![("short".into(), 3), ("long".into(), self.per_epoch() - 3)]
            }
        }
        // Rows of two lengths, which make no batch together.
        let sample = |i: u32| Sample {
            tokens: vec![i; 1 + (i as usize / 3)],
            targets: vec![0; 1 + (i as usize / 3)],
            ..Sample::default()
        };
        let loader = |order| {
            let options = LoaderOptions { batch_size: 2, seed: 0, order };
            Loader::new(Arc::new(InParts((0..6).map(sample).collect())), None, options)
        };
        let epochs = loader(Order::Parts);
        let first = |at: u64| epochs.batch(at).unwrap().row(0).tokens[0];
        assert_eq!(epochs.parts(), [("short".to_owned(), 0..2), ("long".to_owned(), 2..4)]);
        assert_eq!((epochs.batches_per_epoch(), epochs.batch(1).unwrap().batch), (4, 1));
        assert_eq!((0..6).map(first).collect::<Vec<_>>(), [0, 2, 3, 5, 0, 2], "and again");
        assert_eq!(loader(Order::Once).batch(7).unwrap(), epochs.batch(3).unwrap());
    }

    #[test]
    fn samples_that_make_no_batch_are_refused() {
        let sample = |tokens: usize, target: i64, documents: Option<usize>| Sample {
            tokens: vec![0; tokens],
            targets: vec![target; tokens],
            documents: documents.map(|count| vec![0; count]),
            ..Sample::default()
        };
        let message = |samples: Vec<Sample>, batch_size: usize| {
            let options = LoaderOptions { batch_size, seed: 5, order: Order::Endless };
            let loader = Loader::new(Arc::new(samples), Some(vec![1; 3]), options);
            assert!(loader.batches_per_epoch() <= 2);
            loader.batch(0).unwrap_err().to_string()
        };
        let mut short = sample(2, 0, None);
        short.targets.pop();
        let cases = [
            (vec![], 2, "empty"),
            (vec![sample(2, 0, None)], 0, "batch_size (0)"),
            (vec![sample(0, 0, None)], 1, "0 tokens"),
            (vec![sample(2, 0, None), sample(3, 0, None)], 2, "sample 1: 3 tokens"),
            (vec![short], 1, "1 targets for 2 tokens"),
            (vec![sample(2, 0, None), sample(2, 0, Some(2))], 2, "for all or for none"),
            (vec![sample(2, 0, Some(2)), sample(2, 0, None)], 2, "for all or for none"),
            (vec![sample(2, 0, Some(1))], 1, "1 document ids"),
            (vec![sample(2, 3, None)], 1, "target 3"),
            (vec![sample(2, -1, None)], 1, "target -1"),
        ];
        for (samples, batch_size, words) in cases {
            let message = message(samples, batch_size);
            assert!(message.contains(words), "{message}");
        }
    }
}
