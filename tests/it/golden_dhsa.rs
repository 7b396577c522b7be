//! DHSA by the authors' code; see `tests/golden/dhsa/README.md`.

use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::Mask;
use polyhead_attention::sparse::blocks::{BlockSelection, Pattern};
use polyhead_attention::sparse::boundaries::{
    BoundaryPredictor, BoundarySelection, LabelConfig, PredictorConfig, labelled_gaps, mass_ratios, rows_of,
    without_ends,
};
use polyhead_attention::sparse::dhsa::{ChunkPooling, TokenSelection, chunk_of_tokens};
use polyhead_kernels::{AttentionOptions, attention, attention_weights};
use polyhead_models::weights;

use crate::golden::{
    Config, GRADIENT, Golden, Layout, Names, OUTPUT, Tensors, compare, compare_gradients, files, renamed, size, tensor,
    values,
};

const NAMES: Names<'static> = &[
    ("enc.mha.in_proj_weight", "qkv_proj.weight", Layout::Linear),
    ("enc.mha.in_proj_bias", "qkv_proj.bias", Layout::Same),
    ("enc.mha.out_proj.weight", "out_proj.weight", Layout::Linear),
    ("enc.mha.out_proj.bias", "out_proj.bias", Layout::Same),
    ("enc.norm.weight", "norm_weight", Layout::Same),
    ("enc.norm.bias", "norm_bias", Layout::Same),
    ("pool.gate.weight", "gate.weight", Layout::Linear),
    ("mlp.0.weight", "up_proj.weight", Layout::Linear),
    ("mlp.0.bias", "up_proj.bias", Layout::Same),
    ("mlp.2.weight", "down_proj.weight", Layout::Linear),
    ("mlp.2.bias", "down_proj.bias", Layout::Same),
];

#[test]
fn golden_dhsa() {
    for golden in files("dhsa") {
        match golden.config["kind"].as_str().unwrap() {
            "train" => check_predictor(&golden),
            "attn_v1" => check_tokens(&golden),
            "masks_v2" => check_blocks(&golden),
            other => panic!("{}: {other}", golden.name),
        }
    }
}

fn number(config: &Config, key: &str) -> f64 {
    config[key].as_f64().unwrap_or_else(|| panic!("config has no {key}"))
}

fn count(config: &Config, key: &str) -> Option<usize> {
    config.get(key).map(|count| count.as_u64().unwrap() as usize)
}

fn flags(set: &[bool]) -> Vec<f32> {
    set.iter().map(|&member| f32::from(u8::from(member))).collect()
}

fn whole(numbers: &[usize]) -> Vec<f32> {
    numbers.iter().map(|&number| number as f32).collect()
}

