//! The authors' code, run on three small models (tests/golden/focusft): every number that a step has.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor, TensorData};
use polyhead_kernels::comparison::{Tolerance, assert_close};
use polyhead_models::weights::{self, Named};
use polyhead_models::{DecoderConfig, IGNORE, Role};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::*;
use crate::engagement;

/// Of losses and logits, absolute.
const LOSS: f64 = 2e-6;
const LOGITS: f64 = 2e-5;
/// Of gradients, relative to the largest entry, and absolute.
const GRADIENT: (f64, f64) = (5e-6, 1e-6);
/// Of fast weights, relative to the largest entry.
const FAST: (f64, f64) = (5e-6, 0.0);
/// Of the gradient through the inner loop, relative to the norm of the whole gradient.
const SECOND_ORDER: f64 = 1e-4;
/// Of means of attention weights, absolute.
const ATTENTION: f64 = 1e-6;

type Tensors = BTreeMap<String, Named>;

fn read(name: &str) -> Tensors {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/focusft").join(name);
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let named = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let data = view.data();
        let values: Vec<f32> = match view.dtype() {
            Dtype::F32 => data.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect(),
            Dtype::I64 => data.as_chunks::<8>().0.iter().map(|&x| i64::from_le_bytes(x) as f32).collect(),
            Dtype::U8 => data.iter().map(|&x| f32::from(x)).collect(),
            other => panic!("{name}: {other:?}"),
        };
        (name.clone(), Named { name, shape: view.shape().to_vec(), values })
    };
    file.tensors().into_iter().map(named).collect()
}

fn describe(name: &str) -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/focusft").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The batch that attention and loss masks describe. Padding is a document of its own.
fn batch(tokens: Vec<u32>, attention: &[f32], loss: &[f32], seq: usize) -> Batch {
    let target = |at: usize| match (at + 1) % seq {
        0 => IGNORE,
        _ if loss[at + 1] == 1.0 => i64::from(tokens[at + 1]),
        _ => IGNORE,
    };
    let role = |(&real, &learnt): (&f32, &f32)| match (real == 1.0, learnt == 1.0) {
        (false, _) => Role::Padding,
        (true, true) => Role::Assistant,
        (true, false) => Role::User,
    };
    Batch {
        batch: tokens.len() / seq,
        seq,
        targets: (0..tokens.len()).map(target).collect(),
        documents: Some(attention.iter().map(|&real| 1 - real as u32).collect()),
        roles: Some(attention.iter().zip(loss).map(role).collect()),
        tokens,
        target_bytes: 0,
    }
}

struct Case {
    name: &'static str,
    model: Decoder,
    batch: Batch,
    config: BilevelConfig,
    file: Tensors,
    json: Value,
}

impl Case {
    fn open(name: &'static str) -> Self {
        let (file, json) = (read(&format!("{name}.safetensors")), describe(&format!("{name}.json")));
        let config = &json["config"];
        let qwen = config["family"] == "qwen2";
        let decoder: DecoderConfig = serde_json::from_value(json!({
            "d_model": config["hidden_size"], "n_layers": config["num_hidden_layers"],
            "d_ff": config["intermediate_size"], "rope_theta": config["rope_theta"],
            "norm_eps": config["rms_norm_eps"], "tie_embeddings": config["tie_word_embeddings"],
            "attention": { "softmax": { "n_heads": config["num_attention_heads"],
                "n_kv_heads": config["num_key_value_heads"], "qkv_bias": qwen } },
        }))
        .unwrap();
        let memory = &config["memory"];
        let targets: Vec<String> =
            memory["inner_target_modules"].as_str().unwrap().split(',').map(Into::into).collect();
        let config = BilevelConfig {
            inner_steps: memory["num_inner_steps"].as_u64().unwrap() as usize,
            inner_lr: memory["inner_lr"].as_f64().unwrap(),
            inner_clip: memory["inner_grad_clip"].as_f64().unwrap(),
            sync: memory["sync_inner"].as_bool().unwrap(),
            rank: memory["inner_rank"].as_u64().unwrap() as usize,
            alpha: memory["inner_alpha"].as_f64().unwrap(),
            targets,
            layer_fraction: memory["inner_layer_fraction"].as_f64().unwrap(),
            clip_includes_fast: true,
            ..BilevelConfig::default()
        };
        assert_eq!(config.first_layer(decoder.n_layers) as u64, json["start_layer"].as_u64().unwrap(), "{name}");
        let device = Device::flex().autodiff();
        let stored = file.iter().filter_map(|(key, tensor)| Some(ours(key.strip_prefix("weights/")?, tensor)));
        let stored = stored.map(|tensor| (tensor.name.clone(), tensor)).collect();
        let model = weights::load(decoder.init(64, &device), stored).unwrap();
        let ids = &file["input/input_ids"];
        let tokens = ids.values.iter().map(|&id| id as u32).collect();
        let masks = ["input/attention_mask", "input/loss_mask"].map(|key| &file[key].values);
        let batch = batch(tokens, masks[0], masks[1], ids.shape[1]);
        Self { name, model, batch, config, file, json }
    }

