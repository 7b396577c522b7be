//! The loss of masked diffusion by LLaDA's formulas; see `tests/golden/masked_diffusion/README.md`.

use burn::tensor::Device;
use polyhead_models::{Batch, IGNORE, MaskedBatch};

use crate::golden::{GRADIENT, Golden, compare, compare_gradients, files, size, values};
use crate::golden_decoder::{decoder, of_decoder, rows};

/// Relative to the loss.
const LOSS: f32 = 2e-6;

#[test]
fn golden_masked_diffusion() {
    files("masked_diffusion").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    let model = decoder(&config.table("model"), file, "w.", &device);
    assert_eq!(model.mask_id() as usize, size(config, "mask_id"), "{name}");
    let (tokens, prompt) = (rows(file, "ids"), &file["prompt"].values);
    let (batch, seq) = (tokens.len(), tokens[0].len());
    let last = config["last_is_target"] == true;
    let target = |row: usize, at: usize| match tokens[row].get(at + 1) {
        Some(&next) if at + 1 >= prompt[row] as usize => i64::from(next),
        None if last => 0,
        _ => IGNORE,
    };
    let targets = (0..batch * seq).map(|at| target(at / seq, at % seq)).collect();
    let batch = Batch { batch, seq, tokens: tokens.concat(), targets, ..Batch::default() };
    let rates = file["p_mask"].values.iter().map(|&rate| f64::from(rate)).collect();
    let masked = MaskedBatch::new(&batch, model.mask_id(), rates, |at, _| file["masked"].values[at] == 1.0);

    // Their mean is over all tokens of a row, ours over those that can be masked.
    let factor = match config["kind"].as_str().unwrap() {
        "pretraining" => (seq - 1) as f64 / seq as f64,
        "finetuning" => 1.0,
        other => panic!("{name}: kind {other}"),
    };
    let loss = model.loss_of_masked(&masked).cross_entropy * (factor / batch.target_tokens() as f64);
    compare(name, "loss", &file["loss"].values, &values(loss.clone()), LOSS, true);
    let want = of_decoder(model.config().n_layers, file, "grad.");
    compare_gradients(name, &model, &loss.backward(), &want, GRADIENT);
}
