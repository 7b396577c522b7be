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
use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::{Adapter, Observe};
use polyhead_models::{Batch, Classifier, ContextMask, Decoder, Embedder, Pass, Role, SuperResolution, Trainable};

use crate::TrainError;
use crate::procedure::HeldOut;

/// A model whose attention plain training may watch.
pub trait WatchesAttention: Trainable {
    /// What plain training measures of attention with each validation, under names that begin with `prefix`.
    ///
    /// # Errors
    /// If the data cannot be read.
    fn engagement(
        &self,
        prefix: &str,
        held_out: HeldOut<'_, Self>,
        context: ContextMask,
    ) -> Result<Vec<(String, f64)>, TrainError> {
        let _ = (prefix, held_out, context);
        Ok(Vec::new())
    }
}

impl WatchesAttention for Decoder {
    fn engagement(
        &self,
        prefix: &str,
        held_out: HeldOut<'_>,
        context: ContextMask,
    ) -> Result<Vec<(String, f64)>, TrainError> {
        of_first_batch(prefix, self, held_out, context, &[])
    }
}

impl WatchesAttention for Classifier {}
impl WatchesAttention for Embedder {}
impl WatchesAttention for SuperResolution {}

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
    let places = Places::of(batch);
    let mask = batch.mask(context);
    let observe = Observe::Spans(places.spans(&model.device()).into());
    let seen = model.pass(model.tokens(batch), Pass { observe, adapters, ..Pass::new(&mask) }).seen;
    seen.into_iter().map(|seen| seen.span_mass.map_or_else(Engagement::default, |mass| places.means(mass))).collect()
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

/// What is what in a batch, `[batch, seq]`.
struct Places {
    seq: usize,
    kinds: Vec<Kind>,
}

/// What a token is to the masses. Those of other conversations need no telling apart: nobody sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Padding,
    /// The first of its conversation.
    First {
        answer: bool,
    },
    Context,
    Answer,
}

impl Places {
    fn of(batch: &Batch) -> Self {
        let answers = batch.answers();
        let mut last_seen = None; // row and document of the last token that is no padding
        let kind = |at: usize| {
            if batch.roles.as_ref().is_some_and(|roles| roles[at] == Role::Padding) {
                return Kind::Padding;
            }
            let conversation = (at / batch.seq, batch.documents.as_ref().map(|documents| documents[at]));
            match (last_seen.replace(conversation) == Some(conversation), answers[at]) {
                (false, answer) => Kind::First { answer },
                (true, true) => Kind::Answer,
                (true, false) => Kind::Context,
            }
        };
        Self { seq: batch.seq, kinds: (0..answers.len()).map(kind).collect() }
    }

    /// `[batch, seq, 2]`: first tokens; the rest of the context.
    fn spans(&self, device: &Device) -> Tensor<3> {
        let of = |kind: &Kind| [matches!(kind, Kind::First { .. }), *kind == Kind::Context].map(f32::from);
        let spans: Vec<f32> = self.kinds.iter().flat_map(of).collect();
        Tensor::from_data(TensorData::new(spans, [self.kinds.len() / self.seq, self.seq, 2]), device)
    }

    /// The means over heads and queries of what each query gives to the spans, `[batch, heads, seq, 2]`.
    fn means(&self, mass: Tensor<4>) -> Engagement {
        let mass: Vec<f32> = mass.mean_dim(1).into_data().iter().collect(); // [batch, 1, seq, 2]
        let mean = |span: usize, counts: fn(Kind) -> bool| {
            let of = |(kind, mass): (&Kind, &[f32])| counts(*kind).then_some(f64::from(mass[span]));
            let all: Vec<f64> = self.kinds.iter().zip(mass.chunks(2)).filter_map(of).collect();
            all.iter().sum::<f64>() / all.len().max(1) as f64
        };
        let answer = |kind| matches!(kind, Kind::Answer | Kind::First { answer: true });
        let all = |kind| kind != Kind::Padding;
        Engagement {
            sink_mass: mean(0, answer),
            context_engagement: mean(1, answer),
            sink_mass_all: mean(0, all),
            context_engagement_all: mean(1, all),
        }
    }
}
