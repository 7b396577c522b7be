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

#[path = "../crates/polyhead/src/allocator.rs"]
mod allocator;
mod median;

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use clap::Parser;
use polyhead_attention::sparse::blocks::{BlocksConfig, Pattern};
use polyhead_attention::sparse::dhsa::DhsaConfig;
use polyhead_attention::sparse::shifted::ShiftedConfig;
use polyhead_attention::sparse::{Sparse, SparseConfig};
use polyhead_kernels::{AttentionOptions, Mask, attention};

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
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    allocator::keep_large_buffers();
    let args = Args::parse();
    let draw = |heads: usize, device: &Device| {
        let shape = [1, heads, args.tokens, args.width];
        Tensor::<4>::random(shape, Distribution::Normal(0.0, 1.0), device)
    };
    let drifting = |device: &Device| {
        let steps = draw(args.heads / 2, device) * 0.15;
        // A walk that is pulled back to its middle, so that it does not leave the range of the queries.
        let walk = steps.cumsum(2);
        walk.clone() - walk.mean_dim(2) + draw(args.heads / 2, device) * 0.5
    };
    let sparse = |config| Some(Sparse::Config(config, None));
    println!("| row | attention | ms | times dense | error |\n|---|---|---|---|---|");
    let shifted = |shift_fraction, sinks| {
        sparse(SparseConfig::Shifted(ShiftedConfig { shift_fraction, sinks, ..ShiftedConfig::default() }))
    };
    let training =
        [("dense", None), ("S2-Attn, chunks of 1/4", shifted(0.5, 0)), ("SF-Attn, 4 sinks", shifted(0.25, 4))];
    measure(&args, "training", &training, &Device::flex().autodiff(), (&draw, &drifting));
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
    let prefill = [
        ("dense", None),
        ("blocks, a_shape", blocks(Pattern::AShape, false)),
        ("blocks, a_shape, rectified", blocks(Pattern::AShape, true)),
        ("blocks, vertical_slash", blocks(Pattern::VerticalSlash, false)),
        ("dhsa, blocks of 64, chunks of 32", dhsa(64)),
        ("dhsa, blocks of 128, chunks of 32", dhsa(128)),
    ];
    measure(&args, "prefill", &prefill, &Device::flex(), (&draw, &drifting));
}

type Draw<'a> = (&'a dyn Fn(usize, &Device) -> Tensor<4>, &'a dyn Fn(&Device) -> Tensor<4>);

fn measure(args: &Args, row: &str, variants: &[(&str, Option<Sparse>)], device: &Device, (draw, keys): Draw<'_>) {
    let (q, k, v) = (draw(args.heads, device), keys(device), draw(args.heads / 2, device));
    let mask = Mask::causal();
    let asked = |name: &str| format!("{row} {name}").contains(&args.only);
    let variants: Vec<_> = variants.iter().filter(|(name, sparse)| sparse.is_none() || asked(name)).collect();
    if variants.len() == 1 {
        return;
    }
    let run = |sparse: &Option<Sparse>| {
        let [q, k, v] = [&q, &k, &v].map(|x| if device.is_autodiff() { x.clone().require_grad() } else { x.clone() });
        let options = AttentionOptions { mask: Some(&mask), ..Default::default() };
        let start = Instant::now();
        let out = match sparse {
            Some(sparse) => sparse.attend([q, k, v], &options).hidden,
            None => attention(q, k, v, &options).hidden,
        };
        if device.is_autodiff() {
            out.clone().sum().backward();
        }
        (start.elapsed().as_secs_f64() * 1e3, out)
    };
    let mut times = vec![Vec::new(); variants.len()];
    let mut outputs = Vec::new();
    for round in 0..args.rounds {
        for (at, (_, sparse)) in variants.iter().enumerate() {
            let (time, out) = run(sparse);
            times[at].push(time);
            if round == 0 {
                outputs.push(if device.is_autodiff() { out.inner() } else { out });
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
