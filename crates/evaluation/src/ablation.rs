//! What changes once a head of a decoder is switched off: zeroed, replaced by its mean, or by what it writes in another text
//! (resampled: Chan et al. 2022).
//!
//! One forward a head, a kind of ablation and a text, from the head's layer on; of the model's other numbers only those of two texts are
//! there at a time, however many heads it has.

use burn::tensor::{DType, Int, Tensor};
use polyhead_attention::{At, Change, Edit, QueryHead, QuerySite, Site, StreamSite};
use polyhead_kernels::in_type;
use polyhead_models::intervention::Context;
use polyhead_models::sites::{SitePlan, Tap};
use polyhead_models::{Batch, ContextMask, Decoder, Evaluated, Pass};
use serde::Serialize;

use crate::head_sets::HeadOf;
use crate::lens::read;
use crate::next_token::{Predictions, predictions_of, target_ids, target_logits};

/// What is put in the place of a head's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ablation {
    /// Nothing.
    Zero,
    /// Its mean over all positions of all texts.
    Mean,
    /// What it writes at the same position of another text.
    Resample,
}

impl Ablation {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Zero, Self::Mean, Self::Resample];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Mean => "mean",
            Self::Resample => "resample",
        }
    }
}

/// What the predictions of some texts become.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Effect {
    /// Nats per target, more than before.
    pub loss: f64,
    /// Nats per target: KL(clean || ablated).
    pub kl: f64,
    /// The share of first choices that are right, more than before.
    pub accuracy: f64,
}

/// A text in a run of the model as it is: what is needed to run it again from any layer on.
struct Clean<'a> {
    model: &'a Decoder,
    row: &'a Batch,
    /// `[1, seq, d_model]` before each layer.
    stream: Vec<Tensor<3>>,
    /// `[1, heads, seq, width]` of each layer.
    z: Vec<Tensor<4>>,
    /// `[targets, vocab]`
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    own: Predictions,
}

impl<'a> Clean<'a> {
    fn new(model: &'a Decoder, row: &'a Batch) -> Self {
        let sites: [Site; 2] = [StreamSite::ResidPre.into(), QuerySite::Z.into()];
        let taps = (0..model.layers.len()).flat_map(|layer| sites.map(|site| (layer, site))).collect();
        let mask = row.mask(ContextMask::Causal);
        let sites = SitePlan { edits: Vec::new(), taps };
        let context = Some(Context::of(row));
        let forward = model.pass(model.tokens(row), Pass { sites, context, ..Pass::new(&mask) });
        let of =
            |site: Site| forward.taps.iter().filter(move |tap: &&Tap| tap.site == site).map(|tap| tap.values.clone());
        let stream = of(StreamSite::ResidPre.into()).map(|values| values.squeeze_dim::<3>(1)).collect();
        let z = of(QuerySite::Z.into()).collect();
        let targets = target_ids(row, &model.device());
        let logits = target_logits(model, row, forward.hidden);
        let own = predictions_of(&logits, &logits, targets.clone());
        Self { model, row, stream, z, logits, targets, own }
    }

    fn under(&self, layer: usize, edits: Vec<(usize, Edit)>) -> Predictions {
        let mask = self.row.mask(ContextMask::Causal);
        let sites = SitePlan { edits, taps: Vec::new() };
        let pass = Pass { sites, context: Some(Context::of(self.row)), ..Pass::new(&mask) };
        let hidden = self.model.run_layers(layer..self.stream.len(), self.stream[layer].clone(), pass).hidden;
        let logits = target_logits(self.model, self.row, self.model.normed(hidden));
        predictions_of(&self.logits, &logits, self.targets.clone())
    }
}

/// The rows that have anything to predict.
pub fn with_targets(rows: &[Batch]) -> Vec<Batch> {
    rows.iter().filter(|row| row.target_tokens() > 0).cloned().collect()
}

/// How many heads each layer has: as many as z has.
pub fn head_counts(model: &Decoder) -> Vec<usize> {
    read(model, &[vec![0]], &[QuerySite::Z.into()]).iter().map(|tap| tap.values.dims()[1]).collect()
}

/// All heads, each with its layer.
pub fn all_heads(model: &Decoder) -> Vec<HeadOf> {
    let counts = head_counts(model).into_iter().enumerate();
    counts.flat_map(|(layer, heads)| (0..heads).map(move |head| (layer, head))).collect()
}

