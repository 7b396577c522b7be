//! Conversions of parents with grouped queries, beside attention in its plain form: loops over f64, written for these tests.

#![allow(clippy::unwrap_used)]
use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::{Attention, AttentionConfig, Call, Mask, Rope, RopeLayout};
use polyhead_kernels::comparison::{Tolerance, assert_close, difference};

use super::convert::tests::{logits, same, wave};
use super::{
    Grouping, Pool, begin_fusion, collapse, decouple, expanded, group_queries, scatter, standard_grouped, unfused,
};
use crate::weights::{Named, load, named};
use crate::{Decoder, DecoderConfig};

const D_MODEL: usize = 12;
const WIDTH: usize = 4;
const HEADS: usize = 6;
const SEQ: usize = 5;
const THETA: f64 = 100.0;

/// Two layers of six query heads that share `kv_heads`.
fn parent(kv_heads: usize) -> Decoder {
    let softmax = serde_json::json!({ "n_heads": HEADS, "n_kv_heads": kv_heads, "head_dim": WIDTH, "qkv_bias": true });
    let config = serde_json::json!({ "d_model": D_MODEL, "n_layers": 2, "attention": { "softmax": softmax } });
    wave(&serde_json::from_value::<DecoderConfig>(config).unwrap())
}

type Matrix = Vec<Vec<f64>>;

/// A projection, a column of weights for each output, the bias last.
fn columns(weights: &BTreeMap<String, Named>, projection: &str) -> Matrix {
    let weight = &weights[&format!("{projection}.weight")];
    let [inputs, outputs] = weight.shape[..] else { panic!("{projection} is no matrix") };
    let bias = weights.get(&format!("{projection}.bias"));
    let column = |output: usize| {
        let column = (0..inputs).map(|input| f64::from(weight.values[input * outputs + output]));
        column.chain([bias.map_or(0.0, |bias| f64::from(bias.values[output]))]).collect()
    };
    (0..outputs).map(column).collect()
}

fn of(layer: &Attention) -> BTreeMap<String, Named> {
    named(layer).into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect()
}

fn project(x: &Matrix, columns: &[Vec<f64>]) -> Matrix {
    let product =
        |row: &Vec<f64>, column: &Vec<f64>| row.iter().zip(column).map(|(a, b)| a * b).sum::<f64>() + column[row.len()];
    x.iter().map(|row| columns.iter().map(|column| product(row, column)).collect()).collect()
}

/// Channels `i` and `i + width / 2` turn by `position / theta^(2 i / width)`.
fn rotated(head: Matrix) -> Matrix {
    let turn = |(position, row): (usize, Vec<f64>)| {
        let half = row.len() / 2;
        let angle = |i: usize| position as f64 / THETA.powf(2.0 * i as f64 / row.len() as f64);
        let channel = |at: usize| match at < half {
            true => row[at] * angle(at).cos() - row[at + half] * angle(at).sin(),
            false => row[at] * angle(at - half).cos() + row[at - half] * angle(at - half).sin(),
        };
        (0..row.len()).map(channel).collect()
    };
    head.into_iter().enumerate().map(turn).collect()
}

