//! Copy suppression (McDougall et al. 2023, arXiv 2310.04625; code in callummcdougall/SERI-MATS-2023-Streamlit-pages): heads that attend
//! to a token which is already predicted, and push it down.
//!
//! ```text
//! W_EE = W_E + MLP_0(norm(W_E))                      what a token is to a head, attention of layer 0 left out
//! OV:  rank of s in row s of W_EE W_V W_O W_U        suppressed: among the most negative
//! QK:  rank of s in row s of W_U W_Q (W_EE W_K)ᵀ     queries from predictions, keys from tokens, at no distance
//! ```
//! CSPA keeps of a head only what copy suppression would do: of each source token the negative part along its own unembedding, and of
//! the sources those that are predicted most, all else is the mean over texts; explained is 1 - KL(clean ‖ CSPA) / KL(clean ‖ mean).
//!
//! The code against the text: with the OV part alone it changes nothing, its share of the loss subtracts the clean loss twice, and its
//! full copying score is the rate divided by k; here all three are what the text says.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Tensor, TensorData};
use polyhead_attention::{At, Change, Edit, KvSite, Mask, QueryHead, QuerySite, Site, StreamSite};
use polyhead_kernels::in_type;
use polyhead_models::sites::SitePlan;
use polyhead_models::{Decoder, Pass};

use crate::edges::Writer;
use crate::lens::{Targets, direct_logits, direct_logits_under, read};
use crate::weight_circuits::{Divisor, HeadWeights, Own, head_weights, normed, own, rows_of, unembedding};

/// Ids of one forward pass, each a row by itself; chosen by us.
const IDS: usize = 4096;

/// `[vocab, d_model]`: the effective embedding, what a token is behind the feed-forward layer of the first layer.
pub fn effective_embedding(model: &Decoder) -> Tensor<2> {
    let all = model.embedding.weight.val();
    let [vocab, d_model] = all.dims();
    let mask = Mask::causal();
    let part = |from: usize| {
        let count = IDS.min(vocab - from);
        let rows = all.clone().narrow(0, from, count).reshape([count, 1, d_model]);
        let off = Edit::new(At::Stream(StreamSite::AttnOut), Change::scale(0.0));
        let sites = SitePlan { edits: vec![(0, off)], taps: Vec::new() };
        let hidden = model.run_layers(0..1, rows, Pass { sites, ..Pass::new(&mask) }).hidden;
        in_type(hidden, DType::F32).reshape([count, d_model])
    };
    Tensor::cat((0..vocab).step_by(IDS).map(part).collect(), 0)
}

/// What the weights of a head do with some tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Circuits {
    /// Reading a token, what the head adds to its own logit.
    pub ov: Vec<Own>,
    /// Where a token is predicted, how much the head attends to it.
    pub qk: Vec<Own>,
}

/// The circuits of the heads of a layer for some tokens, with an [`effective_embedding`]; `None` where its attention has no fixed
/// weights of heads. Norms of queries and keys are left out, as is rotation.
pub fn circuits(model: &Decoder, layer: usize, embedding: &Tensor<2>, tokens: &[u32]) -> Option<Vec<Circuits>> {
    let norm = &model.layers[layer].attention_norm;
    let unembed = unembedding(model);
    let read = normed(embedding.clone(), norm, Divisor::One);
    let keys = normed(embedding.clone(), norm, Divisor::RootMeanSquare(model.config().norm_eps));
    let queries = normed(rows_of(&unembed, tokens), norm, Divisor::One);
    let (read, writes) = (rows_of(&read, tokens), unembed.transpose());
    let of_head = |HeadWeights { q, k, v, o }: HeadWeights| Circuits {
        ov: own(read.clone().matmul(v), &o.matmul(writes.clone()), tokens),
        qk: own(queries.clone().matmul(q), &keys.clone().matmul(k).transpose(), tokens),
    };
    Some(head_weights(model, layer)?.into_iter().map(of_head).collect())
}

