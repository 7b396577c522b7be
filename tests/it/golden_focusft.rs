//! FocuSFT beside the authors' code, run on small models: every number that a step has, and the masks.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::Observe;
use polyhead_kernels::comparison::{Tolerance, assert_close};
use polyhead_models::weights::{self, Named};
use polyhead_models::{Batch, ContextMask, Decoder, DecoderConfig, IGNORE, Pass, Role};
use polyhead_training::bilevel::{Adapted, Bilevel, BilevelConfig, FastWeights, adapt};
use polyhead_training::engagement;
use polyhead_training::optimizer::Optimizer;
use serde_json::{Value, json};

use crate::golden::{Config, Golden, Tensors, files, size, values};

/// Of losses and logits.
const LOSS: Tolerance = Tolerance::absolute(2e-6);
const LOGITS: Tolerance = Tolerance::absolute(2e-5);
const GRADIENT: Tolerance = Tolerance::relative(5e-6).plus(1e-6);
/// Of fast weights.
const FAST: Tolerance = Tolerance::relative(5e-6);
/// Of norms of gradients.
const NORM: Tolerance = Tolerance::relative(1e-5);
/// Of the gradient through the inner loop, relative to the norm of the whole gradient.
const SECOND_ORDER: f64 = 1e-4;
/// And of each of its tensors, which finite differences give less exactly.
const SECOND_ORDER_EACH: Tolerance = Tolerance::relative(2e-3).plus(1e-5);
/// Of means of attention weights.
const MASSES: Tolerance = Tolerance::absolute(1e-6);
/// Of attention weights.
const MAPS: Tolerance = Tolerance::absolute(5e-6);

#[test]
fn golden_focusft() {
    for golden in files("focusft") {
        if golden.beside.is_none() {
            assert!(golden.tensors.keys().any(|key| key.ends_with("/context_lens")), "{}: no JSON file", golden.name);
            check_masks(&golden.tensors);
            continue;
        }
        let case = Case::open(golden);
        check_inner_steps(&case);
        check_outer_gradients(&case);
        check_losses_and_logits(&case);
        check_second_order(&case);
        check_attention(&case);
    }
}

/// The batch that attention and loss masks describe. Padding is a document of its own.
fn batch(tokens: Vec<u32>, attention: &[f32], loss: &[f32], seq: usize) -> Batch {
    let target = |at: usize| match (at + 1) % seq {
        0 => IGNORE,
        _ if loss[at + 1] == 1.0 => i64::from(tokens[at + 1]),
        _ => IGNORE,
    };
    let role = |(&real, &learned): (&f32, &f32)| match (real == 1.0, learned == 1.0) {
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
        ..Batch::default()
    }
}

struct Case {
    name: String,
    model: Decoder,
    batch: Batch,
    config: BilevelConfig,
    file: Tensors,
    json: Config,
}

impl Case {
    fn open(golden: Golden) -> Self {
        let Golden { name, tensors: file, beside, .. } = golden;
        let json = beside.unwrap();
        // Where the numbers come from, and how exact they are.
        json.beside_the_point(&["versions", "float64_reference", "f32_vs_f64_max_abs_and_rel", "eager_vs_sdpa_f32"]);
        json.beside_the_point(&["first_vs_second_order"]);
        let described = json.table("config");
        let (model, n_layers) = model(&name, &described, &file);
        let config = bilevel(&described.table("memory"));
        assert_eq!(config.first_layer(n_layers), size(&json, "start_layer"), "{name}");
        assert_close(
            &name,
            &[config.alpha / config.rank as f64],
            &[json["scaling"].as_f64().unwrap()],
            Tolerance::EXACT,
        );
        let ids = &file["input/input_ids"];
        let tokens = ids.values.iter().map(|&id| id as u32).collect();
        let masks = ["input/attention_mask", "input/loss_mask"].map(|key| &file[key].values);
        let batch = batch(tokens, masks[0], masks[1], ids.shape[1]);
        assert_eq!(batch.seq, size(&described, "seq_len"), "{name}");
        check_mask(&name, &batch, masks[0], &file["mask/allowed"].values);
        Self { name, model, batch, config, file, json }
    }

    /// The authors' fast weights before step `k`; B is zero in the first.
    fn fast(&self, k: usize) -> FastWeights {
        let matrices = if k == 0 { &['A'][..] } else { &['A', 'B'] };
        self.pairs(&format!("fast/{k}/"), self.config.fresh(&self.model, 0, 0).unwrap(), matrices)
    }

