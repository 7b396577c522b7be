//! What every head of a classifier matters: what changes once it is switched off, the gradient of a gate on it as a cheap proxy, and
//! how far it looks (after arXiv 2303.13731, whose code is not published; the measures are ours).

use burn::module::Module;
use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Int, Tensor, TensorData};
use polyhead_attention::{Amount, At, Change, Edit, Observe, QueryHead, QuerySite, Site};
use polyhead_models::sites::SitePlan;
use polyhead_models::{Encoder, Examples, Inputs};

/// What changes once a head is switched off, means over examples.
#[derive(Debug, Clone, PartialEq)]
pub struct Ablated {
    /// `[examples][classes]`: the probabilities without it.
    pub probabilities: Vec<Vec<f64>>,
    /// How much less probable the label is.
    pub drop: f64,
    /// Jensen-Shannon divergence between the probabilities with and without it, in nats, ln 2 at most; it needs no labels.
    pub divergence: f64,
    /// How much less often the label is the first choice.
    pub accuracy_drop: f64,
    /// One minus the cosine between what the last layer reads with and without it.
    pub embedding_change: f64,
}

/// Heads of each layer, as many as z has.
fn head_counts(encoder: &Encoder, inputs: &Inputs) -> Vec<usize> {
    let plan = SitePlan::tap_all(encoder.layers.len(), QuerySite::Z);
    let taps = encoder.read(inputs, Observe::Nothing, &plan).taps;
    taps.iter().map(|tap| tap.values.dims()[1]).collect()
}

fn rows(x: Tensor<2>) -> Vec<Vec<f64>> {
    let width = x.dims()[1];
    let all: Vec<f64> = x.into_data().iter::<f64>().collect();
    all.chunks(width.max(1)).map(<[f64]>::to_vec).collect()
}

/// Switches off every head of every layer, one at a time.
pub fn ablate(encoder: &Encoder, inputs: &Inputs, labels: &[u32]) -> Vec<Vec<Ablated>> {
    let run = |plan: &SitePlan| {
        let read = encoder.read(inputs, Observe::Nothing, plan);
        (rows(softmax(read.scored.logits, 1)), rows(read.pooled))
    };
    let (clean, embeddings) = run(&SitePlan::default());
    let mean = |of: &dyn Fn(usize) -> f64| (0..clean.len()).map(of).sum::<f64>() / clean.len().max(1) as f64;
    let of_head = |layer: usize, head: usize| {
        let edit = Edit::new(At::Query(QuerySite::Z, vec![QueryHead(head)]), Change::scale(0.0));
        let (probabilities, others) = run(&SitePlan { edits: vec![(layer, edit)], taps: Vec::new() });
        let label = |at: usize| labels[at] as usize;
        let right = |row: &[f64], at: usize| f64::from(u8::from(best(row) == label(at)));
        Ablated {
            drop: mean(&|at| clean[at][label(at)] - probabilities[at][label(at)]),
            divergence: mean(&|at| jensen_shannon(&clean[at], &probabilities[at])),
            accuracy_drop: mean(&|at| right(&clean[at], at) - right(&probabilities[at], at)),
            embedding_change: mean(&|at| 1.0 - cosine(&embeddings[at], &others[at])),
            probabilities,
        }
    };
    let layers = head_counts(encoder, inputs).into_iter().enumerate();
    layers.map(|(layer, heads)| (0..heads).map(|head| of_head(layer, head)).collect()).collect()
}

fn best(row: &[f64]) -> usize {
    let order = |a: &usize, b: &usize| row[*a].total_cmp(&row[*b]).then(b.cmp(a));
    (0..row.len()).max_by(order).unwrap_or_default()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
}

/// Between two distributions, in nats.
pub fn jensen_shannon(p: &[f64], q: &[f64]) -> f64 {
    let to_middle = |a: f64, b: f64| if a > 0.0 { a * (2.0 * a / (a + b)).ln() } else { 0.0 };
    p.iter().zip(q).map(|(&p, &q)| 0.5 * (to_middle(p, q) + to_middle(q, p))).sum()
}

