//! What must hold of every form.

use burn::tensor::Device;
use polyhead_kernels::comparison::largest_difference;

use super::blocks::Pattern;
use super::boundaries::{BoundarySelection, mass_ratios};
use super::dhsa::{ChunkPooling, TokenSelection};
use super::*;
use crate::laws::draw;

/// Queries of 4 heads, keys and values of 2, over 37 tokens.
fn inputs(device: &Device) -> [Tensor<4>; 3] {
    [4, 2, 2].map(|heads| draw([2, heads, 37, 8], [0.0, 1.5], device))
}

fn options(mask: &Mask) -> AttentionOptions<'_> {
    AttentionOptions { mask: Some(mask), ..AttentionOptions::default() }
}

fn attend(config: SparseConfig, inputs: [Tensor<4>; 3]) -> Tensor<4> {
    Sparse::Config(config, None).attend(inputs, &options(&Mask::causal())).hidden
}

fn dense([q, k, v]: [Tensor<4>; 3]) -> Tensor<4> {
    attention(q, k, v, &options(&Mask::causal())).hidden
}

fn blocks(pattern: Pattern, density: f64, rectify: bool) -> SparseConfig {
    let config = BlocksConfig { pattern, density, rectify, query_block: 8, key_block: 4, vertical_share: 0.5 };
    SparseConfig::Blocks(config)
}

#[test]
fn full_density_is_dense_and_little_is_not() {
    let inputs = inputs(&Device::flex());
    let want = dense(inputs.clone());
    let dhsa = |density, local_tokens| {
        let config = DhsaConfig {
            block_size: 8,
            density,
            chunk_size: Some(5),
            global_tokens: 0,
            local_tokens,
            instruction_tokens: 3,
            ..DhsaConfig::default()
        };
        SparseConfig::Dhsa(config)
    };
    let rectified = |top_k| {
        SparseConfig::Rectified(RectifiedConfig { block_size: 4, prob_threshold: 0.0, top_k, first_block: false })
    };
    let mut pairs = vec![
        (dhsa(1.0, 0), dhsa(0.2, 2)),
        (rectified(99), rectified(1)),
        (SparseConfig::H2o(H2oConfig { heavy: 40, recent: 20 }), SparseConfig::H2o(H2oConfig { heavy: 2, recent: 2 })),
    ];
    for pattern in [Pattern::TopK, Pattern::AShape, Pattern::VerticalSlash, Pattern::VerticalSlashBlocks] {
        pairs.extend([false, true].map(|rectify| (blocks(pattern, 1.0, rectify), blocks(pattern, 0.3, rectify))));
    }
    for (all, few) in pairs {
        let apart = |config: &SparseConfig| largest_difference(attend(config.clone(), inputs.clone()), want.clone());
        assert!(apart(&all) < 1e-5, "{all:?}: {}", apart(&all));
        assert!(apart(&few) > 1e-3, "{few:?}");
        assert!(numbers(attend(few, inputs.clone())).iter().all(|value| value.is_finite()));
    }
}

/// Chunks are those of training; all other forms are never in the way of it.
#[test]
fn training_and_reading_are_told_apart_by_the_tape() {
    let shifted = || SparseConfig::Shifted(ShiftedConfig::default());
    for (device, trains) in [(Device::flex(), false), (Device::flex().autodiff(), true)] {
        let inputs = inputs(&device);
        let apart = |config| largest_difference(attend(config, inputs.clone()), dense(inputs.clone()));
        assert_eq!(apart(shifted()) > 1e-3, trains);
        assert_eq!(apart(blocks(Pattern::AShape, 0.3, true)) > 1e-3, !trains);
    }
}

#[test]
fn rectified_attention_looks_at_nothing_later() {
    let inputs = inputs(&Device::flex());
    let config = RectifiedConfig { block_size: 8, prob_threshold: 0.4, top_k: 1, first_block: true };
    let out = attend(SparseConfig::Rectified(config), inputs.clone());
    for changed in [11, 20, 36] {
        let other = inputs.clone().map(|x| {
            let [batch, heads, seq, width] = x.dims();
            let noise = draw([batch, heads, seq - changed, width], [0.0, 3.0], &x.device());
            x.slice_assign([0..batch, 0..heads, changed..seq, 0..width], noise)
        });
        let again = attend(SparseConfig::Rectified(config), other);
        let before = |x: &Tensor<4>| x.clone().narrow(2, 0, changed);
        assert!(largest_difference(before(&out), before(&again)) < 1e-5, "token {changed}");
        assert!(largest_difference(out.clone(), again) > 1e-2);
    }
}

