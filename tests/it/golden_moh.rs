//! Mixture-of-Head attention beside the authors' code: outputs, gates, penalties, and the gradients of both.

use std::collections::BTreeMap;

use burn::tensor::{Device, Int, Tensor, TensorData, activation};
use polyhead_attention::{
    Adapters, Call, Dims, GateNorm, Mask, Mechanism, MechanismConfig, MixtureOfHead, MixtureOfHeadConfig, Observe,
    PerLayerCount, QueryNormConfig, Rope, RopeLayout, RouterConfig, StraightThrough,
};
use polyhead_kernels::{AttentionOptions, attention, linear, linear_out_of_heads};
use polyhead_models::weights::{self, Named};

use crate::golden::{GRADIENT, Golden, OUTPUT, compare, files, gradients, size, values};

/// Of gates and probabilities, absolute.
const GATES: f32 = 1e-5;

#[test]
fn golden_moh() {
    let mut families = BTreeMap::new();
    for golden in files("moh") {
        let family = golden.name.split('_').next().unwrap().to_owned();
        match family.as_str() {
            "dit" | "llama3" | "causal" => check(&golden),
            "vit" => check_vision(&golden),
            other => panic!("unknown family {other}"),
        }
        *families.entry(family).or_insert(0) += 1;
    }
    assert_eq!(families.len(), 4, "{families:?}");
}

fn config(golden: &Golden) -> MixtureOfHeadConfig {
    let config = &golden.config;
    let shared = size(config, "shared_heads");
    let straight_through =
        if config["ste"].as_bool() == Some(true) { StraightThrough::All } else { StraightThrough::Nobody };
    let by_norm = golden.name.starts_with("llama3");
    MixtureOfHeadConfig {
        n_heads: size(config, "n_heads"),
        n_kv_heads: config["n_kv_heads"].as_u64().map(|heads| heads as usize),
        head_dim: Some(size(config, "head_dim")),
        qkv_bias: golden.tensors.contains_key("w.qkv.bias"),
        o_bias: golden.tensors.contains_key("w.proj.bias"),
        shared_heads: PerLayerCount::Same(shared),
        top_k: PerLayerCount::Same(size(config, "routed_topk")),
        router: if by_norm {
            RouterConfig::QueryNorm(QueryNormConfig { straight_through })
        } else {
            RouterConfig::default()
        },
        penalty_norm: GateNorm::Code,
    }
}

/// A file's tensors with this prefix under our names: projections apart, `[in, out]`.
fn ours(golden: &Golden, prefix: &str) -> BTreeMap<String, Named> {
    let mut found = BTreeMap::new();
    let mut put = |name: String, tensor: Named| {
        found.insert(name.clone(), Named { name, ..tensor });
    };
    for (key, tensor) in &golden.tensors {
        let Some(name) = key.strip_prefix(prefix) else { continue };
        let (layer, kind) = name.rsplit_once('.').unwrap_or((name, ""));
        match layer {
            "qkv" => {
                let third = tensor.values.len() / 3;
                let rows = tensor.shape[0] / 3;
                for (part, values) in ["q_proj", "k_proj", "v_proj"].into_iter().zip(tensor.values.chunks(third)) {
                    let shape = std::iter::once(rows).chain(tensor.shape[1..].iter().copied()).collect();
                    let part_of = Named { shape, values: values.to_vec(), ..tensor.clone() };
                    put(format!("{part}.{kind}"), transposed(part_of));
                }
            }
            "proj" => put(format!("o_proj.{kind}"), transposed(tensor.clone())),
            "wg" => put(format!("router.routed.{kind}"), transposed(tensor.clone())),
            "wg_0" => put(format!("router.kinds.{kind}"), transposed(tensor.clone())),
            "wg_1" => put(format!("router.shared.{kind}"), transposed(tensor.clone())),
            _ => put(name.to_owned(), transposed(tensor.clone())),
        }
    }
    found
}

fn transposed(tensor: Named) -> Named {
    let [rows, columns] = tensor.shape[..] else { return tensor };
    let values = (0..rows * columns).map(|i| tensor.values[i % rows * columns + i / rows]).collect();
    Named { shape: vec![columns, rows], values, ..tensor }
}

fn tensor<const D: usize>(golden: &Golden, key: &str, device: &Device) -> Tensor<D> {
    let named = &golden.tensors[key];
    Tensor::from_data(TensorData::new(named.values.clone(), named.shape.clone()), device)
}