/// A head in a run over texts, for CSPA.
#[derive(Debug, Clone)]
pub struct HeadRun {
    /// `[batch, seq, width]`: what it reads.
    pub values: Tensor<3>,
    /// `[batch, queries, keys]`: its weights.
    pub pattern: Tensor<3>,
    /// `[width, d_model]`
    pub o: Tensor<2>,
    /// `[batch, seq, d_model]`: what it writes.
    pub result: Tensor<3>,
    /// `[batch, seq, d_model]`: the residual stream before its layer.
    pub resid_pre: Tensor<3>,
    /// `[batch, seq, d_model]`: the residual stream behind the last layer.
    pub resid_final: Tensor<3>,
    /// `[batch, seq, 1]`: what the last norm divides by.
    pub scale: Tensor<3>,
    /// `[vocab, d_model]`, the norm's weight folded in.
    pub unembed: Tensor<2>,
    /// `[seq, d_model]`: what the head writes on average.
    pub mean: Tensor<2>,
}

/// How many sources of each query stay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Keep {
    /// So many.
    Count(usize),
    /// This share of those that the query may attend to.
    Share(f64),
}

impl Keep {
    /// The authors': one in twenty.
    pub const PUBLISHED: Self = Self::Share(0.05);

    fn of(self, query: usize) -> usize {
        match self {
            Self::Count(count) => count,
            Self::Share(share) => (share * (query + 1) as f64).ceil() as usize,
        }
    }
}

/// Forms of the head of which the effect on the logits is compared: as it is, its mean, what copy suppression would do, its OV part
/// alone, its QK part alone.
#[derive(Debug, Clone)]
pub struct Cspa {
    /// `[batch, queries, keys]`: how much each source's token is predicted at each query.
    pub lens: Tensor<3>,
    /// `[batch * queries * keys]`: whether a source stays.
    pub kept: Vec<bool>,
    /// `[batch, seq, d_model]`: what the head writes: by copy suppression, by its OV part, by its QK part.
    pub results: [Tensor<3>; 3],
    /// `[batch, seq, vocab]`: with the head as it is, with its mean, then the same three.
    pub logits: [Tensor<3>; 5],
    /// `[batch * seq]`: KL from the clean logits to each of the other four.
    pub kl: [Vec<f64>; 4],
    /// `[batch * (seq - 1)]`: the loss of the next token with the head, with its mean, by copy suppression.
    pub losses: [Vec<f64>; 3],
}

/// Takes a head of texts of equal length apart; tokens of `function_words` are never kept as sources.
pub fn cspa(head: &HeadRun, rows: &[Vec<u32>], keep: Keep, function_words: &[u32]) -> Cspa {
    let [batch, seq, d_model] = head.result.dims();
    let own = rows_of(&head.unembed, &rows.concat()).reshape([batch, seq, d_model]);
    let lens = (head.resid_pre.clone() / head.scale.clone()).matmul(own.clone().swap_dims(1, 2));
    let kept = kept(&lens, rows, keep, function_words);
    let mask = kept.iter().map(|&kept| f32::from(u8::from(kept))).collect::<Vec<_>>();
    let mask = Tensor::<3>::from_data(TensorData::new(mask, [batch, seq, seq]), &lens.device());
    let pattern = head.pattern.clone();
    // What stays of a head whose every source is its mean: its weights need not add up to 1.
    let mean = head.mean.clone().unsqueeze::<3>();
    let averages = pattern.clone().sum_dim(2) * mean.clone();
    // Of each source what it adds along its own unembedding, less the mean's part: [batch, queries, keys].
    let unit = own.clone() / own.square().sum_dim(2).sqrt();
    let read = head.values.clone().matmul(head.o.clone().unsqueeze::<3>()); // [batch, seq, d_model]
    let along = (read.clone() * unit.clone()).sum_dim(2).swap_dims(1, 2) - mean.matmul(unit.clone().swap_dims(1, 2));
    let pushed = (pattern.clone() * along).clamp_max(0.0);
    let sources = pattern * mask.clone();
    let both = (pushed.clone() * mask).matmul(unit.clone()) + averages.clone();
    let qk_only = sources.clone().matmul(read) + averages.clone() - sources.sum_dim(2) * head.mean.clone().unsqueeze();
    let results = [both, pushed.matmul(unit) + averages, qk_only];
    let logits = |result: Tensor<3>| {
        let stream = head.resid_final.clone() - head.result.clone() + result;
        (stream / head.scale.clone()).matmul(head.unembed.clone().transpose().unsqueeze::<3>())
    };
    let of = |at: usize| logits(results[at].clone());
    let ablated = head.mean.clone().unsqueeze::<3>().expand([batch, seq, d_model]);
    let logits = [logits(head.result.clone()), logits(ablated), of(0), of(1), of(2)];
    let kl = [1, 2, 3, 4].map(|at| divergence(&logits[0], &logits[at]));
    let losses = [0, 1, 2].map(|at| next_losses(&logits[at], rows));
    Cspa { lens, kept, results, logits, kl, losses }
}

