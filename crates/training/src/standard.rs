//! The standard loop body: mean cross-entropy over the targets of a step, clipped by the global norm, one update.

use polyhead_attention::Observe;
use polyhead_models::{Batch, Decoder};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::config::{OnNonfinite, TrainingConfig};
use crate::gradients::{Sum, clip_factor, global_norm};
use crate::optimizer::{Optimizer, Update};
use crate::procedure::{Procedure, StepContext, StepReport};

/// Settings of plain training: none of its own.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StandardConfig {}

/// Plain training.
#[derive(Debug)]
pub struct Standard {
    optimizer: Optimizer,
    max_norm: f64,
    on_nonfinite: OnNonfinite,
    penalty_weight: f64,
}

impl Standard {
    /// A loop body around an optimiser, fresh or with the state of an earlier sitting.
    pub fn new(optimizer: Optimizer, training: &TrainingConfig) -> Self {
        let TrainingConfig { max_norm, on_nonfinite, penalty_weight, .. } = *training;
        Self { optimizer, max_norm, on_nonfinite, penalty_weight }
    }
}

impl Procedure for Standard {
    fn step(
        &mut self,
        model: Decoder,
        batches: &[Batch],
        context: &StepContext,
    ) -> Result<(Decoder, StepReport), TrainError> {
        let targets: u64 = batches.iter().map(Batch::target_tokens).sum();
        let (mut sum, mut loss_sum, mut penalty_sum) = (Sum::default(), 0.0, None);
        for batch in batches {
            let loss = model.loss(batch, Observe::Nothing);
            loss_sum += f64::from(loss.cross_entropy.clone().into_scalar::<f32>());
            // Weighted by targets, so that how rows are divided over forward passes changes nothing.
            let mut objective = loss.cross_entropy / targets.max(1) as f64;
            if let Some(penalty) = loss.penalty {
                let share = batch.target_tokens() as f64 / targets.max(1) as f64;
                *penalty_sum.get_or_insert(0.0) += share * f64::from(penalty.clone().into_scalar::<f32>());
                objective = objective + penalty * (share * self.penalty_weight);
            }
            sum.add(objective.backward(), &model);
        }
        let mut grads = sum.finish();
        let grad_norm = global_norm(&grads, &model);
        let loss = loss_sum / targets.max(1) as f64;
        let mut report = StepReport { loss, penalty: penalty_sum, grad_norm, targets, ..StepReport::default() };
        if !(loss.is_finite() && grad_norm.is_finite()) {
            return match self.on_nonfinite {
                OnNonfinite::Stop => Err(TrainError::Nonfinite { step: context.step, loss, grad_norm }),
                OnNonfinite::Skip => {
                    report.skipped = true;
                    Ok((model, report))
                }
            };
        }
        let scale = clip_factor(grad_norm, self.max_norm);
        let model = self.optimizer.step(model, &mut grads, Update { lr: context.lr, scale });
        Ok((model, report))
    }

    fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }
}
