//! Training in other number types and on other backends, through the portable forms of all operations, gives what the CPU's fused ones
//! give: 12 steps of every mechanism. Backends only with `cargo test -p polyhead --features ndarray`, `--features cuda` (which needs a GPU) or
//! `--features wgpu` (which needs a Vulkan driver; `benches/gpu/check.sh` installs one for the processor).

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::world::{SMALL, World};

/// The mechanism that `SMALL` has.
const GROUPED_DIFFERENTIAL: &str = "[model.decoder.attention.grouped_differential]\nn_heads = 4\nn_noise_heads = 2\n";

/// Every mechanism of a decoder, with settings that take all of its parts.
const MECHANISMS: [(&str, &str); 11] = [
    ("grouped_differential", "n_heads = 4\nn_noise_heads = 2"),
    ("softmax", "n_heads = 4\nn_kv_heads = 2\nqk_norm = true"),
    ("mixture_of_head", "n_heads = 4\nshared_heads = 1\ntop_k = 2"),
    ("decoupled_head", "n_heads = 4\nkey_map = [0, 0, 1, 1]\nvalue_map = [0, 1, 2, 0]"),
    ("key_driven", "n_heads = 4\nn_kv_heads = 2\nallocation.even = {}"),
    ("gated_delta_net", "n_heads = 2"),
    ("sink", "n_heads = 4"),
    ("diff_v2", "n_heads = 4"),
    ("gated_attention", "n_heads = 4"),
    ("mla", "n_heads = 4\nkv_lora_rank = 8\nq_lora_rank = 8"),
    ("softmax", "n_heads = 4\nwindow = 5"),
];

/// The CPU emulates bf16: slowly, and right.
#[test]
fn every_mechanism_trains_alike_in_bf16() {
    every_mechanism("flex", "bf16", 2e-2);
}

#[cfg(feature = "ndarray")]
#[test]
fn ndarray_and_flex_train_alike() {
    every_mechanism("ndarray", "f32", 1e-4);
}

#[cfg(feature = "cuda")]
#[test]
fn cuda_and_flex_train_alike() {
    every_mechanism("cuda", "f32", 1e-4);
}

#[cfg(feature = "cuda")]
#[test]
fn cuda_and_flex_train_alike_in_bf16() {
    every_mechanism("cuda", "bf16", 2e-2);
}

/// One mechanism: a software driver compiles the kernels of each for minutes.
#[cfg(feature = "wgpu")]
#[test]
fn wgpu_and_flex_train_alike() {
    let device = wgpu();
    train_alike(&device, MECHANISMS[0], "f32", 1e-4).unwrap();
}

#[cfg(feature = "wgpu")]
#[test]
fn wgpu_trains_every_mechanism() {
    every_mechanism(&wgpu(), "f32", 1e-4);
}

/// The GPU; where there is none, the software driver.
#[cfg(feature = "wgpu")]
fn wgpu() -> String {
    let (devices, _) = World::new(SMALL).succeeds(&["doctor"]);
    let usable = devices.lines().find_map(|line| line.strip_prefix("devices")).unwrap();
    let found = ["wgpu:0", "wgpu:cpu"].into_iter().find(|name| usable.contains(name));
    found.unwrap_or_else(|| panic!("no such device: this test needs one; {devices}")).to_owned()
}

/// Trains them all, some at a time where there are many cores, tells of each, and fails with those whose losses differ.
fn every_mechanism(device: &str, precision: &str, relative: f64) {
    let one = |at: usize| match MECHANISMS.get(at) {
        Some(&mechanism) => train_alike(device, mechanism, precision, relative),
        None => hilo_trains_alike(device, precision, relative),
    };
    let next = AtomicUsize::new(0);
    let rest =
        || std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&at| at <= MECHANISMS.len()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let problems: Vec<String> = std::thread::scope(|scope| {
        let workers =
            (0..(cores / 4).max(1)).map(|_| scope.spawn(|| rest().filter_map(|at| one(at).err()).collect::<Vec<_>>()));
        workers.collect::<Vec<_>>().into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

fn train_alike(device: &str, (name, settings): (&str, &str), precision: &str, relative: f64) -> Result<(), String> {
    assert!(SMALL.contains(GROUPED_DIFFERENTIAL));
    let own = format!("[model.decoder.attention.{name}]\n{settings}\n");
    compare_losses(&SMALL.replace(GROUPED_DIFFERENTIAL, &own), name, (device, precision), relative)
}

fn hilo_trains_alike(device: &str, precision: &str, relative: f64) -> Result<(), String> {
    let recipe = crate::classify::SHAPES.replace("attention.softmax]", "attention.hilo]");
    assert!(recipe != crate::classify::SHAPES);
    compare_losses(&recipe, "hilo", (device, precision), relative)
}

/// Trains on the CPU in f32 and there, and compares the losses of all steps and validations.
fn compare_losses(recipe: &str, name: &str, (device, precision): (&str, &str), relative: f64) -> Result<(), String> {
    let world = World::new(recipe);
    let start = std::time::Instant::now();
    let losses = |device: &str, precision: &str| -> Vec<f64> {
        let (out, precision) =
            (format!("{}-{precision}", device.replace(':', "-")), format!("training.precision={precision}"));
        let short = ["training.steps=12", "metrics.log_freq=1", "validation.interval=4", "checkpoint.interval=0"];
        let quick = ["training.gradient_accumulation_steps=1", "metrics.observe=false", "metrics.tensorboard=false"];
        let args = ["train", "recipe.toml", "--device", device, "--out", &out, &precision];
        world.succeeds(&[&args[..], &short, &quick].concat());
        let log = String::from_utf8(world.read(&format!("{out}/metrics.jsonl"))).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter_map(|line| line.get("loss").or(line.get("validation_loss"))?.as_f64()).collect()
    };
    let (flex, other) = (losses("flex", "f32"), losses(device, precision));
    assert!(flex.len() >= 12 && flex.len() == other.len(), "{flex:?}\n{other:?}");
    let apart = flex.iter().zip(&other).map(|(a, b)| ((a - b) / a).abs());
    // A loss that is no number is further apart than anything.
    let worst = apart.fold(0.0, |worst: f64, apart| if apart.is_nan() { f64::INFINITY } else { worst.max(apart) });
    println!("{name} {precision} on {device}: losses within {worst:.1e} ({:.0} s)", start.elapsed().as_secs_f64());
    match worst < relative {
        true => Ok(()),
        false => Err(format!(
            "{name} {precision} on {device}: {worst:.1e} apart, allowed {relative:.0e}\n{flex:?}\n{other:?}"
        )),
    }
}
