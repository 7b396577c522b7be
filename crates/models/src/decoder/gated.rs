//! Gaussian adaptive gates on what attention writes.
#![allow(clippy::unwrap_used)]

use burn::tensor::{Device, Int, Tensor};
use polyhead_attention::{Cache, Mask, Observe};
use polyhead_kernels::comparison::largest_difference as far;
use polyhead_kernels::seed_random;

use crate::testing::reach_every_parameter;
use crate::{Batch, Decoder, DecoderConfig};

const GATE: &str = r#", "attention_gate": {"residual": true, "gates": [
    {"product": {"axis": -1, "n_heads": 2, "n_gaussians": 2}}, {"mixture": {"axis": 2, "n_heads": 3, "n_gaussians": 2}}]}"#;

fn config(more: &str) -> DecoderConfig {
    let json = format!(r#"{{"d_model": 12, "n_layers": 2, "attention": {{"softmax": {{"n_heads": 2}}}}{more}}}"#);
    serde_json::from_str(&json).unwrap()
}

fn model(more: &str) -> Decoder {
    let config = config(more);
    config.validate().unwrap();
    let device = Device::flex().autodiff();
    seed_random(4);
    config.init(17, &device)
}

fn tokens(ids: &[i32], device: &Device) -> Tensor<2, Int> {
    Tensor::<1, Int>::from_ints(ids, device).unsqueeze()
}

fn hidden(model: &Decoder, ids: &[i32]) -> Tensor<3> {
    model.forward(tokens(ids, &model.device()), &Mask::causal(), None, Observe::Nothing).hidden
}

#[test]
fn gates_are_learned_look_at_no_later_token_and_decode_from_a_cache() {
    let model = model(GATE);
    let ids = [3, 1, 4, 1, 5, 9];
    let whole = hidden(&model, &ids);
    let early = hidden(&model, &[3, 1, 4, 1, 8, 2]);
    assert!(far(whole.clone().narrow(1, 0, 4), early.narrow(1, 0, 4)) < 1e-6);
    let mut cache = Cache::new(2);
    let mut step = |part: &[i32]| {
        model.forward(tokens(part, &model.device()), &Mask::causal(), Some(&mut cache), Observe::Nothing).hidden
    };
    let parts = Tensor::cat(vec![step(&ids[..3]), step(&ids[3..4]), step(&ids[4..])], 1);
    assert!(far(whole.clone(), parts) < 1e-5);

    let targets = vec![1, 4, 1, 5, 9, 2];
    let batch = Batch { batch: 1, seq: 6, tokens: ids.map(|id| id as u32).to_vec(), targets, ..Batch::default() };
    let loss = model.loss(&batch, Observe::Nothing).cross_entropy;
    reach_every_parameter(&model, &loss.backward());
    let plain = self::model("");
    assert!(far(hidden(&plain, &ids), whole) > 1e-3, "the gates do something");
}

#[test]
fn costs_count_the_gates() {
    use burn::module::Module;
    let costs = config(GATE).costs(17);
    assert_eq!(costs.parameters, model(GATE).num_params() as u64);
}

#[test]
fn gates_along_the_tokens_are_refused() {
    let problem = |gate: &str| {
        let error = config(&format!(r#", "attention_gate": {{"gates": [{gate}]}}"#)).validate().unwrap_err();
        (error.field, error.problem)
    };
    let (field, words) = problem(r#"{"product": {"n_heads": 1}}"#);
    assert!(field == "attention_gate.gates[0].product" && words.contains("look ahead"), "{field}: {words}");
    assert_eq!(problem(r#"{"paper": {"n_heads": 1}}"#).0, "attention_gate.gates[0].paper");
    assert_eq!(problem(r#"{"product": {"n_heads": 9, "axis": -1}}"#).0, "attention_gate.gates[0].product.n_heads");
}
