#![allow(clippy::unwrap_used)]

use burn::tensor::Device;
use polyhead_kernels::{seed_random, without_drawing};

use super::*;
use crate::DecoderConfig;
use crate::weights::named;

fn config(d_model: usize, attention: &str, more: &str) -> DecoderConfig {
    serde_json::from_str(&format!(r#"{{"d_model":{d_model},"n_layers":1,"attention":{attention}{more}}}"#)).unwrap()
}

fn scalings(config: &DecoderConfig, mup: Mup) -> Scalings {
    Scalings::of(&without_drawing(|| config.init(7, &Device::flex())), mup)
}

const UNTIED: &str = r#","tie_embeddings":false"#;
const MUP: Mup = Mup { base_width: 32, base_head_dim: None };

/// Which matrices read numbers that grow with the width is told by the shapes of a model that is twice as wide.
#[test]
fn what_grows_with_the_width_is_scaled() {
    for attention in [
        r#"{"softmax":{"n_heads":4,"n_kv_heads":2,"qk_norm":true,"qkv_bias":true}}"#,
        r#"{"grouped_differential":{"n_heads":4,"n_noise_heads":2}}"#,
        r#"{"diff_v2":{"n_heads":4}}"#,
        r#"{"mixture_of_head":{"n_heads":4,"shared_heads":2,"top_k":1}}"#,
        r#"{"decoupled_head":{"n_heads":4,"key_map":[0,0,1,1],"value_map":[0,1,1,0]}}"#,
        r#"{"key_driven":{"n_heads":4,"n_kv_heads":2,"allocation":{"fixed":{"query_heads":[2,2]}}}}"#,
        r#"{"gated_attention":{"n_heads":4}}"#,
        r#"{"sink":{"n_heads":4}}"#,
        r#"{"mla":{"n_heads":4,"kv_lora_rank":12,"q_lora_rank":10,"qk_nope_head_dim":16,"qk_rope_head_dim":8,"v_head_dim":16}}"#,
        r#"{"gated_delta_net":{"n_heads":4}}"#,
    ] {
        for more in ["", r#","mlp":"gelu","norm":"layer","tie_embeddings":true"#] {
            let [narrow, wide] = [64, 128].map(|width| config(width, attention, more));
            let shapes = |config: &DecoderConfig| parameters(&without_drawing(|| config.init(7, &Device::flex())));
            let (before, after, found) = (shapes(&narrow), shapes(&wide), scalings(&narrow, MUP));
            for (small, large) in before.iter().zip(&after).filter(|(small, _)| small.name.starts_with("layers.")) {
                let reads_more = small.shape.len() == 2 && small.shape[0] != large.shape[0];
                // Heads of a latent say how wide they are.
                let own_width = attention.contains("mla") && small.name.ends_with("o_proj.weight");
                let expected = if reads_more || own_width { 0.5 } else { 1.0 };
                assert_eq!(found.get(&small.name).adamw, expected, "{attention}: {}", small.name);
                let writes_more = small.shape.get(1) != large.shape.get(1);
                if reads_more && !attention.contains("mla") {
                    let expected = if writes_more { 0.5f64.sqrt() } else { 0.5 };
                    assert!((found.get(&small.name).muon - expected).abs() < 1e-12, "{attention}: {}", small.name);
                }
            }
        }
    }
}

#[test]
fn the_numbers_are_those_of_the_table() {
    let softmax = r#"{"softmax":{"n_heads":4,"qk_norm":true}}"#;
    let found = scalings(&config(128, softmax, UNTIED), MUP);
    let hidden = Scaling { init: 0.5, adamw: 0.25, muon: 0.5 };
    for (name, expected) in [
        ("embedding.weight", Scaling::NONE),
        ("layers.0.attention.q_proj.weight", hidden),
        ("layers.0.mlp.down_proj.weight", hidden),
        ("layers.0.mlp_norm.weight", Scaling::NONE),
        ("norm.weight", Scaling::NONE),
        ("head.weight", Scaling { init: 0.25, adamw: 0.25, muon: 0.25 }),
    ] {
        assert_eq!(found.get(name), expected, "{name}");
    }
    // Tied embeddings stay as they are: the norm in front of them is scaled.
    let tied = scalings(&config(128, softmax, r#","tie_embeddings":true"#), MUP);
    assert_eq!((tied.get("norm.weight").init, tied.get("embedding.weight")), (0.25, Scaling::NONE));
    // Heads of 32 channels against 8: queries are half as large, by their norm where they have one.
    let wide_heads = Mup { base_head_dim: Some(8), ..MUP };
    let found = scalings(&config(128, softmax, ""), wide_heads);
    assert_eq!(found.get("layers.0.attention.q_norm.weight"), Scaling { init: 0.5, adamw: 0.5, muon: 0.5 });
    assert_eq!(found.get("layers.0.attention.q_proj.weight"), hidden);
    let found = scalings(&config(128, r#"{"softmax":{"n_heads":4,"qkv_bias":true}}"#, ""), wide_heads);
    assert_eq!(found.get("layers.0.attention.q_proj.weight"), hidden.times(0.5));
    assert_eq!(found.get("layers.0.attention.q_proj.bias"), Scaling::NONE.times(0.5));
    assert_eq!(found.get("layers.0.attention.k_proj.weight"), hidden);
}

#[test]
fn at_the_base_width_nothing_changes() {
    let config = config(32, r#"{"softmax":{"n_heads":4}}"#, UNTIED);
    let fresh = |mup: Option<Mup>| {
        seed_random(3);
        let decoder = config.init(7, &Device::flex().autodiff());
        match mup {
            Some(mup) => Scalings::of(&decoder, mup).apply(decoder),
            None => decoder,
        }
    };
    assert_eq!(named(&fresh(Some(MUP))), named(&fresh(None)));
    let narrower = Mup { base_width: 8, base_head_dim: None };
    let (scaled, plain) = (named(&fresh(Some(narrower))), named(&fresh(None)));
    let value = |all: &[crate::weights::Named], name: &str| all.iter().find(|one| one.name == name).unwrap().values[3];
    let head = value(&scaled, "head.weight") / value(&plain, "head.weight");
    assert!((head - 0.25).abs() < 1e-6, "{head}");
    assert!(parameters(&fresh(Some(narrower))).iter().all(|one| one.trainable), "scaled weights are learned as before");
}
