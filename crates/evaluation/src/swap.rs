//! Attention swap between two decoders: how much of what one of them can do is in where its heads look.
//!
//! A receiver reads with the maps of a donor in some of its layers ([`attention_swap`]), after the interventions of arXiv 2510.21866,
//! whose text gives no more details. A drop alone says little, so controls of ours are measured beside it: the receiver's own maps,
//! which change nothing, the donor's maps of another text, and for each head the donor's map of the head before.

use burn::tensor::Tensor;
use polyhead_attention::{ConfigError, Edit, QuerySite, require};
use polyhead_models::intervention::{Context, attention_swap};
use polyhead_models::sites::SitePlan;
use polyhead_models::{Batch, ContextMask, Decoder, Pass};
use serde::Serialize;

use crate::lens::read;
use crate::next_token::{Predictions, predictions_of, target_ids, target_logits};

/// Whose maps a receiver reads with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Maps {
    /// The donor's, of the same text.
    Donor,
    /// The receiver's own, as they are without a change: the null control.
    Own,
    /// The donor's, of another text of the same length.
    OtherText,
    /// The donor's, each head with that of the head before.
    OtherHead,
}

/// A swap.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Swap {
    /// The layers whose maps are swapped, from 0.
    pub layers: Vec<usize>,
    /// Whose maps come in.
    pub maps: Maps,
    /// Their share; the rest is the receiver's map as it is by then.
    pub share: f64,
}

/// Refuses two models whose maps of some layers cannot be swapped.
///
/// # Errors
/// Names what differs, or what a mechanism has no map for.
pub fn check(receiver: &Decoder, donor: &Decoder, layers: &[usize]) -> Result<(), ConfigError> {
    let same = |what: &str, [own, other]: [usize; 2]| {
        require(own == other, "", || format!("the receiver has {own} {what} and the donor {other}"))
    };
    let models = [receiver, donor];
    same("ids", models.map(Decoder::vocab_size))?;
    same("layers", models.map(|model| model.layers.len()))?;
    let site = QuerySite::Weights.into();
    for model in models {
        for &layer in layers {
            let mechanism = model.config().mechanism(layer);
            let absent = mechanism.absent(site);
            require(absent.is_none(), "", || {
                format!("{} in layer {layer} has no map: {}", mechanism.name(), absent.unwrap_or_default())
            })?;
        }
    }
    let taps = models.map(|model| read(model, &[vec![0]], &[site]));
    let heads = |layer: usize| {
        let of = |at: usize| taps[at].iter().find(|tap| tap.layer == layer).map_or(0, |tap| tap.values.dims()[1]);
        [of(0), of(1)]
    };
    layers.iter().try_for_each(|&layer| same(&format!("maps in layer {layer}"), heads(layer)))
}

/// What a receiver predicts as it is, and under each swap: `None` where some text has no other one of its length, or a layer has one
/// head. Every row has a target, and [`check`] holds for the layers of all swaps. `progress` gets the runs done and all there are.
pub fn swap(
    receiver: &Decoder,
    donor: &Decoder,
    rows: &[Batch],
    swaps: &[Swap],
    progress: &mut dyn FnMut(u64, u64),
) -> (Predictions, Vec<Option<Predictions>>) {
    let (mut plain, mut found) = (Predictions::default(), vec![Some(Predictions::default()); swaps.len()]);
    let all: f64 = rows.iter().map(|row| row.target_tokens() as f64).sum();
    for (at, row) in rows.iter().enumerate() {
        let share = row.target_tokens() as f64 / all;
        let targets = target_ids(row, &receiver.device());
        let (clean, own) = run(receiver, row, Vec::new());
        let (_, given) = run(donor, row, Vec::new());
        let others = other_text(rows, at).map(|other| run(donor, &rows[other], Vec::new()).1);
        plain.add(&predictions_of(&clean, &clean, targets.clone()), share);
        for (index, (swap, found)) in swaps.iter().zip(&mut found).enumerate() {
            let maps = match swap.maps {
                Maps::Donor => Some(given.clone()),
                Maps::Own => Some(own.clone()),
                Maps::OtherText => others.clone(),
                Maps::OtherHead => given.iter().map(|(layer, map)| Some((*layer, heads_moved(map)?))).collect(),
            };
            let maps: Option<Vec<(usize, Tensor<4>)>> =
                maps.map(|maps| maps.into_iter().filter(|(layer, _)| swap.layers.contains(layer)).collect());
            match (maps, &mut *found) {
                (Some(maps), Some(found)) => {
                    let (changed, _) = run(receiver, row, attention_swap(&maps, swap.share));
                    found.add(&predictions_of(&clean, &changed, targets.clone()), share);
                }
                _ => *found = None,
            }
            progress((at * swaps.len() + index + 1) as u64, (rows.len() * swaps.len()) as u64);
        }
    }
    (plain, found)
}

/// `[targets, vocab]` logits of a text, and the maps of all layers that have one. Maps are read in every run, so that all of them go
/// through the same arithmetic.
fn run(model: &Decoder, row: &Batch, edits: Vec<(usize, Edit)>) -> (Tensor<2>, Vec<(usize, Tensor<4>)>) {
    let mask = row.mask(ContextMask::Causal);
    let sites = SitePlan { edits, ..SitePlan::tap_all(model.layers.len(), QuerySite::Weights) };
    let pass = Pass { sites, context: Some(Context::of(row)), ..Pass::new(&mask) };
    let forward = model.pass(model.tokens(row), pass);
    let maps = forward.taps.into_iter().map(|tap| (tap.layer, tap.values)).collect();
    (target_logits(model, row, forward.hidden), maps)
}

