//! Scores of groupings by scikit-learn and scipy; see `tests/golden/grouping/README.md`.

use polyhead_evaluation::grouping::Grouping;
use polyhead_kernels::comparison::{Tolerance, assert_close};

use crate::golden::{files, size};

#[test]
fn golden_grouping() {
    for golden in &files("grouping") {
        let (name, file) = (&golden.name, &golden.tensors);
        let (texts, walls) = (size(&golden.config, "texts"), size(&golden.config, "walls"));
        let numbers = |key: &str| -> Vec<usize> {
            assert_eq!(file[key].shape, [walls, texts], "{name}: {key}");
            file.wide(key).iter().map(|&number| number as usize).collect()
        };
        let (truth, found) = (numbers("truth"), numbers("found"));
        let scores: Vec<Grouping> =
            truth.chunks(texts).zip(found.chunks(texts)).map(|(truth, found)| Grouping::of(truth, found)).collect();
        for (key, of) in [
            ("after.ari", (|score| score.ari) as fn(&Grouping) -> f64),
            ("after.ami", |score| score.ami),
            ("after.fowlkes_mallows", |score| score.fowlkes_mallows),
            ("after.wasserstein", |score| score.wasserstein),
        ] {
            let got: Vec<f32> = scores.iter().map(|score| of(score) as f32).collect();
            assert_close(&format!("{name}: {key}"), &got, &file[key].values, Tolerance::absolute(1e-6));
        }
    }
}