fn layer(golden: &Golden, device: &Device) -> MixtureOfHead {
    let rope = golden.config["rope"].as_bool() == Some(true);
    let dims = Dims { d_model: size(&golden.config, "d_model"), n_layers: 1, layer: 0, rope, norm_eps: 1e-5 };
    let config = config(golden);
    config.validate(&dims).unwrap_or_else(|error| panic!("{}: {error}", golden.name));
    let fresh = config.init(&dims, device);
    let mut stored = ours(golden, "w.");
    // The vision backbone's own parameters are no part of the layer.
    stored.retain(|name, _| name.contains("_proj.") || name.starts_with("router."));
    weights::load(fresh, stored).unwrap_or_else(|error| panic!("{}: {error}", golden.name))
}

/// Fails unless the gradients are those of the file, and no others but zeros.
fn compare_gradients(golden: &Golden, prefix: &str, mut found: BTreeMap<String, Vec<f32>>) {
    let mut wanted: BTreeMap<String, Vec<f32>> =
        ours(golden, prefix).into_iter().map(|(name, tensor)| (name, tensor.values)).collect();
    // What is one tensor in the file is compared as one: the keys' biases, which leave the weights as they are, have gradients of
    // rounding errors only.
    for kind in
        ["weight", "bias"].into_iter().filter(|kind| golden.tensors.contains_key(&format!("{prefix}qkv.{kind}")))
    {
        for tensors in [&mut wanted, &mut found] {
            let parts = ["q_proj", "k_proj", "v_proj"].map(|part| tensors.remove(&format!("{part}.{kind}")).unwrap());
            tensors.insert(format!("qkv.{kind}"), parts.concat());
        }
    }
    for (name, want) in wanted {
        let got = found.remove(&name).unwrap_or_else(|| panic!("{}: {prefix}{name} is missing", golden.name));
        compare(&golden.name, &format!("{prefix}{name}"), &want, &got, GRADIENT, true);
    }
    for (name, grad) in found {
        assert!(grad.iter().all(|&g| g == 0.0), "{}: {prefix}{name} should be zero", golden.name);
    }
}

fn check_gates(golden: &Golden, layer: &MixtureOfHead, x: &Tensor<3>) {
    let gates = values(layer.routing(x.clone()).gates);
    compare(&golden.name, "gates", &golden.tensors["inter.gates"].values, &gates, GATES, false);
}

fn check(golden: &Golden) {
    let (name, config) = (&golden.name, &golden.config);
    let device = Device::flex().autodiff();
    let layer = layer(golden, &device);
    let x = tensor::<3>(golden, "x", &device).require_grad();
    check_gates(golden, &layer, &x);
    let rope = (config["rope"].as_bool() == Some(true)).then(|| {
        let theta = config["rope_theta"].as_f64().unwrap();
        Rope::new(0..size(config, "seq"), size(config, "head_dim"), theta, RopeLayout::RotateHalf, &device)
    });
    let mask = if config["causal"].as_bool().unwrap() { Mask::causal() } else { Mask::none() };
    let run = |observe| {
        let adapters = Adapters::default();
        layer.forward(x.clone(), Call { rope: rope.as_ref(), mask: &mask, bias: None, cache: None, observe, adapters })
    };
    let out = run(Observe::Nothing);
    compare(name, "out", &golden.tensors["out"].values, &values(out.hidden.clone()), OUTPUT, false);
    let grads = (out.hidden * tensor(golden, "cotangent", &device)).sum().backward();
    let mut found = gradients(&layer, &grads);
    found.insert("x".into(), values(x.grad(&grads).unwrap()));
    compare_gradients(golden, "grad.", found);
    check_penalty(golden, &layer, &x, run(Observe::Nothing).penalty);
}

fn check_penalty(golden: &Golden, layer: &MixtureOfHead, x: &Tensor<3>, penalty: Option<Tensor<1>>) {
    let Some(want) = golden.tensors.get("aux_loss") else {
        assert!(penalty.is_none(), "{}: no heads are routed", golden.name);
        return;
    };
    let penalty = penalty.unwrap();
    compare(&golden.name, "aux_loss", &want.values, &values(penalty.clone()), OUTPUT, false);
    let grads = penalty.backward();
    let mut found = gradients(layer, &grads);
    found.insert("x".into(), values(x.grad(&grads).unwrap()));
    compare_gradients(golden, "aux_grad.", found);
}

