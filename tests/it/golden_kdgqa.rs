//! Key-driven grouping beside the authors' code: allocations, outputs and gradients, and the conversion to GQA.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::key_driven::{
    AllocationConfig, EvenConfig, EvolvingConfig, Form, Measured, PerCallConfig, allocation, key_norms, perturbed,
};
use polyhead_attention::{Attended, Call, Dims, KeyDriven, KeyDrivenConfig, Mask, Mechanism, MechanismConfig, Observe};
use polyhead_kernels::{AttentionOptions, attention, linear};
use polyhead_models::surgery::{Heads, Pool};
use polyhead_models::weights::{self, Named};
use serde_json::Value;

use crate::golden::{self, Golden, Layout, Names, compare, dot, files, gradients, renamed, size, transposed, values};

/// Outputs, as the files' README suggests.
const OUTPUT: f32 = 1e-5;
/// Gradients, of the largest entry.
const GRADIENT: f32 = 1e-4;
/// Norms of keys, of the largest one.
const NORMS: f32 = 1e-5;

#[test]
fn golden_kdgqa() {
    for golden in files("kdgqa") {
        match golden.config["scheme"].as_str() {
            Some("gqa") => check_gqa(&golden),
            Some("kdgqa") => check_kdgqa(&golden),
            Some("pgqa") => check_pgqa(&golden),
            Some("dgqa_ema") => check_dgqa(&golden, Measured::Average),
            Some("dgqa_diff") => check_dgqa(&golden, Measured::Difference),
            None => check_table(&golden),
            other => panic!("{}: scheme {other:?}", golden.name),
        }
    }
}

fn device() -> Device {
    Device::flex().autodiff()
}

fn whole(golden: &Golden, key: &str) -> Vec<usize> {
    golden.tensors[key].values.iter().map(|&value| value as usize).collect()
}

fn listed(numbers: &Value) -> Vec<usize> {
    numbers.as_array().unwrap().iter().map(|number| number.as_u64().unwrap() as usize).collect()
}

fn tensor(golden: &Golden, key: &str) -> Tensor<3> {
    golden::tensor(&golden.tensors, key, &device())
}

const NAMES: Names<'_> = &[
    ("q.weight", "q_proj.weight", Layout::Linear),
    ("k.weight", "k_proj.weight", Layout::Linear),
    ("v.weight", "v_proj.weight", Layout::Linear),
    ("proj.weight", "o_proj.weight", Layout::Linear),
    ("q.bias", "q_proj.bias", Layout::Same),
    ("k.bias", "k_proj.bias", Layout::Same),
    ("v.bias", "v_proj.bias", Layout::Same),
    ("proj.bias", "o_proj.bias", Layout::Same),
];

fn layer(golden: &Golden, allocation: AllocationConfig, more: Vec<Named>) -> KeyDriven {
    golden.config.is("scale", "head_dim**-0.5");
    golden.config.is("causal", false);
    golden.config.is("rope", false);
    let config = KeyDrivenConfig {
        n_heads: size(&golden.config, "num_heads"),
        n_kv_heads: size(&golden.config, "num_kv_heads"),
        head_dim: None,
        qkv_bias: golden.config["qkv_bias"].as_bool().unwrap(),
        o_bias: true,
        allocation,
        perturb: false,
    };
    let d_model = size(&golden.config, "dim");
    let dims = Dims { d_model, n_layers: 1, layer: 0, rope: false, norm_eps: 1e-6, grid: None };
    assert_eq!(d_model / config.n_heads, size(&golden.config, "head_dim"), "{}", golden.name);
    config.validate(&dims).unwrap_or_else(|error| panic!("{}: {error}", golden.name));
    let mut stored = renamed(&golden.tensors, "w.", NAMES);
    stored.extend(more.into_iter().map(|tensor| (tensor.name.clone(), tensor)));
    weights::load(config.init(&dims, &device()), stored).unwrap_or_else(|error| panic!("{}: {error}", golden.name))
}

fn run(layer: &KeyDriven, x: Tensor<3>) -> Attended {
    layer.forward(x, Call { observe: Observe::Numbers, ..Call::new(&Mask::none()) })
}

/// How many query heads read each key/value head, as the layer tells.
fn told(attended: &Attended) -> Vec<usize> {
    let seen = attended.seen.as_ref().unwrap();
    let (_, counts) = seen.numbers.iter().find(|(name, _)| name == "query_heads").unwrap();
    values(counts.clone()).into_iter().map(|count| count as usize).collect()
}

