//! What sites cost where nothing is asked for: the forward of a decoder as it is, under an intervention without edits, and, to know
//! what an edit costs, with a bias on the score of the first key.
//!
//! ```sh
//! cargo bench --bench sites -- --rounds 30
//! ```
//!
//! The forms run alternately in one process; what is told are medians over the rounds, and the median of the ratio to the plain
//! forward of the same round.

#[path = "../crates/polyhead/src/allocator.rs"]
mod allocator;
mod median;

use std::collections::BTreeMap;
use std::time::Instant;

use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::Parser;
use polyhead_attention::Mask;
use polyhead_kernels::seed_random;
use polyhead_models::intervention::{Intervention, InterventionConfig};
use polyhead_models::{Decoder, DecoderConfig, Pass};

use median::median;

/// A decoder of softmax attention with fresh weights.
#[derive(Parser)]
struct Args {
    /// Channels.
    #[arg(long, default_value_t = 256)]
    d_model: usize,
    /// Layers.
    #[arg(long, default_value_t = 6)]
    layers: usize,
    /// Heads.
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Tokens of a row.
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// Rows.
    #[arg(long, default_value_t = 4)]
    rows: usize,
    /// Turns; every turn runs each form once.
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Turns before those that count.
const WARM: usize = 3;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    allocator::keep_large_buffers();
    let args = Args::parse();
    let config = serde_json::json!({ "d_model": args.d_model, "n_layers": args.layers,
        "attention": { "softmax": { "n_heads": args.heads } } });
    let config: DecoderConfig = serde_json::from_value(config)?;
    seed_random(0);
    let plain = config.init(512, &Device::flex());
    let under = |edits: serde_json::Value| -> Result<Decoder, Box<dyn std::error::Error>> {
        let config: InterventionConfig = serde_json::from_value(serde_json::json!({ "edits": edits }))?;
        let intervention = Intervention::new(&config, &BTreeMap::new(), &plain, None)?;
        Ok(plain.clone().intervened(Some(intervention)))
    };
    let bias = serde_json::json!([{ "site": "scores", "keys": "first", "change": { "add": -0.7 } }]);
    let forms = [
        ("plain", plain.clone()),
        ("no edits", under(serde_json::json!([]))?),
        ("a bias on the first key", under(bias)?),
    ];
    let ids: Vec<i32> = (0..args.rows * args.seq).map(|at| (at * 37 % 512) as i32).collect();
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(ids, [args.rows, args.seq]), &Device::flex());
    let mask = Mask::causal();
    let mut seconds: Vec<Vec<f64>> = vec![Vec::new(); forms.len()];
    let mut first: Vec<Vec<f32>> = Vec::new();
    for round in 0..WARM + args.rounds {
        for (at, (_, model)) in forms.iter().enumerate() {
            let begun = Instant::now();
            let hidden = model.pass(tokens.clone(), Pass::new(&mask)).hidden.into_data();
            let taken = begun.elapsed().as_secs_f64();
            match round {
                0 => first.push(hidden.iter::<f32>().collect()),
                _ if round < WARM => {}
                _ => seconds[at].push(taken),
            }
        }
    }
    assert!(first[0] == first[1], "an intervention without edits changes bits");
    println!("| form | ms | of plain |\n|---|---|---|");
    for ((name, _), own) in forms.iter().zip(&seconds) {
        let ratio = median(own.iter().zip(&seconds[0]).map(|(own, plain)| own / plain).collect());
        println!("| {name} | {:.2} | {ratio:.3} |", 1e3 * median(own.clone()));
    }
    Ok(())
}
