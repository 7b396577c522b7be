//! What a GPU does with the parts of a training step: products, attention, memory, whole steps of every mechanism.
//!
//! ```sh
//! cargo bench --features cuda --bench gpu -- products --device cuda
//! ```
//!
//! Each subcommand prints a table row by row, so that what was measured stays when a time limit ends it. On a machine without Rust
//! `benches/gpu/on_device.sh` runs what `benches/gpu/stage.sh` built. Times are of many runs behind each other, ended by waiting for
//! the device; what has to be compiled or tuned first is warmed up.

use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Distribution, Tensor};
use clap::{Parser, Subcommand};
use polyhead_kernels::{AttentionOptions, HeadMap, Mask, attention, in_type, use_tensor_cores};
use polyhead_runs::device;

mod linear_maps;
mod steps;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Measures a GPU.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
    /// Where to measure: as `training.device`.
    #[arg(long, global = true, default_value = "cuda")]
    device: String,
    /// Small sizes, to see whether it works at all.
    #[arg(long, global = true)]
    small: bool,
    /// Passed by `cargo bench`.
    #[arg(long, global = true, hide = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum What {
    /// What the device is, and how fast it reads and writes its memory.
    Facts,
    /// TFLOP/s of products by shape, type and how their kernel is chosen.
    Products,
    /// TFLOP/s of linear maps by shape and type, forward and backward, through Burn's products and through cuBLASLt, and how far apart their
    /// numbers are.
    LinearMaps,
    /// TFLOP/s of attention, forward and backward, by length, heads, type and kernel.
    Attention,
    /// Memory of attention, forward and backward, by length; every length in a process of its own.
    Memory,
    /// One length of `memory`.
    MemoryOf {
        /// Tokens.
        seq: usize,
    },
    /// A step of a decoder by mechanism: tokens/s, memory.
    Mechanisms {
        /// The program.
        #[arg(long, default_value = env!("CARGO_BIN_EXE_polyhead"))]
        polyhead: std::path::PathBuf,
    },
    /// The kernels of a training step by the time that they take.
    Profile {
        /// The program.
        #[arg(long, default_value = env!("CARGO_BIN_EXE_polyhead"))]
        polyhead: std::path::PathBuf,
    },
}

fn main() -> Outcome<()> {
    let args = Args::parse();
    match &args.what {
        What::Mechanisms { polyhead } => return steps::mechanisms(polyhead, &args.device, args.small),
        What::Profile { polyhead } => return steps::profile(polyhead, &args.device, args.small),
        What::Memory => return memory(&args),
        _ => {}
    }
    let device = device::open(&args.device)?;
    match args.what {
        What::Facts => facts(&args.device, &device, args.small),
        What::Products => products(&device, args.small),
        What::LinearMaps => linear_maps::compare(&device, args.small)?,
        What::Attention => attentions(&device, args.small),
        What::MemoryOf { seq } => memory_of(&device, seq),
        _ => {}
    }
    Ok(())
}

/// How long one of many runs takes: as many as fill a third of a second, after two that warm up.
fn seconds(device: &Device, mut run: impl FnMut()) -> f64 {
    let mut time = |runs: u32| {
        let start = Instant::now();
        (0..runs).for_each(|_| run());
        device.sync().unwrap_or_else(|problem| panic!("the device fails: {problem}"));
        start.elapsed()
    };
    time(2);
    let one = time(1).max(Duration::from_micros(10));
    let runs = (0.3 / one.as_secs_f64()).clamp(1.0, 1000.0) as u32;
    time(runs).as_secs_f64() / f64::from(runs)
}

/// The types that the device computes in.
fn types(device: &Device) -> Vec<DType> {
    [DType::BF16, DType::F16, DType::F32].into_iter().filter(|&dtype| device.supports_dtype(dtype)).collect()
}

fn random<const D: usize>(shape: [usize; D], dtype: DType, device: &Device) -> Tensor<D> {
    in_type(Tensor::random(shape, Distribution::Normal(0.0, 1.0), device), dtype)
}

fn facts(name: &str, device: &Device, small: bool) {
    println!("device: {name} ({})", device::product(device).unwrap_or_else(|| "the processor".into()));
    if let Some(bytes) = device::memory_bytes(name) {
        println!("memory: {:.1} GiB", bytes as f64 / f64::from(1 << 30));
    }
    let names = types(device).into_iter().map(|dtype| format!("{dtype:?}")).collect::<Vec<_>>();
    println!("computes in: {}", names.join(", "));
    let numbers = if small { 1 << 20 } else { 1 << 28 };
    let x = Tensor::<1>::ones([numbers], device);
    let time = seconds(device, || drop(x.clone() * 2.0));
    println!("reads and writes {:.0} GB/s", 8.0 * numbers as f64 / time / 1e9);
}

