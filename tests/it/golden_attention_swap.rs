//! Attention swap by an own reference; see `tests/golden/attention_swap/README.md`.

use burn::tensor::{Device, Int, Tensor};
use polyhead_attention::QuerySite;
use polyhead_evaluation::next_token::predictions;
use polyhead_models::Decoder;
use polyhead_models::intervention::attention_swap;
use polyhead_models::sites::SitePlan;

use crate::golden::{Golden, compare, files, values};
use crate::golden_decoder::{decoder, ids, run};

/// Relative to the largest number.
const NUMBERS: f32 = 1e-5;

#[test]
fn golden_attention_swap() {
    files("attention_swap").iter().for_each(check_file);
}

fn tapped(model: &Decoder, tokens: &Tensor<2, Int>) -> (Tensor<3>, Vec<Tensor<4>>) {
    let (logits, taps) = run(model, tokens, SitePlan::tap_all(model.layers.len(), QuerySite::Weights));
    (logits, taps.into_iter().map(|tap| tap.values).collect())
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.beside_the_point(&["batch", "seq", "rule", "kl", "loss", "shuffled"]);
    let device = Device::flex();
    let [donor, receiver] = ["donor.", "receiver."].map(|of| decoder(&config.table("model"), file, of, &device));
    let tokens = ids(file, "ids", &device);
    let same = |key: &str, got: Vec<f32>| compare(name, key, &file[key].values, &got, NUMBERS, true);
    let ((donor_logits, donor_maps), (clean, own_maps)) = (tapped(&donor, &tokens), tapped(&receiver, &tokens));
    let stacked = |maps: &[Tensor<4>]| maps.iter().flat_map(|map| values(map.clone())).collect::<Vec<_>>();
    same("donor.logits", values(donor_logits));
    same("donor.A", stacked(&donor_maps));
    same("receiver.logits", values(clean.clone()));
    same("receiver.A", stacked(&own_maps));

    let sets: Vec<Vec<usize>> = serde_json::from_value(config["layer_sets"].clone()).unwrap();
    let shares: Vec<f64> = serde_json::from_value(config["u"].clone()).unwrap();
    let swapped = |maps: &dyn Fn(usize) -> Tensor<4>, set: &[usize], u: f64| {
        let maps: Vec<_> = set.iter().map(|&layer| (layer, maps(layer))).collect();
        run(&receiver, &tokens, SitePlan { edits: attention_swap(&maps, u), taps: Vec::new() }).0
    };
    let (mut logits, mut loss, mut accuracy, mut kl) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for set in &sets {
        for &u in &shares {
            let changed = swapped(&|layer| donor_maps[layer].clone(), set, u);
            let told = predictions(&clean, &changed, &tokens);
            loss.push(told.loss as f32);
            accuracy.push(told.accuracy as f32);
            kl.push(told.kl as f32);
            logits.extend(values(changed));
        }
    }
    same("logits", logits);
    same("loss", loss);
    same("accuracy", accuracy);
    // A distance near 0 is a difference of numbers near 1.
    compare(name, "kl", &file["kl"].values, &kl, NUMBERS, true);
    let last = sets.last().unwrap();
    let rolled = |map: &Tensor<4>, axis: usize| {
        let size = map.dims()[axis];
        Tensor::cat(vec![map.clone().narrow(axis, size - 1, 1), map.clone().narrow(axis, 0, size - 1)], axis)
    };
    same("shuffled.logits", values(swapped(&|layer| rolled(&donor_maps[layer], 0), last, 1.0)));
    same("heads_rolled.logits", values(swapped(&|layer| rolled(&donor_maps[layer], 1), last, 1.0)));
    // Nothing is swapped, and a model is swapped with itself: to the bit.
    let (plain, _) = run(&receiver, &tokens, SitePlan::default());
    swapped(&|layer| donor_maps[layer].clone(), last, 0.0).into_data().assert_eq(&plain.into_data(), true);
    let all: Vec<usize> = (0..own_maps.len()).collect();
    swapped(&|layer| own_maps[layer].clone(), &all, 1.0).into_data().assert_eq(&clean.into_data(), true);
}