fn check_predictor(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    for (key, only) in [("layer_norm_eps", 1e-5), ("cos_eps", 1e-6), ("ratio_eps", 1e-6), ("pred_mask_value", -100.0)] {
        config.is(key, only);
    }
    let (batch, seq, window) = (size(config, "batch"), size(config, "tokens"), size(config, "window"));
    let device = Device::flex().autodiff();
    let (q, k) = (tensor::<4>(file, "q", &device), tensor::<4>(file, "k", &device).require_grad());
    let [heads, kv_heads, width] = ["num_heads", "num_kv_heads", "head_dim"].map(|key| size(config, key));
    assert_eq!([q.dims(), k.dims()], [heads, kv_heads].map(|heads| [batch, heads, seq, width]), "{name}: sizes");
    let mask = Mask::causal();
    let options = AttentionOptions { mask: Some(&mask), ..Default::default() };
    let mean = values(attention_weights(q, k.clone().detach(), &options).mean_dim(1));
    compare(name, "label.attn_mean", &file["label.attn_mean"].values, &mean, OUTPUT, false);

    let reach = (config["sliding"] == true).then_some(size(config, "sliding_window"));
    let ratios: Vec<Vec<f64>> = mean.chunks(seq * seq).map(|weights| mass_ratios(weights, window, reach)).collect();
    config.beside_the_point(&["sliding_window"]);
    let settings = LabelConfig {
        steepness: number(config, "label_alpha"),
        ratio: number(config, "label_beta"),
        focal_gamma: number(config, "focal_gamma"),
        positive_weight: number(config, "pos_weight"),
    };
    assert!(((settings.ratio + 1e-6).ln() - number(config, "label_beta_log")).abs() < 1e-6, "{name}: label_beta_log");
    let soft: Vec<f32> = ratios.iter().flatten().map(|&ratio| settings.soft(ratio) as f32).collect();
    let hard: Vec<bool> = soft.iter().map(|&label| label >= 0.5).collect();
    let counted: Vec<bool> = (0..batch * seq).map(|at| labelled_gaps(seq, window).contains(&(at % seq))).collect();
    let flat: Vec<f32> = ratios.iter().flatten().map(|&ratio| ratio as f32).collect();
    compare(name, "label.ratio", &file["label.ratio"].values, &flat, OUTPUT, true);
    compare(name, "label.soft", &file["label.soft"].values, &soft, OUTPUT, false);
    assert_eq!(flags(&hard), file["label.hard"].values, "{name}: label.hard");
    assert_eq!(flags(&counted), file["label.mask"].values, "{name}: label.mask");

    let described = PredictorConfig {
        window,
        hidden: size(config, "predictor_hidden"),
        n_heads: size(config, "predictor_heads"),
        gated_pooling: config["window_pool"] == true,
    };
    let channels = size(config, "channel");
    described.validate(Some(channels)).unwrap();
    let predictor: BoundaryPredictor =
        weights::load(described.init(channels, &device), renamed(file, "w.", NAMES)).unwrap();
    let logits = predictor.logits(k.clone());
    compare(name, "pred.logits", &file["pred.logits"].values, &values(logits.clone()), OUTPUT, false);
    let smooth = config["pred_smooth_ends"] == true;
    let inner: Vec<Vec<f32>> = rows_of(logits.clone()).iter().map(|row| without_ends(row, window, smooth)).collect();
    compare(name, "pred.masked_logits", &file["pred.masked_logits"].values, &inner.concat(), OUTPUT, false);

    let select = |key: &str| BoundarySelection {
        threshold: number(config, key),
        most: size(config, "top_n"),
        min_distance: size(config, "nms_half_width"),
        instruction_tokens: count(config, "instruction_tokens"),
    };
    for row in 0..batch {
        let inner: Vec<f64> = inner[row].iter().map(|&logit| f64::from(logit)).collect();
        let found =
            [("label", select("label_theta").starts(&ratios[row])), ("pred", select("pred_theta").starts(&inner))];
        for (kind, starts) in found {
            let key = format!("{kind}.boundaries.b{row}");
            assert_eq!(whole(&starts), file[key.as_str()].values, "{name}: {key}");
        }
    }

    let all = counted.iter().filter(|counted| **counted).count() as f64;
    let loss = |labels: &[f32]| settings.loss(logits.clone(), labels, &counted) / all;
    let (hard, soft) = (loss(&flags(&hard)), loss(&soft));
    compare(name, "loss.focal_soft", &file["loss.focal_soft"].values, &values(soft), OUTPUT, false);
    compare(name, "loss.focal_hard", &file["loss.focal_hard"].values, &values(hard.clone()), OUTPUT, false);
    let grads = hard.backward();
    compare(name, "grad.k", &file["grad.k"].values, &values(k.grad(&grads).unwrap()), GRADIENT, true);
    compare_gradients(name, &predictor, &grads, &renamed(file, "grad.w.", NAMES), GRADIENT);
}

/// Output and gradients of attention under a mask and with a bias, which are under these names in a file.
fn check_attention(golden: &Golden, kind: &str, mask: &Mask, bias: Option<Tensor<4>>) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    let leaves = ["q", "k", "v"].map(|key| tensor::<4>(file, key, &device).require_grad());
    let options =
        AttentionOptions { mask: Some(mask), bias, scale: Some(number(config, "scale")), ..Default::default() };
    let [q, k, v] = leaves.clone();
    let out = attention(q, k, v, &options).hidden;
    let key = format!("out.{kind}");
    compare(name, &key, &file[key.as_str()].values, &values(out.clone()), OUTPUT, false);
    let grads = (out * tensor(file, "cotangent", &device)).sum().backward();
    for (leaf, of) in leaves.iter().zip(["q", "k", "v"]) {
        let key = format!("grad.{kind}.{of}");
        compare(name, &key, &file[key.as_str()].values, &values(leaf.grad(&grads).unwrap()), GRADIENT, true);
    }
}