/// The effects of ablating each of `heads` (layer and head), in the order of [`Ablation::ALL`]: `None` for the last where there is one
/// text alone. Every row has a target; call it on `model.valid()`. `progress` gets the texts done and all there are.
pub fn ablate(
    model: &Decoder,
    rows: &[Batch],
    heads: &[HeadOf],
    progress: &mut dyn FnMut(u64, u64),
) -> (Predictions, Vec<[Option<Effect>; 3]>) {
    let means = means(model, rows);
    let mut base = Predictions::default();
    let mut found = vec![[Effect::default(); 3]; heads.len()];
    let all: f64 = rows.iter().map(|row| row.target_tokens() as f64).sum();
    let mut other = Clean::new(model, &rows[rows.len() - 1]).z;
    let steps = (rows.len() * heads.len()) as u64;
    for (at, row) in rows.iter().enumerate() {
        let clean = Clean::new(model, row);
        let share = row.target_tokens() as f64 / all;
        base.add(&clean.own, share);
        for (index, (&(layer, head), found)) in heads.iter().zip(&mut found).enumerate() {
            let another = fitted(&other[layer], row.seq);
            let changes = [Change::scale(0.0), Change::replace(means[layer].clone()), Change::replace(another)];
            for (change, found) in changes.into_iter().zip(found) {
                let edit = Edit::new(At::Query(QuerySite::Z, vec![QueryHead(head)]), change);
                let changed = clean.under(layer, vec![(layer, edit)]);
                found.loss += share * (changed.loss - clean.own.loss);
                found.kl += share * changed.kl;
                found.accuracy += share * (changed.accuracy - clean.own.accuracy);
            }
            progress((at * heads.len() + index + 1) as u64, steps);
        }
        other = clean.z;
    }
    let known = |[zero, mean, resample]: [Effect; 3]| [Some(zero), Some(mean), (rows.len() > 1).then_some(resample)];
    (base, found.into_iter().map(known).collect())
}

/// The loss of texts, nats per target, with some heads zeroed.
pub fn loss_without(model: &Decoder, rows: &[Batch], heads: &[HeadOf]) -> f64 {
    let off = |&(layer, head): &HeadOf| {
        (layer, Edit::new(At::Query(QuerySite::Z, vec![QueryHead(head)]), Change::scale(0.0)))
    };
    let mut sums = Evaluated::default();
    for row in rows {
        let sites = SitePlan { edits: heads.iter().map(off).collect(), taps: Vec::new() };
        sums.add(model.evaluate_pass(row, Pass { sites, ..Pass::new(&row.mask(ContextMask::Causal)) }));
    }
    sums.mean_loss()
}

/// `[1, heads, 1, width]` of each layer: the mean of what heads write over all positions of all texts.
pub fn means(model: &Decoder, rows: &[Batch]) -> Vec<Tensor<4>> {
    let mut sums: Vec<Tensor<4>> = Vec::new();
    let positions: usize = rows.iter().map(|row| row.seq).sum();
    for row in rows {
        let z = Clean::new(model, row).z.into_iter().map(|z| in_type(z, DType::F32).sum_dim(2));
        sums = match sums.is_empty() {
            true => z.collect(),
            false => sums.into_iter().zip(z).map(|(sum, z)| sum + z).collect(),
        };
    }
    sums.into_iter().map(|sum| sum / positions as f64).collect()
}

/// The head outputs of a text at the positions of another one, over again where it is longer.
fn fitted(z: &Tensor<4>, seq: usize) -> Tensor<4> {
    let length = z.dims()[2];
    let times = seq.div_ceil(length);
    Tensor::cat(vec![z.clone(); times], 2).narrow(2, 0, seq)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_kernels::seed_random;
    use polyhead_models::DecoderConfig;
    use polyhead_models::weights::{load, named};

    use super::*;

    /// A model in which head 1 of layer 0 writes nothing.
    fn model() -> Decoder {
        let config = r#"{"d_model": 16, "n_layers": 2, "attention": {"softmax": {"n_heads": 2}}}"#;
        seed_random(5);
        let fresh = serde_json::from_str::<DecoderConfig>(config).unwrap().init(9, &Device::flex());
        let changed = named(&fresh).into_iter().map(|mut tensor| {
            tensor.values.iter_mut().for_each(|value| *value *= 5.0);
            if tensor.name == "layers.0.attention.o_proj.weight" {
                let half = tensor.values.len() / 2;
                tensor.values[half..].fill(0.0);
            }
            (tensor.name.clone(), tensor)
        });
        let changed = changed.collect();
        load(fresh, changed).unwrap()
    }

    #[test]
    fn a_head_that_writes_nothing_changes_nothing_and_the_others_what_a_whole_run_says() {
        let model = model();
        let rows = [Batch::text(vec![1, 5, 1, 8, 5, 0]), Batch::text(vec![2, 3, 2, 2])];
        let heads = [(0, 0), (0, 1), (1, 0)];
        let (base, found) = ablate(&model, &rows, &heads, &mut |_, _| ());
        assert_eq!(found[1], [Some(Effect::default()); 3]);
        let plain = loss_without(&model, &rows, &[]);
        assert!((base.loss - plain).abs() < 1e-5);
        for (head, found) in [(0, found[0]), (2, found[2])] {
            let effects = found.map(Option::unwrap);
            let whole = loss_without(&model, &rows, &heads[head..=head]) - plain;
            assert!((effects[0].loss - whole).abs() < 1e-5, "{head}: {effects:?} {whole}");
            assert!(effects.iter().all(|effect| effect.kl > 1e-4), "{effects:?}");
        }
        // What a text is resampled with is the other one: twice the same text leaves it as it is.
        let twice = [rows[0].clone(), rows[0].clone()];
        let (_, found) = ablate(&model, &twice, &heads, &mut |_, _| ());
        assert!(found[0][2].unwrap().kl.abs() < 1e-6 && found[0][1].unwrap().kl > 1e-4);
        assert_eq!(ablate(&model, &rows[..1], &heads, &mut |_, _| ()).1[0][2], None);
    }
}
