//! Soft injection of task embeddings by its authors' code; see `tests/golden/site/README.md`.

use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Tensor};
use polyhead_attention::{Cache, Mask, Positions};
use polyhead_models::intervention::soft_injection::{
    Asked, GateTraining, injected_loss, soft_injection, task_embedding, train_gates,
};
use polyhead_models::sites::SitePlan;
use polyhead_models::{Batch, Pass};

use crate::golden::{Golden, compare, files, size, tensor, values};
use crate::golden_decoder::{decoder, ids, rows, run};

/// Relative to the largest number.
const NUMBERS: f32 = 1e-5;
/// Of gradients, and of gates after the steps.
const LEARNED: f32 = 1e-4;

#[test]
fn golden_site() {
    files("site").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    let model = decoder(&config.table("model"), file, "w.", &device);
    let same = |key: &str, got: Vec<f32>, tolerance: f32| compare(name, key, &file[key].values, &got, tolerance, true);
    let demos: Vec<Batch> = rows(file, "demo.ids").into_iter().map(Batch::text).collect();
    assert_eq!(demos.len(), size(config, "n_demos"), "{name}: n_demos");
    let embedding = task_embedding(&model, &demos).detach();
    same("task_embedding", values(embedding.clone()), NUMBERS);

    let lengths: Vec<usize> = serde_json::from_value(config["prompt_lengths"].clone()).unwrap();
    let mask = &file["prompt.mask"];
    let real: Vec<usize> =
        mask.values.chunks(mask.shape[1]).map(|row| row.iter().filter(|&&real| real == 1.0).count()).collect();
    assert_eq!(real, lengths, "{name}: prompt.mask");
    let targets = &file["target"].values;
    let asked: Vec<Asked> = (rows(file, "prompt.ids").into_iter().zip(&lengths).zip(targets))
        .map(|((row, &length), &answer)| Asked { prompt: row[..length].to_vec(), answer: answer as u32 })
        .collect();

    // All prompts in one padded batch, each changed at its own last token.
    let prompts = ids(file, "prompt.ids", &device);
    let seq = prompts.dims()[1];
    let marks = lengths.iter().map(|&length| (0..seq).map(|at| at + 1 == length).collect::<Vec<bool>>());
    let positions = Positions::Rows { rows: marks.collect(), beyond: false };
    let theta = tensor::<2>(file, "theta", &device).require_grad();
    let edits = soft_injection(&sigmoid(theta.clone()), &embedding, &positions);
    let last = |logits: Tensor<3>| -> Vec<f32> {
        let row = |(row, &length): (usize, &usize)| values(logits.clone().narrow(0, row, 1).narrow(1, length - 1, 1));
        lengths.iter().enumerate().flat_map(row).collect()
    };
    same("logits.base", last(run(&model, &prompts, SitePlan::default()).0), NUMBERS);
    same("logits", last(run(&model, &prompts, SitePlan { edits, taps: Vec::new() }).0), NUMBERS);
    let loss = injected_loss(&model, &asked, &theta, &embedding).mean();
    same("loss", values(loss.clone()), NUMBERS);
    same("grad.theta", values(theta.grad(&loss.backward()).unwrap()), LEARNED);

    // Changed in the prefill, decoded behind it with a cache; and the full pass that is changed there alone.
    let continued = ids(file, "continue.ids", &device);
    let (length, all) = (size(config, "continue_prompt_length"), continued.dims()[1]);
    let alpha = sigmoid(theta.detach());
    let plan =
        || SitePlan { edits: soft_injection(&alpha, &embedding, &Positions::only(length - 1)), taps: Vec::new() };
    let (mut cache, mask) = (Cache::new(model.layers.len()), Mask::causal());
    let starts = std::iter::once(0..length).chain((length..all).map(|at| at..at + 1));
    let parts = starts.map(|range| {
        let pass = Pass { cache: Some(&mut cache), sites: plan(), ..Pass::new(&mask) };
        model.logits(model.pass(continued.clone().narrow(1, range.start, range.len()), pass).hidden)
    });
    same("continue.logits", values(Tensor::cat(parts.collect(), 1)), NUMBERS);
    same("continue.logits", values(run(&model, &continued, plan()).0), NUMBERS);

    let train = config.table("train");
    train.is("optimizer", "adam");
    train.is("theta0", 0.0);
    train.is("batch", 1);
    let number = |key: &str| train[key].as_f64().unwrap();
    let how = GateTraining { lr: number("lr"), beta1: number("beta1"), beta2: number("beta2"), eps: number("eps") };
    let order: Vec<usize> = serde_json::from_value(train["order"].clone()).unwrap();
    let (mut losses, mut gradients, mut thetas) = (Vec::new(), Vec::new(), Vec::new());
    train_gates(&model, &embedding, order.iter().map(|&at| &asked[at]), how, |step| {
        losses.push(step.loss as f32);
        gradients.extend(values(step.gradient));
        thetas.extend(values(step.theta));
    });
    same("train.loss", losses, NUMBERS);
    same("train.grad", gradients, LEARNED);
    same("train.theta", thetas, LEARNED);
}
