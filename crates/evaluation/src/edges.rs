//! Edge attribution patching, plain (Syed et al. 2023, arXiv 2310.10348) and with integrated gradients (Hanna et al. 2024, arXiv
//! 2403.17806): what every edge between two parts of a decoder carries of a behaviour.
//!
//! ```text
//! score(u → v) = (corrupt - clean output of u) · ∂LD/∂(input of v),  summed over positions and channels, mean over pairs
//! ```
//! Parts that write are the embedding, heads and feed-forward layers; parts that read are the queries, keys and values of every query head
//! (each its own copy of the residual stream before the norm, also where heads share keys), feed-forward layers, and the logits. With
//! integrated gradients the token embeddings go from corrupt to clean in m steps, and the gradients are averaged: over k/m with k = 0 ..
//! m - 1 in the released code, 1 .. m in the paper ([`Steps`]).
//!
//! The released node scores multiply what a feed-forward layer writes by the gradient at what it reads; here it is that at what it writes.

use burn::tensor::{DType, Tensor};
use polyhead_attention::{Attention, KvSite, Mask, QuerySite, Site, Softmax, StreamSite};
use polyhead_kernels::in_type;
use polyhead_models::sites::SitePlan;
use polyhead_models::{Block, Decoder, Pass, PromptPair, surgery};

use crate::lens::ids;
use crate::patching::gradients;

/// Between which points gradients are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Steps {
    /// At the clean run alone.
    Clean,
    /// At k/m for k from 0: the corrupt end, not the clean one.
    FromCorrupt(usize),
    /// At k/m for k from 1: the clean end, not the corrupt one.
    ToClean(usize),
    /// In the middle of m equal parts.
    Midpoints(usize),
}

impl Steps {
    /// How far from corrupt to clean each run is.
    fn points(self) -> Vec<f64> {
        let of = |m: usize, shift: f64| (0..m).map(|k| (k as f64 + shift) / m as f64).collect();
        match self {
            Self::Clean => vec![1.0],
            Self::FromCorrupt(m) => of(m, 0.0),
            Self::ToClean(m) => of(m, 1.0),
            Self::Midpoints(m) => of(m, 0.5),
        }
    }
}

/// A part that writes to the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Writer {
    /// The token embedding.
    Input,
    /// A head.
    Head(usize, usize),
    /// A feed-forward layer.
    Mlp(usize),
}

/// A part that reads the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reader {
    /// Queries (0), keys (1) or values (2) of a query head.
    Head(usize, usize, usize),
    /// A feed-forward layer.
    Mlp(usize),
    /// The last norm.
    Logits,
}

impl Writer {
    /// Whether a reader sees what it writes.
    pub fn reaches(self, reader: Reader) -> bool {
        match (self, reader) {
            (Self::Input, _) | (_, Reader::Logits) => true,
            (Self::Head(from, _) | Self::Mlp(from), Reader::Head(to, ..)) => from < to,
            (Self::Head(from, _), Reader::Mlp(to)) => from <= to,
            (Self::Mlp(from), Reader::Mlp(to)) => from < to,
        }
    }
}

/// The parts of a decoder, in the order of its layers: queries of all heads of a layer, keys of all, values of all.
pub fn parts(layers: usize, heads: usize) -> (Vec<Writer>, Vec<Reader>) {
    let (mut writers, mut readers) = (vec![Writer::Input], Vec::new());
    for layer in 0..layers {
        writers.extend((0..heads).map(|head| Writer::Head(layer, head)));
        writers.push(Writer::Mlp(layer));
        readers.extend((0..3).flat_map(|kind| (0..heads).map(move |head| Reader::Head(layer, head, kind))));
        readers.push(Reader::Mlp(layer));
    }
    readers.push(Reader::Logits);
    (writers, readers)
}

/// The scores of a decoder's parts.
#[derive(Debug, Clone, PartialEq)]
pub struct EdgeScores {
    /// `[writers][readers]`, 0 where there is no edge.
    pub edges: Vec<Vec<f64>>,
    /// `[writers]`: the same of everything that a part reaches at once.
    pub nodes: Vec<f64>,
    /// `[layers]`: of feed-forward layers as the released code has it, with the gradient at what they read.
    pub released_mlps: Vec<f64>,
}

