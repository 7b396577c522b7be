//! What the forward passes of a step add up to, and the update that ends it: shared by all procedures.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Gradients, Tensor};
use polyhead_models::{Decoder, Evaluated, Loss, TrainBatch, Trainable};

use crate::TrainError;
use crate::config::{OnNonfinite, TrainingConfig};
use crate::gradients::{Sum, backward, clip_factor, global_norm};
use crate::optimizer::{Optimizer, Update};
use crate::procedure::{StepContext, StepReport};

/// The losses and gradients of a step so far.
pub(crate) struct Step<M = Decoder> {
    /// Targets of the whole step.
    targets: u64,
    loss_sum: f64,
    penalty_sum: Option<f64>,
    sources: BTreeMap<String, Evaluated>,
    overlap_sum: Option<f64>,
    grads: Sum<M>,
    /// The square of the norm of gradients that count when clipping and belong to no parameter.
    pub(crate) square_beside: f64,
    /// What the procedure measured.
    pub(crate) measured: Vec<(String, f64)>,
}

impl<M: Trainable> Step<M> {
    /// A step over these batches.
    pub(crate) fn over(batches: &[M::Batch]) -> Self {
        let targets = batches.iter().map(TrainBatch::targets).sum();
        Self {
            targets,
            loss_sum: 0.0,
            penalty_sum: None,
            sources: BTreeMap::new(),
            overlap_sum: None,
            grads: Sum::default(),
            square_beside: 0.0,
            measured: Vec::new(),
        }
    }

    /// `[1]`: a batch's part in the mean over the step's targets. Weighted by targets, so that how rows are divided over
    /// forward passes changes nothing.
    pub(crate) fn objective(&mut self, loss: Loss, batch: &M::Batch, penalty_weight: f64) -> Tensor<1> {
        self.loss_sum += f64::from(loss.cross_entropy.clone().into_scalar::<f32>());
        for (source, sums) in batch.by_source(&loss) {
            self.sources.entry(source).or_default().add(sums);
        }
        let all = self.targets.max(1) as f64;
        let share = batch.targets() as f64 / all;
        let mut objective = loss.cross_entropy / all;
        if let Some((overlap, weight)) = loss.head_overlap {
            *self.overlap_sum.get_or_insert(0.0) += share * f64::from(overlap.clone().into_scalar::<f32>());
            objective = objective + overlap * (share * weight);
        }
        if let Some(penalty) = loss.penalty {
            *self.penalty_sum.get_or_insert(0.0) += share * f64::from(penalty.clone().into_scalar::<f32>());
            if penalty_weight != 0.0 {
                objective = objective + penalty * (share * penalty_weight);
            }
        }
        objective
    }

    /// Adds the gradients of an objective.
    pub(crate) fn add_backward(&mut self, objective: Tensor<1>, model: &M) {
        self.add(backward(objective), model);
    }

    /// Adds the gradients of a backward pass.
    pub(crate) fn add(&mut self, grads: Gradients, model: &M) {
        self.grads.add(grads, model);
    }

    /// The sum of the gradients.
    pub(crate) fn gradients(self) -> burn::optim::GradientsParams {
        self.grads.finish()
    }
}

/// The optimiser, and what is done to gradients before it.
#[derive(Debug)]
pub(crate) struct Updater {
    pub(crate) optimizer: Optimizer,
    pub(crate) penalty_weight: f64,
    max_norm: f64,
    on_nonfinite: OnNonfinite,
}

impl Updater {
    /// An optimiser, fresh or with the state of an earlier session.
    pub(crate) fn new(optimizer: Optimizer, training: &TrainingConfig) -> Self {
        let TrainingConfig { max_norm, on_nonfinite, penalty_weight, .. } = *training;
        Self { optimizer, penalty_weight, max_norm, on_nonfinite }
    }

    /// Ends a step: clipped by the global norm, one update; none if something is not finite.
    pub(crate) fn finish<M: Module>(
        &mut self,
        model: M,
        step: Step<M>,
        context: &StepContext,
    ) -> Result<(M, StepReport), TrainError> {
        let _span = tracing::info_span!("optimizer").entered();
        let mut grads = step.grads.finish();
        let grad_norm = global_norm(&grads, &model);
        let loss = step.loss_sum / step.targets.max(1) as f64;
        let (penalty, targets, mut measured) = (step.penalty_sum, step.targets, step.measured);
        let of_source = |(name, sums): (String, Evaluated)| (format!("loss/train/{name}"), sums.mean_loss());
        measured.extend(step.sources.into_iter().map(of_source));
        measured.extend(step.overlap_sum.map(|overlap| ("loss/head_overlap".to_owned(), overlap)));
        let mut report = StepReport { loss, penalty, grad_norm, targets, measured, ..StepReport::default() };
        if !(loss.is_finite() && grad_norm.is_finite() && step.square_beside.is_finite()) {
            (report.skipped, report.refused) = (true, self.on_nonfinite == OnNonfinite::Stop);
            return Ok((model, report));
        }
        let scale = clip_factor((grad_norm * grad_norm + step.square_beside).sqrt(), self.max_norm);
        let model = self.optimizer.step(model, &mut grads, Update { lr: context.lr, scale });
        Ok((model, report))
    }
}
