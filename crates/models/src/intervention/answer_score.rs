//! What a model predicts where something is asked for, as a search for an intervention measures it.

use std::cmp::Ordering;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor, TensorData};
use polyhead_attention::Edit;
use serde::Serialize;

use super::Context;
use crate::sites::SitePlan;
use crate::{Batch, ContextMask, Decoder, IGNORE, Pass};

/// By what predictions are better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// The largest accuracy, then the smallest loss.
    Accuracy,
    /// The smallest entropy of what is predicted.
    Entropy,
}

/// What a model predicts where something is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct AnswerScore {
    /// Nats per target.
    pub loss: f64,
    /// The share that was the first choice.
    pub accuracy: f64,
    /// Nats per target: mean entropy of the distributions.
    pub entropy: f64,
}

impl By {
    /// Larger is better; compared in this order.
    fn of(self, score: &AnswerScore) -> [f64; 2] {
        match self {
            Self::Accuracy => [score.accuracy, -score.loss],
            Self::Entropy => [-score.entropy, 0.0],
        }
    }

    /// The better one is greater.
    pub fn compare(self, a: &AnswerScore, b: &AnswerScore) -> Ordering {
        let ([a, b], [c, d]) = (self.of(a), self.of(b));
        a.total_cmp(&c).then(b.total_cmp(&d))
    }
}

/// What a model predicts under edits besides its own, which are made for the tokens of each batch.
pub fn answer_score(
    model: &Decoder,
    batches: &[Batch],
    edits: &dyn Fn(&Context<'_>) -> Vec<(usize, Edit)>,
) -> AnswerScore {
    let (mut sums, mut targets) = ([0.0; 3], 0);
    for batch in batches {
        let (mask, context) = (batch.mask(ContextMask::Causal), Context::of(batch));
        let sites = SitePlan { edits: edits(&context), taps: Vec::new() };
        let pass = Pass { sites, context: Some(context), ..Pass::new(&mask) };
        let hidden = model.pass(model.tokens(batch), pass).hidden;
        let [rows, seq, d_model] = hidden.dims();
        let hidden = hidden.reshape([rows * seq, d_model]);
        let asked: Vec<usize> = (0..rows * seq).filter(|&at| batch.targets[at] != IGNORE).collect();
        for part in asked.chunks(PART) {
            let ids =
                |values: Vec<i32>| Tensor::<1, Int>::from_data(TensorData::new(values, [part.len()]), &model.device());
            let own = hidden.clone().select(0, ids(part.iter().map(|&at| at as i32).collect()));
            let log = log_softmax(model.logits(own.unsqueeze_dim::<3>(0)).squeeze_dim::<2>(0), 1);
            let wanted = ids(part.iter().map(|&at| batch.targets[at] as i32).collect()).unsqueeze_dim::<2>(1);
            let right = log.clone().argmax(1).equal(wanted.clone()).float();
            let entropy = (log.clone().exp() * log.clone()).neg();
            for (sum, values) in sums.iter_mut().zip([log.gather(1, wanted).neg(), right, entropy]) {
                *sum += values.into_data().iter::<f64>().sum::<f64>();
            }
        }
        targets += asked.len();
    }
    let [loss, accuracy, entropy] = sums.map(|sum| sum / targets.max(1) as f64);
    AnswerScore { loss, accuracy, entropy }
}

/// Targets whose logits are made at a time; chosen by us.
const PART: usize = 1024;
