//! Pooling heads: trainable pooling and its loss by its authors' code, generalised means by a reference of the formula.

use burn::module::Param;
use burn::tensor::{Bool, Device, Tensor};
use polyhead_models::weights;
use polyhead_models::{GeneralizedMean, Pooling, PoolingConfig, TrainablePooling, contrastive_loss};
use serde_json::{Value, json};

use crate::golden::{Golden, Layout, Names, compare, compare_gradients, files, renamed, size, tensor, values};

/// Relative to the largest number.
const OUTPUT: f32 = 2e-5;
/// Relative to the largest number.
const GRADIENT: f32 = 5e-5;

/// Front ends of trainable pooling, as poolings of their own.
const MEAN: &str = "mean";
const LAST: &str = "last_token";

/// What the authors call the parts of trainable pooling, and how they lie.
const NAMES: Names<'static> = &[
    ("latents", "latents", Layout::Same),
    ("layer_weight", "layer_table", Layout::Same),
    ("attn.norm_hiddens.weight", "hidden_norm.gamma", Layout::Same),
    ("attn.norm_hiddens.bias", "hidden_norm.beta", Layout::Same),
    ("attn.norm_latents.weight", "latent_norm.gamma", Layout::Same),
    ("attn.norm_latents.bias", "latent_norm.beta", Layout::Same),
    ("attn.to_q.weight", "q_proj.weight", Layout::Linear),
    ("attn.to_kv.weight", "kv_proj.weight", Layout::Linear),
    ("attn.to_out.weight", "o_proj.weight", Layout::Linear),
    ("ff.norm.weight", "mlp_norm.gamma", Layout::Same),
    ("ff.norm.bias", "mlp_norm.beta", Layout::Same),
    ("ff.fc1.weight", "up_proj.weight", Layout::Linear),
    ("ff.fc1.bias", "up_proj.bias", Layout::Same),
    ("ff.fc2.weight", "down_proj.weight", Layout::Linear),
    ("ff.fc2.bias", "down_proj.bias", Layout::Same),
];

#[test]
fn golden_pooling() {
    for golden in files("pooling") {
        match golden.config["kind"].as_str().unwrap() {
            "ggem" => check_generalized_mean(&golden),
            "hard_negative_nll" => check_loss(&golden),
            "mltp_pool_only" => {
                assert_eq!(
                    golden.tensors["hiddens"].shape[1],
                    size(&golden.config, "num_layers_in"),
                    "{}",
                    golden.name
                );
                check_states(&golden, "mean_of_each_layer", |pooling, states| pooling.pool(states, None));
            }
            "last_layer_trainable_pool" => {
                assert_eq!(golden.tensors["hiddens"].shape[1], size(&golden.config, "seq"), "{}", golden.name);
                check_states(&golden, "tokens_of_last_layer", |pooling, states| pooling.forward(&[states], None));
            }
            "mltp_with_front_end" => check_layers(&golden),
            other => panic!("{}: kind {other}", golden.name),
        }
    }
}

/// `[batch, tokens]`: true where the file's mask has no token; `None` without a mask.
fn hidden(golden: &Golden, device: &Device) -> Option<Tensor<2, Bool>> {
    golden.tensors.contains_key("mask").then(|| tensor::<2>(&golden.tensors, "mask", device).equal_elem(0.0))
}

fn check_generalized_mean(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    let x: Tensor<3> = tensor(file, "x", &device).require_grad();
    let described = json!({"ggem": {"n_groups": config["groups"], "eps": config["eps"]}});
    // Of which kind the numbers are decides nothing; how many tokens there are is in the mask.
    config.beside_the_point(&["positive_input"]);
    check_lengths(golden, "right");
    let Pooling::Ggem(fresh) = init(&described, x.dims()[2], 1, &device) else { panic!("{name}") };
    let names: Names<'_> = &[("p", "p", Layout::Same)];
    let pooling: GeneralizedMean = weights::load(fresh, renamed(file, "w.", names)).unwrap();
    let out = pooling.forward(x.clone(), hidden(golden, &device).as_ref());
    compare(name, "out", &file["out"].values, &values(out.clone()), OUTPUT, true);
    let grads = (out * tensor(file, "cotangent", &device)).sum().backward();
    compare(name, "grad.x", &file["grad.x"].values, &values(x.grad(&grads).unwrap()), GRADIENT, true);
    compare_gradients(name, &pooling, &grads, &renamed(file, "grad.w.", names), GRADIENT);
}

fn init(config: &Value, d_model: usize, n_layers: usize, device: &Device) -> Pooling {
    let config: PoolingConfig = serde_json::from_value(config.clone()).unwrap();
    config.validate(d_model).unwrap();
    config.init(d_model, n_layers, device)
}

