//! What one layer costs as the row gets longer: softmax beside Gated DeltaNet, forward and backward.
//!
//! ```sh
//! cargo bench --bench lengths
//! ```
//!
//! One row, d_model 256, 8 heads, projections counted. Each number comes from a process of its own, so that peak memory belongs to
//! it alone; both layers take turns at each length, and times are medians over the turns, the first left out.

#[path = "../crates/polyhead/src/allocator.rs"]
mod allocator;
mod median;

use std::process::Command;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use clap::Parser;
use polyhead_attention::{
    Call, Dims, GatedDeltaNetConfig, Mask, Mechanism, MechanismConfig, Rope, RopeLayout, SoftmaxConfig,
};
use polyhead_training::peak_memory_bytes;

use median::median;

const D_MODEL: usize = 256;

/// Measures forward and backward of one layer over rows of these lengths.
#[derive(Parser)]
struct Args {
    /// Tokens of the rows.
    #[arg(long, value_delimiter = ',', default_values_t = [1024, 2048, 4096, 8192, 16384])]
    tokens: Vec<usize>,
    /// Heads.
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Turns.
    #[arg(long, default_value_t = 4)]
    rounds: usize,
    /// Runs this layer alone, and prints its milliseconds and the peak of this process in MiB.
    #[arg(long, hide = true)]
    alone: Option<String>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const LAYERS: [&str; 2] = ["softmax", "gated_delta_net"];

fn main() -> Outcome<()> {
    allocator::keep_large_buffers();
    let args = Args::parse();
    if let Some(layer) = &args.alone {
        let tokens = *args.tokens.first().ok_or("tokens")?;
        let ms = match layer.as_str() {
            "softmax" => measure(&SoftmaxConfig { n_heads: args.heads, ..SoftmaxConfig::default() }, tokens, &args),
            _ => measure(&gated_delta_net(args.heads), tokens, &args),
        };
        println!("{ms:.2} {:.1}", peak_memory_bytes().map_or(f64::NAN, |bytes| bytes as f64 / f64::from(1 << 20)));
        return Ok(());
    }
    println!(
        "| tokens | softmax, ms | Gated DeltaNet, ms | times as fast | softmax, peak MiB | Gated DeltaNet, peak MiB |"
    );
    println!("|---|---|---|---|---|---|");
    for tokens in &args.tokens {
        let [[softmax, softmax_peak], [recurrent, recurrent_peak]] = alone(&args, *tokens)?;
        let ratio = softmax / recurrent;
        println!("| {tokens} | {softmax:.1} | {recurrent:.1} | {ratio:.2} | {softmax_peak:.0} | {recurrent_peak:.0} |");
    }
    Ok(())
}

fn gated_delta_net(heads: usize) -> GatedDeltaNetConfig {
    GatedDeltaNetConfig { n_heads: heads, n_key_heads: None, head_k_dim: None, head_v_dim: None, conv_kernel: 4 }
}

/// Milliseconds and peak of both layers, each from processes of its own that take turns.
fn alone(args: &Args, tokens: usize) -> Outcome<[[f64; 2]; 2]> {
    let mut found: [[Vec<f64>; 2]; 2] = Default::default();
    for _ in 0..2 {
        for (layer, found) in LAYERS.iter().zip(&mut found) {
            let numbers = [tokens, args.heads, args.rounds].map(|number| number.to_string());
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["--alone", layer, "--tokens", &numbers[0], "--heads", &numbers[1], "--rounds", &numbers[2]]);
            let output = command.output()?;
            let told = String::from_utf8_lossy(&output.stdout).into_owned();
            let told: Vec<f64> = told.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
            let [ms, peak] = told[..] else { return Err(String::from_utf8_lossy(&output.stderr).into()) };
            found[0].push(ms);
            found[1].push(peak);
        }
    }
    Ok(found.map(|of_layer| of_layer.map(|values| values.into_iter().fold(f64::INFINITY, f64::min))))
}

/// Milliseconds of forward and backward.
fn measure<C: MechanismConfig>(config: &C, tokens: usize, args: &Args) -> f64 {
    let device = Device::flex().autodiff();
    let dims = Dims { d_model: D_MODEL, n_layers: 2, layer: 0, rope: true, norm_eps: 1e-5, grid: None };
    let layer = config.init(&dims, &device);
    let rope = Rope::new(0..tokens, D_MODEL / args.heads, 10_000.0, RopeLayout::RotateHalf, &device);
    let drawn = || Tensor::<3>::random([1, tokens, D_MODEL], Distribution::Normal(0.0, 1.0), &device);
    let (x, cotangent, mask) = (drawn().require_grad(), drawn(), Mask::causal());
    let times = (0..=args.rounds).map(|_| {
        let start = Instant::now();
        let out = layer.forward(x.clone(), Call { rope: Some(&rope), ..Call::new(&mask) }).hidden;
        let grads = (out * cotangent.clone()).sum().backward();
        assert!(x.grad(&grads).is_some(), "a gradient");
        1e3 * start.elapsed().as_secs_f64()
    });
    median(times.collect::<Vec<_>>().split_off(1))
}
