//! The standard loop body: mean cross-entropy over the targets of a step, clipped by the global norm, one update.

use polyhead_models::ContextMask;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::config::TrainingConfig;
use crate::engagement::WatchesAttention;
use crate::optimizer::Optimizer;
use crate::procedure::{HeldOut, Procedure, StepContext, StepReport};
use crate::update::{Step, Updater};

/// Settings of plain training.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct StandardConfig {
    /// What tokens of a conversation see of their own turn of context, while training: "causal" (default) or
    /// "bidirectional", FocuSFT's mask. Validation is always causal, as generation is.
    pub context_mask: ContextMask,
}

/// Plain training.
#[derive(Debug)]
pub struct Standard {
    updater: Updater,
    context_mask: ContextMask,
}

impl Standard {
    /// A loop body around an optimiser, fresh or with the state of an earlier session.
    pub fn new(config: &StandardConfig, optimizer: Optimizer, training: &TrainingConfig) -> Self {
        Self { updater: Updater::new(optimizer, training), context_mask: config.context_mask }
    }
}

impl<M: WatchesAttention> Procedure<M> for Standard {
    fn step(
        &mut self,
        mut model: M,
        batches: &[M::Batch],
        context: &StepContext,
    ) -> Result<(M, StepReport), TrainError> {
        if let Some(first) = batches.first() {
            model.before_step(first, context.step - 1);
        }
        let mut step = Step::over(batches);
        for batch in batches {
            let loss = model.loss_under(batch, self.context_mask);
            let objective = step.objective(loss, batch, self.updater.penalty_weight);
            step.add_backward(objective, &model);
        }
        self.updater.finish(model, step, context)
    }

    fn measure(&self, model: &M, held_out: HeldOut<'_, M>) -> Result<Vec<(String, f64)>, TrainError> {
        let mut measured = model.engagement("plain", held_out, ContextMask::Causal)?;
        if self.context_mask == ContextMask::Bidirectional {
            measured.extend(model.engagement("masked", held_out, self.context_mask)?);
        }
        Ok(measured)
    }

    fn optimizer(&self) -> &Optimizer {
        &self.updater.optimizer
    }
}
