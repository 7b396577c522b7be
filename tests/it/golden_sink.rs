//! Learnable sinks by transformers' GPT-OSS; see `tests/golden/sink/README.md`.

use burn::tensor::Tensor;
use polyhead_attention::{PerLayerCount, SinkConfig};

use crate::golden::{Golden, Layout, Names, OUTPUT, compare, files, renamed, size, values};
use crate::golden_layer::{Case, assert_scale};

const NAMES: Names<'static> = &[
    ("q_proj.weight", "softmax.q_proj.weight", Layout::Linear),
    ("k_proj.weight", "softmax.k_proj.weight", Layout::Linear),
    ("v_proj.weight", "softmax.v_proj.weight", Layout::Linear),
    ("o_proj.weight", "softmax.o_proj.weight", Layout::Linear),
    ("q_proj.bias", "softmax.q_proj.bias", Layout::Same),
    ("k_proj.bias", "softmax.k_proj.bias", Layout::Same),
    ("v_proj.bias", "softmax.v_proj.bias", Layout::Same),
    ("o_proj.bias", "softmax.o_proj.bias", Layout::Same),
    ("sinks", "sinks", Layout::Same),
];

#[test]
fn golden_sink() {
    files("sink").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.is("sink", "learned logit per query head, in the denominator only");
    config.beside_the_point(&["decode_max_difference"]);
    let bias = config["bias"].as_bool().unwrap();
    let head_dim = size(config, "head_dim");
    let described = SinkConfig {
        n_heads: size(config, "n_heads"),
        n_kv_heads: Some(size(config, "n_kv_heads")),
        head_dim: Some(head_dim),
        qkv_bias: bias,
        o_bias: bias,
        qk_norm: false,
        window: config.get("window").map(|window| PerLayerCount::Same(window.as_u64().unwrap() as usize)),
        sink_init: 0.0,
    };
    assert_scale(golden, head_dim);
    let case = Case::new(golden, &described, head_dim, renamed(file, "w.", NAMES));
    case.check(&renamed(file, "grad.", NAMES));

    let mut mass = Vec::new();
    for seen in case.check_weights() {
        let maps = seen.maps.unwrap();
        let [heads, queries, _] = maps.dims();
        let of_rows: Tensor<2> = 1.0 - maps.sum_dim(2).reshape([heads, queries]);
        let told = &seen.numbers.iter().find(|(name, _)| name == "sink_mass").unwrap().1;
        let mean = values(of_rows.clone().mean_dim(1));
        compare(name, "sink_mass told", &mean, &values(told.clone()), OUTPUT, false);
        mass.extend(values(of_rows));
    }
    compare(name, "inter.sink_mass", &file["inter.sink_mass"].values, &mass, OUTPUT, false);

    let kept = case.decode("decode.out", 0).kept().unwrap();
    for (key, kept) in ["cache.k", "cache.v"].into_iter().zip(kept) {
        assert_eq!(kept.dims().as_slice(), file[key].shape, "{name}: {key}");
        compare(name, key, &file[key].values, &values(kept), OUTPUT, false);
    }
}
