//! The standard loop body: mean cross-entropy over the targets of a step, clipped by the global norm, one update.

use polyhead_models::{Batch, ContextMask, Decoder, Pass};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::config::TrainingConfig;
use crate::engagement;
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
    /// A loop body around an optimiser, fresh or with the state of an earlier sitting.
    pub fn new(config: &StandardConfig, optimizer: Optimizer, training: &TrainingConfig) -> Self {
        Self { updater: Updater::new(optimizer, training), context_mask: config.context_mask }
    }
}

impl Procedure for Standard {
    fn step(
        &mut self,
        model: Decoder,
        batches: &[Batch],
        context: &StepContext,
    ) -> Result<(Decoder, StepReport), TrainError> {
        let mut step = Step::over(batches);
        for batch in batches {
            let loss = model.loss_of_pass(batch, Pass::new(&batch.mask(self.context_mask)));
            let objective = step.objective(loss, batch, self.updater.penalty_weight);
            step.add(objective.backward(), &model);
        }
        self.updater.finish(model, step, context)
    }

    fn measure(&self, model: &Decoder, held_out: HeldOut<'_>) -> Result<Vec<(String, f64)>, TrainError> {
        let mut measured = engagement::of_first_batch("plain", model, held_out, ContextMask::Causal, &[])?;
        if self.context_mask == ContextMask::Bidirectional {
            measured.extend(engagement::of_first_batch("masked", model, held_out, self.context_mask, &[])?);
        }
        Ok(measured)
    }

    fn optimizer(&self) -> &Optimizer {
        &self.updater.optimizer
    }
}
