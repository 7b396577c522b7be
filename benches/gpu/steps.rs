//! Whole training steps, each run a process of its own.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::Outcome;

/// Every mechanism of a decoder as models of this size have it.
const MECHANISMS: [(&str, &str); 11] = [
    ("softmax", "n_heads = 16"),
    ("softmax", "n_heads = 16\nn_kv_heads = 4"),
    ("grouped_differential", "n_heads = 16\nn_noise_heads = 4"),
    ("mixture_of_head", "n_heads = 16\nshared_heads = 4\ntop_k = 8"),
    (
        "decoupled_head",
        "n_heads = 16\nkey_map = [0,0,1,1,2,2,3,3,0,1,2,3,0,1,2,3]\nvalue_map = [0,0,0,0,1,1,1,1,2,2,2,2,3,3,3,3]",
    ),
    ("key_driven", "n_heads = 16\nn_kv_heads = 4\nallocation.even = {}"),
    ("sink", "n_heads = 16"),
    ("diff_v2", "n_heads = 16"),
    ("gated_attention", "n_heads = 16"),
    ("mla", "n_heads = 16\nkv_lora_rank = 256"),
    ("gated_delta_net", "n_heads = 16"),
];

/// Steps of a run; the first two warm up.
const STEPS: usize = 6;

/// d_model, n_layers, d_ff, seq_len, batch_size
fn sizes(small: bool) -> [usize; 5] {
    if small { [64, 2, 128, 32, 2] } else { [1024, 8, 3328, 2048, 8] }
}

fn recipe(mechanism: &str, settings: &str, device: &str, small: bool) -> String {
    let [d_model, n_layers, d_ff, seq, batch] = sizes(small);
    let precision = if device.starts_with("cuda") { "bf16" } else { "f32" };
    format!(
        "[model.decoder]\nd_model = {d_model}\nn_layers = {n_layers}\nd_ff = {d_ff}\ntie_embeddings = false\n\
         [model.decoder.attention.{mechanism}]\n{settings}\n[data.induction]\nvocab = 4096\n\
         [training]\nsteps = {STEPS}\nseq_len = {seq}\nbatch_size = {batch}\ndevice = \"{device}\"\nprecision = \"{precision}\"\n\
         [optimizer.adamw]\nlr = 1e-4\n[metrics]\nlog_freq = 1\ntensorboard = false\nobserve = false\n\
         [validation]\nbatches = 1\ninterval = 0\n[checkpoint]\ninterval = 0\n"
    )
}

/// Prints a row for each of them; one that fails says why and does not end the others.
pub fn mechanisms(polyhead: &Path, device: &str, small: bool) -> Outcome<()> {
    println!("| mechanism | settings | ms a step | tokens/s | first loss | last loss |\n|---|---|---|---|---|---|");
    let folder = tempfile::tempdir()?;
    let [.., seq, batch] = sizes(small);
    for (mechanism, settings) in MECHANISMS {
        let file = folder.path().join("recipe.toml");
        std::fs::write(&file, recipe(mechanism, settings, device, small))?;
        let row = train(polyhead, folder.path(), &file, (seq * batch) as f64);
        let settings = settings.replace('\n', ", ");
        println!("| {mechanism} | {settings} | {} |", row.unwrap_or_else(|problem| format!("{problem} | | |")));
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// The columns of a run: its median step, and its losses.
fn train(polyhead: &Path, folder: &Path, recipe: &Path, tokens: f64) -> Result<String, String> {
    let run = folder.join("run");
    let _ = std::fs::remove_dir_all(&run);
    let output = Command::new(polyhead).arg("train").arg(recipe).arg("--out").arg(&run).output();
    let output = output.map_err(|error| format!("{}: {error}", polyhead.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("failed").replace('|', "/"));
    }
    let log = std::fs::read_to_string(run.join("metrics.jsonl")).map_err(|error| error.to_string())?;
    let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let of = |key: &str| lines.iter().filter_map(|line| line.get("loss").and(line[key].as_f64())).collect::<Vec<_>>();
    let (losses, speeds) = (of("loss"), of("tokens_per_second"));
    let (Some(first), Some(last)) = (losses.first(), losses.last()) else { return Err("no losses".into()) };
    let mut speeds = speeds[2.min(speeds.len().saturating_sub(1))..].to_vec();
    speeds.sort_by(f64::total_cmp);
    let speed = speeds.get(speeds.len() / 2).copied().unwrap_or(f64::NAN);
    Ok(format!("{:.1} | {speed:.0} | {first:.4} | {last:.4}", 1e3 * tokens / speed))
}

/// The runtime's own log of every kernel, summed by name. Waiting for each kernel makes the step slower than it is.
pub fn profile(polyhead: &Path, device: &str, small: bool) -> Outcome<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("recipe.toml");
    std::fs::write(&file, recipe(MECHANISMS[0].0, MECHANISMS[0].1, device, small))?;
    std::fs::write(
        folder.path().join("cubecl.toml"),
        "[profiling]\nlogger = { level = \"medium\", file = \"kernels.log\" }\n",
    )?;
    let polyhead = std::fs::canonicalize(polyhead)?;
    let output = Command::new(polyhead)
        .current_dir(folder.path())
        .args(["train", "recipe.toml", "training.steps=3", "--out", "run"])
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    let log = std::fs::read_to_string(folder.path().join("kernels.log")).unwrap_or_default();
    let mut kernels: BTreeMap<&str, (u64, f64)> = BTreeMap::new();
    for (name, time) in log.lines().filter_map(kernel) {
        let (runs, sum) = kernels.entry(name).or_default();
        (*runs, *sum) = (*runs + 1, *sum + time);
    }
    let mut kernels: Vec<_> = kernels.into_iter().collect();
    kernels.sort_by(|(_, a), (_, b)| b.1.total_cmp(&a.1));
    let all: f64 = kernels.iter().map(|(_, (_, sum))| sum).sum();
    println!(
        "{:.1} ms in {} kernels, 3 steps and a validation\n",
        1e3 * all,
        kernels.iter().map(|(_, (n, _))| n).sum::<u64>()
    );
    println!("| kernel | runs | ms | share |\n|---|---|---|---|");
    for (name, (runs, sum)) in kernels.iter().take(40) {
        println!("| {} | {runs} | {:.2} | {:.1} % |", name.replace('|', "/"), 1e3 * sum, 100.0 * sum / all);
    }
    Ok(())
}

/// A line of the log, `| 12.3µs     | name`: the kernel and its seconds.
fn kernel(line: &str) -> Option<(&str, f64)> {
    let (_, rest) = line.split_once("| ")?;
    let (time, name) = rest.split_once('|')?;
    let time = time.trim();
    let digits = time.find(|sign: char| !sign.is_ascii_digit() && sign != '.')?;
    let unit = match &time[digits..] {
        "ns" => 1e-9,
        "µs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        _ => return None,
    };
    Some((name.trim(), time[..digits].parse::<f64>().ok()? * unit))
}
