//! SparseD by the authors' code; see `tests/golden/sparsed/README.md`.

use burn::tensor::Device;
use polyhead_attention::Mask;
use polyhead_attention::sparse::BlockMask;
use polyhead_attention::sparse::sparsed::{SparsedSelection, mask_step};
use polyhead_kernels::{AttentionOptions, attention};

use crate::golden::{GRADIENT, Golden, OUTPUT, compare, files, size, tensor, values};
use crate::golden_sinklora::seen_by_heads;

#[test]
fn golden_sparsed() {
    files("sparsed").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let (batch, heads, seq) = (size(config, "batch"), size(config, "num_heads"), size(config, "tokens"));
    let (width, block_size) = (size(config, "head_dim"), size(config, "block_size"));
    let select =
        SparsedSelection { block_size, ratio: config["ratio"].as_f64().unwrap(), answer: size(config, "gen_len") };
    let (blocks, last) = (seq.div_ceil(block_size), select.first_of_answer(seq));
    assert_eq!([blocks, last], ["num_blocks", "last_block"].map(|key| size(config, key)), "{name}: blocks");
    // Where all blocks are kept, the file counts one more than there are.
    let clamped = |kept: usize, blocks: usize| if config["clamp"] == true { kept.min(blocks) } else { kept };
    for (key, blocks) in [("keep_all", blocks), ("keep_gen", blocks - last)] {
        assert_eq!(select.kept(blocks), clamped(size(config, key), blocks), "{name}: {key}");
    }

    let device = Device::flex().autodiff();
    let [q, k, v] = ["q", "k", "v"].map(|key| tensor::<4>(file, key, &device).require_grad());
    assert_eq!(q.dims(), [batch, heads, seq, width], "{name}: sizes of q");
    assert_eq!(k.dims(), [batch, size(config, "num_kv_heads"), seq, width], "{name}: sizes of k");
    let [of_channels, of_heads] = [width, heads].map(|count| (count as f64).powf(-0.5));
    let seen = |scale| select.seen(q.clone().detach(), k.clone().detach(), scale);
    let by_heads = config["selection_scale_kind"] == "num_heads";
    assert!(by_heads || config["selection_scale_kind"] == "head_dim", "{name}: selection_scale_kind");
    let own = if by_heads { of_heads } else { of_channels };
    for (key, scale) in [("selection_scale", own), ("attention_scale", of_channels)] {
        assert!((config[key].as_f64().unwrap() - scale).abs() < 1e-12, "{name}: {key}");
    }
    let flags = |seen: &[bool]| seen.iter().map(|&seen| f32::from(u8::from(seen))).collect::<Vec<_>>();
    let chosen = seen(Some(own));
    let both = [seen(None), seen(Some(of_heads))];
    for (key, seen) in
        [("mask.block", &chosen), ("mask.block_head_dim_scale", &both[0]), ("mask.block_num_heads_scale", &both[1])]
    {
        assert_eq!(flags(seen), file[key].values, "{name}: {key}");
    }
    let differing = both[0].iter().zip(&both[1]).filter(|(a, b)| a != b).count();
    assert_eq!(differing, size(config, "masks_differ_between_scales"), "{name}: scales");

    let mask = Mask::none().with_blocks(BlockMask::of_blocks(&chosen, [batch, heads], [seq, seq], [block_size; 2]));
    let tokens: Vec<f32> = match batch {
        1 => seen_by_heads(&mask, seq),
        _ => {
            flags(&mask.hidden(batch, 0, seq, seq, &device).unwrap().bool_not().into_data().iter().collect::<Vec<_>>())
        }
    };
    assert_eq!(tokens, file["mask.token"].values, "{name}: mask.token");
    let run = |mask: &Mask| {
        let options = AttentionOptions { mask: Some(mask), ..Default::default() };
        attention(q.clone(), k.clone(), v.clone(), &options).hidden
    };
    compare(name, "out.dense", &file["out.dense"].values, &values(run(&Mask::none())), OUTPUT, false);
    let out = run(&mask);
    compare(name, "out.sparse", &file["out.sparse"].values, &values(out.clone()), OUTPUT, false);
    let grads = (out * tensor(file, "cotangent", &device)).sum().backward();
    for (key, leaf) in [("grad.q", &q), ("grad.k", &k), ("grad.v", &v)] {
        compare(name, key, &file[key].values, &values(leaf.grad(&grads).unwrap()), GRADIENT, true);
    }

    let (steps, step) = (size(config, "steps"), mask_step(size(config, "steps"), config["skip"].as_f64().unwrap()));
    assert_eq!(step, size(config, "mask_step"), "{name}: mask_step");
    let dense: Vec<f32> = (0..steps).map(|at| f32::from(u8::from(at <= step))).collect();
    assert_eq!(dense, file["schedule.dense_step"].values, "{name}: schedule.dense_step");
}
