//! What block masks save: attention of one layer over a long row, dense and sparse, and how far the output is from the dense one.
//!
//! ```sh
//! cargo bench --bench sparse
//! ```
//!
//! Training: forward and backward under causality, against S2-Attn and SF-Attn with a quarter of the row as chunk. Prefill: forward
//! alone, the choice of keys counted, against DHSA's block masks and chunks and rectified attention at a density of 0.25. Queries,
//! keys and values are drawn; keys drift along the row, so that neighbours resemble each other as in texts. Variants run alternately;
//! times are medians over the rounds. The error is the largest difference of the output, as a share of its root mean square; of random
//! numbers attention is nearly uniform, so that errors of a trained model are others.
//!
//! A second table has the time and the peak memory of each as the row gets longer (`--lengths`), from a process of its own for each number.

#[path = "../crates/polyhead/src/allocator.rs"]
mod allocator;
mod median;

use std::process::Command;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use clap::Parser;
use polyhead_attention::sparse::blocks::{BlocksConfig, Pattern};
use polyhead_attention::sparse::dhsa::DhsaConfig;
use polyhead_attention::sparse::shifted::ShiftedConfig;
use polyhead_attention::sparse::{Sparse, SparseConfig};
use polyhead_kernels::{AttentionOptions, Mask, attention};
use polyhead_training::peak_memory_bytes;

use median::median;

