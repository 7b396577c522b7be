//! What each part of a decoder says of the next token: the logit lens (nostalgebraist 2020), and the direct effect of embedding, heads
//! and feed-forward layers on a logit.

use std::cmp::Ordering;

use burn::tensor::{DType, Int, Tensor, TensorData};
use polyhead_attention::{Edit, Mask, QuerySite, Site, StreamSite};
use polyhead_kernels::in_type;
use polyhead_models::intervention::Context;
use polyhead_models::sites::{SitePlan, Tap};
use polyhead_models::{Decoder, Pass};
use serde::Serialize;

use crate::weight_circuits::rows_of;

/// `[batch, seq]` ids on the model's device; rows are equally long.
pub fn ids(model: &Decoder, rows: &[Vec<u32>]) -> Tensor<2, Int> {
    let numbers: Vec<i32> = rows.iter().flatten().map(|&id| id as i32).collect();
    let seq = rows.first().map_or(0, Vec::len);
    Tensor::from_data(TensorData::new(numbers, [rows.len(), seq]), &model.device())
}

/// What is read at some sites of every layer of a pass over rows of tokens.
pub fn read(model: &Decoder, rows: &[Vec<u32>], sites: &[Site]) -> Vec<Tap> {
    read_under(model, rows, sites, Vec::new())
}

/// The same under edits.
pub fn read_under(model: &Decoder, rows: &[Vec<u32>], sites: &[Site], edits: Vec<(usize, Edit)>) -> Vec<Tap> {
    let taps = (0..model.layers.len()).flat_map(|layer| sites.iter().map(move |&site| (layer, site))).collect();
    let sites = SitePlan { edits, taps };
    let tokens = rows.concat();
    let context =
        Context { rows: rows.len(), tokens: &tokens, prompt: rows.first().map_or(0, Vec::len), ..Context::default() };
    model.pass(ids(model, rows), Pass { sites, context: Some(context), ..Pass::new(&Mask::causal()) }).taps
}

/// `[batch, seq, vocab]` for each point of the residual stream: before every layer, in the middle of every layer, behind the last.
/// The last norm is computed anew at each of them.
pub fn logit_lens(model: &Decoder, rows: &[Vec<u32>]) -> Vec<(String, Tensor<3>)> {
    let logits = |stream| model.logits(model.normed(stream));
    points(model, rows).map(|(name, stream)| (name, logits(stream))).collect()
}

/// What the residual stream says of one token, at one of its points.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lens {
    /// The point: `0_pre`, `0_mid`, ..., `final_post`.
    pub point: String,
    /// The token's logit.
    pub logit: f64,
    /// Its probability.
    pub probability: f64,
    /// How many tokens are likelier, plus 1; the last of all where the logit is no number.
    pub rank: usize,
    /// The likeliest token.
    pub first: u32,
}

/// How many are larger than the one at `at`, plus 1; what is no number is smaller than nothing.
fn rank(values: &[f64], at: usize) -> usize {
    let larger = |value: &f64| value.partial_cmp(&values[at]).is_none_or(Ordering::is_gt);
    1 + values.iter().enumerate().filter(|(other, value)| *other != at && larger(value)).count()
}

/// The same of one row and one token, at the last position.
pub fn token_lens(model: &Decoder, row: &[u32], token: u32) -> Vec<Lens> {
    let last = row.len() - 1;
    let of = |(point, stream): (String, Tensor<3>)| {
        let logits = model.logits(model.normed(stream.narrow(1, last, 1)));
        let logits: Vec<f64> = logits.into_data().iter::<f64>().collect();
        let (logit, most) = (logits[token as usize], logits.iter().copied().fold(f64::NEG_INFINITY, f64::max));
        let sum: f64 = logits.iter().map(|other| (other - most).exp()).sum();
        Lens {
            point,
            logit,
            probability: (logit - most).exp() / sum,
            rank: rank(&logits, token as usize),
            first: logits.iter().position(|&other| other == most).unwrap_or_default() as u32,
        }
    };
    points(model, &[row.to_vec()]).map(of).collect()
}

/// `[batch, seq, d_model]`: the residual stream at each of its points.
fn points(model: &Decoder, rows: &[Vec<u32>]) -> impl Iterator<Item = (String, Tensor<3>)> {
    let points = [StreamSite::ResidPre, StreamSite::ResidMid, StreamSite::ResidPost].map(Site::from);
    let last = model.layers.len() - 1;
    let name = move |tap: &Tap| match tap.site {
        Site::Stream(StreamSite::ResidPre) => Some(format!("{}_pre", tap.layer)),
        Site::Stream(StreamSite::ResidMid) => Some(format!("{}_mid", tap.layer)),
        _ => (tap.layer == last).then(|| "final_post".into()),
    };
    let taps = read(model, rows, &points);
    taps.into_iter().filter_map(move |tap| Some((name(&tap)?, tap.values.squeeze_dim::<3>(1))))
}

