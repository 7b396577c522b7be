//! Polyhead beside PyTorch: the same decoder, first weights and first batch, trained alternately in one session.
//!
//! ```sh
//! cargo bench --bench side_by_side -- --python venv/bin/python --out benches/RESULTS.md
//! cargo bench --bench side_by_side -- --python venv/bin/python --model DIR   # a pretrained model, beside transformers
//! cargo bench --bench side_by_side -- --python venv/bin/python --shape 135m  # the same with fresh weights
//! ```
//!
//! Every measurement is a process of its own, so that peak memory belongs to it alone. Times are medians over the steps of
//! all rounds, the first two steps of a process left out. Every row is printed as soon as it is known, those of torch.compile
//! last, so that a run that is cut short leaves what it found. Without PyTorch only Polyhead is measured. `--device cuda`
//! measures a decoder with 350 million parameters in bf16 on a GPU (benches/gpu/stage.sh builds for it).

mod median;
mod section;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Instant;

use burn::tensor::{DType, Device, Distribution, Tensor};
use clap::Parser;
use serde_json::{Value, json};

use median::median;

mod pretrained;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Steps of a process that only warm up.
const WARM_UP: usize = 2;

/// Trains the same decoders in Polyhead and in PyTorch, alternately, and prints how fast and how lean each was.
#[derive(Parser)]
struct Args {
    /// A Python with torch and safetensors; without it only Polyhead is measured.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Turns; every turn runs each side once.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Steps of a turn.
    #[arg(long, default_value_t = 8)]
    steps: usize,
    /// Only the work of this name; of a pretrained model, the tasks whose names contain it.
    #[arg(long)]
    only: Option<String>,
    /// Where to train: flex or cuda.
    #[arg(long, default_value = "flex", value_parser = ["flex", "cuda"])]
    device: String,
    /// What the device can do at most, in TFLOP/s; measured if not given.
    #[arg(long)]
    peak_tflops: Option<f64>,
    /// Measure a pretrained model in Hugging Face's format instead: fine-tuning, loading, generating, reading a long prompt.
    #[arg(long)]
    model: Option<PathBuf>,
    /// The same with fresh weights in the shape of a published model with 135 million parameters, or of 12 layers of one with
    /// 360 million; needs transformers.
    #[arg(long, conflicts_with = "model", value_parser = ["135m", "360m"])]
    shape: Option<String>,
    /// Leave torch.compile out.
    #[arg(long)]
    no_compile: bool,
    /// Write the tables to this file as well, in place of those of the same kind; what else is in it stays.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A decoder and a batch.
#[derive(Clone, Copy)]
struct Work {
    name: &'static str,
    mechanism: &'static str,
    d_model: usize,
    n_layers: usize,
    d_ff: usize,
    n_heads: usize,
    seq: usize,
    batch: usize,
    device: &'static str,
    precision: &'static str,
}

const VOCAB: usize = 4096;

const SMALL: Work = Work {
    name: "small",
    mechanism: "softmax",
    d_model: 256,
    n_layers: 6,
    d_ff: 704,
    n_heads: 8,
    seq: 256,
    batch: 8,
    device: "flex",
    precision: "f32",
};
const BIG: Work = Work { name: "big", d_model: 512, n_layers: 8, d_ff: 1408, seq: 512, batch: 4, ..SMALL };
/// Six signal heads and two noise heads.
const SMALL_GDA: Work = Work { name: "small, GDA 3:1", mechanism: "grouped_differential", ..SMALL };
const BIG_GDA: Work = Work { name: "big, GDA 3:1", mechanism: "grouped_differential", ..BIG };
const WORKS: [Work; 4] = [SMALL, BIG, SMALL_GDA, BIG_GDA];
/// 350 million parameters.
const GPU: Work = Work {
    name: "350M",
    d_model: 1024,
    n_layers: 24,
    d_ff: 3328,
    n_heads: 16,
    seq: 2048,
    device: "cuda",
    precision: "bf16",
    ..SMALL
};
const GPU_GDA: Work = Work { name: "350M, GDA 3:1", mechanism: "grouped_differential", ..GPU };

/// What a side needed.
#[derive(Default)]
struct Measured {
    seconds: Vec<f64>,
    first_loss: f64,
    peak_bytes: f64,
}

impl Measured {
    fn add(&mut self, seconds: &[f64], first_loss: f64, peak_bytes: f64) {
        self.seconds.extend(&seconds[WARM_UP.min(seconds.len().saturating_sub(1))..]);
        self.first_loss = first_loss;
        self.peak_bytes = self.peak_bytes.max(peak_bytes);
    }
}

fn main() -> Outcome<()> {
    let args = Args::parse();
    let folder = tempfile::tempdir()?;
    let torch = args.python.as_ref().and_then(|python| torch_version(python));
    match (&args.python, &torch) {
        (None, _) => eprintln!("no --python given: only Polyhead is measured"),
        (Some(python), None) => {
            eprintln!("{} has no torch and safetensors: only Polyhead is measured", python.display())
        }
        (_, Some(version)) => eprintln!("torch {version}"),
    }
    let on_gpu = args.device == "cuda";
    let peak = args.peak_tflops.map_or_else(|| gemm_peak(on_gpu), |peak| peak * 1e12);
    let python = args.python.as_deref().filter(|_| torch.is_some());
    let mut report = Report::default();
    report.tell(header(peak, torch.as_deref()));
    let shaped = args.shape.as_deref().map(|shape| pretrained::shaped(shape, python, folder.path())).transpose()?;
    if let Some(model) = args.model.as_ref().or(shaped.as_ref()) {
        report.tell(pretrained::compare(model, python, folder.path(), &args)?);
        return report.keep("pretrained", args.out.as_deref());
    }
    report.tell(format!(
        "Vocabulary {VOCAB}, untied; small: d_model 256, 6 layers, 8 heads, 8 rows of 256 tokens; big: d_model 512, 8 layers, \
         8 heads, 4 rows of 512. GFLOP/s are the model's useful operations (three forward passes, half of the causal \
         square), not what was computed.\n"
    ));
    let works = if on_gpu { vec![GPU, GPU_GDA] } else { WORKS.to_vec() };
    let chosen = |name: &str| args.only.as_ref().is_none_or(|only| only == name);
    let names = Vec::from_iter(
        works.iter().map(|work| work.name).chain(["long", "generation"].into_iter().filter(|_| !on_gpu)),
    );
    if !names.iter().any(|name| chosen(name)) {
        return Err(format!("--only takes one of {names:?}").into());
    }
    if works.iter().any(|work| chosen(work.name)) {
        report.tell(
            "| work | side | ms a step | tokens/s | against eager | peak MiB | against eager | GFLOP/s | first loss |",
        );
        report.tell("|---|---|---|---|---|---|---|---|---|");
        for work in works.iter().filter(|work| chosen(work.name)) {
            compare(work, python, &args, folder.path(), peak, &mut report)?;
        }
        report.tell("");
    }
    if !on_gpu && chosen("long") {
        report.tell(long_sequences(folder.path())?);
    }
    if !on_gpu && chosen("generation") {
        report.tell(generation(python, args.rounds, folder.path())?);
    }
    report.keep("side_by_side", args.out.as_deref())
}

/// What was found so far; it is on standard output already.
#[derive(Default)]
struct Report(String);

impl Report {
    fn tell(&mut self, lines: impl AsRef<str>) {
        println!("{}", lines.as_ref());
        self.0 += lines.as_ref();
        self.0 += "\n";
    }

