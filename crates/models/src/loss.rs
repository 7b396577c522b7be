//! What a model is told about a batch: the loss to minimise, and the sums that evaluation adds up.

use std::collections::BTreeMap;

use burn::tensor::{DType, Tensor};
use polyhead_attention::{Observation, Observe, QuerySite};
use polyhead_kernels::{CrossEntropy, Divergence, Targets, cross_entropy, divergence, in_type, linear};
use serde::{Deserialize, Serialize};

use crate::intervention::Context;
use crate::sites::{SitePlan, Tap};
use crate::{Batch, ContextMask, Decoder, Forward, Pass, head_overlap};

/// The training loss of one batch, with its named terms.
#[derive(Debug)]
pub struct Loss {
    /// `[1]`, nats: the *sum* of the cross-entropy over the targets. A mean is left to the caller, who knows how many
    /// targets the whole step has.
    pub cross_entropy: Tensor<1>,
    /// `[1]`: the mean over layers of a mechanism's auxiliary loss, unweighted; `None` without one.
    pub penalty: Option<Tensor<1>>,
    /// `[batch * seq]`, nats, without gradient: the losses of the targets, where the batch is of a mixture.
    pub of_mixture: Option<Tensor<1>>,
    /// What each layer saw, if asked for.
    pub seen: Vec<Observation>,
    /// `[1]`: the mean over layers of the overlap of heads, and its weight; `None` where it is not asked for.
    pub head_overlap: Option<(Tensor<1>, f64)>,
    /// Statistics of what was read that follow the course of training without being learned, as moving averages do; without
    /// gradients. [`Trainable::follow`](crate::Trainable::follow) takes them.
    pub found: Vec<Tensor<2>>,
}

impl Loss {
    /// A sum of cross-entropies, and nothing besides.
    pub fn of(cross_entropy: Tensor<1>) -> Self {
        Self { cross_entropy, penalty: None, of_mixture: None, seen: Vec::new(), head_overlap: None, found: Vec::new() }
    }
}

/// The sums of an evaluated batch.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Evaluated {
    /// Nats, summed over the targets.
    pub loss: f64,
    /// How many targets were the model's first choice.
    pub correct: u64,
    /// How many targets there were.
    pub targets: u64,
    /// Bytes of text that the targets stand for; 0 where the data is no text.
    pub bytes: u64,
}

impl Evaluated {
    /// Adds another batch.
    pub fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.correct += other.correct;
        self.targets += other.targets;
        self.bytes += other.bytes;
    }

    /// Nats per target.
    pub fn mean_loss(&self) -> f64 {
        self.loss / self.targets.max(1) as f64
    }

    /// Share of targets that were the model's first choice.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.targets.max(1) as f64
    }

    /// Bits per byte of text; `None` where the data is no text.
    pub fn bits_per_byte(&self) -> Option<f64> {
        (self.bytes > 0).then(|| self.loss / std::f64::consts::LN_2 / self.bytes as f64)
    }
}

/// The sums of evaluated batches of tokens.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TokenTotals {
    /// Of all targets.
    pub all: Evaluated,
    /// Of the targets of each source, where the data is a mixture.
    pub sources: BTreeMap<String, Evaluated>,
}

/// The mean over layers; `None` where no layer has one.
pub(crate) fn mean(of_layers: Vec<Tensor<1>>) -> Option<Tensor<1>> {
    let layers = of_layers.len();
    of_layers.into_iter().reduce(|a, b| a + b).map(|sum| sum / layers as f64)
}

impl Decoder {
    /// The loss of a batch, differentiable.
    pub fn loss(&self, batch: &Batch, observe: Observe) -> Loss {
        self.loss_of_pass(batch, Pass { observe, ..Pass::new(&batch.mask(ContextMask::Causal)) })
    }

    /// The loss of a batch under another mask, or with something added to the projections.
    pub fn loss_of_pass(&self, batch: &Batch, pass: Pass<'_>) -> Loss {
        let forward = self.training_pass(batch, Pass { context: Some(Context::of(batch)), ..pass });
        let out = self.predict(batch, forward.hidden);
        let of_mixture = batch.sources.as_ref().map(|_| out.losses);
        let (penalty, head_overlap) = (mean(forward.penalties), self.head_overlap(forward.taps));
        Loss { penalty, of_mixture, seen: forward.seen, head_overlap, ..Loss::of(out.sum) }
    }

    /// A pass that reads the maps of all heads where the loss has their overlap in it.
    pub(crate) fn training_pass(&self, batch: &Batch, mut pass: Pass<'_>) -> Forward {
        if self.computing.head_overlap > 0.0 {
            pass.sites.taps.extend(SitePlan::tap_all(self.layers.len(), QuerySite::Weights).taps);
        }
        self.pass(self.tokens(batch), pass)
    }

