#![allow(clippy::unwrap_used)]
use std::ops::ControlFlow;

use burn::tensor::Device;
use polyhead_kernels::comparison::largest;
use polyhead_kernels::seed_random;

use super::*;
use crate::{DecoderConfig, Pass, Past, Sampling};

fn model() -> Decoder {
    let config = r#"{"d_model": 16, "n_layers": 2, "attention": {"softmax": {"n_heads": 4, "n_kv_heads": 2}}}"#;
    seed_random(5);
    serde_json::from_str::<DecoderConfig>(config).unwrap().init(11, &Device::flex())
}

/// The same with weights that make its heads differ.
fn larger() -> Decoder {
    let larger = crate::weights::named(&model()).into_iter().map(|mut tensor| {
        let matrix = tensor.shape.len() == 2;
        tensor.values.iter_mut().filter(|_| matrix).for_each(|value| *value *= 10.0);
        (tensor.name.clone(), tensor)
    });
    crate::weights::load(model(), larger.collect()).unwrap()
}

fn words() -> Decode {
    Arc::new(|ids| ids.iter().map(|id| format!(" w{id}")).collect())
}

fn open(edit: serde_json::Value) -> Result<Intervention, String> {
    let told = |error: ConfigError| error.to_string();
    let config: InterventionConfig =
        serde_json::from_value(serde_json::json!({ "edits": [edit] })).map_err(|error| error.to_string())?;
    config.validate(&|_, names| names.first().map(|name| (*name).to_owned())).map_err(told)?;
    Intervention::new(&config, &BTreeMap::new(), &model(), Some(words())).map_err(told)
}

#[test]
fn mistakes_are_named_with_the_way_out() {
    let edit = |more: serde_json::Value| {
        let mut edit = serde_json::json!({ "site": "z", "change": { "scale": 0.0 } });
        edit.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        open(edit).err().unwrap_or_default()
    };
    use serde_json::json;
    assert_eq!(edit(json!({})), "");
    let map = |site: &str, change: serde_json::Value| json!({ "site": site, "change": change });
    let taken = |how: serde_json::Value| json!({ "site": "weights", "keys": { "from": 0, "to": 4 }, "change": { "redistribute": how } });
    assert_eq!(edit(taken(json!({}))), "");
    let gazed = |multiplier: serde_json::Value| {
        let gaze = json!({ "gaze": { "multiplier": multiplier, "question": { "from": 4, "to": 6 } } });
        json!({ "site": "weights", "keys": { "from": 0, "to": 4 }, "change": gaze })
    };
    assert_eq!(edit(gazed(json!([1, 2, 3, 1]))), "");
    for (more, words) in [
        (json!({ "site": "zz" }), vec!["edits.0.site", "no site \"zz\"", "did you mean", "Sites are"]),
        (json!({ "site": "blocks.1.hook_zz" }), vec!["did you mean \"blocks.1."]),
        (json!({ "site": "attn_scale" }), vec!["can be read, not changed"]),
        (json!({ "site": "layers.2.z" }), vec!["edits.0.site", "layer 2", "has 2"]),
        (json!({ "layers": [2] }), vec!["edits.0.layers", "layer 2", "has 2"]),
        (json!({ "site": "layers.1.z", "layers": [0] }), vec!["both name layers"]),
        (json!({ "layers": [] }), vec!["layers is empty"]),
        (json!({ "heads": [4] }), vec!["edits.0.heads", "head 4", "has 4, from 0"]),
        (json!({ "kv_heads": [0] }), vec!["edits.0.kv_heads", "query heads, heads"]),
        (json!({ "site": "v", "heads": [0] }), vec!["edits.0.heads", "key/value heads, kv_heads"]),
        (json!({ "site": "v", "kv_heads": [2] }), vec!["head 2", "has 2"]),
        (json!({ "site": "resid_mid", "heads": [0] }), vec!["it has no heads"]),
        (json!({ "keys": "first" }), vec!["keys are of scores and weights"]),
        (json!({ "tokens": { "from": 3, "to": 3 } }), vec!["edits.0.tokens", "from 3 to 3"]),
        (json!({ "tokens": { "text": "" } }), vec!["text is empty"]),
        (json!({ "tokens": "contexts" }), vec!["last_prompt_token", "{ text = "]),
        (json!({ "change": { "reweight": 2.0 } }), vec!["reweight is for weights"]),
        (json!({ "change": { "scale": "gamma" } }), vec!["\"gamma\"", "tensors names no file"]),
        (json!({ "change": { "boost": 0.7 } }), vec!["edits.0.change.boost", "boost is for scores", "the site is z"]),
        (map("scores", json!({ "to_identity": 0.5 })), vec!["edits.0.change.to_identity", "is for weights"]),
        (map("scores", json!({ "recent": { "newest": 0 } })), vec!["edits.0.change.recent.newest", "newest (0)"]),
        (map("scores", json!({ "recent": { "newest": 1, "beta": -1 } })), vec!["beta (-1)", "above -1"]),
        (map("scores", json!({ "recent": { "beta": 1 } })), vec!["newest"]),
        (map("weights", json!({ "redistribute": {} })), vec!["edits.0.change.redistribute", "needs keys"]),
        (gazed(json!([1, 2, 3])), vec!["edits.0.change.gaze.multiplier", "3 numbers", "{ from = 0, to = 3 }"]),
        (gazed(json!([1, 2, 3, -1])), vec!["multiplier has -1"]),
        (taken(json!({ "p": 1.5 })), vec!["edits.0.change.redistribute.p", "p (1.5) must be 0 to 1"]),
        (taken(json!({ "sinks": [] })), vec!["edits.0.change.redistribute.sinks", "sinks is empty"]),
        (taken(json!({ "sinks": [{ "from": 2, "to": 1 }] })), vec!["edits.0.change.redistribute.sinks", "from 2 to 1"]),
    ] {
        let told = edit(more.clone());
        assert!(words.iter().all(|word| told.contains(word)), "{more}: {told}");
    }
}

