//! Gated attention at the place G1, by its authors' code and by Qwen3-Next; see `tests/golden/gated_attention/README.md`.

use std::collections::BTreeMap;

use burn::tensor::Device;
use burn::tensor::activation::sigmoid;
use polyhead_attention::{GatedAttentionConfig, GatedPlace, Granularity};
use polyhead_models::weights::Named;

use crate::golden::{Golden, OUTPUT, compare, files, size, tensor, transposed, values};
use crate::golden_layer::{Case, assert_scale};

#[test]
fn golden_gated_attention() {
    files("gated_attention").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.is("gate_position", "G1");
    config.is("gate_activation", "sigmoid");
    config.is("qk_norm", true);
    config.is("qk_norm_eps", 1e-6);
    config.is("bias", false);
    let (n_heads, n_kv_heads, head_dim) =
        (size(config, "n_heads"), size(config, "n_kv_heads"), size(config, "head_dim"));
    assert_scale(golden, head_dim);
    let granularity = match config["gate"].as_str() {
        Some("elementwise") => Granularity::Elementwise,
        Some("headwise") => Granularity::Headwise,
        other => panic!("{name}: gate {other:?}"),
    };
    let described = GatedAttentionConfig {
        n_heads,
        n_kv_heads: Some(n_kv_heads),
        head_dim: Some(head_dim),
        qkv_bias: false,
        o_bias: false,
        qk_norm: true,
        window: None,
        gated: GatedPlace::Heads,
        granularity,
    };
    let gate = if granularity == Granularity::Headwise { 1 } else { head_dim };
    // Heads whose queries are together, before their gates.
    let together = match config["q_proj_layout"].as_str() {
        Some("per kv head: [group_size*head_dim q rows | gate rows]") => n_heads / n_kv_heads,
        Some("per query head: [head_dim q rows | head_dim gate rows]") => 1,
        other => panic!("{name}: q_proj_layout {other:?}"),
    };
    let centred = match config["qk_norm_weight"].as_str() {
        Some("plain (y = w * x/rms)") => 0.0,
        Some("zero-centred (y = (1 + w) * x/rms)") => 1.0,
        other => panic!("{name}: qk_norm_weight {other:?}"),
    };
    let rows = Rows { queries: together * head_dim, gates: together * gate };
    let mut weights = rows.ours(golden, "w.");
    for norm in ["softmax.q_norm.weight", "softmax.k_norm.weight"] {
        weights.get_mut(norm).unwrap().values.iter_mut().for_each(|weight| *weight += centred);
    }
    let case = Case::new(golden, &described, size(config, "rotary_dim"), weights);
    case.check(&rows.ours(golden, "grad."));
    let x = tensor::<3>(file, "x", &Device::flex().autodiff());
    let gates = sigmoid(polyhead_kernels::linear(x, case.layer.g_proj.weight.val(), None));
    compare(name, "inter.gate", &file["inter.gate"].values, &values(gates), OUTPUT, false);
    case.decode("out", 3);
}

/// How the rows of queries and gates alternate in the files' q_proj.
struct Rows {
    queries: usize,
    gates: usize,
}

impl Rows {
    /// A file's parameters, or their gradients, under the names of here.
    fn ours(&self, golden: &Golden, prefix: &str) -> BTreeMap<String, Named> {
        let mut ours = BTreeMap::new();
        let mut put = |name: String, tensor: Named| _ = ours.insert(name.clone(), Named { name, ..tensor });
        for (name, tensor) in golden.tensors.under(prefix) {
            match name.as_str() {
                "x" => {}
                "q_proj.weight" => {
                    let [queries, gates] = self.split(&tensor);
                    put("softmax.q_proj.weight".into(), transposed(&queries));
                    put("g_proj.weight".into(), transposed(&gates));
                }
                _ if tensor.shape.len() == 2 => put(format!("softmax.{name}"), transposed(&tensor)),
                _ => put(format!("softmax.{name}"), tensor),
            }
        }
        ours
    }

    fn split(&self, both: &Named) -> [Named; 2] {
        let [rows, columns] = both.shape[..] else { panic!("{} is no matrix", both.name) };
        let period = self.queries + self.gates;
        assert!(rows.is_multiple_of(period), "{}: {rows} rows", both.name);
        let pick = |of_queries: bool| {
            let picked: Vec<usize> = (0..rows).filter(|row| (row % period < self.queries) == of_queries).collect();
            let values = picked.iter().flat_map(|row| &both.values[row * columns..(row + 1) * columns]).copied();
            Named { name: both.name.clone(), shape: vec![picked.len(), columns], values: values.collect() }
        };
        [pick(true), pick(false)]
    }
}