    /// `like` with these matrices of the file, whose names begin with `prefix`.
    fn pairs(&self, prefix: &str, mut like: FastWeights, matrices: &[char]) -> FastWeights {
        for (name, layer, at) in names(&like) {
            let adapter = &mut like.0[layer][at];
            for (letter, tensor) in [('A', &mut adapter.a), ('B', &mut adapter.b)] {
                if matrices.contains(&letter) {
                    let Named { shape, values, .. } =
                        transposed(&self.file[format!("{prefix}{name}.{letter}").as_str()]);
                    *tensor = Tensor::from_data(TensorData::new(values, shape), &tensor.device());
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
        let (grads, beside) = bilevel.gradients(&self.model, &self.batch, adapted);
        struct Collect<'a>(&'a burn::optim::GradientsParams, BTreeMap<String, Vec<f32>>);
        impl weights::ParameterVisitor for Collect<'_> {
            fn visit<const D: usize>(&mut self, name: String, param: &Param<Tensor<D>>) {
                self.1.insert(name, values(self.0.get::<D>(param.id).unwrap()));
            }
        }
        let Collect(_, found) = weights::visit_parameters(&self.model, Collect(&grads, BTreeMap::new()));
        (found, beside)
    }

    fn close(&self, key: &str, got: &[f32], tolerance: Tolerance) {
        assert_close(&format!("{}: {key}", self.name), got, &self.file[key].values, tolerance);
    }

    /// A number of the JSON file, or a list of them.
    fn says(&self, key: &str, got: &[f64], tolerance: Tolerance) {
        let want = match &self.json[key] {
            Value::Array(list) => list.iter().map(|number| number.as_f64().unwrap()).collect(),
            number => vec![number.as_f64().unwrap_or_else(|| panic!("{}: no {key}", self.name))],
        };
        assert_close(&format!("{}: {key}", self.name), got, &want, tolerance);
    }
}

/// The model of a file and its weights; how many layers it has.
fn model(name: &str, config: &Config, file: &Tensors) -> (Decoder, usize) {
    // What the weights were drawn with, and what the conversations are made of: both are there as they came out.
    config.beside_the_point(&["weight_gain", "turns"]);
    let qkv_bias = match config["family"].as_str() {
        Some("qwen2") => true,
        Some("llama") => false,
        other => panic!("{name}: family {other:?}"),
    };
    let decoder: DecoderConfig = serde_json::from_value(json!({
        "d_model": config["hidden_size"], "n_layers": config["num_hidden_layers"],
        "d_ff": config["intermediate_size"], "rope_theta": config["rope_theta"],
        "norm_eps": config["rms_norm_eps"], "tie_embeddings": config["tie_word_embeddings"],
        "attention": { "softmax": { "n_heads": config["num_attention_heads"],
            "n_kv_heads": config["num_key_value_heads"], "qkv_bias": qkv_bias } },
    }))
    .unwrap();
    decoder.validate().unwrap_or_else(|error| panic!("{name}: {error}"));
    let stored = file.under("weights/").into_iter().map(|(key, tensor)| ours(&key, &tensor));
    let stored = stored.map(|tensor| (tensor.name.clone(), tensor)).collect();
    let fresh = decoder.init(size(config, "vocab_size"), &Device::flex().autodiff());
    (weights::load(fresh, stored).unwrap_or_else(|error| panic!("{name}: {error}")), decoder.n_layers)
}

fn bilevel(memory: &Config) -> BilevelConfig {
    memory.is("enabled", true);
    memory.is("inner_dropout", 0.0);
    // Saves memory, and changes no number.
    memory.beside_the_point(&["inner_gradient_checkpointing"]);
    let number = |key: &str| memory[key].as_f64().unwrap();
    let config = BilevelConfig {
        inner_steps: size(memory, "num_inner_steps"),
        inner_lr: number("inner_lr"),
        inner_clip: number("inner_grad_clip"),
        sync: memory["sync_inner"].as_bool().unwrap(),
        rank: size(memory, "inner_rank"),
        alpha: number("inner_alpha"),
        targets: memory["inner_target_modules"].as_str().unwrap().split(',').map(Into::into).collect(),
        layer_fraction: number("inner_layer_fraction"),
        clip_includes_fast: true,
        ..BilevelConfig::default()
    };
    config.validate().unwrap();
    config
}

/// What the authors call the projections that fast weights are on, and where these are.
fn names(fast: &FastWeights) -> Vec<(String, usize, usize)> {
    let of_layer = |(layer, adapters): (usize, &Vec<polyhead_attention::Adapter>)| {
        let name = |(at, adapter): (usize, &polyhead_attention::Adapter)| {
            let part = if adapter.projection.starts_with(['q', 'k', 'v', 'o']) { "self_attn" } else { "mlp" };
            (format!("model.layers.{layer}.{part}.{}", adapter.projection), layer, at)
        };
        adapters.iter().enumerate().map(name).collect::<Vec<_>>()
    };
    fast.0.iter().enumerate().flat_map(of_layer).collect()
}

fn transposed(tensor: &Named) -> Named {
    if tensor.shape.len() == 2 { crate::golden::transposed(tensor) } else { tensor.clone() }
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

fn compare_pairs(what: &str, want: &FastWeights, got: &FastWeights, tolerance: Tolerance) {
    assert_eq!(want.tensors().count(), got.tensors().count());
    assert!(want.tensors().count() > 0);
    for (want, got) in want.tensors().zip(got.tensors()) {
        assert_close(what, &values(got.clone()), &values(want.clone()), tolerance);
    }
}

fn norm(square: Tensor<1>) -> f64 {
    f64::from(square.into_scalar::<f32>()).sqrt()
}

fn check_inner_steps(case: &Case) {
    let adapted = case.adapted();
    let losses: Vec<f32> = adapted.steps.iter().map(|step| step.loss as f32).collect();
    case.close("inner/losses", &losses, LOSS);
    case.says("inner_losses", &adapted.steps.iter().map(|step| step.loss).collect::<Vec<_>>(), LOSS);
    let adapters: BTreeSet<String> = names(adapted.last()).into_iter().map(|(name, ..)| name).collect();
    let theirs = case.json["adapter_names"].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned());
    assert_eq!(theirs.collect::<BTreeSet<_>>(), adapters, "{}", case.name);
    let mut norms = Vec::new();
    for (k, step) in adapted.steps.iter().enumerate() {
        let slopes = step.slopes.clone().unwrap();
        let want = case.pairs(&format!("inner/{k}/grad/"), slopes.clone(), &['A', 'B']);
        compare_pairs(&format!("{}: gradients of step {k}", case.name), &want, &slopes, GRADIENT);
        let (want, got) = (case.fast(k + 1), &adapted.trajectory[k + 1]);
        compare_pairs(&format!("{}: fast weights after step {k}", case.name), &want, got, FAST);
        norms.push(norm(slopes.square().unwrap()));
    }
    case.says("inner_grad_total_norm_per_step", &norms, NORM);
    let clipped = case.json["inner_clipped_tensors_per_step"].as_array().unwrap();
    assert_eq!(clipped.len(), adapted.steps.len(), "{}", case.name);
    for (step, names) in adapted.steps.iter().zip(clipped) {
        let ours = step.factors.iter().filter(|factor| (*factor).clone().into_scalar::<f32>() < 1.0).count();
        // Clipped together, all are, and the file names none.
        let theirs = names.as_array().unwrap().len();
        assert!(ours == theirs || case.config.sync && [0, step.factors.len()].contains(&ours), "{}", case.name);
    }
}

fn check_outer_gradients(case: &Case) {
    let adapted = case.adapted();
    let (grads, beside) = case.gradients(&adapted, case.config.clone());
    let expected = case.file.under("outer/grad/");
    assert_eq!(expected.len(), grads.len(), "{}: as many gradients as parameters", case.name);
    for (key, want) in &expected {
        let want = ours(key, want);
        assert_close(&format!("{}: {key}", case.name), &grads[&want.name], &want.values, GRADIENT);
    }
    let want = case.pairs("outer/fast_grad/", beside.clone(), &['A', 'B']);
    compare_pairs(&format!("{}: outer gradients of fast weights", case.name), &want, &beside, GRADIENT);
    // What the authors' trainer clips by.
    let base = grads.values().flatten().map(|&grad| f64::from(grad).powi(2)).sum::<f64>().sqrt();
    let fast = norm(beside.square().unwrap());
    case.says("outer_grad_norm_base_only", &[base], NORM);
    case.says("outer_grad_norm_fast_only", &[fast], NORM);
    case.says("outer_grad_norm_all_as_clipped_by_hf_trainer", &[base.hypot(fast)], NORM);
}

fn check_losses_and_logits(case: &Case) {
    let plain = case.model.valid();
    let (adapted, batch) = (case.adapted(), &case.batch);
    let targets = batch.target_tokens() as f32;
    let real: Vec<bool> = case.file["input/attention_mask"].values.iter().map(|&a| a == 1.0).collect();
    // Rows of padding mean nothing.
    let valid = |logits: &[f32]| -> Vec<f32> {
        let rows = logits.chunks(plain.vocab_size()).zip(&real);
        rows.filter(|(_, real)| **real).flat_map(|(row, _)| row.to_vec()).collect()
    };
    let fast = &adapted.last().0[..];
    for (context, fast, loss, says, logits) in [
        (ContextMask::Bidirectional, fast, "outer/loss", "outer_loss", Some("outer/logits")),
        (
            ContextMask::Bidirectional,
            &[],
            "base/loss_bidir_nofast",
            "base_loss_bidir",
            Some("base/logits_bidir_nofast"),
        ),
        (ContextMask::Causal, &[], "base/loss_causal_nofast", "base_loss_causal", None),
    ] {
        let mask = batch.mask(context);
        let hidden = plain.pass(plain.tokens(batch), Pass { adapters: fast, ..Pass::new(&mask) }).hidden;
        let sum: f32 = plain.predict(batch, hidden.clone()).sum.into_scalar();
        case.close(loss, &[sum / targets], LOSS);
        case.says(says, &[f64::from(sum / targets)], LOSS);
        if let Some(key) = logits {
            let (want, got) = (valid(&case.file[key].values), valid(&values(plain.logits(hidden))));
            assert_close(&format!("{}: {key}", case.name), &got, &want, LOGITS);
        }
    }
}

fn check_second_order(case: &Case) {
    let config = BilevelConfig { second_order: true, ..case.config.clone() };
    let (grads, _) = case.gradients(&case.adapted(), config);
    let (wanted, first) = (case.file.under("ref_second_order/grad/"), case.file.under("outer/grad/"));
    assert_eq!(wanted.keys().collect::<Vec<_>>(), first.keys().collect::<Vec<_>>(), "{}", case.name);
    let (mut square, mut all, mut first_order) = (0.0, 0.0, 0.0);
    let sum = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    for (name, want) in &wanted {
        let want = ours(name, want);
        let what = format!("{}: {name}, second order", case.name);
        assert_close(&what, &grads[&want.name], &want.values, SECOND_ORDER_EACH);
        square += sum(&want.values, &grads[&want.name]);
        all += sum(&want.values, &vec![0.0; want.values.len()]);
        first_order += sum(&want.values, &ours(name, &first[name]).values);
    }
    let off = (square / all).sqrt();
    assert!(off < SECOND_ORDER, "{}: off by {off}", case.name);
    assert!((first_order / all).sqrt() > 0.05, "the first-order gradient is another one");
}

/// Attention weights of the outer pass, and masses of them.
fn check_attention(case: &Case) {
    let (adapted, plain) = (case.adapted(), case.model.valid());
    let found = engagement::measure(&plain, &case.batch, ContextMask::Bidirectional, &adapted.last().0);
    let ours: Vec<f64> = found.iter().flat_map(|found| [found.sink_mass, found.context_engagement]).collect();
    let expected = case.json["attention_metrics_per_layer_sink_then_context"].as_array().unwrap();
    let expected: Vec<f64> = expected.iter().flat_map(|pair| [0, 1].map(|at| pair[at].as_f64().unwrap())).collect();
    assert_close(&format!("{}: masses", case.name), &ours, &expected, MASSES);

    let Batch { batch, seq, .. } = case.batch;
    let n_heads = case.file["outer/attn/0"].shape[1];
    for row in 0..batch {
        let part = row * seq..(row + 1) * seq;
        let attention = &case.file["input/attention_mask"].values[part.clone()];
        let loss = &case.file["input/loss_mask"].values[part.clone()];
        let alone = self::batch(case.batch.tokens[part].to_vec(), attention, loss, seq);
        let mask = alone.mask(ContextMask::Bidirectional);
        let pass = Pass { observe: Observe::Maps, adapters: &adapted.last().0, ..Pass::new(&mask) };
        for (layer, seen) in plain.pass(plain.tokens(&alone), pass).seen.into_iter().enumerate() {
            let (key, maps) = (format!("outer/attn/{layer}"), values(seen.maps.unwrap())); // [heads, seq, seq]
            let theirs = &case.file[key.as_str()];
            assert_eq!(theirs.shape, [batch, n_heads, seq, seq], "{}: {key}", case.name);
            let theirs = &theirs.values[row * maps.len()..(row + 1) * maps.len()];
            let real = |maps: &[f32]| -> Vec<f32> {
                let queries = maps.chunks(seq).zip(attention.iter().cycle());
                queries.filter(|(_, real)| **real == 1.0).flat_map(|(query, _)| query.to_vec()).collect()
            };
            assert_close(&format!("{}: {key}", case.name), &real(&maps), &real(theirs), MAPS);
        }
    }
}

/// Who sees whom is what the file says, `[batch, queries, keys]`, but for queries of padding, which ask nothing.
fn check_mask(name: &str, batch: &Batch, attention: &[f32], allowed: &[f32]) {
    let seq = batch.seq;
    let hidden = batch.mask(ContextMask::Bidirectional).hidden(batch.batch, 0, seq, seq, &Device::flex());
    let hidden = hidden.unwrap().expand([batch.batch, 1, seq, seq]).into_data();
    let rows = hidden.iter::<bool>().collect::<Vec<_>>();
    assert_eq!(rows.len(), allowed.len(), "{name}");
    for (query, (ours, theirs)) in rows.chunks(seq).zip(allowed.chunks(seq)).enumerate() {
        if attention[query] == 1.0 {
            let ours: Vec<f32> = ours.iter().map(|&hidden| f32::from(u8::from(!hidden))).collect();
            assert_eq!(ours, theirs, "{name}, query {query}");
        }
    }
}

/// Masks of conversations, and of several in a row.
fn check_masks(file: &Tensors) {
    let cases: BTreeSet<String> = file.keys().map(|key| key.split('/').next().unwrap().to_owned()).collect();
    for case in cases {
        let key = |what: &str| format!("{case}/{what}");
        let optional = |what: &str| file.get(&key(what)).map(|tensor| tensor.values.clone());
        let several = optional("doc_id");
        let definition = if several.is_some() { "allowed_own_definition" } else { "allowed" };
        let allowed = &file[key(definition).as_str()];
        let [rows, seq, keys] = allowed.shape[..] else { panic!("{case}") };
        assert_eq!(seq, keys, "{case}");
        // One turn of context and an answer behind it where there is nothing but its length.
        let simple = case.starts_with("simple");
        let lengths = if several.is_some() { None } else { Some(&file[key("context_lens").as_str()].values) };
        let from_length = || -> Vec<f32> {
            let of_row = |&n: &f32| (0..seq).map(move |at| f32::from(u8::from(at as f32 >= n)));
            lengths.unwrap().iter().flat_map(of_row).collect()
        };
        let stored = |what: &str| file[key(what).as_str()].values.clone();
        let loss = if simple { from_length() } else { stored("loss_mask") };
        let attention = stored("attention_mask");
        if let (Some(lengths), false) = (lengths, simple) {
            let first = |loss: &[f32]| loss.iter().position(|&answer| answer == 1.0).unwrap_or(seq) as f32;
            assert_eq!(&loss.chunks(seq).map(first).collect::<Vec<_>>(), lengths, "{case}");
            let additive = |&allowed: &f32| if allowed == 1.0 { 0.0 } else { f32::MIN };
            let wanted: Vec<f32> = allowed.values.iter().map(additive).collect();
            assert_close(&case, &wanted, &file[key("additive_f32").as_str()].values, Tolerance::EXACT);
        }
        let mut batch = batch(vec![0; rows * seq], &attention, &loss, seq);
        if let Some(ids) = several {
            let padding = |(&id, &real): (&f32, &f32)| if real == 1.0 { id as u32 } else { u32::MAX };
            batch.documents = Some(ids.iter().zip(&attention).map(padding).collect());
        }
        check_mask(&case, &batch, &attention, &allowed.values);
        // Where nobody says whose tokens are, the targets do: the same mask, whatever the first token is, in rows that answer.
        if loss.chunks(seq).all(|row| row.contains(&1.0)) {
            check_mask(&case, &Batch { roles: None, ..batch }, &attention, &allowed.values);
        }
    }
}
