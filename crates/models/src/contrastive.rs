//! The contrastive loss of embeddings with hard negatives (InfoNCE, van den Oord et al. 2018, arXiv 1807.03748), as trainable
//! pooling is trained with (Tang and Yang 2024, arXiv 2409.02727; `loss/HardNegativeNLLLoss.py`, commit 57791d5).
//!
//! ```text
//! score_ij = scale * cos(query_i, document_j),   documents = all positives, then all hard negatives
//! loss = mean over i of -log softmax_j(score_ij)[i]
//! ```
//! The authors' command line has a setting for the scale that is not handed on: 20 is what they train with. Negatives are those
//! of one batch: accumulating gradients adds none.

use burn::tensor::Tensor;
use polyhead_kernels::{Targets, cross_entropy};

use crate::pooling::unit;

/// The factor of the authors' code.
pub const CONTRASTIVE_SCALE: f64 = 20.0;

/// `[1]`, nats: how well every query picks its own document out of all.
///
/// # Shapes
/// - queries, positives: `[batch, d_model]`; row i of the positives belongs to row i of the queries
/// - negatives: `[any, d_model]`, documents that belong to none
pub fn contrastive_loss(
    queries: Tensor<2>,
    positives: Tensor<2>,
    negatives: Option<Tensor<2>>,
    scale: f64,
) -> Tensor<1> {
    let batch = queries.dims()[0];
    let documents = Tensor::cat(std::iter::once(positives).chain(negatives).collect(), 0);
    let own: Vec<i64> = (0..batch as i64).collect();
    let scores = cross_entropy(unit(queries) * scale, unit(documents).transpose(), &Targets::new(&own));
    scores.sum / batch as f64
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};
    use polyhead_kernels::random;

    use super::*;

    fn rows() -> Tensor<2> {
        random([5, 7], Distribution::Normal(0.0, 1.0), &Device::flex().autodiff())
    }

    #[test]
    fn equal_documents_leave_chance_and_own_ones_nothing() {
        let queries = rows();
        let same = rows().narrow(0, 0, 1).expand([5, 7]);
        let loss = |positives, negatives| {
            contrastive_loss(queries.clone(), positives, negatives, CONTRASTIVE_SCALE).into_scalar::<f32>()
        };
        assert!((loss(same.clone(), None) - 5f32.ln()).abs() < 1e-4);
        assert!((loss(same.clone(), Some(same)) - 10f32.ln()).abs() < 1e-4);
        let own = queries.clone() * 3.0;
        assert!(loss(own.clone(), None) < loss(own.clone(), Some(queries.clone().neg())) + 1e-6);
        assert!(loss(own.clone(), None) < 0.1 * loss(own.neg(), None));
    }

    #[test]
    fn lengths_do_not_matter_and_nothing_stays_finite() {
        let (queries, positives) = (rows(), rows());
        let loss = |q: Tensor<2>, d: Tensor<2>| contrastive_loss(q, d, None, CONTRASTIVE_SCALE);
        let [a, b]: [f32; 2] = [
            loss(queries.clone(), positives.clone()).into_scalar(),
            loss(queries * 0.01, positives.clone() * 50.0).into_scalar(),
        ];
        assert!((a - b).abs() < 1e-4);
        let zero = Tensor::zeros([5, 7], &Device::flex().autodiff()).require_grad();
        let grads = loss(zero.clone(), positives).backward();
        let grad = zero.grad(&grads).expect("gradient").into_data();
        assert!(grad.iter::<f32>().all(f32::is_finite));
    }
}
