//! What each part of a decoder says of the next token: the logit lens (nostalgebraist 2020), the direct effect of embedding, heads
//! and feed-forward layers on a logit, and what the weights of a head do with the token that it reads.

use burn::tensor::{DType, Int, Tensor, TensorData};
use nalgebra::DMatrix;
use polyhead_attention::{Attention, Mask, QuerySite, Site, Softmax, StreamSite};
use polyhead_kernels::in_type;
use polyhead_models::sites::{SitePlan, Tap};
use polyhead_models::{Decoder, Pass};

/// `[batch, seq]` ids on the model's device; rows are equally long.
pub fn ids(model: &Decoder, rows: &[Vec<u32>]) -> Tensor<2, Int> {
    let numbers: Vec<i32> = rows.iter().flatten().map(|&id| id as i32).collect();
    let seq = rows.first().map_or(0, Vec::len);
    Tensor::from_data(TensorData::new(numbers, [rows.len(), seq]), &model.device())
}

/// What is read at some sites of every layer of a pass over rows of tokens.
pub fn read(model: &Decoder, rows: &[Vec<u32>], sites: &[Site]) -> Vec<Tap> {
    let taps = (0..model.layers.len()).flat_map(|layer| sites.iter().map(move |&site| (layer, site))).collect();
    let sites = SitePlan { edits: Vec::new(), taps };
    model.pass(ids(model, rows), Pass { sites, ..Pass::new(&Mask::causal()) }).taps
}

/// `[batch, seq, vocab]` for each point of the residual stream: before every layer, in the middle of every layer, behind the last.
/// The last norm is computed anew at each of them.
pub fn logit_lens(model: &Decoder, rows: &[Vec<u32>]) -> Vec<(String, Tensor<3>)> {
    let points = [StreamSite::ResidPre, StreamSite::ResidMid, StreamSite::ResidPost].map(Site::from);
    let last = model.layers.len() - 1;
    let name = |tap: &Tap| match tap.site {
        Site::Stream(StreamSite::ResidPre) => Some(format!("{}_pre", tap.layer)),
        Site::Stream(StreamSite::ResidMid) => Some(format!("{}_mid", tap.layer)),
        _ => (tap.layer == last).then(|| "final_post".into()),
    };
    let taps = read(model, rows, &points);
    let of = |tap: Tap| Some((name(&tap)?, model.logits(model.normed(tap.values.squeeze_dim::<3>(1)))));
    taps.into_iter().filter_map(of).collect()
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
}

