//! The plain forms of all operations, which other backends take, train as the fused ones do. Only with
//! `cargo test -p polyhead --features ndarray`.

use crate::world::{SMALL, World};

#[test]
fn ndarray_and_flex_train_alike() {
    let world = World::new(SMALL);
    let losses = |device: &str| -> Vec<f64> {
        world.succeeds(&["train", "recipe.toml", "--device", device, "--out", device]);
        let log = String::from_utf8(world.read(&format!("{device}/metrics.jsonl"))).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter_map(|line| line.get("loss").or(line.get("validation_loss"))?.as_f64()).collect()
    };
    // Fresh weights come from the backend's own random numbers: start both from the same ones.
    world.succeeds(&["train", "recipe.toml", "--out", "ndarray", "training.steps=1"]);
    world.succeeds(&["train", "recipe.toml", "--out", "flex", "training.steps=1"]);
    let (flex, ndarray) = (losses("flex"), losses("ndarray"));
    assert!(flex.len() > 12 && flex.len() == ndarray.len());
    for (a, b) in flex.iter().zip(&ndarray) {
        assert!((a - b).abs() < 1e-4, "{flex:?}\n{ndarray:?}");
    }
}
