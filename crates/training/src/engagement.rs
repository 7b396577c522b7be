//! How much of their attention answers spend on the start of the text, and how much on its context: FocuSFT's two
//! observations. The paper's exact definitions are not public; ours, for a layer with weights P over heads h and queries i:
//!
//! ```text
//! sink mass           mean over h, i of P[h, i, j0]               j0: the first token of the conversation
//! context engagement  mean over h, i of the sum of P[h, i, j]     j: all other tokens that are no answer
//! ```
//!
//! Queries are the tokens of answers; under `_all` those of the whole conversation. Where a mechanism subtracts maps,
//! P is the difference, and masses may be negative.

use burn::module::Module;
use polyhead_attention::{Adapter, Observe};
use polyhead_models::{Batch, ContextMask, Decoder, Pass, Role};

use crate::TrainError;
use crate::procedure::HeldOut;

/// Masses of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Engagement {
    /// From answers to the first token.
    pub sink_mass: f64,
    /// From answers to the context.
    pub context_engagement: f64,
    /// From all tokens to the first token.
    pub sink_mass_all: f64,
    /// From all tokens to the context.
    pub context_engagement_all: f64,
}

impl Engagement {
    fn named(&self) -> [(&'static str, f64); 4] {
        [
            ("sink_mass", self.sink_mass),
            ("context_engagement", self.context_engagement),
            ("sink_mass_all", self.sink_mass_all),
            ("context_engagement_all", self.context_engagement_all),
        ]
    }
}

/// The masses of every layer over a batch. Call it on `model.valid()`.
pub fn measure(model: &Decoder, batch: &Batch, context: ContextMask, adapters: &[Vec<Adapter>]) -> Vec<Engagement> {
    let mut sums = vec![Sums::default(); model.layers.len()];
    for row in (0..batch.batch).map(|index| batch.row(index)) {
        let places = Places::of(&row);
        let mask = row.mask(context);
        let pass = Pass { observe: Observe::Maps, adapters, ..Pass::new(&mask) };
        for (sums, seen) in sums.iter_mut().zip(model.pass(model.tokens(&row), pass).seen) {
            let Some(maps) = seen.maps else { continue };
            let weights: Vec<f32> = maps.into_data().iter::<f32>().collect();
            for head in weights.chunks(row.seq * row.seq) {
                places.add(head, sums);
            }
        }
    }
    sums.iter().map(Sums::means).collect()
}

/// The masses on the first held-out batch under names, where attention is looked at and the data is conversations.
///
/// # Errors
/// If the data cannot be read.
pub(crate) fn of_first_batch(
    prefix: &str,
    model: &Decoder,
    held_out: HeldOut<'_>,
    context: ContextMask,
    adapters: &[Vec<Adapter>],
) -> Result<Vec<(String, f64)>, TrainError> {
    if !held_out.observe {
        return Ok(Vec::new());
    }
    let batch = held_out.batches.batch(0)?;
    match batch.roles {
        Some(_) => Ok(named(prefix, &measure(&model.valid(), &batch, context, adapters))),
        None => Ok(Vec::new()),
    }
}

/// The masses under names: `<prefix>/layer_03/sink_mass`, and their means over the layers, `<prefix>/sink_mass`.
fn named(prefix: &str, layers: &[Engagement]) -> Vec<(String, f64)> {
    let mut all = Vec::new();
    for (name, _) in Engagement::default().named() {
        let of = |one: &Engagement| one.named().into_iter().find(|(other, _)| *other == name).map_or(0.0, |(_, x)| x);
        let mean = layers.iter().map(of).sum::<f64>() / layers.len().max(1) as f64;
        all.push((format!("{prefix}/{name}"), mean));
        let layer = |(index, one)| (format!("{prefix}/layer_{index:02}/{name}"), of(one));
        all.extend(layers.iter().enumerate().map(layer));
    }
    all
}

/// Sums over heads and queries: of answers, of all.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    counts: [f64; 2],
    sink: [f64; 2],
    context: [f64; 2],
}

impl Sums {
    fn means(&self) -> Engagement {
        let [answers, all] = self.counts.map(|count| count.max(1.0));
        Engagement {
            sink_mass: self.sink[0] / answers,
            context_engagement: self.context[0] / answers,
            sink_mass_all: self.sink[1] / all,
            context_engagement_all: self.context[1] / all,
        }
    }
}

/// What is what in a row.
struct Places {
    /// Whether a token is an answer's; `None` for padding.
    answers: Vec<Option<bool>>,
    /// The first token of each token's conversation.
    first: Vec<usize>,
    documents: Vec<u32>,
}

impl Places {
    fn of(row: &Batch) -> Self {
        let padding = |at: usize| row.roles.as_ref().is_some_and(|roles| roles[at] == Role::Padding);
        let answers = row.answers();
        let answers: Vec<_> = (0..row.seq).map(|at| (!padding(at)).then_some(answers[at])).collect();
        let documents = row.documents.clone().unwrap_or_else(|| vec![0; row.seq]);
        let first = |at: usize| (0..row.seq).find(|&j| documents[j] == documents[at] && answers[j].is_some());
        let first = (0..row.seq).map(|at| first(at).unwrap_or(at)).collect();
        Self { answers, first, documents }
    }

    /// Adds the weights of a head, `[queries, keys]`.
    fn add(&self, weights: &[f32], sums: &mut Sums) {
        let seq = self.answers.len();
        for (query, row) in weights.chunks(seq).enumerate() {
            let Some(answer) = self.answers[query] else { continue };
            let first = self.first[query];
            let is_context = |key: usize| {
                key != first && self.answers[key] == Some(false) && self.documents[key] == self.documents[query]
            };
            let context: f64 = (0..seq).filter(|&key| is_context(key)).map(|key| f64::from(row[key])).sum();
            for kind in if answer { 0..2 } else { 1..2 } {
                sums.counts[kind] += 1.0;
                sums.sink[kind] += f64::from(row[first]);
                sums.context[kind] += context;
            }
        }
    }
}