/// Rows, d_input and d_output: cubes, and the maps of a decoder with 350 million parameters at 16 thousand tokens.
const PRODUCTS: [[usize; 3]; 8] = [
    [2048, 2048, 2048],
    [4096, 4096, 4096],
    [8192, 8192, 8192],
    [16384, 1024, 1024],
    [16384, 1024, 3328],
    [16384, 3328, 1024],
    [1024, 16384, 3328],
    [16384, 1024, 4096],
];

fn products(device: &Device, small: bool) {
    println!("| product | type | kernel | ms | TFLOP/s |\n|---|---|---|---|---|");
    for [rows, d_input, d_output] in PRODUCTS.map(|sizes| sizes.map(|size| if small { size / 32 } else { size })) {
        for dtype in types(device) {
            let (x, weight) = (random([rows, d_input], dtype, device), random([d_input, d_output], dtype, device));
            let chosen = if cfg!(feature = "cuda") { "tuned" } else { "Burn's choice" };
            tell_product(
                [rows, d_input, d_output],
                dtype,
                chosen,
                seconds(device, || drop(x.clone().matmul(weight.clone()))),
            );
            #[cfg(feature = "cuda")]
            if let Some(time) = untuned::seconds(device, &x, &weight) {
                tell_product([rows, d_input, d_output], dtype, "not tuned", time);
            }
        }
    }
}

fn tell_product([rows, d_input, d_output]: [usize; 3], dtype: DType, kernel: &str, time: f64) {
    let speed = 2.0 * (rows * d_input * d_output) as f64 / time / 1e12;
    println!("| {rows} x {d_input} x {d_output} | {dtype:?} | {kernel} | {:.3} | {speed:.1} |", 1e3 * time);
}

/// Products by the kernel that Burn takes without trying several.
#[cfg(feature = "cuda")]
mod untuned {
    use burn::backend::{BackendTensor, Cube, DispatchKindConversion, DispatchTensor, TensorMetadata};
    use burn::tensor::{Device, Tensor};
    use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};
    use burn_cubecl::tensor::CubeTensor;

    fn raw(tensor: &Tensor<2>) -> Option<CubeTensor> {
        let tensor: BackendTensor<Cube> = DispatchTensor::try_into_backend(tensor.clone().into_dispatch()).ok()?;
        Some(tensor.float())
    }

    /// As [`super::seconds`]; `None` on other backends and where that kernel refuses.
    pub fn seconds(device: &Device, x: &Tensor<2>, weight: &Tensor<2>) -> Option<f64> {
        let (x, weight) = (raw(x)?, raw(weight)?);
        let dtype = x.dtype();
        let product = || matmul(x.clone(), weight.clone(), None, MatmulStrategy::Cube, dtype);
        product().ok()?;
        Some(super::seconds(device, || drop(product())))
    }
}

/// A kind of attention: query heads, key heads, value heads, their widths.
struct Case {
    name: &'static str,
    heads: [usize; 3],
    widths: [usize; 2],
    keys: HeadMap,
    values: HeadMap,
    window: Option<usize>,
}

fn cases() -> Vec<Case> {
    let plain = |name, heads, widths| {
        let (keys, values) = (HeadMap::Even, HeadMap::Even);
        Case { name, heads, widths, keys, values, window: None }
    };
    // Of each of four groups three signal heads read one key head, and the noise head another.
    let keys = (0..16).map(|head| head / 4 * 2 + usize::from(head % 4 == 3)).collect();
    vec![
        plain("MHA", [16, 16, 16], [64, 64]),
        plain("MHA, wide heads", [8, 8, 8], [128, 128]),
        plain("GQA 4:1", [16, 4, 4], [64, 64]),
        Case { keys: HeadMap::Each(keys), ..plain("GDA 3:1", [16, 8, 4], [64, 128]) },
        Case { window: Some(256), ..plain("MHA, window 256", [16, 16, 16], [64, 64]) },
    ]
}

/// Tokens of a batch.
const TOKENS: usize = 16384;

