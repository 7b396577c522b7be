//! Shifted attention and the importance of tokens; see `tests/golden/attention_shifting/README.md`.

use burn::tensor::{Bool, Device, Tensor, TensorData};
use polyhead_training::attention_shifting::{
    Direction, Masking, divergence, entropies, factors, masked_entropies, mean, most_important, shifted, weights,
};

use crate::golden::{GRADIENT, Golden, OUTPUT, compare, files, size, values};
use crate::golden_decoder::{llama, rows};

#[test]
fn golden_attention_shifting() {
    for golden in &files("attention_shifting") {
        match golden.config["kind"].as_str().unwrap() {
            "shift" => check_shift(golden),
            "importance" => check_importance(golden),
            other => panic!("{}: kind {other}", golden.name),
        }
    }
}

/// A file's maps: `[batch, layers, heads, tokens, tokens]`.
struct Maps {
    sizes: [usize; 4],
    hidden: Tensor<4, Bool>,
}

impl Maps {
    /// The maps of each layer, `[batch, heads, tokens, tokens]`.
    fn layers(&self, all: &Tensor<5>) -> Vec<Tensor<4>> {
        (0..self.sizes[1]).map(|layer| all.clone().narrow(1, layer, 1).squeeze_dim::<4>(1)).collect()
    }

    /// The same of scores that are hidden where keys are.
    fn scores(&self, all: &Tensor<5>) -> Vec<Tensor<4>> {
        let [batch, _, heads, tokens] = self.sizes;
        let hidden = self.hidden.clone().expand([batch, heads, tokens, tokens]);
        let hide = |scores: Tensor<4>| scores.mask_fill(hidden.clone(), f64::NEG_INFINITY);
        self.layers(all).into_iter().map(hide).collect()
    }

    /// The numbers of layers, `[batch, ...]` each, in the order of a file.
    fn joined<const D: usize>(layers: Vec<Tensor<D>>) -> Vec<f32> {
        let batch = layers[0].dims()[0];
        let row = |at: usize| {
            let of = move |layer: &Tensor<D>| values(layer.clone().narrow(0, at, 1));
            layers.iter().flat_map(of).collect::<Vec<f32>>()
        };
        (0..batch).flat_map(row).collect()
    }
}

fn check_shift(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.is("reduction", "mean over valid query rows, heads, layers, samples");
    config.is("log_base", "e");
    config.beside_the_point(&["lengths", "important_fraction"]);
    let device = Device::flex().autodiff();
    let sizes = ["batch", "layers", "num_heads", "tokens"].map(|key| size(config, key));
    let [batch, _, _, tokens] = sizes;
    let flags = |key: &str| -> Vec<bool> { file[key].values.iter().map(|&value| value == 1.0).collect() };
    let rows = |key: &str| -> Vec<Vec<bool>> { flags(key).chunks(tokens).map(<[bool]>::to_vec).collect() };
    let hidden: Vec<bool> = flags("visible").iter().map(|visible| !visible).collect();
    let hidden = Tensor::from_data(TensorData::new(hidden, [batch, 1, tokens, tokens]), &device);
    let maps = Maps { sizes, hidden };
    let read = |key: &str| crate::golden::tensor::<5>(file, key, &device);
    let (valid, important) = (rows("valid"), rows("important"));
    let same = |key: &str, got: &[f32]| compare(name, key, &file[key].values, got, OUTPUT, false);
    let reference: Vec<Tensor<4>> = maps.scores(&read("scores_reference")).into_iter().map(weights).collect();
    let number = |key: &str| config[key].as_f64().unwrap();
    let mut losses = [[0.0; 2]; 2];
    for (side, (kind, factor)) in
        [("forget", 1.0 - number("lam")), ("retain", 1.0 + number("rho"))].into_iter().enumerate()
    {
        let factors = factors(&important, &vec![factor; batch], &device);
        let targets: Vec<Tensor<4>> = reference.iter().map(|map| shifted(map.clone(), factors.clone())).collect();
        same(&format!("{kind}.target"), &Maps::joined(targets.clone()));
        let directions =
            [(Direction::TargetCurrent, "kl_target_current"), (Direction::CurrentTarget, "kl_current_target")];
        for (which, (direction, key)) in directions.into_iter().enumerate() {
            let scores = read(&format!("{kind}.scores_current")).require_grad();
            let of = |(scores, target): (Tensor<4>, &Tensor<4>)| divergence(scores, target.clone(), direction);
            let apart: Vec<Tensor<3>> = maps.scores(&scores).into_iter().zip(&targets).map(of).collect();
            same(&format!("{kind}.rows.{key}"), &Maps::joined(apart.clone()));
            let loss = mean(&apart, &valid).unwrap();
            losses[which][side] = values(loss.clone())[0];
            same(&format!("{kind}.{key}"), &[losses[which][side]]);
            let grad = format!("{kind}.grad.{key}");
            let got = values(scores.grad(&loss.backward()).unwrap());
            compare(name, &grad, &file[grad.as_str()].values, &got, GRADIENT, true);
        }
    }
    let alpha = number("alpha") as f32;
    for ([forget, retain], key) in losses.into_iter().zip(["loss.target_current", "loss.current_target"]) {
        same(key, &[alpha * forget + (1.0 - alpha) * retain]);
    }
}

fn check_importance(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.is("log_base", "e");
    config.is("ranking", "absolute change of the entropy averaged over all positions");
    let model = llama(golden, &Device::flex());
    let (prompts, mask_id) = (rows(file, "tokens"), size(config, "mask_id") as u32);
    assert_eq!((prompts.len(), prompts[0].len()), (size(config, "prompts"), size(config, "tokens")), "{name}");
    let fraction = config["important_fraction"].as_f64().unwrap();
    let same = |key: String, got: Vec<f64>| {
        let got: Vec<f32> = got.into_iter().map(|value| value as f32).collect();
        compare(name, &key, &file[key.as_str()].values, &got, OUTPUT, false);
    };
    let full: Vec<Vec<f64>> = prompts.iter().map(|prompt| entropies(&model, prompt)).collect();
    same("entropy.full".into(), full.concat());
    for (masking, key) in [(Masking::Attention, "attention"), (Masking::Token, "token")] {
        let masked: Vec<Vec<Vec<f64>>> =
            prompts.iter().map(|prompt| masked_entropies(&model, prompt, masking, mask_id)).collect();
        same(format!("entropy.{key}_masked"), masked.concat().concat());
        // How far taking each token away changes the entropy, at the last position and on average.
        let changes = |of: &dyn Fn(&[f64]) -> f64| -> Vec<f64> {
            let each = masked.iter().zip(&full);
            each.flat_map(|(masked, full)| masked.iter().map(|masked| of(masked) - of(full))).collect()
        };
        same(format!("delta.{key}.last"), changes(&|entropies| entropies[entropies.len() - 1]));
        same(format!("delta.{key}.mean"), changes(&|entropies| entropies.iter().sum::<f64>() / entropies.len() as f64));
        let important: Vec<Vec<bool>> =
            masked.iter().zip(&full).map(|(masked, full)| most_important(full, masked, fraction)).collect();
        for row in &important {
            assert_eq!(row.iter().filter(|flag| **flag).count(), size(config, "important_count"), "{name}: {key}");
        }
        let flags: Vec<f32> = important.concat().into_iter().map(|flag| f32::from(u8::from(flag))).collect();
        assert_eq!(flags, file[format!("important.{key}.mean").as_str()].values, "{name}: important by {key}");
    }
}