/// The authors' vision attention around our router, kernel and output: queries and keys of length one, a learnt
/// temperature, and a bias by relative position.
fn check_vision(golden: &Golden) {
    let (name, config) = (&golden.name, &golden.config);
    let device = Device::flex().autodiff();
    let layer = layer(golden, &device);
    let [n_heads, width, seq] = ["n_heads", "head_dim", "seq"].map(|key| size(config, key));
    let x = tensor::<3>(golden, "x", &device).require_grad();
    check_gates(golden, &layer, &x);
    let own = |key: &str| tensor::<2>(golden, &format!("w.{key}.weight"), &device).require_grad();
    let bias = |key: &str| tensor::<1>(golden, &format!("w.{key}.bias"), &device).require_grad();
    let (fc1, fc2, fc1_bias, fc2_bias) = (own("cpb_fc1"), own("cpb_fc2"), bias("cpb_fc1"), bias("cpb_fc2"));
    let temperature = tensor::<3>(golden, "w.temperature", &device).require_grad();
    let embedding = tensor::<3>(golden, "w.query_embedding", &device).require_grad();

    let table = tensor::<2>(golden, "rel_coords_table", &device);
    let index = tensor::<2>(golden, "rel_pos_index", &device).reshape([seq * seq]).int();
    let by_offset = activation::relu(linear(table, fc1.clone().transpose(), Some(fc1_bias.clone())));
    let by_offset = linear(by_offset, fc2.clone().transpose(), Some(fc2_bias.clone())); // [offsets, heads]
    let relative = by_offset.select(0, index as Tensor<1, Int>).reshape([seq, seq, n_heads]).permute([2, 0, 1]);
    let heads = |map: &burn::nn::Linear| {
        let all = linear(x.clone(), map.weight.val(), map.bias.as_ref().map(|bias| bias.val()));
        all.reshape([2, seq, n_heads, width]).swap_dims(1, 2)
    };
    let of_length_one = |x: Tensor<4>| x.clone() / x.square().sum_dim(3).sqrt().clamp_min(1e-12);
    let softplus = activation::softplus(temperature.clone(), 1.0) * (seq as f64).ln();
    let q = (of_length_one(heads(&layer.q_proj)) + embedding.clone().unsqueeze::<4>()) * softplus.unsqueeze::<4>();
    let routing = layer.routing(x.clone());
    let options = AttentionOptions {
        scale: Some(1.0),
        bias: Some(relative.unsqueeze::<4>()),
        active: Some(routing.active.clone()),
        ..Default::default()
    };
    let attended = attention(q, of_length_one(heads(&layer.k_proj)), heads(&layer.v_proj), &options).hidden;
    let attended = attended.swap_dims(1, 2).reshape([2, seq, n_heads * width]);
    let out = linear_out_of_heads(attended, routing.gates, layer.o_proj.weight.val(), &routing.active)
        + layer.o_proj.bias.as_ref().unwrap().val().unsqueeze::<3>();
    compare(name, "out", &golden.tensors["out"].values, &values(out.clone()), OUTPUT, false);

    let grads = (out * tensor(golden, "cotangent", &device)).sum().backward();
    let mut found = gradients(&layer, &grads);
    found.insert("x".into(), values(x.grad(&grads).unwrap()));
    for (key, weight) in [("cpb_fc1", &fc1), ("cpb_fc2", &fc2)] {
        found.insert(format!("{key}.weight"), values(weight.grad(&grads).unwrap().transpose()));
    }
    for (key, bias) in [("cpb_fc1", &fc1_bias), ("cpb_fc2", &fc2_bias)] {
        found.insert(format!("{key}.bias"), values(bias.grad(&grads).unwrap()));
    }
    found.insert("temperature".into(), values(temperature.grad(&grads).unwrap()));
    found.insert("query_embedding".into(), values(embedding.grad(&grads).unwrap()));
    // A number that is added to all scores of a head changes nothing: both sides have rounding errors there.
    let (nothing, theirs) = (&found["cpb_fc2.bias"], &golden.tensors["grad.cpb_fc2.bias"].values);
    assert!(nothing.iter().chain(theirs).all(|grad| grad.abs() < 1e-5), "{nothing:?} {theirs:?}");
    found.insert("cpb_fc2.bias".into(), theirs.clone());
    compare_gradients(golden, "grad.", found);
    let split = self::config(golden).split(0);
    let penalty = layer.routing(x.clone()).balance.map(|balance| balance.penalty(split, GateNorm::Code));
    check_penalty(golden, &layer, &x, penalty);
}
