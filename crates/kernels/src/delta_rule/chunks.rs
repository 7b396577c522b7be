//! The recurrence in products of matrices (Yang et al. 2024, arXiv 2412.06464, section 3.2): a chunk's tokens at once.
//!
//! With L\[i, j\] the decay from behind token j to behind token i, and G\[i\] that from before the chunk,
//!
//! ```text
//! A = β K Kᵀ ⊙ L, strictly below the diagonal        T = (I + A)⁻¹
//! U = T β V - T β G K S                              O = G Q S + (Q Kᵀ ⊙ L) U
//! S' = G[last] S + (L[last] K)ᵀ U
//! ```
//! Everything but the three lines with S is done for all chunks together. The decays are products, not differences of logarithms: they
//! are those of a matrix with 1 on its diagonal and -g below it, inverted like I + A, so that a decay of 0 is as good as any other.

use burn::tensor::{Device, Tensor, TensorData};

use super::DeltaRule;

/// Tokens of a chunk, a power of two; as in the authors' code.
const CHUNK: usize = 64;

/// The recurrence in operations of tensors, chunk by chunk.
pub(super) fn by_chunks(rule: DeltaRule, mut state: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    let ([batch, seq, _, k_dim], [.., heads, v_dim]) = (rule.q.dims(), rule.v.dims());
    let (device, length) = (rule.q.device(), CHUNK.min(seq.next_power_of_two()));
    let chunks = seq.div_ceil(length);
    // Tokens behind the end, which change nothing: [batch * heads, chunks, length, width].
    let cut = |x: Tensor<4>, fill: f64| {
        let [.., own, width] = x.dims();
        let rest = Tensor::full([batch, chunks * length - seq, own, width], fill, &device);
        let x = if rest.dims()[1] == 0 { x } else { Tensor::cat(vec![x, rest], 1) };
        let x = x.swap_dims(1, 2).reshape([batch, own, 1, chunks * length * width]);
        x.expand([batch, own, heads / own, chunks * length * width]).reshape([batch * heads, chunks, length, width])
    };
    let [q, k, v] = [rule.q, rule.k, rule.v].map(|x| cut(x, 0.0));
    let number = |x: Tensor<3>| x.reshape([batch, seq, heads, 1]);
    let (beta, decay) = (cut(number(rule.beta), 0.0), cut(number(rule.decay), 1.0));

    let mask = |sees: fn(usize, usize) -> bool| mask(length, &device, sees);
    let one = mask(|row, column| row == column);
    let decays = inverse(one.clone() - decay.clone() * mask(|row, column| row == column + 1));
    let from_start = decay.narrow(2, 0, 1) * decays.clone().narrow(3, 0, 1);
    let to_end = decays.clone().narrow(2, length - 1, 1).swap_dims(2, 3);
    let by_keys = |x: Tensor<4>| x.matmul(k.clone().swap_dims(2, 3)) * decays.clone();
    let solved = inverse(one + by_keys(beta.clone() * k.clone()) * mask(|row, column| row > column));
    let values = solved.clone().matmul(beta.clone() * v); // T β V
    let keys = solved.matmul(beta * from_start.clone() * k.clone()); // T β G K
    let reads = by_keys(q.clone()); // decays are 0 above the diagonal
    let (q, k) = (from_start.clone() * q, (to_end * k).swap_dims(2, 3));
    let left = from_start.narrow(2, length - 1, 1);

    state = state.reshape([batch * heads, 1, k_dim, v_dim]);
    let mut read = Vec::with_capacity(chunks);
    for chunk in 0..chunks {
        let of = |x: &Tensor<4>| x.clone().narrow(1, chunk, 1);
        let corrections = of(&values) - of(&keys).matmul(state.clone());
        read.push(of(&q).matmul(state.clone()) + of(&reads).matmul(corrections.clone()));
        state = of(&left) * state + of(&k).matmul(corrections);
    }
    let read = Tensor::cat(read, 1).reshape([batch, heads, chunks * length, v_dim]).swap_dims(1, 2);
    (read.narrow(1, 0, seq), state.reshape([batch, heads, k_dim, v_dim]))
}

/// 1 where a row sees a column, else 0: `[1, 1, length, length]`
fn mask(length: usize, device: &Device, sees: impl Fn(usize, usize) -> bool) -> Tensor<4> {
    let seen: Vec<f32> = (0..length * length).map(|at| f32::from(sees(at / length, at % length))).collect();
    Tensor::from_data(TensorData::new(seen, [1, 1, length, length]), device)
}

/// The inverses of lower triangular matrices with ones on their diagonals, whose sizes are a power of two.
///
/// Blocks on the diagonal are inverted in pairs, from ones of 1 x 1 on: of D, the inverse of the blocks so far, and X below them it makes
/// D - D X D. Of this no gradient is asked; that of the inverse is the gradient of a step of Newton's method from it, which moves it by
/// as much as it was rounded.
fn inverse(matrices: Tensor<4>) -> Tensor<4> {
    let ([.., length, _], device) = (matrices.dims(), matrices.device());
    let one = mask(length, &device, |row, column| row == column);
    let given = matrices.clone().detach();
    let mut found = one.clone().expand(given.dims());
    let mut block = 1;
    while block < length {
        let below = |row: usize, column: usize| row / block == column / block + 1 && row / block % 2 == 1;
        found = found.clone() - found.clone().matmul(given.clone() * mask(length, &device, below)).matmul(found);
        block *= 2;
    }
    found.clone() + found.clone().matmul(one - matrices.matmul(found))
}
