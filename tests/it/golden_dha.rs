//! Decoupled-head attention against an independent reference (`tests/golden/dha`): layers, fusion, collapse, search.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::{
    Attention, AttentionConfig, Call, DecoupledHeadConfig, Dims, Mask, Rope, RopeLayout, SoftmaxConfig,
};
use polyhead_models::surgery::{Heads, Pool, allocate, allocate_by_need, labels_after};
use polyhead_models::weights::{Named, load};
use polyhead_training::fusion;

use crate::golden::{Golden, compare, dot, files, gradients, size, values};

const OUTPUT: f32 = 2e-5;
const GRADIENT: f32 = 1e-4;
/// Of similarities and costs, which the reference computes in f32 and we in f64.
const SIMILARITY: f32 = 1e-5;

struct Case {
    golden: Golden,
    device: Device,
}

impl Case {
    fn named(&self, key: &str) -> &Named {
        self.golden.tensors.get(key).unwrap_or_else(|| panic!("{}: no {key}", self.golden.name))
    }

    fn number(&self, key: &str) -> f64 {
        f64::from(self.named(key).values[0])
    }

    fn numbers(&self, key: &str) -> Vec<usize> {
        self.named(key).values.iter().map(|&value| value as usize).collect()
    }

    fn tensor(&self, key: &str) -> Tensor<3> {
        let named = self.named(key);
        Tensor::from_data(TensorData::new(named.values.clone(), named.shape.clone()), &self.device)
    }

    /// `[out, in]` of the file as our `[in, out]`.
    fn ours(&self, key: &str) -> Named {
        let named = self.named(key);
        let [rows, columns] = named.shape[..] else { panic!("{key} is no matrix") };
        let values = (0..rows * columns).map(|i| named.values[i % rows * columns + i / rows]).collect();
        Named { name: key.into(), shape: vec![columns, rows], values }
    }

    fn heads(&self, key: &str) -> Heads {
        Heads::of(&self.ours(key), None, size(&self.golden.config, "num_heads"))
    }

    fn decoupled(&self, fusing: bool) -> AttentionConfig {
        AttentionConfig::DecoupledHead(DecoupledHeadConfig {
            n_heads: size(&self.golden.config, "num_heads"),
            head_dim: Some(size(&self.golden.config, "head_dim")),
            key_map: self.numbers("group.k"),
            value_map: self.numbers("group.v"),
            fusing,
            ..DecoupledHeadConfig::default()
        })
    }

    /// A layer with the file's queries and outputs, and the keys and values of these names.
    fn layer(&self, config: &AttentionConfig, keys: &str, values: &str, more: Vec<Named>) -> Attention {
        let d_model = size(&self.golden.config, "d_model");
        let dims = Dims { d_model, n_layers: 1, layer: 0, rope: true, norm_eps: 1e-5, grid: None };
        config.validate(&dims).unwrap_or_else(|error| panic!("{}: {error}", self.golden.name));
        let projections = [("q_proj", "w.q"), ("k_proj", keys), ("v_proj", values), ("o_proj", "w.o")];
        let projections =
            projections.map(|(ours, theirs)| Named { name: format!("{ours}.weight"), ..self.ours(theirs) });
        let tensors: BTreeMap<String, Named> =
            projections.into_iter().chain(more).map(|tensor| (tensor.name.clone(), tensor)).collect();
        load(config.init(&dims, &self.device), tensors).unwrap_or_else(|error| panic!("{}: {error}", self.golden.name))
    }

    /// The fusing layer with these operators.
    fn fusing(&self, operators: [Vec<f32>; 2]) -> Attention {
        let vector =
            |name: &str, values: Vec<f32>| Named { name: format!("fusion.{name}"), shape: vec![values.len()], values };
        let [keys, values] = operators;
        let energy = [("Z.k", "w.k"), ("Z.v", "w.v")].map(|(key, weight)| {
            let weight = &self.named(weight).values;
            self.close(key, &[dot(weight, weight)], SIMILARITY, true);
            self.named(key).values[0]
        });
        let fusion = vec![
            vector("key_operator", keys),
            vector("value_operator", values),
            vector("anneal", vec![0.0]),
            vector("energy", energy.to_vec()),
        ];
        self.layer(&self.decoupled(true), "w.k", "w.v", fusion)
    }

    fn attend(&self, layer: &Attention, x: Tensor<3>) -> polyhead_attention::Attended {
        let config = &self.golden.config;
        let theta = config["rope_theta"].as_f64().unwrap();
        let (seq, width) = (size(config, "tokens"), size(config, "head_dim"));
        let rope = Rope::new(0..seq, width, theta, RopeLayout::RotateHalf, &self.device);
        let mask = Mask::causal();
        layer.forward(x, Call { rope: Some(&rope), ..Call::new(&mask) })
    }