/// The next text that hides the same keys from the same queries, going round.
fn other_text(rows: &[Batch], at: usize) -> Option<usize> {
    let alike = |other: &usize| rows[*other].seq == rows[at].seq && rows[*other].documents == rows[at].documents;
    (at + 1..rows.len()).chain(0..at).find(alike)
}

/// A map in which each head has that of the head before; `None` of one head.
fn heads_moved(map: &Tensor<4>) -> Option<Tensor<4>> {
    let heads = map.dims()[1];
    let moved = || vec![map.clone().narrow(1, heads - 1, 1), map.clone().narrow(1, 0, heads - 1)];
    (heads > 1).then(|| Tensor::cat(moved(), 1))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_kernels::seed_random;
    use polyhead_models::DecoderConfig;
    use polyhead_models::weights::{load, named};

    use super::*;

    fn model(seed: u64, attention: &str, factor: f32) -> Decoder {
        let config = format!(r#"{{"d_model": 16, "n_layers": 2, "attention": {attention}}}"#);
        seed_random(seed);
        let fresh = serde_json::from_str::<DecoderConfig>(&config).unwrap().init(9, &Device::flex());
        let larger = named(&fresh).into_iter().map(|mut tensor| {
            tensor.values.iter_mut().for_each(|value| *value *= factor);
            (tensor.name.clone(), tensor)
        });
        let larger = larger.collect();
        load(fresh, larger).unwrap()
    }

    const SOFTMAX: &str = r#"{"softmax": {"n_heads": 2}}"#;

    fn of(maps: Maps, layers: &[usize], share: f64) -> Swap {
        Swap { layers: layers.to_vec(), maps, share }
    }

    #[test]
    fn own_maps_change_nothing_and_the_donors_and_the_controls_differ() {
        let [receiver, donor] = [5, 6].map(|seed| model(seed, SOFTMAX, 5.0));
        let rows = [vec![1, 5, 1, 8], vec![2, 3, 2, 2], vec![7, 0, 4, 4]].map(Batch::text);
        let swaps = [
            of(Maps::Own, &[0, 1], 1.0),
            of(Maps::Donor, &[0, 1], 1.0),
            of(Maps::Donor, &[1], 1.0),
            of(Maps::Donor, &[0, 1], 0.5),
            of(Maps::OtherText, &[0, 1], 1.0),
            of(Maps::OtherHead, &[0, 1], 1.0),
        ];
        let mut steps = 0;
        let (plain, found) = swap(&receiver, &donor, &rows, &swaps, &mut |_, all| {
            steps += 1;
            assert_eq!(all, 18);
        });
        assert_eq!(steps, 18);
        let found: Vec<Predictions> = found.into_iter().map(Option::unwrap).collect();
        assert_eq!(found[0], plain, "to the bit");
        let losses: Vec<f64> = found.iter().map(|found| found.loss).collect();
        for (at, loss) in losses.iter().enumerate() {
            assert!(losses[..at].iter().all(|other| (other - loss).abs() > 1e-4), "{losses:?}");
        }
        assert!(found[1..].iter().all(|found| found.kl > 1e-4), "{found:?}");
        // The loss as it is is that of the rows together, and a donor of the same weights is the null control.
        let mut sums = receiver.evaluate(&rows[0]);
        rows[1..].iter().for_each(|row| sums.add(receiver.evaluate(row)));
        assert!((plain.loss - sums.mean_loss()).abs() < 1e-5, "{plain:?}");
        let (plain, itself) = swap(&receiver, &receiver, &rows, &swaps[1..3], &mut |_, _| ());
        assert!(itself.iter().all(|found| *found == Some(plain)));
    }

    #[test]
    fn controls_that_cannot_be_measured_are_none_and_models_that_differ_are_refused() {
        let [receiver, donor] = [5, 6].map(|seed| model(seed, r#"{"softmax": {"n_heads": 1}}"#, 5.0));
        let rows = [vec![1, 5, 1, 8], vec![2, 3, 2]].map(Batch::text);
        let swaps = [Maps::OtherText, Maps::OtherHead, Maps::Donor].map(|maps| of(maps, &[0], 1.0));
        let (_, found) = swap(&receiver, &donor, &rows, &swaps, &mut |_, _| ());
        assert!(found[0].is_none() && found[1].is_none() && found[2].is_some());
        let told = |other: &Decoder, layers: &[usize]| check(&receiver, other, layers).unwrap_err().problem;
        assert!(check(&receiver, &donor, &[0, 1]).is_ok());
        let two = model(5, SOFTMAX, 1.0);
        assert_eq!(told(&two, &[1]), "the receiver has 1 maps in layer 1 and the donor 2");
        let recurrent = model(5, r#"{"gated_delta_net": {"n_heads": 1}}"#, 1.0);
        assert!(told(&recurrent, &[0]).starts_with("gated_delta_net in layer 0 has no map: "));
    }
}
