#![allow(clippy::unwrap_used)]
use burn::tensor::Device;
use polyhead_kernels::seed_random;
use polyhead_models::adapters::{LoraConfig, is_pair};
use polyhead_models::weights::named;
use polyhead_models::{DecoderConfig, Sources, train_only};

use super::*;
use crate::config::ParallelConfig;
use crate::optimizer::Optimizer;
use crate::ranks::Ranks;

fn model() -> Decoder {
    model_of("softmax", &["q_proj", "k_proj"])
}

fn model_of(mechanism: &str, targets: &[&str]) -> Decoder {
    let config = serde_json::json!({ "d_model": 16, "n_layers": 2, "attention": { mechanism: { "n_heads": 2 } } });
    let config: DecoderConfig = serde_json::from_value(config).unwrap();
    seed_random(3);
    let model = config.init(11, &Device::flex().autodiff());
    let targets = targets.iter().map(|&target| target.into()).collect();
    let pairs = LoraConfig { rank: 4, alpha: 8.0, targets, ..LoraConfig::default() };
    train_only(model.with_lora(&pairs, 5).unwrap(), is_pair)
}

/// Two rows of two documents each: the first of a row is to be forgotten.
fn batch() -> Batch {
    let tokens: Vec<u32> = vec![1, 2, 3, 4, 5, 6, 7, 8, 3, 9, 1, 4, 2, 6];
    let documents = [0, 0, 0, 0, 1, 1, 1];
    let of = documents.map(|document| u16::from(document == 0));
    Batch {
        batch: 2,
        seq: 7,
        targets: tokens.iter().map(|&id| i64::from(id)).collect(),
        tokens,
        documents: Some([documents; 2].concat()),
        sources: Some(Sources { names: ["retain".into(), "forget".into()].into(), of: [of; 2].concat() }),
        ..Batch::default()
    }
}

