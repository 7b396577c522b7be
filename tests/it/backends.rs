//! Training on other backends, through the portable forms of all operations, gives what the CPU's fused ones give. Only with
//! `cargo test -p polyhead --features ndarray` or `--features cuda` (the latter needs a GPU).

use crate::world::{SMALL, World};

#[cfg(feature = "ndarray")]
#[test]
fn ndarray_and_flex_train_alike() {
    train_alike("ndarray", "f32", 1e-4);
}

#[cfg(feature = "cuda")]
#[test]
fn cuda_and_flex_train_alike() {
    train_alike("cuda", "f32", 1e-4);
    train_alike("cuda", "bf16", 2e-2);
}

fn train_alike(other: &str, precision: &str, relative: f64) {
    let world = World::new(SMALL);
    // Fresh weights come from the backend's own random numbers: both start from the same ones.
    world.succeeds(&["train", "recipe.toml", "--out", "first", "training.steps=1", "optimizer.adamw.lr=0"]);
    let rest = SMALL.split_once("[data.markov]").unwrap().1;
    let child = format!("[model]\npretrained = \"first\"\n[data.markov]{rest}");
    std::fs::write(world.dir.path().join("child.toml"), child).unwrap();
    let losses = |device: &str| -> Vec<f64> {
        let precision = format!("training.precision={precision}");
        let out = format!("{device}-{precision}");
        world.succeeds(&["train", "child.toml", "--device", device, "--out", &out, &precision]);
        let log = String::from_utf8(world.read(&format!("{out}/metrics.jsonl"))).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter_map(|line| line.get("loss").or(line.get("validation_loss"))?.as_f64()).collect()
    };
    let (flex, other) = (losses("flex"), losses(other));
    assert!(flex.len() > 12 && flex.len() == other.len());
    for (a, b) in flex.iter().zip(&other) {
        assert!((a - b).abs() < relative * a, "{flex:?}\n{other:?}");
    }
}