/// Which sources stay: those predicted no less than the last of the first occurrences to be kept.
fn kept(lens: &Tensor<3>, rows: &[Vec<u32>], keep: Keep, function_words: &[u32]) -> Vec<bool> {
    const NEVER: f32 = -1e9;
    /// What is predicted as much but for rounding stays too, as repeats of a token have to.
    const TOLERANCE: f32 = 1e-6;
    let numbers: Vec<f32> = lens.clone().into_data().iter::<f32>().collect();
    let seq = lens.dims()[2];
    let mut kept = Vec::with_capacity(numbers.len());
    for (at, predicted) in numbers.chunks(seq).enumerate() {
        let (row, query) = (&rows[at / seq], at % seq);
        let predicted: Vec<f32> = (predicted.iter().enumerate())
            .map(|(key, &value)| if key > query || function_words.contains(&row[key]) { NEVER } else { value })
            .collect();
        let first = |key: &usize| !row[..*key].contains(&row[*key]);
        let mut order: Vec<f32> = (0..seq).filter(first).map(|key| predicted[key]).collect();
        order.sort_by(|a, b| b.total_cmp(a));
        let threshold = keep.of(query).checked_sub(1).map_or(f32::INFINITY, |last| *order.get(last).unwrap_or(&NEVER));
        kept.extend(predicted.iter().map(|value| value + TOLERANCE >= threshold));
    }
    kept
}

/// `[batch * seq]`: KL(clean ‖ changed), in nats.
fn divergence(clean: &Tensor<3>, changed: &Tensor<3>) -> Vec<f64> {
    let [clean, changed] = [clean, changed].map(|logits| log_softmax(logits.clone(), 2));
    (clean.clone().exp() * (clean - changed)).sum_dim(2).into_data().iter::<f64>().collect()
}

/// `[batch * (seq - 1)]`: the losses of the tokens that follow.
fn next_losses(logits: &Tensor<3>, rows: &[Vec<u32>]) -> Vec<f64> {
    let [batch, seq, _] = logits.dims();
    let targets: Vec<i32> = rows.iter().flat_map(|row| row[1..].iter().map(|&id| id as i32)).collect();
    let targets = Tensor::from_data(TensorData::new(targets, [batch, seq - 1, 1]), &logits.device());
    log_softmax(logits.clone().narrow(1, 0, seq - 1), 2).gather(2, targets).neg().into_data().iter::<f64>().collect()
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1) as f64;
    values.sum::<f64>() / count
}

impl Cspa {
    /// The shares of the head's effect that are explained: by copy suppression, by its OV part, by its QK part.
    pub fn explained(&self) -> [f64; 3] {
        let [ablated, both, ov, qk] = self.kl.each_ref().map(|kl| mean(kl.iter().copied()));
        [both, ov, qk].map(|kl| 1.0 - kl / ablated)
    }

    /// The same of the loss: of the sum of its changes, and of their sizes.
    pub fn explained_loss(&self) -> [f64; 2] {
        let [clean, ablated, both] = &self.losses;
        let change = |losses: &[f64], size: fn(f64) -> f64| {
            mean(losses.iter().zip(clean).map(|(loss, clean)| size(loss - clean)))
        };
        [|change| change, f64::abs].map(|size| 1.0 - change(both, size) / change(ablated, size))
    }
}

