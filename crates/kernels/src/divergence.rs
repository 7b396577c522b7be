//! What two models predict of the same tokens, beside each other: an evaluation, without gradients.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::shapes::assert_shapes;
use crate::simd;

/// Sums over the tokens that have a target.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Divergence {
    /// Nats: the cross-entropy of both predictions.
    pub losses: [f64; 2],
    /// How often the target was the first choice.
    pub correct: [u64; 2],
    /// Nats: the Kullback-Leibler divergence of the second prediction from the first.
    pub divergence: f64,
}

impl Divergence {
    /// Adds other tokens.
    pub fn add(&mut self, other: Self) {
        for which in 0..2 {
            self.losses[which] += other.losses[which];
            self.correct[which] += other.correct[which];
        }
        self.divergence += other.divergence;
    }
}

/// Compares two `[tokens, vocab]` of logits; `ids` are the targets, negative where there is none.
///
/// # Panics
/// If the shapes differ, or a target is not in the vocabulary.
pub fn divergence(logits: [Tensor<2>; 2], ids: &[i64]) -> Divergence {
    let [first, second] = logits;
    let [tokens, vocab] = first.dims();
    assert_shapes!("divergence", first, second;
        "both must be of one shape": second.dims() == [tokens, vocab],
        "there must be a target for each token": ids.len() == tokens);
    let [mut first, mut second] = [first, second].map(|logits| {
        let values: Result<Vec<f32>, _> = logits.into_data().try_into_vec_as();
        values.unwrap_or_else(|error| panic!("logits are numbers: {error:?}"))
    });
    let rows = first.par_chunks_mut(vocab.max(1)).zip(second.par_chunks_mut(vocab.max(1))).zip(ids);
    let each: Vec<Divergence> = rows.map(|((first, second), &id)| of_row(first, second, id)).collect();
    // In order, so that the sum does not depend on threads.
    each.into_iter().fold(Divergence::default(), |mut sum, one| {
        sum.add(one);
        sum
    })
}

fn of_row(first: &mut [f32], second: &mut [f32], id: i64) -> Divergence {
    let Ok(id) = usize::try_from(id) else { return Divergence::default() };
    let targets = [first[id], second[id]];
    let largest = [simd::max(first), simd::max(second)];
    let hit = |logits: &[f32], which: usize| {
        u64::from(targets[which] == largest[which] && !logits[..id].contains(&largest[which]))
    };
    let correct = [hit(first, 0), hit(second, 1)];
    let differences: Vec<f32> = first.iter().zip(&*second).map(|(a, b)| a - b).collect();
    let totals = [simd::exp_shifted(first, largest[0]), simd::exp_shifted(second, largest[1])];
    let log_sums = [0, 1].map(|which| f64::from(largest[which]) + f64::from(totals[which]).ln());
    // A logit of -inf has no part: 0 times infinity would be NaN.
    let parts = first.iter().zip(&differences).filter(|(weight, _)| **weight > 0.0);
    let expected: f64 = parts.map(|(&weight, &difference)| f64::from(weight) * f64::from(difference)).sum();
    Divergence {
        losses: [0, 1].map(|which| log_sums[which] - f64::from(targets[which])),
        correct,
        divergence: expected / f64::from(totals[0]) - log_sums[0] + log_sums[1],
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::activation::log_softmax;

    use super::*;
    use crate::comparison::{Tolerance, assert_close};
    use crate::testing::{leaf, numbers};
    use crate::{Targets, cross_entropy};

    #[test]
    fn agrees_with_softmax_and_cross_entropy() {
        let (tokens, vocab) = (7, 33);
        let logits =
            [leaf([tokens * vocab]), leaf([tokens * vocab])].map(|x| (x.inner() * 3.0).reshape([tokens, vocab]));
        let ids: Vec<i64> = (0..tokens as i64).map(|at| if at == 2 { -100 } else { at * 4 }).collect();
        let got = divergence(logits.clone(), &ids);
        let [first, second] = logits.clone().map(|logits| log_softmax(logits, 1));
        let each = numbers((first.clone().exp() * (first - second)).sum_dim(1).reshape([-1]));
        let want: f32 = each.iter().zip(&ids).filter(|(_, id)| **id >= 0).map(|(nats, _)| nats).sum();
        assert_close("divergence", &[got.divergence as f32], &[want], Tolerance::absolute(1e-5));
        for (which, logits) in logits.into_iter().enumerate() {
            let entropy = cross_entropy(logits, Tensor::eye(vocab, &burn::tensor::Device::flex()), &Targets::new(&ids));
            assert_close("loss", &[got.losses[which] as f32], &numbers(entropy.sum), Tolerance::absolute(1e-4));
            let hits: f32 = numbers(entropy.correct).iter().sum();
            assert_eq!(got.correct[which], hits as u64);
        }
    }
}