    /// The authors' fast weights before step `k`; B is zero in the first.
    fn fast(&self, k: usize) -> FastWeights {
        self.pairs(&format!("fast/{k}/"), self.config.fresh(&self.model, 0, 0).unwrap())
    }

    /// `like` with the tensors of the file that begin with `prefix`; those that are not there stay.
    fn pairs(&self, prefix: &str, mut like: FastWeights) -> FastWeights {
        for (layer, adapters) in like.0.iter_mut().enumerate() {
            for adapter in adapters {
                let part = if adapter.projection.starts_with(['q', 'k', 'v', 'o']) { "self_attn" } else { "mlp" };
                let key = format!("{prefix}model.layers.{layer}.{part}.{}", adapter.projection);
                for (tensor, letter) in [(&mut adapter.a, 'A'), (&mut adapter.b, 'B')] {
                    if let Some(stored) = self.file.get(&format!("{key}.{letter}")) {
                        let Named { shape, values, .. } = transposed(stored);
                        *tensor = Tensor::from_data(TensorData::new(values, shape), &tensor.device());
                    }
                }
            }
        }
        like
    }

    fn adapted(&self) -> Adapted {
        adapt(&self.model, &self.batch, &self.config, self.fast(0))
    }

    /// The step's gradients by our names, and those of the fast weights.
    fn gradients(&self, adapted: &Adapted, config: BilevelConfig) -> (BTreeMap<String, Vec<f32>>, FastWeights) {
        let training = serde_json::from_value(json!({ "steps": 1, "seq_len": 1, "batch_size": 1 })).unwrap();
        let bilevel = Bilevel::new(config, Optimizer::new(Default::default()), &training);
        let (mut step, mut beside) = (Step::over(std::slice::from_ref(&self.batch)), FastWeights::default());
        bilevel.batch(&self.model, &self.batch, adapted, &mut step, &mut beside);
        struct Collect<'a>(weights::Path, &'a burn::optim::GradientsParams, BTreeMap<String, Vec<f32>>);
        impl ModuleVisitor for Collect<'_> {
            fn enter_module(&mut self, name: &str, container: &str) {
                self.0.enter(name, container);
            }
            fn exit_module(&mut self, _name: &str, container: &str) {
                self.0.exit(container);
            }
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.2.insert(self.0.name(), values(self.1.get::<D>(param.id).unwrap()));
            }
        }
        let grads = step.gradients();
        let mut collect = Collect(weights::Path::default(), &grads, BTreeMap::new());
        self.model.visit(&mut collect);
        (collect.2, beside)
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn transposed(tensor: &Named) -> Named {
    let [rows, columns] = tensor.shape[..] else { return tensor.clone() };
    let values = (0..rows * columns).map(|i| tensor.values[i % rows * columns + i / rows]).collect();
    Named { name: tensor.name.clone(), shape: vec![columns, rows], values }
}

/// A tensor of Hugging Face's under our name and in our layout.
fn ours(key: &str, tensor: &Named) -> Named {
    let tensor = if key.contains("embed") { tensor.clone() } else { transposed(tensor) };
    let name = key
        .replace("model.embed_tokens", "embedding")
        .replace("lm_head", "head")
        .replace("model.", "")
        .replace("input_layernorm", "attention_norm")
        .replace("post_attention_layernorm", "mlp_norm")
        .replace("self_attn", "attention");
    Named { name, ..tensor }
}

fn compare(what: &str, want: &[f32], got: &[f32], (relative, absolute): (f64, f64)) {
    assert_close(what, got, want, Tolerance::relative(relative).plus(absolute));
}

