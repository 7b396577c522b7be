//! Mixture-of-Head attention beside the authors' code: outputs, gates, penalties, and the gradients of both.

use std::collections::BTreeMap;

use burn::tensor::{Device, Int, Tensor, activation};
use polyhead_attention::{
    Call, Dims, GateNorm, Mask, Mechanism, MechanismConfig, MixtureOfHead, MixtureOfHeadConfig, Observe, PerLayerCount,
    QueryNormConfig, Rope, RopeLayout, RouterConfig, StraightThrough,
};
use polyhead_kernels::{AttentionOptions, attention, linear, linear_out_of_heads};
use polyhead_models::weights::{self, Named};

use crate::golden::{self, GRADIENT, Golden, OUTPUT, compare, files, gradients, size, values};

/// Of gates and probabilities, absolute.
const GATES: f32 = 1e-5;

#[test]
fn golden_moh() {
    for golden in files("moh") {
        // How far apart the chosen and the other heads are, so that rounding does not choose.
        golden.config.beside_the_point(&["min_topk_margin"]);
        if golden.tensors.contains_key("w.temperature") {
            check_vision(&golden);
        } else {
            check(&golden);
        }
    }
}

fn config(golden: &Golden) -> MixtureOfHeadConfig {
    let config = &golden.config;
    let shared = size(config, "shared_heads");
    let straight_through =
        if config["ste"].as_bool() == Some(true) { StraightThrough::All } else { StraightThrough::Nobody };
    // The router without parameters has none in the file.
    let by_norm = !golden.tensors.keys().any(|key| key.starts_with("w.wg"));
    assert!(by_norm || config["ste"].is_null(), "{}: straight-through gradients are of routing by norms", golden.name);
    let qkv_bias = golden.tensors.contains_key("w.qkv.bias");
    assert_eq!(config.get("qkv_bias").map_or(qkv_bias, |bias| bias == true), qkv_bias, "{}", golden.name);
    MixtureOfHeadConfig {
        n_heads: size(config, "n_heads"),
        n_kv_heads: config["n_kv_heads"].as_u64().map(|heads| heads as usize),
        head_dim: Some(size(config, "head_dim")),
        qkv_bias,
        o_bias: golden.tensors.contains_key("w.proj.bias"),
        qk_norm: false,
        shared_heads: PerLayerCount::Same(shared),
        top_k: PerLayerCount::Same(size(config, "routed_topk")),
        router: if by_norm {
            RouterConfig::QueryNorm(QueryNormConfig { straight_through })
        } else {
            RouterConfig::default()
        },
        penalty_norm: GateNorm::Code,
        window: None,
    }
}

