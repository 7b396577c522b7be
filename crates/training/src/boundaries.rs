//! Training of the predictor of boundaries that DHSA's chunks begin at (arXiv 2510.24606; see `attention/sparse/boundaries.rs`).
//!
//! The model stays as it is: layer by layer it is run over the batch, its attention weights give the labels of that layer on the fly,
//! and its keys are what the predictor reads. The loss is the mean over all layers and labelled gaps.
//!
//! Left out: the authors' files of labels, which are the same numbers kept on disk, and their mixture of data.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::{DType, Tensor};
use polyhead_attention::sparse::boundaries::{
    BoundaryPredictor, LabelConfig, PredictorConfig, labelled_gaps, mass_ratios, rows_of,
};
use polyhead_attention::{KvSite, QuerySite};
use polyhead_kernels::in_type;
use polyhead_models::sites::SitePlan;
use polyhead_models::{Batch, ConfigError, ContextMask, Decoder, DecoderConfig, Loss, Pass, require};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::config::TrainingConfig;
use crate::optimizer::Optimizer;
use crate::procedure::{HeldOut, Procedure, StepContext, StepReport};
use crate::update::{Step, Updater};

/// `[procedure.boundaries]`: train a predictor of boundaries for the model's keys, and nothing else.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BoundariesConfig {
    /// The predictor.
    pub predictor: PredictorConfig,
    /// What labels and the loss are made with.
    pub labels: LabelConfig,
}

impl BoundariesConfig {
    /// Checks the numbers, against a run, and against a model where it is known.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self, decoder: Option<&DecoderConfig>, training: &TrainingConfig) -> Result<(), ConfigError> {
        let channels = decoder.map(DecoderConfig::key_channels).transpose()?;
        self.predictor.validate(channels).map_err(|error| error.within("predictor"))?;
        self.labels.validate().map_err(|error| error.within("labels"))?;
        let (window, seq) = (self.predictor.window, training.seq_len);
        require(!labelled_gaps(seq, window).is_empty(), "predictor.window", || {
            format!(
                "window ({window}) leaves no gap of training.seq_len ({seq}) with a label: rows need more than {} tokens",
                4 * window
            )
        })
    }
}

/// The loop body.
#[derive(Debug)]
pub struct Boundaries {
    config: BoundariesConfig,
    updater: Updater,
}

/// A layer's keys and the labels of its gaps.
struct Labelled {
    /// `[batch, kv_heads, seq, width]`, rotated, on the inner device.
    keys: Tensor<4>,
    /// `[batch, seq]`: 1 behind a boundary.
    labels: Vec<f32>,
}

/// The gaps of a batch that have a label.
fn counted(batch: &Batch, gaps: &Range<usize>) -> Vec<bool> {
    (0..batch.batch * batch.seq).map(|at| gaps.contains(&(at % batch.seq))).collect()
}

impl Boundaries {
    /// A loop body around an optimiser, fresh or with the state of an earlier session.
    pub fn new(config: BoundariesConfig, optimizer: Optimizer, training: &TrainingConfig) -> Self {
        Self { config, updater: Updater::new(optimizer, training) }
    }

    /// Runs the frozen model, `on_layer` taking each layer's keys and labels.
    fn each_layer(&self, frozen: &Decoder, batch: &Batch, on_layer: &mut dyn FnMut(Labelled)) {
        let (mask, window) = (batch.mask(ContextMask::Causal), self.config.predictor.window);
        let mut hidden = frozen.embed(frozen.tokens(batch));
        for layer in 0..frozen.layers.len() {
            let taps = vec![(layer, KvSite::RotK.into()), (layer, QuerySite::Weights.into())];
            let pass = Pass { sites: SitePlan { edits: Vec::new(), taps }, ..Pass::new(&mask) };
            let forward = frozen.run_layers(layer..layer + 1, hidden, pass);
            hidden = forward.hidden;
            let read = |site| {
                forward.taps.iter().find(|tap| tap.site == site).map(|tap| in_type(tap.values.clone(), DType::F32))
            };
            let (Some(keys), Some(weights)) = (read(KvSite::RotK.into()), read(QuerySite::Weights.into())) else {
                continue;
            };
            let weights: Vec<f32> = weights.mean_dim(1).into_data().iter::<f32>().collect();
            let label = |ratio: f64| f32::from(u8::from(self.config.labels.soft(ratio) >= 0.5));
            let rows = weights.chunks(batch.seq * batch.seq);
            let labels = rows.flat_map(|row| mass_ratios(row, window, None).into_iter().map(label)).collect();
            on_layer(Labelled { keys, labels });
        }
    }

    /// The predictor of the model that is trained.
    fn predictor(model: &Decoder) -> Result<BoundaryPredictor, TrainError> {
        let none = || TrainError::Setting("procedure.boundaries: the model has no predictor of boundaries".into());
        model.boundaries.clone().ok_or_else(none)
    }
}