fn attentions(device: &Device, small: bool) {
    println!(
        "| attention | T | type | kernel | forward ms | TFLOP/s | backward ms | TFLOP/s |\n|---|---|---|---|---|---|---|---|"
    );
    let lengths: &[usize] = if small { &[128] } else { &[512, 1024, 2048, 4096, 8192, 16384] };
    let tokens = if small { 256 } else { TOKENS };
    for case in cases() {
        for &seq in lengths {
            // The slow ones need no long sequences to be known.
            let kernels = attention_kernels(device).into_iter();
            for (dtype, kernel) in kernels.filter(|(_, kernel)| *kernel == TENSOR_CORES || seq <= 4096) {
                use_tensor_cores(kernel == TENSOR_CORES);
                let (forward, both) = attend(&case, [tokens / seq, seq], dtype, device);
                let (backward, work) = ((both - forward).max(1e-9), flops(&case, [tokens / seq, seq]));
                println!(
                    "| {} | {seq} | {dtype:?} | {kernel} | {:.3} | {:.1} | {:.3} | {:.1} |",
                    case.name,
                    1e3 * forward,
                    work / forward / 1e12,
                    1e3 * backward,
                    2.5 * work / backward / 1e12
                );
            }
        }
    }
    use_tensor_cores(true);
}

const TENSOR_CORES: &str = "tensor cores";

/// The kernels of attention by type: with CUDA and NVRTC there are two for bf16.
fn attention_kernels(device: &Device) -> Vec<(DType, &'static str)> {
    let kernels = |dtype| match dtype {
        DType::BF16 if cfg!(feature = "cuda-nvrtc") => vec![(dtype, TENSOR_CORES), (dtype, "portable")],
        DType::F16 => vec![],
        _ => vec![(dtype, "portable")],
    };
    types(device).into_iter().flat_map(kernels).collect()
}

/// Operations of a forward pass that the mask leaves: both products. A backward has five, one of them the forward's again.
fn flops(case: &Case, [batch, seq]: [usize; 2]) -> f64 {
    let seen = case.window.map_or((seq + 1) as f64 / 2.0, |window| window.min(seq) as f64);
    2.0 * (batch * case.heads[0] * seq) as f64 * seen * (case.widths[0] + case.widths[1]) as f64
}

/// Seconds of a forward pass, and of one with its backward.
fn attend(case: &Case, [batch, seq]: [usize; 2], dtype: DType, device: &Device) -> (f64, f64) {
    let [n, key_heads, value_heads] = case.heads;
    let [width, value_width] = case.widths;
    let tracked = device.clone().autodiff();
    let heads = |n, width, device: &Device| random([batch, n, seq, width], dtype, device);
    let inputs = |device: &Device| {
        [heads(n, width, device), heads(key_heads, width, device), heads(value_heads, value_width, device)]
    };
    let mask = Mask::causal();
    let mask = case.window.map_or(mask.clone(), |window| mask.with_window(window));
    let (keys, values) = (case.keys.clone(), case.values.clone());
    let options = AttentionOptions { mask: Some(&mask), keys, values, ..Default::default() };
    let [q, k, v] = inputs(device);
    let forward = seconds(device, || drop(attention(q.clone(), k.clone(), v.clone(), &options)));
    let [q, k, v] = inputs(&tracked).map(Tensor::require_grad);
    let both = seconds(device, || drop(attention(q.clone(), k.clone(), v.clone(), &options).hidden.sum().backward()));
    (forward, both)
}

fn memory(args: &Args) -> Outcome<()> {
    println!("| T | attention's reserved MiB |\n|---|---|");
    let lengths: &[usize] = if args.small { &[128, 256] } else { &[2048, 4096, 8192, 16384, 32768, 65536] };
    for seq in lengths {
        let mut own = std::process::Command::new(std::env::current_exe()?);
        let output = own.args(["memory-of", &seq.to_string(), "--device", &args.device]).output()?;
        match output.status.success() {
            true => print!("{}", String::from_utf8_lossy(&output.stdout)),
            false => {
                println!("| {seq} | {} |", String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("failed"))
            }
        }
    }
    Ok(())
}

/// One row of 16 heads of 64 channels, forward and backward.
fn memory_of(device: &Device, seq: usize) {
    let dtype = types(device)[0];
    let tracked = device.clone().autodiff();
    let [q, k, v] = [(); 3].map(|()| random::<4>([1, 16, seq, 64], dtype, &tracked).require_grad());
    let options = AttentionOptions { mask: Some(&Mask::causal()), ..Default::default() };
    let grads = attention(q, k, v, &options).hidden.sum().backward();
    device.sync().unwrap_or_else(|problem| panic!("the device fails: {problem}"));
    drop(grads);
    let reserved = device.memory_pool_usage().map(|usage| usage.bytes_reserved as f64 / f64::from(1 << 20));
    println!("| {seq} | {} |", reserved.map_or("not told".into(), |mebibytes| format!("{mebibytes:.0}")));
}
