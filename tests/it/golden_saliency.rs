//! Saliency, LocoRE and SGRS; see `tests/golden/saliency/README.md`.

use burn::tensor::{Device, Tensor};
use polyhead_attention::{Amount, At, Change, Edit, KvSite, Positions, QuerySite, Site};
use polyhead_evaluation::saliency::{Saliency, saliency};
use polyhead_evaluation::sgrs::SgrsConfig;
use polyhead_models::intervention::locore::RecentConfig;
use polyhead_models::sites::SitePlan;

use crate::golden::{Golden, compare, files, size, values};
use crate::golden_decoder::{decoder, run};

/// Of maps and logits, relative to the largest.
const NUMBERS: f32 = 1e-5;
/// Of gradients and what is made of them.
const GRADIENTS: f32 = 1e-4;

#[test]
fn golden_saliency() {
    for golden in &files("saliency") {
        match golden.config["kind"].as_str().unwrap() {
            "map" => check_map(golden),
            "sgrs" => check_sgrs(golden),
            other => panic!("{}: kind {other}", golden.name),
        }
    }
}

fn check_map(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    let model = decoder(&config.table("model"), file, "w.", &device);
    let same = |key: &str, got: Vec<f32>, tolerance: f32| compare(name, key, &file[key].values, &got, tolerance, true);
    let tokens: Vec<u32> = file["ids"].values.iter().map(|&id| id as u32).collect();
    let (seq, layers) = (size(config, "seq"), model.layers.len());
    let position = size(config, "candidate_position");
    assert_eq!([tokens.len(), position], [seq; 2], "{name}: the candidate is behind the prompt");
    let input = |tokens: &[u32]| polyhead_evaluation::lens::ids(&model, &[tokens.to_vec()]);
    let (clean, _) = run(&model, &input(&tokens), SitePlan::default());
    same("logits", values(clean.narrow(1, seq - 1, 1)), NUMBERS);

    let history: Vec<usize> = serde_json::from_value(config["history"].clone()).unwrap();
    let targets: Vec<usize> = serde_json::from_value(config["target_layers"].clone()).unwrap();
    let (query, least) = (size(config, "query_row"), config["row_norm_min"].as_f64().unwrap());
    let (mut losses, mut scores, mut released) = (Vec::new(), Vec::new(), Vec::new());
    for (at, &candidate) in file["candidates"].values.iter().enumerate() {
        let text = [&tokens[..], &[candidate as u32]].concat();
        let found = saliency(&model, &text, position);
        losses.push(found.loss as f32);
        scores.push(found.of_history(&targets, history[0]..history[1], query, least) as f32);
        // The authors' row, which has no gradient.
        released.push(found.of_history(&targets, history[0]..history[1], position, least) as f32);
        if at > 0 {
            continue;
        }
        let each = |of: &dyn Fn(&Tensor<3>) -> Vec<f32>| found.maps.iter().flat_map(|(_, map)| of(map)).collect();
        same("S", each(&|map| values(map.clone())), GRADIENTS);
        same("S.head_mean", each(&|map| values(map.clone().mean_dim(0))), GRADIENTS);
        same("S.row_normalised", each(&|map| values(Saliency::rows(map, least))), GRADIENTS);
        same("head_importance", each(&|map| values(map.clone().sum_dim(1).sum_dim(2))), GRADIENTS);
        let (maps, gradients) = gradients_of_maps(&model, &text, position);
        same("A", maps, NUMBERS);
        same("dA", gradients, GRADIENTS);
    }
    same("loss", losses, NUMBERS);
    same("candidate_saliency", scores, GRADIENTS);
    assert!(released.iter().all(|&score| score == 0.0), "{name}: {released:?}");
    assert_eq!(released, file["candidate_saliency.released"].values, "{name}");

    let how = config.table("locore");
    let (beta, query) = (how["beta"].as_f64().unwrap(), size(&how, "query"));
    let output = (size(&how, "output_start"), size(&how, "window"));
    // The window is behind the newest token, which for the first form has no key yet.
    for (form, newest, count) in [("next", query + 1, output.1), ("query", query, output.1 + 1)] {
        let edit = Edit {
            positions: Positions::only(query),
            keys: Positions::Range(output.0..usize::MAX),
            ..Edit::new(At::all(QuerySite::Scores.into()), RecentConfig { newest: count, beta }.change())
        };
        let edits = (0..layers).map(|layer| (layer, edit.clone())).collect();
        let key = |last: &str| format!("locore.{form}.{last}");
        let factor: Vec<f32> = (0..seq)
            .map(
                |key| {
                    if key >= output.0 && key <= newest && newest - key <= output.1 { 1.0 + beta as f32 } else { 1.0 }
                },
            )
            .collect();
        same(&key("factor"), factor.clone(), NUMBERS);
        let plan = SitePlan { edits, ..SitePlan::tap_all(layers, QuerySite::Weights) };
        let (logits, taps) = run(&model, &input(&tokens), plan);
        same(&key("logits"), values(logits.narrow(1, seq - 1, 1)), NUMBERS);
        let rows = taps.into_iter().flat_map(|tap| values(tap.values.narrow(2, query, 1)));
        same(&key("A_last"), rows.collect(), NUMBERS);
        // Without rows that are normalised again.
        let factor = Tensor::<1>::from_floats(factor.as_slice(), &device).reshape([1, 1, 1, seq]);
        let change = Change::Affine { gate: Amount::Each(factor), value: Amount::Number(0.0) };
        let edit = Edit { positions: Positions::only(query), ..Edit::new(At::all(QuerySite::Weights.into()), change) };
        let edits = (0..layers).map(|layer| (layer, edit.clone())).collect();
        let (logits, _) = run(&model, &input(&tokens), SitePlan { edits, taps: Vec::new() });
        same(&key("logits_unnormalised"), values(logits.narrow(1, seq - 1, 1)), NUMBERS);
    }
}