/// The parts of the logit of one token (or of the difference of two) at the last position, each `[batch]`, with the scale of the
/// last norm as it is in this pass. They add up to the logit.
#[derive(Debug, Clone)]
pub struct DirectLogits {
    /// Of the embedding.
    pub embedding: Vec<f32>,
    /// `[layers][heads]`: of each head.
    pub heads: Vec<Vec<Vec<f32>>>,
    /// `[layers]`: of attention as a whole.
    pub attention: Vec<Vec<f32>>,
    /// `[layers]`: of the feed-forward layer.
    pub mlp: Vec<Vec<f32>>,
    /// Of what belongs to no part: the biases of the last norm and of the output projection.
    pub bias: Vec<f32>,
    /// What the last norm divides by.
    pub scale: Vec<f32>,
}

impl DirectLogits {
    /// `[batch]`: the sum of all parts.
    pub fn total(&self) -> Vec<f64> {
        let parts = || std::iter::once(&self.embedding).chain(&self.attention).chain(&self.mlp);
        let of = |row: usize| parts().map(|part| f64::from(part[row])).sum::<f64>() + f64::from(self.bias[row]);
        (0..self.embedding.len()).map(of).collect()
    }

    /// `[batch]`: what attention of a layer adds that belongs to none of its heads, the bias of its output projection.
    pub fn beside_heads(&self, layer: usize) -> Vec<f64> {
        let heads = |row: usize| self.heads[layer].iter().map(|head| f64::from(head[row])).sum::<f64>();
        self.attention[layer].iter().enumerate().map(|(row, &all)| f64::from(all) - heads(row)).collect()
    }
}

/// The logits whose parts are asked for: one token for each row, less another where one is given.
#[derive(Debug, Clone, Copy)]
pub struct Targets<'a> {
    /// Rows of equal length.
    pub rows: &'a [Vec<u32>],
    /// A token for each row.
    pub tokens: &'a [u32],
    /// Another one for each row.
    pub minus: Option<&'a [u32]>,
}

/// The direct effects on the logits of targets.
pub fn direct_logits(model: &Decoder, targets: Targets<'_>) -> DirectLogits {
    direct_logits_under(model, targets, Vec::new(), None)
}

