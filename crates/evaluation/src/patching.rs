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

use burn::tensor::Tensor;
use polyhead_attention::{
    Amount, At, Change, Edit, KvHead, KvSite, Mask, Positions, QueryHead, QuerySite, Site, StreamSite,
};
use polyhead_models::sites::{SitePlan, Tap};
use polyhead_models::{ConfigError, Decoder, Pass, require};

use crate::lens::ids;

/// Two prompts of one length, and the tokens that tell them apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The prompt after which `right` is right.
    pub clean: Vec<u32>,
    /// The prompt in which what matters is another.
    pub corrupt: Vec<u32>,
    /// The token that is right after the clean prompt.
    pub right: u32,
    /// The token that is not.
    pub wrong: u32,
}

/// Pairs of one length, with the runs of both sides.
#[derive(Debug)]
pub struct Runs<'a> {
    model: &'a Decoder,
    pairs: &'a [Pair],
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

/// Refuses pairs that cannot be compared.
///
/// # Errors
/// Names the pair and the rule.
pub fn check(pairs: &[Pair], vocab: usize) -> Result<(), ConfigError> {
    require(!pairs.is_empty(), "pairs", || "there are no pairs: give at least one".into())?;
    for (at, pair) in pairs.iter().enumerate() {
        let field = format!("pair {}", at + 1);
        let [clean, corrupt] = [pair.clean.len(), pair.corrupt.len()];
        require(clean == corrupt, &field, || {
            format!("its clean prompt has {clean} tokens and its corrupt one {corrupt}: they must be of one length")
        })?;
        require(clean > 0, &field, || "its prompts have no tokens".into())?;
        require(pair.right != pair.wrong, &field, || {
            format!("its right and its wrong answer begin with the same token ({})", pair.right)
        })?;
        let all = pair.clean.iter().chain(&pair.corrupt).chain([&pair.right, &pair.wrong]);
        if let Some(id) = all.into_iter().find(|&&id| id as usize >= vocab) {
            return Err(ConfigError::new(field, format!("id {id} is not below the vocabulary ({vocab})")));
        }
    }
    Ok(())
}

impl<'a> Runs<'a> {
    /// Runs both sides of pairs of one length, which [`check`] has passed.
    pub fn new(model: &'a Decoder, pairs: &'a [Pair]) -> Self {
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

    /// The mean LD of a clean run from `layer` on, under edits.
    fn run_from(&self, layer: usize, edits: Vec<(usize, Edit)>) -> f64 {
        let hidden = self.values(&self.clean, layer, StreamSite::ResidPre).squeeze_dim::<3>(1);
        let (layers, mask) = (self.model.layers.len(), Mask::causal());
        let sites = SitePlan { edits, taps: Vec::new() };
        let hidden = self.model.run_layers(layer..layers, hidden, Pass { sites, ..Pass::new(&mask) }).hidden;
        let last = self.model.normed(hidden.narrow(1, self.seq - 1, 1));
        let logits = self.model.logits(last).squeeze_dim::<2>(1);
        mean(&difference(&logits, self.pairs).into_data().iter::<f64>().collect::<Vec<_>>())
    }

    /// A mean LD as an effect.
    pub fn effect(&self, difference: f64) -> f64 {
        let [clean, corrupt] = [0, 1].map(|side| mean(&self.differences[side]));
        (difference - clean) / (corrupt - clean)
    }

    /// The mean LD with the output of a head from the corrupt run, at some positions. It costs the layers from its own on.
    pub fn patch_head(&self, layer: usize, head: QueryHead, positions: Positions) -> f64 {
        let change = Change::replace(self.z(layer)[1].clone());
        let edit = Edit { positions, ..Edit::new(At::Query(QuerySite::Z, vec![head]), change) };
        self.run_from(layer, vec![(layer, edit)])
    }

    /// The last position.
    pub fn last(&self) -> Positions {
        Positions::only(self.seq - 1)
    }

    /// The effect of a head by the path to `receivers`, at the last position. 0 for heads that are not below them, and for receivers
    /// themselves.
    pub fn patch_path(&self, (layer, head): (usize, QueryHead), receivers: &[Receiver], freeze_mlps: bool) -> f64 {
        let lowest = receivers.iter().map(|receiver| receiver.layer()).min().unwrap_or(0);
        let outputs = |receiver: &Receiver, at: usize| match *receiver {
            Receiver::Query(layer, QuerySite::Z, head) if layer == at => Some(head),
            _ => None,
        };
        let stream = receivers.iter().all(|receiver| matches!(receiver, Receiver::Stream(..)));
        if (layer >= lowest && !(stream && layer == lowest))
            || receivers.iter().any(|r| outputs(r, layer) == Some(head))
        {
            return 0.0;
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
        self.effect(self.run_from(lowest, received.collect()))
    }
}

/// `[pairs]`: LD of logits at the last position, `[pairs, vocab]`.
pub fn difference(logits: &Tensor<2>, pairs: &[Pair]) -> Tensor<1> {
    let of = |(row, pair): (usize, &Pair)| {
        let of_token = |token: u32| logits.clone().narrow(0, row, 1).narrow(1, token as usize, 1).reshape([1]);
        of_token(pair.right) - of_token(pair.wrong)
    };
    Tensor::cat(pairs.iter().enumerate().map(of).collect(), 0)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// `[pairs, heads, seq, head_dim]` of each layer: the gradient of the mean LD at the head outputs of the clean run, for a model on a
/// device with autodiff. One forward and one backward for all heads.
pub fn z_gradients(model: &Decoder, pairs: &[Pair]) -> Vec<Tensor<4>> {
    let rows: Vec<Vec<u32>> = pairs.iter().map(|pair| pair.clean.clone()).collect();
    let sites: Vec<(usize, Site)> = (0..model.layers.len()).map(|layer| (layer, QuerySite::Z.into())).collect();
    gradients(model, &rows, pairs, &sites, None)
}

/// The gradient of the mean LD at some sites of a run over rows of tokens, or over `embedded` ones.
pub(crate) fn gradients(
    model: &Decoder,
    rows: &[Vec<u32>],
    pairs: &[Pair],
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
