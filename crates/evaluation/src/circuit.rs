//! Circuits: the edges that carry most of a behaviour, run alone, and how much of it they keep (Hanna et al. 2024, arXiv 2403.17806;
//! Conmy et al. 2023, arXiv 2304.14997).
//!
//! ```text
//! faithfulness = (LD of the circuit - LD corrupt) / (LD clean - LD corrupt)              1: all of it, 0: none
//! ```
//! Over an edge of the circuit a part reads what the writer writes in this very run, over all others what it writes in the corrupt one.

use std::collections::BTreeSet;

use burn::tensor::{DType, Tensor};
use polyhead_attention::{At, Attention, Change, Edit, KvSite, Mask, QuerySite, Site, StreamSite};
use polyhead_kernels::in_type;
use polyhead_models::sites::SitePlan;
use polyhead_models::{Decoder, Pass, PromptPair};

use crate::edges::{EdgeScores, Reader, Writer, parts, separate_heads, written};
use crate::lens::{ids, read};
use crate::patching::difference;

/// From a part that writes to one that reads.
pub type Edge = (Writer, Reader);

/// The `count` edges of the largest scores by size, without those that lead nowhere or come from nowhere.
pub fn top(scores: &EdgeScores, (writers, readers): &(Vec<Writer>, Vec<Reader>), count: usize) -> BTreeSet<Edge> {
    let mut all: Vec<(f64, Edge)> = Vec::new();
    for (writer, row) in writers.iter().zip(&scores.edges) {
        let real = readers.iter().zip(row).filter(|(reader, _)| writer.reaches(**reader));
        all.extend(real.map(|(&reader, score)| (score.abs(), (*writer, reader))));
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    pruned(all.into_iter().take(count).map(|(_, edge)| edge).collect())
}

/// Without edges that cannot carry anything from the input to the logits.
fn pruned(mut edges: BTreeSet<Edge>) -> BTreeSet<Edge> {
    loop {
        // A head is read by all three of its inputs.
        let reads: BTreeSet<Writer> = edges.iter().filter_map(|(_, reader)| part(*reader)).collect();
        let writes: BTreeSet<Writer> = edges.iter().map(|(writer, _)| *writer).collect();
        let before = edges.len();
        edges.retain(|(writer, reader)| {
            let fed = *writer == Writer::Input || reads.contains(writer);
            fed && part(*reader).is_none_or(|part| writes.contains(&part))
        });
        if edges.len() == before {
            return edges;
        }
    }
}

/// The part that reads; `None` for the logits.
fn part(reader: Reader) -> Option<Writer> {
    match reader {
        Reader::Head(layer, head, _) => Some(Writer::Head(layer, head)),
        Reader::Mlp(layer) => Some(Writer::Mlp(layer)),
        Reader::Logits => None,
    }
}

/// The heads of a circuit, each with its layer.
pub fn heads(edges: &BTreeSet<Edge>) -> BTreeSet<(usize, usize)> {
    let ends = edges.iter().flat_map(|(writer, reader)| [Some(*writer), part(*reader)]);
    ends.flatten()
        .filter_map(|part| if let Writer::Head(layer, head) = part { Some((layer, head)) } else { None })
        .collect()
}

/// `[pairs]`: LD where the clean prompts go through a circuit alone. `None` for models whose edges cannot be scored.
pub fn run_alone(model: &Decoder, pairs: &[PromptPair], edges: &BTreeSet<Edge>) -> Option<Vec<f64>> {
    let (model, n_heads) = &separate_heads(model)?;
    let layers = model.layers.len();
    let rows = |of: fn(&PromptPair) -> &Vec<u32>| pairs.iter().map(|pair| of(pair).clone()).collect::<Vec<_>>();
    let (clean, corrupt) = (rows(|pair| &pair.clean), rows(|pair| &pair.corrupt));
    let (writers, _) = parts(layers, *n_heads);
    let other = written(model, &corrupt, &writers);
    let sites: [Site; 3] = [StreamSite::ResidPre.into(), StreamSite::MlpIn.into(), StreamSite::ResidPost.into()];
    let streams = read(model, &corrupt, &sites);
    let stream = |layer: usize, site: Site| {
        let tap = streams.iter().find(|tap| tap.layer == layer && tap.site == site).expect("read in every layer");
        tap.values.clone().squeeze_dim::<3>(1)
    };
    // What each part writes in this run more than in the corrupt one.
    let mut more: Vec<Option<Tensor<3>>> = vec![None; writers.len()];
    more[0] = Some(in_type(model.embed(ids(model, &clean)), DType::F32) - other[0].clone());
    let input = |reader: Reader, base: Tensor<3>, more: &[Option<Tensor<3>>]| -> Option<Tensor<3>> {
        let carried = writers.iter().zip(more).filter(|(writer, _)| edges.contains(&(**writer, reader)));
        let added = carried.filter_map(|(_, more)| more.clone()).reduce(|a, b| a + b);
        added.map(|added| base + added)
    };
    let mask = Mask::causal();
    for layer in 0..layers {
        let base = stream(layer, sites[0]);
        let run = |edits: Vec<Edit>, tap: Site| {
            let edits = edits.into_iter().map(|edit| (layer, edit)).collect();
            let sites = SitePlan { edits, taps: vec![(layer, tap)] };
            let mut read = model.run_layers(layer..layer + 1, base.clone(), Pass { sites, ..Pass::new(&mask) }).taps;
            in_type(read.remove(0).values, DType::F32)
        };
        let index = |writer: Writer| writers.iter().position(|other| *other == writer).expect("a part of the model");
        let projected = projections(model, layer, *n_heads, &base, &|reader| input(reader, base.clone(), &more));
        if !projected.is_empty() {
            let results = run(projected, QuerySite::Result.into());
            for head in 0..*n_heads {
                let at = index(Writer::Head(layer, head));
                more[at] = Some(results.clone().narrow(1, head, 1).squeeze_dim::<3>(1) - other[at].clone());
            }
        }
        if let Some(read) = input(Reader::Mlp(layer), stream(layer, sites[1]), &more) {
            let read = Edit::new(At::Stream(StreamSite::MlpIn), Change::replace(read.unsqueeze_dim::<4>(1)));
            let at = index(Writer::Mlp(layer));
            let result = run(vec![read], StreamSite::MlpOut.into()).squeeze_dim::<3>(1);
            more[at] = Some(result - other[at].clone());
        }
    }
    let last = stream(layers - 1, sites[2]);
    let last = input(Reader::Logits, last.clone(), &more).unwrap_or(last);
    let seq = last.dims()[1];
    let logits = model.logits(model.normed(last.narrow(1, seq - 1, 1))).squeeze_dim::<2>(1);
    Some(difference(&logits, pairs).into_data().iter::<f64>().collect())
}

/// The edits that give each head queries, keys and values of its own copies of the stream; none where all are those of the corrupt
/// run, `base`.
fn projections(
    model: &Decoder,
    layer: usize,
    n_heads: usize,
    base: &Tensor<3>,
    input: &dyn Fn(Reader) -> Option<Tensor<3>>,
) -> Vec<Edit> {
    let Attention::Softmax(softmax) = &model.layers[layer].attention else {
        unreachable!("checked: softmax attention")
    };
    let project = |read: Tensor<3>, kind: usize| softmax.projected_heads(model.layer_input(layer, read), kind);
    let sites: [Site; 3] = [QuerySite::Q.into(), KvSite::K.into(), KvSite::V.into()];
    let mut edits = Vec::new();
    for (kind, site) in sites.into_iter().enumerate() {
        let inputs: Vec<Option<Tensor<3>>> = (0..n_heads).map(|head| input(Reader::Head(layer, head, kind))).collect();
        if inputs.iter().all(Option::is_none) {
            continue;
        }
        let usual = project(base.clone(), kind);
        let own = inputs.into_iter().enumerate().map(|(head, read)| {
            let heads = read.map_or_else(|| usual.clone(), |read| project(read, kind));
            heads.narrow(1, head, 1)
        });
        edits.push(Edit::new(At::all(site), Change::replace(Tensor::cat(own.collect(), 1))));
    }
    edits
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_kernels::seed_random;
    use polyhead_models::DecoderConfig;
    use polyhead_models::weights::{load, named};

    use super::*;
    use crate::edges::{Steps, edge_scores};
    use crate::patching::Runs;

    fn model(device: &Device) -> Decoder {
        let config = r#"{"d_model": 16, "n_layers": 2, "attention": {"softmax": {"n_heads": 4, "n_kv_heads": 2, "qkv_bias": true,
            "o_bias": true}}}"#;
        seed_random(5);
        let fresh = serde_json::from_str::<DecoderConfig>(config).unwrap().init(11, device);
        let larger = named(&fresh).into_iter().map(|mut tensor| {
            let matrix = tensor.shape.len() == 2;
            tensor.values.iter_mut().for_each(|value| *value = if matrix { *value * 8.0 } else { *value + 0.1 });
            (tensor.name.clone(), tensor)
        });
        let larger = larger.collect();
        load(fresh, larger).unwrap()
    }

    fn pairs() -> Vec<PromptPair> {
        let pair = |clean: [u32; 5], corrupt: [u32; 5]| PromptPair {
            clean: clean.to_vec(),
            corrupt: corrupt.to_vec(),
            right: 3,
            wrong: 7,
        };
        vec![pair([1, 2, 3, 4, 5], [1, 9, 3, 4, 5]), pair([8, 2, 0, 4, 1], [8, 6, 0, 4, 1])]
    }

    #[test]
    fn all_edges_are_the_clean_run_and_none_the_corrupt_one() {
        let (model, pairs) = (model(&Device::flex()), pairs());
        let [clean, corrupt] = Runs::new(&model, &pairs).differences;
        let (writers, readers) = parts(2, 4);
        let all: BTreeSet<Edge> = writers
            .iter()
            .flat_map(|&writer| readers.iter().map(move |&reader| (writer, reader)))
            .filter(|(writer, reader)| writer.reaches(*reader))
            .collect();
        let close = |got: Vec<f64>, want: &[f64]| {
            assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-4), "{got:?} {want:?}");
        };
        close(run_alone(&model, &pairs, &all).unwrap(), &clean);
        close(run_alone(&model, &pairs, &BTreeSet::new()).unwrap(), &corrupt);
        assert!(clean.iter().zip(&corrupt).any(|(a, b)| (a - b).abs() > 0.05), "{clean:?} {corrupt:?}");
        // From the embedding straight to the logits: the layers are as in the corrupt run.
        let direct = run_alone(&model, &pairs, &BTreeSet::from([(Writer::Input, Reader::Logits)])).unwrap();
        close(direct, &corrupt);
    }

    #[test]
    fn the_largest_edges_make_a_circuit_from_the_input_to_the_logits() {
        let (plain, pairs) = (model(&Device::flex()), pairs());
        let trained = model(&Device::flex().autodiff());
        let scores = edge_scores(&trained, &pairs, Steps::ToClean(5)).unwrap();
        let parts = parts(2, 4);
        for count in [0, 5, 40, 1000] {
            let edges = top(&scores, &parts, count);
            assert!(edges.len() <= count);
            assert_eq!(pruned(edges.clone()), edges);
            assert!(edges.iter().all(|(writer, reader)| writer.reaches(*reader)));
        }
        let largest = top(&scores, &parts, 1000);
        assert!(heads(&largest).len() == 8 && run_alone(&plain, &pairs, &largest).is_some());
        let lonely = BTreeSet::from([(Writer::Head(0, 1), Reader::Logits), (Writer::Input, Reader::Head(1, 2, 0))]);
        assert_eq!(pruned(lonely), BTreeSet::new());
    }
}
