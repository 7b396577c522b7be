//! What can be told of every head of a model on a few rows of text.
//!
//! Importance is that of Michel et al. 2019 (arXiv 1905.10650, eq. 2): `E |∂L/∂ξ|` with a gate ξ = 1 on the output of each
//! head, before the output projection, averaged over rows. The gate need not exist: scaling head h is scaling the rows of
//! `o_proj` that read it, so that `∂L/∂ξ_h = Σ W_o ⊙ ∂L/∂W_o` over these rows. So it works for every mechanism whose heads
//! meet in an `o_proj`, as all of ours do.

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use polyhead_attention::{Mask, Observe, Observed};
use polyhead_models::intervention::Context;
use polyhead_models::weights::{ParameterVisitor, visit_parameters};
use polyhead_models::{Batch, Decoder, Pass};

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

/// Looks at all layers. Maps are of the first row; importance is the mean over all rows.
pub fn observe_layers(model: &Decoder, rows: &[Batch]) -> Vec<Layer> {
    let importance = importance(model, rows);
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
        let own = importance.get(at).map(|rows| per_head(rows, maps.len()));
        let head = |head: usize| Head {
            entropy: entropy.as_ref().map(|of| of[head]),
            first_key: first_key.as_ref().map(|of| of[head]),
            distance: distance(&maps[head], length),
            importance: own.as_ref().and_then(|of| of.get(head).copied()),
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

/// For each batch row of text, each layer and each row of its `o_proj`: `Σ W_o ⊙ ∂L/∂W_o` over columns.
/// Indexed `[layer][text row][row of o_proj]`.
fn importance(model: &Decoder, rows: &[Batch]) -> Vec<Vec<Vec<f32>>> {
    struct Rows<'a>(&'a GradientsParams, Vec<Vec<f32>>);
    impl ParameterVisitor for Rows<'_> {
        fn visit<const D: usize>(&mut self, name: String, param: &Param<Tensor<D>>) {
            if D == 2
                && name.ends_with(".attention.o_proj.weight")
                && let Some(gradient) = self.0.get::<D>(param.id)
            {
                let product = param.val().inner() * gradient;
                self.1.push(product.sum_dim(1).into_data().iter::<f32>().collect());
            }
        }
    }
    let mut layers: Vec<Vec<Vec<f32>>> = Vec::new();
    for row in rows {
        let loss = model.loss(row, Observe::Nothing).cross_entropy / row.target_tokens().max(1) as f64;
        let gradients = GradientsParams::from_grads(loss.backward(), model);
        let found = visit_parameters(model, Rows(&gradients, Vec::new())).1;
        layers.resize_with(found.len().max(layers.len()), Vec::new);
        for (layer, sums) in layers.iter_mut().zip(found) {
            layer.push(sums);
        }
    }
    layers
}

/// The mean over texts of the size of each head's sum; empty where heads do not divide the rows of `o_proj`.
fn per_head(texts: &[Vec<f32>], heads: usize) -> Vec<f32> {
    let rows = texts.first().map_or(0, Vec::len);
    if heads == 0 || !rows.is_multiple_of(heads) {
        return Vec::new();
    }
    let of_head = |head: usize| {
        let range = head * (rows / heads)..(head + 1) * (rows / heads);
        let sizes = texts.iter().map(|text| text[range.clone()].iter().sum::<f32>().abs());
        sizes.sum::<f32>() / texts.len() as f32
    };
    (0..heads).map(of_head).collect()
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
            let layers = observe_layers(&model, &[row()]);
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
