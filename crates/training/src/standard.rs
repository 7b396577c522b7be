//! The standard loop body: mean cross-entropy over the targets of a step, clipped by the global norm, one update.

use polyhead_models::ContextMask;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::config::TrainingConfig;
use crate::engagement::WatchesAttention;
use crate::in_backward::Hooked;
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

impl Standard {
    /// A step of one pass, each of whose layers is updated as soon as the backward pass has gone through it.
    fn step_in_backward<M: WatchesAttention>(
        &mut self,
        mut model: M,
        batch: &M::Batch,
        context: &StepContext<'_>,
    ) -> (M, StepReport) {
        let (mut step, hooked) = (Step::new(context), Hooked::new());
        let mut loss = model.clone().with_hook(hooked.hook()).loss_under(batch, self.context_mask);
        model.follow(std::mem::take(&mut loss.found));
        let objective = step.objective(loss, batch, self.updater.penalty_weight);
        self.updater.finish_in_backward(model, step, objective, hooked)
    }
}

impl<M: WatchesAttention> Procedure<M> for Standard {
    fn step(
        &mut self,
        mut model: M,
        batches: &[M::Batch],
        context: &StepContext<'_>,
    ) -> Result<(M, StepReport), TrainError> {
        if let ([batch], true) = (batches, self.updater.in_backward) {
            return Ok(self.step_in_backward(model, batch, context));
        }
        let layers = if context.ranks.overlaps() { model.hooked_layers() } else { 0 };
        let mut step = Step::new(context).in_buckets(layers);
        for (pass, batch) in batches.iter().enumerate() {
            step.begin_pass(&model);
            let hooked = step.hook(pass + 1 == batches.len());
            let calling = hooked.as_ref().map(|hooked| model.clone().with_hook(hooked.hook()));
            let mut loss = calling.as_ref().unwrap_or(&model).loss_under(batch, self.context_mask);
            let found = std::mem::take(&mut loss.found);
            let objective = step.objective(loss, batch, self.updater.penalty_weight);
            match hooked {
                Some(hooked) => step.send_in_backward(objective, &model, hooked),
                None => step.add_backward(objective, &model),
            }
            model.follow(found);
        }
        self.updater.finish(model, step)
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::module::Module;
    use burn::tensor::Device;
    use polyhead_kernels::seed_random;
    use polyhead_models::{Batch, Decoder, DecoderConfig};

    use super::*;
    use crate::config::ParallelConfig;
    use crate::ranks::Ranks;

    /// A text of period 9, which both sides of a mask tell.
    #[test]
    fn masked_tokens_are_learned() {
        let config = serde_json::json!({
            "d_model": 32, "n_layers": 1, "rope_theta": 10, "masked_diffusion": true, "attention": { "softmax": { "n_heads": 2 } },
        });
        let config: DecoderConfig = serde_json::from_value(config).unwrap();
        seed_random(5);
        let mut model: Decoder = config.init(9, &Device::flex().autodiff());
        let tokens: Vec<u32> = (0..256u32).map(|at| at * 7 % 9).collect();
        let targets = tokens.iter().skip(1).chain([&0]).map(|&id| i64::from(id)).collect();
        let batch = Batch { batch: 8, seq: 32, tokens, targets, ..Batch::default() };
        let training = serde_json::json!({ "steps": 1, "seq_len": 32, "batch_size": 8 });
        let training: TrainingConfig = serde_json::from_value(training).unwrap();
        let optimizer = Optimizer::new(Default::default());
        let mut procedure = Standard::new(&StandardConfig::default(), optimizer, &training);
        let before = model.valid().evaluate(&batch).mean_loss();
        let (ranks, targets) = (Ranks::alone(ParallelConfig::default()), batch.target_tokens());
        for step in 1..=200 {
            seed_random(step);
            let context = StepContext { step, lr: 0.01, seed: 0, position: step, passes: 1, targets, ranks: &ranks };
            model = procedure.step(model, std::slice::from_ref(&batch), &context).unwrap().0;
        }
        let after = model.valid().evaluate(&batch).mean_loss();
        assert!(after < 0.5 * before, "{before} to {after}");
    }
}