/// Fails unless the norms of the keys are the file's; gives them.
fn check_norms(golden: &Golden, key: &str, layer: &KeyDriven, x: Tensor<3>) -> Vec<f64> {
    let ([batch, seq, _], groups) = (x.dims(), size(&golden.config, "num_kv_heads"));
    let keys = linear(x, layer.k_proj.weight.val(), layer.k_proj.bias.as_ref().map(|bias| bias.val()));
    let keys = keys.reshape([batch as i32, seq as i32, groups as i32, -1]).swap_dims(1, 2);
    let norms = key_norms(keys, &Mask::none(), 0);
    let found: Vec<f32> = norms.iter().map(|&norm| norm as f32).collect();
    compare(&golden.name, key, &golden.tensors[key].values, &found, NORMS, true);
    norms
}

/// Fails unless output, loss and all gradients are the file's, under the prefixes of its keys.
fn same(golden: &Golden, [prefix, grad]: [&str; 2], layer: &KeyDriven, x: Tensor<3>, output: Tensor<3>) {
    let (out, found, cotangent) = (format!("{prefix}out"), values(output.clone()), &golden.tensors["cotangent"].values);
    assert_eq!(x.dims(), ["batch", "tokens", "dim"].map(|key| size(&golden.config, key)), "{}", golden.name);
    compare(&golden.name, &out, &golden.tensors[out.as_str()].values, &found, OUTPUT, false);
    // Terms of both signs: what rounding does to their sum is as large as its largest parts.
    let terms = found.iter().zip(cotangent).map(|(a, b)| (a * b).abs()).sum::<f32>();
    let loss = &golden.tensors[format!("{prefix}loss").as_str()].values;
    compare(&golden.name, "loss", loss, &[dot(&found, cotangent)], OUTPUT * terms, false);
    let grads = (output * tensor(golden, "cotangent")).sum().backward();
    let mut found = gradients(layer, &grads);
    found.insert("x".into(), values(x.grad(&grads).unwrap()));
    let wanted = renamed(&golden.tensors, grad, NAMES).into_iter().map(|(name, tensor)| (name, tensor.values));
    let mut wanted: BTreeMap<String, Vec<f32>> = wanted.collect();
    wanted.insert("x".into(), golden.tensors[format!("{grad}x").as_str()].values.clone());
    assert!(wanted.keys().eq(found.keys()), "{}: {:?}", golden.name, found.keys());
    for (name, want) in wanted {
        // Adding the same to all keys changes nothing: the gradient of their biases is rounding only, beside that of the values.
        let scale = if name == "k_proj.bias" { "v_proj.bias" } else { &name };
        let (mut want, mut got) = (want, found[&name].clone());
        if scale != name {
            want.extend(&found[scale]);
            got.extend(&found[scale]);
        }
        compare(&golden.name, &format!("{grad}{name}"), &want, &got, GRADIENT, true);
    }
}

fn check_gqa(golden: &Golden) {
    let layer = layer(golden, AllocationConfig::Even(EvenConfig {}), Vec::new());
    let x = tensor(golden, "x").require_grad();
    same(golden, ["", "grad."], &layer, x.clone(), run(&layer, x).hidden);

    // The authors' conversion: heads of the fused map, neighbours averaged.
    let (heads, groups) = (size(&golden.config, "num_heads"), size(&golden.config, "num_kv_heads"));
    let fused = &golden.tensors["conv.qkv.weight"];
    let bias = golden.tensors.get("conv.qkv.bias");
    let columns = fused.shape[1];
    for (at, part) in ["q", "k", "v"].into_iter().enumerate() {
        let third = fused.values.len() / 3;
        let rows = Named {
            name: part.into(),
            shape: vec![fused.shape[0] / 3, columns],
            values: fused.values[at * third..(at + 1) * third].to_vec(),
        };
        let width = rows.shape[0];
        let bias = bias.map(|bias| Named {
            name: part.into(),
            shape: vec![width],
            values: bias.values[at * width..(at + 1) * width].to_vec(),
        });
        let own = Heads::of(&transposed(&rows), bias.as_ref(), heads);
        let groups = if part == "q" { heads } else { groups };
        let labels: Vec<usize> = (0..heads).map(|head| head / (heads / groups)).collect();
        let (weight, bias) = own.pooled(&labels, Pool::Mean).projection();
        let key = |kind: &str| format!("conv.{part}.{kind}");
        let want = transposed(&golden.tensors[key("weight").as_str()]).values;
        compare(&golden.name, &key("weight"), &want, &weight.values, OUTPUT, false);
        if let Some(bias) = bias {
            compare(
                &golden.name,
                &key("bias"),
                &golden.tensors[key("bias").as_str()].values,
                &bias.values,
                OUTPUT,
                false,
            );
        }
    }
}

