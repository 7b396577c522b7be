//! The context-dependency score and attention steering by their authors' code; see `tests/golden/context_indicator/README.md`.

use std::ops::Range;

use burn::tensor::Device;
use polyhead_attention::QuerySite;
use polyhead_evaluation::context_score::{Headers, context_scores, marked_message};
use polyhead_models::intervention::steering::{Exclusion, exclusion_bias, steering};
use polyhead_models::sites::SitePlan;

use crate::golden::{Golden, compare, files, size, values};
use crate::golden_decoder::{decoder, ids, run};

/// Relative to the largest number.
const NUMBERS: f32 = 1e-5;

#[test]
fn golden_context_indicator() {
    for golden in &files("context_indicator") {
        match golden.config["kind"].as_str().unwrap() {
            "score" => check_score(golden),
            "text" => check_text(golden),
            "pasta" => check_steering(golden),
            other => panic!("{}: kind {other}", golden.name),
        }
    }
}

fn check_score(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.beside_the_point(&["n_heads", "system_text_len", "pad", "truncated_at"]);
    let header = |key: &str| -> Vec<u32> { serde_json::from_value(config["template"][key].clone()).unwrap() };
    let headers = Headers {
        system: header("system"),
        user: header("user"),
        assistant: header("assistant"),
        special: serde_json::from_value(config["special_ids"].clone()).unwrap(),
    };
    let tokens: Vec<u32> = file["ids"].values.iter().map(|&id| id as u32).collect();
    let is_text: Vec<bool> = file["attention_mask"].values.iter().map(|&value| value == 1.0).collect();
    let seq = size(config, "seq");
    let turns = headers.turns(&tokens, &is_text);
    assert_eq!(turns.responses.len(), size(config, "n_turns"), "{name}: n_turns");
    let exact = |key: &str, got: &[bool]| {
        let got: Vec<f32> = got.iter().map(|&flag| f32::from(u8::from(flag))).collect();
        assert_eq!(got, file[key].values, "{name}: {key}");
    };
    exact("mask.template", &turns.template);
    exact("mask.user", &turns.user);
    exact("mask.response", &turns.responses.concat());
    let maps: Vec<Vec<f32>> = file["A"].values.chunks(seq * seq).map(<[f32]>::to_vec).collect();
    let sums = maps.iter().flat_map(|map| map.chunks(seq)).map(|row| row.iter().sum::<f32>());
    assert!(sums.into_iter().all(|sum| (sum - 1.0).abs() < NUMBERS), "{name}: the rows of A are probabilities");
    let scores = context_scores(&maps, &turns);
    let same = |key: &str, got: Vec<f64>| {
        let got: Vec<f32> = got.into_iter().map(|value| value as f32).collect();
        compare(name, key, &file[key].values, &got, NUMBERS, true);
    };
    same("token_score", scores.tokens.clone());
    let of_turns: Vec<f64> = scores.turns.iter().map(|score| score.unwrap()).collect();
    same("turn_score", of_turns.clone());
    same("mean_score", vec![of_turns.iter().sum::<f64>() / of_turns.len() as f64]);
    let beta = config["beta"].as_f64().unwrap();
    exact("indicator", &of_turns.iter().map(|&score| score > beta).collect::<Vec<_>>());
}

fn check_text(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let (beta, token) = (config["beta"].as_f64().unwrap(), config["token"].as_str().unwrap());
    let rows = config["rows"].as_array().unwrap();
    let scores: Vec<f32> = rows.iter().map(|row| row["score"].as_f64().unwrap() as f32).collect();
    assert_eq!(scores, file["score"].values, "{name}: score");
    for row in rows {
        let (message, score) = (row["message"].as_str().unwrap(), row["score"].as_f64().unwrap());
        assert_eq!(marked_message(message, score, beta, token), row["result"].as_str().unwrap(), "{name}: {message}");
    }
}

fn check_steering(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.is("mode", "exclude");
    config.beside_the_point(&["batch", "seq"]);
    let device = Device::flex();
    let model = decoder(&config.table("model"), file, "w.", &device);
    let (tokens, prompt) = (ids(file, "ids", &device), size(config, "input_len"));
    let alpha = config["alpha"].as_f64().unwrap();
    let (batch, count) = (tokens.dims()[0], size(config, "n_spans"));
    let at = |span: usize, row: usize, end: usize| file["spans"].values[(span * batch + row) * 2 + end] as usize;
    let of_row =
        |row: usize| -> Vec<Range<usize>> { (0..count).map(|span| at(span, row, 0)..at(span, row, 1)).collect() };
    let spans: Vec<Vec<Range<usize>>> = (0..batch).map(of_row).collect();
    let same = |key: &str, got: Vec<f32>| compare(name, key, &file[key].values, &got, NUMBERS, true);
    same("logits.base", values(run(&model, &tokens, SitePlan::default()).0));
    let layers = model.layers.len();
    for (form, exclusion) in
        [("union", Exclusion::Union), ("once", Exclusion::Once), ("accumulated", Exclusion::Accumulated)]
    {
        let bias = exclusion_bias(&spans, prompt, alpha, exclusion).concat();
        let bias = match exclusion {
            Exclusion::Accumulated => {
                (1..=layers).flat_map(|times| bias.iter().map(move |bias| bias * times as f32)).collect()
            }
            _ => bias,
        };
        same(&format!("bias.{form}"), bias);
        let edits = steering(&spans, (layers, prompt), alpha, exclusion, &device);
        let taps = SitePlan::tap_all(layers, QuerySite::Weights).taps;
        same(
            &format!("logits.{form}"),
            values(run(&model, &tokens, SitePlan { edits: edits.clone(), taps: Vec::new() }).0),
        );
        if exclusion == Exclusion::Union {
            let (_, read) = run(&model, &tokens, SitePlan { edits, taps });
            same("A.union", read.into_iter().flat_map(|tap| values(tap.values)).collect());
        }
    }
}
