//! Soft injection of task embeddings (SITE, arXiv 2507.20906): what heads write after few-shot prompts is mixed
//! into a prompt without shots, by a gate for each head that is learned.
//!
//! ```text
//! t = mean over few-shot prompts of z at the last token                       [layers, heads, head_dim]
//! z ← (1 - α) z + α t  at the last prompt token,  α = σ(θ)                     in all layers of one pass; t is a constant
//! ```
//! The authors' code is followed: θ begins at 0, only the first token of an answer is learned from, Adam without weight decay, one
//! prompt a step. Left out: their validation every 50 steps, whose best value they never update.

use burn::tensor::activation::{log_softmax, sigmoid};
use burn::tensor::{Int, Tensor, TensorData};
use polyhead_attention::{Amount, At, Change, Edit, Mask, Positions, QuerySite};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::spans::rows_of;
use super::{Context, Span, SpanName};
use crate::sites::SitePlan;
use crate::{Batch, ContextMask, Decoder, Pass};

/// `[layers, heads, head_dim]`: the mean of head outputs at the last token of the prompts of batches, which is the last of a row
/// where no answer follows.
///
/// # Panics
/// If there is no batch.
pub fn task_embedding(model: &Decoder, batches: &[Batch]) -> Tensor<3> {
    let sums = batches.iter().map(|batch| {
        let (mask, context) = (batch.mask(ContextMask::Causal), Context::of(batch));
        let last = rows_of(&Span::Named(SpanName::LastPromptToken), &context, None).concat();
        let sites = SitePlan::tap_all(model.layers.len(), QuerySite::Z);
        let pass = Pass { sites, context: Some(context), ..Pass::new(&mask) };
        let taps = model.pass(model.tokens(batch), pass).taps;
        let marks: Vec<f32> = last.iter().map(|&last| f32::from(u8::from(last))).collect();
        let marks = Tensor::<4>::from_data(TensorData::new(marks, [batch.batch, 1, batch.seq, 1]), &model.device());
        let of_layer = |values: Tensor<4>| {
            let [_, heads, _, width] = values.dims();
            (values * marks.clone()).sum_dim(0).sum_dim(2).reshape([1, heads, width])
        };
        let sum = Tensor::cat(taps.into_iter().map(|tap| of_layer(tap.values)).collect(), 0);
        (sum, last.into_iter().filter(|&last| last).count())
    });
    let (sum, count) = sums.reduce(|(a, n), (b, m)| (a + b, n + m)).expect("a batch");
    sum / count as f64
}

/// Numbers to compare with an embedding, `[layers, heads, head_dim]`: of each head, a random direction of the same length.
pub fn random_embedding(embedding: &Tensor<3>, seed: u64) -> Tensor<3> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = || 1.0 - rng.random::<f64>();
    let normal = |_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32;
    let shape = embedding.dims();
    let values = (0..shape.iter().product()).map(normal).collect();
    let random = Tensor::<3>::from_data(TensorData::new(values, shape), &embedding.device());
    let length = |x: &Tensor<3>| x.clone().square().sum_dim(2).sqrt();
    let factor = length(embedding) / length(&random);
    random * factor
}

/// The changes that mix `embedding`, `[layers, heads, head_dim]`, into head outputs at some positions, by gates `alpha`, `[layers,
/// heads]`.
pub fn soft_injection(alpha: &Tensor<2>, embedding: &Tensor<3>, positions: &Positions) -> Vec<(usize, Edit)> {
    let [layers, heads, width] = embedding.dims();
    let of_layer = |layer: usize| {
        let alpha = alpha.clone().narrow(0, layer, 1).reshape([1, heads, 1, 1]);
        let embedding = embedding.clone().narrow(0, layer, 1).reshape([1, heads, 1, width]);
        let change = Change::blend(Amount::Each(alpha), Amount::Each(embedding));
        (layer, Edit { positions: positions.clone(), ..Edit::new(At::all(QuerySite::Z.into()), change) })
    };
    (0..layers).map(of_layer).collect()
}

/// A prompt without shots, and the token that answers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Its tokens, at least one.
    pub prompt: Vec<u32>,
    /// The first token of the answer.
    pub answer: u32,
}

/// `[rows]`: the cross-entropy of each answer, with the gates σ(θ); `[layers, heads]` θ.
pub fn injected_loss(model: &Decoder, asked: &[Asked], theta: &Tensor<2>, embedding: &Tensor<3>) -> Tensor<1> {
    let rows = asked.iter().map(|asked| {
        let last = asked.prompt.len() - 1;
        let edits = soft_injection(&sigmoid(theta.clone()), embedding, &Positions::only(last));
        let ids: Vec<i32> = asked.prompt.iter().map(|&id| id as i32).collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, last + 1]), &model.device());
        let sites = SitePlan { edits, taps: Vec::new() };
        let hidden = model.pass(ids, Pass { sites, ..Pass::new(&Mask::causal()) }).hidden;
        let logits = model.logits(hidden.narrow(1, last, 1)).squeeze_dim::<2>(1);
        log_softmax(logits, 1).narrow(1, asked.answer as usize, 1).neg().reshape([1])
    });
    Tensor::cat(rows.collect(), 0)
}

