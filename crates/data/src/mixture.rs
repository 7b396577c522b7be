//! `[[data.source]]`: texts of several sources in exact shares, mixed before they are packed into rows.
//!
//! In an epoch each source gives its share of the tokens, to the token. Its documents come in an order that seed and epoch choose,
//! again from the first where there are too few. They are laid into one stream at even distances, so that every beginning of an
//! epoch has the shares too, but for a document of each source; and rows are cut from that stream, in its order. A mixture in which
//! one source alone has a weight is that source, row for row.

mod config;
mod held_out;

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use polyhead_models::Batch;

pub use config::{LastDocument, MixedSource, MixtureConfig, Until};

use crate::batches::{Loader, LoaderOptions, Opened, Order, Sample, Samples};
use crate::documents::{Split, TokenFile, Tokenized, Windows, split};
use crate::options::{OpenOptions, Packing};
use crate::problem::{Problem, require};
use crate::random::{mix, permute};
use crate::source::{Source, texts_of};
use crate::texts::Documents;
use crate::{Data, DataError, Opening};
use held_out::HeldOut;

/// Documents of more rows than this are cut, so that one of them does not fill batch after batch; chosen by us.
const LONGEST_PIECE: u64 = 4;
/// Documents of an epoch; more are a mistake in the weights, and would not fit into memory. Chosen by us.
const MOST_DOCUMENTS: f64 = (1u64 << 26) as f64;

impl Source for MixtureConfig {
    fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        require(!self.source.is_empty(), "source", || {
            "data.source is empty: give at least one [[data.source]]".into()
        })?;
        for (at, source) in self.source.iter().enumerate() {
            source.validate(seq_len).map_err(|error| error.within(&format!("source.{at}")))?;
            let name = source.name();
            let again = self.source[..at].iter().any(|other| other.name() == name);
            require(!again, &format!("source.{at}"), || {
                format!("two sources are called \"{name}\": give one of them another name")
            })?;
        }
        let weighed = self.source.iter().any(|source| source.weight > 0.0);
        require(weighed, "source", || "every source has weight 0: give at least one a weight above 0".into())?;
        let row = seq_len as u64 + 1;
        let enough = !matches!(self.until, Until::Tokens(tokens) if tokens < row);
        require(enough, "until", || {
            format!("data.until ({}) must be at least the tokens of a row, training.seq_len + 1 = {row}", self.until)
        })
    }

    fn paths(&self) -> Vec<String> {
        self.source.iter().flat_map(|source| source.table().1.paths()).collect()
    }

    fn documents(&self, project_root: &Path) -> Result<Option<Documents>, DataError> {
        let own = |source: &MixedSource| Ok(source.documents(project_root)?.to_train());
        let all = self.source.iter().map(own).collect::<Result<Vec<_>, DataError>>()?;
        Ok(all.into_iter().reduce(Documents::and))
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let Opening { tokenizer, options, progress, .. } = opening;
        let (mut parts, mut pieces, mut notes, mut tracking) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut key = blake3::Hasher::new();
        let (fraction, most) = options.tracking.map_or((0.0, 0), |tracking| (tracking.fraction, tracking.texts));
        for source in &self.source {
            let documents = source.documents(&options.project_root)?;
            let named = |error: DataError| unusable!("data.source \"{}\": {error}", source.name());
            let Tokenized { file, contents, pieces: own } =
                TokenFile::open_or_build(&documents, tokenizer, &options.cache_dir, progress)?;
            let split = split(&file, contents.held_out, options.validation_fraction, fraction).map_err(named)?;
            let each = most.div_ceil(self.source.len());
            tracking.extend(file.texts(&split.tracking, options.seq_len, each)?.into_iter().map(Batch::text));
            key.update(source.name().as_bytes()).update(file.key().as_bytes());
            notes.extend(contents.notes);
            pieces.extend(own);
            parts.push(Part { name: source.name().to_owned(), weight: source.weight, file, split });
        }
        tracking.truncate(most);
        let (bytes, note) = tokenizer.token_bytes_of(pieces.iter().map(String::as_str));
        let loader =
            |samples: Arc<dyn Samples>, order| Loader::new(samples, bytes.clone(), LoaderOptions::of(options, order));
        let names: Arc<[String]> = parts.iter().map(|part| part.name.clone()).collect();
        let held_out = HeldOut::new(&parts, &names, options)?;
        let weighed: Vec<usize> = (0..parts.len()).filter(|&part| parts[part].weight > 0.0).collect();
        let (train, description) = match (&weighed[..], &self.until) {
            (&[alone], Until::FirstExhausted | Until::AllExhausted) => {
                let ranges = &parts[alone].split.train;
                let rows = rows_of(&parts, (alone, ranges), &names, options, Some(options.seed))?;
                (loader(Arc::new(rows), Order::Shuffled), format!("{} alone", parts[alone].name))
            }
            _ => {
                let mixture = Mixture::new(parts, names, self, options)?;
                notes.extend(mixture.repeats());
                let description = mixture.description();
                (loader(Arc::new(mixture), Order::Endless), description)
            }
        };
        Ok(Data::Tokens(Box::new(Opened {
            train,
            validation: loader(Arc::new(held_out), Order::Once),
            tracking,
            vocab_size: tokenizer.vocab_size(),
            tokenizer: Some(tokenizer.clone()),
            description: format!("mixture: {description}"),
            notes: notes.into_iter().chain(note).collect(),
            text_hash: Some(key.finalize().to_hex()[..24].to_owned()),
            floor: None,
        })))
    }
}

