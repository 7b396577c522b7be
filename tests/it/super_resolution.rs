//! Networks that enlarge images, from recipe to image.

use polyhead_training::tensorboard::EventValue;
use serde_json::Value;

use crate::pages::assert_whole;
use crate::resume::fingerprint_at;
use crate::world::World;

const SUPER_RESOLUTION: &str = r#"
[model.super_resolution]
scale = 2
d_model = 8
n_layers = 1
n_heads = 2
qk_dim = 4
d_ff = 8
local_patch = 4
[model.super_resolution.mixer.token_centres]
n_centres = 4
group_size = 8
decay = 0.5
[data.patterns]
size = 16
[training]
steps = 8
batch_size = 4
gradient_accumulation_steps = 2
[optimizer.adamw]
lr = 5e-3
[metrics]
log_freq = 1
image_interval = 4
[validation]
interval = 4
batches = 2
[checkpoint]
interval = 4
"#;

const RECIPE: &str = "recipe.toml";

fn json(world: &World, path: &str) -> Value {
    serde_json::from_slice(&world.read(path)).unwrap()
}

/// A PNG in one colour.
fn plain_image(world: &World, name: &str, [height, width]: [u32; 2]) {
    let file = std::fs::File::create(world.dir.path().join(name)).unwrap();
    let mut encoder = png::Encoder::new(file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    let pixels = [200, 100, 50].repeat((height * width) as usize);
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
}

fn size(png: &[u8]) -> (u32, u32) {
    png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap().info().size()
}

#[test]
fn a_network_learns_resumes_and_enlarges() {
    let world = World::new(SUPER_RESOLUTION);
    let (out, _) = world.succeeds(&["plan", RECIPE, "--no-probe"]);
    assert!(out.contains("mixer: token_centres") && out.contains("FLOPs per image"), "{out}");
    let (_, err) = world.succeeds(&["preview", RECIPE, "--rows", "1"]);
    assert!(err.contains("wrote 8 images to preview.png"), "{err}");
    let (_, err) = world.succeeds(&["train", RECIPE, "--out", "whole"]);
    for part in ["1 layers, attention: token_centres", "examples/s", "psnr", "upscale IMAGE --model whole"] {
        assert!(err.contains(part), "no {part} in: {err}");
    }
    // Centres belong to the state of a run: in two parts it is the same, to the bit.
    let decay = "lr_scheduler.decay=constant";
    world.succeeds(&["train", RECIPE, "--out", "one", decay]);
    world.succeeds(&["train", RECIPE, "--out", "two", decay, "training.steps=5", "validation.interval=100"]);
    world.succeeds(&["train", RECIPE, "--out", "two", decay]);
    let [one, two] = ["one", "two"].map(|run| fingerprint_at(&world, run, 8));
    assert!(one.0 == two.0 && one.1 == two.1, "weights, centres or the state of the optimiser differ");

    let shown = |tag: &str| {
        let found = world.events("whole").into_iter().filter(|event| event.tag == tag);
        found.filter(|event| matches!(event.value, EventValue::Image { .. })).count()
    };
    assert_eq!([shown("validation/images"), shown("model/attention/layer_00/maps")], [2, 2]);
    assert_eq!(size(&world.read("whole/images.png")), (3 * 6 * 16 + 4, 4 * 6 * 16 + 6));

    let (out, _) = world.succeeds(&["eval", "whole"]);
    let told: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(told["images"], 8);
    for (low, high, name) in
        [(5.0, 60.0, "psnr"), (0.0, 1.0, "ssim"), (5.0, 60.0, "bicubic_psnr"), (0.0, 1.0, "bicubic_ssim")]
    {
        let value = told[name].as_f64().unwrap();
        assert!((low..high).contains(&value), "{name}: {value}");
    }
    assert_eq!(told["loss"], json(&world, "whole/result.json")["validation"]["loss"]);

    plain_image(&world, "small.png", [5, 9]);
    world.succeeds(&["upscale", "small.png", "--model", "whole", "--out", "large.png"]);
    assert_eq!(size(&world.read("large.png")), (18, 10));
}

#[test]
fn mistakes_are_told_before_anything_runs() {
    let world = World::new(SUPER_RESOLUTION);
    world.succeeds(&["train", RECIPE, "--out", "run", "training.steps=1", "lr_scheduler.warmup_steps=0"]);
    let upscale = |code, image: &str, model: &str, out: &str| {
        world.fails(code, &["upscale", image, "--model", model, "--out", out])
    };
    plain_image(&world, "thin.png", [3, 40]);
    plain_image(&world, "good.png", [8, 8]);
    std::fs::write(world.dir.path().join("text.png"), b"no picture").unwrap();
    std::fs::write(world.dir.path().join("cut.png"), &world.read("good.png")[..60]).unwrap();
    for (code, image, model, out, words) in [
        (1, "thin.png", "run", "a.png", "3 x 40 pixels"),
        (1, "text.png", "run", "a.png", "text.png: not a readable image"),
        (1, "cut.png", "run", "a.png", "cut.png"),
        (1, "nowhere.png", "run", "a.png", "nowhere.png"),
        (2, "good.png", "nowhere", "a.png", "nowhere"),
        (2, "good.png", "run", "a.jpg", ".png"),
        (1, "good.png", "run", "good.png", "exists already"),
    ] {
        let err = upscale(code, image, model, out);
        assert!(err.contains(words), "{image}, {model}, {out}: {err}");
        assert!(!world.dir.path().join("a.png").exists());
    }
    let err = world.fails(2, &["generate", "run", "--prompt", "a"]);
    assert!(err.contains("polyhead upscale"), "{err}");
    for (change, words) in [
        ("model.super_resolution.scale=5", "scale (5) must be 2, 3 or 4"),
        ("model.super_resolution.scale=3", "scale (3) must divide"),
        ("data.patterns.size=14", "SSIM"),
        ("model.super_resolution.local_patch=9", "local_patch (9)"),
        ("model.super_resolution.local_patch=[4, 4]", "2 numbers for n_layers (1)"),
        ("data.shapes.size=16", "has no images without classes"),
        ("training.dropout=0.1", "training.dropout"),
        ("training.precision=\"bf16\"", "must be \"f32\""),
        ("augmentation.flip=true", "augmentation is for model.classifier"),
        ("model.super_resolution.mixer.attention.hilo.window=9", "n_heads"),
    ] {
        let err = world.fails(2, &["train", RECIPE, "--out", "other", change]);
        assert!(err.contains(words), "{change}: {err}");
    }
    let err = world.fails(2, &["validate", RECIPE, "model.decoder.d_model=8"]);
    assert!(err.contains("super_resolution stands alone") || err.contains("model.decoder"), "{err}");
}

#[test]
fn a_comparison_shows_the_images_of_its_arms() {
    let world = World::new(SUPER_RESOLUTION);
    let comparison = r#"
title = "Mixers"
extends = "recipe.toml"
seeds = [0]
match = "parameters"
solve = "model.super_resolution.d_ff"
tolerance = 0.2
[recipe]
training.steps = 2
[[arm]]
name = "centres"
[[arm]]
name = "windows"
recipe.model.super_resolution.mixer.attention.hilo = { n_heads = 2, window = 4, alpha = 0.0 }
"#;
    std::fs::write(world.dir.path().join("mixers.toml"), comparison).unwrap();
    world.succeeds(&["compare", "mixers.toml", "--out", "report"]);
    let page = String::from_utf8(world.read("report/report.html")).unwrap();
    assert_eq!(page.matches("data:image/png;base64,").count(), 2);
    assert!(page.contains("psnr/validation"), "further numbers");
    assert_whole(&world.dir.path().join("report/report.html"));
}
