//! What the forward passes of a step add up to, and the update that ends it: shared by all procedures.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Gradients, Tensor};
use polyhead_models::{Decoder, Evaluated, Loss, TrainBatch, Trainable};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::config::{OnNonfinite, OptimizerConfig, TrainingConfig};
use crate::gradients::{backward, clip_factor};
use crate::in_backward::Hooked;
use crate::in_backward::updating::{Updated, Updating};
use crate::optimizer::{Optimizer, Update};
use crate::procedure::{StepContext, StepReport};
use crate::sharding::overlap::Leaving;
use crate::sharding::{Reduction, gather_weights};

/// What the losses of a forward pass were.
#[derive(Debug, Serialize, Deserialize)]
struct PassLosses {
    /// Over its targets.
    sum: f64,
    /// Its parts in the means over the step.
    penalty: Option<f64>,
    overlap: Option<f64>,
    /// Of the sources of a mixture.
    sources: BTreeMap<String, Evaluated>,
}

/// The losses and gradients of a step so far.
pub(crate) struct Step<'a, M = Decoder> {
    context: &'a StepContext<'a>,
    /// By pass of this rank.
    losses: Vec<PassLosses>,
    grads: Reduction<'a, M>,
    /// The square of the norm of gradients that count when clipping and belong to no parameter.
    pub(crate) square_beside: f64,
    /// What the procedure measured.
    pub(crate) measured: Vec<(String, f64)>,
}

impl<'a, M: Trainable> Step<'a, M> {
    /// A step before its first pass.
    pub(crate) fn new(context: &'a StepContext<'a>) -> Self {
        let grads = Reduction::new(context.ranks);
        Self { context, losses: Vec::new(), grads, square_beside: 0.0, measured: Vec::new() }
    }

    /// A step each of whose passes has one backward pass, through so many layers that call a hook.
    pub(crate) fn in_buckets(self, layers: usize) -> Self {
        Self { grads: self.grads.in_buckets(layers), ..self }
    }

    /// The hook of a pass, the last of this rank or not, whose gradients leave in its backward pass; `None` where they leave after it.
    pub(crate) fn hook(&self, is_last: bool) -> Option<Hooked<Leaving<M>>> {
        self.grads.overlaps(is_last).then(Hooked::new)
    }

    /// To be called before each forward pass: what it draws and adds to the gradients depends on where it is in the step, not on which
    /// rank it runs. The first pass goes on where the step has begun.
    pub(crate) fn begin_pass(&mut self, model: &M) {
        let StepContext { ranks, .. } = self.context;
        if !ranks.divides_passes() {
            return;
        }
        if !self.losses.is_empty() {
            self.grads.end_pass(model, self.losses.len() as u64);
        }
        let pass = self.losses.len() * ranks.size() + ranks.rank();
        if pass > 0 {
            self.context.seed_pass(pass as u64);
        }
    }

    /// To be called behind the last forward pass where ranks have something else to tell each other before [`Updater::finish`].
    pub(crate) fn end_passes(&mut self, model: &M) {
        self.grads.end_passes(model, self.context.passes);
    }

    /// `[1]`: a batch's part in the mean over the step's targets. Weighted by targets, so that how rows are divided over
    /// forward passes changes nothing.
    pub(crate) fn objective(&mut self, loss: Loss, batch: &M::Batch, penalty_weight: f64) -> Tensor<1> {
        let all = self.context.targets.max(1) as f64;
        let share = batch.targets() as f64 / all;
        let number = |of: Tensor<1>| f64::from(of.into_scalar::<f32>());
        let part = |of: &Tensor<1>| share * number(of.clone());
        self.losses.push(PassLosses {
            sum: number(loss.cross_entropy.clone()),
            penalty: loss.penalty.as_ref().map(part),
            overlap: loss.head_overlap.as_ref().map(|(overlap, _)| part(overlap)),
            sources: batch.by_source(&loss),
        });
        let mut objective = loss.cross_entropy / all;
        if let Some((overlap, weight)) = loss.head_overlap {
            objective = objective + overlap * (share * weight);
        }
        if let Some(penalty) = loss.penalty.filter(|_| penalty_weight != 0.0) {
            objective = objective + penalty * (share * penalty_weight);
        }
        objective
    }

    /// Adds the gradients of an objective.
    pub(crate) fn add_backward(&mut self, objective: Tensor<1>, model: &M) {
        self.add(backward(objective), model);
    }

    /// The same, where the pass has a hook.
    pub(crate) fn send_in_backward(&mut self, objective: Tensor<1>, model: &M, hooked: Hooked<Leaving<M>>) {
        self.grads.send_in_backward(model, hooked, || backward(objective));
    }