/// A file's tensors with this prefix under our names: projections apart, `[in, out]`.
fn ours(golden: &Golden, prefix: &str) -> BTreeMap<String, Named> {
    let mut found = BTreeMap::new();
    let mut put = |name: String, tensor: Named| {
        found.insert(name.clone(), Named { name, ..tensor });
    };
    for (name, tensor) in &golden.tensors.under(prefix) {
        let (layer, kind) = name.rsplit_once('.').unwrap_or((name.as_str(), ""));
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
            _ => put(name.clone(), transposed(tensor.clone())),
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
    golden::tensor(&golden.tensors, key, device)
}

/// What the vision backbone has besides two layers for its biases.
const VISION: [&str; 2] = ["temperature", "query_embedding"];

fn layer(golden: &Golden, device: &Device) -> MixtureOfHead {
    let rope = golden.config["rope"].as_bool() == Some(true);
    let dims =
        Dims { d_model: size(&golden.config, "d_model"), n_layers: 1, layer: 0, rope, norm_eps: 1e-5, grid: None };
    let config = config(golden);
    config.validate(&dims).unwrap_or_else(|error| panic!("{}: {error}", golden.name));
    let fresh = config.init(&dims, device);
    let mut stored = ours(golden, "w.");
    // The vision backbone's own parameters are no part of the layer.
    if golden.tensors.contains_key("w.temperature") {
        stored.retain(|name, _| !(name.starts_with("cpb_fc") || VISION.contains(&name.as_str())));
    }
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
    let (gates, inter) = (values(layer.routing(x.clone()).gates), &golden.tensors["inter.gates"].values);
    compare(&golden.name, "gates", inter, &gates, GATES, false);
    let sizes = ["batch", "seq", "d_model"].map(|key| size(&golden.config, key));
    assert_eq!(x.dims(), sizes, "{}", golden.name);
    let routing = layer.routing(x.clone());
    let Some(balance) = routing.balance else { return };
    let (shared, heads) = (size(&golden.config, "shared_heads"), size(&golden.config, "n_heads"));
    let [positions, routed] = [sizes[0] * sizes[1], heads - shared];
    // Which routed heads count where. Files of routing by norms have it in their gates.
    let chosen: Vec<f32> = gates.chunks(heads).flat_map(|gates| gates[shared..].to_vec()).collect();
    let chosen: Vec<f32> = chosen.into_iter().map(|gate| f32::from(u8::from(gate != 0.0))).collect();
    let mask: Vec<f32> = match golden.tensors.get("inter.mask") {
        Some(mask) => mask.values.clone(),
        None if golden.tensors.keys().any(|key| key.starts_with("w.wg")) => panic!("{}: no inter.mask", golden.name),
        None => inter.chunks(heads).flat_map(|gates| gates[shared..].to_vec()).collect(),
    };
    compare(&golden.name, "mask", &mask, &chosen, 0.0, false);
    // The mean probability of each head, and that the chosen ones are the likeliest.
    let probabilities = &golden.tensors["inter.router_probs"].values;
    let mean = |head: usize| (0..positions).map(|at| probabilities[at * routed + head]).sum::<f32>() / positions as f32;
    let means: Vec<f32> = (0..routed).map(mean).collect();
    compare(&golden.name, "router_probs", &means, &values(balance.probabilities), GATES, false);
    for (chosen, probabilities) in chosen.chunks(routed).zip(probabilities.chunks(routed)) {
        let of =
            |kind: f32| chosen.iter().zip(probabilities).filter(move |(chosen, _)| **chosen == kind).map(|(_, &p)| p);
        let sums_to_one = (probabilities.iter().sum::<f32>() - 1.0).abs() < GATES;
        assert!(sums_to_one && of(1.0).all(|likely| of(0.0).all(|other| likely > other)), "{}", golden.name);
    }
}

fn check(golden: &Golden) {
    let (name, config) = (&golden.name, &golden.config);
    let device = Device::flex().autodiff();
    let layer = layer(golden, &device);
    let x = tensor::<3>(golden, "x", &device).require_grad();
    check_gates(golden, &layer, &x);
    config.is("rope_layout", "neox");
    config.beside_the_point(&["rope_theta"]);
    let rope = (config["rope"].as_bool() == Some(true)).then(|| {
        let theta = config["rope_theta"].as_f64().unwrap();
        Rope::new(0..size(config, "seq"), size(config, "head_dim"), theta, RopeLayout::RotateHalf, &device)
    });
    let mask = if config["causal"].as_bool().unwrap() { Mask::causal() } else { Mask::none() };
    let run = |observe| layer.forward(x.clone(), Call { rope: rope.as_ref(), observe, ..Call::new(&mask) });
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

/// The authors' vision attention around our router, kernel and output: queries and keys of length one, a learned
/// temperature, and a bias by relative position.
fn check_vision(golden: &Golden) {
    let (name, config) = (&golden.name, &golden.config);
    let device = Device::flex().autodiff();
    let layer = layer(golden, &device);
    let grid: Vec<usize> = config["grid"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
    assert_eq!(grid.iter().product::<usize>(), size(config, "seq"), "{name}: as many tokens as the grid has");
    let [n_heads, width, seq] = ["n_heads", "head_dim", "seq"].map(|key| size(config, key));
    let x = tensor::<3>(golden, "x", &device).require_grad();
    check_gates(golden, &layer, &x);
    let batch = x.dims()[0];
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
        all.reshape([batch, seq, n_heads, width]).swap_dims(1, 2)
    };
    let of_length_one = |x: Tensor<4>| x.clone() / x.square().sum_dim(3).sqrt().clamp_min(1e-12);
    let softplus = activation::softplus(temperature.clone(), 1.0) * (seq as f64).ln();
    let q = (of_length_one(heads(&layer.q_proj)) + embedding.clone().unsqueeze::<4>()) * softplus.unsqueeze::<4>();
    let routing = layer.routing(x.clone());
    let options = AttentionOptions {
        scale: Some(1.0),
        bias: Some(relative.unsqueeze::<4>()),
        selected: Some(routing.selected.clone()),
        ..Default::default()
    };
    let attended = attention(q, of_length_one(heads(&layer.k_proj)), heads(&layer.v_proj), &options).hidden;
    let attended = attended.swap_dims(1, 2).reshape([batch, seq, n_heads * width]);
    let out = linear_out_of_heads(attended, routing.gates, layer.o_proj.weight.val(), &routing.selected)
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
