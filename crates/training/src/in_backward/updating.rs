//! An update during the backward pass: each layer gets its part as soon as the pass has gone through it, and its gradients are given up
//! before those of the layer below are made. The norm of all gradients is known at the end alone, so that nothing is clipped by it.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Gradients;
use polyhead_kernels::GradsSoFar;

use super::{Hooked, InBackward, of_layer};
use crate::gradients::squares;
use crate::optimizer::{Optimizer, Update};

/// A model and its optimizer while parts of an update are made.
pub(crate) struct Updating<M> {
    model: M,
    optimizer: Optimizer,
    update: Update,
    /// By parameter: the square of its gradient.
    squares: Vec<Option<f64>>,
    updated: bool,
}

/// What an update in parts has come to.
pub(crate) struct Updated<M> {
    pub(crate) model: M,
    pub(crate) optimizer: Optimizer,
    /// The norm of all gradients; not finite where one was not, behind which nothing was updated.
    pub(crate) grad_norm: f64,
    /// Whether parameters have moved.
    pub(crate) updated: bool,
}

impl<M: Module + 'static> Updating<M> {
    /// Before the backward pass. Nobody else may hold the weights by then, or they are copied.
    pub(crate) fn new(model: M, optimizer: Optimizer, update: Update) -> Self {
        Self { model, optimizer, update, squares: Vec::new(), updated: false }
    }

    /// Runs the backward pass.
    pub(crate) fn run(self, hooked: Hooked<Self>, backward: impl FnOnce() -> Gradients) -> Updated<M> {
        let (state, grads) = hooked.run(self, backward);
        let rest = GradientsParams::from_grads(grads, &state.model);
        let Self { model, optimizer, squares, updated, .. } = state.apply(rest);
        let grad_norm = squares.into_iter().flatten().fold(0.0, |sum, square| sum + square).sqrt();
        Updated { model, optimizer, grad_norm, updated }
    }

    /// After one part, unless there is or was something in a gradient that is not finite.
    fn apply(mut self, mut grads: GradientsParams) -> Self {
        let found = squares(&grads, &self.model);
        self.squares.resize(found.len(), None);
        for (all, found) in self.squares.iter_mut().zip(found) {
            *all = all.or(found);
        }
        if !self.squares.iter().flatten().all(|square| square.is_finite()) {
            return self;
        }
        if !self.updated {
            self.optimizer.begin();
        }
        let model = self.optimizer.apply(self.model, &mut grads, self.update);
        Self { model, updated: true, ..self }
    }
}