/// Texts of 11, 6 and 20 tokens in one row, of 30 and 7 in the other.
#[test]
fn packed_texts_are_read_as_if_each_were_a_row() {
    let inputs = inputs(&Device::flex());
    let rows = [vec![0..11, 11..17, 17..37], vec![0..30, 30..37]];
    let ids = |texts: &Vec<Range<usize>>| {
        (0..37).map(|at| texts.iter().position(|text| text.contains(&at)).expect("a text") as u32).collect()
    };
    let documents: Vec<u32> = rows.iter().flat_map(|texts| -> Vec<u32> { ids(texts) }).collect();
    let packed = Mask::causal().with_documents(&documents);
    let dhsa = |rectify| {
        let (block_size, chunk_size) = (4, Some(3));
        let few = DhsaConfig {
            global_tokens: 0,
            local_tokens: 2,
            instruction_tokens: 3,
            density: 0.2,
            ..DhsaConfig::default()
        };
        SparseConfig::Dhsa(DhsaConfig { block_size, chunk_size, rectify, ..few })
    };
    let rectified = RectifiedConfig { block_size: 4, prob_threshold: 0.0, top_k: 1, first_block: false };
    let check = |what: &str, read: &dyn Fn([Tensor<4>; 3], &Mask) -> Tensor<4>| {
        let together = read(inputs.clone(), &packed);
        for (row, text) in rows.iter().enumerate().flat_map(|(row, texts)| texts.iter().map(move |text| (row, text))) {
            let own = |x: &Tensor<4>| x.clone().slice([row..row + 1, 0..x.dims()[1], text.clone(), 0..8]);
            let alone = read(inputs.each_ref().map(own), &Mask::causal());
            let apart = largest_difference(own(&together), alone);
            assert!(apart < 1e-6, "{what}, row {row}, {text:?}: {apart}");
        }
        let [q, k, v] = inputs.clone();
        assert!(largest_difference(together, attention(q, k, v, &options(&packed)).hidden) > 1e-3, "{what} is dense");
    };
    for config in [
        blocks(Pattern::AShape, 0.3, false),
        blocks(Pattern::AShape, 0.3, true),
        blocks(Pattern::VerticalSlash, 0.3, true),
        dhsa(false),
        dhsa(true),
        SparseConfig::Rectified(rectified),
        SparseConfig::H2o(H2oConfig { heavy: 2, recent: 2 }),
    ] {
        let sparse = Sparse::Config(config.clone(), None);
        check(&format!("{config:?}"), &|inputs, mask| sparse.attend(inputs, &options(mask)).hidden);
    }
    check("blocks that an earlier call chose", &|inputs, mask| {
        let selection = SparsedSelection { block_size: 4, ratio: 0.3, answer: 37 };
        let sparse = Sparse::Kept(Arc::new(KeptBlocks { selection, mask: OnceLock::new() }));
        sparse.attend(inputs.clone(), &options(mask));
        sparse.attend(inputs, &options(mask)).hidden
    });
}

/// Later queries attend to one topic: boundaries are where it begins and where it ends.
#[test]
fn boundaries_are_where_topics_change() {
    let (seq, topic) = (40, 12..24);
    let weight = |query: usize, key: usize| match key {
        _ if key > query => 0.0,
        _ if topic.contains(&key) => 1.0,
        _ => 0.05,
    };
    let weights: Vec<f32> = (0..seq * seq).map(|at| weight(at / seq, at % seq)).collect();
    let select = BoundarySelection { threshold: 2.0, most: 2, min_distance: 4, instruction_tokens: None };
    assert_eq!(select.starts(&mass_ratios(&weights, 3, None)), [0, 12, 24, 40]);
}

/// Of keys that are alike, a long chunk scores as a short one does on average.
#[test]
fn the_root_of_the_length_makes_chunks_comparable() {
    let device = Device::flex();
    let (q, k) = (draw([1, 1, 4, 16], [0.0, 1.0], &device), draw([1, 1, 4096, 16], [0.0, 1.0], &device));
    let spread = |pooling, length: usize| {
        let select = TokenSelection {
            block_size: 4,
            budget: 1,
            pooling,
            global_tokens: 0,
            local_tokens: 0,
            instruction_tokens: 0,
            sliding_window: None,
        };
        let starts: Vec<usize> = (0..=4096).step_by(length).collect();
        let scores = select.scores(q.clone(), k.clone(), &[starts]).scores.concat();
        scores.iter().map(|score| score * score).sum::<f32>() / scores.len() as f32
    };
    let of = |pooling| spread(pooling, 4) / spread(pooling, 64);
    assert!((0.5..2.0).contains(&of(ChunkPooling::MeanSqrt)), "{}", of(ChunkPooling::MeanSqrt));
    assert!(of(ChunkPooling::Mean) > 5.0);
}

/// The first call is dense and chooses, all others read what it chose.
#[test]
fn blocks_are_chosen_once() {
    let [q, k, v] = inputs(&Device::flex());
    let selection = SparsedSelection { block_size: 4, ratio: 0.3, answer: 10 };
    let kept = Arc::new(KeptBlocks { selection, mask: OnceLock::new() });
    let sparse = Sparse::Kept(kept.clone());
    let run = |q: &Tensor<4>| sparse.attend([q.clone(), k.clone(), v.clone()], &AttentionOptions::default()).hidden;
    let first = run(&q);
    let chosen = kept.mask.get().expect("chosen").clone();
    assert!(
        largest_difference(
            first.clone(),
            attention(q.clone(), k.clone(), v.clone(), &AttentionOptions::default()).hidden
        ) == 0.0
    );
    assert!(largest_difference(run(&q), first) > 1e-3);
    run(&(q * -1.0));
    assert!(Arc::ptr_eq(&chosen, kept.mask.get().expect("chosen")));
}