/// Measures attention over one row.
#[derive(Parser)]
struct Args {
    /// Tokens of the row.
    #[arg(long, default_value_t = 8192)]
    tokens: usize,
    /// Query heads, with half as many key/value heads.
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Channels of a head.
    #[arg(long, default_value_t = 64)]
    width: usize,
    /// Turns.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only variants whose row and name, such as "prefill blocks, a_shape", contain this, and the dense one.
    #[arg(long, default_value = "")]
    only: String,
    /// Tokens of the rows of the second table.
    #[arg(long, value_delimiter = ',', default_values_t = [1024, 2048, 4096, 8192])]
    lengths: Vec<usize>,
    /// Runs one variant, and prints its milliseconds and the peak of this process in MiB.
    #[arg(long, hide = true)]
    alone: Option<String>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Outcome<()> {
    allocator::keep_large_buffers();
    let args = Args::parse();
    let all = [("training", training()), ("prefill", prefill())];
    if let Some(alone) = &args.alone {
        let all =
            all.iter().flat_map(|(row, variants)| variants.iter().map(move |(name, sparse)| (*row, *name, sparse)));
        let found = all.into_iter().find(|(row, name, _)| format!("{row} {name}") == *alone);
        let (row, _, sparse) = found.ok_or_else(|| format!("there is no variant {alone}"))?;
        let inputs = Inputs::new(&args, row);
        let times = (0..args.rounds).map(|_| inputs.run(sparse).0).collect();
        // The numbers that are drawn are a small part of it.
        let peak = peak_memory_bytes().map_or(f64::NAN, |bytes| bytes as f64 / f64::from(1 << 20));
        println!("{:.1} {peak:.0}", median(times));
        return Ok(());
    }
    println!("| row | attention | ms | times dense | error |\n|---|---|---|---|---|");
    all.iter().for_each(|(row, variants)| measure(&args, row, variants));
    lengths(&args, &all)
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;
type Variants = Vec<(&'static str, Option<Sparse>)>;

fn sparse(config: SparseConfig) -> Option<Sparse> {
    Some(Sparse::Config(config, None))
}

fn training() -> Variants {
    let shifted = |shift_fraction, sinks| {
        sparse(SparseConfig::Shifted(ShiftedConfig { shift_fraction, sinks, ..ShiftedConfig::default() }))
    };
    vec![("dense", None), ("S2-Attn, chunks of 1/4", shifted(0.5, 0)), ("SF-Attn, 4 sinks", shifted(0.25, 4))]
}

fn prefill() -> Variants {
    let blocks = |pattern, rectify| {
        let config = BlocksConfig { pattern, rectify, density: 0.25, key_block: 128, ..BlocksConfig::default() };
        sparse(SparseConfig::Blocks(config))
    };
    let dhsa = |block_size| {
        let config = DhsaConfig {
            block_size,
            chunk_size: Some(32),
            global_tokens: 0,
            instruction_tokens: 0,
            ..DhsaConfig::default()
        };
        sparse(SparseConfig::Dhsa(config))
    };
    vec![
        ("dense", None),
        ("blocks, a_shape", blocks(Pattern::AShape, false)),
        ("blocks, a_shape, rectified", blocks(Pattern::AShape, true)),
        ("blocks, vertical_slash", blocks(Pattern::VerticalSlash, false)),
        ("dhsa, blocks of 64, chunks of 32", dhsa(64)),
        ("dhsa, blocks of 128, chunks of 32", dhsa(128)),
    ]
}

/// Time and peak memory as rows get longer: every number from a process of its own.
fn lengths(args: &Args, all: &[(&str, Variants)]) -> Outcome<()> {
    let numbers = args.lengths.iter().map(|tokens| format!(" {tokens} tokens |")).collect::<String>();
    println!(
        "\nMedian ms, and MiB at the peak:\n\n| row | attention |{numbers}\n|---|---|{}",
        "---|".repeat(args.lengths.len())
    );
    for (row, name) in all.iter().flat_map(|(row, variants)| variants.iter().map(move |(name, _)| (row, name))) {
        let alone = format!("{row} {name}");
        if !alone.contains(&args.only) {
            continue;
        }
        print!("| {row} | {name} |");
        for tokens in &args.lengths {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["--alone", &alone]);
            for (key, value) in
                [("--tokens", *tokens), ("--heads", args.heads), ("--width", args.width), ("--rounds", args.rounds)]
            {
                command.args([key, &value.to_string()]);
            }
            let output = command.stderr(std::process::Stdio::inherit()).output()?;
            let told = String::from_utf8(output.stdout)?;
            let (ms, mib) =
                told.trim().split_once(' ').ok_or_else(|| format!("{alone} at {tokens}: {}", output.status))?;
            print!(" {ms}, {mib} |");
        }
        println!();
    }
    Ok(())
}

/// Queries, keys and values of one row.
struct Inputs {
    device: Device,
    qkv: [Tensor<4>; 3],
}

impl Inputs {
    fn new(args: &Args, row: &str) -> Self {
        let device = if row == "training" { Device::flex().autodiff() } else { Device::flex() };
        let draw = |heads: usize| {
            let shape = [1, heads, args.tokens, args.width];
            Tensor::<4>::random(shape, Distribution::Normal(0.0, 1.0), &device)
        };
        // A walk that is pulled back to its middle, so that it does not leave the range of the queries.
        let walk = (draw(args.heads / 2) * 0.15).cumsum(2);
        let keys = walk.clone() - walk.mean_dim(2) + draw(args.heads / 2) * 0.5;
        let qkv = [draw(args.heads), keys, draw(args.heads / 2)];
        Self { qkv, device }
    }

    /// Milliseconds of attention forward, where it trains backward too, and its output.
    fn run(&self, sparse: &Option<Sparse>) -> (f64, Tensor<4>) {
        let trains = self.device.is_autodiff();
        let [q, k, v] = self.qkv.clone().map(|x| if trains { x.require_grad() } else { x });
        let mask = Mask::causal();
        let options = AttentionOptions { mask: Some(&mask), ..Default::default() };
        let start = Instant::now();
        let out = match sparse {
            Some(sparse) => sparse.attend([q, k, v], &options).hidden,
            None => attention(q, k, v, &options).hidden,
        };
        if trains {
            out.clone().sum().backward();
        }
        let time = start.elapsed().as_secs_f64() * 1e3;
        (time, if trains { out.inner() } else { out })
    }
}

fn measure(args: &Args, row: &str, variants: &[(&str, Option<Sparse>)]) {
    let asked = |name: &str| format!("{row} {name}").contains(&args.only);
    let variants: Vec<_> = variants.iter().filter(|(name, sparse)| sparse.is_none() || asked(name)).collect();
    if variants.len() == 1 {
        return;
    }
    let inputs = Inputs::new(args, row);
    let mut times = vec![Vec::new(); variants.len()];
    let mut outputs = Vec::new();
    for round in 0..args.rounds {
        for (at, (_, sparse)) in variants.iter().enumerate() {
            let (time, out) = inputs.run(sparse);
            times[at].push(time);
            if round == 0 {
                outputs.push(out);
            }
        }
    }
    let dense = outputs[0].clone();
    let size = dense.clone().square().mean().sqrt().into_scalar::<f32>();
    let times: Vec<f64> = times.into_iter().map(median).collect();
    for (((name, _), time), out) in variants.iter().zip(&times).zip(outputs) {
        let error = (out - dense.clone()).abs().max().into_scalar::<f32>() / size;
        println!("| {row} | {name} | {time:.0} | {:.2} | {error:.2} |", times[0] / time);
    }
}
