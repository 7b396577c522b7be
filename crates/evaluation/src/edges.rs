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
use polyhead_models::{Decoder, Pass, surgery};

use crate::lens::ids;
use crate::patching::{Pair, gradients};

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writer {
    /// The token embedding.
    Input,
    /// A head.
    Head(usize, usize),
    /// A feed-forward layer.
    Mlp(usize),
}

/// A part that reads the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
pub fn edge_scores(model: &Decoder, pairs: &[Pair], steps: Steps) -> Option<EdgeScores> {
    scores(model, pairs, steps, true)
}

/// `[writers]`: the scores of nodes alone, which cost one forward and one backward a step.
pub fn node_scores(model: &Decoder, pairs: &[Pair], steps: Steps) -> Option<Vec<f64>> {
    scores(model, pairs, steps, false).map(|scores| scores.nodes)
}

fn scores(model: &Decoder, pairs: &[Pair], steps: Steps, with_edges: bool) -> Option<EdgeScores> {
    // With keys and values of its own for every query head, which share no gradients.
    let model = &surgery::expanded(model).ok()?;
    let softmax = |layer: usize| match &model.layers[layer].attention {
        Attention::Softmax(softmax) => Some(softmax),
        _ => None,
    };
    let layers = model.layers.len();
    let heads = softmax(0)?.query_heads();
    (0..layers).all(|layer| softmax(layer).is_some_and(|own| own.query_heads() == heads)).then_some(())?;
    let rows = |of: fn(&Pair) -> &Vec<u32>| pairs.iter().map(|pair| of(pair).clone()).collect::<Vec<_>>();
    let (clean, corrupt) = (rows(|pair| &pair.clean), rows(|pair| &pair.corrupt));
    let (writers, mut readers) = parts(layers, heads);
    readers.retain(|_| with_edges);
    let [own, other] = [&clean, &corrupt].map(|rows| written(model, rows, &writers));
    let changes: Vec<Tensor<3>> = own.into_iter().zip(other).map(|(clean, corrupt)| corrupt - clean).collect();

    let [from, to] = [&corrupt, &clean].map(|rows| model.embed(ids(model, rows)).detach());
    let points = steps.points();
    let (mut of_readers, mut of_writers): (Vec<Tensor<3>>, Vec<Tensor<3>>) = (Vec::new(), Vec::new());
    let add = |sums: &mut Vec<Tensor<3>>, new: Vec<Tensor<3>>| match sums.is_empty() {
        true => *sums = new,
        false => sums.iter_mut().zip(new).for_each(|(sum, new)| *sum = sum.clone() + new),
    };
    for &share in &points {
        let embedded = from.clone() + (to.clone() - from.clone()) * share;
        let (readers, writers) = at_point(model, &clean, pairs, embedded, (&readers, &writers));
        add(&mut of_readers, readers);
        add(&mut of_writers, writers);
    }
    // The gradient is that of the mean over pairs already.
    let dot = |a: &Tensor<3>, b: &Tensor<3>| -> f64 {
        let product = a.clone() * b.clone();
        f64::from(product.sum().into_scalar::<f32>()) / points.len() as f64
    };
    let edge = |(writer, change): (&Writer, &Tensor<3>)| -> Vec<f64> {
        let score =
            |(reader, grad): (&Reader, &Tensor<3>)| if writer.reaches(*reader) { dot(change, grad) } else { 0.0 };
        readers.iter().zip(&of_readers).map(score).collect()
    };
    let edges = writers.iter().zip(&changes).map(edge).collect();
    let nodes = changes.iter().zip(&of_writers).map(|(change, grad)| dot(change, grad)).collect();
    let released = |layer: usize| {
        let change = writers.iter().position(|writer| *writer == Writer::Mlp(layer))?;
        let grad = readers.iter().position(|reader| *reader == Reader::Mlp(layer))?;
        Some(dot(&changes[change], &of_readers[grad]))
    };
    Some(EdgeScores { edges, nodes, released_mlps: (0..layers).filter_map(released).collect() })
}

/// `[pairs, seq, d_model]`: what each part writes.
fn written(model: &Decoder, rows: &[Vec<u32>], writers: &[Writer]) -> Vec<Tensor<3>> {
    let sites: [Site; 3] = [StreamSite::ResidPre.into(), QuerySite::Result.into(), StreamSite::MlpOut.into()];
    let taps = crate::lens::read(model, rows, &sites);
    let of = |layer: usize, site: Site| {
        let tap = taps.iter().find(|tap| tap.layer == layer && tap.site == site).expect("read in every layer");
        in_type(tap.values.clone(), DType::F32).inner()
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
    pairs: &[Pair],
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
