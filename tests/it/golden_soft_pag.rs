//! Soft perturbed-attention guidance by an own reference; see `tests/golden/soft_pag/README.md`.

use burn::tensor::Device;
use polyhead_attention::{QueryHead, QuerySite};
use polyhead_models::intervention::soft_pag::{guided, soft_pag};
use polyhead_models::sites::SitePlan;

use crate::golden::{Golden, compare, files, values};
use crate::golden_decoder::{decoder, ids, run};

/// Relative to the largest number; the weight of guidance amplifies.
const NUMBERS: f32 = 1e-5;
const GUIDED: f32 = 1e-4;

#[test]
fn golden_soft_pag() {
    files("soft_pag").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.beside_the_point(&["batch", "seq", "chosen", "guidance"]);
    let device = Device::flex();
    let model = decoder(&config.table("model"), file, "w.", &device);
    let tokens = ids(file, "ids", &device);
    let heads = &file["heads"];
    let chosen: Vec<(usize, QueryHead)> = (heads.values.iter().enumerate())
        .filter(|(_, chosen)| **chosen == 1.0)
        .map(|(at, _)| (at / heads.shape[1], QueryHead(at % heads.shape[1])))
        .collect();
    let (clean, _) = run(&model, &tokens, SitePlan::default());
    compare(name, "logits", &file["logits"].values, &values(clean.clone()), NUMBERS, true);
    let [_, seq, _] = clean.dims();
    let last = |logits: burn::tensor::Tensor<3>| logits.narrow(1, seq - 1, 1).squeeze_dim::<2>(1);
    let numbers = |key: &str| -> Vec<f64> { serde_json::from_value(config[key].clone()).unwrap() };
    let plausibility = config["plausibility"].as_f64().unwrap();
    let (mut all, mut heads) = (Vec::new(), Vec::new());
    let mut perturbed = Vec::new();
    for &u in &numbers("u") {
        let taps = SitePlan::tap_all(model.layers.len(), QuerySite::Z).taps;
        let (logits, taps) = run(&model, &tokens, SitePlan { edits: soft_pag(&chosen, u), taps });
        all.extend(values(logits.clone()));
        heads.extend(taps.into_iter().flat_map(|tap| values(tap.values.swap_dims(1, 2))));
        perturbed.push(last(logits));
    }
    compare(name, "perturbed.logits", &file["perturbed.logits"].values, &all, NUMBERS, true);
    compare(name, "perturbed.z", &file["perturbed.z"].values, &heads, NUMBERS, true);
    let (mut scores, mut probabilities, mut plausible) = (Vec::new(), Vec::new(), Vec::new());
    for &weight in &numbers("w") {
        for other in &perturbed {
            let guided = guided(last(clean.clone()), other.clone(), weight, plausibility);
            scores.extend(values(guided.scores));
            probabilities.extend(values(guided.probabilities));
            plausible = values(guided.plausible);
        }
    }
    assert_eq!(plausible, file["plausible"].values, "{name}: plausible");
    compare(name, "guided.scores", &file["guided.scores"].values, &scores, GUIDED, true);
    compare(name, "guided.probs", &file["guided.probs"].values, &probabilities, GUIDED, true);
}
