//! What is left to gain by fusing more: the projections of queries, keys and values as one product, and the residual addition
//! together with the norm that follows it.
//!
//! ```sh
//! cargo bench --bench pieces
//! ```
//!
//! One product is really computed. The addition is measured by itself, as a share of a block's time: no fusion saves more than
//! all of it. Variants run alternately; times are medians over the rounds, forward and backward.

mod median;

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use clap::Parser;
use polyhead_attention::{Call, Dims, Mask, Mechanism, MechanismConfig, Rope, RopeLayout, SoftmaxConfig};
use polyhead_kernels::{gated_mlp, linear, rms_norm};

use median::median;

const HEADS: usize = 6;

/// Measures one block of a decoder: attention, feed-forward layer, two norms, two additions.
#[derive(Parser)]
struct Args {
    /// Channels.
    #[arg(long, value_delimiter = ',', default_values_t = [192, 384])]
    channels: Vec<usize>,
    /// Tokens of a row; the batch is 8 rows.
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// Turns.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    let device = Device::flex().autodiff();
    println!("| channels | piece | ms | of a block |\n|---|---|---|---|");
    for &channels in &args.channels {
        let d_ff = channels * 8 / 3 / 16 * 16;
        let random =
            |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 0.05), &device).require_grad();
        let input = || Tensor::<3>::random([8, args.tokens, channels], Distribution::Normal(0.0, 1.0), &device);
        let (x, cotangent, other) = (input().require_grad(), input(), input().require_grad());
        let wide = Tensor::<3>::random([8, args.tokens, 3 * channels], Distribution::Normal(0.0, 1.0), &device);
        let norm = Tensor::<1>::ones([channels], &device).require_grad();
        let (q, k, v) = (random([channels, channels]), random([channels, channels]), random([channels, channels]));
        let qkv = random([channels, 3 * channels]);
        let (gate, up, down) = (random([channels, d_ff]), random([channels, d_ff]), random([d_ff, channels]));
        let dims = Dims { d_model: channels, n_layers: 1, layer: 0, rope: true, norm_eps: 1e-5, grid: None };
        let config = SoftmaxConfig { n_heads: HEADS, ..SoftmaxConfig::default() };
        let layer = config.init(&dims, &device);
        let rope = Rope::new(0..args.tokens, channels / HEADS, 1e4, RopeLayout::RotateHalf, &device);
        let mask = Mask::causal();
        let call = || Call { rope: Some(&rope), ..Call::new(&mask) };
        let block = || {
            let x = x.clone() + layer.forward(rms_norm(x.clone(), norm.clone(), 1e-5), call()).hidden;
            let inner = gated_mlp(rms_norm(x.clone(), norm.clone(), 1e-5), gate.clone(), up.clone(), down.clone());
            ((x + inner) * cotangent.clone()).sum()
        };
        let three = || {
            let of = |weight: &Tensor<2>| (linear(x.clone(), weight.clone(), None) * cotangent.clone()).sum();
            of(&q) + of(&k) + of(&v)
        };
        let one = || (linear(x.clone(), qkv.clone(), None) * wide.clone()).sum();
        let addition = || ((x.clone() + other.clone()) * cotangent.clone()).sum();
        let pieces: [(&str, &dyn Fn() -> Tensor<1>); 4] = [
            ("block", &block),
            ("q, k, v as three products", &three),
            ("q, k, v as one product", &one),
            ("one residual addition", &addition),
        ];
        let mut times = vec![Vec::new(); pieces.len()];
        for _ in 0..args.rounds {
            for (at, (_, piece)) in pieces.iter().enumerate() {
                let start = Instant::now();
                piece().backward();
                times[at].push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        let times: Vec<f64> = times.into_iter().map(median).collect();
        for ((name, _), time) in pieces.iter().zip(&times) {
            println!("| {channels} | {name} | {time:.2} | {:.1} % |", 100.0 * time / times[0]);
        }
    }
}
