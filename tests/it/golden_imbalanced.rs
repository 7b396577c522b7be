//! Boosts of spans by their authors' code; see `tests/golden/imbalanced/README.md`.

use burn::tensor::{Device, Tensor};
use polyhead_attention::{
    Amount, At, Call, Change, Dims, Edit, LayerSites, Mask, Mechanism, MechanismConfig, Positions, QuerySite, Rope,
    RopeLayout, Sites, SoftmaxConfig,
};
use polyhead_models::intervention::span_boost::{boost, boost_sets};
use polyhead_models::weights::load;

use crate::golden::{Golden, PROJECTIONS, compare, files, renamed, size, tensor, values};

/// Relative to the largest number.
const NUMBERS: f32 = 1e-5;

#[test]
fn golden_imbalanced() {
    files("imbalanced").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex();
    config.is("causal", true);
    config.is("rope", true);
    config.is("rope_layout", "neox");
    config.is("spatial_ratio", 0.0);
    config.is("query_rows", "last");
    config.beside_the_point(&["batch"]);
    let same = |key: &str, got: Vec<f32>| compare(name, key, &file[key].values, &got, NUMBERS, true);

    // The class token's rows, without the class token.
    let rows = |key: &str| -> Vec<Vec<f32>> {
        let tokens = file[key].shape[2];
        file[key].values.chunks(tokens * tokens).map(|map| map[1..tokens].to_vec()).collect()
    };
    let number = |key: &str| config[key].as_f64().unwrap();
    let sets = boost_sets(&rows("vision.first"), &rows("vision.penultimate"), number("top_ratio"));
    let flags = |set: &[bool]| set.iter().map(|&chosen| f32::from(u8::from(chosen))).collect::<Vec<_>>();
    assert_eq!(flags(&sets.top), file["top"].values, "{name}: top");
    assert_eq!(flags(&sets.bottom), file["bottom"].values, "{name}: bottom");
    same("bottom_threshold", vec![sets.threshold as f32]);
    let all = boost_sets(&rows("vision.first"), &[vec![0.0; sets.top.len()]], number("top_ratio"));
    let overlap = all.top.iter().zip(&sets.bottom).filter(|(top, bottom)| **top && **bottom).count();
    assert_eq!(overlap, size(config, "overlap"), "{name}: overlap");

    let (heads, width, seq) = (size(config, "n_heads"), size(config, "head_dim"), size(config, "seq"));
    let described = SoftmaxConfig {
        n_heads: heads,
        n_kv_heads: Some(size(config, "n_kv_heads")),
        head_dim: Some(width),
        ..SoftmaxConfig::default()
    };
    let dims = Dims { d_model: size(config, "d_model"), n_layers: 1, layer: 0, rope: true, norm_eps: 1e-6, grid: None };
    let layer = load(described.init(&dims, &device), renamed(file, "w.", PROJECTIONS)).unwrap();
    let rope = Rope::new(0..seq, width, number("rope_theta"), RopeLayout::RotateHalf, &device);
    let mask = Mask::causal();
    let run = |edits: Vec<Edit>| {
        let sites = LayerSites::new(0, edits, vec![QuerySite::Scores.into(), QuerySite::Weights.into()]);
        let call =
            Call { rope: Some(&rope), sites: Sites { own: Some(&sites), ..Sites::default() }, ..Call::new(&mask) };
        let out = layer.forward(tensor::<3>(file, "x", &device), call).hidden;
        let mut read = sites.into_read().into_iter().map(|(_, values)| values);
        (out, read.next().unwrap(), read.next().unwrap())
    };
    let last = |map: Tensor<4>| values(map.narrow(2, seq - 1, 1));
    let span = config["span"][0].as_u64().unwrap() as usize..config["span"][1].as_u64().unwrap() as usize;
    assert_eq!(span.len(), sets.top.len(), "{name}: span");
    let in_span =
        |set: &[bool]| -> Vec<bool> { (0..seq).map(|key| span.contains(&key) && set[key - span.start]).collect() };
    let chosen = [(in_span(&sets.top), number("alpha")), (in_span(&sets.bottom), number("beta"))];
    // An edit for each set, as in a file.
    let edits = |change: fn(f64) -> Change| -> Vec<Edit> {
        let edit = |(set, gain): &(Vec<bool>, f64)| Edit {
            positions: Positions::only(seq - 1),
            keys: Positions::Rows { rows: vec![set.clone()].into(), beyond: false },
            ..Edit::new(At::all(QuerySite::Scores.into()), change(*gain))
        };
        chosen.iter().map(edit).collect()
    };
    let (_, plain, _) = run(Vec::new());
    same("scores.last", last(plain.clone()));
    let (out, scores, weights) = run(edits(boost));
    same("scores.boosted", last(scores.clone()));
    same("A", values(weights.clone()));
    same("out", values(out));
    same("A.log_factor", last(run(edits(|gain| Change::add(Amount::Number(gain.ln_1p())))).2));
    let shift = Edit {
        positions: Positions::only(seq - 1),
        ..Edit::new(At::all(QuerySite::Scores.into()), Change::add(Amount::Number(3.0)))
    };
    same("A.shifted_by_3", last(run([vec![shift], edits(boost)].concat()).2));
    // The pitfall: a factor moves negative scores down.
    let mut row = vec![1.0; seq];
    for (set, gain) in &chosen {
        row.iter_mut().zip(set).filter(|(_, chosen)| **chosen).for_each(|(factor, _)| *factor += *gain as f32);
    }
    let factor = Tensor::<1>::from_floats(row.as_slice(), &device).reshape([1, 1, 1, seq]);
    let multiplied = Edit {
        positions: Positions::only(seq - 1),
        ..Edit::new(
            At::all(QuerySite::Scores.into()),
            Change::Affine { gate: Amount::Each(factor), value: Amount::Number(0.0) },
        )
    };
    let (_, pitfall, of_pitfall) = run(vec![multiplied]);
    same("scores.multiplied", last(pitfall.clone()));
    same("A.multiplied", last(of_pitfall));
    assert_ne!(last(pitfall), last(scores), "{name}: some scores of the span are negative");
}