/// `[examples][layers][heads]`: the gradient of each example's loss at a gate of 1 on each head. Signs cancel in the mean over
/// examples: rank heads by the mean of sizes.
pub fn gate_gradients(encoder: &Encoder, inputs: &Inputs, labels: &[u32]) -> Vec<Vec<Vec<f64>>> {
    let (device, count) = (encoder.device(), labels.len());
    let counts = head_counts(encoder, inputs);
    let gates: Vec<Tensor<4>> =
        counts.iter().map(|&heads| Tensor::ones([count, heads, 1, 1], &device).require_grad()).collect();
    let gated = |(layer, gate): (usize, &Tensor<4>)| {
        let change = Change::Affine { gate: Amount::Each(gate.clone()), value: Amount::Number(0.0) };
        (layer, Edit::new(At::all(QuerySite::Z.into()), change))
    };
    let plan = SitePlan { edits: gates.iter().enumerate().map(gated).collect(), taps: Vec::new() };
    let logits = encoder.read(inputs, Observe::Nothing, &plan).scored.logits;
    let ids: Vec<i32> = labels.iter().map(|&label| label as i32).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [count, 1]), &device);
    let grads = log_softmax(logits, 1).gather(1, ids).sum().neg().backward();
    let of_layer = |gate: &Tensor<4>| {
        let heads = gate.dims()[1];
        let grad = gate.grad(&grads).expect("every head reaches the loss");
        rows(grad.reshape([count, heads]))
    };
    let layers: Vec<Vec<Vec<f64>>> = gates.iter().map(of_layer).collect();
    (0..count).map(|at| layers.iter().map(|layer| layer[at].clone()).collect()).collect()
}

/// How far a head looks on a grid of patches.
#[derive(Debug, Clone, PartialEq)]
pub struct Reach {
    /// The weight on patches at each distance (that of the larger step across or down), mean over examples and patches. It adds up
    /// to one minus what is on the class token.
    pub profile: Vec<f64>,
    /// The same with rows of patches alone that add up to 1.
    pub renormalised: Vec<f64>,
    /// Distance times the renormalised profile, summed.
    pub mean_distance: f64,
}

/// The larger step across or down between two patches, numbered row by row.
pub fn grid_distance(a: usize, b: usize, columns: usize) -> usize {
    (a / columns).abs_diff(b / columns).max((a % columns).abs_diff(b % columns))
}

/// How far every head looks, by layers, of which those without maps have none; `front` positions, such as a class token, come before the
/// patches of the grid.
pub fn reach(encoder: &Encoder, inputs: &Inputs, [down, across]: [usize; 2], front: usize) -> Vec<Vec<Reach>> {
    let plan = SitePlan::tap_all(encoder.layers.len(), Site::from(QuerySite::Weights));
    let taps = encoder.read(inputs, Observe::Nothing, &plan).taps;
    let patches = down * across;
    let farthest = down.max(across);
    let mut layers = vec![Vec::new(); encoder.layers.len()];
    for tap in taps {
        layers[tap.layer] = {
            let [batch, heads, _, keys] = tap.values.dims();
            let all: Vec<f64> = tap.values.into_data().iter::<f64>().collect();
            let of_head = |head: usize| {
                let (mut profile, mut renormalised) = (vec![0.0; farthest], vec![0.0; farthest]);
                for (example, query) in (0..batch).flat_map(|example| (0..patches).map(move |query| (example, query))) {
                    let start = ((example * heads + head) * keys + front + query) * keys + front;
                    let row = &all[start..start + patches];
                    let sum: f64 = row.iter().sum();
                    for (key, weight) in row.iter().enumerate() {
                        let distance = grid_distance(query, key, across);
                        profile[distance] += weight / (batch * patches) as f64;
                        renormalised[distance] += weight / sum.max(f64::MIN_POSITIVE) / (batch * patches) as f64;
                    }
                }
                let mean_distance = renormalised.iter().enumerate().map(|(at, share)| at as f64 * share).sum();
                Reach { profile, renormalised, mean_distance }
            };
            (0..heads).map(of_head).collect()
        };
    }
    layers
}

