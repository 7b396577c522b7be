//! What heads do for a behaviour, by runs on two prompts that differ in what matters: activation patching, its first-order
//! estimate by gradients, and path patching (Wang et al. 2022, arXiv 2211.00593; code of circuit_reuse, arXiv 2310.08744).
//!
//! ```text
//! LD = logit(right) - logit(wrong) at the last position
//! effect = (LD patched - LD clean) / (LD corrupt - LD clean)                            0: nothing, 1: all of it
//! ```
//! Path patching, pass 1: the clean run with the sender's output from the corrupt one and all other heads' outputs as in the clean one
//! (feed-forward layers too, if they are frozen), of which the receiver is kept; pass 2: the clean run with that receiver. All at the last
//! position. The released code gives 0 where the receiver is a head's output, as its freezing overwrites what was kept; here it does not.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use polyhead_attention::{
    Amount, At, Change, Edit, KvHead, KvSite, Mask, Positions, QueryHead, QuerySite, Site, StreamSite,
};
use polyhead_models::sites::{SitePlan, Tap};
use polyhead_models::{Decoder, Pass, PromptPair};

use crate::lens::ids;

/// The pairs by groups of one length, each of about so many tokens at most: what is in memory at a time.
pub fn groups(pairs: &[PromptPair], tokens: usize) -> Vec<Vec<PromptPair>> {
    let mut by_length: BTreeMap<usize, Vec<PromptPair>> = BTreeMap::new();
    pairs.iter().for_each(|pair| by_length.entry(pair.clean.len()).or_default().push(pair.clone()));
    let cut = |(length, pairs): (&usize, &Vec<PromptPair>)| {
        pairs.chunks((tokens / length.max(&1)).max(1)).map(<[_]>::to_vec).collect::<Vec<_>>()
    };
    by_length.iter().flat_map(cut).collect()
}

/// Pairs of one length, with the runs of both sides.
#[derive(Debug)]
pub struct Runs<'a> {
    model: &'a Decoder,
    pairs: &'a [PromptPair],
    /// Positions of each prompt.
    pub seq: usize,
    clean: Vec<Tap>,
    corrupt: Vec<Tap>,
    /// `[pairs]`: LD of the clean and of the corrupt prompts.
    pub differences: [Vec<f64>; 2],
}

/// Where a head's change may arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receiver {
    /// A site of some query head.
    Query(usize, QuerySite, QueryHead),
    /// A site of some key/value head.
    Kv(usize, KvSite, KvHead),
    /// A point of the residual stream.
    Stream(usize, StreamSite),
}

impl Receiver {
    /// A site of a head of a layer: of `k`, `rot_k` and `v` that of the key or value head that query head `head` reads.
    ///
    /// # Errors
    /// Why there is none.
    pub fn of_head(model: &Decoder, layer: usize, site: Site, head: usize) -> Result<Self, String> {
        let layers = model.layers.len();
        if layer >= layers {
            return Err(format!("the model has no layer {layer}; it has {layers}, from 0"));
        }
        let mechanism = model.config().mechanism(layer);
        let name = mechanism.name();
        if let Some(reason) = mechanism.absent(site) {
            return Err(format!("{name} in layer {layer} has no {site}: {reason}"));
        }
        let wiring = mechanism.wiring().map_err(|reason| format!("{name} in layer {layer}: its heads {reason}"))?;
        // Outputs are fewer than query heads where some are subtracted.
        let outputs = wiring.iter().map(|own| own.outputs.end).max().unwrap_or(0);
        let heads = if matches!(site, Site::Query(QuerySite::Z | QuerySite::Result)) { outputs } else { wiring.len() };
        if head >= heads {
            return Err(format!("{site} of layer {layer} ({name}) has no head {head}; it has {heads}, from 0"));
        }
        Ok(match site {
            Site::Stream(site) => Self::Stream(layer, site),
            Site::Query(site) => Self::Query(layer, site, QueryHead(head)),
            Site::Kv(KvSite::V) => Self::Kv(layer, KvSite::V, wiring[head].value),
            Site::Kv(site) => Self::Kv(layer, site, wiring[head].key),
        })
    }

    fn layer(self) -> usize {
        match self {
            Self::Query(layer, ..) | Self::Kv(layer, ..) | Self::Stream(layer, _) => layer,
        }
    }

    fn at(self) -> At {
        match self {
            Self::Query(_, site, head) => At::Query(site, vec![head]),
            Self::Kv(_, site, head) => At::Kv(site, vec![head]),
            Self::Stream(_, site) => At::Stream(site),
        }
    }
}