fn check_kdgqa(golden: &Golden) {
    let layer = layer(golden, AllocationConfig::PerCall(PerCallConfig {}), Vec::new());
    let x = tensor(golden, "x").require_grad();
    let attended = run(&layer, x.clone());
    assert_eq!(told(&attended), whole(golden, "alloc"), "{}", golden.name);
    let norms = check_norms(golden, "k_norms", &layer, x.clone());
    let low = norms.iter().copied().reduce(f64::min).unwrap();
    let above: Vec<f64> = norms.iter().map(|norm| norm - low).collect();
    let range = above.iter().copied().reduce(f64::max).unwrap();
    let between: Vec<f32> = above.iter().map(|above| (above / range) as f32).collect();
    // A difference of norms: their rounding counts more.
    let tolerance = NORMS * (norms.iter().sum::<f64>() / range) as f32;
    compare(&golden.name, "k_norms_minmax", &golden.tensors["k_norms_minmax"].values, &between, tolerance, true);
    let rounded = allocation::nearest(&allocation::shares_of_range(&norms).unwrap(), size(&golden.config, "num_heads"));
    assert_eq!(rounded, whole(golden, "alloc_rounded"), "{}", golden.name);
    assert_eq!(listed(&golden.config["alloc"]), whole(golden, "alloc"), "{}", golden.name);
    assert_eq!(listed(&golden.config["alloc_before_fix"]), rounded, "{}", golden.name);
    same(golden, ["", "grad."], &layer, x, attended.hidden);
}

/// The file's noise in the place of ours, around our kernel and projections.
fn check_pgqa(golden: &Golden) {
    let layer = layer(golden, AllocationConfig::Even(EvenConfig {}), Vec::new());
    golden.config.beside_the_point(&["noise"]);
    let x = tensor(golden, "x").require_grad();
    let [batch, seq, d_model] = x.dims();
    let (n_heads, groups) = (size(&golden.config, "num_heads"), size(&golden.config, "num_kv_heads"));
    let heads = |map: &burn::nn::Linear, n: usize| {
        let all = linear(x.clone(), map.weight.val(), map.bias.as_ref().map(|bias| bias.val()));
        all.reshape([batch, seq, n, d_model / n_heads]).swap_dims(1, 2)
    };
    let [q, k, v] =
        [(&layer.q_proj, n_heads), (&layer.k_proj, groups), (&layer.v_proj, groups)].map(|(map, n)| heads(map, n));
    let attended = attention(q, k, v, &AttentionOptions::default()).hidden;
    let rows = (0..groups).flat_map(|group| golden.tensors[format!("noise_u.{group}").as_str()].values.clone());
    let uniform = TensorData::new(rows.collect::<Vec<f32>>(), [n_heads, d_model / n_heads * seq]);
    let even = allocation::even(groups, n_heads);
    let noisy = perturbed(attended, &even, Tensor::from_data(uniform, &device()));
    let joined = noisy.swap_dims(1, 2).reshape([batch, seq, d_model]);
    let out = linear(joined, layer.o_proj.weight.val(), layer.o_proj.bias.as_ref().map(|bias| bias.val()));
    same(golden, ["", "grad."], &layer, x, out);
}

