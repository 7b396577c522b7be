#![allow(clippy::unwrap_used)]
use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, largest_difference};

use super::*;
use crate::testing::reach_every_parameter;

const SIZES: FeatureSizes = FeatureSizes { n_layers: 9, d_model: 12, n_classes: 4 };

fn config(mixer: &str) -> GaussianAdaptiveTransformerConfig {
    let json = format!(r#"{{"d_conv": 5, "mixer": {mixer}}}"#);
    let config: GaussianAdaptiveTransformerConfig = serde_json::from_str(&json).unwrap();
    config.validate(SIZES).unwrap();
    config
}

fn model(mixer: &str) -> GaussianAdaptiveTransformer {
    config(mixer).init(SIZES, &Device::flex().autodiff())
}

fn features(batch: usize) -> Tensor<3> {
    random([batch, 9, 12], Distribution::Normal(0.0, 1.0), &Device::flex().autodiff())
}

fn attention(settings: &str) -> String {
    format!(r#"{{"attention": {{"mechanism": {{"softmax": {{"n_heads": 3}}}}{settings}}}}}"#)
}

const GQDAAM: &str = r#"{"gqdaam": {"gate": {"gates": [{"paper": {"n_heads": 3}}]}, "d_attention": 16, "n_heads": 4}}"#;
const GATE: &str = r#"{"gaussian_adaptive": {"gates": [{"paper": {"n_heads": 3}}]}}"#;

#[test]
fn gradients_reach_every_parameter_of_every_arm() {
    let block = r#"{"gaussian_adaptive": {"residual": true, "gates": [
        {"product": {"n_heads": 3, "n_gaussians": 2}}, {"mixture": {"axis": 2, "n_heads": 4, "n_gaussians": 2}}]}}"#;
    let (plain, across) = (attention(""), attention(r#", "residual": false, "between": "samples""#));
    for (mixer, gates) in [("\"identity\"", 0), (GATE, 1), (GQDAAM, 1), (block, 2), (&plain, 0), (&across, 0)] {
        let model = model(mixer);
        let out = model.forward(features(4));
        assert_eq!((out.logits.dims(), out.gates.len()), ([4, 4], gates));
        let cotangent = random(out.logits.dims(), Distribution::Normal(0.0, 1.0), &out.logits.device());
        let (config, parameters) = (config(mixer), model.num_params() as u64);
        assert_eq!(config.parts(SIZES).iter().map(|part| part.cost.parameters).sum::<u64>(), parameters, "{mixer}");
        assert_eq!(out.factor.is_some(), gates > 0);
        let reached = reach_every_parameter(&model, &(out.logits * cotangent).sum().backward());
        assert!(reached >= 6, "{mixer}");
    }
}

#[test]
fn only_the_published_baseline_lets_samples_see_each_other() {
    let felt = |mixer: &str| {
        let (model, x) = (model(mixer), features(3));
        let other = Tensor::cat(vec![x.clone().narrow(0, 0, 1), features(2)], 0);
        let [a, b] = [x, other].map(|x| model.mix(x).0.narrow(0, 0, 1));
        largest_difference(a, b) > 1e-7
    };
    assert!(!felt("\"identity\"") && !felt(GATE) && !felt(GQDAAM) && !felt(&attention("")));
    assert!(felt(&attention(r#", "residual": false, "between": "samples""#)));
}

#[test]
fn parameters_are_as_many_as_in_the_paper() {
    // Speech: 24 layers of 1024; the scripts count 336,412 with 8 heads and 322,076 with 1, and 4 classes.
    let sizes = FeatureSizes { n_layers: 24, d_model: 1024, n_classes: 4 };
    let count = |heads: usize| {
        let mixer =
            format!(r#"{{"mixer": {{"gaussian_adaptive": {{"gates": [{{"paper": {{"n_heads": {heads}}}}}]}}}}}}"#);
        let config: GaussianAdaptiveTransformerConfig = serde_json::from_str(&mixer).unwrap();
        config.validate(sizes).unwrap();
        assert_eq!(config.grid(1024), [32, 32]);
        assert_eq!(config.grid(5120), [64, 80]);
        config.init(sizes, &Device::flex()).num_params()
    };
    assert_eq!((count(8), count(1)), (336_412, 322_076));
    // The scripts' comments on GQDAAM leave out the last layer, 24 x 512 to 4 classes; text has 40 layers of 5120.
    let gqdaam = r#"{"mixer": {"gqdaam": {"gate": {"gates": [{"paper": {"n_heads": 8}}]}}}, "grid": [8, 64]}"#;
    let config: GaussianAdaptiveTransformerConfig = serde_json::from_str(gqdaam).unwrap();
    let of = |n_layers: usize, d_model: usize| {
        let sizes = FeatureSizes { n_layers, d_model, n_classes: 4 };
        config.validate(sizes).unwrap();
        config.init(sizes, &Device::flex()).num_params() - (n_layers * 512 * 4 + 4)
    };
    assert_eq!((of(24, 1024), of(40, 5120)), (1_223_192, 3_533_352));
}

#[test]
fn query_heads_of_a_group_are_one_and_scores_are_divided_twice() {
    let Some(FeatureMixer::Gqdaam(mixer)) = model(GQDAAM).mixer else { panic!("no GQDAAM") };
    let x = features(2).inner();
    let mixer = mixer.valid();
    // Four heads of four channels, two of keys: heads 0 and 1 ask keys 0, heads 2 and 3 keys 1.
    let apply = |layer: &Linear, x: Tensor<3>| {
        let [batch, rows, d_input] = x.dims();
        let out = x.reshape([batch * rows, d_input]).matmul(layer.weight.val())
            + layer.bias.as_ref().unwrap().val().unsqueeze();
        out.reshape([batch, rows, layer.weight.dims()[1]])
    };
    let inner = apply(&mixer.in_proj, mixer.gate.forward(x.clone(), None).0);
    let [q, k, v] = [&mixer.q_proj, &mixer.k_proj, &mixer.v_proj].map(|layer| apply(layer, inner.clone()));
    let part = |x: &Tensor<3>, at: usize| x.clone().narrow(2, 4 * at, 4);
    let head = |at: usize| {
        let scores = |query: usize| part(&q, query).matmul(part(&k, at).swap_dims(1, 2));
        let maps = activation::softmax((scores(2 * at) + scores(2 * at + 1)) / 4.0, 2);
        maps.matmul(part(&v, at))
    };
    let expected = apply(&mixer.o_proj, mixer.norm.forward(Tensor::cat(vec![head(0), head(1)], 2)));
    assert_tensors_close("GQDAAM", mixer.forward(x).0, expected, Tolerance::absolute(1e-5));
}

#[test]
fn layers_that_are_not_named_are_not_read() {
    let json =
        r#"{"d_conv": 5, "layers": [7, 2, 4], "mixer": {"gaussian_adaptive": {"gates": [{"paper": {"n_heads": 1}}]}}}"#;
    let config: GaussianAdaptiveTransformerConfig = serde_json::from_str(json).unwrap();
    config.validate(SIZES).unwrap();
    let model = config.init(SIZES, &Device::flex());
    let values: Vec<f32> = features(2).into_data().try_to_vec().unwrap();
    let tensor = |values: &[f32]| Tensor::from_data(TensorData::new(values.to_vec(), [2, 9, 12]), &Device::flex());
    let logits = |values: &[f32]| model.forward(tensor(values)).logits.into_data().try_to_vec::<f32>().unwrap();
    for layer in 0..9 {
        let mut other = values.clone();
        other[12 * layer..12 * (layer + 1)].iter_mut().enumerate().for_each(|(at, value)| *value += at as f32);
        assert_eq!(logits(&other) != logits(&values), [7, 2, 4].contains(&layer), "layer {layer}");
    }
    let gates = model.forward(tensor(&values)).gates;
    assert_eq!(gates[0].dims(), [2, 3, 12]);
}

#[test]
fn mistakes_are_told_by_name() {
    let field = |json: &str| {
        let config: GaussianAdaptiveTransformerConfig = serde_json::from_str(json).unwrap();
        config.validate(SIZES).unwrap_err().field
    };
    assert_eq!(field(r#"{"d_conv": 0}"#), "d_conv");
    assert_eq!(field(r#"{"grid": [3, 3]}"#), "grid");
    let gate = r#"{"mixer": {"gaussian_adaptive": {"gates": [{"paper": {"n_heads": 4}}]}}}"#;
    assert_eq!(field(gate), "mixer.gaussian_adaptive.gates[0].paper.n_heads");
    assert_eq!(field(r#"{"layers": []}"#), "layers");
    assert_eq!(field(r#"{"layers": [0, 9]}"#), "layers");
    assert_eq!(field(r#"{"layers": [1, 2, 1]}"#), "layers");
    let gqdaam = |settings: &str| {
        field(&format!(
            r#"{{"mixer": {{"gqdaam": {{"gate": {{"gates": [{{"paper": {{"n_heads": 3}}}}]}}{settings}}}}}}}"#
        ))
    };
    assert_eq!(gqdaam(r#", "d_attention": 12"#), "mixer.gqdaam.n_heads");
    assert_eq!(gqdaam(r#", "n_kv_heads": 3"#), "mixer.gqdaam.n_kv_heads");
    let mechanism = r#"{"mixer": {"attention": {"mechanism": {"softmax": {"n_heads": 5}}}}}"#;
    assert_eq!(field(mechanism), "mixer.attention.mechanism.softmax.n_heads");
}