/// Maps, and the gradient of -log p(token at `position`) at each weight, also of hidden ones: that of what heads attend to, times
/// the values.
fn gradients_of_maps(model: &polyhead_models::Decoder, text: &[u32], position: usize) -> (Vec<f32>, Vec<f32>) {
    let layers = model.layers.len();
    let sites: [Site; 3] = [QuerySite::Weights.into(), QuerySite::Attended.into(), KvSite::V.into()];
    let input = polyhead_evaluation::lens::ids(model, &[text.to_vec()]);
    let taps = (0..layers).flat_map(|layer| sites.map(|site| (layer, site))).collect();
    let (_, read) = run(model, &input, SitePlan { edits: Vec::new(), taps });
    let of = |site: Site| read.iter().filter(move |tap| tap.site == site).map(|tap| tap.values.clone().inner());
    let leaves: Vec<Tensor<4>> =
        of(sites[1]).map(|attended| Tensor::from_inner(attended.zeros_like()).require_grad()).collect();
    let added = |(layer, leaf): (usize, &Tensor<4>)| {
        (layer, Edit::new(At::all(sites[1]), Change::add(Amount::Each(leaf.clone()))))
    };
    let edits = leaves.iter().enumerate().map(added).collect();
    let (logits, _) = run(model, &input, SitePlan { edits, taps: Vec::new() });
    let row = logits.narrow(1, position - 1, 1).squeeze_dim::<2>(1);
    let loss = burn::tensor::activation::log_softmax(row, 1).narrow(1, text[position] as usize, 1).neg();
    let grads = loss.backward();
    let gradients = leaves.iter().zip(of(sites[2])).flat_map(|(leaf, v)| {
        let grad = leaf.grad(&grads).unwrap();
        let ([_, heads, _, _], [_, kv_heads, seq, width]) = (grad.dims(), v.dims());
        let v = v.reshape([1, kv_heads, 1, seq * width]).expand([1, kv_heads, heads / kv_heads, seq * width]);
        values(grad.matmul(v.reshape([1, heads, seq, width]).swap_dims(2, 3)))
    });
    (of(sites[0]).flat_map(values).collect(), gradients.collect())
}

fn check_sgrs(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.beside_the_point(&["vocab", "sampling", "saliency"]);
    let how = SgrsConfig {
        top_k: size(config, "top_k"),
        max_resample: size(config, "max_resample"),
        window: size(config, "window"),
        alpha: config["alpha"].as_f64().unwrap(),
    };
    let wide = |key: &str, row: usize| -> Vec<f64> {
        let width = file[key].shape[1];
        file.wide(key)[row * width..(row + 1) * width].to_vec()
    };
    let mut accepted: Vec<f64> = Vec::new();
    let (mut chosen, mut tries, mut passed, mut tau) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for step in 0..size(config, "steps") {
        let logits: Vec<f32> = wide("logits", step).into_iter().map(|logit| logit as f32).collect();
        let found = how.choose(&logits, &wide("saliency", step), &accepted, &wide("uniform", step));
        accepted.push(found.saliency);
        chosen.push(found.token as f32);
        tries.push(found.tries as f32);
        passed.push(f32::from(u8::from(found.passed)));
        tau.push(found.tau as f32);
    }
    assert_eq!(chosen, file["chosen"].values, "{name}: chosen");
    assert_eq!(tries, file["tries"].values, "{name}: tries");
    assert_eq!(passed, file["accepted"].values, "{name}: accepted");
    let accepted: Vec<f32> = accepted.into_iter().map(|value| value as f32).collect();
    assert_eq!(accepted, file["accepted_saliency"].values, "{name}: accepted_saliency");
    compare(name, "tau", &file["tau"].values, &tau, NUMBERS, true);
}