impl<'a> Runs<'a> {
    /// Runs both sides of pairs of one length.
    pub fn new(model: &'a Decoder, pairs: &'a [PromptPair]) -> Self {
        let seq = pairs[0].clean.len();
        let sites: [Site; 3] = [StreamSite::ResidPre.into(), QuerySite::Z.into(), StreamSite::MlpOut.into()];
        let run = |rows: Vec<Vec<u32>>| {
            let taps = (0..model.layers.len()).flat_map(|layer| sites.map(|site| (layer, site))).collect();
            let plan = SitePlan { edits: Vec::new(), taps };
            let forward = model.pass(ids(model, &rows), Pass { sites: plan, ..Pass::new(&Mask::causal()) });
            (forward.taps, model.logits(forward.hidden.narrow(1, seq - 1, 1)).squeeze_dim::<2>(1))
        };
        let (clean, clean_logits) = run(pairs.iter().map(|pair| pair.clean.clone()).collect());
        let (corrupt, corrupt_logits) = run(pairs.iter().map(|pair| pair.corrupt.clone()).collect());
        let differences = [clean_logits, corrupt_logits].map(|logits| {
            let difference = difference(&logits, pairs);
            difference.into_data().iter::<f64>().collect()
        });
        Self { model, pairs, seq, clean, corrupt, differences }
    }

    fn values(&self, taps: &[Tap], layer: usize, site: impl Into<Site>) -> Tensor<4> {
        let site = site.into();
        taps.iter().find(|tap| tap.layer == layer && tap.site == site).expect("read in every layer").values.clone()
    }

    /// `[pairs, heads, seq, head_dim]`: the head outputs of the clean and of the corrupt run.
    pub fn z(&self, layer: usize) -> [Tensor<4>; 2] {
        [&self.clean, &self.corrupt].map(|taps| self.values(taps, layer, QuerySite::Z))
    }

    /// Heads of a layer, as many as z has.
    pub fn heads(&self, layer: usize) -> usize {
        self.z(layer)[0].dims()[1]
    }

    /// `[pairs]`: LD of a clean run from `layer` on, under edits.
    fn run_from(&self, layer: usize, edits: Vec<(usize, Edit)>) -> Vec<f64> {
        let hidden = self.values(&self.clean, layer, StreamSite::ResidPre).squeeze_dim::<3>(1);
        let (layers, mask) = (self.model.layers.len(), Mask::causal());
        let sites = SitePlan { edits, taps: Vec::new() };
        let hidden = self.model.run_layers(layer..layers, hidden, Pass { sites, ..Pass::new(&mask) }).hidden;
        let last = self.model.normed(hidden.narrow(1, self.seq - 1, 1));
        let logits = self.model.logits(last).squeeze_dim::<2>(1);
        difference(&logits, self.pairs).into_data().iter::<f64>().collect()
    }

    /// `[pairs]`: LD with the output of a head from the corrupt run, at some positions. It costs the layers from its own on.
    pub fn patch_head(&self, layer: usize, head: QueryHead, positions: Positions) -> Vec<f64> {
        let change = Change::replace(self.z(layer)[1].clone());
        let edit = Edit { positions, ..Edit::new(At::Query(QuerySite::Z, vec![head]), change) };
        self.run_from(layer, vec![(layer, edit)])
    }

    /// `[pairs]`: LD with heads switched off, at some positions.
    pub fn knock_out(&self, heads: &[(usize, usize)], positions: &Positions) -> Vec<f64> {
        let off = |&(layer, head): &(usize, usize)| {
            let edit = Edit::new(At::Query(QuerySite::Z, vec![QueryHead(head)]), Change::scale(0.0));
            (layer, Edit { positions: positions.clone(), ..edit })
        };
        self.run_from(0, heads.iter().map(off).collect())
    }

    /// The last position.
    pub fn last(&self) -> Positions {
        Positions::only(self.seq - 1)
    }

