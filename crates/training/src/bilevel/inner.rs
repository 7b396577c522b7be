//! Fast weights, and the steps that adapt them to a batch.

use burn::module::Module;
use burn::tensor::{Gradients, Tensor, TensorData};
use polyhead_attention::{Adapter, Mask};
use polyhead_kernels::total;
use polyhead_models::{Batch, Decoder, Pass};

use super::BilevelConfig;
use crate::gradients::backward;

/// Kept from being a division by zero when a tensor is clipped by its own norm; the authors' number.
const CLIP_EPS: f64 = 1e-12;
/// The same for the norm over all tensors; `torch.nn.utils.clip_grad_norm_`'s number.
const SYNC_EPS: f64 = 1e-6;

/// Fast weights (or something of their shape: gradients, directions) for each layer of a model, on its inner device.
#[derive(Debug, Clone, Default)]
pub struct FastWeights(pub Vec<Vec<Adapter>>);

impl FastWeights {
    /// Whether nothing is adapted.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Vec::is_empty)
    }

    /// The same on the autodiff device: leaves of a new tape, or constants.
    pub(super) fn lifted(&self, leaves: bool) -> Vec<Vec<Adapter>> {
        let lift = |x: &Tensor<2>| {
            let x = Tensor::from_inner(x.clone());
            if leaves { x.require_grad() } else { x }
        };
        self.map(|x| lift(x)).0
    }

    /// The first layer that is adapted.
    fn first_layer(&self) -> usize {
        self.0.iter().position(|layer| !layer.is_empty()).unwrap_or(self.0.len())
    }

    pub(super) fn map(&self, mut each: impl FnMut(&Tensor<2>) -> Tensor<2>) -> Self {
        let mut adapter = |one: &Adapter| Adapter { a: each(&one.a), b: each(&one.b), ..one.clone() };
        Self(self.0.iter().map(|layer| layer.iter().map(&mut adapter).collect()).collect())
    }

    /// Tensor by tensor with those of `other`, which has the same shape.
    pub(super) fn zip(&self, other: &Self, each: impl Fn(Tensor<2>, Tensor<2>) -> Tensor<2>) -> Self {
        let mut others = other.tensors().cloned().collect::<Vec<_>>().into_iter();
        self.map(|x| each(x.clone(), others.next().expect("the same shape")))
    }

    /// Its numbers, matrix by matrix.
    pub(super) fn numbers(&self) -> Vec<TensorData> {
        self.tensors().map(Tensor::to_data).collect()
    }

    /// The same with other [`numbers`](Self::numbers).
    pub(super) fn with(&self, numbers: Vec<TensorData>) -> Self {
        let mut numbers = numbers.into_iter();
        self.map(|x| Tensor::from_data(numbers.next().expect("the same shape"), &x.device()))
    }

    /// Its matrices, layer by layer: A before B.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor<2>> {
        self.0.iter().flatten().flat_map(|one| [&one.a, &one.b])
    }

    /// `[1]`: the sum of the squares of all numbers; `None` without fast weights.
    pub fn square(&self) -> Option<Tensor<1>> {
        self.tensors().map(|x| total(x.clone().square())).reduce(|a, b| a + b)
    }

    /// What each tensor's gradient is multiplied by: `[1, 1]` per tensor.
    fn clip_factors(&self, config: &BilevelConfig) -> Vec<Tensor<2>> {
        let factor = |square: Tensor<1>, eps: f64| {
            ((square.sqrt() + eps).recip() * config.inner_clip).clamp_max(1.0).unsqueeze::<2>()
        };
        let ones = |x: &Tensor<2>| Tensor::ones([1, 1], &x.device());
        match self.square() {
            _ if config.inner_clip == 0.0 => self.tensors().map(ones).collect(),
            Some(all) if config.sync => vec![factor(all, SYNC_EPS); self.tensors().count()],
            _ => self.tensors().map(|x| factor(total(x.clone().square()), CLIP_EPS)).collect(),
        }
    }
}