/// How gates are learned; the defaults are the authors'.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateTraining {
    /// Learning rate of Adam. Default: 0.2.
    pub lr: f64,
    /// Decay of its first moment. Default: 0.9.
    pub beta1: f64,
    /// Decay of its second moment. Default: 0.999.
    pub beta2: f64,
    /// Beside its square root. Default: 1e-8.
    pub eps: f64,
}

impl Default for GateTraining {
    fn default() -> Self {
        Self { lr: 0.2, beta1: 0.9, beta2: 0.999, eps: 1e-8 }
    }
}

/// A step of the training of gates.
#[derive(Debug, Clone)]
pub struct GateStep {
    /// Before the step.
    pub loss: f64,
    /// `[layers, heads]`: the gradient of θ before the step.
    pub gradient: Tensor<2>,
    /// `[layers, heads]`: θ after it.
    pub theta: Tensor<2>,
}

/// Learns θ, `[layers, heads]`, from 0, one prompt a step in the given order; the model, on a device with autodiff, stays as it
/// is. Every step is handed to `on_step`.
pub fn train_gates<'a>(
    model: &Decoder,
    embedding: &Tensor<3>,
    order: impl IntoIterator<Item = &'a Asked>,
    how: GateTraining,
    mut on_step: impl FnMut(GateStep),
) -> Tensor<2> {
    let [layers, heads, _] = embedding.dims();
    let device = model.device();
    let mut theta = Tensor::<2>::zeros([layers, heads], &device.clone().inner());
    let (mut first, mut second) = (theta.clone(), theta.clone());
    for (step, asked) in (1..).zip(order) {
        let leaf = Tensor::<2>::from_inner(theta.clone()).require_grad();
        let loss = injected_loss(model, std::slice::from_ref(asked), &leaf, embedding).mean();
        let gradient = leaf.grad(&loss.backward()).expect("gates reach the loss");
        first = first * how.beta1 + gradient.clone() * (1.0 - how.beta1);
        second = second * how.beta2 + gradient.clone().square() * (1.0 - how.beta2);
        let (first, second) =
            (first.clone() / (1.0 - how.beta1.powi(step)), second.clone() / (1.0 - how.beta2.powi(step)));
        theta = theta - first / (second.sqrt() + how.eps) * how.lr;
        on_step(GateStep { loss: f64::from(loss.into_scalar::<f32>()), gradient, theta: theta.clone() });
    }
    theta
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Role;
    use crate::testing::decoders;

    #[test]
    fn an_embedding_is_of_the_last_token_before_the_answer() {
        let model = decoders().next().unwrap();
        let values = |x: Tensor<3>| x.into_data().iter::<f32>().collect::<Vec<f32>>();
        let of = |rows: &[&[u32]]| {
            task_embedding(&model, &rows.iter().map(|row| Batch::text(row.to_vec())).collect::<Vec<_>>())
        };
        let mut batch = Batch { batch: 2, seq: 4, tokens: vec![1, 2, 3, 4, 5, 6, 7, 8], ..Batch::default() };
        batch.targets = vec![crate::IGNORE; 8];
        let (shown, said) = (Role::Tool, Role::Assistant);
        batch.roles = Some(vec![shown, shown, said, Role::Padding, shown, shown, shown, said]);
        let got = values(task_embedding(&model, &[batch]));
        let want = values(of(&[&[1, 2], &[5, 6, 7]]));
        assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-6), "{got:?} {want:?}");
    }

    #[test]
    fn a_random_embedding_is_as_long_and_points_elsewhere() {
        let embedding = task_embedding(&decoders().next().unwrap(), &[Batch::text(vec![1, 2, 3])]);
        let random = random_embedding(&embedding, 1);
        let lengths = |x: Tensor<3>| x.square().sum_dim(2).sqrt().into_data().iter::<f32>().collect::<Vec<f32>>();
        let (own, other) = (lengths(embedding.clone()), lengths(random.clone()));
        assert!(own.iter().zip(&other).all(|(a, b)| *a > 0.0 && (a - b).abs() < 1e-5 * a), "{own:?} {other:?}");
        let along = lengths(embedding.clone() + random.clone());
        assert!(along.iter().zip(&own).all(|(sum, own)| *sum < 1.999 * own));
        let again = random_embedding(&embedding, 1) - random;
        assert_eq!(again.abs().max().into_scalar::<f32>(), 0.0, "of a seed there is one");
    }
}