impl<M: Module + 'static> InBackward for Updating<M> {
    fn after_layer(self, layer: usize, grads: &mut GradsSoFar<'_>) -> Self {
        let grads = of_layer(&self.model, layer, grads);
        self.apply(grads)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex};

    use burn::module::Param;
    use burn::tensor::{Device, Tensor};
    use polyhead_attention::AttentionConfig;
    use polyhead_kernels::{BackwardHook, seed_random};
    use polyhead_models::adapters::LoraConfig;
    use polyhead_models::weights::{ParameterMapper, layer_of, map_parameters, named};
    use polyhead_models::{ActivationCheckpointing, Batch, Decoder, DecoderConfig, TrainBatch, train_only};

    use super::*;
    use crate::config::{MuonConfig, OptimizerConfig, ParallelConfig, TrainingConfig};
    use crate::procedure::{Procedure, StepContext, StepReport};
    use crate::ranks::Ranks;
    use crate::standard::{Standard, StandardConfig};

    fn decoder(more: serde_json::Value, attention: &AttentionConfig) -> Decoder {
        let mut config = serde_json::json!({ "d_model": 24, "n_layers": 4, "attention": attention });
        config.as_object_mut().unwrap().append(&mut more.as_object().unwrap().clone());
        let config: DecoderConfig = serde_json::from_value(config).unwrap();
        config.validate().unwrap();
        seed_random(3);
        config.init(11, &Device::flex().autodiff())
    }

    fn batch(step: u64) -> Batch {
        let (tokens, targets) =
            ((0..14).map(|at| (at * step as u32) % 11).collect(), (1..15).map(|at| at % 11).collect());
        Batch { batch: 2, seq: 7, tokens, targets, ..Batch::default() }
    }

    fn procedure(optimizer: &OptimizerConfig, in_backward: bool) -> Standard {
        let training = serde_json::json!({
            "steps": 1, "seq_len": 7, "batch_size": 2, "max_norm": 0, "optimizer_in_backward": in_backward
        });
        let training: TrainingConfig = serde_json::from_value(training).unwrap();
        Standard::new(&StandardConfig::default(), Optimizer::new(optimizer.clone()), &training)
    }

    fn step(procedure: &mut Standard, model: Decoder, step: u64) -> (Decoder, StepReport) {
        let (ranks, batch) = (Ranks::alone(ParallelConfig::default()), batch(step));
        let context =
            StepContext { step, lr: 0.01, seed: 0, position: step, passes: 1, targets: batch.targets(), ranks: &ranks };
        context.seed_pass(0);
        procedure.step(model, &[batch], &context).unwrap()
    }

    /// The bits of weights and moments after three steps, and what the steps told.
    fn train(
        model: &Decoder,
        optimizer: &OptimizerConfig,
        in_backward: bool,
    ) -> (BTreeMap<String, Vec<u32>>, Vec<StepReport>) {
        let (mut model, mut procedure) = (model.clone(), procedure(optimizer, in_backward));
        let mut reports = Vec::new();
        for at in 1..=3 {
            let (stepped, report) = step(&mut procedure, model, at);
            model = stepped;
            reports.push(report);
        }
        let optimizer = Procedure::<Decoder>::optimizer(&procedure);
        assert_eq!(optimizer.steps(), 3);
        let moments = optimizer.tensors().into_iter().map(|held| held.named());
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
        (named(&model).into_iter().chain(moments).map(|one| (one.name, bits(one.values))).collect(), reports)
    }

    fn assert_same(what: &str, model: &Decoder, optimizer: &OptimizerConfig) {
        let plain = train(model, optimizer, false);
        assert!(
            plain.0
                != named(model)
                    .into_iter()
                    .map(|one| (one.name, one.values.into_iter().map(f32::to_bits).collect()))
                    .collect()
        );
        for checkpointing in [ActivationCheckpointing::None, ActivationCheckpointing::Block] {
            let early = train(&model.clone().with_checkpointing(checkpointing), optimizer, true);
            for (name, bits) in &plain.0 {
                assert_eq!(early.0.get(name), Some(bits), "{what}, {checkpointing:?}: {name}");
            }
            assert!(early == plain, "{what}, {checkpointing:?}: {:?} {:?}", early.1, plain.1);
        }
    }

    #[test]
    fn weights_and_moments_of_every_mechanism_have_the_bits_of_one_update() {
        let adamw = OptimizerConfig::default();
        let causal = |config: &AttentionConfig| config.check_causal().is_ok();
        let examples: Vec<_> = AttentionConfig::examples().into_iter().filter(causal).collect();
        assert!(examples.len() > 8);
        for attention in &examples {
            assert_same(attention.name(), &decoder(serde_json::json!({}), attention), &adamw);
        }
        let softmax = serde_json::from_str(r#"{"softmax":{"n_heads":2,"qkv_bias":true,"qk_norm":true}}"#).unwrap();
        let forms = [
            serde_json::json!({ "tie_embeddings": false, "norm": "layer", "mlp": "gelu", "parallel_residual": true }),
            serde_json::json!({ "learned_positions": 7, "rope": false, "mlp": "identity" }),
        ];
        for form in forms {
            assert_same(&form.to_string(), &decoder(form.clone(), &softmax), &adamw);
        }
        let model = decoder(serde_json::json!({}), &softmax);
        assert_same("Muon", &model, &OptimizerConfig::Muon(MuonConfig::default()));
        let frozen = train_only(model.clone(), |name| !name.contains("embedding") && !name.starts_with("layers.1"));
        assert_same("frozen", &frozen, &adamw);
        let lora = LoraConfig { rank: 2, targets: vec!["q_proj".into(), "down_proj".into()], ..LoraConfig::default() };
        assert_same("LoRA", &model.with_lora(&lora, 5).unwrap(), &adamw);
    }

    /// The gradients of a layer are given up before those of the layer below are made: what the last hook finds is of its layer alone.
    #[test]
    fn gradients_of_layers_are_not_there_together() {
        let softmax = serde_json::from_str(r#"{"softmax":{"n_heads":2}}"#).unwrap();
        let model = decoder(serde_json::json!({}), &softmax);
        let (watched, seen) = (model.clone(), Arc::new(Mutex::new(Vec::new())));
        let told = seen.clone();
        let hook = BackwardHook::new(move |layer, grads| {
            let there = (0..4).filter(|&of| !of_layer(&watched, of, grads).is_empty());
            told.lock().unwrap().push((layer, there.collect::<Vec<_>>()));
        });
        let loss = model.clone().with_hook(hook).loss(&batch(1), polyhead_attention::Observe::Nothing);
        let _ = loss.cross_entropy.backward();
        assert_eq!(*seen.lock().unwrap(), [(3, vec![3]), (2, vec![2]), (1, vec![1]), (0, vec![0])]);
    }

    /// All values of some parameters replaced by one.
    struct Spoil<'a>(&'a [(&'static str, f64)]);
    impl ParameterMapper for Spoil<'_> {
        fn map<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            match self.0.iter().find(|one| one.0 == name) {
                Some((_, by)) => param.map(|value| Tensor::from_inner(value.inner() * 0.0 + *by).require_grad()),
                None => param,
            }
        }
    }

    /// The names of the parameters that a step has moved, and what it told.
    fn moved_by(spoil: Spoil<'_>) -> (Vec<String>, StepReport, u64) {
        let softmax = serde_json::from_str(r#"{"softmax":{"n_heads":2}}"#).unwrap();
        let model = map_parameters(decoder(serde_json::json!({}), &softmax), spoil).0;
        let mut procedure = procedure(&OptimizerConfig::default(), true);
        let before = named(&model);
        let (after, report) = step(&mut procedure, model, 1);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let pairs = before.into_iter().zip(named(&after));
        let moved =
            pairs.filter(|(before, after)| bits(&before.values) != bits(&after.values)).map(|(one, _)| one.name);
        (moved.collect(), report, Procedure::<Decoder>::optimizer(&procedure).steps())
    }

    #[test]
    fn a_loss_that_is_no_number_moves_nothing() {
        let (moved, report, steps) = moved_by(Spoil(&[("norm.weight", f64::NAN)]));
        assert!(report.skipped && report.refused && !report.torn && report.loss.is_nan());
        assert_eq!((moved, steps), (vec![], 0));
    }

    /// The square of a gradient of the second layer leaves the numbers, while the loss is one.
    #[test]
    fn a_gradient_that_is_no_number_ends_the_update_which_is_told() {
        let large = [("layers.1.attention.v_proj.weight", 1e25), ("layers.1.attention.o_proj.weight", 1e-25)];
        let (moved, report, _) = moved_by(Spoil(&large));
        assert!(report.skipped && report.refused && report.torn && report.loss.is_finite());
        assert!(!report.grad_norm.is_finite());
        assert!(!moved.is_empty() && moved.iter().all(|name| layer_of(name) >= Some(2)), "{moved:?}");
        let large = [("layers.3.attention.v_proj.weight", 1e25), ("layers.3.attention.o_proj.weight", 1e-25)];
        let (moved, report, steps) = moved_by(Spoil(&large));
        assert!(report.refused && !report.torn);
        assert_eq!((moved, steps), (vec![], 0));
    }
}
