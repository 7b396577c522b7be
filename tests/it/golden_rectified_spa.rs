//! Rectified sparse attention by the authors' code, and by an own reference of its causal forms; see
//! `tests/golden/rectified_spa/README.md`.

use burn::tensor::{Device, Tensor};
use polyhead_attention::Mask;
use polyhead_attention::sparse::rectified::{Kind, Pooled, RectifiedConfig, rectified_attention};
use polyhead_kernels::{AttentionOptions, attention};

use crate::golden::{GRADIENT, Golden, OUTPUT, compare, files, size, tensor, values};

#[test]
fn golden_rectified_spa() {
    files("rectified_spa").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let kind = match config["kind"].as_str().unwrap() {
        "official_bidirectional" => Kind::Bidirectional,
        "causal_block" => Kind::CausalBlock,
        "causal_token" => Kind::CausalToken,
        other => panic!("{name}: {other}"),
    };
    let device = Device::flex().autodiff();
    let leaves = ["q", "k", "v"].map(|key| tensor::<4>(file, key, &device).require_grad());
    let [batch, heads, seq, width] = leaves[0].dims();
    let sizes = ["batch", "num_heads", "tokens", "head_dim"].map(|key| size(config, key));
    assert_eq!([batch, heads, seq, width], sizes, "{name}: sizes of q");
    let (block_size, blocks) = (size(config, "block_size"), size(config, "num_blocks"));
    assert_eq!(seq.div_ceil(block_size), blocks, "{name}: num_blocks");
    let scale = config["scale"].as_f64().unwrap();
    let pooled = Pooled::new(kind, leaves.clone(), block_size, scale);
    let same = |key: &str, got: Vec<f32>, tolerance| compare(name, key, &file[key].values, &got, tolerance, false);
    same("pool.P", values(pooled.shares.clone()), OUTPUT);
    if kind == Kind::Bidirectional {
        for (key, got) in ["score.gain", "score.err"].into_iter().zip(pooled.gain_and_error.clone()) {
            compare(name, key, &file[key].values, &values(got), OUTPUT, true);
        }
    }
    let (near, frame) =
        (config.get("neighbour_halfwidth").map(|width| width.as_u64().unwrap() as usize), "first_frame_blocks");
    let frame = config.get(frame).map_or(0, |blocks| blocks.as_u64().unwrap() as usize);
    let first = config.get("force_first_block").is_some_and(|force| force == true);
    let always = |own: usize, block: usize| {
        near.is_some_and(|near| own.abs_diff(block) <= near) || own.max(block) < frame || (first && block == 0)
    };
    if near.is_some() {
        let near: Vec<f32> =
            (0..blocks * blocks).map(|at| f32::from(u8::from(always(at / blocks, at % blocks)))).collect();
        assert_eq!(near, file["neighbours"].values, "{name}: neighbours");
    }
    let (threshold, top_k) = (config["prob_threshold"].as_f64().unwrap(), size(config, "top_k"));
    let (critical, gain) = (pooled.critical(threshold, top_k, &always), pooled.gain());
    for (key, set) in [("set.critical", &critical), ("set.gain", &gain)] {
        let set: Vec<f32> = set.iter().map(|&member| f32::from(u8::from(member))).collect();
        assert_eq!(set, file[key].values, "{name}: {key}");
    }
    if kind == Kind::Bidirectional {
        let others: Vec<bool> =
            critical.iter().zip(&gain).filter(|(critical, _)| !**critical).map(|(_, gain)| *gain).collect();
        let counts = [others.len(), others.iter().filter(|gain| **gain).count()];
        assert_eq!(counts, ["noncritical", "rectified"].map(|key| size(config, key)), "{name}: counts");
    } else {
        config.is("strictly_causal", kind == Kind::CausalToken);
    }

    let order = if kind == Kind::Bidirectional { Mask::none() } else { Mask::causal() };
    let run = |mask: &Mask| {
        let [q, k, v] = leaves.clone();
        attention(q, k, v, &AttentionOptions { mask: Some(mask), scale: Some(scale), ..Default::default() }).hidden
    };
    same("out.dense", values(run(&order)), OUTPUT);
    let rectified = pooled.rectify(run(&order.with_blocks(pooled.mask(&critical))), &critical, &gain);
    same("factor.R", values(rectified.factor), OUTPUT);
    same("compensation", values(rectified.compensation), OUTPUT);
    check_output(golden, &leaves, rectified.hidden);

    if kind == Kind::CausalToken {
        let settings = RectifiedConfig { block_size, prob_threshold: threshold, top_k, first_block: first };
        let options = AttentionOptions { scale: Some(scale), ..Default::default() };
        check_output(golden, &leaves, rectified_attention(leaves.clone(), &settings, None, &options).hidden);
        // With all blocks read exactly nothing is given back.
        let all = pooled.mask(&vec![true; critical.len()]);
        let whole = rectified_attention(leaves.clone(), &settings, Some(all), &options).hidden;
        same("out.dense", values(whole), OUTPUT);
    }
}

fn check_output(golden: &Golden, leaves: &[Tensor<4>; 3], out: Tensor<4>) {
    let Golden { name, tensors: file, .. } = golden;
    compare(name, "out", &file["out"].values, &values(out.clone()), OUTPUT, false);
    let grads = (out * tensor(file, "cotangent", &Device::flex().autodiff())).sum().backward();
    for (key, leaf) in ["grad.q", "grad.k", "grad.v"].into_iter().zip(leaves) {
        compare(name, key, &file[key].values, &values(leaf.grad(&grads).unwrap()), GRADIENT, true);
    }
}
