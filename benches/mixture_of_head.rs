//! What inactive heads save: Mixture-of-Head attention beside its masked form and multi-head attention, by the length of the
//! sequence and the share of heads that take part.
//!
//! ```sh
//! cargo bench --bench mixture_of_head -- --out benches/MIXTURE_OF_HEAD.md
//! ```
//!
//! All variants run alternately, so that whatever else the machine does meets all of them; times are medians over the rounds,
//! ratios are medians of the ratios to multi-head attention in the same round.

mod median;

use std::path::PathBuf;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor};
use clap::Parser;
use polyhead_attention::{
    Call, Dims, GateNorm, Mask, Mechanism, MechanismConfig, MixtureOfHead, MixtureOfHeadConfig, PerLayerCount, Rope,
    RopeLayout, RouterConfig, Softmax, SoftmaxConfig,
};
use polyhead_kernels::{AttentionOptions, attention, linear};

use median::median;

const D_MODEL: usize = 512;
const HEADS: usize = 8;
const WIDTH: usize = D_MODEL / HEADS;

/// Measures one attention layer of d_model 512 with 8 heads, one row of tokens, causal, rotated.
#[derive(Parser)]
struct Args {
    /// Tokens of a row.
    #[arg(long, value_delimiter = ',', default_values_t = [512, 1024, 2048, 4096])]
    tokens: Vec<usize>,
    /// Turns; every turn runs each variant once.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Write the table to this file as well.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

enum Layer {
    Dense(Softmax),
    Routed(MixtureOfHead),
    /// All heads everywhere, then multiplied by their gates, as the authors train.
    Masked(MixtureOfHead),
}

impl Layer {
    fn forward(&self, x: Tensor<3>, rope: &Rope) -> Tensor<3> {
        let mask = Mask::causal();
        match self {
            Self::Dense(layer) => layer.forward(x, Call { rope: Some(rope), ..Call::new(&mask) }).hidden,
            Self::Routed(layer) => layer.forward(x, Call { rope: Some(rope), ..Call::new(&mask) }).hidden,
            Self::Masked(layer) => masked(layer, x, rope, &mask),
        }
    }

    /// The same weights where no tape is kept.
    fn without_tape(&self) -> Self {
        match self {
            Self::Dense(layer) => Self::Dense(layer.valid()),
            Self::Routed(layer) => Self::Routed(layer.valid()),
            Self::Masked(layer) => Self::Masked(layer.valid()),
        }
    }
}

fn masked(layer: &MixtureOfHead, x: Tensor<3>, rope: &Rope, mask: &Mask) -> Tensor<3> {
    let [batch, seq, _] = x.dims();
    let heads = |map: &burn::nn::Linear| {
        linear(x.clone(), map.weight.val(), None).reshape([batch, seq, HEADS, WIDTH]).swap_dims(1, 2)
    };
    let gates = layer.routing(x.clone()).gates;
    let (q, k) = (rope.rotate(heads(&layer.q_proj)), rope.rotate(heads(&layer.k_proj)));
    let options = AttentionOptions { mask: Some(mask), ..Default::default() };
    let attended = attention(q, k, heads(&layer.v_proj), &options).hidden.swap_dims(1, 2);
    let gated = attended * gates.unsqueeze_dim::<4>(3);
    linear(gated.reshape([batch, seq, D_MODEL]), layer.o_proj.weight.val(), None)
}

fn variants(device: &Device) -> Vec<(String, Layer)> {
    let dims = Dims { d_model: D_MODEL, n_layers: 8, layer: 0, rope: true, norm_eps: 1e-5, grid: None };
    let dense = SoftmaxConfig { n_heads: HEADS, ..SoftmaxConfig::default() };
    let routed = |shared: usize, top_k: usize| MixtureOfHeadConfig {
        n_heads: HEADS,
        n_kv_heads: None,
        head_dim: None,
        qkv_bias: false,
        o_bias: false,
        qk_norm: false,
        shared_heads: PerLayerCount::Same(shared),
        top_k: PerLayerCount::Same(top_k),
        router: RouterConfig::default(),
        penalty_norm: GateNorm::Code,
        window: None,
    };
    vec![
        ("multi-head".into(), Layer::Dense(dense.init(&dims, device))),
        ("masked, 50 %".into(), Layer::Masked(routed(2, 2).init(&dims, device))),
        ("routed, 100 %: 4 shared, 4 of 4".into(), Layer::Routed(routed(4, 4).init(&dims, device))),
        ("routed, 75 %: 3 shared, 3 of 5".into(), Layer::Routed(routed(3, 3).init(&dims, device))),
        ("routed, 50 %: 2 shared, 2 of 6".into(), Layer::Routed(routed(2, 2).init(&dims, device))),
    ]
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Training (forward and backward) and prefill (forward without a tape) of every variant, in seconds by round.
fn measure(tokens: usize, rounds: usize) -> Vec<(String, [Vec<f64>; 2])> {
    let plain = Device::flex();
    let training = plain.clone().autodiff();
    let input = |device: &Device| Tensor::<3>::random([1, tokens, D_MODEL], Distribution::Normal(0.0, 1.0), device);
    let (x, cotangent) = (input(&training), input(&training));
    let rope = |device: &Device| Rope::new(0..tokens, WIDTH, 1e4, RopeLayout::RotateHalf, device);
    let ropes = [rope(&training), rope(&plain)];
    let variants = variants(&training);
    let mut found: Vec<(String, [Vec<f64>; 2])> =
        variants.iter().map(|(name, _)| (name.clone(), [Vec::new(), Vec::new()])).collect();
    for round in 0..=rounds {
        for ((_, layer), (_, times)) in variants.iter().zip(&mut found) {
            let train = seconds(|| {
                let x = x.clone().require_grad();
                let grads = (layer.forward(x.clone(), &ropes[0]) * cotangent.clone()).sum().backward();
                drop((x.grad(&grads), grads));
            });
            let (layer, x) = (layer.without_tape(), x.clone().inner());
            let prefill = seconds(|| drop(layer.forward(x, &ropes[1])));
            // The first round warms up.
            if round > 0 {
                times[0].push(train);
                times[1].push(prefill);
            }
        }
    }
    found
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let mut report = format!(
        "# What inactive heads save\n\nMade by `cargo bench --bench mixture_of_head`: one attention layer, d_model {D_MODEL}, \
         {HEADS} heads, one row of tokens, causal; {} threads, {} rounds, load before {}. Speed is relative to multi-head \
         attention in the same round, medians.\n\n| tokens | heads | training, ms | tokens/s | speed | prefill, ms | tokens/s \
         | speed |\n|---|---|---|---|---|---|---|---|\n",
        polyhead_kernels::threads(),
        args.rounds,
        load.split_whitespace().next().unwrap_or("unknown"),
    );
    for &tokens in &args.tokens {
        eprintln!("{tokens} tokens ...");
        let found = measure(tokens, args.rounds);
        let dense = found[0].1.clone();
        for (name, times) in found {
            report += &format!("| {tokens} | {name} |");
            for (times, dense) in times.iter().zip(&dense) {
                let ratios = times.iter().zip(dense).map(|(time, dense)| dense / time).collect();
                let time = median(times.clone());
                report += &format!(" {:.1} | {:.0} | {:.2}x |", 1e3 * time, tokens as f64 / time, median(ratios));
            }
            report += "\n";
        }
    }
    println!("{report}");
    if let Some(out) = &args.out {
        std::fs::write(out, report)?;
        eprintln!("wrote {}", out.display());
    }
    Ok(())
}