/// The gradients that a backward pass left on leaves, as plain tensors.
pub(super) fn slopes(leaves: &[Vec<Adapter>], grads: &Gradients) -> FastWeights {
    let of = |x: &Tensor<2>| x.grad(grads).unwrap_or_else(|| x.clone().inner().zeros_like());
    FastWeights(leaves.to_vec()).map(of)
}

/// One step of the inner loop.
#[derive(Debug, Clone)]
pub struct InnerStep {
    /// The batch's mean loss before the step.
    pub loss: f64,
    /// Its gradients, not clipped; `None` where the loss was not finite and no step was taken.
    pub slopes: Option<FastWeights>,
    /// What each gradient was multiplied by, `[1, 1]`, tensor by tensor.
    pub factors: Vec<Tensor<2>>,
}

/// Fast weights adapted to a batch.
#[derive(Debug, Clone)]
pub struct Adapted {
    /// Before each step, and at the end.
    pub trajectory: Vec<FastWeights>,
    /// The steps.
    pub steps: Vec<InnerStep>,
    /// `[batch, seq, d_model]`, plain: what the first adapted layer reads, where steps were taken.
    pub(super) below: Option<Tensor<3>>,
}

impl Adapted {
    /// The fast weights at the end.
    pub fn last(&self) -> &FastWeights {
        self.trajectory.last().expect("at least the first")
    }
}

/// Adapts `fresh` fast weights to a batch. `model` is on an autodiff device and is not changed. A batch without targets
/// adapts nothing.
pub fn adapt(model: &Decoder, batch: &Batch, config: &BilevelConfig, fresh: FastWeights) -> Adapted {
    let mut adapted = Adapted { trajectory: vec![fresh], steps: Vec::new(), below: None };
    let first = adapted.last().first_layer();
    if adapted.last().is_empty() || batch.target_tokens() == 0 {
        return adapted;
    }
    let lower = model.valid();
    let mask = batch.mask(config.context_mask);
    let below = lower.run_layers(0..first, lower.embed(lower.tokens(batch)), Pass::new(&mask)).hidden;
    adapted.below = Some(below.clone());
    let frozen = model.clone().no_grad();
    for index in 0..config.steps() {
        let _span = tracing::info_span!("inner step", index).entered();
        let fast = adapted.last().clone();
        let leaves = fast.lifted(true);
        let loss = upper_loss(&frozen, batch, &batch.mask(config.context_mask), below.clone(), &leaves);
        let value = f64::from(loss.clone().into_scalar::<f32>());
        if !value.is_finite() {
            adapted.steps.push(InnerStep { loss: value, slopes: None, factors: Vec::new() });
            adapted.trajectory.push(fast);
            continue;
        }
        let slopes = slopes(&leaves, &backward(loss));
        let factors = slopes.clip_factors(config);
        let mut each = factors.clone().into_iter();
        let clipped = slopes.map(|x| x.clone() * each.next().expect("one each"));
        let next = fast.zip(&clipped, |x, slope| x - slope * config.inner_lr);
        adapted.steps.push(InnerStep { loss: value, slopes: Some(slopes), factors });
        adapted.trajectory.push(next);
    }
    adapted
}

/// `[1]`: the batch's mean loss, from what the first adapted layer reads on.
pub(super) fn upper_loss(
    model: &Decoder,
    batch: &Batch,
    mask: &Mask,
    below: Tensor<3>,
    fast: &[Vec<Adapter>],
) -> Tensor<1> {
    let first = fast.iter().position(|layer| !layer.is_empty()).unwrap_or(fast.len());
    let pass = Pass { adapters: fast, ..Pass::new(mask) };
    let hidden = model.run_layers(first..model.layers.len(), Tensor::from_inner(below), pass).hidden;
    model.predict(batch, model.normed(hidden)).sum / batch.target_tokens().max(1) as f64
}