/// The same under edits, with the scale of the last norm as it is in another run, where that is given.
pub fn direct_logits_under(
    model: &Decoder,
    targets: Targets<'_>,
    edits: Vec<(usize, Edit)>,
    scale: Option<&[f32]>,
) -> DirectLogits {
    let Targets { rows, tokens, minus } = targets;
    let (batch, seq) = (rows.len(), rows.first().map_or(0, Vec::len));
    let sites = [StreamSite::ResidPre, StreamSite::AttnOut, StreamSite::MlpOut, StreamSite::ResidPost].map(Site::from);
    let taps = read_under(model, rows, &[&sites[..], &[QuerySite::Result.into()]].concat(), edits);
    let last = |values: Tensor<4>| {
        let [_, heads, _, width] = values.dims();
        in_type(values.narrow(2, seq - 1, 1), DType::F32).reshape([batch, heads, width])
    };
    // Of each token a row, [vocab, width]; [batch, width] of the targets, less that of the others.
    let of_tokens = |of_all: Tensor<2>| match minus {
        Some(minus) => rows_of(&of_all, tokens) - rows_of(&of_all, minus),
        None => rows_of(&of_all, tokens),
    };
    let direction = of_tokens(in_type(model.output_projection(), DType::F32).transpose());
    let norm = &model.norm;
    let weighed = direction.clone() * norm.weight.val().unsqueeze::<2>(); // [batch, d_model]
    let stream = taps.iter().rev().find(|tap| tap.site == sites[3]).expect("a decoder has a layer").values.clone();
    let (centred, eps) = (norm.bias.is_some(), model.config().norm_eps);
    let centre = |x: Tensor<3>| if centred { x.clone() - x.mean_dim(2) } else { x };
    let scale = match scale {
        Some(scale) => Tensor::from_data(TensorData::new(scale.to_vec(), [batch, 1, 1]), &stream.device()),
        None => (centre(last(stream)).square().mean_dim(2) + eps).sqrt(), // [batch, 1, 1]
    };
    let numbers = |x: Tensor<3>| x.into_data().iter::<f32>().collect::<Vec<f32>>();
    // [batch, heads, d_model] to what each of them adds, [heads][batch].
    let effect = |values: Tensor<4>| -> Vec<Vec<f32>> {
        let parts = centre(last(values)) / scale.clone();
        let heads = parts.dims()[1];
        let all = numbers((parts * weighed.clone().unsqueeze_dim::<3>(1)).sum_dim(2)); // [batch, heads]
        (0..heads).map(|head| all.iter().skip(head).step_by(heads).copied().collect()).collect()
    };
    let each = |site: Site| taps.iter().filter(move |tap| tap.site == site).map(|tap| effect(tap.values.clone()));
    let whole = |site: Site| each(site).map(|mut parts| parts.remove(0)).collect::<Vec<_>>();
    let of_norm = norm.bias.as_ref().map(|bias| (direction * bias.val().unsqueeze::<2>()).sum_dim(1));
    let of_head = model.head.as_ref().and_then(|head| head.bias.as_ref());
    let of_head = of_head.map(|bias| of_tokens(in_type(bias.val(), DType::F32).unsqueeze_dim::<2>(1)));
    let biases = of_norm.into_iter().chain(of_head).map(|bias| numbers(bias.unsqueeze::<3>()));
    let bias = biases.fold(vec![0.0; batch], |sum, bias| sum.iter().zip(bias).map(|(a, b)| a + b).collect());
    DirectLogits {
        embedding: whole(sites[0]).swap_remove(0),
        heads: each(QuerySite::Result.into()).collect(),
        attention: whole(sites[1]),
        mlp: whole(sites[2]),
        bias,
        scale: numbers(scale),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_kernels::comparison::{Tolerance, assert_close};
    use polyhead_kernels::seed_random;
    use polyhead_models::DecoderConfig;
    use polyhead_models::weights::{load, named};

    use super::*;

    #[test]
    fn a_logit_that_is_no_number_ranks_last() {
        assert_eq!([0, 1, 2].map(|at| rank(&[0.5, 2.0, 0.5], at)), [2, 1, 2]);
        assert_eq!([0, 1].map(|at| rank(&[f64::NAN, 2.0, 0.5], at)), [3, 2]);
    }

    #[test]
    fn the_parts_of_a_logit_add_up_to_it_where_the_head_has_a_bias() {
        let config = r#"{"d_model": 16, "n_layers": 2, "tie_embeddings": false, "head_bias": true,
            "attention": {"softmax": {"n_heads": 2}}}"#;
        let config: DecoderConfig = serde_json::from_str(config).unwrap();
        seed_random(5);
        let fresh = config.init(7, &Device::flex());
        // A fresh bias is 0.
        let other = |(at, value): (usize, &mut f32)| *value += at as f32 * 0.1 + 0.3;
        let weights = named(&fresh).into_iter().map(|mut tensor| {
            if tensor.name.contains("bias") {
                tensor.values.iter_mut().enumerate().for_each(other);
            }
            (tensor.name.clone(), tensor)
        });
        let weights = weights.collect();
        let model = load(fresh, weights).unwrap();
        let rows = [vec![1, 2, 3], vec![4, 0, 6]];
        let hidden =
            model.forward(ids(&model, &rows), &Mask::causal(), None, polyhead_attention::Observe::Nothing).hidden;
        let logits: Vec<f64> = model.logits(hidden.narrow(1, 2, 1)).into_data().iter::<f64>().collect();
        let want = |row: usize, token: u32| logits[row * 7 + token as usize];
        let (tokens, minus) = ([5, 2], [0, 3]);
        let total = |minus| direct_logits(&model, Targets { rows: &rows, tokens: &tokens, minus }).total();
        let close =
            |what: &str, got: Vec<f64>, want: [f64; 2]| assert_close(what, &got, &want, Tolerance::absolute(1e-5));
        close("logits", total(None), [want(0, 5), want(1, 2)]);
        let differences = [want(0, 5) - want(0, 0), want(1, 2) - want(1, 3)];
        close("differences", total(Some(&minus)), differences);
        let lens = token_lens(&model, &rows[1], 2);
        let points: Vec<&str> = lens.iter().map(|lens| lens.point.as_str()).collect();
        assert_eq!(points, ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]);
        let end = &lens[4];
        close("the last point", vec![end.logit, end.logit], [want(1, 2); 2]);
        let all: Vec<f64> = (0..7).map(|token| want(1, token)).collect();
        let probability = all[2].exp() / all.iter().map(|logit| logit.exp()).sum::<f64>();
        close("probability", vec![end.probability; 2], [probability; 2]);
        assert_eq!(end.rank, 1 + all.iter().filter(|&&other| other > all[2]).count());
        assert!(all.iter().all(|&other| other <= all[end.first as usize]));
    }
}
