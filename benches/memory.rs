//! What `polyhead plan` says about memory beside the peak of a run: one recipe of each kind that takes memory in another way.
//!
//! ```sh
//! cargo bench --bench memory
//! cargo bench --bench memory -- --model DIR   # besides, LoRA and all weights of a pretrained model
//! ```
//!
//! Each run is a process of its own, so that its peak belongs to it alone.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// How far plan and peak may be apart.
const TENTH: f64 = 0.1;
/// What all runs share: a few steps, and no validation between them.
const SHORT: [&str; 7] = [
    "training.steps=3",
    "lr_scheduler.warmup_steps=1",
    "validation.interval=0",
    "validation.batches=1",
    "checkpoint.interval=0",
    "metrics.log_freq=1",
    "metrics.tensorboard=false",
];
const SOFTMAX: &str = "model.decoder.attention={softmax={n_heads=8,n_kv_heads=2}}";
const LORA: &str = "lora={rank=8,targets=[\"q_proj\",\"k_proj\",\"v_proj\",\"o_proj\"]}";

/// Compares the planned memory of six recipes with the measured peak.
#[derive(Parser)]
struct Args {
    /// Measure also the fine-tuning of this model in Hugging Face's format.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Outcome<()> {
    let args = Args::parse();
    let folder = tempfile::tempdir()?;
    let recipes = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes");
    let [decoder, classifier] = ["quickstart", "classify/shapes"].map(|name| format!("{recipes}/{name}.toml"));
    let (decoder, classifier) = (decoder.as_str(), classifier.as_str());
    let wide = ["model.decoder.d_model=512", "model.decoder.n_layers=8", "training.seq_len=256", SOFTMAX];
    let long = ["training.seq_len=1024"];
    let with = |base: &[&'static str], more: &[&'static str]| [base, more].concat();
    let works = vec![
        ("grouped differential, long rows", decoder, with(&long, &[])),
        ("softmax", decoder, with(&wide, &[])),
        ("softmax, two forward passes a step", decoder, with(&wide, &["training.gradient_accumulation_steps=2"])),
        ("softmax, layers run again", decoder, with(&wide, &["training.activation_checkpointing=\"block\""])),
        (
            "softmax, layers updated in the backward pass",
            decoder,
            with(&wide, &["training.optimizer_in_backward=true", "training.max_norm=0"]),
        ),
        ("vision transformer", classifier, vec!["training.batch_size=64"]),
    ];
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "What is written here does not matter, only that it is text. ".repeat(3000))?;
    let tune = |model: &Path, name: &str, shape: &str| -> Outcome<PathBuf> {
        let path = folder.path().join(name);
        let data =
            format!("[model]\npretrained = {model:?}\n[data.text]\npaths = [{text:?}]\n[training]\nsteps = 3\n{shape}");
        std::fs::write(&path, data)?;
        Ok(path)
    };
    println!("| recipe | planned MiB | measured MiB | planned / measured |\n|---|---|---|---|");
    let mut apart = 0;
    let mut tell = |name: &str, recipe: &str, overrides: &[&str]| -> Outcome<()> {
        let [planned, peak] = compare(recipe, overrides, &folder.path().join(name.replace([' ', ','], "-")))?;
        println!("| {name} | {planned:.0} | {peak:.0} | {:.2} |", planned / peak);
        apart += usize::from((planned / peak - 1.0).abs() > TENTH);
        Ok(())
    };
    for (name, recipe, overrides) in works {
        tell(name, recipe, &overrides)?;
    }
    let parent = tune(&folder.path().join("softmax"), "tuned.toml", "seq_len = 256\nbatch_size = 8\n")?;
    tell("LoRA of the softmax decoder", &parent.to_string_lossy(), &[LORA])?;
    if let Some(model) = &args.model {
        let recipe = tune(model, "pretrained.toml", "seq_len = 128\nbatch_size = 4\n")?.to_string_lossy().into_owned();
        tell("LoRA of the pretrained model", &recipe, &[LORA])?;
        tell("all weights of the pretrained model", &recipe, &[])?;
        let early = ["training.optimizer_in_backward=true", "training.max_norm=0"];
        tell("all weights of the pretrained model, updated in the backward pass", &recipe, &early)?;
    }
    match apart {
        0 => Ok(()),
        _ => Err(format!("{apart} plans are more than a tenth away from what was measured").into()),
    }
}

/// What is planned for a recipe, and the peak of its run, in MiB.
fn compare(recipe: &str, overrides: &[&str], run: &Path) -> Outcome<[f64; 2]> {
    let with = |command: &str, more: &[&str]| {
        let args = [&[command, recipe], &SHORT[..], overrides, more].concat();
        let output = Command::new(env!("CARGO_BIN_EXE_polyhead")).args(&args).output()?;
        match output.status.success() {
            true => Ok::<_, Box<dyn std::error::Error>>(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(format!("polyhead {args:?}: {}", String::from_utf8_lossy(&output.stderr)).into()),
        }
    };
    let plan = with("plan", &["--no-probe"])?;
    let planned = plan.lines().find_map(at_most).ok_or("plan tells no memory")?;
    with("train", &["--out", &run.to_string_lossy()])?;
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl"))?;
    let lines = metrics.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let peak = lines.filter_map(|line| line["memory"].as_f64()).fold(f64::NAN, f64::max);
    Ok([planned, peak / f64::from(1 << 20)])
}

/// The number of a line "at most 1.5 GiB at once".
fn at_most(line: &str) -> Option<f64> {
    let mut words = line.split_once("at most ")?.1.split(' ');
    let number: f64 = words.next()?.parse().ok()?;
    match words.next()? {
        "KiB" => Some(number / 1024.0),
        "MiB" => Some(number),
        "GiB" => Some(number * 1024.0),
        _ => None,
    }
}