fn check_tokens(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let (batch, heads, seq) = (size(config, "batch"), size(config, "num_heads"), size(config, "tokens"));
    let [q, k] = ["q", "k"].map(|key| tensor::<4>(file, key, &Device::flex()));
    assert_eq!(q.dims(), [batch, heads, seq, size(config, "head_dim")], "{name}: sizes of q");
    let window = count(config, "sliding_window");
    let select = TokenSelection {
        block_size: size(config, "block_size"),
        budget: size(config, "topk_tokens"),
        pooling: match config["pooling"].as_str() {
            Some("avgpool") => ChunkPooling::Mean,
            Some("avgpool_norm") => ChunkPooling::MeanSqrt,
            other => panic!("{name}: pooling {other:?}"),
        },
        global_tokens: size(config, "global_tokens"),
        local_tokens: size(config, "local_tokens"),
        instruction_tokens: count(config, "instruction_tokens").unwrap_or(0),
        sliding_window: window,
    };
    config.is("tie_rule_union", "lowest index first");
    let queries = seq - select.instruction_tokens;
    let blocks = queries.div_ceil(select.block_size);
    let budget = window.map_or(select.budget, |window| select.budget.min(window)).min(seq);
    let want = ["query_tokens", "num_query_blocks", "budget"].map(|key| size(config, key));
    assert_eq!([queries, blocks, budget], want, "{name}: queries, blocks, budget");
    let bounds = &file["boundaries"];
    let starts: Vec<Vec<usize>> =
        bounds.values.chunks(bounds.shape[1]).map(|row| row.iter().map(|&start| start as usize).collect()).collect();

    let scores = select.scores(q.clone(), k.clone(), &starts);
    compare(name, "repr.query", &file["repr.query"].values, &values(scores.queries), OUTPUT, false);
    let chunks: Vec<f32> = scores.chunks.into_iter().flat_map(values).collect();
    compare(name, "repr.chunk", &file["repr.chunk"].values, &chunks, OUTPUT, false);
    compare(name, "score.chunk", &file["score.chunk"].values, &scores.scores.concat(), OUTPUT, false);
    let [mut must, mut tied, mut from_tied, mut chunk_ids] = [const { Vec::new() }; 4];
    for (starts, scores) in starts.iter().zip(&scores.scores) {
        let chunk_of = chunk_of_tokens(starts);
        for (block, scores) in scores.chunks(starts.len() - 1).enumerate() {
            let chosen = select.choose(block, scores, &chunk_of);
            must.extend(flags(&chosen.must));
            tied.extend(flags(&chosen.tied));
            from_tied.push(chosen.from_tied as f32);
        }
        chunk_ids.extend(whole(&chunk_of));
    }
    for (key, got) in [("must", &must), ("tied", &tied), ("num_from_tied", &from_tied), ("chunk_of_token", &chunk_ids)]
    {
        let key = format!("sel.{key}");
        assert_eq!(*got, file[key.as_str()].values, "{name}: {key}");
    }

    let exact = window.map_or(Mask::causal(), |window| Mask::causal().with_window(window + 1));
    let union = exact.clone().with_blocks(select.mask(q, k, &starts));
    let hidden = union.hidden(batch, 0, seq, seq, &Device::flex()).unwrap();
    let seen: Vec<f32> = values(hidden.bool_not().float());
    assert_eq!(seen, file["mask.union"].values, "{name}: mask.union");
    check_attention(golden, "union", &union, None);

    // The released code reads lists, whose first indices global tokens replace: a key counts as often as it is listed.
    let counts = listed(golden, &select, (&must, &tied, &from_tied));
    assert_eq!(counts, file["sel.count_official"].values, "{name}: sel.count_official");
    let rows = counts.chunks(seq * blocks).flat_map(|of_row| {
        (0..seq).flat_map(move |query| match query < queries {
            true => of_row[query / select.block_size * seq..][..seq].to_vec(),
            false => vec![1.0; seq],
        })
    });
    let rows: Vec<f32> = rows.collect();
    let repeated = rows.chunks(seq).enumerate().filter(|(at, row)| row[..=at % seq].iter().any(|&count| count > 1.0));
    assert_eq!(repeated.count(), size(config, "duplicate_key_rows"), "{name}: duplicate_key_rows");
    let bias: Vec<f32> = rows.iter().map(|&count| if count > 0.0 { count.ln() } else { -1e30 }).collect();
    let bias = Tensor::from_data(TensorData::new(bias, [batch, 1, seq, seq]), &Device::flex().autodiff());
    check_attention(golden, "official", &exact, Some(bias));
}

