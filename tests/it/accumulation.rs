//! Gradient accumulation is only about memory: 2 rows x 4 passes is the same step as 8 rows x 1 pass.

use std::collections::BTreeMap;

use polyhead_kernels::comparison::{Tolerance, assert_close};
use polyhead_models::weights::{Named, from_safetensors};

use crate::world::{SMALL, World};

/// Of losses and gradient norms relative, of weights absolute: sums in f32 differ by their order only.
const TOLERANCE: f64 = 1e-6;
const STEPS: usize = 8;

/// Documents of 1 to 200 characters, packed without seeing each other: a row of 16 tokens has 8 to 16 targets, so that
/// a mean over passes is not the mean over targets.
#[test]
fn eight_rows_at_once_equal_four_times_two() {
    let recipe = SMALL
        .replace(
            "[data.markov]\nstates = 6",
            "[data.jsonl]\npaths = [\"rows.jsonl\"]\n[loader]\npacking = \"documents\"",
        )
        .replace("batch_size = 4\ngradient_accumulation_steps = 2", "")
        .replace("steps = 12", &format!("steps = {STEPS}"))
        // AdamW divides by the size of a gradient: without this, one that is nothing but rounding would count fully.
        + "[optimizer.adamw]\neps = 1e-4\n";
    let world = World::new(&recipe);
    let text = |length: usize| (0..length).map(|i| char::from(b'a' + (i * i + length) as u8 % 26)).collect::<String>();
    let rows = [1, 1, 1, 1, 1, 1, 1, 1, 200, 3, 1, 120, 7].repeat(8);
    let rows: Vec<String> = rows.into_iter().map(|length| format!("{{\"text\": \"{}\"}}", text(length))).collect();
    std::fs::write(world.dir.path().join("rows.jsonl"), rows.join("\n")).unwrap();

    let [at_once, in_parts] = [(8, 1), (2, 4)].map(|(batch_size, passes)| {
        let run = format!("{batch_size}x{passes}");
        let (batch_size, passes) =
            (format!("training.batch_size={batch_size}"), format!("training.gradient_accumulation_steps={passes}"));
        world.succeeds(&["train", "recipe.toml", &batch_size, &passes, "--out", &run]);
        (numbers(&world, &run), weights(&world, &run))
    });
    assert_eq!((at_once.0.len(), in_parts.0.len()), (STEPS, STEPS));
    for (step, (a, b)) in at_once.0.iter().zip(&in_parts.0).enumerate() {
        for (name, a, b) in [("loss", a.0, b.0), ("gradient norm", a.1, b.1)] {
            assert!((a - b).abs() <= TOLERANCE * a.abs(), "step {}: {name} {a} and {b}", step + 1);
        }
    }
    for (name, a) in &at_once.1 {
        let b = &in_parts.1[name];
        assert_close(name, &b.values, &a.values, Tolerance::absolute(TOLERANCE));
    }
}

/// Loss and gradient norm of every step.
fn numbers(world: &World, run: &str) -> Vec<(f64, f64)> {
    let lines = String::from_utf8(world.read(&format!("{run}/metrics.jsonl"))).unwrap();
    let values = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    values.filter_map(|value| Some((value.get("loss")?.as_f64()?, value.get("grad_norm")?.as_f64()?))).collect()
}

fn weights(world: &World, run: &str) -> BTreeMap<String, Named> {
    from_safetensors(&world.read(&format!("{run}/step-{STEPS:08}/model.safetensors"))).unwrap()
}
