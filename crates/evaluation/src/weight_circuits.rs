//! What the weights of a head do, whatever it reads: its OV and QK circuits (Elhage et al. 2021), without the layers between,
//! without biases and rotation.

use burn::tensor::{DType, Int, Tensor, TensorData};
use nalgebra::DMatrix;
use polyhead_attention::{Attention, Softmax};
use polyhead_kernels::in_type;
use polyhead_models::{Decoder, Norm};

/// The weights of a query head, in f32.
#[derive(Debug, Clone)]
pub struct HeadWeights {
    /// `[d_model, width]`
    pub q: Tensor<2>,
    /// `[d_model, width]`, of the key/value head that it reads.
    pub k: Tensor<2>,
    /// `[d_model, width]`
    pub v: Tensor<2>,
    /// `[width, d_model]`
    pub o: Tensor<2>,
}

/// The weights of the heads of a layer; `None` where its attention has none of its own for each head.
pub fn head_weights(model: &Decoder, layer: usize) -> Option<Vec<HeadWeights>> {
    let softmax: &Softmax = match &model.layers[layer].attention {
        Attention::Softmax(softmax) => softmax,
        Attention::Sink(sink) => &sink.softmax,
        _ => return None,
    };
    let n_heads = softmax.query_heads();
    let [_, kv_width] = softmax.v_proj.weight.dims();
    let width = softmax.o_proj.weight.dims()[0] / n_heads;
    let share = n_heads * width / kv_width;
    let wide = |x: Tensor<2>, axis: usize, head: usize| in_type(x.narrow(axis, head * width, width), DType::F32);
    let of_head = |head: usize| HeadWeights {
        q: wide(softmax.q_proj.weight.val(), 1, head),
        k: wide(softmax.k_proj.weight.val(), 1, head / share),
        v: wide(softmax.v_proj.weight.val(), 1, head / share),
        o: wide(softmax.o_proj.weight.val(), 0, head),
    };
    Some((0..n_heads).map(of_head).collect())
}

/// What a norm divides by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Divisor {
    /// Nothing: its weight alone counts.
    One,
    /// The standard deviation over channels, of one degree of freedom less.
    Deviation,
    /// The root of the mean square and this epsilon, as the norm itself.
    RootMeanSquare(f64),
}

/// `[rows, d_model]`: rows through a norm, without its bias.
pub fn normed(rows: Tensor<2>, norm: &Norm, divisor: Divisor) -> Tensor<2> {
    let rows = if norm.bias.is_some() { rows.clone() - rows.mean_dim(1) } else { rows };
    let divided = match divisor {
        Divisor::One => rows,
        Divisor::Deviation => rows.clone() / rows.var(1).sqrt(),
        Divisor::RootMeanSquare(eps) => rows.clone() / (rows.square().mean_dim(1) + eps).sqrt(),
    };
    divided * in_type(norm.weight.val(), DType::F32).unsqueeze::<2>()
}

/// `[vocab, d_model]`: what each logit is the product with, the weight of the last norm folded in.
pub fn unembedding(model: &Decoder) -> Tensor<2> {
    normed(in_type(model.output_projection(), DType::F32).transpose(), &model.norm, Divisor::One)
}

/// `[tokens, columns]`: the rows of some tokens.
pub(crate) fn rows_of(all: &Tensor<2>, tokens: &[u32]) -> Tensor<2> {
    let ids: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
    let count = ids.len();
    all.clone().select(0, Tensor::<1, Int>::from_data(TensorData::new(ids, [count]), &all.device()))
}

/// Where a token's own number is among those of the whole vocabulary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Own {
    /// The number.
    pub value: f32,
    /// How many are not larger, itself included: 1 for the smallest.
    pub from_below: usize,
    /// How many are not smaller, itself included: 1 for the largest.
    pub from_above: usize,
}

/// Rows of a V x V matrix at a time; chosen by us.
const ROWS: usize = 512;

/// The tokens' own numbers in `reads · writes`, `[tokens, width]` and `[width, vocab]`.
pub fn own(reads: Tensor<2>, writes: &Tensor<2>, tokens: &[u32]) -> Vec<Own> {
    let vocab = writes.dims()[1];
    let mut found = Vec::with_capacity(tokens.len());
    for (part, tokens) in tokens.chunks(ROWS).enumerate() {
        let rows = reads.clone().narrow(0, part * ROWS, tokens.len()).matmul(writes.clone());
        let numbers: Vec<f32> = rows.into_data().iter::<f32>().collect();
        for (row, &token) in numbers.chunks(vocab).zip(tokens) {
            let value = row[token as usize];
            let [larger, smaller] = row.iter().fold([0, 0], |[larger, smaller], &other| {
                [larger + usize::from(other > value), smaller + usize::from(other < value)]
            });
            found.push(Own { value, from_below: vocab - larger, from_above: vocab - smaller });
        }
    }
    found
}

/// The share of tokens of which something holds.
pub fn share(own: &[Own], holds: impl Fn(&Own) -> bool) -> f64 {
    own.iter().filter(|own| holds(own)).count() as f64 / own.len().max(1) as f64
}

/// What the value and output weights of a head do with the token that it reads.
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
    pub own: Vec<Own>,
}

/// The OV circuits of the heads of a layer; `None` where its attention has no fixed value and output weights of heads.
pub fn copying(model: &Decoder, layer: usize) -> Option<Vec<Copying>> {
    let embed = in_type(model.embedding.weight.val(), DType::F32);
    let unembed = in_type(model.output_projection(), DType::F32);
    let folded_unembed = unembedding(model).transpose();
    let through = |unembed: &Tensor<2>| unembed.clone().matmul(embed.clone()); // [d_model, d_model]
    let (raw_turn, folded_turn) = (through(&unembed), through(&folded_unembed));
    let weight = in_type(model.layers[layer].attention_norm.weight.val(), DType::F32).unsqueeze_dim::<2>(1);
    let tokens: Vec<u32> = (0..model.vocab_size() as u32).collect();
    let of_head = |HeadWeights { v, o, .. }: HeadWeights| {
        let folded_v = v.clone() * weight.clone();
        // The eigenvalues of a product of many rows are those of the product the other way round, and zeros.
        let turned = |turn: &Tensor<2>, v: &Tensor<2>| o.clone().matmul(turn.clone()).matmul(v.clone());
        Copying {
            ov: eigenvalue_share(o.clone().matmul(v.clone())),
            ov_folded: eigenvalue_share(o.clone().matmul(folded_v.clone())),
            full: eigenvalue_share(turned(&raw_turn, &v)),
            full_folded: eigenvalue_share(turned(&folded_turn, &folded_v)),
            own: own(embed.clone().matmul(folded_v), &o.matmul(folded_unembed.clone()), &tokens),
        }
    };
    Some(head_weights(model, layer)?.into_iter().map(of_head).collect())
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
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn eigenvalues_tell_copying_from_its_opposite_and_from_a_turn() {
        let of = |rows: [[f32; 2]; 2]| eigenvalue_share(Tensor::from_floats(rows, &Device::flex()));
        assert_eq!(of([[2.0, 0.0], [0.0, 1.0]]), 1.0);
        assert_eq!(of([[-2.0, 1.0], [0.0, -1.0]]), -1.0);
        assert!(of([[0.0, -1.0], [1.0, 0.0]]).abs() < 1e-9);
        assert_eq!(of([[0.0; 2]; 2]), 0.0);
    }
}
