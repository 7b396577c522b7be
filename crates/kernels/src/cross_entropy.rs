//! The output projection and the cross-entropy over the vocabulary, as one operation.
//!
//! They belong together because the `[tokens, vocab]` logits of training are the largest tensor of a small model and
//! nobody but the loss needs them. The plain form below still makes them; a fused form need not.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// What is to be predicted, one entry a token.
#[derive(Debug, Clone)]
pub struct Targets {
    /// `[tokens]`: the id to be predicted; 0 where `counted` is 0.
    pub ids: Tensor<1, Int>,
    /// `[tokens]`: 1 where the token counts, 0 where it is ignored. `None` where every token counts.
    pub counted: Option<Tensor<1>>,
}

impl Targets {
    /// Targets from the host; negative ids are ignored positions.
    pub fn new(ids: &[i64], device: &Device) -> Self {
        let clean: Vec<i32> = ids.iter().map(|&id| id.max(0) as i32).collect();
        let counted = ids.iter().any(|&id| id < 0).then(|| {
            let ones: Vec<f32> = ids.iter().map(|&id| if id < 0 { 0.0 } else { 1.0 }).collect();
            Tensor::from_data(TensorData::new(ones, [ids.len()]), device)
        });
        Self { ids: Tensor::from_data(TensorData::new(clean, [ids.len()]), device), counted }
    }
}

/// The result of [`cross_entropy`].
#[derive(Debug, Clone)]
pub struct CrossEntropy {
    /// `[tokens]`, nats: `-log softmax(logits)[target]`; 0 where the target is ignored.
    pub losses: Tensor<1>,
    /// `[tokens]`: 1 where the largest logit is the target's, else 0; 0 where ignored. Only when asked for.
    pub correct: Option<Tensor<1>>,
}

/// Cross-entropy of `hidden · head` against targets, token by token, in nats.
///
/// # Shapes
/// - hidden: `[tokens, d_model]`
/// - head: `[d_model, vocab]`
/// - targets: `[tokens]`, every id below vocab
pub fn cross_entropy(hidden: Tensor<2>, head: Tensor<2>, targets: &Targets, want_correct: bool) -> CrossEntropy {
    let logits = hidden.matmul(head); // [tokens, vocab]
    let count = |per_token: Tensor<1>| match &targets.counted {
        Some(counted) => per_token * counted.clone(),
        None => per_token,
    };
    let correct = want_correct.then(|| {
        let best = logits.clone().detach().argmax(1).squeeze_dim::<1>(1);
        count(best.equal(targets.ids.clone()).float())
    });
    // Subtracting the largest logit changes neither value nor gradient, so it need not be differentiated.
    let largest = logits.clone().detach().max_dim(1); // [tokens, 1]
    let shifted = logits - largest;
    let picked = shifted.clone().gather(1, targets.ids.clone().unsqueeze_dim::<2>(1));
    let losses = shifted.exp().sum_dim(1).log() - picked; // [tokens, 1]
    CrossEntropy { losses: count(losses.squeeze_dim::<1>(1)), correct }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Distribution, Tolerance, activation};

    #[test]
    fn equals_log_softmax_and_ignores_what_is_ignored() {
        let device = Device::flex().autodiff();
        let hidden = Tensor::<2>::random([5, 4], Distribution::Normal(0.0, 3.0), &device).require_grad();
        let head = Tensor::<2>::random([4, 7], Distribution::Normal(0.0, 3.0), &device).require_grad();
        let targets = Targets::new(&[3, -100, 0, 6, -100], &device);
        let out = cross_entropy(hidden.clone(), head.clone(), &targets, true);
        let grads = out.losses.clone().sum().backward();

        let expected = activation::log_softmax(hidden.clone().matmul(head.clone()), 1)
            .gather(1, targets.ids.clone().unsqueeze_dim::<2>(1))
            .squeeze_dim::<1>(1)
            .neg()
            * Tensor::from_floats([1.0, 0.0, 1.0, 1.0, 0.0], &device);
        out.losses.into_data().assert_approx_eq::<f32>(&expected.clone().into_data(), Tolerance::absolute(1e-5));
        let expected_grads = expected.sum().backward();
        for tensor in [&hidden, &head] {
            let (got, want) = (tensor.grad(&grads), tensor.grad(&expected_grads));
            let (got, want) = (got.expect("gradient"), want.expect("gradient"));
            got.clone().into_data().assert_approx_eq::<f32>(&want.into_data(), Tolerance::absolute(1e-5));
        }
        let ignored: f32 = hidden.grad(&grads).expect("gradient").narrow(0, 1, 1).abs().sum().into_scalar();
        assert_eq!(ignored, 0.0);
    }

    #[test]
    fn survives_large_logits() {
        let device = Device::flex();
        let hidden = Tensor::<2>::from_floats([[1000.0, -1000.0]], &device);
        let head = Tensor::<2>::from_floats([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]], &device);
        let out = cross_entropy(hidden, head, &Targets::new(&[2], &device), true);
        assert_eq!(out.losses.into_scalar::<f32>(), 2000.0);
        assert_eq!(out.correct.expect("asked for").into_scalar::<f32>(), 0.0);
    }
}
