//! What sites cost where nothing is asked for: the forward and the training step of a decoder as it is, under an intervention without
//! edits, and, to know what an edit costs, with a bias on the score of the first key; in time and in memory.
//!
//! ```sh
//! cargo bench --bench sites -- --rounds 30
//! ```
//!
//! The forms run alternately in one process; what is told are medians over the rounds, the median of the ratio to the plain form of the same
//! round, and the most bytes that a round held besides weights and optimizer. A training step is forward, backward and AdamW.

#[path = "../crates/polyhead/src/allocator.rs"]
mod allocator;
mod median;
mod peak;

use std::collections::BTreeMap;
use std::time::Instant;

use burn::optim::GradientsParams;
use burn::tensor::Device;
use clap::Parser;
use polyhead_attention::{Mask, Observe};
use polyhead_kernels::seed_random;
use polyhead_models::intervention::{Intervention, InterventionConfig};
use polyhead_models::weights::named;
use polyhead_models::{Batch, Decoder, DecoderConfig, Pass};
use polyhead_training::optimizer::{Optimizer, Update};

use median::median;
use peak::{Counted, peak};

#[global_allocator]
static COUNTED: Counted = Counted;

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

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Turns before those that count.
const WARM: usize = 3;

fn main() -> Outcome<()> {
    allocator::keep_large_buffers();
    let args = Args::parse();
    let ids = (0..args.rows * args.seq).map(|at| (at * 37 % 512) as u32);
    let tokens: Vec<u32> = ids.collect();
    let targets = tokens.iter().map(|&id| i64::from(id * 7 % 512)).collect();
    let batch = Batch { batch: args.rows, seq: args.seq, tokens, targets, ..Batch::default() };
    println!("| | form | ms | of plain | MiB at most |\n|---|---|---|---|---|");
    let mask = Mask::causal();
    run("forward", &args, &Device::flex(), |model| {
        let hidden = model.pass(model.tokens(&batch), Pass::new(&mask)).hidden.into_data();
        (model, hidden.iter::<f32>().collect())
    })?;
    let mut optimizers = FORMS.map(|_| Optimizer::new(Default::default()));
    let mut turn = 0;
    run("training step", &args, &Device::flex().autodiff(), |model: Decoder| {
        // Each form has its own, which turn in the order of the forms.
        let form = turn % FORMS.len();
        turn += 1;
        let loss = model.loss(&batch, Observe::Nothing).cross_entropy / batch.tokens.len() as f64;
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        let model = optimizers[form].step(model, &mut grads, Update { lr: 1e-3, scale: 1.0 });
        let weights = named(&model).into_iter().flat_map(|tensor| tensor.values).collect();
        (model, weights)
    })
}

/// The forms, by what edits they have; of `None` no intervention.
const FORMS: [(&str, Option<&str>); 3] = [
    ("plain", None),
    ("no edits", Some("[]")),
    ("a bias on the first key", Some(r#"[{ "site": "scores", "keys": "first", "change": { "add": -0.7 } }]"#)),
];

/// Measures what `work` does with each form of a decoder, and gives back with its numbers.
fn run(
    called: &str,
    args: &Args,
    device: &Device,
    mut work: impl FnMut(Decoder) -> (Decoder, Vec<f32>),
) -> Outcome<()> {
    let config = serde_json::json!({ "d_model": args.d_model, "n_layers": args.layers,
        "attention": { "softmax": { "n_heads": args.heads } } });
    let config: DecoderConfig = serde_json::from_value(config)?;
    let form = |edits: Option<&str>| -> Outcome<Option<Decoder>> {
        seed_random(0);
        let plain = config.init(512, device);
        let Some(edits) = edits else { return Ok(Some(plain)) };
        let own = InterventionConfig { edits: serde_json::from_str(edits)?, ..InterventionConfig::default() };
        let intervention = Intervention::new(&own, &BTreeMap::new(), &plain, None)?;
        Ok(Some(plain.intervened(Some(intervention))))
    };
    let mut models = FORMS.iter().map(|(_, edits)| form(*edits)).collect::<Outcome<Vec<_>>>()?;
    let mut seconds: Vec<Vec<f64>> = vec![Vec::new(); FORMS.len()];
    let mut most = [0; FORMS.len()];
    let mut last: Vec<Vec<f32>> = vec![Vec::new(); FORMS.len()];
    for round in 0..WARM + args.rounds {
        for at in 0..FORMS.len() {
            let model = models[at].take().ok_or("a model that was not given back")?;
            let begun = Instant::now();
            let ((model, numbers), bytes) = peak(|| work(model));
            let taken = begun.elapsed().as_secs_f64();
            (models[at], last[at]) = (Some(model), numbers);
            if round >= WARM {
                seconds[at].push(taken);
                most[at] = most[at].max(bytes);
            }
        }
        assert!(last[0] == last[1], "{called}: an intervention without edits changes bits");
        assert!(last[0] != last[2], "{called}: a bias changes nothing");
    }
    for (at, (name, _)) in FORMS.iter().enumerate() {
        let ratio = median(seconds[at].iter().zip(&seconds[0]).map(|(own, plain)| own / plain).collect());
        let (ms, mib) = (1e3 * median(seconds[at].clone()), most[at] as f64 / f64::from(1 << 20));
        println!("| {called} | {name} | {ms:.2} | {ratio:.3} | {mib:.2} |");
    }
    Ok(())
}