fn begun(config: AttentionShiftingConfig, model: &Decoder) -> Result<AttentionShifting, TrainError> {
    let training = serde_json::from_str(r#"{"steps":1,"seq_len":7,"batch_size":2}"#).unwrap();
    AttentionShifting::new(config, Optimizer::new(Default::default()), &training, model)
}

fn procedure(config: AttentionShiftingConfig, model: &Decoder) -> AttentionShifting {
    begun(config, model).unwrap()
}

fn losses(config: AttentionShiftingConfig, model: &Decoder) -> [f64; 2] {
    let texts = texts(&batch(), "forget").unwrap();
    let losses = procedure(config, model).losses(model, &texts).unwrap();
    losses.map(|loss| f64::from(loss.unwrap().into_scalar::<f32>()))
}

#[test]
fn documents_are_texts_and_are_told_apart() {
    let found = texts(&batch(), "forget").unwrap();
    let told: Vec<(&[u32], bool)> = found.iter().map(|text| (&*text.tokens, text.forget)).collect();
    let expected: [(&[u32], bool); 4] =
        [(&[1, 2, 3, 4], true), (&[5, 6, 7], false), (&[8, 3, 9, 1], true), (&[4, 2, 6], false)];
    assert_eq!(told, expected);
    let error = texts(&batch(), "other").unwrap_err().to_string();
    assert!(error.contains("no source \"other\""), "{error}");
    assert!(texts(&Batch { sources: None, ..batch() }, "forget").is_err());
}

#[test]
fn nothing_is_lost_where_nothing_is_to_shift() {
    let model = model();
    let still = AttentionShiftingConfig { lambda: 0.0, rho: 0.0, ..AttentionShiftingConfig::default() };
    let [forget, retain] = losses(still, &model);
    assert!(forget.abs() < 1e-6 && retain.abs() < 1e-6, "{forget} {retain}");
    let [forget, retain] = losses(AttentionShiftingConfig::default(), &model);
    assert!(forget > 0.1 && retain < 0.1 && retain > 0.0, "{forget} {retain}");
}

#[test]
fn maps_from_disk_are_those_from_memory() {
    let model = model();
    let of = |memory_mib| losses(AttentionShiftingConfig { memory_mib, ..Default::default() }, &model);
    assert_eq!(of(0), of(1024));
    let mut procedure = procedure(AttentionShiftingConfig { memory_mib: 0, ..Default::default() }, &model);
    let frozen = frozen(&model);
    let first = procedure.reference.of(&frozen, &[1, 2, 3]).unwrap();
    procedure.reference.of(&frozen, &[4, 5]).unwrap();
    assert_eq!(procedure.reference.of(&frozen, &[1, 2, 3]).unwrap(), first);
    assert_eq!(first.maps.len(), 2 * 2 * 9);
}

#[test]
fn a_step_moves_the_pairs_alone_and_the_attention_to_its_target() {
    let start = model();
    let mut procedure = procedure(AttentionShiftingConfig::default(), &start);
    let (mut model, mut reported) = (start.clone(), Vec::new());
    let (ranks, targets) = (Ranks::alone(ParallelConfig::default()), batch().target_tokens());
    for step in 1..=60 {
        let context = StepContext { step, lr: 3e-2, seed: 0, position: step - 1, passes: 1, targets, ranks: &ranks };
        let (next, report) = procedure.step(model, &[batch()], &context).unwrap();
        model = next;
        reported.push(report);
    }
    let number = |at: usize, name: &str| {
        let named = reported[at].measured.iter().find(|(key, _)| key == &format!("attention_shifting/{name}"));
        named.unwrap().1
    };
    assert!(number(59, "forget_loss") < 0.5 * number(0, "forget_loss"), "{:?}", reported[59]);
    assert_eq!(number(0, "alpha"), 0.8, "forgetting dominates at first");
    let expected = 0.8 * number(0, "forget_loss") + 0.2 * number(0, "retain_loss");
    assert!((reported[0].loss - expected).abs() < 1e-5, "{:?}", reported[0]);
    for (old, new) in named(&start).into_iter().zip(named(&model)) {
        assert_eq!(old.values != new.values, is_pair(&old.name), "{}", old.name);
    }
}

#[test]
fn tokens_are_taken_away_alike_in_any_number_of_copies() {
    let (model, tokens) = (frozen(&model()), [1, 2, 3, 4, 5]);
    for masking in [Masking::Attention, Masking::Token] {
        let of = |taken| importance::entropies_without(&model, &tokens, taken, (masking, 9));
        let (whole, parts) = (of(0..5), [of(0..2), of(2..5)].concat());
        assert_eq!((whole.len(), parts.len()), (5, 5));
        for (whole, parts) in whole.concat().into_iter().zip(parts.concat()) {
            assert!((whole - parts).abs() < 1e-5, "{masking:?}: {whole} {parts}");
        }
        assert_eq!(whole, masked_entropies(&model, &tokens, masking, 9), "so short a text is taken at once");
    }
}

#[test]
fn what_does_not_fit_the_model_is_refused_before_a_step() {
    let message = |config, model: &Decoder| begun(config, model).unwrap_err().to_string();
    let ids = |ids: &[u32]| AttentionShiftingConfig {
        importance: Importance::Ids,
        ids: ids.into(),
        ..AttentionShiftingConfig::default()
    };
    let masked = |mask_id| AttentionShiftingConfig {
        importance: Importance::Entropy(Masking::Token),
        mask_id,
        ..AttentionShiftingConfig::default()
    };
    let model = model();
    assert!(begun(ids(&[0, 10]), &model).is_ok() && begun(masked(10), &model).is_ok());
    let error = message(ids(&[0, 11]), &model);
    assert!(error.contains("attention_shifting.ids: 11 is no token") && error.contains("(11)"), "{error}");
    assert!(message(masked(12), &model).contains("attention_shifting.mask_id: 12 is no token"));
    let error = message(AttentionShiftingConfig::default(), &model_of("gated_delta_net", &["o_proj"]));
    assert!(error.contains("no map of scores to shift"), "{error}");
}

#[test]
fn settings_that_cannot_be_are_named() {
    let field = |config: AttentionShiftingConfig| config.validate().unwrap_err().field;
    let with = |change: &dyn Fn(&mut AttentionShiftingConfig)| {
        let mut config = AttentionShiftingConfig::default();
        change(&mut config);
        field(config)
    };
    assert_eq!(with(&|config| config.lambda = 1.0), "lambda");
    assert_eq!(with(&|config| config.rho = -0.1), "rho");
    assert_eq!(with(&|config| config.alpha = Some(1.5)), "alpha");
    assert_eq!(with(&|config| config.fraction = 0.0), "fraction");
    assert_eq!(with(&|config| config.ids = vec![1]), "ids");
    assert_eq!(with(&|config| config.importance = Importance::Ids), "ids");
    let targets = |targets: &[&str]| {
        let targets: Vec<String> = targets.iter().map(|&target| target.into()).collect();
        AttentionShiftingConfig::check_targets(Some(&targets))
    };
    assert!(targets(&["q_proj", "k_proj"]).is_ok());
    assert!(targets(&["q_proj", "v_proj"]).unwrap_err().contains("\"v_proj\""));
    assert!(AttentionShiftingConfig::check_targets(None).unwrap_err().contains("lora.targets"));
}