    /// `[1]`: the mean over layers of the overlap of heads, and its weight; `None` where the loss is without.
    pub(crate) fn head_overlap(&self, taps: Vec<Tap>) -> Option<(Tensor<1>, f64)> {
        let weight = Some(self.computing.head_overlap).filter(|weight| *weight > 0.0)?;
        let maps = taps.into_iter().filter(|tap| tap.site == QuerySite::Weights.into());
        mean(maps.map(|tap| head_overlap(tap.values)).collect()).map(|overlap| (overlap, weight))
    }

    /// The sums of a batch. Call it on `model.valid()`, whose forward pass keeps no tape.
    pub fn evaluate(&self, batch: &Batch) -> Evaluated {
        self.totals(batch).all
    }

    /// The same under another mask, or with something added to the projections.
    pub fn evaluate_pass(&self, batch: &Batch, pass: Pass<'_>) -> Evaluated {
        self.totals_of_pass(batch, pass).all
    }

    /// The same as [`Self::evaluate`], told apart by sources, which a masked diffusion model does not.
    pub fn totals(&self, batch: &Batch) -> TokenTotals {
        match self.is_masked_diffusion() {
            true => TokenTotals { all: self.evaluate_diffusion(batch), sources: BTreeMap::new() },
            false => self.totals_of_pass(batch, Pass::new(&batch.mask(ContextMask::Causal))),
        }
    }

    /// The same under another mask, or with something added to the projections.
    pub fn totals_of_pass(&self, batch: &Batch, pass: Pass<'_>) -> TokenTotals {
        let context = pass.context.or_else(|| Some(Context::of(batch)));
        let forward = self.pass(self.tokens(batch), Pass { context, ..pass });
        let out = self.predict(batch, forward.hidden);
        // Summed in f64 on the host, so that the result does not depend on how batches are cut.
        let (losses, correct) = (out.losses.into_data(), out.correct.into_data());
        let all = Evaluated {
            loss: losses.iter::<f64>().sum(),
            correct: correct.iter::<f64>().sum::<f64>() as u64,
            targets: batch.target_tokens(),
            bytes: batch.target_bytes,
        };
        let sources = batch.sources.as_ref().map(|sources| sources.sums(&batch.targets, losses.iter::<f64>()));
        TokenTotals { all, sources: sources.unwrap_or_default() }
    }

    /// What this model and `other` predict of a batch, beside each other. Each of them reads the batch once; `passed` is called
    /// behind each of their layers.
    pub fn compare(&self, other: &Self, batch: &Batch, passed: &mut dyn FnMut()) -> Divergence {
        /// Logits of a model at a time (32 MiB; chosen by us).
        const LOGITS: usize = 1 << 23;
        let tokens = batch.batch * batch.seq;
        let mask = batch.mask(ContextMask::Causal);
        let hidden = [self, other].map(|model| {
            let mut hidden = model.embed(model.tokens(batch));
            for layer in 0..model.layers.len() {
                let pass = Pass { context: Some(Context::of(batch)), ..Pass::new(&mask) };
                hidden = model.run_layers(layer..layer + 1, hidden, pass).hidden;
                passed();
            }
            model.normed(hidden).reshape([tokens, model.config().d_model])
        });
        let ids = &batch.targets;
        let rows = (LOGITS / self.vocab_size().max(1)).clamp(1, tokens.max(1));
        let mut sum = Divergence::default();
        for from in (0..tokens).step_by(rows) {
            let count = rows.min(tokens - from);
            let logits = |model: &Self, hidden: &Tensor<2>| {
                let hidden = hidden.clone().narrow(0, from, count);
                let [hidden, head] = model.factors(hidden);
                in_type(linear(hidden, head, None), DType::F32)
            };
            sum.add(divergence([logits(self, &hidden[0]), logits(other, &hidden[1])], &ids[from..from + count]));
        }
        sum
    }

    /// What `hidden`, `[batch, seq, d_model]` and normalised, predicts of the targets.
    pub fn predict(&self, batch: &Batch, hidden: Tensor<3>) -> CrossEntropy {
        let _span = tracing::info_span!("loss").entered();
        let hidden = hidden.reshape([batch.batch * batch.seq, self.config().d_model]);
        if self.head.as_ref().is_some_and(|head| head.bias.is_some()) {
            let [hidden, head] = self.factors(hidden);
            return cross_entropy(hidden, head, &Targets::new(&batch.targets));
        }
        cross_entropy(hidden, self.output_projection(), &Targets::new(&batch.targets))
    }
}