#[test]
fn tensors_must_fit_the_model() {
    let config: InterventionConfig = serde_json::from_value(serde_json::json!({
        "tensors": "file", "edits": [{ "site": "z", "change": { "scale": "gamma" } }] }))
    .unwrap();
    let told = |shape: Vec<usize>, value: f32| {
        let values = vec![value; shape.iter().product()];
        let named = Named { name: "gamma".into(), shape, values };
        let tensors = BTreeMap::from([("gamma".to_owned(), named)]);
        Intervention::new(&config, &tensors, &model(), None).err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert_eq!(told(vec![2, 4], 1.0), "");
    assert_eq!(told(vec![2, 4, 4], 1.0), "");
    assert_eq!(told(vec![2, 1, 4, 3, 1], 1.0), "");
    assert!(told(vec![3, 4], 1.0).contains("for 2 layers"));
    assert!(told(vec![2, 3], 1.0).contains("has 4 heads of width 4"));
    assert!(told(vec![2, 4], f32::NAN).contains("NaN"));
    let other = Intervention::new(&config, &BTreeMap::new(), &model(), None).unwrap_err().to_string();
    assert!(other.contains("has no \"gamma\""), "{other}");
}

fn spans_of(context: &Context<'_>, span: &str) -> Vec<Vec<usize>> {
    let span: Span = serde_json::from_str(span).unwrap();
    let rows = spans::rows_of(&span, context, Some(&words()));
    rows.iter().map(|row| (0..row.len()).filter(|&at| row[at]).collect()).collect()
}

#[test]
fn spans_are_found_by_role_name_and_text() {
    use Role::{Assistant, System, Template, Tool, User};
    let roles = [System, User, Assistant, Tool, Template, User, User, Template, Assistant, Assistant];
    let tokens: Vec<u32> = (0..10).collect();
    let context = Context { rows: 1, tokens: &tokens, roles: &roles, prompt: 10, ..Context::default() };
    let of = |span: &str| spans_of(&context, span).remove(0);
    assert_eq!(of(r#""system""#), [0]);
    assert_eq!(of(r#""context""#), [1, 3]);
    assert_eq!(of(r#""question""#), [5, 6]);
    assert_eq!(of(r#""response""#), [2, 8, 9]);
    assert_eq!(of(r#""last_prompt_token""#), [1]);
    assert_eq!(of(r#"{"text": "w3 w4"}"#), [3, 4]);
    assert_eq!(of(r#"{"text": "3 w"}"#), [3, 4]);
    assert_eq!(of(r#"{"text": "w77"}"#), [] as [usize; 0]);
    assert_eq!(of(r#"{"outside": ["question", "response", {"from": 0, "to": 2}]}"#), [3, 4, 7]);
    assert_eq!(of(r#"{"outside": ["first", {"outside": ["question"]}]}"#), [5, 6]);
    for keys in [r#"{ "text": "w77" }"#, r#"{ "outside": ["first", { "text": "w77" }] }"#] {
        let keys: serde_json::Value = serde_json::from_str(keys).unwrap();
        let searching = open(serde_json::json!({ "site": "scores", "keys": keys, "change": { "add": 1 } })).unwrap();
        let found = searching.presence(&context, 10);
        assert_eq!((found[1].field.as_str(), found[1].rows), ("edits.0.keys", 0));
        assert!(found[1].missing("the text").contains("\"w77\""), "{found:?}");
    }
    let named =
        open(serde_json::json!({ "site": "z", "tokens": { "outside": ["question"] }, "change": { "scale": 0 } }));
    assert_eq!(named.unwrap().needs_roles(), Some(("edits.0.tokens".to_owned(), SpanName::Question)));
}

/// Of two rows of five tokens, in how many each span is; what is generated counts for ranges and answers.
#[test]
fn spans_are_counted_by_the_rows_that_have_them() {
    use Role::{Assistant, System, User};
    let roles = [System, User, User, User, Assistant, User, User, User, User, User];
    let tokens: Vec<u32> = (0..10).collect();
    let context = Context { rows: 2, tokens: &tokens, roles: &roles, prompt: 5, ..Context::default() };
    let of = |span: &str, length: usize| -> Vec<usize> {
        let keys: serde_json::Value = serde_json::from_str(span).unwrap();
        let edit = open(serde_json::json!({ "site": "scores", "keys": keys, "change": { "add": 1 } })).unwrap();
        edit.presence(&context, length).iter().skip(1).map(|span| span.rows).collect()
    };
    for (span, rows) in [
        (r#"{"text": "w2 w3"}"#, vec![1]),
        (r#"{"text": "w4 w5"}"#, vec![0]),
        (r#"{"from": 4, "to": 9}"#, vec![2]),
        (r#"{"from": 5, "to": 9}"#, vec![0]),
        (r#""system""#, vec![1]),
        (r#""context""#, vec![0]),
        (r#""response""#, vec![1]),
        (r#""last_prompt_token""#, vec![2]),
        (r#"{"outside": ["context", {"text": "w6"}, {"from": 9, "to": 10}]}"#, vec![1, 0]),
    ] {
        assert_eq!(of(span, 5), rows, "{span}");
    }
    assert_eq!((of(r#"{"from": 5, "to": 9}"#, 6), of(r#""response""#, 6)), (vec![2], vec![2]));
}

/// Two conversations in one row, behind them padding: each has a first token and a question of its own.
#[test]
fn spans_of_packed_rows_are_those_of_each_text() {
    use Role::{Assistant, Padding, Template, User};
    let roles = [Template, User, Assistant, Template, User, User, Assistant, Padding, Padding];
    let documents = [0, 0, 0, 1, 1, 1, 1, 2, 2];
    let context = Context { rows: 1, roles: &roles, documents: &documents, prompt: 9, ..Context::default() };
    let of = |span: &str| spans_of(&context, span).remove(0);
    assert_eq!(of(r#""question""#), [1, 4, 5]);
    assert_eq!(of(r#""first""#), [0, 3, 7]);
    assert_eq!(of(r#""last_prompt_token""#)[..2], [1, 5]);
    assert_eq!(of(r#"{"outside": ["question"]}"#), [0, 2, 3, 6]);
}

/// Trained tensors are parameters with gradients, of score biases through the kernel that needs no map; what they are is what
/// fixed tensors with these numbers compute.
#[test]
fn tensors_are_trained_and_nothing_else() {
    let json = serde_json::json!({
        "train": { "bias": { "initial": 0.3 }, "gate": { "initial": 0.5, "sigmoid": true }, "shift": { "initial": 0.1, "per": "channel" } },
        "edits": [
            { "site": "scores", "keys": "first", "change": { "add": "bias" } },
            { "site": "z", "layers": [1], "change": { "blend": { "gate": "gate", "value": 2.0 } } },
            { "site": "z", "layers": [0], "change": { "mix": { "gate": 1.0, "value": "shift" } } },
        ],
    });
    let config: InterventionConfig = serde_json::from_value(json).unwrap();
    config.validate(&|_, _| None).unwrap();
    let plain = {
        let device = Device::flex().autodiff();
        let model = model();
        crate::weights::load(
            model.config().init(11, &device),
            crate::weights::named(&model).into_iter().map(|one| (one.name.clone(), one)).collect(),
        )
        .unwrap()
    };
    let of = |config: &InterventionConfig, tensors: &BTreeMap<String, Named>| {
        plain.clone().intervened(Some(Intervention::new(config, tensors, &plain, None).unwrap()))
    };
    let model = crate::train_only(of(&config, &BTreeMap::new()), is_intervention_tensor);
    let shapes: Vec<Vec<usize>> = model.trained_tensors().into_iter().map(|tensor| tensor.shape).collect();
    assert_eq!(shapes, [vec![2, 4], vec![2, 4], vec![2, 4, 4]]);
    let batch = Batch::text(vec![1, 5, 3, 2, 9, 4]);
    let loss = |model: &Decoder| model.loss(&batch, polyhead_attention::Observe::Nothing).cross_entropy;
    let grads = loss(&model).backward();
    let grad = |at: usize| -> Vec<f32> {
        model.intervention_tensors[at].val().grad(&grads).unwrap().into_data().iter::<f32>().collect()
    };
    assert!(model.embedding.weight.val().grad(&grads).is_none());
    // Of layers that no edit names there is no gradient; of all others there is one.
    let moved = |at: usize, numbers: std::ops::Range<usize>| grad(at)[numbers].iter().all(|&number| number != 0.0);
    assert!(moved(0, 0..8) && moved(1, 4..8) && moved(2, 0..16));
    assert!(grad(1)[..4].iter().chain(&grad(2)[16..]).all(|&number| number == 0.0));
    // Finite differences of the bias of one head, and of the gate of one.
    for (at, number) in [(0, 2), (0, 5), (1, 6), (2, 7)] {
        let mut moved = [0.0; 2];
        for (moved, step) in moved.iter_mut().zip([-1e-2_f32, 1e-2]) {
            let mut other = model.clone();
            let mut values: Vec<f32> = other.intervention_tensors[at].val().into_data().iter::<f32>().collect();
            values[number] += step;
            let count = values.len();
            let values = Tensor::from_data(TensorData::new(values, [count]), &plain.device());
            other.intervention_tensors[at] = Param::from_tensor(values);
            *moved = loss(&other).into_scalar::<f32>();
        }
        let (slope, own) = ((moved[1] - moved[0]) / 2e-2, grad(at)[number]);
        assert!((slope - own).abs() < 1e-2 * slope.abs().max(0.1), "{at}.{number}: {slope} {own}");
    }
    // As a file of tensors.
    let tensors: BTreeMap<String, Named> =
        model.trained_tensors().into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
    assert!((tensors["gate"].values[0] - 1.0 / (1.0 + (-0.5_f32).exp())).abs() < 1e-6);
    let fixed = InterventionConfig { train: BTreeMap::new(), tensors: Some("file".into()), ..config.clone() };
    loss(&of(&fixed, &tensors)).into_data().assert_eq(&loss(&model).into_data(), true);
    // They go on from there.
    let trained = TrainedConfig::default();
    let again = InterventionConfig { train: BTreeMap::from([("bias".to_owned(), trained)]), ..fixed };
    loss(&of(&again, &tensors)).into_data().assert_eq(&loss(&model).into_data(), true);
}

#[test]
fn mistakes_of_trained_tensors_are_named() {
    use serde_json::json;
    let told = |name: &str, trained: serde_json::Value, edit: serde_json::Value| {
        let mut json = json!({ "train": {}, "edits": [edit] });
        json["train"][name] = trained;
        let config: InterventionConfig = serde_json::from_value(json).unwrap();
        let checked = config.validate(&|_, _| None);
        let checked = checked.and_then(|()| Intervention::new(&config, &BTreeMap::new(), &model(), None));
        checked.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let edit = || json!({ "site": "scores", "keys": "first", "change": { "add": "bias" } });
    assert_eq!(told("bias", json!({ "initial": 0 }), edit()), "");
    for (name, trained, edit, words) in [
        ("bias", json!({}), edit(), ["train.bias", "no initial number"]),
        (
            "other",
            json!({ "initial": 0 }),
            json!({ "site": "z", "change": { "scale": 1 } }),
            ["train.other", "no edit has"],
        ),
        ("bias", json!({ "initial": 0, "per": "channel" }), edit(), ["train.bias.per", "scores has keys"]),
        (
            "bias",
            json!({ "initial": 0 }),
            json!({ "site": "z", "phase": "decode", "change": { "scale": "bias" } }),
            ["train.bias", "no token of a training batch is generated"],
        ),
        (
            "bias",
            json!({ "initial": 0 }),
            json!({ "site": "z", "change": { "scale": "other" } }),
            ["edits.0.change.scale", "\"other\""],
        ),
    ] {
        let told = told(name, trained.clone(), edit);
        assert!(words.iter().all(|word| told.contains(word)), "{trained}: {told}");
    }
}

/// Decoding token by token under an intervention is what full passes say, and phases are kept apart.
#[test]
fn generation_obeys_phases() {
    let prompt = [1, 2, 3, 4];
    let greedy = Sampling { max_new_tokens: 5, temperature: 0.0, ..Sampling::default() };
    let generate =
        |model: &Decoder| Past::new(model).generate(model, &prompt, &greedy, &[], |_| ControlFlow::Continue(())).0;
    // A large number in one channel of the stream decides the token.
    let edit = |phase: &str, tokens: &str| {
        let change = serde_json::json!({ "scale": -30.0 });
        open(serde_json::json!({ "site": "resid_post", "layers": [1], "phase": phase, "tokens": tokens, "change": change }))
            .unwrap()
    };
    let plain = generate(&model());
    let of = |phase: &str, tokens: &str| generate(&model().intervened(Some(edit(phase, tokens))));
    let (both, prefill, decode) = (of("both", "all"), of("prefill", "all"), of("decode", "all"));
    assert_ne!(both[0], plain[0]);
    // The first token comes from the prompt, the others from what is generated.
    assert_eq!((prefill[0], decode[0]), (both[0], plain[0]));
    assert_eq!(of("both", "last_prompt_token")[0], both[0]);
    assert_eq!(of("decode", "last_prompt_token"), plain);
    assert_eq!(of("prefill", "response"), plain);
    assert_eq!(of("both", "response")[0], plain[0]);
    assert_ne!(of("both", "response")[1..], plain[1..]);
}

/// Guided logits are (1 + w) logits - w logits under the edits, also token by token; a weight of -1 gives those under the edits.
#[test]
fn guidance_steers_away_from_what_the_edits_make() {
    let plain = larger();
    let tokens = [1_u32, 5, 3, 2, 9, 4];
    let config = |weight: Option<f64>| -> InterventionConfig {
        let edits =
            serde_json::json!([{ "site": "weights", "layers": [0], "heads": [1, 2], "change": { "to_identity": 1 } }]);
        let guidance = weight.map(|weight| serde_json::json!({ "weight": weight }));
        serde_json::from_value(serde_json::json!({ "guidance": guidance, "edits": edits })).unwrap()
    };
    let under = |weight: Option<f64>| {
        let config = config(weight);
        config.validate(&|_, _| None).unwrap();
        plain.clone().intervened(Some(Intervention::new(&config, &BTreeMap::new(), &plain, None).unwrap()))
    };
    let logits = |model: &Decoder, parts: &[usize]| -> Vec<f32> {
        let (mut cache, mask) = (model.new_cache(), polyhead_attention::Mask::causal());
        let each = parts.iter().map(|count| {
            let start = cache.len();
            let batch = Batch::text(tokens[start..start + count].to_vec());
            let hidden = model.pass(model.tokens(&batch), Pass { cache: Some(&mut cache), ..Pass::new(&mask) }).hidden;
            model.logits(hidden).into_data().iter::<f32>().collect::<Vec<_>>()
        });
        each.collect::<Vec<_>>().concat()
    };
    let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
    let (own, weak) = (logits(&plain, &[6]), logits(&under(None), &[6]));
    assert!(!close(&own, &weak));
    let wanted: Vec<f32> = own.iter().zip(&weak).map(|(own, weak)| 2.5 * own - 1.5 * weak).collect();
    let model = under(Some(1.5));
    assert!(close(&logits(&model, &[6]), &wanted) && close(&logits(&model, &[3, 1, 2]), &wanted));
    assert!(close(&logits(&under(Some(-1.0)), &[6]), &weak));
    // Layers that are run one after the other are those of the model as it is, and so is what looks inside.
    assert_eq!(logits(&model.clone().unguided(), &[6]), own);
    let hidden = model
        .run_layers(
            0..2,
            model.embed(model.tokens(&Batch::text(tokens.to_vec()))),
            Pass::new(&polyhead_attention::Mask::causal()),
        )
        .hidden;
    let alone: Vec<f32> = model.logits(model.normed(hidden)).into_data().iter::<f32>().collect();
    assert!(close(&alone, &own));
    let told = |config: InterventionConfig| config.validate(&|_, _| None).unwrap_err().to_string();
    assert!(told(config(Some(0.0))).contains("guidance.weight: weight (0) must be a finite number other than 0"));
    assert!(told(InterventionConfig { edits: Vec::new(), ..config(Some(1.0)) }).contains("guidance needs edits"));
}

/// What changes of maps do token by token, with a cache, is what they do in a full pass; what they leave alone stays.
#[test]
fn changes_of_maps_are_the_same_with_a_cache() {
    let plain = larger();
    let tokens = [1_u32, 5, 3, 2, 9, 4];
    let run = |model: &Decoder, parts: &[usize]| -> Vec<f32> {
        let context = Context { rows: 1, tokens: &tokens[..4], prompt: 4, ..Context::default() };
        let (mut cache, mask) = (model.new_cache(), polyhead_attention::Mask::causal());
        let each = parts.iter().map(|count| {
            let start = cache.len();
            let batch = Batch::text(tokens[start..start + count].to_vec());
            let pass = Pass { cache: Some(&mut cache), context: Some(context), ..Pass::new(&mask) };
            model.pass(model.tokens(&batch), pass).hidden.into_data().iter::<f32>().collect::<Vec<_>>()
        });
        each.collect::<Vec<_>>().concat()
    };
    let whole = run(&plain, &[6]);
    // Of redistributed weights, queries before the end of the span stay as they are.
    for (site, keys, change, from) in [
        (
            "weights",
            (1, 4),
            r#"{"redistribute": {"sinks": ["first", {"from": 2, "to": 3}], "rho": 1, "least_mass": 0}}"#,
            4,
        ),
        ("scores", (1, 4), r#"{"boost": 2}"#, 1),
        ("weights", (1, 3), r#"{"gaze": {"multiplier": [3, 9], "question": {"from": 3, "to": 4}}}"#, 1),
        ("scores", (0, 9), r#"{"recent": {"newest": 2, "beta": 3}}"#, 2),
    ] {
        let change: serde_json::Value = serde_json::from_str(change).unwrap();
        let keys = serde_json::json!({ "from": keys.0, "to": keys.1 });
        let edit = serde_json::json!({ "site": site, "keys": keys, "change": change });
        let model = plain.clone().intervened(Some(open(edit).unwrap()));
        let (own, parts) = (run(&model, &[6]), run(&model, &[4, 1, 1]));
        let width = model.config().d_model;
        let moved = |at: usize, other: &[f32]| {
            let row = at * width..(at + 1) * width;
            largest(0.0, own[row.clone()].iter().zip(&other[row]).map(|(a, b)| f64::from((a - b).abs())))
        };
        for at in 0..6 {
            assert!(moved(at, &parts) < 2e-5, "{change}: position {at} with a cache");
            assert_eq!(moved(at, &whole) > 1e-4, at >= from, "{change}: position {at}: {}", moved(at, &whole));
        }
    }
}