fn compare_pairs(what: &str, want: &FastWeights, got: &FastWeights, tolerance: (f64, f64)) {
    assert_eq!(want.tensors().count(), got.tensors().count());
    assert!(want.tensors().count() > 0);
    for (want, got) in want.tensors().zip(got.tensors()) {
        compare(what, &values(want.clone()), &values(got.clone()), tolerance);
    }
}

const CASES: [&str; 3] = ["case1_qwen2_defaults", "case2_llama_3steps_clip", "case3_qwen2_sync_attn_targets"];

#[test]
fn inner_steps_are_the_authors() {
    for case in CASES.map(Case::open) {
        let adapted = case.adapted();
        let losses: Vec<f32> = adapted.steps.iter().map(|step| step.loss as f32).collect();
        compare(case.name, &case.file["inner/losses"].values, &losses, (0.0, LOSS));
        for (k, step) in adapted.steps.iter().enumerate() {
            let slopes = step.slopes.clone().unwrap();
            let want = case.pairs(&format!("inner/{k}/grad/"), slopes.clone());
            compare_pairs(&format!("{}: gradients of step {k}", case.name), &want, &slopes, GRADIENT);
            let (want, got) = (case.fast(k + 1), &adapted.trajectory[k + 1]);
            compare_pairs(&format!("{}: fast weights after step {k}", case.name), &want, got, FAST);
        }
        let clipped = case.json["inner_clipped_tensors_per_step"].as_array().unwrap();
        for (step, names) in adapted.steps.iter().zip(clipped) {
            let ours = step.factors.iter().filter(|factor| (*factor).clone().into_scalar::<f32>() < 1.0).count();
            let all = if case.config.sync { step.factors.len() } else { names.as_array().unwrap().len() };
            assert_eq!(ours, all, "{}", case.name);
        }
    }
}

#[test]
fn outer_gradients_are_the_authors() {
    for case in CASES.map(Case::open) {
        let adapted = case.adapted();
        let (grads, beside) = case.gradients(&adapted, case.config.clone());
        let expected: Vec<&String> = case.file.keys().filter(|key| key.starts_with("outer/grad/")).collect();
        assert_eq!(expected.len(), grads.len(), "{}: as many gradients as parameters", case.name);
        for key in expected {
            let want = ours(&key["outer/grad/".len()..], &case.file[key]);
            compare(&format!("{}: {key}", case.name), &want.values, &grads[&want.name], GRADIENT);
        }
        let want = case.pairs("outer/fast_grad/", beside.clone());
        compare_pairs(&format!("{}: outer gradients of fast weights", case.name), &want, &beside, GRADIENT);
        // What the authors' trainer clips by.
        let square: f32 = beside.square().unwrap().into_scalar();
        let fast = case.json["outer_grad_norm_fast_only"].as_f64().unwrap();
        assert!((f64::from(square.sqrt()) / fast - 1.0).abs() < 1e-5, "{}", case.name);
    }
}

#[test]
fn outer_loss_and_logits_are_the_authors() {
    for case in CASES.map(Case::open) {
        let plain = case.model.valid();
        let (adapted, batch) = (case.adapted(), &case.batch);
        let targets = batch.target_tokens() as f32;
        let real: Vec<bool> = case.file["input/attention_mask"].values.iter().map(|&a| a == 1.0).collect();
        let valid = |logits: &[f32]| -> Vec<f32> {
            logits.chunks(64).zip(&real).filter(|(_, real)| **real).flat_map(|(row, _)| row.to_vec()).collect()
        };
        for (context, fast, loss, logits) in [
            (ContextMask::Bidirectional, &adapted.last().0[..], "outer/loss", Some("outer/logits")),
            (ContextMask::Bidirectional, &[], "base/loss_bidir_nofast", Some("base/logits_bidir_nofast")),
            (ContextMask::Causal, &[], "base/loss_causal_nofast", None),
        ] {
            let mask = batch.mask(context);
            let hidden = plain.pass(plain.tokens(batch), Pass { adapters: fast, ..Pass::new(&mask) }).hidden;
            let sum: f32 = plain.predict(batch, hidden.clone()).sum.into_scalar();
            compare(&format!("{}: {loss}", case.name), &case.file[loss].values, &[sum / targets], (0.0, LOSS));
            if let Some(key) = logits {
                let (want, got) = (valid(&case.file[key].values), valid(&values(plain.logits(hidden))));
                compare(&format!("{}: {key}", case.name), &want, &got, (0.0, LOGITS));
            }
        }
    }
}

