//! bf16 products with f32 weights: the same run, within what bf16 can tell apart. The CPU does it slowly and exactly.

use crate::world::{SMALL, World};

#[test]
fn bf16_trains_as_f32_does() {
    let world = World::new(SMALL);
    let losses = |precision: &str| -> Vec<f64> {
        let precise = format!("training.precision={precision}");
        world.succeeds(&["train", "recipe.toml", &precise, "--out", precision]);
        let log = String::from_utf8(world.read(&format!("{precision}/metrics.jsonl"))).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter_map(|line| line.get("loss").or(line.get("validation_loss"))?.as_f64()).collect()
    };
    let (f32, bf16) = (losses("f32"), losses("bf16"));
    assert!(f32.len() > 12 && f32.len() == bf16.len());
    assert!(f32 != bf16, "bf16 was not used");
    for (a, b) in f32.iter().zip(&bf16) {
        assert!((a - b).abs() < 2e-2 * a, "{f32:?}\n{bf16:?}");
    }
    // The checkpoint is one like any other: f32, and good for further use.
    world.succeeds(&["eval", "bf16", "--batches", "1"]);
}

#[test]
fn classifiers_train_in_bf16_too() {
    let world = World::new(crate::classify::SHAPES);
    let last = |precision: &str| -> f64 {
        let precise = format!("training.precision={precision}");
        world.succeeds(&["train", "recipe.toml", &precise, "training.steps=12", "--out", precision]);
        let log = String::from_utf8(world.read(&format!("{precision}/metrics.jsonl"))).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter_map(|line| line["loss"].as_f64()).next_back().unwrap()
    };
    let (f32, bf16) = (last("f32"), last("bf16"));
    assert!(f32 != bf16 && (f32 - bf16).abs() < 3e-2 * f32, "{f32} {bf16}");
    world.succeeds(&["eval", "bf16"]);
}