    /// `[pairs]`: LD with what a head changes by the path to `receivers` alone, at the last position. That of the clean run for heads
    /// that are not below them, and for receivers themselves.
    pub fn patch_path(&self, (layer, head): (usize, QueryHead), receivers: &[Receiver], freeze_mlps: bool) -> Vec<f64> {
        let lowest = receivers.iter().map(|receiver| receiver.layer()).min().unwrap_or(0);
        let outputs = |receiver: &Receiver, at: usize| match *receiver {
            Receiver::Query(layer, QuerySite::Z, head) if layer == at => Some(head),
            _ => None,
        };
        let stream = receivers.iter().all(|receiver| matches!(receiver, Receiver::Stream(..)));
        if (layer >= lowest && !(stream && layer == lowest))
            || receivers.iter().any(|r| outputs(r, layer) == Some(head))
        {
            return self.differences[0].clone();
        }
        let mut edits = Vec::new();
        let mut replace = |layer: usize, at: At, values: Tensor<4>| {
            let edit = Edit { positions: self.last(), ..Edit::new(at, Change::replace(values)) };
            edits.push((layer, edit));
        };
        for at in layer..self.model.layers.len() {
            let [clean, corrupt] = self.z(at);
            let sends = |other: usize| at == layer && other == head.0;
            let receives = |other: usize| receivers.iter().any(|r| outputs(r, at) == Some(QueryHead(other)));
            let frozen: Vec<QueryHead> =
                (0..clean.dims()[1]).filter(|&other| !sends(other) && !receives(other)).map(QueryHead).collect();
            if !frozen.is_empty() {
                replace(at, At::Query(QuerySite::Z, frozen), clean);
            }
            if at == layer {
                replace(at, At::Query(QuerySite::Z, vec![head]), corrupt);
            }
            if freeze_mlps {
                replace(at, At::Stream(StreamSite::MlpOut), self.values(&self.clean, at, StreamSite::MlpOut));
            }
        }
        let taps = receivers.iter().map(|receiver| (receiver.layer(), receiver.at().site())).collect();
        let hidden = self.values(&self.clean, layer, StreamSite::ResidPre).squeeze_dim::<3>(1);
        let (layers, mask) = (self.model.layers.len(), Mask::causal());
        let sites = SitePlan { edits, taps };
        let read = self.model.run_layers(layer..layers, hidden, Pass { sites, ..Pass::new(&mask) }).taps;
        let received = receivers.iter().map(|receiver| {
            let values = self.values(&read, receiver.layer(), receiver.at().site());
            let edit = Edit { positions: self.last(), ..Edit::new(receiver.at(), Change::replace(values)) };
            (receiver.layer(), edit)
        });
        self.run_from(lowest, received.collect())
    }

    /// `[layers][heads]`: the first-order estimate of what patching a head changes in the mean LD, with [`z_gradients`] of these
    /// pairs; at one position or at all.
    pub fn attribution(&self, gradients: &[Tensor<4>], position: Option<usize>) -> Vec<Vec<f64>> {
        let of_layer = |(layer, grad): (usize, &Tensor<4>)| {
            let [clean, corrupt] = self.z(layer);
            let product = (corrupt - clean) * grad.clone();
            let product = match position {
                Some(position) => product.narrow(2, position, 1),
                None => product,
            };
            product.sum_dim(0).sum_dim(2).sum_dim(3).into_data().iter::<f64>().collect()
        };
        gradients.iter().enumerate().map(of_layer).collect()
    }
}

/// A mean LD as an effect, between those of the clean and the corrupt run.
pub fn effect(difference: f64, [clean, corrupt]: [f64; 2]) -> f64 {
    (difference - clean) / (corrupt - clean)
}

/// `[pairs]`: LD of logits at the last position, `[pairs, vocab]`.
pub fn difference(logits: &Tensor<2>, pairs: &[PromptPair]) -> Tensor<1> {
    let of = |(row, pair): (usize, &PromptPair)| {
        let of_token = |token: u32| logits.clone().narrow(0, row, 1).narrow(1, token as usize, 1).reshape([1]);
        of_token(pair.right) - of_token(pair.wrong)
    };
    Tensor::cat(pairs.iter().enumerate().map(of).collect(), 0)
}

/// `[pairs, heads, seq, head_dim]` of each layer: the gradient of the mean LD at the head outputs of the clean run, for a model on a
/// device with autodiff. One forward and one backward for all heads.
pub fn z_gradients(model: &Decoder, pairs: &[PromptPair]) -> Vec<Tensor<4>> {
    let rows: Vec<Vec<u32>> = pairs.iter().map(|pair| pair.clean.clone()).collect();
    let sites: Vec<(usize, Site)> = (0..model.layers.len()).map(|layer| (layer, QuerySite::Z.into())).collect();
    gradients(model, &rows, pairs, &sites, None)
}