impl MixedSource {
    fn documents(&self, project_root: &Path) -> Result<Documents, DataError> {
        let (name, source) = self.table();
        texts_of(source, name, project_root)
    }
}

/// A source, tokenized and split.
struct Part {
    name: String,
    weight: f64,
    file: Arc<TokenFile>,
    split: Split,
}

impl Part {
    /// Tokens to train on.
    fn tokens(&self) -> u64 {
        self.split.train.iter().map(|range| range.end - range.start).sum()
    }

    fn about(&self, error: DataError) -> DataError {
        unusable!("data.source \"{}\": {error}", self.name)
    }
}

/// The rows of one source, cut from these ranges of its tokens; see [`Windows::new`].
fn rows_of(
    parts: &[Part],
    (number, ranges): (usize, &[Range<u64>]),
    names: &Arc<[String]>,
    options: &OpenOptions,
    seed: Option<u64>,
) -> Result<Windows, DataError> {
    let ranges = ranges.iter().map(|range| (number as u16, range.clone())).collect();
    Windows::of_mixture(files(parts), ranges, names.clone(), (options.seq_len, options.packing, seed))
        .map_err(|error| parts[number].about(error))
}

fn files(parts: &[Part]) -> Vec<Arc<TokenFile>> {
    parts.iter().map(|part| part.file.clone()).collect()
}

/// The rows of a mixture, epoch by epoch.
struct Mixture {
    parts: Vec<Part>,
    names: Arc<[String]>,
    /// Tokens that each source gives to an epoch; of whole documents, at about which it stops.
    quotas: Vec<u64>,
    last_document: LastDocument,
    row: (usize, Packing),
    seed: u64,
    per_epoch: u64,
    /// The rows of the epoch that was asked for last.
    epoch: Mutex<(u64, Arc<Windows>)>,
}

impl Mixture {
    fn new(
        parts: Vec<Part>,
        names: Arc<[String]>,
        config: &MixtureConfig,
        options: &OpenOptions,
    ) -> Result<Self, DataError> {
        let quotas = quotas_of(&parts, config.until, options.seq_len)?;
        let row = (options.seq_len, options.packing);
        let (seed, last_document) = (options.seed, config.last_document);
        let rows = Arc::new(rows_of_epoch(&parts, &quotas, last_document, (seed, 0), &names, row)?);
        let per_epoch = rows.per_epoch();
        Ok(Self { parts, names, quotas, last_document, row, seed, per_epoch, epoch: Mutex::new((0, rows)) })
    }

    /// The rows of an epoch.
    fn rows(&self, epoch: u64) -> Result<Arc<Windows>, DataError> {
        // Whole documents in another order would make an epoch of another length.
        let epoch = if self.last_document == LastDocument::Cut { epoch } else { 0 };
        let mut known = self.epoch.lock().unwrap_or_else(PoisonError::into_inner);
        if known.0 != epoch {
            let place = (self.seed, epoch);
            let rows = rows_of_epoch(&self.parts, &self.quotas, self.last_document, place, &self.names, self.row)?;
            *known = (epoch, Arc::new(rows));
        }
        Ok(known.1.clone())
    }

    /// Tokens of each source in the first epoch, and in all.
    fn realised(&self) -> (Vec<u64>, u64) {
        let known = self.epoch.lock().unwrap_or_else(PoisonError::into_inner);
        let tokens = known.1.tokens_by_source(self.parts.len());
        let all = tokens.iter().sum();
        (tokens, all)
    }

    fn description(&self) -> String {
        let (tokens, all) = self.realised();
        let share = |(part, tokens): (&Part, &u64)| {
            let percent = 100.0 * *tokens as f64 / all.max(1) as f64;
            format!("{} {percent:.2} % ({tokens} tokens of {})", part.name, part.tokens())
        };
        let shares: Vec<String> = self.parts.iter().zip(&tokens).map(share).collect();
        format!("{}; {all} tokens an epoch", shares.join(", "))
    }

    /// Which sources come again within an epoch.
    fn repeats(&self) -> Option<String> {
        let times = |part: &Part, quota: u64| quota as f64 / part.tokens().max(1) as f64;
        let often = self.parts.iter().zip(&self.quotas).map(|(part, &quota)| (&part.name, times(part, quota)));
        let often: Vec<String> = often
            .filter(|(_, times)| *times > 1.0)
            .map(|(name, times)| format!("{name} is read {times:.2} times"))
            .collect();
        (!often.is_empty()).then(|| format!("in an epoch {}", often.join(", ")))
    }
}

