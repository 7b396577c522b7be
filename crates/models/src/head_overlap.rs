//! How much the attention maps of heads overlap: the attention segregation loss of A-STAR (Agarwal et al. 2023, arXiv 2306.14544),
//! between heads instead of words.
//!
//! ```text
//! overlap(a, b) = Σ min(a, b) / Σ (a + b)          over queries and keys: 0 where maps share nothing, 1/2 where they are one
//!               = 1/2 - Σ |a - b| / 2 Σ (a + b)    which shares the gradient between weights that are equal
//! ```

use burn::tensor::Tensor;
use polyhead_kernels::total;

/// The mean overlap over all pairs of heads and the rows of a batch, differentiable; 0 where there is one head.
///
/// # Shapes
/// - weights: `[batch, heads, queries, keys]`, none below 0; output: `[1]`
pub fn head_overlap(weights: Tensor<4>) -> Tensor<1> {
    let [batch, heads, ..] = weights.dims();
    let sums = weights.clone().sum_dim(3).sum_dim(2); // [batch, heads, 1, 1]
    let of_distance = |distance: usize| {
        // Every head with the one so many further on.
        let pair = |x: &Tensor<4>| [0, distance].map(|first| x.clone().narrow(1, first, heads - distance));
        let ([a, b], [sum_a, sum_b]) = (pair(&weights), pair(&sums));
        total((a - b).abs().sum_dim(3).sum_dim(2) / (sum_a + sum_b) * -0.5 + 0.5)
    };
    let pairs = (batch * heads * heads.saturating_sub(1) / 2).max(1) as f64;
    let all = (1..heads).map(of_distance).reduce(|sum, more| sum + more);
    all.map_or_else(|| total(sums) * 0.0, |sum| sum / pairs)
}