/// The runs of some heads over texts of equal length, two at least, whose means are taken at each position; `None` for a layer whose
/// attention has no fixed weights of heads.
pub fn head_runs(model: &Decoder, rows: &[Vec<u32>], layer: usize, heads: &[QueryHead]) -> Option<Vec<HeadRun>> {
    let weights = head_weights(model, layer)?;
    let wanted: [Site; 4] =
        [StreamSite::ResidPre.into(), KvSite::V.into(), QuerySite::Weights.into(), QuerySite::Result.into()];
    let layers = model.layers.len();
    let mut taps: Vec<(usize, Site)> = wanted.iter().map(|&site| (layer, site)).collect();
    taps.push((layers - 1, StreamSite::ResidPost.into()));
    let sites = SitePlan { edits: Vec::new(), taps };
    let mask = Mask::causal();
    let read = model.pass(crate::lens::ids(model, rows), Pass { sites, ..Pass::new(&mask) }).taps;
    let of = |site: Site| {
        let tap = read.iter().find(|tap| tap.site == site).expect("it is read");
        in_type(tap.values.clone(), DType::F32)
    };
    let stream = |site: StreamSite| of(site.into()).squeeze_dim::<3>(1);
    let (resid_pre, resid_final) = (stream(StreamSite::ResidPre), stream(StreamSite::ResidPost));
    let centre = |x: Tensor<3>| if model.norm.bias.is_some() { x.clone() - x.mean_dim(2) } else { x };
    let scale = (centre(resid_final.clone()).square().mean_dim(2) + model.config().norm_eps).sqrt();
    let unembed = unembedding(model);
    let share = weights.len() / of(wanted[1]).dims()[1];
    let head = |&QueryHead(head): &QueryHead| {
        let own = |site: Site, head: usize| of(site).narrow(1, head, 1).squeeze_dim::<3>(1);
        let result = own(wanted[3], head);
        HeadRun {
            values: own(wanted[1], head / share),
            pattern: own(wanted[2], head),
            o: weights[head].o.clone(),
            mean: result.clone().mean_dim(0).squeeze_dim::<2>(0),
            result,
            resid_pre: resid_pre.clone(),
            resid_final: resid_final.clone(),
            scale: scale.clone(),
            unembed: unembed.clone(),
        }
    };
    Some(heads.iter().map(head).collect())
}

/// How much of an ablation a part makes up for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Repair {
    /// The part.
    pub part: Writer,
    /// Its direct effect on the difference of logits, mean over texts.
    pub before: f64,
    /// The same once heads are replaced by their means.
    pub after: f64,
    /// Its part of the sum of all changes.
    pub share: f64,
}

/// The edits that replace heads by their means over texts at each position.
pub fn mean_ablation(model: &Decoder, rows: &[Vec<u32>], heads: &[(usize, QueryHead)]) -> Vec<(usize, Edit)> {
    let taps = read(model, rows, &[QuerySite::Z.into()]);
    let edit = |&(layer, head): &(usize, QueryHead)| {
        let change = Change::replace(taps[layer].values.clone().mean_dim(0));
        (layer, Edit::new(At::Query(QuerySite::Z, vec![head]), change))
    };
    heads.iter().map(edit).collect()
}

