//! What can be told of every head of a model on a few rows of text.
//!
//! Importance is that of Michel et al. 2019 (arXiv 1905.10650, eq. 2): `E |∂L/∂ξ|` with a gate ξ = 1 on the output of each
//! head, before the output projection, averaged over rows. Nothing but the gates needs a gradient, so that frozen weights are no
//! matter, and a backward pass keeps none of theirs.

use burn::module::Module;
use burn::tensor::Tensor;
use polyhead_attention::{Amount, At, Change, Edit, Mask, Observe, Observed, QuerySite};
use polyhead_models::intervention::Context;
use polyhead_models::sites::SitePlan;
use polyhead_models::{Batch, ContextMask, Decoder, Pass};

use crate::ablation::head_counts;
use crate::head_scores::{Pattern, Without, fit};

/// A layer as it was seen.
pub struct Layer {
    /// Its heads, in the order of its maps.
    pub heads: Vec<Head>,
    /// Other numbers that its mechanism observed, with their values.
    pub numbers: Vec<(Observed, Vec<f32>)>,
    /// `[heads][queries * keys]`: the weights on the first row.
    pub maps: Vec<Vec<f32>>,
    /// Queries (and keys) of the maps.
    pub length: usize,
    /// `[heads * queries]`: what each head's output was multiplied by on the first row, where heads are chosen.
    pub gates: Option<Vec<f32>>,
}

/// A head. Numbers that its mechanism does not tell are not there.
#[derive(Debug, Clone, Default)]
pub struct Head {
    /// Nats: entropy of a row of weights, mean over queries.
    pub entropy: Option<f32>,
    /// Weight on the first key, the usual sink.
    pub first_key: Option<f32>,
    /// Tokens back, weighted by the size of the weights.
    pub distance: f32,
    /// `|gate x gradient|`, mean over rows, in nats per target.
    pub importance: Option<f32>,
    /// The share of its weights that is on each of [`Pattern::ALL`].
    pub patterns: [f32; 3],
}

/// Looks at all layers. Maps are of the first row; importance is the mean over all rows, of which `progress` gets those done and all
/// there are.
pub fn observe_layers(model: &Decoder, rows: &[Batch], progress: &mut dyn FnMut(u64, u64)) -> Vec<Layer> {
    let importance = importances(model, rows, progress);
    let plain = model.valid();
    let mask = Mask::causal();
    let pass = Pass { observe: Observe::Maps, context: Some(Context::of(&rows[0])), ..Pass::new(&mask) };
    let forward = plain.pass(plain.tokens(&rows[0]), pass);
    let patterns = Pattern::ALL.map(|pattern| pattern.of(&rows[0].tokens));
    let on = |map: &[f32]| patterns.each_ref().map(|pattern| fit(map, pattern, Without::default()).share as f32);
    let values = |x: Tensor<1>| x.into_data().iter::<f32>().collect::<Vec<f32>>();
    let mut layers = Vec::new();
    for (at, seen) in forward.seen.into_iter().enumerate() {
        let length = rows[0].seq;
        let maps: Vec<Vec<f32>> = seen.maps.map_or_else(Vec::new, |maps| {
            let all: Vec<f32> = maps.into_data().iter::<f32>().collect();
            all.chunks(length * length).map(<[f32]>::to_vec).collect()
        });
        let gates = seen.gates.map(|gates| gates.into_data().iter::<f32>().collect());
        let mut numbers: Vec<(Observed, Vec<f32>)> =
            seen.numbers.into_iter().map(|(row, numbers)| (row, values(numbers))).collect();
        let mut take = |name: &str| {
            let found = numbers.iter().position(|(row, of)| row == name && of.len() == maps.len());
            found.map(|found| numbers.remove(found).1)
        };
        let (entropy, first_key) = (take("entropy"), take("first_token_mass"));
        let own = importance.get(at).filter(|of| of.len() == maps.len());
        let head = |head: usize| Head {
            entropy: entropy.as_ref().map(|of| of[head]),
            first_key: first_key.as_ref().map(|of| of[head]),
            distance: distance(&maps[head], length),
            importance: own.map(|of| of[head]),
            patterns: on(&maps[head]),
        };
        layers.push(Layer { heads: (0..maps.len()).map(head).collect(), numbers, length, maps, gates });
    }
    layers
}

/// Tokens between a query and its keys, weighted by the size of the weights.
fn distance(map: &[f32], length: usize) -> f32 {
    let (mut sum, mut weight) = (0.0f64, 0.0f64);
    for (at, value) in map.iter().enumerate() {
        let size = f64::from(value.abs());
        sum += size * (at / length).saturating_sub(at % length) as f64;
        weight += size;
    }
    (sum / weight.max(1e-30)) as f32
}

