//! Growing grouped differential attention beside an independent implementation, and the command that does it.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::{Adapters, Call, Mask, Observe, Rope, RopeLayout};
use polyhead_models::surgery::{Growth, grow};
use polyhead_models::weights::{Named, load, named};
use polyhead_models::{Decoder, DecoderConfig};
use serde_json::json;

use crate::golden::{Golden, OUTPUT, compare, files, size, values};
use crate::world::{SMALL, World};

#[test]
fn golden_gda_growth() {
    let all = files("gda_growth");
    all.iter().for_each(check);
}

/// A decoder of one layer whose attention is the file's.
fn parent(golden: &Golden, device: &Device) -> Decoder {
    let base = &golden.config["base"];
    let attention = json!({ "grouped_differential": {
        "n_heads": base["n_q_heads"], "n_noise_heads": base["n_noise"], "n_kv_heads": base["n_kv_heads"],
        "head_dim": base["head_dim"], "lambda_init": { "constant": base["lambda_init"] },
    } });
    let config = json!({ "d_model": base["d_model"], "n_layers": 1, "d_ff": 16, "attention": attention });
    let config: DecoderConfig = serde_json::from_value(config).unwrap();
    let fresh = config.init(5, device);
    let mut weights: BTreeMap<String, Named> =
        named(&fresh).into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
    for (name, tensor) in layer(golden, "base.w.") {
        weights.insert(name.clone(), Named { name, ..tensor });
    }
    load(fresh, weights).unwrap()
}

/// The file's layer under our names, `[in, out]`.
fn layer(golden: &Golden, prefix: &str) -> BTreeMap<String, Named> {
    let ours = |(key, tensor): (&String, &Named)| {
        let name = format!("layers.0.attention.{}", key.strip_prefix(prefix)?);
        let tensor = match tensor.shape[..] {
            [rows, columns] => {
                let values = (0..rows * columns).map(|i| tensor.values[i % rows * columns + i / rows]).collect();
                Named { name: name.clone(), shape: vec![columns, rows], values }
            }
            _ => tensor.clone(),
        };
        Some((name, tensor))
    };
    golden.tensors.iter().filter_map(ours).collect()
}

fn check(golden: &Golden) {
    let device = Device::flex();
    let parent = parent(golden, &device);
    let growth =
        |noise: f64| Growth { signal_heads: size(&golden.config, "signal_replication"), noise, ..Growth::default() };
    let grown = grow(&parent, &growth(0.0)).unwrap();
    let found: BTreeMap<String, Named> =
        named(&grown).into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
    let wanted = layer(golden, "grown.w.");
    assert!(wanted.len() >= 9);
    for (name, want) in wanted {
        assert_eq!(found[&name].shape, want.shape, "{name}");
        compare(&golden.name, &name, &want.values, &found[&name].values, 1e-7, false);
    }
    let noisy = grow(&parent, &growth(Growth::NOISE)).unwrap();
    for (model, want) in [(&parent, "base.out"), (&grown, "grown.out"), (&noisy, "grown.out")] {
        compare(&golden.name, want, &golden.tensors[want].values, &attended(golden, model), OUTPUT, false);
    }
}

fn attended(golden: &Golden, model: &Decoder) -> Vec<f32> {
    let (base, device) = (&golden.config["base"], model.device());
    let x = &golden.tensors["base.x"];
    let x = Tensor::<3>::from_data(TensorData::new(x.values.clone(), x.shape.clone()), &device);
    let theta = base["rope_theta"].as_f64().unwrap();
    let rope = Rope::new(0..size(base, "seq"), size(base, "head_dim"), theta, RopeLayout::RotateHalf, &device);
    let call = Call {
        rope: Some(&rope),
        mask: &Mask::causal(),
        bias: None,
        cache: None,
        observe: Observe::Nothing,
        adapters: Adapters::default(),
    };
    values(model.layers[0].attention.forward(x, call).hidden)
}

#[test]
fn a_grown_checkpoint_is_a_checkpoint() {
    let world = World::new(SMALL);
    world.succeeds(&["train", "recipe.toml", "--out", "parent"]);
    let (out, err) =
        world.succeeds(&["grow", "parent", "--signal-heads", "x4", "--width", "x2", "--depth", "3", "--out", "grown"]);
    assert!(err.contains("they differ by at most") && err.contains("the optimiser starts afresh"), "{err}");
    assert!(out.trim().ends_with("step-00000000"), "{out}");
    let (before, _) = world.succeeds(&["eval", "parent"]);
    let (after, _) = world.succeeds(&["eval", "grown"]);
    let loss = |json: &str| serde_json::from_str::<serde_json::Value>(json).unwrap()["loss"].as_f64().unwrap();
    assert!((loss(&before) - loss(&after)).abs() < 1e-4, "{before} {after}");
    world.succeeds(&["logits", "grown", "--tokens", "1,2,3", "--out", "logits.safetensors"]);
    world.succeeds(&["export", "grown", "--to", "exported"]);
    // It is trained further by a recipe of its own, or by the one it came from.
    let child = "[model]\npretrained = \"grown\"\n[data.markov]\nstates = 6\n[training]\nsteps = 2\nseq_len = 16\nbatch_size = 4\n";
    std::fs::write(world.dir.path().join("child.toml"), child).unwrap();
    world.succeeds(&["train", "child.toml", "--out", "child"]);
    world.succeeds(&["train", "grown/recipe.toml", "--out", "grown"]);
    let err = world.fails(1, &["grow", "parent", "--signal-heads", "x2", "--out", "grown"]);
    assert!(err.contains("exists already"), "{err}");
    let err = world.fails(2, &["grow", "parent", "--out", "nothing"]);
    assert!(err.contains("nothing grows"), "{err}");
    let err = world.fails(2, &["grow", "parent", "--width", "half", "--out", "nothing"]);
    assert!(err.contains("x2"), "{err}");
}
