//! When EES is faster than the exact score, and how far it is from it: by the number of answers, which is the size of the
//! matrix whose eigenvalues the exact score needs.
//!
//! ```sh
//! cargo bench --bench ees -- --out benches/EES.md
//! ```
//!
//! The forms run alternately; times are medians over the rounds.

mod median;

use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use nalgebra::DMatrix;
use polyhead_evaluation::ees::{EesConfig, EesMode, Probes};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use median::median;

/// Directions that answers have in common; chosen by us.
const SHARED: usize = 8;

/// Scores generated answers of a given width: 8 directions in common, and noise a tenth as large.
#[derive(Parser)]
struct Args {
    /// Numbers of answers.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 32, 128, 512, 1024, 2048])]
    answers: Vec<usize>,
    /// Features of an answer.
    #[arg(long, default_value_t = 1024)]
    features: usize,
    /// Turns; every turn runs each form once.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Write the table to this file as well.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// `[features, count]`.
fn answers(features: usize, count: usize) -> DMatrix<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(count as u64);
    let mut random = |rows, columns| DMatrix::from_fn(rows, columns, |_, _| rng.random::<f64>() - 0.5);
    random(features, SHARED) * random(SHARED, count) + random(features, count) * 0.1
}

fn main() -> std::io::Result<()> {
    let args = Args::parse();
    let ees = |mode, probes| EesConfig { mode, probes, ..EesConfig::default() };
    let forms = [
        ("exact: all eigenvalues", ees(EesMode::Exact, Probes::Exact)),
        ("shifted, unit vectors", ees(EesMode::Shifted, Probes::Exact)),
        ("shifted, 20 Rademacher probes", ees(EesMode::Shifted, Probes::Rademacher)),
        ("dual, 20 Gaussian probes (the paper's formula)", ees(EesMode::Dual, Probes::Gaussian)),
        ("official (the published code)", ees(EesMode::Official, Probes::Gaussian)),
    ];
    let mut table = format!(
        "# When EES is faster than the exact score\n\nMade by `cargo bench --bench ees`: generated answers of {} features, 20 \
         Chebyshev terms, α = 1e-3, f64, one thread, medians of {} rounds.\n\n| answers | form | ms | times as fast as \
         exact | score | off the exact one |\n|---|---|---|---|---|---|\n",
        args.features, args.rounds
    );
    for &count in &args.answers {
        let matrix = answers(args.features, count);
        let mut times = vec![Vec::new(); forms.len()];
        let mut scores = vec![0.0; forms.len()];
        for _ in 0..args.rounds {
            for (at, (_, form)) in forms.iter().enumerate() {
                let start = Instant::now();
                scores[at] = form.of(&matrix, 1);
                times[at].push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        let times: Vec<f64> = times.into_iter().map(median).collect();
        for (at, (name, _)) in forms.iter().enumerate() {
            table.push_str(&format!(
                "| {count} | {name} | {:.2} | {:.2} | {:.3} | {:+.3} |\n",
                times[at],
                times[0] / times[at],
                scores[at],
                scores[at] - scores[0]
            ));
        }
    }
    print!("{table}");
    args.out.map_or(Ok(()), |out| std::fs::write(out, &table))
}