    /// Adds the gradients of a backward pass.
    pub(crate) fn add(&mut self, grads: Gradients, model: &M) {
        self.grads.add(grads, model);
    }

    /// The sum of the gradients, in a step of one process.
    pub(crate) fn gradients(self, model: &M) -> burn::optim::GradientsParams {
        self.grads.finish(model, self.context.passes).grads
    }
}

/// What a step tells whose passes had these losses, and its gradients this norm.
fn report(
    context: &StepContext<'_>,
    losses: Vec<PassLosses>,
    mut measured: Vec<(String, f64)>,
    grad_norm: f64,
) -> StepReport {
    let StepContext { targets, ranks, .. } = *context;
    let losses = ranks.in_order(losses);
    let loss = losses.iter().fold(0.0, |sum, pass| sum + pass.sum) / targets.max(1) as f64;
    let total = |of: fn(&PassLosses) -> Option<f64>| losses.iter().filter_map(of).reduce(|sum, part| sum + part);
    let (penalty, overlap) = (total(|pass| pass.penalty), total(|pass| pass.overlap));
    let mut sources = BTreeMap::<String, Evaluated>::new();
    for (source, sums) in losses.into_iter().flat_map(|pass| pass.sources) {
        sources.entry(source).or_default().add(sums);
    }
    let of_source = |(name, sums): (String, Evaluated)| (format!("loss/train/{name}"), sums.mean_loss());
    measured.extend(sources.into_iter().map(of_source));
    measured.extend(overlap.map(|overlap| ("loss/head_overlap".to_owned(), overlap)));
    StepReport { loss, penalty, grad_norm, targets, measured, ..StepReport::default() }
}

/// The optimiser, and what is done to gradients before it.
#[derive(Debug)]
pub(crate) struct Updater {
    pub(crate) optimizer: Optimizer,
    pub(crate) penalty_weight: f64,
    /// Whether layers are updated while the backward pass goes on.
    pub(crate) in_backward: bool,
    max_norm: f64,
    on_nonfinite: OnNonfinite,
}

impl Updater {
    /// An optimiser, fresh or with the state of an earlier session.
    pub(crate) fn new(optimizer: Optimizer, training: &TrainingConfig) -> Self {
        let TrainingConfig { max_norm, on_nonfinite, penalty_weight, optimizer_in_backward: in_backward, .. } =
            *training;
        Self { optimizer, penalty_weight, in_backward, max_norm, on_nonfinite }
    }

    /// Ends a step: clipped by the global norm, one update; none if something is not finite.
    pub(crate) fn finish<M: Module>(&mut self, model: M, step: Step<'_, M>) -> Result<(M, StepReport), TrainError> {
        let _span = tracing::info_span!("optimizer").entered();
        let Step { context, losses, grads, square_beside, measured } = step;
        let StepContext { passes, lr, ranks, .. } = *context;
        let grads = grads.finish(&model, passes);
        let grad_norm = grads.global_norm(&model, ranks);
        let mut report = report(context, losses, measured, grad_norm);
        if !(report.loss.is_finite() && grad_norm.is_finite() && square_beside.is_finite()) {
            (report.skipped, report.refused) = (true, self.on_nonfinite == OnNonfinite::Stop);
            return Ok((model, report));
        }
        let scale = clip_factor((grad_norm * grad_norm + square_beside).sqrt(), self.max_norm);
        let mut grads = grads.for_update(&model, ranks);
        let model = self.optimizer.step(model, &mut grads, Update { lr, scale });
        let model = if ranks.shards_optimizer() { gather_weights(model, ranks) } else { model };
        Ok((model, report))
    }

    /// Ends a step of one pass by its backward pass, in which the layers are updated: not clipped; no update if the loss is not finite,
    /// and none any more behind a gradient that is not.
    pub(crate) fn finish_in_backward<M: Module + 'static>(
        &mut self,
        model: M,
        step: Step<'_, M>,
        objective: Tensor<1>,
        hooked: Hooked<Updating<M>>,
    ) -> (M, StepReport) {
        let Step { context, losses, measured, .. } = step;
        let report = report(context, losses, measured, f64::NAN);
        if !report.loss.is_finite() {
            return (model, StepReport { skipped: true, refused: true, ..report });
        }
        let optimizer = std::mem::replace(&mut self.optimizer, Optimizer::new(OptimizerConfig::default()));
        let update = Update { lr: context.lr, scale: 1.0 };
        let Updated { model, optimizer, grad_norm, updated } =
            Updating::new(model, optimizer, update).run(hooked, || backward(objective));
        self.optimizer = optimizer;
        let broken = !grad_norm.is_finite();
        (model, StepReport { grad_norm, skipped: broken, refused: broken, torn: broken && updated, ..report })
    }
}
