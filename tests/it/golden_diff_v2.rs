//! Differential attention, version 2, by unilm's code; see `tests/golden/diff_v2/README.md`.

use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Tensor};
use polyhead_attention::{DiffV2Config, KvCache, Observe};

use crate::golden::{Golden, Layout, Names, OUTPUT, compare, files, renamed, size, tensor, values};
use crate::golden_layer::{Case, assert_scale};

const NAMES: Names<'static> = &[
    ("q_proj.weight", "q_proj.weight", Layout::Linear),
    ("k_proj.weight", "k_proj.weight", Layout::Linear),
    ("v_proj.weight", "v_proj.weight", Layout::Linear),
    ("lambda_proj.weight", "lambda_proj.weight", Layout::Linear),
    ("o_proj.weight", "o_proj.weight", Layout::Linear),
];

#[test]
fn golden_diff_v2() {
    files("diff_v2").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let (n_heads, head_dim) = (size(config, "n_heads"), size(config, "head_dim"));
    config.is("n_q_heads", 2 * n_heads);
    assert_scale(golden, head_dim);
    let described =
        DiffV2Config { n_heads, n_kv_heads: Some(size(config, "n_kv_heads")), head_dim: Some(head_dim), window: None };
    let case = Case::new(golden, &described, head_dim, renamed(file, "w.", NAMES));
    case.check(&renamed(file, "grad.", NAMES));

    let device = Device::flex().autodiff();
    let x = tensor::<3>(file, "x", &device);
    let [batch, seq, _] = x.dims();
    let lambda = sigmoid(polyhead_kernels::linear(x.clone(), case.layer.lambda_proj.weight.val(), None));
    compare(name, "inter.lambda", &file["inter.lambda"].values, &values(lambda.clone()), OUTPUT, false);

    // The heads of each pair, subtracted with the file's λ, seen through the output projection.
    let pairs = tensor::<4>(file, "inter.attn", &device).reshape([batch, seq, n_heads, 2 * head_dim]);
    let lambda = tensor::<3>(file, "inter.lambda", &device).reshape([batch, seq, n_heads, 1]);
    let heads = pairs.clone().narrow(3, 0, head_dim) - pairs.narrow(3, head_dim, head_dim) * lambda;
    let heads = heads.reshape([batch, seq, n_heads * head_dim]);
    let want = values(polyhead_kernels::linear(heads, case.layer.o_proj.weight.val(), None));

    let mut cache = KvCache::default();
    let out: Tensor<3> = case.run(x, 0..seq, Some(&mut cache), Observe::Nothing).hidden;
    compare(name, "inter.attn through o_proj", &want, &values(out), OUTPUT, false);
    for (key, kept) in ["cache.k", "cache.v"].into_iter().zip(cache.kept().unwrap()) {
        compare(name, key, &file[key].values, &values(kept), OUTPUT, false);
    }
    case.decode("out", 2);
}