impl Procedure for Boundaries {
    fn step(
        &mut self,
        model: Decoder,
        batches: &[Batch],
        context: &StepContext<'_>,
    ) -> Result<(Decoder, StepReport), TrainError> {
        let (frozen, predictor) = (model.valid(), Self::predictor(&model)?);
        let mut step = Step::new(context);
        for batch in batches {
            let gaps = labelled_gaps(batch.seq, self.config.predictor.window);
            let counted = counted(batch, &gaps);
            // The mean over a batch's layers and gaps, as a sum over its targets.
            let share = batch.target_tokens() as f64 / (batch.batch * gaps.len() * frozen.layers.len()).max(1) as f64;
            let mut found = Vec::new();
            self.each_layer(&frozen, batch, &mut |layer| found.push(layer));
            for Labelled { keys, labels } in found {
                let logits = predictor.logits(Tensor::from_inner(keys));
                let cross_entropy = self.config.labels.loss(logits, &labels, &counted) * share;
                let loss = Loss::of(cross_entropy);
                let objective = step.objective(loss, batch, 0.0);
                step.add_backward(objective, &model);
            }
        }
        self.updater.finish(model, step)
    }

    /// Under `boundaries/`: the loss, and how well the gaps that are boundaries are found where the logit is above 0.
    fn measure(&self, model: &Decoder, held_out: HeldOut<'_>) -> Result<Vec<(String, f64)>, TrainError> {
        let frozen = model.valid();
        let predictor = Self::predictor(&frozen)?;
        let (mut loss, mut gaps_seen, mut right, mut found, mut there) = (0.0, 0u64, 0u64, 0u64, 0u64);
        for position in 0..held_out.count {
            let batch = held_out.batches.batch(position)?;
            let counted = counted(&batch, &labelled_gaps(batch.seq, self.config.predictor.window));
            self.each_layer(&frozen, &batch, &mut |Labelled { keys, labels }| {
                let logits = predictor.logits(keys);
                let sum = self.config.labels.loss(logits.clone(), &labels, &counted);
                loss += f64::from(sum.into_scalar::<f32>());
                let gaps =
                    rows_of(logits).concat().into_iter().zip(labels).zip(&counted).filter(|(_, counted)| **counted);
                for ((logit, label), _) in gaps {
                    let (predicted, boundary) = (logit > 0.0, label == 1.0);
                    gaps_seen += 1;
                    right += u64::from(predicted && boundary);
                    found += u64::from(predicted);
                    there += u64::from(boundary);
                }
            });
        }
        let share = |part: u64, of: u64| part as f64 / of.max(1) as f64;
        Ok(vec![
            ("boundaries/validation_loss".into(), loss / gaps_seen.max(1) as f64),
            ("boundaries/precision".into(), share(right, found)),
            ("boundaries/recall".into(), share(right, there)),
            ("boundaries/f1".into(), share(2 * right, found + there)),
            ("boundaries/rate".into(), share(there, gaps_seen)),
        ])
    }

    fn optimizer(&self) -> &Optimizer {
        &self.updater.optimizer
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_kernels::seed_random;
    use polyhead_models::train_only;
    use polyhead_models::weights::named;

    use super::*;
    use crate::config::ParallelConfig;
    use crate::ranks::Ranks;

    #[test]
    fn the_predictor_learns_and_the_model_stays() {
        let config = serde_json::json!({ "d_model": 8, "n_layers": 2, "attention": { "softmax": { "n_heads": 2 } } });
        let config: DecoderConfig = serde_json::from_value(config).unwrap();
        seed_random(3);
        let settings = BoundariesConfig {
            predictor: PredictorConfig { window: 2, hidden: 16, n_heads: 2, gated_pooling: true },
            // A ratio of 1 and a bit, so that fresh weights have boundaries.
            labels: LabelConfig { ratio: 1.05, ..LabelConfig::default() },
        };
        let training: TrainingConfig =
            serde_json::from_value(serde_json::json!({ "steps": 1, "seq_len": 24, "batch_size": 2 })).unwrap();
        settings.validate(Some(&config), &training).unwrap();
        let model = config.init(11, &Device::flex().autodiff()).with_boundaries(&settings.predictor).unwrap();
        let mut model = train_only(model, |name| name.starts_with("boundaries."));
        let before = named(&model);
        let tokens: Vec<u32> = (0..48u32).map(|at| at * at * 5 % 11).collect();
        let targets = tokens.iter().map(|&id| i64::from(id)).collect();
        let batch = Batch { batch: 2, seq: 24, tokens, targets, ..Batch::default() };
        let mut procedure = Boundaries::new(settings, Optimizer::new(Default::default()), &training);
        let mut losses = Vec::new();
        let (ranks, targets) = (Ranks::alone(ParallelConfig::default()), batch.target_tokens());
        for step in 1..=12 {
            let context = StepContext { step, lr: 0.02, seed: 0, position: step, passes: 1, targets, ranks: &ranks };
            let (next, report) = procedure.step(model, std::slice::from_ref(&batch), &context).unwrap();
            losses.push(report.loss);
            model = next;
        }
        assert!(losses[11] < 0.8 * losses[0], "{losses:?}");
        for (old, new) in before.iter().zip(named(&model)) {
            assert_eq!(old.values != new.values, old.name.starts_with("boundaries."), "{}", old.name);
        }
    }
}
