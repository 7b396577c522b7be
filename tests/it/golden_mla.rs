//! Multi-head latent attention by transformers' DeepSeek-V2 and V3; see `tests/golden/mla/README.md`.

use polyhead_attention::{MechanismCache, MlaConfig};

use crate::golden::{Golden, Layout, Names, OUTPUT, compare, files, renamed, size, values};
use crate::golden_layer::{Case, assert_scale};

const NAMES: Names<'static> = &[
    ("q_proj.weight", "q_proj.weight", Layout::Linear),
    ("q_a_proj.weight", "q_a_proj.weight", Layout::Linear),
    ("q_a_proj.bias", "q_a_proj.bias", Layout::Same),
    ("q_a_layernorm.weight", "q_a_norm.weight", Layout::Same),
    ("q_b_proj.weight", "q_proj.weight", Layout::Linear),
    ("kv_a_proj_with_mqa.weight", "kv_a_proj.weight", Layout::Linear),
    ("kv_a_proj_with_mqa.bias", "kv_a_proj.bias", Layout::Same),
    ("kv_a_layernorm.weight", "kv_a_norm.weight", Layout::Same),
    ("kv_b_proj.weight", "kv_b_proj.weight", Layout::Linear),
    ("o_proj.weight", "o_proj.weight", Layout::Linear),
    ("o_proj.bias", "o_proj.bias", Layout::Same),
];

#[test]
fn golden_mla() {
    files("mla").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.is("rope_frequencies", "theta**(-2i/qk_rope_head_dim)");
    config.is("latent_norm_eps", 1e-6);
    config.beside_the_point(&["decode_max_difference"]);
    let (latent, nope, rope) =
        (size(config, "kv_lora_rank"), size(config, "qk_nope_head_dim"), size(config, "qk_rope_head_dim"));
    assert_scale(golden, nope + rope);
    let described = MlaConfig {
        n_heads: size(config, "n_heads"),
        kv_lora_rank: latent,
        q_lora_rank: config.get("q_lora_rank").map(|rank| rank.as_u64().unwrap() as usize),
        qk_nope_head_dim: Some(nope),
        qk_rope_head_dim: Some(rope),
        v_head_dim: Some(size(config, "v_head_dim")),
        attention_bias: config["bias"].as_bool().unwrap(),
    };
    let case = Case::new(golden, &described, rope, renamed(file, "w.", NAMES));
    case.check(&renamed(file, "grad.", NAMES));
    case.check_weights();

    // Token by token: the first as in training, the others with the projection absorbed.
    let cache = case.decode("decode.out", 0);
    assert_eq!(cache.elements(), size(config, "seq") * (latent + rope), "{name}");
    let kept = values(cache.kept().unwrap());
    let of = |part: &dyn Fn(&[f32]) -> Vec<f32>| kept.chunks(latent + rope).flat_map(part).collect::<Vec<f32>>();
    compare(name, "cache.latent", &file["cache.latent"].values, &of(&|token| token[..latent].to_vec()), OUTPUT, false);
    let order: Vec<usize> = match config["cached_k_rope_order"].as_str() {
        Some("as rotated pairs") => (0..rope).collect(),
        Some("first halves of all pairs, then second halves") => {
            (0..rope).map(|i| i % (rope / 2) * 2 + i / (rope / 2)).collect()
        }
        other => panic!("{name}: cached_k_rope_order {other:?}"),
    };
    let k_rope = of(&|token| order.iter().map(|&channel| token[latent + channel]).collect());
    compare(name, "cache.k_rope", &file["cache.k_rope"].values, &k_rope, OUTPUT, false);
    // The last tokens in one call, absorbed too.
    case.decode("out", 4);
}
