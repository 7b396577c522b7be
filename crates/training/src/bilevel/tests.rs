//! What is ours, and what no golden number shows.
#![allow(clippy::unwrap_used)]

use burn::tensor::Device;
use polyhead_kernels::seed_random;
use polyhead_models::weights::named;
use polyhead_models::{DecoderConfig, IGNORE, Role};
use serde_json::json;

use super::*;
use crate::standard::{Standard, StandardConfig};

const SEQ: usize = 12;

fn model() -> Decoder {
    let config: DecoderConfig = serde_json::from_value(json!({
        "d_model": 16, "n_layers": 3, "attention": { "softmax": { "n_heads": 4 } },
    }))
    .unwrap();
    let device = Device::flex().autodiff();
    seed_random(5);
    config.init(30, &device)
}

/// Two rows of a question and an answer, another one in each.
fn batch(seed: u32) -> Batch {
    let tokens: Vec<u32> = (0..2 * SEQ as u32).map(|at| (at * 7 + at * at * 3 + seed) % 30).collect();
    let answer = |at: usize| at % SEQ >= 7;
    let target = |at: usize| match at % SEQ {
        6..=10 => i64::from(tokens[at + 1]),
        _ => IGNORE,
    };
    Batch {
        batch: 2,
        seq: SEQ,
        targets: (0..tokens.len()).map(target).collect(),
        roles: Some((0..tokens.len()).map(|at| if answer(at) { Role::Assistant } else { Role::User }).collect()),
        tokens,
        ..Batch::default()
    }
}

fn config() -> BilevelConfig {
    BilevelConfig { rank: 2, alpha: 4.0, layer_fraction: 0.5, ..BilevelConfig::default() }
}

fn training() -> TrainingConfig {
    serde_json::from_value(json!({ "steps": 3, "seq_len": SEQ, "batch_size": 2 })).unwrap()
}

/// Three steps of two batches each.
fn train(mut procedure: Box<dyn Procedure>) -> (Decoder, Vec<StepReport>, Box<dyn Procedure>) {
    let (mut model, mut reports) = (model(), Vec::new());
    for step in 1..=3 {
        let position = 2 * (step - 1);
        let batches = [batch(position as u32), batch(position as u32 + 1)];
        let (targets, ranks) = (batches.iter().map(Batch::target_tokens).sum(), Ranks::alone(Default::default()));
        let context = StepContext { step, lr: 1e-2, seed: 9, position, passes: 2, targets, ranks: &ranks };
        let report;
        (model, report) = procedure.step(model, &batches, &context).unwrap();
        reports.push(report);
    }
    (model, reports, procedure)
}

fn bilevel(config: BilevelConfig) -> Box<dyn Procedure> {
    Box::new(Bilevel::new(config, Optimizer::new(Default::default()), &training()))
}

fn masked() -> Box<dyn Procedure> {
    let config = StandardConfig { context_mask: ContextMask::Bidirectional };
    Box::new(Standard::new(&config, Optimizer::new(Default::default()), &training()))
}

#[test]
fn without_inner_steps_it_is_plain_training_under_the_mask_bit_for_bit() {
    let (expected, reports, _) = train(masked());
    for config in [
        BilevelConfig { inner_steps: 0, ..config() },
        BilevelConfig { inner: Inner::Off, ..config() },
        BilevelConfig { inner: Inner::Off, clip_includes_fast: true, second_order: true, ..config() },
        BilevelConfig { layer_fraction: 0.0, ..config() },
    ] {
        let (got, ours, _) = train(bilevel(config));
        assert_eq!(named(&got), named(&expected));
        let losses = |reports: &[StepReport]| reports.iter().map(|one| one.loss.to_bits()).collect::<Vec<_>>();
        assert_eq!(losses(&ours), losses(&reports));
    }
    assert_ne!(named(&train(bilevel(config())).0), named(&expected), "inner steps change what is learned");
}

#[test]
fn inner_loss_falls_and_fast_weights_are_seen_by_nobody() {
    let (model, reports, procedure) = train(bilevel(config()));
    for report in &reports {
        let value = |name| report.measured.iter().find(|(other, _)| *other == name).unwrap().1;
        assert!(value("bilevel/inner_loss_1") < value("bilevel/inner_loss_0"), "{report:?}");
        assert!(report.loss < value("bilevel/inner_loss_0"));
    }
    assert_eq!(named(&model).len(), named(&self::model()).len());
    let states = procedure.optimizer().tensors();
    assert_eq!(states.len(), 2 * named(&model).len(), "two moments a parameter and nothing more");
}