/// What one query head reads, each position of itself and those before it.
fn attend(q: &Matrix, k: &Matrix, v: &Matrix) -> Matrix {
    let read = |position: usize| {
        let score = |key: usize| {
            q[position].iter().zip(&k[key]).map(|(a, b)| a * b).sum::<f64>() / (q[position].len() as f64).sqrt()
        };
        let weights: Vec<f64> = (0..=position).map(|key| score(key).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let channel = |at: usize| weights.iter().zip(v).map(|(weight, value)| weight * value[at]).sum::<f64>() / sum;
        (0..v[0].len()).map(channel).collect()
    };
    (0..q.len()).map(read).collect()
}

/// Key and value heads, each a list of columns, and for each query head the one of each that it reads.
#[derive(Clone)]
struct Plain {
    heads: [Vec<Matrix>; 2],
    maps: [Vec<usize>; 2],
}

impl Plain {
    /// The heads of a layer, query heads shared evenly.
    fn of(weights: &BTreeMap<String, Named>, kv_heads: usize) -> Self {
        let heads = ["k_proj", "v_proj"].map(|name| columns(weights, name).chunks(WIDTH).map(<[_]>::to_vec).collect());
        let map: Vec<usize> = (0..HEADS).map(|head| head * kv_heads / HEADS).collect();
        Self { heads, maps: [map.clone(), map] }
    }

    /// Every head replaced by a sum of heads: `sums[cell][i][j]` of head j in head i.
    fn mixed(&self, sums: [&Matrix; 2]) -> Self {
        let mix = |cell: usize| -> Vec<Matrix> {
            let heads = &self.heads[cell];
            let entry =
                |row: &Vec<f64>, a: usize, b: usize| row.iter().zip(heads).map(|(w, head)| w * head[a][b]).sum();
            let head = |row: &Vec<f64>| (0..WIDTH).map(|a| (0..=D_MODEL).map(|b| entry(row, a, b)).collect()).collect();
            sums[cell].iter().map(head).collect()
        };
        Self { heads: [mix(0), mix(1)], maps: self.maps.clone() }
    }

    /// Query heads read what `groups` says of the head that they read.
    fn regrouped(self, groups: [&[usize]; 2]) -> Self {
        let map = |cell: usize| self.maps[cell].iter().map(|&head| groups[cell][head]).collect();
        Self { maps: [map(0), map(1)], heads: self.heads }
    }

    /// The output of the layer whose queries and output projection are these.
    fn output(&self, x: &Matrix, weights: &BTreeMap<String, Named>) -> Vec<f64> {
        let (queries, out) = (columns(weights, "q_proj"), columns(weights, "o_proj"));
        let read = |head: usize| {
            let q = rotated(project(x, &queries[head * WIDTH..(head + 1) * WIDTH]));
            let k = rotated(project(x, &self.heads[0][self.maps[0][head]]));
            attend(&q, &k, &project(x, &self.heads[1][self.maps[1][head]]))
        };
        let heads: Vec<Matrix> = (0..HEADS).map(read).collect();
        let joined: Matrix = (0..x.len()).map(|at| heads.iter().flat_map(|head| head[at].clone()).collect()).collect();
        project(&joined, &out).concat()
    }

    /// `sum |head - mean of its group|²` over `energy`, of keys and of values.
    fn scatter(&self, groups: [&[usize]; 2], energy: [f64; 2]) -> [f64; 2] {
        let flat = |head: &Matrix| head.concat();
        [0, 1].map(|cell| {
            let heads: Vec<Vec<f64>> = self.heads[cell].iter().map(flat).collect();
            let left = |head: usize| {
                let members: Vec<&Vec<f64>> = (0..heads.len())
                    .filter(|&other| groups[cell][other] == groups[cell][head])
                    .map(|at| &heads[at])
                    .collect();
                let distance = |at: usize| {
                    let mean = members.iter().map(|member| member[at]).sum::<f64>() / members.len() as f64;
                    (heads[head][at] - mean).powi(2)
                };
                (0..heads[head].len()).map(distance).sum::<f64>()
            };
            (0..heads.len()).map(left).sum::<f64>() / energy[cell]
        })
    }

    fn energy(&self) -> [f64; 2] {
        [0, 1].map(|cell| self.heads[cell].iter().flatten().flatten().map(|value| value * value).sum())
    }
}

/// Averages over groups: `[n][n]`, or with `one` a row for each group.
fn averages(groups: &[usize], one: bool) -> Matrix {
    let rows: Vec<usize> = if one { (0..=*groups.iter().max().unwrap()).collect() } else { groups.to_vec() };
    let size = |group: usize| groups.iter().filter(|&&other| other == group).count() as f64;
    let entry = |row: usize, group: usize| if row == group { 1.0 / size(group) } else { 0.0 };
    rows.into_iter().map(|row| groups.iter().map(|&group| entry(row, group)).collect()).collect()
}

fn input() -> Matrix {
    (0..SEQ).map(|at| (0..D_MODEL).map(|i| (at as f64 * 2.3 + i as f64 * 0.9).sin()).collect()).collect()
}

/// What a layer of ours makes of the input.
fn output(layer: &Attention, device: &Device) -> Tensor<1> {
    let x: Vec<f32> = input().concat().into_iter().map(|value| value as f32).collect();
    let x = Tensor::<3>::from_data(TensorData::new(x, [1, SEQ, D_MODEL]), device);
    let (mask, rope) = (Mask::causal(), Rope::new(0..SEQ, WIDTH, THETA, RopeLayout::RotateHalf, device));
    layer.forward(x, Call { rope: Some(&rope), ..Call::new(&mask) }).hidden.reshape([SEQ * D_MODEL])
}

fn numbers(tensor: Tensor<1>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// Of f32 beside f64.
const PLAIN: f64 = 2e-5;

fn close(what: &str, got: &[f64], want: &[f64]) {
    let float = |values: &[f64]| values.iter().map(|&value| value as f32).collect::<Vec<f32>>();
    assert_close(what, &float(got), &float(want), Tolerance::absolute(PLAIN));
}

/// Fails unless numbers are visibly others; where there is a NaN, too.
fn differs(what: &str, a: &[f64], b: &[f64]) {
    let worst = difference(a, b).unwrap_or_else(|problem| panic!("{what}: {problem}")).worst;
    assert!(worst > 100.0 * PLAIN, "{what} must be visible: {worst}");
}

/// For each count of the parent's heads, groups of the keys and values of both layers, by their sizes.
const COUNTS: [(usize, [usize; 4]); 4] = [(6, [4, 2, 3, 5]), (3, [2, 1, 1, 2]), (2, [1, 2, 2, 1]), (1, [1, 1, 1, 1])];

#[test]
fn a_full_budget_is_the_parent_and_fusion_begins_as_it_to_the_bit() {
    for (kv_heads, counts) in COUNTS {
        let parent = parent(kv_heads);
        let whole = decouple(&parent, &Grouping::Budget(1.0), Pool::Mean).unwrap();
        same(&whole, &parent);
        let cost = |model: &Decoder| model.config().costs(11).kv_cache_elements_per_token;
        assert_eq!(cost(&whole), cost(&parent));
        let fusing = begin_fusion(&parent, &Grouping::Each(counts.to_vec())).unwrap();
        logits(&fusing).into_data().assert_eq(&logits(&parent).into_data(), true);
        let back = unfused(&fusing).unwrap();
        let AttentionConfig::Softmax(softmax) = back.config().mechanism(1) else { panic!("softmax") };
        assert_eq!((named(&back), softmax.kv_heads()), (named(&parent), kv_heads));
        let lean = decouple(&parent, &Grouping::Each(counts.to_vec()), Pool::Mean).unwrap();
        assert_eq!(cost(&lean) as usize, counts.iter().sum::<usize>() * WIDTH, "{kv_heads} heads before");
        let left: Vec<f64> = (0..2).flat_map(|layer| plain_scatter(&parent, kv_heads, layer, &fusing)).collect();
        close("scatter", &scatter(&fusing).unwrap(), &left);
    }
    let problem = |share| decouple(&parent(3), &Grouping::Budget(share), Pool::Mean).unwrap_err().to_string();
    assert!(problem(0.2).contains("0.3333"), "a head of three is the least: {}", problem(0.2));
    let problem = decouple(&parent(3), &Grouping::Ward(4), Pool::Mean).unwrap_err().to_string();
    assert!(problem.contains("1 to 3"), "{problem}");
}

/// The groups that a model of ours was given.
fn groups_of(model: &Decoder, layer: usize, kv_heads: usize) -> [Vec<usize>; 2] {
    let AttentionConfig::DecoupledHead(config) = model.config().mechanism(layer).clone() else { panic!("decoupled") };
    [config.key_map, config.value_map].map(|map| map.into_iter().step_by(HEADS / kv_heads).collect())
}

fn plain_scatter(parent: &Decoder, kv_heads: usize, layer: usize, fusing: &Decoder) -> [f64; 2] {
    let plain = Plain::of(&of(&parent.layers[layer].attention), kv_heads);
    let [keys, values] = groups_of(fusing, layer, kv_heads);
    plain.scatter([&keys, &values], plain.energy())
}

#[test]
fn pooled_heads_are_the_plain_form_and_spoilt_forms_are_not() {
    for (kv_heads, counts) in COUNTS {
        let parent = parent(kv_heads);
        let lean = decouple(&parent, &Grouping::Each(counts.to_vec()), Pool::Mean).unwrap();
        for layer in 0..2 {
            let weights = of(&parent.layers[layer].attention);
            let before = Plain::of(&weights, kv_heads);
            close(
                "parent",
                &numbers(output(&parent.layers[layer].attention, &parent.device())),
                &before.output(&input(), &weights),
            );
            let groups = groups_of(&lean, layer, kv_heads);
            let [keys, values] = &groups;
            for (cell, count) in counts[2 * layer..][..2].iter().enumerate() {
                assert_eq!(groups[cell].iter().max().unwrap() + 1, *count);
            }
            let [key_mean, value_mean] = [averages(keys, true), averages(values, true)];
            let pooled = before.mixed([&key_mean, &value_mean]).regrouped([keys, values]);
            let (got, want) =
                (numbers(output(&lean.layers[layer].attention, &lean.device())), pooled.output(&input(), &weights));
            close("pooled", &got, &want);
            if kv_heads == 1 {
                continue; // one head for all: there is nothing to mistake
            }
            differs("pooling", &want, &before.output(&input(), &weights));
            let mut turned = pooled.clone();
            turned.maps.iter_mut().for_each(|map| map.rotate_left(1));
            differs("query heads that share with other neighbours", &got, &turned.output(&input(), &weights));
            let mut swapped = pooled.clone();
            swapped.maps.swap(0, 1);
            if swapped.maps.iter().zip(&swapped.heads).all(|(map, heads)| map.iter().all(|&head| head < heads.len())) {
                differs("maps of keys for values", &got, &swapped.output(&input(), &weights));
            }
        }
        if kv_heads == 1 {
            same(&standard_grouped(&lean).unwrap().unwrap(), &parent);
        }
    }
}

/// Operators that are far from the identity, in every entry, also those between groups.
fn operators(heads: usize, seed: f64) -> Matrix {
    let entry = |i: usize, j: usize| f64::from(u8::from(i == j)) + 0.4 * (seed + 1.3 * i as f64 + 0.7 * j as f64).sin();
    (0..heads).map(|i| (0..heads).map(|j| entry(i, j)).collect()).collect()
}

#[test]
fn fusion_of_grouped_queries_is_the_plain_form_in_outputs_gradients_and_collapse() {
    for (kv_heads, counts) in [(3, [2, 1, 1, 2]), (6, [4, 2, 3, 5])] {
        let parent = parent(kv_heads);
        let fusing = begin_fusion(&parent, &Grouping::Each(counts.to_vec())).unwrap();
        for layer in 0..2 {
            let device = Device::flex().autodiff();
            let groups = groups_of(&fusing, layer, kv_heads);
            let [keys, values] = &groups;
            let omega = [0.3, 1.1].map(|seed| operators(kv_heads, seed));
            let mut tensors = of(&fusing.layers[layer].attention);
            for (name, omega) in ["key_operator", "value_operator"].iter().zip(&omega) {
                let tensor = tensors.get_mut(&format!("fusion.{name}")).unwrap();
                tensor.values = omega.concat().iter().map(|&value| value as f32).collect();
            }
            let fresh = fusing.config().mechanism(layer).init(&dims(&fusing, layer), &device);
            let ours = load(fresh, tensors.clone()).unwrap();
            let before = Plain::of(&tensors, kv_heads);
            let within = |omega: &Matrix, groups: &[usize]| -> Matrix {
                let entry = |i: usize, j: usize| if groups[i] == groups[j] { omega[i][j] } else { 0.0 };
                (0..kv_heads).map(|i| (0..kv_heads).map(|j| entry(i, j)).collect()).collect()
            };
            let cotangent = |at: usize| (at as f64 * 0.37).cos();
            let loss = |omega: &[Matrix; 2]| -> f64 {
                let mixed = before.mixed([&within(&omega[0], keys), &within(&omega[1], values)]);
                mixed.output(&input(), &tensors).iter().enumerate().map(|(at, value)| value * cotangent(at)).sum()
            };
            let mixed = before.mixed([&within(&omega[0], keys), &within(&omega[1], values)]);
            let got = output(&ours, &device);
            close("fusing", &numbers(got.clone()), &mixed.output(&input(), &tensors));
            differs("groups", &numbers(got.clone()), &before.mixed([&omega[0], &omega[1]]).output(&input(), &tensors));
            let left = ours.scatter().unwrap().map(|cell| numbers(cell)[0]);
            close("scatter", &left, &mixed.scatter([keys, values], before.energy()));

            // Gradients of the operators, by differences of the plain form.
            let weights: Vec<f32> = (0..SEQ * D_MODEL).map(|at| cotangent(at) as f32).collect();
            let weights = Tensor::<1>::from_floats(&weights[..], &device);
            let found = (got * weights).sum().backward();
            let Attention::DecoupledHead(heads) = &ours else { panic!("decoupled") };
            let fusion = heads.fusion.as_ref().unwrap();
            for (cell, operator) in [&fusion.key_operator, &fusion.value_operator].into_iter().enumerate() {
                let slope = |at: usize| {
                    let moved = |by: f64| {
                        let mut omega = omega.clone();
                        omega[cell][at / kv_heads][at % kv_heads] += by;
                        loss(&omega)
                    };
                    (moved(1e-5) - moved(-1e-5)) / 2e-5
                };
                let want: Vec<f64> = (0..kv_heads * kv_heads).map(slope).collect();
                let got = numbers(operator.val().grad(&found).unwrap());
                let most = want.iter().fold(1.0, |most: f64, value| most.max(value.abs()));
                close(
                    "gradient of an operator",
                    &got.iter().map(|x| x / most).collect::<Vec<_>>(),
                    &want.iter().map(|x| x / most).collect::<Vec<_>>(),
                );
                differs("gradient", &got, &vec![0.0; got.len()]);
            }
        }
        // What becomes single heads is the mean of the rows of the operators; annealed, that changes nothing.
        let mut annealed = fusing.clone();
        annealed.layers.iter_mut().for_each(|layer| layer.attention = moved(&layer.attention));
        annealed.layers.iter_mut().for_each(|layer| layer.attention.set_anneal(1.0));
        assert!(scatter(&annealed).unwrap().into_iter().all(|cell| cell < 1e-9));
        let collapsed = collapse(&annealed).unwrap();
        same(&collapsed, &annealed);
        differs("fusion", &numbers(logits(&collapsed).reshape([-1])), &numbers(logits(&parent).reshape([-1])));
        let cached = collapsed.config().costs(11).kv_cache_elements_per_token as usize;
        assert_eq!(cached, counts.iter().sum::<usize>() * WIDTH);
    }
}

fn dims(model: &Decoder, layer: usize) -> polyhead_attention::Dims {
    model.config().dims(layer)
}

/// A fusing layer whose operators have moved.
fn moved(layer: &Attention) -> Attention {
    let Attention::DecoupledHead(mut heads) = layer.clone() else { panic!("decoupled") };
    let fusion = heads.fusion.as_mut().unwrap();
    for (seed, operator) in [&mut fusion.key_operator, &mut fusion.value_operator].into_iter().enumerate() {
        let n = operator.dims()[0].isqrt();
        let values: Vec<f32> = operators(n, seed as f64).concat().iter().map(|&value| value as f32).collect();
        *operator = Param::from_tensor(Tensor::from_floats(&values[..], &operator.val().device()));
    }
    Attention::DecoupledHead(heads)
}

#[test]
fn grouped_queries_become_any_other_number_of_groups() {
    // For each pair of counts, of which of the old heads, and how much of each, every new one is.
    let cases: [(usize, usize, &[&[f64]]); 6] = [
        (3, 2, &[&[2.0 / 3.0, 1.0 / 3.0, 0.0], &[0.0, 1.0 / 3.0, 2.0 / 3.0]]),
        (2, 3, &[&[1.0, 0.0], &[0.5, 0.5], &[0.0, 1.0]]),
        (3, 1, &[&[1.0 / 3.0; 3]]),
        (6, 2, &[&[1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 0.0, 0.0, 0.0], &[0.0, 0.0, 0.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0]]),
        (1, 3, &[&[1.0], &[1.0], &[1.0]]),
        (3, 3, &[&[1.0, 0.0, 0.0], &[0.0, 1.0, 0.0], &[0.0, 0.0, 1.0]]),
    ];
    for (before, after, sums) in cases {
        let parent = parent(before);
        let grouped = group_queries(&parent, after, Pool::Mean).unwrap();
        let sums: Matrix = sums.iter().map(|row| row.to_vec()).collect();
        for layer in 0..2 {
            let weights = of(&parent.layers[layer].attention);
            let mut plain = Plain::of(&weights, before).mixed([&sums, &sums]);
            plain.maps = [0, 1].map(|_| (0..HEADS).map(|head| head * after / HEADS).collect());
            let got = numbers(output(&grouped.layers[layer].attention, &grouped.device()));
            close("grouped", &got, &plain.output(&input(), &weights));
        }
        if after % before == 0 {
            logits(&grouped).into_data().assert_eq(&logits(&parent).into_data(), true);
        }
    }
    for pool in [Pool::Mean, Pool::First, Pool::NormRestoring] {
        let more = group_queries(&parent(2), 6, pool).unwrap();
        same(&more, &parent(2));
        same(&group_queries(&more, 2, pool).unwrap(), &parent(2));
    }
    let problem = group_queries(&parent(3), 4, Pool::Mean).unwrap_err().to_string();
    assert!(problem.contains("must divide the 6 query heads"), "{problem}");
}

#[test]
fn windows_stay_where_grouped_queries_are_pooled() {
    let softmax =
        serde_json::json!({ "n_heads": 4, "n_kv_heads": 2, "window": [3, 0], "softcap": 5.0, "qk_norm": true });
    let config = serde_json::json!({ "d_model": 16, "n_layers": 2, "attention": { "softmax": softmax } });
    let parent = wave(&serde_json::from_value::<DecoderConfig>(config).unwrap());
    let more = group_queries(&parent, 4, Pool::Mean).unwrap();
    same(&more, &parent);
    same(&group_queries(&more, 2, Pool::Mean).unwrap(), &parent);
    let problem = decouple(&parent, &Grouping::Ward(1), Pool::Mean).unwrap_err().to_string();
    assert!(problem.contains("softcap") && problem.contains("grouped_query"), "{problem}");
}

#[test]
fn windows_and_norms_of_heads_stay_where_heads_are_decoupled() {
    let parent = |more: serde_json::Value| {
        let mut softmax = serde_json::json!({ "n_heads": 4, "n_kv_heads": 2, "qkv_bias": true });
        softmax.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let config = serde_json::json!({ "d_model": 16, "n_layers": 2, "attention": { "softmax": softmax } });
        wave(&serde_json::from_value::<DecoderConfig>(config).unwrap())
    };
    for more in [
        serde_json::json!({ "window": [3, 0] }),
        serde_json::json!({ "qk_norm": true }),
        serde_json::json!({ "window": 2, "qk_norm": true }),
    ] {
        let parent = parent(more);
        // The whole budget is the parent, whatever route leads there, and back.
        let whole = decouple(&parent, &Grouping::Budget(1.0), Pool::Mean).unwrap();
        same(&whole, &parent);
        same(&standard_grouped(&whole).unwrap().unwrap(), &parent);
        same(&expanded(&whole).unwrap(), &parent);
        // One key and one value head: pooled is what fusing all the way gives, with the norm behind it.
        let grouping = Grouping::Ward(1);
        let mut fusing = begin_fusion(&parent, &grouping).unwrap();
        logits(&fusing).into_data().assert_eq(&logits(&parent).into_data(), true);
        assert_eq!(named(&unfused(&fusing).unwrap()), named(&parent));
        fusing.layers.iter_mut().for_each(|layer| layer.attention.set_anneal(1.0));
        let collapsed = collapse(&fusing).unwrap();
        same(&collapsed, &fusing);
        same(&collapsed, &decouple(&parent, &grouping, Pool::Mean).unwrap());
        assert!(difference_of(&collapsed, &parent) > 1e-3, "fusing must be visible");
    }
}

fn difference_of(a: &Decoder, b: &Decoder) -> f64 {
    polyhead_kernels::comparison::largest_difference(logits(a), logits(b))
}