/// The gradient of the mean LD at some sites of a run over rows of tokens, or over `embedded` ones.
pub(crate) fn gradients(
    model: &Decoder,
    rows: &[Vec<u32>],
    pairs: &[PromptPair],
    sites: &[(usize, Site)],
    embedded: Option<Tensor<3>>,
) -> Vec<Tensor<4>> {
    let hidden = embedded.unwrap_or_else(|| model.embed(ids(model, rows)).detach());
    let (layers, mask) = (model.layers.len(), Mask::causal());
    let run = |plan: SitePlan| model.run_layers(0..layers, hidden.clone(), Pass { sites: plan, ..Pass::new(&mask) });
    let taps = run(SitePlan { edits: Vec::new(), taps: sites.to_vec() }).taps;
    let leaf = |&(layer, site): &(usize, Site)| {
        let tap = taps.iter().find(|tap| tap.layer == layer && tap.site == site).expect("read");
        Tensor::from_inner(tap.values.clone().inner().zeros_like()).require_grad()
    };
    let leaves: Vec<Tensor<4>> = sites.iter().map(leaf).collect();
    let added = |(&(layer, site), leaf): (&(usize, Site), &Tensor<4>)| {
        (layer, Edit::new(At::all(site), Change::add(Amount::Each(leaf.clone()))))
    };
    let edits = sites.iter().zip(&leaves).map(added).collect();
    let hidden = run(SitePlan { edits, taps: Vec::new() }).hidden;
    let seq = hidden.dims()[1];
    let logits = model.logits(model.normed(hidden.narrow(1, seq - 1, 1))).squeeze_dim::<2>(1);
    let grads = difference(&logits, pairs).mean().backward();
    leaves.iter().map(|leaf| leaf.grad(&grads).unwrap_or_else(|| leaf.clone().inner().zeros_like())).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_attention::{AttentionConfig, Dims};
    use polyhead_kernels::seed_random;
    use polyhead_models::DecoderConfig;

    use super::*;

    const SITES: [Site; 6] = [
        Site::Query(QuerySite::Q),
        Site::Query(QuerySite::RotQ),
        Site::Kv(KvSite::K),
        Site::Kv(KvSite::RotK),
        Site::Kv(KvSite::V),
        Site::Query(QuerySite::Z),
    ];

    /// Every head of every mechanism receives at every site that it has, those of keys and values at the heads that it reads; a site
    /// or a head that is not there is refused by name.
    #[test]
    fn every_mechanism_receives_at_the_heads_that_its_query_heads_read() {
        let pair = PromptPair { clean: vec![1, 2, 3, 4], corrupt: vec![1, 5, 3, 4], right: 2, wrong: 6 };
        let mut seen = 0;
        for attention in AttentionConfig::examples() {
            // What looks ahead is no decoder's.
            if attention.check_causal().is_err() {
                continue;
            }
            let name = attention.name();
            let Dims { d_model, n_layers, .. } = Dims::example();
            let config = serde_json::json!({ "d_model": d_model, "n_layers": n_layers, "attention": attention });
            seed_random(5);
            let model = serde_json::from_value::<DecoderConfig>(config).unwrap().init(9, &Device::flex());
            let runs = Runs::new(&model, std::slice::from_ref(&pair));
            let wiring = attention.wiring().unwrap();
            let reads = |head: usize| &wiring[head];
            for site in SITES {
                let read = crate::lens::read(&model, &[vec![1, 2]], &[site]);
                let heads = match site {
                    Site::Query(QuerySite::Z) => runs.heads(1),
                    _ => wiring.len(),
                };
                let Some(there) = read.iter().find(|tap| tap.layer == 1).map(|tap| tap.values.dims()[1]) else {
                    let told = Receiver::of_head(&model, 1, site, 0).unwrap_err();
                    assert!(told.contains(&format!("{name} in layer 1 has no {site}: ")), "{told}");
                    continue;
                };
                for head in 0..heads {
                    let receiver = Receiver::of_head(&model, 1, site, head).unwrap();
                    let index = receiver.at().heads()[0];
                    assert!(index < there, "{name} {site}: {index} of {there}");
                    let want = match site {
                        Site::Kv(KvSite::V) => reads(head).value.0,
                        Site::Kv(_) => reads(head).key.0,
                        _ => head,
                    };
                    assert_eq!(index, want, "{name} {site} of head {head}");
                    let effect = runs.patch_path((0, QueryHead(0)), &[receiver], false);
                    assert!(effect[0].is_finite(), "{name} {site} {head}");
                    seen += 1;
                }
                let told = Receiver::of_head(&model, 1, site, heads).unwrap_err();
                assert!(told.contains(&format!("has no head {heads}; it has {heads}, from 0")), "{told}");
            }
        }
        assert!(seen > 150, "{seen}");
    }
}