/// The direct effects on the logits of `targets`, less those of `minus` where it is given: one token for each row.
pub fn direct_logits(model: &Decoder, rows: &[Vec<u32>], targets: &[u32], minus: Option<&[u32]>) -> DirectLogits {
    let (batch, seq) = (rows.len(), rows.first().map_or(0, Vec::len));
    let sites = [StreamSite::ResidPre, StreamSite::AttnOut, StreamSite::MlpOut, StreamSite::ResidPost].map(Site::from);
    let taps = read(model, rows, &[&sites[..], &[QuerySite::Result.into()]].concat());
    let last = |values: Tensor<4>| {
        let [_, heads, _, width] = values.dims();
        in_type(values.narrow(2, seq - 1, 1), DType::F32).reshape([batch, heads, width])
    };
    // Of each token a row, [vocab, width]; [batch, width] of the targets, less that of the others.
    let of_tokens = |of_all: Tensor<2>| {
        let select = |tokens: &[u32]| {
            let tokens: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
            of_all.clone().select(0, Tensor::<1, Int>::from_data(TensorData::new(tokens, [batch]), &of_all.device()))
        };
        match minus {
            Some(minus) => select(targets) - select(minus),
            None => select(targets),
        }
    };
    let direction = of_tokens(in_type(model.output_projection(), DType::F32).transpose());
    let norm = &model.norm;
    let weighed = direction.clone() * norm.weight.val().unsqueeze::<2>(); // [batch, d_model]
    let stream = taps.iter().rev().find(|tap| tap.site == sites[3]).expect("a decoder has a layer").values.clone();
    let (centred, eps) = (norm.bias.is_some(), model.config().norm_eps);
    let centre = |x: Tensor<3>| if centred { x.clone() - x.mean_dim(2) } else { x };
    let scale = (centre(last(stream)).square().mean_dim(2) + eps).sqrt(); // [batch, 1, 1]
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

/// What the value and output weights of a head do with the token that it reads: the OV circuit (Elhage et al. 2021), without the
/// layers between.
#[derive(Debug, Clone, PartialEq)]
pub struct Copying {
    /// `Σ Re λ / Σ |λ|` over the eigenvalues of W_V W_O: 1 where a head copies, -1 where it writes the opposite.
    pub ov: f64,
    /// The same with the weight of the norm before attention folded into W_V.
    pub ov_folded: f64,
    /// The same of W_E W_V W_O W_U, from embedding to logits.
    pub full: f64,
    /// The same with both norms' weights folded.
    pub full_folded: f64,
    /// `[vocab]`: what reading a token adds to its own logit, norms folded.
    pub diagonal: Vec<f32>,
    /// The share of tokens whose own logit is among the largest `top` that reading them writes.
    pub top_share: f64,
    /// The share whose own logit is among the smallest `top`.
    pub bottom_share: f64,
}

/// Rows of a V x V matrix at a time; chosen by us.
const ROWS: usize = 512;

/// The OV circuits of the heads of a layer; `None` where its attention has no fixed value and output weights of heads.
pub fn copying(model: &Decoder, layer: usize, top: usize) -> Option<Vec<Copying>> {
    let block = &model.layers[layer];
    let softmax: &Softmax = match &block.attention {
        Attention::Softmax(softmax) => softmax,
        Attention::Sink(sink) => &sink.softmax,
        _ => return None,
    };
    let n_heads = softmax.query_heads();
    let [d_model, kv_width] = softmax.v_proj.weight.dims();
    let width = softmax.o_proj.weight.dims()[0] / n_heads;
    let share = n_heads * width / kv_width;
    let wide = |x: Tensor<2>| in_type(x, DType::F32);
    let (embed, unembed) = (wide(model.embedding.weight.val()), wide(model.output_projection()));
    let folded = |x: Tensor<2>, weight: Tensor<1>| x * weight.reshape([d_model, 1]);
    let folded_unembed = folded(unembed.clone(), model.norm.weight.val());
    let through = |unembed: &Tensor<2>| unembed.clone().matmul(embed.clone()); // [d_model, d_model]
    let (raw_turn, folded_turn) = (through(&unembed), through(&folded_unembed));
    let of_head = |head: usize| {
        let v = wide(softmax.v_proj.weight.val()).narrow(1, head / share * width, width); // [d_model, width]
        let o = wide(softmax.o_proj.weight.val()).narrow(0, head * width, width); // [width, d_model]
        let folded_v = folded(v.clone(), block.attention_norm.weight.val());
        // The eigenvalues of a product of many rows are those of the product the other way round, and zeros.
        let ov = eigenvalue_share(o.clone().matmul(v.clone()));
        let ov_folded = eigenvalue_share(o.clone().matmul(folded_v.clone()));
        let full = eigenvalue_share(o.clone().matmul(raw_turn.clone()).matmul(v));
        let full_folded = eigenvalue_share(o.clone().matmul(folded_turn.clone()).matmul(folded_v.clone()));
        let reads = embed.clone().matmul(folded_v); // [vocab, width]
        let writes = o.matmul(folded_unembed.clone()); // [width, vocab]
        let (diagonal, [above, below]) = own_logits(reads, writes, top);
        let tokens = diagonal.len().max(1) as f64;
        let (top_share, bottom_share) = (above as f64 / tokens, below as f64 / tokens);
        Copying { ov, ov_folded, full, full_folded, diagonal, top_share, bottom_share }
    };
    Some((0..n_heads).map(of_head).collect())
}

/// The diagonal of `reads · writes`, `[vocab, width]` and `[width, vocab]`, and of how many rows it is among the `top` largest and
/// smallest numbers.
fn own_logits(reads: Tensor<2>, writes: Tensor<2>, top: usize) -> (Vec<f32>, [usize; 2]) {
    let vocab = reads.dims()[0];
    let (mut diagonal, mut counts) = (Vec::with_capacity(vocab), [0; 2]);
    for from in (0..vocab).step_by(ROWS) {
        let rows = reads.clone().narrow(0, from, ROWS.min(vocab - from)).matmul(writes.clone());
        let numbers: Vec<f32> = rows.into_data().iter::<f32>().collect();
        for (row, logits) in numbers.chunks(vocab).enumerate() {
            let own = logits[from + row];
            diagonal.push(own);
            counts[0] += usize::from(logits.iter().filter(|&&logit| logit > own).count() < top);
            counts[1] += usize::from(logits.iter().filter(|&&logit| logit < own).count() < top);
        }
    }
    (diagonal, counts)
}

/// `Σ Re λ / Σ |λ|` of a square matrix; 0 where all eigenvalues are 0.
fn eigenvalue_share(matrix: Tensor<2>) -> f64 {
    let [rows, columns] = matrix.dims();
    let numbers: Vec<f64> = matrix.into_data().iter::<f64>().collect();
    let eigenvalues = DMatrix::from_row_slice(rows, columns, &numbers).complex_eigenvalues();
    let (real, size) =
        eigenvalues.iter().fold((0.0, 0.0), |(real, size), of| (real + of.re, size + of.re.hypot(of.im)));
    if size == 0.0 { 0.0 } else { real / size }
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
        let (targets, minus) = ([5, 2], [0, 3]);
        let close =
            |what: &str, got: Vec<f64>, want: [f64; 2]| assert_close(what, &got, &want, Tolerance::absolute(1e-5));
        close("logits", direct_logits(&model, &rows, &targets, None).total(), [want(0, 5), want(1, 2)]);
        let differences = [want(0, 5) - want(0, 0), want(1, 2) - want(1, 3)];
        close("differences", direct_logits(&model, &rows, &targets, Some(&minus)).total(), differences);
    }

    #[test]
    fn eigenvalues_tell_copying_from_its_opposite_and_from_a_turn() {
        let of = |rows: [[f32; 2]; 2]| eigenvalue_share(Tensor::from_floats(rows, &Device::flex()));
        assert_eq!(of([[2.0, 0.0], [0.0, 1.0]]), 1.0);
        assert_eq!(of([[-2.0, 1.0], [0.0, -1.0]]), -1.0);
        assert!(of([[0.0, -1.0], [1.0, 0.0]]).abs() < 1e-9);
        assert_eq!(of([[0.0; 2]; 2]), 0.0);
    }
}