/// The self-repair behind an ablation of heads by their means: of the feed-forward layer of the first of their layers, and of all that
/// comes behind, the heads themselves left out.
pub fn self_repair(model: &Decoder, targets: Targets<'_>, heads: &[(usize, QueryHead)]) -> Vec<Repair> {
    let clean = direct_logits(model, targets);
    let edits = mean_ablation(model, targets.rows, heads);
    let ablated = direct_logits_under(model, targets, edits, Some(&clean.scale));
    let first = heads.iter().map(|(layer, _)| *layer).min().unwrap_or_default();
    let effect = |values: &[f32]| mean(values.iter().map(|&value| f64::from(value)));
    let mut found = Vec::new();
    let mut add = |part, before: &[f32], after: &[f32]| {
        found.push(Repair { part, before: effect(before), after: effect(after), share: 0.0 });
    };
    for layer in first..model.layers.len() {
        let behind = |head: &usize| layer > first && !heads.contains(&(layer, QueryHead(*head)));
        for head in (0..clean.heads[layer].len()).filter(behind) {
            add(Writer::Head(layer, head), &clean.heads[layer][head], &ablated.heads[layer][head]);
        }
        add(Writer::Mlp(layer), &clean.mlp[layer], &ablated.mlp[layer]);
    }
    let all: f64 = found.iter().map(|repair| repair.after - repair.before).sum();
    found.iter_mut().for_each(|repair| repair.share = (repair.after - repair.before) / all);
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::module::Param;
    use burn::tensor::Device;
    use polyhead_attention::Attention;
    use polyhead_kernels::seed_random;
    use polyhead_models::DecoderConfig;

    use super::*;
    use crate::weight_circuits::share;

    /// A model of one layer in which the values and outputs of head 0 write the opposite of what is read, those of head 1 the same.
    fn planted() -> Decoder {
        let config = r#"{"d_model": 12, "n_layers": 1, "attention": {"softmax": {"n_heads": 3, "head_dim": 12}}}"#;
        seed_random(3);
        let mut model = serde_json::from_str::<DecoderConfig>(config).unwrap().init(20, &Device::flex());
        let Attention::Softmax(softmax) = &mut model.layers[0].attention else { panic!("softmax") };
        let unit = |factor: f64| Tensor::<2>::eye(12, &Device::flex()) * factor;
        let random = || softmax.v_proj.weight.val().narrow(1, 0, 12);
        let random = random();
        let wide = |parts: Vec<Tensor<2>>, axis| Param::from_tensor(Tensor::cat(parts, axis));
        softmax.v_proj.weight = wide(vec![unit(1.0), unit(1.0), random.clone()], 1);
        softmax.o_proj.weight = wide(vec![unit(-1.0), unit(1.0), random.clone()], 0);
        softmax.q_proj.weight = wide(vec![unit(1.0), unit(-1.0), random.clone()], 1);
        softmax.k_proj.weight = wide(vec![unit(1.0), unit(1.0), random.transpose()], 1);
        model
    }

    #[test]
    fn a_head_that_writes_the_opposite_suppresses_and_one_that_copies_does_not() {
        let model = planted();
        let tokens: Vec<u32> = (0..20).collect();
        let found = circuits(&model, 0, &effective_embedding(&model), &tokens).unwrap();
        let suppressed = |head: usize| share(&found[head].ov, |own| own.from_below <= 1);
        let attended = |head: usize| share(&found[head].qk, |own| own.from_above <= 1);
        assert_eq!([suppressed(0), suppressed(1)], [1.0, 0.0]);
        assert_eq!([attended(0), attended(1)], [1.0, 0.0]);
        assert!(suppressed(2) < 0.5 && attended(2) < 0.5);
        // Any part of the tokens is told of as in the whole.
        let some = circuits(&model, 0, &effective_embedding(&model), &[7, 3]).unwrap();
        assert_eq!(some[2].ov[0].from_below, found[2].ov[7].from_below);
        assert_eq!(some[2].qk[1].from_above, found[2].qk[3].from_above);
    }

    #[test]
    fn what_a_head_does_in_a_run_is_put_together_as_the_model_does_it() {
        let model = planted();
        let rows = [vec![1, 5, 1, 9, 5], vec![2, 3, 2, 2, 11]];
        for run in head_runs(&model, &rows, 0, &[QueryHead(0), QueryHead(2)]).unwrap() {
            let all = cspa(&run, &rows, Keep::Share(1.0), &[]);
            let close = |got: &Tensor<3>, want: &Tensor<3>| {
                let largest = (got.clone() - want.clone()).abs().max().into_scalar::<f32>();
                assert!(largest < 1e-5, "{largest}");
            };
            let hidden = model.pass(crate::lens::ids(&model, &rows), Pass::new(&Mask::causal())).hidden;
            close(&all.logits[0], &model.logits(hidden));
            // With every source kept, the QK part alone changes nothing.
            close(&all.results[2], &run.result);
            assert!((all.explained()[2] - 1.0).abs() < 1e-5);
        }
    }
}
