//! Where the time of a training goes: `train --profile`.

use serde_json::Value;

use crate::world::{SMALL, World};

/// A span: its name, and when it begins and ends.
struct Span {
    name: String,
    begin: f64,
    end: f64,
}

fn spans(trace: &[u8]) -> Vec<Span> {
    let events: Vec<Value> = serde_json::from_slice(trace).unwrap();
    let spans = events.iter().filter(|event| event["ph"] == "X").map(|event| {
        let [begin, took] = ["ts", "dur"].map(|key| event[key].as_f64().unwrap());
        assert!(took >= 0.0 && event["pid"].is_u64() && event["tid"].is_u64(), "{event}");
        Span { name: event["name"].as_str().unwrap().into(), begin, end: begin + took }
    });
    spans.collect()
}

#[test]
fn a_profile_has_every_part_of_every_step() {
    let world = World::new(SMALL);
    let train = ["train", "recipe.toml", "--out", "profiled", "--profile", "traces/trace.json"];
    let (_, told) = world.succeeds(&train);
    assert!(told.contains("profile: traces/trace.json"), "{told}");
    let spans = spans(&world.read("traces/trace.json"));
    let named = |name: &str| spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    let inside = |inner: &Span, outer: &Span| {
        // Times are rounded to nanoseconds.
        outer.begin - 1e-3 <= inner.begin && inner.end <= outer.end + 1e-3
    };
    let around = |inner: &Span, outer: &str| named(outer).into_iter().filter(|outer| inside(inner, outer)).count();

    // 12 steps of 2 forward passes through 2 layers; 3 validations of 2 batches, and 3 looks at a row.
    for step in 1..=12 {
        let step = named(&format!("step {step}"));
        assert_eq!(step.len(), 1);
        for (part, times) in [
            ("data", 1),
            ("forward", 2),
            ("layer 0", 2),
            ("layer 1", 2),
            ("loss", 2),
            ("backward", 2),
            ("optimizer", 1),
        ] {
            assert_eq!(named(part).into_iter().filter(|span| inside(span, step[0])).count(), times, "{part}");
        }
    }
    for (part, times) in [("validation", 3), ("checkpoint", 3), ("observe", 3)] {
        assert_eq!(named(part).len(), times, "{part}");
    }
    let layers = |outer: &str| named("layer 1").into_iter().filter(|layer| around(layer, outer) == 1).count();
    assert_eq!((layers("validation"), layers("observe")), (3 * 2, 3));
    for (inner, outer) in [("attention", "forward"), ("feed-forward", "forward"), ("layer 1", "forward")] {
        assert!(named(inner).into_iter().all(|inner| around(inner, outer) == 1), "{inner} in {outer}");
    }
    assert!(named("attention").iter().all(|inner| around(inner, "layer 0") + around(inner, "layer 1") == 1));
    assert!(named("loss").iter().all(|loss| around(loss, "forward") == 0));

    // It changes nothing, and the same command writes it again.
    world.succeeds(&["train", "recipe.toml", "--out", "plain"]);
    let weights = |run: &str| world.read(&format!("{run}/step-00000012/model.safetensors"));
    assert_eq!(weights("profiled"), weights("plain"));
    world.succeeds(&train);

    let refused = world.fails(1, &["train", "recipe.toml", "--out", "other", "--profile", "recipe.toml"]);
    assert!(refused.contains("recipe.toml") && refused.contains("is no trace"), "{refused}");
    assert_eq!(world.read("recipe.toml"), SMALL.as_bytes());
    assert!(!world.dir.path().join("other").exists());
}