#[test]
fn the_gradient_through_the_inner_loop_is_the_reference() {
    for case in CASES.map(Case::open) {
        let config = BilevelConfig { second_order: true, ..case.config.clone() };
        let (grads, _) = case.gradients(&case.adapted(), config);
        let (mut square, mut all, mut first_order) = (0.0, 0.0, 0.0);
        let sum = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        for key in case.file.keys().filter(|key| key.starts_with("ref_second_order/grad/")) {
            let name = &key["ref_second_order/grad/".len()..];
            let want = ours(name, &case.file[key]);
            square += sum(&want.values, &grads[&want.name]);
            all += sum(&want.values, &vec![0.0; want.values.len()]);
            first_order += sum(&want.values, &ours(name, &case.file[&format!("outer/grad/{name}")]).values);
        }
        let off = (square / all).sqrt();
        assert!(off < SECOND_ORDER, "{}: off by {off}", case.name);
        assert!((first_order / all).sqrt() > 0.05, "the first-order gradient is another one");
    }
}

#[test]
fn masses_of_attention_are_the_references() {
    for case in CASES.map(Case::open) {
        let adapted = case.adapted();
        let found =
            engagement::measure(&case.model.valid(), &case.batch, ContextMask::Bidirectional, &adapted.last().0);
        let expected = case.json["attention_metrics_per_layer_sink_then_context"].as_array().unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            for (ours, theirs) in [(found.sink_mass, &expected[0]), (found.context_engagement, &expected[1])] {
                let theirs = theirs.as_f64().unwrap();
                assert!((ours - theirs).abs() < ATTENTION, "{}: {ours} for {theirs}", case.name);
            }
        }
    }
}

#[test]
fn masks_are_the_authors() {
    let file = read("masks.safetensors");
    let mut seen = 0;
    for (key, allowed) in file.iter().filter(|(key, _)| key.contains("/allowed")) {
        let case = key.split('/').next().unwrap();
        let [.., seq, _] = allowed.shape[..] else { panic!("{key}") };
        // The simple ones are one turn of context and an answer behind it.
        let from_length = || -> Vec<f32> {
            let lengths = &file[&format!("{case}/context_lens")].values;
            lengths.iter().flat_map(|&n| (0..seq).map(move |at| f32::from(at as f32 >= n))).collect()
        };
        let stored = |what: &str| file.get(&format!("{case}/{what}")).map(|tensor| tensor.values.clone());
        let loss = stored("loss_mask").unwrap_or_else(from_length);
        let attention = stored("attention_mask").unwrap_or_else(|| vec![1.0; loss.len()]);
        let mut batch = batch(vec![0; loss.len()], &attention, &loss, seq);
        if let Some(ids) = file.get(&format!("{case}/doc_id")) {
            let padding = |(&id, &real): (&f32, &f32)| if real == 1.0 { id as u32 } else { u32::MAX };
            batch.documents = Some(ids.values.iter().zip(&attention).map(padding).collect());
        }
        let check = |batch: &Batch| {
            let hidden = batch.mask(ContextMask::Bidirectional).hidden(batch.batch, 0, seq, seq, &Device::flex());
            let hidden = hidden.unwrap().expand([batch.batch, 1, seq, seq]).into_data();
            let rows = hidden.iter::<bool>().collect::<Vec<_>>();
            for (query, (ours, theirs)) in rows.chunks(seq).zip(allowed.values.chunks(seq)).enumerate() {
                // Padding asks nothing: its rows mean nothing.
                if attention[query] == 1.0 {
                    let ours: Vec<bool> = ours.iter().map(|hidden| !hidden).collect();
                    let theirs: Vec<bool> = theirs.iter().map(|&allowed| allowed == 1.0).collect();
                    assert_eq!(ours, theirs, "{case}, query {query}");
                }
            }
        };
        check(&batch);
        // Where nobody says whose tokens are, the targets do: the same mask, whatever the first token is.
        if case != "all_context" {
            check(&Batch { roles: None, ..batch });
        }
        seen += 1;
    }
    assert_eq!(seen, 9, "{seen} masks");
}