/// Scores all edges, for a model of softmax attention on a device with autodiff; `None` for another.
pub fn edge_scores(model: &Decoder, pairs: &[PromptPair], steps: Steps) -> Option<EdgeScores> {
    scores(model, pairs, steps, true)
}

/// `[writers]`: the scores of nodes alone, which cost one forward and one backward a step.
pub fn node_scores(model: &Decoder, pairs: &[PromptPair], steps: Steps) -> Option<Vec<f64>> {
    scores(model, pairs, steps, false).map(|scores| scores.nodes)
}

fn scores(model: &Decoder, pairs: &[PromptPair], steps: Steps, with_edges: bool) -> Option<EdgeScores> {
    let (model, heads) = &separate_heads(model)?;
    let layers = model.layers.len();
    let rows = |of: fn(&PromptPair) -> &Vec<u32>| pairs.iter().map(|pair| of(pair).clone()).collect::<Vec<_>>();
    let (clean, corrupt) = (rows(|pair| &pair.clean), rows(|pair| &pair.corrupt));
    let (writers, mut readers) = parts(layers, *heads);
    readers.retain(|_| with_edges);
    let [own, other] = [&clean, &corrupt].map(|rows| stacked(written(model, rows, &writers)));
    let changes = other - own;

    let [from, to] = [&corrupt, &clean].map(|rows| model.embed(ids(model, rows)).detach());
    let points = steps.points();
    let at = |share: &f64| {
        let embedded = from.clone() + (to.clone() - from.clone()) * *share;
        let (of_readers, of_writers) = at_point(model, &clean, pairs, embedded, (&readers, &writers));
        (with_edges.then(|| stacked(of_readers)), stacked(of_writers))
    };
    // The gradient is that of the mean over pairs already.
    let (of_readers, of_writers) =
        points.iter().map(at).reduce(|(a, b), (c, d)| (a.zip(c).map(|(a, c)| a + c), b + d)).expect("there is a point");
    let count = points.len() as f64;
    let numbers = |x: Tensor<2>| x.into_data().iter::<f64>().map(|score| score / count).collect::<Vec<f64>>();
    let nodes = numbers((changes.clone() * of_writers).sum_dim(1));
    let all = of_readers.map_or_else(Vec::new, |grads| numbers(changes.matmul(grads.transpose())));
    let mut edges: Vec<Vec<f64>> = all.chunks(readers.len().max(1)).map(<[f64]>::to_vec).collect();
    let mut released_mlps = Vec::new();
    for (writer, row) in writers.iter().zip(&mut edges) {
        for (reader, score) in readers.iter().zip(row) {
            if matches!((writer, reader), (Writer::Mlp(from), Reader::Mlp(to)) if from == to) {
                released_mlps.push(*score);
            }
            if !writer.reaches(*reader) {
                *score = 0.0;
            }
        }
    }
    Some(EdgeScores { edges, nodes, released_mlps })
}

/// The model with keys and values of its own for every query head, which share no gradients, and its heads in a layer. `None` where
/// it has other attention than softmax, layers of different heads, or feed-forward layers beside attention.
pub(crate) fn separate_heads(model: &Decoder) -> Option<(Decoder, usize)> {
    let model = surgery::expanded(&model.clone().merged()).ok().filter(|model| !model.config().parallel_residual)?;
    let heads = |block: &Block| match &block.attention {
        Attention::Softmax(softmax) => Some(softmax.query_heads()),
        _ => None,
    };
    let first = heads(&model.layers[0])?;
    model.layers.iter().all(|block| heads(block) == Some(first)).then_some((model, first))
}

/// `[parts, pairs * seq * d_model]`
fn stacked(parts: Vec<Tensor<3>>) -> Tensor<2> {
    let size = parts.first().map_or(0, |part| part.dims().iter().product());
    Tensor::cat(parts.into_iter().map(|part| part.reshape([1, size])).collect(), 0)
}