    fn keep(&self, kind: &str, out: Option<&Path>) -> Outcome<()> {
        if let Some(out) = out {
            section::replace(out, kind, &self.0)?;
            eprintln!("wrote {}", out.display());
        }
        Ok(())
    }
}

fn torch_version(python: &Path) -> Option<String> {
    let probe = "import torch, safetensors; print(torch.__version__)";
    let output = Command::new(python).args(["-c", probe]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl Work {
    fn torch_device(&self) -> &'static str {
        if self.device == "flex" { "cpu" } else { self.device }
    }
}

/// Memory of the GPU that is in use, in bytes; what a process needs is the largest of these while it runs.
fn gpu_memory() -> Option<f64> {
    let query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"];
    let output = Command::new("nvidia-smi").args(query).output().ok()?;
    String::from_utf8_lossy(&output.stdout).trim().parse::<f64>().ok().map(|mebibytes| mebibytes * 1048576.0)
}

/// Runs `command`; on a GPU with the largest amount of its memory that was in use meanwhile.
fn watched(mut command: Command, on_gpu: bool) -> Outcome<(std::process::Output, Option<f64>)> {
    let (done, is_done) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        let (before, mut peak) = (gpu_memory().filter(|_| on_gpu)?, 0f64);
        while is_done
            .recv_timeout(std::time::Duration::from_millis(100))
            .is_err_and(|end| end == RecvTimeoutError::Timeout)
        {
            peak = peak.max(gpu_memory()? - before);
        }
        Some(peak)
    });
    let output = command.output()?;
    drop(done);
    Ok((output, watch.join().ok().flatten()))
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// FLOP/s of a large product, the median of seven: f32 on the CPU, bf16 on a GPU.
fn gemm_peak(on_gpu: bool) -> f64 {
    let (device, dtype, size) = match on_gpu {
        #[cfg(feature = "cuda")]
        true => (Device::cuda(0), DType::BF16, 8192),
        _ => (Device::flex(), DType::F32, 2048),
    };
    let matrix = || Tensor::<2>::random([size, size], Distribution::Uniform(0.0, 1.0), &device).cast(dtype);
    let (a, b) = (matrix(), matrix());
    let seconds = (0..7).map(|_| {
        let start = Instant::now();
        let product = a.clone().matmul(b.clone());
        // A number that has arrived here shows that the product is done.
        let _ = product.narrow(0, 0, 1).narrow(1, 0, 1).into_data();
        start.elapsed().as_secs_f64()
    });
    2.0 * (size as f64).powi(3) / median(seconds.collect())
}

fn header(peak: f64, torch: Option<&str>) -> String {
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = processor.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("unknown");
    let wide = if processor.contains("avx512f") { "AVX-512" } else { "no AVX-512" };
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: String = load.split_whitespace().take(3).collect::<Vec<_>>().join(" ");
    format!(
        "Made by `cargo bench --bench side_by_side`. {}, {} threads, {model} ({wide}), load before \
         {load}; Polyhead {}, {}. A product of 2048 x 2048 matrices reaches {:.0} GFLOP/s.\n",
        date(),
        threads(),
        env!("CARGO_PKG_VERSION"),
        torch.map_or("without PyTorch".into(), |version| format!("PyTorch {version}")),
        peak / 1e9
    )
}

fn date() -> String {
    let output = Command::new("date").arg("+%Y-%m-%d").output();
    output.map_or_else(|_| "unknown date".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Measures all sides of a work in turns. The row of each is told in the last of them.
fn compare(
    work: &Work,
    python: Option<&Path>,
    args: &Args,
    folder: &Path,
    peak: f64,
    report: &mut Report,
) -> Outcome<()> {
    eprintln!("{} ...", work.name);
    let recipe = folder.join("recipe.toml");
    std::fs::write(&recipe, recipe_of(work, args.steps))?;
    let mut sides: Vec<(&str, Measured)> = vec![("Polyhead", Measured::default())];
    let spec = match python {
        Some(_) => {
            sides.insert(0, ("PyTorch", Measured::default())); // what the others are set against
            if !args.no_compile {
                sides.push(("torch.compile", Measured::default()));
            }
            Some(specify(work, args.steps, &recipe, folder)?)
        }
        None => None,
    };
    let flops = flops_per_step(work, &recipe)?;
    let mut eager = None;
    for round in 1..=args.rounds {
        for (side, measured) in &mut sides {
            match (*side, python, &spec) {
                ("Polyhead", ..) => train(work, &recipe, folder, measured)?,
                (side, Some(python), Some(spec)) => {
                    pytorch(python, spec, side != "PyTorch", work.device == "cuda", measured)?
                }
                _ => {}
            }
            let seconds = median(measured.seconds.clone());
            eprintln!("  round {round} {side}: {:.0} ms", 1e3 * seconds);
            if round < args.rounds {
                continue;
            }
            if *side == "PyTorch" {
                eager = Some((seconds, measured.peak_bytes));
            }
            let against = |ratio: Option<f64>| ratio.map_or("-".into(), |ratio| format!("{ratio:.2}x"));
            report.tell(format!(
                "| {} | {side} | {:.0} | {:.0} | {} | {:.0} | {} | {:.0} ({:.0} %) | {:.4} |",
                work.name,
                1e3 * seconds,
                (work.batch * work.seq) as f64 / seconds,
                against(eager.map(|(time, _)| time / seconds)),
                measured.peak_bytes / 1048576.0,
                against(eager.map(|(_, bytes)| measured.peak_bytes / bytes)),
                flops / seconds / 1e9,
                100.0 * flops / seconds / peak,
                measured.first_loss
            ));
        }
    }
    Ok(())
}

fn recipe_of(work: &Work, steps: usize) -> String {
    let Work { mechanism, d_model, n_layers, d_ff, n_heads, seq, batch, device, precision, .. } = *work;
    let noise = match mechanism {
        "grouped_differential" => format!("n_noise_heads = {}\n", n_heads / 4),
        _ => String::new(),
    };
    format!(
        "[model.decoder]\nd_model = {d_model}\nn_layers = {n_layers}\nd_ff = {d_ff}\ntie_embeddings = false\n\
         [model.decoder.attention.{mechanism}]\nn_heads = {n_heads}\n{noise}\
         [data.induction]\nvocab = {VOCAB}\n\
         [training]\nsteps = {steps}\nseq_len = {seq}\nbatch_size = {batch}\ndevice = \"{device}\"\nprecision = \"{precision}\"\n\
         [optimizer.adamw]\nlr = 1e-4\n\
         [metrics]\nlog_freq = 1\ntensorboard = false\nobserve = false\n\
         [validation]\nbatches = 1\n[checkpoint]\ninterval = 0\n"
    )
}

/// The program that is measured: POLYHEAD says where it is on a machine that did not build it.
fn program() -> PathBuf {
    std::env::var_os("POLYHEAD").map_or_else(|| env!("CARGO_BIN_EXE_polyhead").into(), PathBuf::from)
}

/// The folder of the other side's scripts: POLYHEAD_BENCHES likewise.
fn scripts() -> PathBuf {
    let own = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../benches");
    std::env::var_os("POLYHEAD_BENCHES").map_or_else(own, PathBuf::from)
}

fn polyhead(args: &[&str]) -> Outcome<String> {
    let output = Command::new(program()).args(args).output()?;
    if !output.status.success() {
        return Err(format!("polyhead {args:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

/// Trains and reads what the run wrote down.
fn train(work: &Work, recipe: &Path, folder: &Path, measured: &mut Measured) -> Outcome<()> {
    let run = folder.join("run");
    let _ = std::fs::remove_dir_all(&run);
    let mut command = Command::new(program());
    command.args(["train", text(recipe), "--out", text(&run)]);
    let (output, on_gpu) = watched(command, work.device == "cuda")?;
    if !output.status.success() {
        return Err(format!("polyhead train: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let log = std::fs::read_to_string(run.join("metrics.jsonl"))?;
    let lines: Vec<Value> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let steps: Vec<&Value> = lines.iter().filter(|line| line.get("loss").is_some()).collect();
    let number = |line: &Value, key: &str| line[key].as_f64().unwrap_or(f64::NAN);
    let tokens = (work.batch * work.seq) as f64;
    let seconds: Vec<f64> = steps.iter().map(|line| tokens / number(line, "tokens_per_second")).collect();
    let peak = on_gpu.unwrap_or_else(|| steps.iter().map(|line| number(line, "memory")).fold(0.0, f64::max));
    measured.add(&seconds, steps.first().map_or(f64::NAN, |line| number(line, "loss")), peak);
    Ok(())
}

/// Describes the work to the other side: the weights before the first step, and the first batch.
fn specify(work: &Work, steps: usize, recipe: &Path, folder: &Path) -> Outcome<PathBuf> {
    let run = folder.join("start");
    let _ = std::fs::remove_dir_all(&run);
    // A step that moves nothing leaves the first weights in its checkpoint.
    let still = ["training.steps=1", "optimizer.adamw.lr=0"];
    polyhead(&["train", text(recipe), still[0], still[1], "--out", text(&run)])?;
    let shown = polyhead(&["preview", text(recipe), "--rows", &work.batch.to_string()])?;
    let (mut tokens, mut targets) = (Vec::new(), Vec::new());
    for (line, target) in shown.lines().filter_map(|line| line.split_once("->")) {
        tokens.push(line.split_whitespace().last().ok_or("a token")?.parse::<i64>()?);
        targets.push(target.trim().parse::<i64>().unwrap_or(-100));
    }
    assert_eq!(tokens.len(), work.batch * work.seq, "`preview` shows the whole batch");
    let spec = json!({
        "mechanism": work.mechanism, "d_model": work.d_model, "n_layers": work.n_layers, "d_ff": work.d_ff,
        "n_heads": work.n_heads, "n_noise_heads": work.n_heads / 4, "seq": work.seq, "batch": work.batch, "vocab": VOCAB,
        "steps": steps, "threads": threads(), "device": work.torch_device(), "precision": work.precision, "tokens": tokens, "targets": targets,
        "weights": run.join("step-00000001/model.safetensors"),
    });
    let path = folder.join("work.json");
    std::fs::write(&path, spec.to_string())?;
    Ok(path)
}

fn pytorch(python: &Path, spec: &Path, compiled: bool, on_gpu: bool, measured: &mut Measured) -> Outcome<()> {
    let script = scripts().join("pytorch.py");
    let mut command = Command::new(python);
    command.arg(script).arg(spec).args(compiled.then_some("--compile"));
    let (output, on_gpu) = watched(command, on_gpu)?;
    let last = String::from_utf8_lossy(&output.stdout).lines().last().unwrap_or_default().to_owned();
    let result: Value = serde_json::from_str(&last)
        .map_err(|_| format!("{}: {}", python.display(), String::from_utf8_lossy(&output.stderr)))?;
    let seconds: Vec<f64> = result["seconds"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
    let number = |key: &str| result[key].as_f64().unwrap_or(f64::NAN);
    measured.add(&seconds, number("first_loss"), on_gpu.unwrap_or_else(|| number("peak_bytes")));
    Ok(())
}

/// Useful operations of a step, from `polyhead plan`.
fn flops_per_step(work: &Work, recipe: &Path) -> Outcome<f64> {
    let plan = polyhead(&["plan", text(recipe), "--no-probe"])?;
    let all = plan.lines().find(|line| line.starts_with("all ")).ok_or("plan shows a sum")?;
    let per_token: f64 = all.split_whitespace().nth(2).ok_or("FLOPs per token")?.replace(',', "").parse()?;
    Ok(3.0 * per_token * (work.batch * work.seq) as f64)
}

/// Peak memory over the length of the sequence: it has to grow with the length, not with its square.
fn long_sequences(folder: &Path) -> Outcome<String> {
    let mut table = "One row, 2 layers of d_model 256, 8 heads, time and peak memory of training by length, softmax and Gated DeltaNet in \
                     turn:\n\n| tokens | softmax, ms a step | Gated DeltaNet, ms a step | softmax, peak MiB | more than at half the \
                     length | Gated DeltaNet, peak MiB | more than at half the length |\n|---|---|---|---|---|---|---|\n"
        .to_owned();
    let mut before: [Option<f64>; 2] = [None; 2];
    for seq in [512, 1024, 2048, 4096, 8192] {
        let (mut times, mut memory) = (String::new(), String::new());
        for (mechanism, before) in ["softmax", "gated_delta_net"].into_iter().zip(&mut before) {
            eprintln!("long: {mechanism}, {seq} tokens ...");
            let work = Work { mechanism, n_layers: 2, seq, batch: 1, ..SMALL };
            let recipe = folder.join("recipe.toml");
            std::fs::write(&recipe, recipe_of(&work, 4))?;
            let mut measured = Measured::default();
            train(&work, &recipe, folder, &mut measured)?;
            let peak = measured.peak_bytes / 1048576.0;
            let more = before.map_or("-".into(), |before| format!("{:.0}", peak - before));
            times += &format!(" {:.0} |", 1e3 * median(measured.seconds));
            memory += &format!(" {peak:.0} | {more} |");
            *before = Some(peak);
        }
        table += &format!("| {seq} |{times}{memory}\n");
    }
    Ok(table)
}

/// New tokens of a generation.
const NEW_TOKENS: &str = "256";

/// Greedy decoding with cached keys and values, one row, beside transformers' `generate` on the exported model.
fn generation(python: Option<&Path>, rounds: usize, folder: &Path) -> Outcome<String> {
    let (book, recipe, run, exported) =
        (folder.join("book.txt"), folder.join("recipe.toml"), folder.join("writer"), folder.join("exported"));
    std::fs::write(&book, "What is written here does not matter, only that it is text. ".repeat(200))?;
    std::fs::write(&recipe, recipe_of(&Work { seq: 64, batch: 1, ..BIG }, 1))?;
    let data = format!("data.text.paths=[{:?}]", text(&book));
    polyhead(&["train", text(&recipe), &data, "optimizer.adamw.lr=0", "--out", text(&run)])?;
    polyhead(&["export", text(&run), "--to", text(&exported)])?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        eprintln!("generation: round {round} ...");
        let args = ["generate", text(&run), "--prompt", "Once upon a time", "--temperature", "0"];
        let output = Command::new(program()).args(args).args(["--max-new-tokens", NEW_TOKENS]).output()?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        let rate = told.lines().last().and_then(|line| line.strip_prefix(&format!("{NEW_TOKENS} tokens, ")));
        ours.push(rate.and_then(|rate| rate.split(' ').next()?.parse().ok()).ok_or(told.clone())?);
        if let Some(python) = python {
            let script = scripts().join("transformers_generate.py");
            let output =
                Command::new(python).arg(script).arg(&exported).args([NEW_TOKENS, &threads().to_string()]).output()?;
            let told = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            match told.parse::<f64>() {
                Ok(rate) => theirs.push(rate),
                Err(_) => eprintln!("transformers: {}", String::from_utf8_lossy(&output.stderr)),
            }
        }
    }
    let (ours, theirs) = (median(ours), median(theirs));
    Ok(format!(
        "\nGreedy generation with cache, d_model 512, 8 layers, one row, {NEW_TOKENS} new tokens: Polyhead {ours:.0} tokens/s, \
         transformers' generate {theirs:.0} tokens/s, {:.2}x.\n",
        ours / theirs
    ))
}