/// What a head of a classifier matters, means over examples.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Importance {
    /// How much less probable the label is without it.
    pub drop: f64,
    /// Jensen-Shannon divergence, in nats, between the probabilities with and without it.
    pub divergence: f64,
    /// How much less often the label is the first choice.
    pub accuracy_drop: f64,
    /// One minus the cosine between what the last layer reads with and without it.
    pub embedding_change: f64,
    /// The size of the gradient at a gate of 1 on it.
    pub gate: f64,
    /// How far it looks, where there is a grid of patches and a map.
    pub reach: Option<Reach>,
}

impl Importance {
    /// Adds the mean over a share of the examples.
    fn add(&mut self, share: f64, of: &Ablated, gate: f64, reach: Option<&Reach>) {
        self.drop += share * of.drop;
        self.divergence += share * of.divergence;
        self.accuracy_drop += share * of.accuracy_drop;
        self.embedding_change += share * of.embedding_change;
        self.gate += share * gate;
        let Some(reach) = reach else { return };
        let zeros = vec![0.0; reach.profile.len()];
        let nothing = Reach { profile: zeros.clone(), renormalised: zeros, mean_distance: 0.0 };
        let sum = self.reach.get_or_insert(nothing);
        for (sum, own) in [(&mut sum.profile, &reach.profile), (&mut sum.renormalised, &reach.renormalised)] {
            sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += share * own);
        }
        sum.mean_distance += share * reach.mean_distance;
    }
}

/// What every head matters over batches of examples, by layers; `progress` gets the batches done and all there are. `encoder` is on a
/// plain device.
pub fn importance(encoder: &Encoder, batches: &[Examples], progress: &mut dyn FnMut(u64, u64)) -> Vec<Vec<Importance>> {
    let trained = encoder.clone().fork(&encoder.device().autodiff()).train();
    let all: usize = batches.iter().map(|batch| batch.labels.len()).sum();
    let mut found: Vec<Vec<Importance>> = Vec::new();
    for (at, Examples { inputs, labels, .. }) in batches.iter().enumerate() {
        let share = labels.len() as f64 / all as f64;
        let ablated = ablate(encoder, inputs, labels);
        let gates = gate_gradients(&trained, inputs, labels);
        let front = usize::from(encoder.class_token.is_some());
        let reach = encoder.patch_grid().map(|grid| reach(encoder, inputs, grid, front));
        found.resize_with(ablated.len(), Vec::new);
        for (layer, heads) in ablated.iter().enumerate() {
            found[layer].resize_with(heads.len(), Importance::default);
            for (head, of) in heads.iter().enumerate() {
                let size = |example: &Vec<Vec<f64>>| example[layer][head].abs();
                let gate = gates.iter().map(size).sum::<f64>() / labels.len().max(1) as f64;
                let reach = reach.as_ref().and_then(|layers| layers[layer].get(head));
                found[layer][head].add(share, of, gate, reach);
            }
        }
        progress(at as u64 + 1, batches.len() as u64);
    }
    found
}

/// Spearman's rank correlation: 1 where two measures order alike; equal values share the mean of their ranks.
pub fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    let ranks = |values: &[f64]| -> Vec<f64> {
        let rank = |value: &f64| {
            let below = values.iter().filter(|other| *other < value).count();
            let same = values.iter().filter(|other| *other == value).count();
            below as f64 + (same as f64 + 1.0) / 2.0
        };
        values.iter().map(rank).collect()
    };
    let centred = |values: Vec<f64>| -> Vec<f64> {
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        values.iter().map(|value| value - mean).collect()
    };
    cosine(&centred(ranks(a)), &centred(ranks(b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_and_divergences_of_known_numbers() {
        assert!((rank_correlation(&[1.0, 2.0, 3.0], &[10.0, 20.0, 15.0]) - 0.5).abs() < 1e-12);
        assert!((rank_correlation(&[1.0, 2.0, 2.0], &[1.0, 5.0, 5.0]) - 1.0).abs() < 1e-12);
        assert_eq!(jensen_shannon(&[0.5, 0.5], &[0.5, 0.5]), 0.0);
        assert!((jensen_shannon(&[1.0, 0.0], &[0.0, 1.0]) - 2f64.ln()).abs() < 1e-12);
        assert_eq!((grid_distance(0, 5, 4), grid_distance(3, 12, 4)), (1, 3));
    }
}