    fn close(&self, key: &str, got: &[f32], tolerance: f32, relative: bool) {
        compare(&self.golden.name, key, &self.named(key).values, got, tolerance, relative);
    }

    /// The sum of products of an output with the cotangent is the file's; gives what it is, and how exact it is in f32.
    fn loss(&self, key: &str, out: &[f32]) -> [f32; 2] {
        let cotangent = &self.named("cotangent").values;
        let terms: f32 = out.iter().zip(cotangent).map(|(a, b)| (a * b).abs()).sum();
        let loss = dot(out, cotangent);
        self.close(key, &[loss], OUTPUT * terms, false);
        [loss, OUTPUT * terms]
    }

    /// Gradients of a layer's projections and of its input.
    fn gradients_close(&self, prefix: &str, layer: &Attention, x: &Tensor<3>, grads: &burn::tensor::Gradients) {
        self.close(&format!("{prefix}.x"), &values(x.grad(grads).unwrap()), GRADIENT, true);
        let found = gradients(layer, grads);
        for (ours, theirs) in [("q_proj", "w.q"), ("k_proj", "w.k"), ("v_proj", "w.v"), ("o_proj", "w.o")] {
            let key = format!("{prefix}.{theirs}");
            let want = self.ours(&key).values;
            compare(&self.golden.name, &key, &want, &found[&format!("{ours}.weight")], GRADIENT, true);
        }
        for (ours, theirs) in [("key_operator", "omega.k"), ("value_operator", "omega.v")] {
            if let Some(found) = found.get(&format!("fusion.{ours}")) {
                self.close(&format!("{prefix}.{theirs}"), found, GRADIENT, true);
            }
        }
    }
}

#[test]
fn golden_dha() {
    for golden in files("dha") {
        let case = Case { golden, device: Device::flex().autodiff() };
        let config = &case.golden.config;
        config.is("causal", true);
        config.is("rope_layout", "rotate_half (HF)");
        for (key, map) in [("key_heads", "group.k"), ("value_heads", "group.v")] {
            let heads = case.numbers(map).into_iter().collect::<BTreeSet<_>>().len();
            assert_eq!(heads, size(config, key), "{}: {key}", case.golden.name);
        }
        assert_eq!(case.tensor("x").dims(), ["batch", "tokens", "d_model"].map(|key| size(config, key)));
        check_layers(&case);
        check_heads(&case);
    }
}

fn identity(n: usize) -> Vec<f32> {
    (0..n * n).map(|at| f32::from(u8::from(at / n == at % n))).collect()
}

fn check_layers(case: &Case) {
    let n = size(&case.golden.config, "num_heads");
    let x = || case.tensor("x").require_grad();
    let head_dim = Some(size(&case.golden.config, "head_dim"));
    let softmax = SoftmaxConfig { n_heads: n, head_dim, ..SoftmaxConfig::default() };
    let parent = case.layer(&AttentionConfig::Softmax(softmax), "w.k", "w.v", Vec::new());
    let out = case.attend(&parent, x()).hidden;
    case.close("mha.out", &values(out.clone()), OUTPUT, false);

    // Operators that are the identity are the parent, to the bit.
    let start = case.attend(&case.fusing([identity(n), identity(n)]), x());
    start.hidden.into_data().assert_eq(&out.into_data(), true);
    case.close("fusion.loss0", &values(start.penalty.unwrap()), OUTPUT, false);

    let operators = ["omega.k", "omega.v"].map(|key| case.named(key).values.clone());
    let layer = case.fusing(operators);
    let input = x();
    let attended = case.attend(&layer, input.clone());
    let scatter = attended.penalty.unwrap();
    case.close("fusion.out", &values(attended.hidden.clone()), OUTPUT, false);
    case.close("fusion.loss", &values(scatter.clone()), OUTPUT, false);

    let config = &case.golden.config;
    let number = |key: &str| config[key].as_f64().unwrap();
    let target = fusion::target(case.number("fusion.loss0"), number("step"), number("target_warmup"));
    case.close("fusion.target", &[target as f32], OUTPUT, false);
    let excess = f64::from(scatter.clone().into_scalar::<f32>()) - target;
    let multipliers = ["lambda1", "lambda2"].map(number);
    for (key, multiplier) in ["fusion.lambda1", "fusion.lambda2"].into_iter().zip(multipliers) {
        case.close(key, &[multiplier as f32], SIMILARITY, false);
    }
    let lagrangian = multipliers[0] * excess + multipliers[1] * excess * excess;
    case.close("fusion.lagrangian", &[lagrangian as f32], OUTPUT, false);
    case.close("fusion.grad.lambda1", &[excess as f32], OUTPUT, false);
    // A square moves by twice its root times what the root moves by.
    case.close("fusion.grad.lambda2", &[(excess * excess) as f32], OUTPUT * 0.1 * (2.0 * excess.abs()) as f32, false);

    let task = (attended.hidden.clone() * case.tensor("cotangent")).sum();
    let [of_task, tolerance] = case.loss("fusion.task", &values(attended.hidden));
    case.close("fusion.total", &[of_task + lagrangian as f32], tolerance, false);
    let slope = fusion::slope(multipliers, excess);
    case.gradients_close("fusion.grad", &layer, &input, &(task + scatter * slope).backward());
    let Attention::DecoupledHead(heads) = &layer else { panic!("decoupled") };
    let [keys, of_values] = heads.scatter().unwrap();
    case.close("fusion.loss_k", &values(keys.clone()), OUTPUT, false);
    case.close("fusion.loss_v", &values(of_values), OUTPUT, false);
    let found = keys.backward();
    let operator = heads.fusion.as_ref().unwrap().key_operator.val().grad(&found).unwrap();
    case.close("fusion.only.grad.omega.k", &values(operator), GRADIENT, true);
    let want = case.ours("fusion.only.grad.w.k").values;
    let got = values(heads.k_proj.weight.val().grad(&found).unwrap());
    compare(&case.golden.name, "fusion.only.grad.w.k", &want, &got, GRADIENT, true);

    let layer = case.layer(&case.decoupled(false), "collapse.w.k", "collapse.w.v", Vec::new());
    let input = x();
    let out = case.attend(&layer, input.clone()).hidden;
    case.close("dha.out", &values(out.clone()), OUTPUT, false);
    case.loss("dha.loss", &values(out.clone()));
    case.gradients_close("dha.grad", &layer, &input, &(out * case.tensor("cotangent")).sum().backward());
}