/// The file's mask is what its lengths say, at this side of the rows.
fn check_lengths(golden: &Golden, padding_side: &str) {
    let Some(lengths) = golden.config.get("lens") else {
        assert!(!golden.tensors.contains_key("mask"), "{}: a mask without lengths", golden.name);
        return;
    };
    let lengths: Vec<usize> = lengths.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
    let mask = &golden.tensors["mask"];
    let tokens = mask.shape[1];
    let of_row = |&length: &usize| {
        let real = |at: usize| if padding_side == "left" { at >= tokens - length } else { at < length };
        (0..tokens).map(move |at| f32::from(u8::from(real(at)))).collect::<Vec<_>>()
    };
    assert_eq!(mask.values, lengths.iter().flat_map(of_row).collect::<Vec<_>>(), "{}", golden.name);
}

/// The trainable pooling of a file, with its weights.
fn trainable(golden: &Golden, input: &str, device: &Device) -> TrainablePooling {
    let Golden { name, config, tensors: file, .. } = golden;
    let described = json!({"mltp": {
        "input": input, "n_latents": config["num_latents"], "n_heads": config["heads"], "head_dim": config["dim_head"],
    }});
    let table = config.get("layers_table").map_or(1, |rows| rows.as_u64().unwrap() as usize);
    let d_model = size(config, "d");
    let Pooling::Mltp(fresh) = init(&described, d_model, table, device) else { panic!("{name}") };
    let stored = renamed(file, "w.", NAMES);
    weights::load(fresh, stored).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn check_states(golden: &Golden, input: &str, pool: impl Fn(&TrainablePooling, Tensor<3>) -> Tensor<2>) {
    let Golden { name, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    let pooling = trainable(golden, input, &device);
    let states: Tensor<3> = tensor(file, "hiddens", &device).require_grad();
    let out = pool(&pooling, states.clone());
    compare(name, "out", &file["out"].values, &values(out.clone()), OUTPUT, true);
    let grads = (out * tensor(file, "cotangent", &device)).sum().backward();
    compare(name, "grad.hiddens", &file["grad.hiddens"].values, &values(states.grad(&grads).unwrap()), GRADIENT, true);
    compare_gradients(name, &pooling, &grads, &renamed(file, "grad.w.", NAMES), GRADIENT);
}

fn check_layers(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let input = match config["front_end"].as_str() {
        Some("mean") => "mean_of_each_layer",
        Some("last") => "last_of_each_layer",
        other => panic!("{name}: front_end {other:?}"),
    };
    let device = Device::flex().autodiff();
    let pooling = trainable(golden, input, &device);
    let states: Tensor<4> = tensor(file, "hidden_states", &device).require_grad();
    let n_layers = states.dims()[1];
    assert_eq!(n_layers, size(config, "num_layers_in"), "{name}");
    check_lengths(golden, config["padding_side"].as_str().unwrap());
    let layers: Vec<Tensor<3>> = (0..n_layers).map(|layer| states.clone().narrow(1, layer, 1).squeeze_dim(1)).collect();
    let front_end =
        init(&json!(if input == "mean_of_each_layer" { MEAN } else { LAST }), size(config, "d"), 1, &device);
    let of_layer = |layer: &Tensor<3>| front_end.forward(std::slice::from_ref(layer), hidden(golden, &device).as_ref());
    let tokens: Tensor<3> = Tensor::stack(layers.iter().map(of_layer).collect(), 1);
    compare(name, "aux.layer_tokens", &file["aux.layer_tokens"].values, &values(tokens), OUTPUT, true);
    let out = pooling.forward(&layers, hidden(golden, &device).as_ref());
    compare(name, "out", &file["out"].values, &values(out.clone()), OUTPUT, true);
    let grads = (out * tensor(file, "cotangent", &device)).sum().backward();
    let found = values(states.grad(&grads).unwrap());
    compare(name, "grad.hidden_states", &file["grad.hidden_states"].values, &found, GRADIENT, true);
    compare_gradients(name, &pooling, &grads, &renamed(file, "grad.w.", NAMES), GRADIENT);
}

fn check_loss(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    let leaf = |key: &str| Param::from_tensor(tensor::<2>(file, key, &device)).val();
    let negatives = config["with_negatives"].as_bool().unwrap().then(|| leaf("neg"));
    let (queries, positives) = (leaf("q"), leaf("pos"));
    let scale = config["scale"].as_f64().unwrap();
    let loss = contrastive_loss(queries.clone(), positives.clone(), negatives.clone(), scale);
    compare(name, "out", &file["out"].values, &values(loss.clone()), OUTPUT, true);
    let grads = (loss * file["cotangent"].values[0]).backward();
    for (key, leaf) in [("q", Some(queries)), ("pos", Some(positives)), ("neg", negatives)] {
        let Some(leaf) = leaf else { continue };
        let key = format!("grad.{key}");
        compare(name, &key, &file[&key].values, &values(leaf.grad(&grads).unwrap()), GRADIENT, true);
    }
}
