//! A decoder with the weights of a file, under the names of transformers' LlamaForCausalLM.

use std::collections::BTreeMap;

use burn::tensor::{Device, Int, Tensor, TensorData};
use polyhead_attention::Mask;
use polyhead_models::sites::{SitePlan, Tap};
use polyhead_models::weights::{Named, load};
use polyhead_models::{Decoder, DecoderConfig, Pass};
use serde_json::json;

use crate::golden::{Config, Golden, Layout, Tensors, renamed, size};

/// The decoder of `config.model`, whose weights are under `prefix`.
pub fn decoder(model: &Config, file: &Tensors, prefix: &str, device: &Device) -> Decoder {
    model.is("hidden_act", "silu");
    model.is("rope_layout", "neox");
    model.is("tie_word_embeddings", false);
    let layers = size(model, "num_hidden_layers");
    let diffuses = model.get("masked_diffusion").is_some_and(|diffuses| diffuses == true);
    let config: DecoderConfig = serde_json::from_value(json!({
        "d_model": size(model, "hidden_size"), "n_layers": layers, "d_ff": size(model, "intermediate_size"),
        "rope_theta": model["rope_theta"], "norm_eps": model["rms_norm_eps"], "tie_embeddings": false,
        "masked_diffusion": diffuses,
        "attention": { "softmax": { "n_heads": size(model, "num_attention_heads"),
            "n_kv_heads": size(model, "num_key_value_heads"), "head_dim": size(model, "head_dim") } },
    }))
    .unwrap();
    // The mask of a masked diffusion model is one id more than the data has.
    with_weights(&config, size(model, "vocab_size") - usize::from(diffuses), file, prefix, device)
}

/// The small Llama of a file that describes it beside its numbers, its weights under `w.`.
pub fn llama(golden: &Golden, device: &Device) -> Decoder {
    let Golden { config, tensors: file, .. } = golden;
    config.is("model", "llama");
    config.is("rope_layout", "neox");
    let described: DecoderConfig = serde_json::from_value(json!({
        "d_model": size(config, "d_model"), "n_layers": size(config, "layers"), "d_ff": size(config, "d_ff"),
        "rope_theta": config["rope_theta"], "norm_eps": config["rms_eps"], "tie_embeddings": false,
        "attention": { "softmax": { "n_heads": size(config, "num_heads"), "n_kv_heads": size(config, "num_kv_heads"),
            "head_dim": size(config, "head_dim") } },
    }))
    .unwrap();
    with_weights(&described, size(config, "vocab"), file, "w.", device)
}

/// A decoder with the weights under `prefix`.
pub fn with_weights(config: &DecoderConfig, vocab: usize, file: &Tensors, prefix: &str, device: &Device) -> Decoder {
    config.validate().unwrap();
    load(config.init(vocab, device), of_decoder(config.n_layers, file, prefix)).unwrap()
}

/// The tensors under `prefix`, or their gradients, under the names and in the layout of here.
pub fn of_decoder(n_layers: usize, file: &Tensors, prefix: &str) -> BTreeMap<String, Named> {
    let mut names = vec![
        ("model.embed_tokens.weight".to_owned(), "embedding.weight".to_owned(), Layout::Same),
        ("model.norm.weight".into(), "norm.weight".into(), Layout::Same),
        ("lm_head.weight".into(), "head.weight".into(), Layout::Linear),
    ];
    for layer in 0..n_layers {
        let parts = [("self_attn", "attention", "qkvo"), ("mlp", "mlp", "")];
        for (theirs, ours, letters) in parts {
            let of_attention = letters.chars().map(|letter| format!("{letter}_proj"));
            let of_mlp = ["gate_proj", "up_proj", "down_proj"].map(str::to_owned);
            let all: Vec<String> = if letters.is_empty() { of_mlp.into() } else { of_attention.collect() };
            for name in all {
                let their = format!("model.layers.{layer}.{theirs}.{name}.weight");
                names.push((their, format!("layers.{layer}.{ours}.{name}.weight"), Layout::Linear));
            }
        }
        // The norms of queries and keys are there in Qwen3 alone.
        for (theirs, ours) in [
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "mlp_norm"),
            ("self_attn.q_norm", "attention.q_norm"),
            ("self_attn.k_norm", "attention.k_norm"),
        ] {
            let their = format!("model.layers.{layer}.{theirs}.weight");
            names.push((their, format!("layers.{layer}.{ours}.weight"), Layout::Same));
        }
    }
    let names: Vec<(&str, &str, Layout)> =
        names.iter().map(|(a, b, layout)| (a.as_str(), b.as_str(), *layout)).collect();
    renamed(file, prefix, &names)
}

/// `[batch, seq]` ids of a file.
pub fn ids(file: &Tensors, key: &str, device: &Device) -> Tensor<2, Int> {
    let named = &file[key];
    let ids: Vec<i32> = named.values.iter().map(|&id| id as i32).collect();
    Tensor::from_data(TensorData::new(ids, [named.shape[0], named.shape[1]]), device)
}

/// Rows of tokens of a file.
pub fn rows(file: &Tensors, key: &str) -> Vec<Vec<u32>> {
    let named = &file[key];
    named
        .values
        .chunks(named.shape[named.shape.len() - 1])
        .map(|row| row.iter().map(|&id| id as u32).collect())
        .collect()
}

/// `[batch, seq, vocab]` logits under a plan, and what it reads.
pub fn run(model: &Decoder, ids: &Tensor<2, Int>, sites: SitePlan) -> (Tensor<3>, Vec<Tap>) {
    let forward = model.pass(ids.clone(), Pass { sites, ..Pass::new(&Mask::causal()) });
    (model.logits(forward.hidden), forward.taps)
}