fn check_heads(case: &Case) {
    let n = size(&case.golden.config, "num_heads");
    let close = |key: &str, heads: Heads, tolerance: f32| {
        compare(&case.golden.name, key, &case.ours(key).values, &heads.projection().0.values, tolerance, false);
    };
    for (cell, weight) in [("k", "w.k"), ("v", "w.v")] {
        let labels = case.numbers(&format!("group.{cell}"));
        let operator: Vec<f64> = case.named(&format!("omega.{cell}")).values.iter().map(|&x| f64::from(x)).collect();
        close(&format!("collapse.w.{cell}"), case.heads(weight).collapsed(&labels, &operator), SIMILARITY);
        close(&format!("pool.w.{cell}"), case.heads(weight).pooled(&labels, Pool::Mean), SIMILARITY);
    }
    let cells = case.golden.config["cells"].as_array().unwrap().clone();
    let budget = size(&case.golden.config, "search_budget");
    let mut merges = Vec::new();
    for cell in &cells {
        let key = |part: &str| format!("search.{}.{part}", cell.as_str().unwrap());
        let heads = case.heads(&key("w"));
        let floats = |values: Vec<f64>| values.into_iter().map(|x| x as f32).collect::<Vec<f32>>();
        case.close(&key("cka"), &floats(heads.cka()), SIMILARITY, false);
        case.close(&key("cos"), &floats(heads.cosine()), SIMILARITY, false);
        let found = heads.agglomerate();
        case.close(&key("merge_cost"), &floats(found.iter().map(|merge| merge.cost).collect()), SIMILARITY, false);
        let pairs: Vec<usize> = found.iter().flat_map(|merge| [merge.a, merge.b]).collect();
        assert_eq!(pairs, case.numbers(&key("merge_ab")), "{}: {}", case.golden.name, key("merge_ab"));
        merges.push(found);
    }
    let counts = allocate(&merges, budget);
    assert_eq!(counts, case.numbers("search.alloc_global"), "{}", case.golden.name);
    for ((cell, count), merges) in cells.iter().zip(counts).zip(&merges) {
        let key = format!("search.{}.labels", cell.as_str().unwrap());
        assert_eq!(labels_after(n, &merges[..n - count]), case.numbers(&key), "{}: {key}", case.golden.name);
    }
    let need: Vec<f64> = case.named("search.scores").values.iter().map(|&x| f64::from(x)).collect();
    let counts = allocate_by_need(&need, n, budget);
    assert_eq!(counts, case.numbers("search.alloc_proportional"), "{}", case.golden.name);
}

#[test]
fn need_beyond_all_heads_is_shared_by_the_others() {
    assert_eq!(allocate_by_need(&[100.0, 1.0, 1.0], 4, 8), [4, 2, 2]);
    assert_eq!(allocate_by_need(&[0.0, 0.0], 4, 5), [3, 2]);
    assert_eq!(allocate_by_need(&[1.0, 2.0], 3, 6), [3, 3]);
    assert_eq!(allocate_by_need(&[1.0, 2.0], 3, 2), [1, 1]);
}