fn check_dgqa(golden: &Golden, by: Measured) {
    let name = &golden.name;
    golden.config.is("beta", 0.9);
    golden.config.is("random_fixups", 0);
    let splits: Vec<Vec<usize>> = golden.config["splits_per_step"].as_array().unwrap().iter().map(listed).collect();
    let window = golden.config["window_size"].as_u64().unwrap();
    let groups = size(&golden.config, "num_kv_heads");
    let begin = allocation::even(groups, size(&golden.config, "num_heads"));
    let memory = |kind: &str, values: Vec<f32>| Named { name: format!("memory.{kind}"), shape: vec![groups], values };
    let more = vec![
        memory("magnitudes", vec![0.0; groups]),
        memory("query_heads", begin.iter().map(|&count| count as f32).collect()),
    ];
    let evolving = EvolvingConfig { by, form: Form::Code, window };
    let mut layer = layer(golden, AllocationConfig::Evolving(evolving), more);
    let steps = golden.config["steps"].as_u64().unwrap();
    for step in 0..steps {
        let key = |kind: &str| format!("step{step}.{kind}");
        let x = tensor(golden, &key("x")).require_grad();
        check_norms(golden, &key("k_norms"), &layer, x.clone());
        if layer.is_due(step) {
            layer.before_step(x.clone(), &Mask::none(), step);
        }
        let remembered = values(layer.memory.as_ref().unwrap().magnitudes.val());
        compare(
            name,
            &key("cache_after"),
            &golden.tensors[key("cache_after").as_str()].values,
            &remembered,
            NORMS,
            true,
        );
        let attended = run(&layer, x.clone());
        assert_eq!(told(&attended), whole(golden, &key("splits")), "{name}: step {step}");
        assert_eq!(told(&attended), splits[step as usize], "{name}: step {step}");
        if step + 1 == steps {
            same(golden, [&key(""), &key("grad.")], &layer, x, attended.hidden);
        } else {
            let want = &golden.tensors[key("out").as_str()].values;
            compare(name, &key("out"), want, &values(attended.hidden), OUTPUT, false);
        }
    }
    let attended = run(&layer.valid(), tensor(golden, "eval.x").inner());
    assert_eq!(told(&attended), whole(golden, "eval.splits"), "{name}: evaluation");
    assert_eq!((told(&attended), steps as usize + 1), (splits[steps as usize].clone(), splits.len()), "{name}");
    // There the authors' code leaves the norms of the call in its cache.
    check_norms(golden, "eval.k_norms", &layer, tensor(golden, "eval.x"));
    check_norms(golden, "eval.cache_after", &layer, tensor(golden, "eval.x"));
    compare(name, "eval.out", &golden.tensors["eval.out"].values, &values(attended.hidden), OUTPUT, false);
}

fn check_table(golden: &Golden) {
    let rows = size(&golden.config, "rows");
    for key in golden.tensors.keys() {
        let Some(shape) = key.strip_prefix("kdgqa.").and_then(|key| key.strip_suffix(".k_norms")) else { continue };
        let n_heads: usize = shape[1..].split_once('.').unwrap().0.parse().unwrap();
        let norms = &golden.tensors[key.as_str()];
        let groups = norms.shape[1];
        assert_eq!(norms.shape[0], rows, "{key}");
        let row = |key: &str, at: usize| whole(golden, key)[at * groups..(at + 1) * groups].to_vec();
        let numbers = |key: &str, at: usize| -> Vec<f64> {
            golden.tensors[key].values[at * groups..(at + 1) * groups].iter().map(|&value| f64::from(value)).collect()
        };
        for at in 0..norms.shape[0] {
            let norms = numbers(key, at);
            let before = allocation::nearest(&allocation::shares_of_range(&norms).unwrap(), n_heads);
            assert_eq!(before, row(&format!("kdgqa.{shape}.alloc_before_fix"), at), "{shape}, row {at}");
            assert_eq!(
                allocation::by_range(&norms, n_heads),
                row(&format!("kdgqa.{shape}.alloc"), at),
                "{shape}, row {at}"
            );

            let magnitudes = numbers(&format!("dgqa.{shape}.magnitudes"), at);
            let cache = numbers(&format!("dgqa.{shape}.cache"), at);
            let each = |of: fn(f64, f64) -> f64| -> Vec<f64> {
                cache.iter().zip(&magnitudes).map(|(&cached, &norm)| of(cached, norm)).collect()
            };
            for (kind, weights) in [
                ("dgqa_ema", each(|cached, norm| 0.9 * norm + 0.1 * cached)),
                ("dgqa_diff", each(|cached, norm| (cached - norm).abs())),
            ] {
                let rounded = row(&format!("{kind}.{shape}.rounded"), at);
                let nearest = allocation::nearest(&allocation::shares(&weights).unwrap(), n_heads);
                assert_eq!(nearest, rounded, "{kind} {shape}, row {at}");
                // One head is drawn for each that rounding left over or took too many.
                let drawn = whole(golden, &format!("{kind}.{shape}.randint_calls"))[at];
                assert_eq!(drawn, n_heads.abs_diff(rounded.iter().sum()), "{kind} {shape}, row {at}");
                let final_already = drawn == 0;
                let ours = allocation::in_proportion(&weights, n_heads);
                assert!(!final_already || ours == rounded, "{kind} {shape}, row {at}: {ours:?}");
                assert_eq!(ours.iter().sum::<usize>(), n_heads);
            }
        }
    }
}
