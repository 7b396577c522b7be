//! Fusing heads (arXiv 2406.06567): the middle stage of decoupled-head attention, between a model whose heads have operators
//! that are the identity (`convert --fusing`) and one whose groups are single heads (`convert --to decoupled_head`).
//!
//! "anneal" pulls every operator to the average of its group, linearly over the first 90 % of the steps: the collapse is exact
//! by construction. It is ours. "lagrangian" is the paper's idea: the scatter Lf is a constraint with an augmented
//! Lagrangian, `λ1 (Lf - t) + λ2 (Lf - t)²`, whose target t falls to 0 and whose multipliers ascend. The form is that of the
//! code that the authors say they built on (LLM-Shearing), as their own equations could not be read.

use burn::module::Module;
use polyhead_models::{Batch, ConfigError, ContextMask, Decoder, DecoderConfig, Pass, require, require_range, surgery};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::TrainError;
use crate::optimizer::Optimizer;
use crate::procedure::{Parts, Procedure, StepContext, StepReport};
use crate::run_folder::files::STATE;
use crate::update::{Step, Updater};

/// Decays of the multipliers' moments, as in LLM-Shearing.
const BETAS: (f64, f64) = (0.9, 0.95);
const EPS: f64 = 1e-8;
/// Share of the steps over which operators are annealed; chosen by us.
const ANNEALED: f64 = 0.9;

/// Settings of fusion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FusionConfig {
    /// "anneal" (default; for short runs) or "lagrangian".
    pub mode: FusionMode,
    /// Learning rate of the operators, as a multiple of the weights'. Default: 30 (our pilots: 3e-2 beside 1e-3).
    pub operator_rate: f64,
    /// "lagrangian": learning rate of the multipliers; has to grow where steps are few. Default: 1.
    pub multiplier_lr: f64,
    /// "lagrangian": share of the steps over which the target falls to 0. Default: 0.5.
    pub target_warmup: f64,
}

const NOTHING_TO_FUSE: &str = "no layer has heads to fuse; make such a model with `polyhead convert CKPT --to decoupled_head \
    --kv-budget 0.25 --fusing --out DIR` and name it in model.pretrained";

impl Default for FusionConfig {
    fn default() -> Self {
        Self { mode: FusionMode::Anneal, operator_rate: 30.0, multiplier_lr: 1.0, target_warmup: 0.5 }
    }
}

/// How heads are fused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FusionMode {
    /// By averaging operators more and more.
    #[default]
    Anneal,
    /// By a constraint on what is left to fuse.
    Lagrangian,
}

impl FusionConfig {
    /// Checks the numbers, and where the model is known, that it has heads to fuse.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self, decoder: Option<&DecoderConfig>) -> Result<(), ConfigError> {
        require_range("operator_rate", self.operator_rate, 0.0..=1e6)?;
        require_range("multiplier_lr", self.multiplier_lr, 0.0..=1e6)?;
        require_range("target_warmup", self.target_warmup, 0.0..=1.0)?;
        let Some(decoder) = decoder.filter(|decoder| decoder.validate().is_ok()) else { return Ok(()) };
        let fuses = (0..decoder.n_layers).any(|layer| decoder.mechanism(layer).fuses());
        require(fuses, "mode", || NOTHING_TO_FUSE.into())
    }
}

/// The multipliers with the moments of their ascent.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Multipliers {
    /// λ1, λ2
    values: [f64; 2],
    first: [f64; 2],
    second: [f64; 2],
    updates: u64,
    /// Lf before the first step.
    scatter_at_start: Option<f64>,
}

impl Multipliers {
    /// One step of Adam uphill, along `(Lf - t, (Lf - t)²)`.
    fn ascend(&mut self, excess: f64, lr: f64) {
        self.updates += 1;
        for (at, gradient) in [excess, excess * excess].into_iter().enumerate() {
            self.first[at] = BETAS.0 * self.first[at] + (1.0 - BETAS.0) * gradient;
            self.second[at] = BETAS.1 * self.second[at] + (1.0 - BETAS.1) * gradient * gradient;
            let mean = self.first[at] / (1.0 - BETAS.0.powi(self.updates as i32));
            let spread = (self.second[at] / (1.0 - BETAS.1.powi(self.updates as i32))).sqrt();
            self.values[at] += lr * mean / (spread + EPS);
        }
    }

    /// As numbers of which not a bit is lost.
    fn state(&self) -> Value {
        let bits = |values: &[f64]| values.iter().map(|value| value.to_bits()).collect::<Vec<u64>>();
        let numbers = [self.values, self.first, self.second].concat();
        json!({ "bits": bits(&numbers), "updates": self.updates,
            "scatter_at_start": self.scatter_at_start.map(f64::to_bits), "values": self.values })
    }

