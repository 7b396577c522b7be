//! GIFT by an own reference; see `tests/golden/gift/README.md`.

use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::Place;
use polyhead_models::intervention::RangeConfig;
use polyhead_models::intervention::gift::{CLAMP_SIGMAS, Deviation, GazeConfig, gaze};

use crate::golden::{Golden, compare, files, size, values};

/// Relative to the largest number.
const NUMBERS: f32 = 1e-5;

#[test]
fn golden_gift() {
    files("gift").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.beside_the_point(&["seq", "first_question_token", "question_gain", "heads_kept"]);
    config.is("clamp_sigmas", CLAMP_SIGMAS);
    let (layers, heads) = (size(config, "n_layers"), size(config, "n_heads"));
    let range = |key: &str| config[key][0].as_u64().unwrap() as usize..config[key][1].as_u64().unwrap() as usize;
    let (span, question) = (range("visual"), range("question"));
    let seq = file["A"].shape[3];
    let map = |at: usize| -> Vec<Vec<f32>> {
        file["A"].values[at * seq * seq..(at + 1) * seq * seq].chunks(seq).map(<[f32]>::to_vec).collect()
    };
    let maps: Vec<Vec<_>> =
        (0..layers).map(|layer| (0..heads).map(|head| map(layer * heads + head)).collect()).collect();
    let content: Vec<bool> = file["content"].values.iter().map(|&value| value == 1.0).collect();
    let alpha = config["alpha"].as_f64().unwrap();
    let same = |key: &str, got: Vec<f64>| {
        let got: Vec<f32> = got.into_iter().map(|value| value as f32).collect();
        compare(name, key, &file[key].values, &got, NUMBERS, true);
    };
    for (prefix, deviation) in [("population", Deviation::Population), ("sample", Deviation::Sample)] {
        let found = gaze(&maps, (span.clone(), question.clone()), &content, alpha, deviation);
        same("jump", found.jumps.concat().concat().concat());
        same("mean_jump", found.mean.clone());
        let kept: Vec<f32> = found.kept.concat().into_iter().map(|kept| f32::from(u8::from(kept))).collect();
        assert_eq!(kept, file["heads"].values, "{name}: heads");
        same(&format!("{prefix}.clamped"), found.clamped.clone());
        same(&format!("{prefix}.saliency"), found.saliency.clone());
        same(&format!("{prefix}.multiplier"), found.multiplier.clone());
        let how = GazeConfig {
            multiplier: found.multiplier.clone(),
            question: RangeConfig { from: question.start, to: question.end },
        };
        let weights = TensorData::new(file["decode.A"].values.clone(), [1, heads, 1, seq + 1]);
        let weights = Tensor::<4>::from_data(weights, &Device::flex());
        let (weights, gain) = how.shifted(weights, Place { first: seq, first_key: Some(0) }, span.start);
        compare(name, "decode.out", &file[&format!("{prefix}.decode.out")].values, &values(weights), NUMBERS, true);
        compare(name, "gain", &file[&format!("{prefix}.question_gain")].values, &values(gain), NUMBERS, true);
        // What every token of the question looks at alike has its weight, and no more.
        let constant = |key: usize| {
            let column = |map: &Vec<Vec<f32>>| question.clone().map(|query| map[query][key]).collect::<Vec<_>>();
            maps.iter().flatten().all(|map| column(map).windows(2).all(|pair| pair[0] == pair[1]))
        };
        for (at, key) in span.clone().enumerate().filter(|(_, key)| constant(*key)) {
            assert_eq!(found.multiplier[at], 1.0, "{name}: column {key} is looked at alike");
        }
    }
}