/// `[layers][heads]`: the importance of every head, in nats per target, for a model on a device with autodiff. `progress` gets the rows
/// done and all there are.
pub fn importances(model: &Decoder, rows: &[Batch], progress: &mut dyn FnMut(u64, u64)) -> Vec<Vec<f32>> {
    // Without dropout, which draws numbers: what is looked at is the model, and nothing of a run may depend on it.
    let model = &model.clone().with_dropout(0.0).with_embedding_dropout(None).no_grad();
    let counts = head_counts(model);
    let mut sums: Vec<Vec<f32>> = counts.iter().map(|&heads| vec![0.0; heads]).collect();
    for (done, row) in rows.iter().enumerate() {
        let gates: Vec<Tensor<4>> =
            counts.iter().map(|&heads| Tensor::ones([1, heads, 1, 1], &model.device()).require_grad()).collect();
        let gated = |(layer, gate): (usize, &Tensor<4>)| {
            let change = Change::Affine { gate: Amount::Each(gate.clone()), value: Amount::Number(0.0) };
            (layer, Edit::new(At::all(QuerySite::Z.into()), change))
        };
        let sites = SitePlan { edits: gates.iter().enumerate().map(gated).collect(), taps: Vec::new() };
        let mask = row.mask(ContextMask::Causal);
        let loss = model.loss_of_pass(row, Pass { sites, ..Pass::new(&mask) }).cross_entropy
            / row.target_tokens().max(1) as f64;
        // Where an intervention switches all heads off, no gate reaches the loss.
        let reached = gates.iter().map(|gate| gate.clone().sum() * 0.0).fold(loss, |sum, none| sum + none);
        let grads = reached.backward();
        for (gate, sums) in gates.iter().zip(&mut sums) {
            let slopes = gate.grad(&grads).map_or_else(Vec::new, |grad| grad.into_data().iter::<f32>().collect());
            sums.iter_mut().zip(slopes).for_each(|(sum, slope)| *sum += slope.abs() / rows.len() as f32);
        }
        progress(done as u64 + 1, rows.len() as u64);
    }
    sums
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use burn::tensor::Device;
    use polyhead_kernels::seed_random;
    use polyhead_models::DecoderConfig;
    use polyhead_models::weights::{load, named};

    fn model(attention: &str) -> Decoder {
        let text = format!("d_model = 16\nn_layers = 2\n[attention.{attention}");
        let config: DecoderConfig = toml::from_str(&text).unwrap();
        config.validate().unwrap();
        let device = Device::flex().autodiff();
        seed_random(5);
        let fresh = config.init(11, &device);
        // Fresh weights hardly move the loss: larger ones give the test teeth.
        let larger = named(&fresh).into_iter().map(|mut tensor| {
            let matrix = tensor.shape.len() == 2;
            tensor.values.iter_mut().filter(|_| matrix).for_each(|value| *value *= 10.0);
            (tensor.name.clone(), tensor)
        });
        let larger = larger.collect();
        load(fresh, larger).unwrap()
    }

    fn row() -> Batch {
        let tokens: Vec<u32> = (0..9).map(|at| at * 7 % 11).collect();
        let targets = tokens.iter().map(|&token| i64::from((token + 3) % 11)).collect();
        Batch { batch: 1, seq: 9, tokens, targets, ..Batch::default() }
    }

    /// The loss with the rows of `o_proj` that read a head scaled: what a gate on that head would do.
    fn loss_with_gate(model: &Decoder, layer: usize, head: usize, heads: usize, gate: f32) -> f64 {
        let name = format!("layers.{layer}.attention.o_proj.weight");
        let scaled = named(model).into_iter().map(|mut tensor| {
            if tensor.name == name {
                let size = tensor.values.len() / heads;
                tensor.values[head * size..(head + 1) * size].iter_mut().for_each(|value| *value *= gate);
            }
            (tensor.name.clone(), tensor)
        });
        let model = load(model.clone(), scaled.collect()).unwrap();
        let loss = model.loss(&row(), Observe::Nothing).cross_entropy;
        f64::from(loss.into_scalar::<f32>()) / 9.0
    }

    #[test]
    fn importance_is_the_gradient_of_a_gate() {
        for attention in
            ["softmax]\nn_heads = 4", "grouped_differential]\nn_heads = 4\nn_noise_heads = 1\nhead_dim = 4"]
        {
            let model = model(attention);
            let layers = observe_layers(&model, &[row()], &mut |_, _| {});
            let mut largest = 0.0;
            let heads = layers[0].heads.len();
            assert_eq!(heads, if attention.starts_with("soft") { 4 } else { 3 });
            for (layer, seen) in layers.iter().enumerate() {
                for (head, found) in seen.heads.iter().enumerate() {
                    let gates = [1.05, 0.95].map(|gate| loss_with_gate(&model, layer, head, heads, gate));
                    let (slope, found) = (((gates[0] - gates[1]) / 0.1).abs(), f64::from(found.importance.unwrap()));
                    // Losses near 3 in f32, subtracted: about 1e-5 of a slope is rounding.
                    assert!((slope - found).abs() < 0.01 * slope + 2e-5, "{attention} {layer} {head}: {slope} {found}");
                    largest = slope.max(largest);
                }
            }
            assert!(largest > 0.01, "the slopes are too small to tell much: {largest}");
        }
    }

    #[test]
    fn distances_are_weighted_means() {
        let identity = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
        assert_eq!(distance(&identity, 3), 0.0);
        let first = [1.0, 0.0, 0.0, -1.0, 0.0, 0.0, 1.0, 0.0, 0.0];
        assert_eq!(distance(&first, 3), 1.0);
    }
}
