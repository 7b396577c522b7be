//! Edits of a model like Qwen3 by plain PyTorch; see `tests/golden/qwen3_edits/README.md`.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use polyhead_attention::{Cache, Mask};
use polyhead_models::intervention::{Context, Intervention, InterventionConfig};
use polyhead_models::{Batch, Decoder, DecoderConfig, Pass};
use serde_json::{Value, json};

use crate::golden::{Config, Golden, Tensors, compare, files, size, values};
use crate::golden_decoder::{rows, with_weights};

/// Relative to the largest number.
const LOGITS: f32 = 1e-5;
/// Of gradients.
const LEARNED: f32 = 1e-4;

#[test]
fn golden_qwen3_edits() {
    for Golden { name, config, tensors: file, .. } in &files("qwen3_edits") {
        let model = qwen3(&config.table("model"), file, &Device::flex());
        let ids = rows(file, "ids");
        let cases = config["cases"].as_object().unwrap();
        assert!(cases.len() > 1, "{name}: edits");
        for (case, told) in cases {
            assert_eq!(told.as_object().unwrap().len(), 2, "{name}: {case} has a prompt and edits alone");
            let model = match told["edits"].as_array().unwrap().is_empty() {
                true => model.clone(),
                false => under(&model, &told["edits"], &json!({}), file),
            };
            let prompt = told["prompt"].as_u64().unwrap() as usize;
            for cached in [false, true] {
                let key = format!("{case}.logits");
                let got = logits(&model, &ids, prompt, cached);
                compare(name, &format!("{key}, cached: {cached}"), &file[key.as_str()].values, &got, LOGITS, true);
            }
        }
        check_trained(name, config, file, &ids);
    }
}

/// The decoder of `config.model`, whose weights are under `w.`.
fn qwen3(model: &Config, file: &Tensors, device: &Device) -> Decoder {
    let config: DecoderConfig = serde_json::from_value(json!({
        "d_model": size(model, "hidden_size"), "n_layers": size(model, "num_hidden_layers"),
        "d_ff": size(model, "intermediate_size"), "rope_theta": model["rope_theta"], "norm_eps": model["rms_norm_eps"],
        "tie_embeddings": false,
        "attention": { "softmax": { "n_heads": size(model, "num_attention_heads"), "qk_norm": true,
            "n_kv_heads": size(model, "num_key_value_heads"), "head_dim": size(model, "head_dim") } },
    }))
    .unwrap();
    with_weights(&config, size(model, "vocab_size"), file, "w.", device)
}

/// The model under edits, with the tensors under `t.`, of which some are trained.
fn under(model: &Decoder, edits: &Value, train: &Value, file: &Tensors) -> Decoder {
    let config = json!({ "edits": edits, "train": train, "tensors": "here.safetensors" });
    let config: InterventionConfig = serde_json::from_value(config).unwrap();
    config.validate(&|_, _| None).unwrap();
    let tensors: BTreeMap<_, _> = file.under("t.");
    model.clone().intervened(Some(Intervention::new(&config, &tensors, model, None).unwrap()))
}

/// `[batch, seq, vocab]` of rows whose first `prompt` tokens are not generated: in one pass, or the prompt in one and each token
/// behind it in another.
fn logits(model: &Decoder, ids: &[Vec<u32>], prompt: usize, cached: bool) -> Vec<f32> {
    let [rows, seq] = [ids.len(), ids[0].len()];
    let batch = Batch { batch: rows, seq, tokens: ids.concat(), ..Batch::default() };
    let (mask, mut cache, tokens) = (Mask::causal(), Cache::new(model.layers.len()), model.tokens(&batch));
    let context = Context { rows, prompt, ..Context::default() };
    let starts = if cached { std::iter::once(0).chain(prompt..seq).collect() } else { vec![0] };
    let ends = starts.iter().skip(1).copied().chain([seq]);
    let parts = starts.iter().zip(ends).filter(|(start, end)| *start < end).map(|(&start, end)| {
        let cache = if cached { Some(&mut cache) } else { None };
        let pass = Pass { cache, context: Some(context), ..Pass::new(&mask) };
        model.logits(model.pass(tokens.clone().narrow(1, start, end - start), pass).hidden)
    });
    values(Tensor::cat(parts.collect(), 1))
}

/// Tensors that are trained, through the fused path of scores: the loss, and the gradient of each.
fn check_trained(name: &str, config: &Config, file: &Tensors, ids: &[Vec<u32>]) {
    let device = Device::flex().autodiff();
    let model = qwen3(&config.table("model"), file, &device);
    let edits: InterventionConfig = serde_json::from_value(json!({ "edits": config["trained"] })).unwrap();
    let train: BTreeMap<&str, Value> = (edits.tensor_names())
        .map(|(.., tensor)| {
            let per = if file[format!("t.{tensor}").as_str()].shape.len() == 2 { "head" } else { "channel" };
            (tensor, json!({ "per": per }))
        })
        .collect();
    assert!(!train.is_empty(), "{name}: no gradients");
    let model = under(&model, &config["trained"], &json!(train), file);
    let [rows, seq] = [ids.len(), ids[0].len()];
    let targets = file["targets"].values.iter().map(|&id| id as i64).collect();
    let batch = Batch { batch: rows, seq, tokens: ids.concat(), targets, ..Batch::default() };
    compare(name, "trained.logits", &file["trained.logits"].values, &logits(&model, ids, seq, false), LOGITS, true);
    let loss = model.loss(&batch, Default::default()).cross_entropy;
    compare(name, "trained.loss", &file["trained.loss"].values, &values(loss.clone()), LOGITS, true);
    let grads = loss.backward();
    for (at, tensor) in train.keys().enumerate() {
        let key = format!("trained.grad.{tensor}");
        let got = values(model.intervention_tensors[at].val().grad(&grads).unwrap());
        compare(name, &key, &file[key.as_str()].values, &got, LEARNED, true);
    }
}