#[test]
fn fast_weights_are_a_function_of_seed_and_position() {
    let draw = |seed, position| config().fresh(&model(), seed, position).unwrap();
    let numbers = |fast: FastWeights| -> Vec<f32> {
        fast.tensors().flat_map(|x| x.to_data().iter::<f32>().collect::<Vec<_>>()).collect()
    };
    let first = numbers(draw(1, 2));
    assert_eq!(first, numbers(draw(1, 2)));
    assert!(first != numbers(draw(1, 3)) && first != numbers(draw(2, 2)));
    let layers: Vec<usize> = draw(1, 2).0.iter().map(Vec::len).collect();
    assert_eq!(layers, [0, 3, 3], "floor(3 * 0.5) = 1");
    let a = draw(1, 2).0[1][0].a.clone();
    let largest: f32 = a.clone().abs().max().into_scalar();
    assert!(largest <= 0.25 && largest > 0.2, "uniform up to 1 / sqrt(16): {largest}");
}

#[test]
fn the_layers_are_the_authors() {
    let first = |layer_fraction, n_layers| BilevelConfig { layer_fraction, ..config() }.first_layer(n_layers);
    assert_eq!([first(0.35, 28), first(0.9, 10), first(1.0, 5), first(0.0, 5)], [18, 0, 0, 5]);
}

#[test]
fn a_batch_that_asks_nothing_adapts_nothing() {
    let mut silent = batch(0);
    silent.targets.fill(IGNORE);
    let fresh = config().fresh(&model(), 0, 0).unwrap();
    let adapted = adapt(&model(), &silent, &config(), fresh);
    assert!(adapted.steps.is_empty() && adapted.trajectory.len() == 1);
    let mut procedure = bilevel(BilevelConfig { clip_includes_fast: true, second_order: true, ..config() });
    let ranks = Ranks::alone(Default::default());
    let context = StepContext { step: 1, lr: 1e-2, seed: 0, position: 0, passes: 1, targets: 0, ranks: &ranks };
    let (_, report) = procedure.step(model(), &[silent], &context).unwrap();
    assert_eq!((report.loss, report.targets, report.grad_norm), (0.0, 0, 0.0));
}

#[test]
fn conversations_in_one_row_neither_see_nor_shift_each_other() {
    let apart = batch(4);
    let packed = Batch {
        batch: 1,
        seq: 2 * SEQ,
        documents: Some((0..2 * SEQ).map(|at| (at / SEQ) as u32).collect()),
        ..apart.clone()
    };
    let model = model();
    let fresh = || config().fresh(&model, 0, 0).unwrap();
    let (one, two) = (adapt(&model, &apart, &config(), fresh()), adapt(&model, &packed, &config(), fresh()));
    for (a, b) in one.steps.iter().zip(&two.steps) {
        assert!((a.loss - b.loss).abs() < 1e-6, "{} and {}", a.loss, b.loss);
    }
    let loss = |batch: &Batch| -> f32 {
        model.loss_of_pass(batch, Pass::new(&batch.mask(ContextMask::Bidirectional))).cross_entropy.into_scalar()
    };
    assert!((loss(&apart) - loss(&packed)).abs() < 1e-5);
    let masses = |batch: &Batch| engagement::measure(&model.valid(), batch, ContextMask::Bidirectional, &[]);
    for (a, b) in masses(&apart).iter().zip(masses(&packed)) {
        assert!((a.sink_mass - b.sink_mass).abs() < 1e-6 && (a.context_engagement - b.context_engagement).abs() < 1e-6);
        // Fresh weights attend nearly evenly: 7 tokens of context, the first of them the sink.
        assert!(a.context_engagement > 4.0 * a.sink_mass);
    }
}

#[test]
fn wrong_settings_are_told() {
    let wrong = BilevelConfig { targets: vec!["fc1".into()], ..config() };
    let told = wrong.fresh(&model(), 0, 0).unwrap_err().to_string();
    assert!(told.starts_with("procedure.bilevel.targets") && told.contains("down_proj"), "{told}");
    for (config, field) in [
        (BilevelConfig { inner_lr: f64::NAN, ..config() }, "inner_lr"),
        (BilevelConfig { layer_fraction: 1.5, ..config() }, "layer_fraction"),
        (BilevelConfig { rank: 0, ..config() }, "rank"),
    ] {
        assert_eq!(config.validate().unwrap_err().field, field);
    }
}
