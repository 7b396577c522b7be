//! The coordinate check of muP (Yang et al. 2022, appendix D.1): after a few steps with the same learning rate, activations and
//! what training changed of them are as large in wide models as in narrow ones. Without muP they grow with the width.

#![allow(clippy::unwrap_used)]

use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use polyhead_attention::{Mask, Observe};
use polyhead_kernels::seed_random;
use polyhead_models::mup::{Mup, Scalings};
use polyhead_models::{Batch, Decoder, DecoderConfig};
use serde_json::json;

use super::{Optimizer, Update};
use crate::config::OptimizerConfig;

const WIDTHS: [usize; 4] = [32, 64, 128, 256];
const STEPS: usize = 4;
/// One draw of first weights alone makes exponents up to 0.16 (measured).
const SEEDS: [u64; 3] = [11, 12, 13];
const VOCAB: usize = 31;
const ROWS: [usize; 2] = [2, 12];

/// How wider models are wider.
#[derive(Clone, Copy)]
enum Heads {
    /// They have more heads of 8 channels.
    More,
    /// They have four heads, wider ones.
    Wider,
}

fn tokens() -> Vec<u32> {
    (0..ROWS[0] * ROWS[1]).map(|at| ((at * at + 3 * at) % VOCAB) as u32).collect()
}

/// The residual stream behind the last layer, and the logits.
fn activations(model: &Decoder) -> [Vec<f32>; 2] {
    let ids: Vec<i32> = tokens().iter().map(|&id| id as i32).collect();
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(ids, ROWS), &model.device());
    let stream = model.hidden_after(model.config().n_layers - 1, tokens.clone(), &Mask::causal());
    let logits = model.logits(model.forward(tokens, &Mask::causal(), None, Observe::Nothing).hidden);
    [stream, logits].map(|of| of.into_data().try_to_vec().unwrap())
}

fn size(values: impl Iterator<Item = f32>) -> f64 {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), x| (sum + f64::from(x).powi(2), count + 1));
    (sum / f64::from(count)).sqrt()
}

/// Sizes after training: of the residual stream, of its change, of the change of the logits.
fn sizes(width: usize, heads: Heads, tied: bool, (optimizer, seed): (&OptimizerConfig, u64), mup: bool) -> [f64; 3] {
    let n_heads = match heads {
        Heads::More => width / 8,
        Heads::Wider => 4,
    };
    let attention = json!({ "softmax": { "n_heads": n_heads } });
    let config = json!({ "d_model": width, "n_layers": 2, "tie_embeddings": tied, "attention": attention });
    let config: DecoderConfig = serde_json::from_value(config).unwrap();
    seed_random(seed);
    let model = config.init(VOCAB, &Device::flex().autodiff());
    let base_head_dim = matches!(heads, Heads::Wider).then_some(8);
    let scalings =
        if mup { Scalings::of(&model, Mup { base_width: WIDTHS[0], base_head_dim }) } else { Scalings::default() };
    let mut model = scalings.apply(model);
    let before = activations(&model);
    let mut optimizer = Optimizer::new(optimizer.clone()).with_scalings(scalings);
    let ids = tokens();
    let targets = ids.iter().map(|&id| i64::from(id * 7 + 1) % VOCAB as i64).collect();
    let batch = Batch { batch: ROWS[0], seq: ROWS[1], tokens: ids, targets, ..Batch::default() };
    for _ in 0..STEPS {
        let loss = model.loss(&batch, Observe::Nothing).cross_entropy;
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(model, &mut grads, Update { lr: optimizer.config.lr(), scale: 1.0 });
    }
    let after = activations(&model);
    let change = |at: usize| size(after[at].iter().zip(&before[at]).map(|(after, before)| after - before));
    [size(after[0].iter().copied()), change(0), change(1)]
}

/// How fast a size grows: the exponent of the width, by least squares over the logarithms.
fn exponent(sizes: &[f64]) -> f64 {
    let points: Vec<(f64, f64)> =
        WIDTHS.iter().zip(sizes).map(|(width, size)| ((*width as f64).ln(), size.ln())).collect();
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / points.len() as f64;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let products: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    products / points.iter().map(|point| (point.0 - x).powi(2)).sum::<f64>()
}

/// The mean over seeds, of each size.
fn exponents(heads: Heads, tied: bool, (optimizer, seeds): (&OptimizerConfig, &[u64]), mup: bool) -> [f64; 3] {
    let of_seed = |&seed: &u64| WIDTHS.map(|width| sizes(width, heads, tied, (optimizer, seed), mup));
    let all: Vec<[[f64; 3]; 4]> = seeds.iter().map(of_seed).collect();
    let mean = |at: usize| all.iter().map(|widths| exponent(&widths.map(|sizes| sizes[at]))).sum::<f64>();
    [0, 1, 2].map(|at| mean(at) / seeds.len() as f64)
}

#[test]
fn activations_are_as_large_at_every_width() {
    /// How far exponents may be from 0; sizes of widths 8 times apart differ by a third then. Chosen by us.
    const FLAT: f64 = 0.15;
    let adamw: OptimizerConfig = serde_json::from_value(json!({ "adamw": { "lr": 1e-2 } })).unwrap();
    let muon: OptimizerConfig = serde_json::from_value(json!({ "muon": { "lr": 2e-2 } })).unwrap();
    // Muon, whose steps are slow and whose exponents scatter less, with one.
    for (name, optimizer) in [("adamw", (&adamw, &SEEDS[..])), ("muon", (&muon, &SEEDS[..1]))] {
        for (heads, tied) in [(Heads::More, false), (Heads::Wider, false), (Heads::More, true)] {
            let found = exponents(heads, tied, optimizer, true);
            assert!(found.iter().all(|exponent| exponent.abs() < FLAT), "{name}, tied {tied}: {found:?}");
        }
        let plain = exponents(Heads::More, false, optimizer, false);
        assert!(plain.iter().any(|exponent| *exponent > 2.0 * FLAT), "{name}: without muP they grow: {plain:?}");
    }
}