/// How often the released code counts each key, after what its lists have has been found to be a right selection.
fn listed(golden: &Golden, select: &TokenSelection, (must, tied, from_tied): (&[f32], &[f32], &[f32])) -> Vec<f32> {
    let (name, file): (_, &Tensors) = (&golden.name, &golden.tensors);
    let list = &file["sel.index_official"];
    let (blocks, budget, seq) = (list.shape[1], list.shape[2], must.len() / from_tied.len());
    let mut counts = vec![0.0; must.len()];
    for (at, list) in list.values.chunks(budget).enumerate() {
        let (must, tied, block) = (&must[at * seq..][..seq], &tied[at * seq..][..seq], at % blocks);
        let end = ((block + 1) * select.block_size).min(seq);
        let mut list: Vec<usize> = list.iter().map(|&key| key as usize).collect();
        assert!(list.is_sorted(), "{name}: lists are sorted");
        let chosen: Vec<usize> = list.iter().copied().filter(|&key| key < end).collect();
        let in_tied = chosen.iter().filter(|&&key| tied[key] == 1.0).count();
        let right = (0..end).all(|key| must[key] == 0.0 || chosen.contains(&key))
            && chosen.iter().all(|&key| must[key] + tied[key] > 0.0)
            && in_tied == from_tied[at] as usize;
        assert!(right, "{name}: sel.index_official of block {at}");
        let from = select.global(block, seq).start;
        for (slot, key) in list.iter_mut().take(select.global_tokens).enumerate() {
            *key = (from + slot).min(end - 1);
        }
        list.into_iter().for_each(|key| counts[at * seq + key] += 1.0);
    }
    counts
}

fn check_blocks(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let (batch, heads, seq) = (size(config, "batch"), size(config, "num_heads"), size(config, "tokens"));
    let [q, k] = ["q", "k"].map(|key| tensor::<4>(file, key, &Device::flex()));
    assert_eq!(q.dims(), [batch, heads, seq, size(config, "head_dim")], "{name}: sizes of q");
    let mut empty = 0;
    for (kind, pattern) in [
        ("topk", Pattern::TopK),
        ("a_shape", Pattern::AShape),
        ("vs", Pattern::VerticalSlash),
        ("vs_block", Pattern::VerticalSlashBlocks),
    ] {
        let select = BlockSelection {
            pattern,
            sizes: ["q_block", "k_block"].map(|key| size(config, key)),
            top_k: size(config, "topk_blocks"),
            vertical_share: number(config, "vertical_slash_ratio"),
        };
        let key = format!("block_mask.{kind}");
        assert_eq!(flags(&select.seen(q.clone(), k.clone())), file[key.as_str()].values, "{name}: {key}");
        if !matches!(pattern, Pattern::TopK | Pattern::AShape) {
            continue;
        }
        let mask = Mask::causal().with_blocks(select.mask(q.clone(), k.clone()));
        let hidden = mask.hidden(batch, 0, seq, seq, &Device::flex()).unwrap();
        let hidden: Vec<bool> = hidden.into_data().iter().collect();
        let rows: Vec<bool> = hidden.chunks(seq).map(|row| row.iter().all(|&hidden| hidden)).collect();
        let key = format!("rows_empty.{kind}");
        assert_eq!(flags(&rows), file[key.as_str()].values, "{name}: {key}");
        empty += if pattern == Pattern::TopK { rows.iter().filter(|row| **row).count() } else { 0 };
        check_attention(golden, kind, &mask, None);
    }
    assert_eq!(empty, size(config, "empty_rows_topk"), "{name}: empty_rows_topk");
}
