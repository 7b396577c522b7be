//! Growing grouped differential attention beside an independent implementation, and the command that does it.

use std::collections::BTreeMap;

use burn::tensor::Device;
use polyhead_attention::{AttentionConfig, GroupedDifferentialConfig};
use polyhead_models::surgery::{Growth, grow};
use polyhead_models::weights::{Named, load, named};
use polyhead_models::{Decoder, DecoderConfig};
use serde_json::json;

use crate::golden::{Config, Golden, OUTPUT, compare, files, size, tensor, values};
use crate::golden_gda::{attend, differential, ours};
use crate::world::{SMALL, World};

#[test]
fn golden_gda_growth() {
    files("gda_growth").iter().for_each(check);
}

/// A decoder of one layer whose attention is the file's.
fn parent(golden: &Golden, base: &Config, device: &Device) -> Decoder {
    let attention = AttentionConfig::GroupedDifferential(differential(base, true));
    let config = json!({ "d_model": base["d_model"], "n_layers": 1, "d_ff": 16, "attention": attention });
    let config: DecoderConfig = serde_json::from_value(config).unwrap();
    config.validate().unwrap_or_else(|error| panic!("{}: {error}", golden.name));
    let fresh = config.init(5, device);
    let mut weights: BTreeMap<String, Named> =
        named(&fresh).into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
    for (name, tensor) in ours(golden.tensors.under("base.w.")) {
        let name = format!("{ATTENTION}{name}");
        weights.insert(name.clone(), Named { name, ..tensor });
    }
    load(fresh, weights).unwrap_or_else(|error| panic!("{}: {error}", golden.name))
}

const ATTENTION: &str = "layers.0.attention.";

fn check(golden: &Golden) {
    let (name, device) = (&golden.name, Device::flex());
    let [base, wide] = ["base", "grown"].map(|key| golden.config.table(key));
    for config in [&base, &wide] {
        config.beside_the_point(&["depth", "layer_idx"]);
    }
    let [signal_heads, width] = ["signal_replication", "width_clone"].map(|key| size(&golden.config, key));
    let parent = parent(golden, &base, &device);
    let growth = |noise| Growth { signal_heads, width, noise, ..Growth::default() };
    let grown = grow(&parent, &growth(0.0)).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(grown.config().d_model, size(&wide, "d_model"), "{name}");
    let AttentionConfig::GroupedDifferential(found) = grown.config().mechanism(0) else { panic!("{name}") };
    let described = GroupedDifferentialConfig { subln_init: found.subln_init, ..differential(&wide, true) };
    assert_eq!(found, &described, "{name}");

    let of_layer = |tensor: Named| Some((tensor.name.strip_prefix(ATTENTION)?.to_owned(), tensor));
    let found: BTreeMap<String, Named> = named(&grown).into_iter().filter_map(of_layer).collect();
    let wanted = ours(golden.tensors.under("grown.w."));
    assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>(), "{name}");
    for (key, want) in wanted {
        assert_eq!(found[&key].shape, want.shape, "{name}: {key}");
        compare(name, &key, &want.values, &found[&key].values, 1e-7, false);
    }
    // The grown layer reads and writes every clone of a channel.
    let noisy = grow(&parent, &growth(Growth::NOISE)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let before = tensor::<3>(&golden.tensors, "base.x", &device);
    compare(name, "grown.x", &golden.tensors["grown.x"].values, &values(before.repeat_dim(2, width)), 0.0, false);
    for (model, kind, config) in [(&parent, "base", &base), (&grown, "grown", &wide), (&noisy, "grown", &wide)] {
        let x = tensor(&golden.tensors, &format!("{kind}.x"), &device);
        let out = values(attend(config, &model.layers[0].attention, x));
        let key = format!("{kind}.out");
        compare(name, &key, &golden.tensors[key.as_str()].values, &out, OUTPUT, false);
    }
    let out = tensor::<3>(&golden.tensors, "base.out", &device).repeat_dim(2, width);
    compare(name, "grown.out", &golden.tensors["grown.out"].values, &values(out), OUTPUT, false);
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
