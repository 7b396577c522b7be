//! Sliding windows by transformers' Mistral, Gemma 2 and Ministral; see `tests/golden/sliding_window/README.md`.

use burn::tensor::{Device, Int, Tensor, TensorData};
use polyhead_attention::{AttentionConfig, Cache, LayerCache, Mask, Observe, PerLayerCount, RopeLayout, SoftmaxConfig};
use polyhead_models::{DecoderConfig, weights};

use crate::golden::{
    Config, GRADIENT, Golden, Layout, OUTPUT, PROJECTIONS, compare, compare_gradients, files, renamed, size, tensor,
    values,
};
use crate::golden_layer::Case;

/// Of a whole model's logits, absolute.
const LOGITS: f32 = 5e-5;

#[test]
fn golden_sliding_window() {
    for golden in files("sliding_window") {
        golden.config.is("window_meaning", "query t sees keys t-window+1 .. t");
        golden.config.beside_the_point(&["decode_max_difference"]);
        match golden.config.get("layer_types") {
            Some(kinds) => check_stack(&golden, kinds.as_array().unwrap().iter().map(|kind| kind.as_str().unwrap())),
            None => check_layer(&golden),
        }
    }
}

fn softmax(config: &Config, window: PerLayerCount) -> SoftmaxConfig {
    SoftmaxConfig {
        n_heads: size(config, "n_heads"),
        n_kv_heads: Some(size(config, "n_kv_heads")),
        head_dim: Some(size(config, "head_dim")),
        window: Some(window),
        softcap: config.get("softcap").map(|cap| cap.as_f64().unwrap()),
        scale: Some(config["scale"].as_f64().unwrap()),
        ..SoftmaxConfig::default()
    }
}

fn check_layer(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.is("bias", false);
    let described = softmax(config, PerLayerCount::Same(size(config, "window")));
    let case = Case::new(golden, &described, size(config, "head_dim"), renamed(file, "w.", PROJECTIONS));
    case.check(&renamed(file, "grad.", PROJECTIONS));
    case.check_weights();
    let kept = case.decode("decode.out", size(config, "prefill")).kept().unwrap();
    for (key, kept) in ["cache.k", "cache.v"].into_iter().zip(kept) {
        assert_eq!(kept.dims().as_slice(), file[key].shape, "{name}: {key}");
        compare(name, key, &file[key].values, &values(kept), OUTPUT, false);
    }
}

fn check_stack<'a>(golden: &Golden, kinds: impl Iterator<Item = &'a str>) {
    let Golden { name, config, tensors: file, .. } = golden;
    let (n_layers, window, seq) = (size(config, "n_layers"), size(config, "window"), size(config, "seq"));
    config.is("rope_layout", "neox");
    let windows: Vec<usize> = kinds
        .map(|kind| match kind {
            "sliding_attention" => window,
            "full_attention" => 0,
            other => panic!("{name}: {other}"),
        })
        .collect();
    let described: DecoderConfig = serde_json::from_value(serde_json::json!({
        "d_model": size(config, "d_model"),
        "n_layers": n_layers,
        "d_ff": size(config, "d_ff"),
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "rope_layout": RopeLayout::RotateHalf,
        "tie_embeddings": false,
        "attention": AttentionConfig::Softmax(softmax(config, PerLayerCount::Each(windows))),
    }))
    .unwrap();
    let device = Device::flex().autodiff();
    let model = described.init(size(config, "vocab_size"), &device);
    let ours: Vec<String> = weights::named(&model).into_iter().map(|named| named.name).collect();
    let named: Vec<(String, String, Layout)> =
        ours.into_iter().map(|ours| (theirs(&ours), ours.clone(), layout(&ours))).collect();
    let names: Vec<(&str, &str, Layout)> =
        named.iter().map(|(a, b, layout)| (a.as_str(), b.as_str(), *layout)).collect();
    let model = weights::load(model, renamed(file, "w.", &names)).unwrap_or_else(|error| panic!("{name}: {error}"));

    let tokens: Vec<i32> = file["tokens"].values.iter().map(|&id| id as i32).collect();
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [size(config, "batch"), seq]), &device);
    let run = |from: usize, to: usize, cache: Option<&mut Cache>| {
        let part = tokens.clone().narrow(1, from, to - from);
        model.logits(model.forward(part, &Mask::causal(), cache, Observe::Nothing).hidden)
    };
    let logits = run(0, seq, None);
    compare(name, "logits", &file["logits"].values, &values(logits.clone()), LOGITS, false);
    let grads = (logits * tensor(file, "cotangent", &device)).sum().backward();
    compare_gradients(name, &model, &grads, &renamed(file, "grad.", &names), GRADIENT);

    let (prefill, mut cache) = (size(config, "prefill"), Cache::new(n_layers));
    let mut parts = vec![run(0, prefill, Some(&mut cache))];
    parts.extend((prefill..seq).map(|token| run(token, token + 1, Some(&mut cache))));
    compare(name, "decode.logits", &file["decode.logits"].values, &values(Tensor::cat(parts, 1)), LOGITS, false);
    let lengths = config["cache_lengths"].as_array().unwrap();
    assert_eq!(lengths.len(), n_layers, "{name}");
    for (layer, (cache, length)) in cache.layers.iter().zip(lengths).enumerate() {
        let LayerCache::Softmax(cache) = cache else { panic!("{name}: layer {layer}") };
        for (key, kept) in ["k", "v"].into_iter().zip(cache.kept().unwrap()) {
            let key = format!("cache.{layer}.{key}");
            assert_eq!(kept.dims()[2] as u64, length.as_u64().unwrap(), "{name}: {key}");
            compare(name, &key, &file[key.as_str()].values, &values(kept), OUTPUT, false);
        }
    }
}

/// Transformers' name of a parameter.
fn theirs(ours: &str) -> String {
    match ours {
        "embedding.weight" => "model.embed_tokens.weight".into(),
        "head.weight" => "lm_head.weight".into(),
        inner => format!("model.{inner}")
            .replace(".attention_norm.", ".input_layernorm.")
            .replace(".mlp_norm.", ".post_attention_layernorm.")
            .replace(".attention.", ".self_attn."),
    }
}

fn layout(ours: &str) -> Layout {
    if ours.ends_with("_proj.weight") || ours == "head.weight" { Layout::Linear } else { Layout::Same }
}