/// `[pairs, seq, d_model]`: what each part writes.
pub(crate) fn written(model: &Decoder, rows: &[Vec<u32>], writers: &[Writer]) -> Vec<Tensor<3>> {
    let sites: [Site; 3] = [StreamSite::ResidPre.into(), QuerySite::Result.into(), StreamSite::MlpOut.into()];
    let taps = crate::lens::read(model, rows, &sites);
    let of = |layer: usize, site: Site| {
        let tap = taps.iter().find(|tap| tap.layer == layer && tap.site == site).expect("read in every layer");
        let values = in_type(tap.values.clone(), DType::F32);
        if values.is_autodiff() { values.inner() } else { values }
    };
    let part = |writer: &Writer| match *writer {
        Writer::Input => of(0, sites[0]).squeeze_dim::<3>(1),
        Writer::Head(layer, head) => of(layer, sites[1]).narrow(1, head, 1).squeeze_dim::<3>(1),
        Writer::Mlp(layer) => of(layer, sites[2]).squeeze_dim::<3>(1),
    };
    writers.iter().map(part).collect()
}

/// `[pairs, seq, d_model]` each: the gradients at what parts read and at what parts write, in a run over `embedded`.
fn at_point(
    model: &Decoder,
    rows: &[Vec<u32>],
    pairs: &[PromptPair],
    embedded: Tensor<3>,
    (readers, writers): (&[Reader], &[Writer]),
) -> (Vec<Tensor<3>>, Vec<Tensor<3>>) {
    let layers = model.layers.len();
    let sites: [Site; 7] = [
        StreamSite::ResidPre.into(),
        QuerySite::Q.into(),
        KvSite::K.into(),
        KvSite::V.into(),
        QuerySite::Result.into(),
        StreamSite::MlpIn.into(),
        StreamSite::MlpOut.into(),
    ];
    let mut all: Vec<(usize, Site)> = (0..layers).flat_map(|layer| sites.map(|site| (layer, site))).collect();
    all.push((layers - 1, StreamSite::ResidPost.into()));
    let found = gradients(model, rows, pairs, &all, Some(embedded.clone()));
    let of = |layer: usize, at: usize| found[layer * sites.len() + at].clone();
    let plan = SitePlan::tap_all(layers, StreamSite::ResidPre);
    let mask = Mask::causal();
    let stream = model.run_layers(0..layers, embedded, Pass { sites: plan, ..Pass::new(&mask) }).taps;
    let reader = |reader: &Reader| match *reader {
        Reader::Head(layer, head, kind) => {
            let read = stream[layer].values.clone().inner().squeeze_dim::<3>(1);
            back_to_stream(model, (layer, head, kind), read, of(layer, 1 + kind).narrow(1, head, 1))
        }
        Reader::Mlp(layer) => of(layer, 5).squeeze_dim::<3>(1),
        Reader::Logits => found[layers * sites.len()].clone().squeeze_dim::<3>(1),
    };
    let writer = |writer: &Writer| match *writer {
        Writer::Input => of(0, 0).squeeze_dim::<3>(1),
        Writer::Head(layer, head) => of(layer, 4).narrow(1, head, 1).squeeze_dim::<3>(1),
        Writer::Mlp(layer) => of(layer, 6).squeeze_dim::<3>(1),
    };
    (readers.iter().map(reader).collect(), writers.iter().map(writer).collect())
}

/// `[pairs, seq, d_model]`: the gradient at a head's own copy of the residual stream from that of its queries, keys or values
/// (before rotation), `[pairs, 1, seq, head_dim]`.
fn back_to_stream(
    model: &Decoder,
    (layer, head, kind): (usize, usize, usize),
    read: Tensor<3>,
    grad: Tensor<4>,
) -> Tensor<3> {
    let Attention::Softmax(softmax) = &model.layers[layer].attention else {
        unreachable!("checked: softmax attention")
    };
    let softmax: &Softmax = softmax;
    let leaf = Tensor::<3>::from_inner(read).require_grad();
    let heads = softmax.projected_heads(model.layer_input(layer, leaf.clone()), kind);
    let own = heads.narrow(1, head, 1) * Tensor::from_inner(grad);
    leaf.grad(&own.sum().backward()).expect("a head reads its stream")
}
