//! How near the products of a training step come to what the processor can do.
//!
//! ```sh
//! cargo bench --bench products
//! ```
//!
//! The limit is measured, not looked up: twelve chains of fused multiply-adds that stay in registers. Products run as training
//! runs them (`polyhead_kernels::linear` on the CPU backend, the output's memory included), as many rows as `side_by_side` has
//! tokens in a step; beside it Burn's own product of the same matrices, in turns, which leaves it to `gemm` to share the work
//! among threads. A weight is read as it is stored (forwards) and transposed (backwards).

mod median;

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use clap::Parser;
use polyhead_kernels::linear;

use median::median;

/// Measures the processor's fused multiply-adds, and products of the shapes of a training step.
#[derive(Parser)]
struct Args {
    /// Turns.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Rows, d_input and d_output of the maps of `side_by_side`: attention, feed-forward in and out; of a pretrained model with 135
/// million parameters the head too, a chunk at a time.
const MAPS: [(&str, &[[usize; 3]]); 3] = [
    ("small", &[[2048, 256, 256], [2048, 256, 704], [2048, 704, 256]]),
    ("big", &[[2048, 512, 512], [2048, 512, 1408], [2048, 1408, 512]]),
    ("pretrained", &[[512, 576, 576], [512, 576, 192], [512, 576, 1536], [512, 1536, 576], [512, 576, 49152]]),
];

fn main() {
    let args = Args::parse();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let limit = best(5, || multiply_adds(threads));
    match limit {
        Some(limit) => println!("{threads} threads: {:.0} GFLOP/s of fused multiply-adds in registers\n", limit / 1e9),
        None => println!("{threads} threads; the limit is measured on x86-64 with AVX2 only\n"),
    }
    println!(
        "| work | product | weight | GFLOP/s | of the limit | Burn's | against it |\n|---|---|---|---|---|---|---|"
    );
    let device = Device::flex();
    let random = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Uniform(-1.0, 1.0), &device);
    for (work, maps) in MAPS {
        for &[rows, d_input, d_output] in maps {
            for (stored, weight) in
                [("as stored", random([d_input, d_output])), ("transposed", random([d_output, d_input]).transpose())]
            {
                let x = random([rows, d_input]);
                let mut seconds = [vec![], vec![]];
                for _ in 0..args.rounds {
                    let (x, weight) = (x.clone(), weight.clone());
                    let start = Instant::now();
                    std::hint::black_box(linear(x.clone(), weight.clone(), None));
                    seconds[0].push(start.elapsed().as_secs_f64());
                    let start = Instant::now();
                    std::hint::black_box(x.matmul(weight));
                    seconds[1].push(start.elapsed().as_secs_f64());
                }
                let [ours, burns] = seconds.map(|of| 2.0 * (rows * d_input * d_output) as f64 / median(of));
                let share = limit.map_or("-".into(), |limit| format!("{:.0} %", 100.0 * ours / limit));
                println!(
                    "| {work} | {rows} x {d_input} x {d_output} | {stored} | {:.0} | {share} | {:.0} | {:.2}x |",
                    ours / 1e9,
                    burns / 1e9,
                    ours / burns
                );
            }
        }
    }
}

/// The best of so many turns: what else runs can only slow down.
fn best(rounds: usize, mut measure: impl FnMut() -> Option<f64>) -> Option<f64> {
    (0..rounds).filter_map(|_| measure()).max_by(f64::total_cmp)
}

/// FLOP/s of all threads together, where the processor has AVX2.
#[cfg(target_arch = "x86_64")]
fn multiply_adds(threads: usize) -> Option<f64> {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
        return None;
    }
    const STEPS: usize = 20_000_000;
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            // SAFETY: the processor has what the function asks for.
            scope.spawn(|| std::hint::black_box(unsafe { chains(STEPS) }));
        }
    });
    Some((threads * STEPS * CHAINS * 16) as f64 / start.elapsed().as_secs_f64())
}

#[cfg(not(target_arch = "x86_64"))]
fn multiply_adds(_threads: usize) -> Option<f64> {
    None
}

/// As many as hide the latency of four or five cycles, two starting in each.
#[cfg(target_arch = "x86_64")]
const CHAINS: usize = 12;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn chains(steps: usize) -> f32 {
    use std::arch::x86_64::{_mm256_cvtss_f32, _mm256_fmadd_ps, _mm256_set1_ps};
    let (factor, term) = (_mm256_set1_ps(std::hint::black_box(0.999)), _mm256_set1_ps(std::hint::black_box(1e-3)));
    let mut sums = [_mm256_set1_ps(1.0); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, factor, term);
        }
    }
    sums.into_iter().map(|sum| _mm256_cvtss_f32(sum)).sum()
}