impl Samples for Mixture {
    fn per_epoch(&self) -> u64 {
        self.per_epoch
    }

    fn sample(&self, epoch: u64, index: u64) -> Result<Sample, DataError> {
        self.rows(epoch)?.sample(0, index)
    }

    fn sources(&self) -> Arc<[String]> {
        self.names.clone()
    }
}

/// Tokens that each source gives to an epoch, which is a whole number of rows and the target of the last token.
fn quotas_of(parts: &[Part], until: Until, seq_len: usize) -> Result<Vec<u64>, DataError> {
    let weights: Vec<f64> = parts.iter().map(|part| part.weight).collect();
    let sum: f64 = weights.iter().sum();
    let weighed = || parts.iter().filter(|part| part.weight > 0.0);
    let until_it_ends = |part: &Part| part.tokens() as f64 * sum / part.weight;
    let tokens = match until {
        Until::FirstExhausted => weighed().map(until_it_ends).fold(f64::INFINITY, f64::min).floor(),
        Until::AllExhausted => weighed().map(until_it_ends).fold(0.0, f64::max).ceil(),
        Until::Tokens(tokens) => tokens as f64,
    };
    for part in weighed() {
        let times = tokens * part.weight / sum / part.tokens() as f64;
        if times * part.split.train.len() as f64 > MOST_DOCUMENTS {
            return Err(unusable!(
                "data.source \"{}\" would be read {times:.0} times in an epoch of {tokens:.0} tokens: raise its weight, or set \
                 data.until to fewer tokens",
                part.name
            ));
        }
    }
    let rows = (tokens as u64).saturating_sub(1) / seq_len as u64;
    if rows == 0 {
        return Err(unusable!(
            "an epoch of the mixture has {tokens:.0} tokens, but a row takes training.seq_len + 1 = {}: give more text, a smaller \
             seq_len, other weights or data.until = \"all_exhausted\"",
            seq_len + 1
        ));
    }
    Ok(quotas(&weights, rows * seq_len as u64 + 1))
}

/// `total` divided by weights: rounded down, and what is left to those that lose the most by it.
pub fn quotas(weights: &[f64], total: u64) -> Vec<u64> {
    let sum: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|weight| total as f64 * weight / sum).collect();
    let mut quotas: Vec<u64> = exact.iter().map(|share| share.floor() as u64).collect();
    let mut order: Vec<usize> = (0..weights.len()).filter(|&at| weights[at] > 0.0).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
    let left = total.saturating_sub(quotas.iter().sum());
    order.iter().take(left as usize).for_each(|&at| quotas[at] += 1);
    quotas
}

/// How many tokens of each document, from the first on, a source of `cap` tokens takes.
pub fn documents_within(lengths: impl Iterator<Item = u64>, cap: u64, rule: LastDocument) -> Vec<u64> {
    let (mut taken, mut sum) = (Vec::new(), 0);
    for length in lengths {
        let done = match rule {
            LastDocument::Cut => sum == cap,
            LastDocument::LeaveOut => sum + length > cap,
            LastDocument::Overshoot => cap == 0 || sum > cap,
        };
        if done {
            break;
        }
        let tokens = if rule == LastDocument::Cut { length.min(cap - sum) } else { length };
        sum += tokens;
        taken.push(tokens);
    }
    taken
}

/// The documents of an epoch as one stream, cut into rows.
fn rows_of_epoch(
    parts: &[Part],
    quotas: &[u64],
    rule: LastDocument,
    (seed, epoch): (u64, u64),
    names: &Arc<[String]>,
    (seq_len, packing): (usize, Packing),
) -> Result<Windows, DataError> {
    let longest = LONGEST_PIECE * seq_len as u64;
    // Where in the epoch a piece comes, its source, and its tokens.
    let mut pieces: Vec<(f64, u16, Range<u64>)> = Vec::new();
    for (number, (part, &quota)) in parts.iter().zip(quotas).enumerate().filter(|(_, (_, quota))| **quota > 0) {
        let (ranges, key) = (&part.split.train, mix(mix(seed, number as u64), epoch));
        let count = ranges.len() as u64;
        let place = |at: u64| permute(count, mix(key, at / count), at % count) as usize;
        let lengths = (0..).map(|at| ranges[place(at)].end - ranges[place(at)].start);
        let taken = documents_within(lengths, quota, rule);
        let (all, mut before) = (taken.iter().sum::<u64>() as f64, 0);
        for (at, tokens) in (0..).zip(taken) {
            let start = ranges[place(at)].start;
            for from in (start..start + tokens).step_by(longest as usize) {
                let piece = from..(from + longest).min(start + tokens);
                let length = piece.end - piece.start;
                pieces.push(((before as f64 + length as f64 / 2.0) / all, number as u16, piece));
                before += length;
            }
        }
    }
    pieces.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let ranges = pieces.into_iter().map(|(_, source, piece)| (source, piece)).collect();
    Windows::of_mixture(files(parts), ranges, names.clone(), (seq_len, packing, None))
}

#[cfg(test)]
mod tests;
