//! Layers that are updated while the backward pass goes on: the weights of a run, resumed or not, and what it cannot be combined with.

use crate::world::{SMALL, World};

const EARLY: [&str; 3] =
    ["training.max_norm=0", "training.gradient_accumulation_steps=1", "training.optimizer_in_backward=true"];

#[test]
fn runs_end_with_the_same_bits() {
    let world = World::new(SMALL);
    let train = |run: &str, changes: &[&str]| {
        world.succeeds(&[&["train", "recipe.toml", "--out", run], changes].concat());
        let file = |name: &str| world.read(&format!("{run}/step-00000012/{name}.safetensors"));
        [file("model"), file("optimizer")]
    };
    let plain = train("plain", &EARLY[..2]);
    assert!(train("early", &EARLY) == plain);
    assert!(train("again", &[&EARLY[..], &["training.activation_checkpointing=block"]].concat()) == plain);
    // Resumed from step 8.
    std::fs::remove_dir_all(world.dir.path().join("early/step-00000012")).unwrap();
    let resumed = train("early", &EARLY);
    assert!(resumed == plain);
}

#[test]
fn what_it_cannot_be_combined_with_is_refused() {
    let world = World::new(SMALL);
    for (changes, words) in [
        (&["training.gradient_accumulation_steps=1"][..], "training.max_norm (1) must be 0"),
        (&["training.max_norm=0"], "training.gradient_accumulation_steps (2) must be 1"),
        (&[EARLY[0], EARLY[1], "training.on_nonfinite=skip"], "must be \"stop\""),
        (&[EARLY[0], EARLY[1], "training.precision=bf16"], "training.precision must be \"f32\""),
        (&[EARLY[0], EARLY[1], "parallel.mode=data"], "for one process"),
        (&[EARLY[0], EARLY[1], "procedure.bilevel={}"], "for procedure.standard"),
    ] {
        let err = world.fails(2, &[&["validate", "recipe.toml", EARLY[2]], changes].concat());
        assert!(err.contains(words), "{changes:?}: {err}");
    }
}