    fn restore(state: &Value) -> Option<Self> {
        if state.is_null() {
            return Some(Self::default());
        }
        let bits = state["bits"].as_array()?.iter().map(|bits| bits.as_u64().map(f64::from_bits));
        let numbers: Vec<f64> = bits.collect::<Option<_>>()?;
        let pair = |at: usize| Some([*numbers.get(at)?, *numbers.get(at + 1)?]);
        let scatter_at_start = state["scatter_at_start"].as_u64().map(f64::from_bits);
        let updates = state["updates"].as_u64()?;
        Some(Self { values: pair(0)?, first: pair(2)?, second: pair(4)?, updates, scatter_at_start })
    }
}

/// `t = Lf(0) max(0, 1 - step / warmup)`, steps counted from 0.
pub fn target(scatter_at_start: f64, step: f64, warmup: f64) -> f64 {
    scatter_at_start * (1.0 - step / warmup.max(f64::MIN_POSITIVE)).max(0.0)
}

/// The slope of `λ1 (Lf - t) + λ2 (Lf - t)²` along Lf: the weight that the scatter has in the objective of a step.
pub fn slope([linear, square]: [f64; 2], excess: f64) -> f64 {
    linear + 2.0 * square * excess
}

/// Training with heads that are being fused.
#[derive(Debug)]
pub struct Fusion {
    config: FusionConfig,
    updater: Updater,
    steps: u64,
    multipliers: Multipliers,
}

impl Fusion {
    /// Fusion over all steps of a run.
    ///
    /// # Errors
    /// If the state is not one of fusion's.
    pub fn new(config: FusionConfig, parts: Parts<'_>, state: &Value) -> Result<Self, TrainError> {
        let multipliers = Multipliers::restore(state).ok_or_else(|| TrainError::State {
            path: STATE.into(),
            problem: "procedure: not the state of fusion".into(),
        })?;
        let rate = config.operator_rate;
        let optimizer = parts.optimizer.with_rates(vec![("_operator".into(), rate)]);
        Ok(Self { updater: Updater::new(optimizer, parts.training), steps: parts.training.steps, multipliers, config })
    }

    /// How far operators are averaged once `step` steps are done.
    fn anneal(&self, step: u64) -> f64 {
        match self.config.mode {
            FusionMode::Anneal => (step as f64 / (ANNEALED * self.steps as f64)).min(1.0),
            FusionMode::Lagrangian => 0.0,
        }
    }
}

fn set_anneal(model: &mut Decoder, share: f64) {
    model.layers.iter_mut().for_each(|layer| layer.attention.set_anneal(share));
}

impl Procedure for Fusion {
    fn step(
        &mut self,
        mut model: Decoder,
        batches: &[Batch],
        context: &StepContext<'_>,
    ) -> Result<(Decoder, StepReport), TrainError> {
        let before = context.step - 1;
        set_anneal(&mut model, self.anneal(before));
        let left = surgery::mean_scatter(&model.valid())
            .ok_or_else(|| TrainError::Setting(format!("[procedure.fusion]: {NOTHING_TO_FUSE}")))?;
        let start = *self.multipliers.scatter_at_start.get_or_insert(left);
        let aim = target(start, before as f64, self.config.target_warmup * self.steps as f64);
        let weight = match self.config.mode {
            FusionMode::Anneal => 0.0,
            FusionMode::Lagrangian => slope(self.multipliers.values, left - aim),
        };
        let mut step = Step::new(context);
        for batch in batches {
            step.begin_pass(&model);
            let loss = model.loss_of_pass(batch, Pass::new(&batch.mask(ContextMask::Causal)));
            let objective = step.objective(loss, batch, weight);
            step.add_backward(objective, &model);
        }
        step.measured.push(("fusion/anneal".into(), self.anneal(before)));
        if self.config.mode == FusionMode::Lagrangian {
            let [linear, square] = self.multipliers.values;
            step.measured.extend([
                ("fusion/target".into(), aim),
                ("fusion/lambda_1".into(), linear),
                ("fusion/lambda_2".into(), square),
            ]);
        }
        let (mut model, report) = self.updater.finish(model, step)?;
        if self.config.mode == FusionMode::Lagrangian && !report.skipped {
            self.multipliers.ascend(left - aim, self.config.multiplier_lr);
        }
        set_anneal(&mut model, self.anneal(context.step));
        Ok((model, report))
    }

    fn optimizer(&self) -> &Optimizer {
        &self.updater.optimizer
    }

    fn state(&self) -> Value {
        self.multipliers.state()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn multipliers_rise_where_too_much_is_left_and_survive_a_restart() {
        let mut multipliers = Multipliers { scatter_at_start: Some(0.7), ..Multipliers::default() };
        for excess in [0.5, 0.25, 0.1] {
            multipliers.ascend(excess, 1.0);
        }
        assert!(multipliers.values.iter().all(|value| *value > 1.0), "{multipliers:?}");
        let text = multipliers.state().to_string();
        assert_eq!(Multipliers::restore(&serde_json::from_str(&text).unwrap()), Some(multipliers));
        assert_eq!(Multipliers::restore(&json!({ "other": 1 })), None);
        multipliers.ascend(-5.0, 1.0);
        let [linear, square] = multipliers.values;
        multipliers.ascend(-5.0, 1.0);
        assert!(multipliers.values[0] < linear && multipliers.values[1] > square, "{multipliers:?}");
    }
}
