//! What a change of a model does to its predictions: loss, accuracy, and the distance from what it said before.

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use polyhead_models::{Batch, Decoder, IGNORE};

/// Of some predictions.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Predictions {
    /// Nats per token.
    pub loss: f64,
    /// The share that was the first choice.
    pub accuracy: f64,
    /// Nats per token: KL(clean || changed).
    pub kl: f64,
}

impl Predictions {
    /// Adds those of a text, times its share of all targets.
    pub(crate) fn add(&mut self, of_text: &Self, share: f64) {
        self.loss += share * of_text.loss;
        self.accuracy += share * of_text.accuracy;
        self.kl += share * of_text.kl;
    }
}

/// Compares what was predicted, `[batch, seq, vocab]` logits, with the tokens that follow, `[batch, seq]`, and with the clean logits.
/// Nothing follows the last position, which is left out.
pub fn predictions(clean: &Tensor<3>, changed: &Tensor<3>, tokens: &Tensor<2, Int>) -> Predictions {
    let [batch, seq, vocab] = changed.dims();
    let before = |logits: &Tensor<3>| logits.clone().narrow(1, 0, seq - 1).reshape([batch * (seq - 1), vocab]);
    let targets = tokens.clone().narrow(1, 1, seq - 1).reshape([batch * (seq - 1)]);
    predictions_of(&before(clean), &before(changed), targets)
}

/// The same of `[targets, vocab]` logits.
pub fn predictions_of(clean: &Tensor<2>, changed: &Tensor<2>, targets: Tensor<1, Int>) -> Predictions {
    let [clean, changed] = [clean, changed].map(|logits| log_softmax(logits.clone(), 1));
    let targets = targets.unsqueeze_dim::<2>(1);
    let mean = |x: Tensor<2>| f64::from(x.mean().into_scalar::<f32>());
    let right = changed.clone().argmax(1).equal(targets.clone()).float();
    let kl = (clean.clone().exp() * (clean - changed.clone())).sum_dim(1);
    Predictions { loss: -mean(changed.gather(1, targets)), accuracy: mean(right), kl: mean(kl) }
}

/// `[targets]`: what is to be predicted in a text.
pub(crate) fn target_ids(row: &Batch, device: &Device) -> Tensor<1, Int> {
    numbers(row.targets.iter().filter(|&&id| id != IGNORE).map(|&id| id as i32), device)
}

/// `[targets, vocab]`: the logits at the positions of a text that have a target, of `hidden`, `[1, seq, d_model]` and normalised.
pub(crate) fn target_logits(model: &Decoder, row: &Batch, hidden: Tensor<3>) -> Tensor<2> {
    let with_target = row.targets.iter().enumerate().filter(|(_, id)| **id != IGNORE);
    let positions = numbers(with_target.map(|(at, _)| at as i32), &hidden.device());
    model.logits(hidden.select(1, positions)).squeeze_dim::<2>(0)
}

fn numbers(values: impl Iterator<Item = i32>, device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}
