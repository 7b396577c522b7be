#![allow(clippy::unwrap_used)]
use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, largest_difference};
use polyhead_kernels::seed_random;

use super::*;
use crate::testing::reach_every_parameter;
use crate::weights;

const PICTURES: InputShape = InputShape::Images { channels: 2, height: 8, width: 12 };
const TEXTS: InputShape = InputShape::Tokens { vocab_size: 11, seq_len: 7 };
const SOFTMAX: &str = r#"{"softmax": {"n_heads": 2, "qkv_bias": true}}"#;
const DIFFERENTIAL: &str = r#"{"grouped_differential": {"n_heads": 4, "n_noise_heads": 2}}"#;
const HILO: &str = r#"{"hilo": {"n_heads": 4, "alpha": 0.5}}"#;
const MEAN: &str = r#""mean""#;
const MLTP: &str = r#"{"mltp": {"n_heads": 2, "n_latents": 3}}"#;

fn config(input: InputShape, attention: &str, pooling: &str) -> ClassifierConfig {
    let (name, more) = match input {
        InputShape::Images { .. } => ("vision_transformer", r#""patch_size": 2, "#),
        _ => ("text_encoder", ""),
    };
    let json = format!(
        r#"{{"{name}": {{{more}"d_model": 8, "n_layers": 2, "attention": {attention}, "pooling": {pooling}}}}}"#
    );
    serde_json::from_str(&json).unwrap()
}

fn model(input: InputShape, attention: &str, pooling: &str) -> Classifier {
    let config = config(input, attention, pooling);
    config.validate(Some(input)).unwrap();
    let device = Device::flex().autodiff();
    seed_random(3);
    config.init(Sizes { input, n_classes: 3 }, &device)
}

fn batch(input: InputShape, count: usize) -> Examples {
    let inputs = match input {
        InputShape::Images { channels, height, width } => {
            let pixels = (0..count * channels * height * width).map(|i| (i as f32 * 0.7).sin()).collect();
            Inputs::Images { pixels, channels, height, width }
        }
        InputShape::Tokens { vocab_size, seq_len } => {
            let tokens = (0..count * seq_len).map(|i| (i * i % vocab_size) as u32).collect();
            Inputs::Tokens { tokens, lengths: vec![seq_len as u32; count], seq_len }
        }
        InputShape::Features { .. } => unreachable!(),
    };
    Examples { inputs, labels: (0..count as u32).map(|i| i % 3).collect(), groups: vec![0; count] }
}

/// Fresh weights are small: what differs is made visible.
fn scores(model: &Classifier, inputs: &Inputs) -> Tensor<2> {
    model.forward(inputs, Observe::Nothing).logits * 1e3
}

fn largest(x: Tensor<2>) -> f64 {
    largest_difference(x.clone(), x.zeros_like())
}

#[test]
fn gradients_reach_every_parameter_and_all_are_counted() {
    for (input, attention, pooling) in [
        (PICTURES, SOFTMAX, r#""class_token""#),
        (PICTURES, HILO, r#"{"ggem": {"n_groups": 4}}"#),
        (PICTURES, DIFFERENTIAL, MLTP),
        (TEXTS, SOFTMAX, r#""last_token""#),
        (TEXTS, DIFFERENTIAL, r#"{"mltp": {"n_heads": 2, "input": "tokens_of_last_layer"}}"#),
    ] {
        let model = model(input, attention, pooling);
        let loss = model.loss_under(&batch(input, 3), ContextMask::Causal).cross_entropy;
        reach_every_parameter(&model, &loss.backward());
        let counted: u64 = model.config().parts(model.sizes()).iter().map(|part| part.cost.parameters).sum();
        assert_eq!(counted, model.num_params() as u64, "{attention} {pooling}");
    }
}

#[test]
fn padding_leaves_no_trace_and_rows_are_independent() {
    let poolings = [MEAN, r#""last_token""#, r#""class_token""#, r#"{"ggem": {}}"#, MLTP];
    for (attention, pooling) in [SOFTMAX, DIFFERENTIAL].into_iter().flat_map(|a| poolings.map(|pooling| (a, pooling))) {
        let model = model(TEXTS, attention, pooling);
        let Inputs::Tokens { tokens, seq_len, .. } = batch(TEXTS, 3).inputs else { unreachable!() };
        let padded = Inputs::Tokens { tokens: tokens.clone(), lengths: vec![4, 7, 2], seq_len };
        let out = scores(&model, &padded);
        for (row, length) in [4, 7, 2].into_iter().enumerate() {
            let own = tokens[row * seq_len..row * seq_len + length].to_vec();
            let alone = Inputs::Tokens { tokens: own, lengths: vec![length as u32], seq_len: length };
            let row = out.clone().narrow(0, row, 1);
            assert_tensors_close("a row", row, scores(&model, &alone), Tolerance::absolute(1e-3));
        }
        let whole = Inputs::Tokens { tokens, lengths: vec![7; 3], seq_len };
        assert!(largest(out - scores(&model, &whole)) > 1e-2, "{attention} {pooling}");
    }
}

#[test]
fn everybody_sees_everybody_and_positions_are_known() {
    // The class token stands first: it sees the last position, so nothing is causal.
    let model = model(TEXTS, SOFTMAX, r#""class_token""#);
    let of =
        |tokens: [u32; 7]| scores(&model, &Inputs::Tokens { tokens: tokens.to_vec(), lengths: vec![7], seq_len: 7 });
    let own = of([1, 2, 3, 4, 5, 6, 7]);
    assert!(largest(own.clone() - of([1, 2, 3, 4, 5, 6, 8])) > 1e-3);
    assert!(largest(own - of([7, 6, 5, 4, 3, 2, 1])) > 1e-3, "order matters");
}

#[test]
fn layers_can_be_looked_into() {
    let hilo_then_softmax = format!("[{HILO}, {SOFTMAX}]");
    let model = model(PICTURES, &hilo_then_softmax, MEAN);
    let seen = model.valid().observe_layers(&batch(PICTURES, 2), Observe::Maps);
    assert!(seen.len() == 2 && seen[0].maps.is_none());
    assert_eq!(seen[1].maps.as_ref().unwrap().dims(), [2, 24, 24]);
    assert!(model.valid().observe_layers(&batch(PICTURES, 2), Observe::Nothing).is_empty());
}

#[test]
fn what_a_recipe_says_comes_back() {
    for attention in [SOFTMAX, HILO, &format!("[{HILO}, {DIFFERENTIAL}]")] {
        let config = config(PICTURES, attention, MEAN);
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<ClassifierConfig>(&text).unwrap(), config);
    }
    let refused = |attention: &str| {
        let json = format!(
            r#"{{"vision_transformer": {{"patch_size": 2, "d_model": 8, "n_layers": 1, "attention": {attention}}}}}"#
        );
        serde_json::from_str::<ClassifierConfig>(&json).unwrap_err().to_string()
    };
    assert!(refused(r#"{"hilo": {"n_heads": 4, "windows": 3}}"#).contains("windows"));
    assert!(refused(r#"{"softmax": {"n_head": 4}}"#).contains("n_head"));
    assert!(refused(r#"{"hilos": {}}"#).contains("hilos"));
    refused(r#"{"hilo": {"n_heads": 4}, "softmax": {"n_heads": 4}}"#);
    let wide =
        config(PICTURES, r#"{"hilo": {"n_heads": 4, "window": 40}}"#, MEAN).validate(Some(PICTURES)).unwrap_err();
    assert!(wide.field.ends_with("hilo.window") && wide.problem.contains("window (40) must not be larger"), "{wide}");
}

#[test]
fn mistakes_are_told_by_name() {
    let field = |config: ClassifierConfig, input| config.validate(Some(input)).unwrap_err().field;
    assert_eq!(field(config(PICTURES, HILO, r#""class_token""#), PICTURES), "vision_transformer.attention.hilo");
    let odd = InputShape::Images { channels: 1, height: 8, width: 9 };
    assert_eq!(field(config(PICTURES, SOFTMAX, MEAN), odd), "vision_transformer.patch_size");
    assert_eq!(field(config(PICTURES, SOFTMAX, MEAN), TEXTS), "vision_transformer");
    assert_eq!(field(config(TEXTS, SOFTMAX, MEAN), PICTURES), "text_encoder");
    assert_eq!(field(config(TEXTS, &format!("[{SOFTMAX}]"), MEAN), TEXTS), "text_encoder.attention");
    let list = format!(r#"[{SOFTMAX}, {{"softmax": {{"n_heads": 3}}}}]"#);
    assert_eq!(field(config(PICTURES, &list, MEAN), PICTURES), "vision_transformer.attention.1.softmax.n_heads");
    let ggem = config(TEXTS, SOFTMAX, r#"{"ggem": {"n_groups": 3}}"#);
    assert_eq!(field(ggem, TEXTS), "text_encoder.pooling.ggem.n_groups");
}

/// DGQA: what the layers remember of their keys moves on before steps that are due, and nothing else does.
#[test]
fn key_driven_layers_remember_in_the_course_of_training() {
    let evolving = r#"{"key_driven": {"n_heads": 4, "n_kv_heads": 2, "allocation": {"evolving": {"window": 2}}}}"#;
    for input in [PICTURES, TEXTS] {
        let mut model = model(input, evolving, MEAN);
        let batch = batch(input, 3);
        let before = weights::named(&model);
        model.before_step(&batch, 1);
        assert_eq!(weights::named(&model), before, "step 1 is not due");
        model.before_step(&batch, 2);
        let mut moved = 0;
        for (old, new) in before.iter().zip(weights::named(&model)) {
            if new.name.ends_with("memory.magnitudes") {
                assert!(new.values.iter().all(|&magnitude| magnitude > 0.0), "{new:?}");
                moved += 1;
            } else if !new.name.ends_with("memory.query_heads") {
                assert_eq!(*old, new);
            }
        }
        assert_eq!(moved, 2, "both layers");
    }
}

#[test]
fn gates_stand_inside_the_layers_of_both_kinds() {
    let gated = |input: InputShape, gate: &str| -> ClassifierConfig {
        let mut config = serde_json::to_value(config(input, SOFTMAX, MEAN)).unwrap();
        let body = config.as_object_mut().unwrap().values_mut().next().unwrap();
        body["attention_gate"] = serde_json::from_str(&format!(r#"{{"residual": true, "gates": [{gate}]}}"#)).unwrap();
        serde_json::from_value(config).unwrap()
    };
    let channels = r#"{"product": {"axis": -1, "n_heads": 2, "n_gaussians": 2}}"#;
    let patches = r#"{"paper": {"n_heads": 3}}, {"mixture": {"n_heads": 2, "n_gaussians": 2}}"#;
    let device = Device::flex().autodiff();
    for (input, gate) in [(PICTURES, channels), (PICTURES, patches), (TEXTS, channels)] {
        let config = gated(input, gate);
        config.validate(Some(input)).unwrap();
        seed_random(3);
        let sizes = Sizes { input, n_classes: 3 };
        let gated = config.init(sizes, &device);
        assert_eq!(config.parts(sizes).iter().map(|part| part.cost.parameters).sum::<u64>(), gated.num_params() as u64);
        let loss = gated.loss_under(&batch(input, 4), ContextMask::Causal).cross_entropy;
        reach_every_parameter(&gated, &loss.backward());
        let plain = model(input, SOFTMAX, MEAN);
        let inputs = batch(input, 2).inputs;
        assert!(largest(scores(&gated, &inputs) - scores(&plain, &inputs)) > 1e-3, "the gates do something");
    }
    let refused = gated(TEXTS, patches).validate(Some(TEXTS)).unwrap_err();
    assert!(
        refused.field == "text_encoder.attention_gate.gates[0].paper" && refused.problem.contains("differ in length")
    );
    let too_many = gated(PICTURES, r#"{"paper": {"n_heads": 9}}"#).validate(Some(PICTURES)).unwrap_err();
    assert_eq!(too_many.field, "vision_transformer.attention_gate.gates[0].paper.n_heads");
}
