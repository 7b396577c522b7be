//! The gated feed-forward layer (Shazeer 2020, arXiv 2002.05202) as one operation: what is between its products is made
//! again in the backward instead of being kept, and the gradient of the input is added up inside the products.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch, Flex};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::differentiable::{InputGrads, Wanted, fused};
use crate::linear::{self, add_back_to_input, back_to_input, back_to_weight};
use crate::shapes::assert_shapes;
use crate::weight::as_weight;
use crate::{cpu, swiglu};

/// `(silu(x · gate) * (x · up)) · down`
///
/// # Shapes
/// - x, output: `[batch, seq, d_model]`
/// - gate, up: `[d_model, d_ff]`, down: `[d_ff, d_model]`
///
/// # Panics
/// If the shapes are others.
pub fn gated_mlp(x: Tensor<3>, gate: Tensor<2>, up: Tensor<2>, down: Tensor<2>) -> Tensor<3> {
    let ([_, _, d_model], [_, d_ff]) = (x.dims(), gate.dims());
    assert_shapes!("gated_mlp", x, gate, up, down;
        "gate must have a row per channel of x": gate.dims()[0] == d_model,
        "up must be of gate's shape": up.dims() == gate.dims(),
        "down must be of gate's shape, transposed": down.dims() == [d_ff, d_model],
    );
    if !cpu::fuses(&x) {
        return plain(x, gate, up, down);
    }
    let [gate, up, down] = [gate, up, down].map(|weight| as_weight(weight).into_dispatch());
    Tensor::from_dispatch(Dispatch::gated_mlp(x.into_dispatch(), gate, up, down))
}

fn plain(x: Tensor<3>, gate: Tensor<2>, up: Tensor<2>, down: Tensor<2>) -> Tensor<3> {
    let linear = |x, weight| linear::linear(x, weight, None);
    linear(swiglu::swiglu(linear(x.clone(), gate), linear(x, up)), down)
}

fused!(GatedMlp: gated_mlp(x, gate, up, down), forward, backward, |kept: Kept, [_, of_gate, of_up, _]: Wanted<4>| {
    let x = kept.x.filter(|_| of_gate || of_up);
    Kept { x, ..kept }
});

/// The values kept for the backward.
#[derive(Debug, Clone)]
struct Kept {
    /// Where a gradient that is wanted needs it.
    x: Option<FlexTensor>,
    /// Gate, up, down.
    weights: [FlexTensor; 3],
    /// `x · gate`
    gated: FlexTensor,
    /// `x · up`
    upped: FlexTensor,
}

fn forward([x, gate, up, down]: [FlexTensor; 4]) -> (FlexTensor, Kept) {
    let x = x.to_contiguous();
    let [gate, up, down] = [gate, up, down].map(cpu::not_backwards);
    let (gated, upped) = (linear::forward(&x, &gate), linear::forward(&x, &up));
    let y = linear::forward(&swiglu::forward(&gated, &upped), &down);
    (y, Kept { x: Some(x), weights: [gate, up, down], gated, upped })
}

/// Gradients of x, gate, up and down.
fn backward(kept: Kept, y_grad: FlexTensor, wanted: Wanted<4>) -> InputGrads<Flex, 4> {
    let Kept { x, weights: [gate, up, down], gated, upped } = kept;
    let (y_grad, [of_x, of_gate, of_up, of_down]) = (y_grad.to_contiguous(), wanted);
    let down_grad = of_down.then(|| back_to_weight(&swiglu::forward(&gated, &upped), &y_grad));
    if !(of_x || of_gate || of_up) {
        return [None, None, None, down_grad];
    }
    let inner_grad = back_to_input(&y_grad, &down);
    let [gated_grad, upped_grad] = swiglu::backward(&gated, &upped, &inner_grad, [of_x || of_gate, of_x || of_up]);
    let x_grad = match (of_x, &gated_grad, &upped_grad) {
        (true, Some(gated_grad), Some(upped_grad)) => {
            let mut x_grad = back_to_input(gated_grad, &gate);
            add_back_to_input(&mut x_grad, upped_grad, &up);
            Some(x_grad)
        }
        _ => None,
    };
    let weight_grad = |wanted: bool, grad: Option<FlexTensor>| {
        x.as_ref().zip(grad).filter(|_| wanted).map(|(x, grad)| back_to_weight(x, &grad))
    };
    [x_grad, weight_grad(of_gate, gated_grad), weight_grad(of_up, upped_grad), down_grad]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agree_with_gradients, every_subset_of_gradients, leaf};

    #[test]
    fn fused_agrees_with_plain() {
        for (batch, seq, d_model, d_ff) in [(1, 1, 1, 1), (3, 7, 5, 6), (2, 63, 16, 40), (1, 129, 64, 80)] {
            let (x, gate) = (leaf([batch * seq * d_model]), leaf([d_model * d_ff]));
            let (up, down) = (leaf([d_model * d_ff]), leaf([d_model * d_ff]));
            let apply = |form: fn(Tensor<3>, Tensor<2>, Tensor<2>, Tensor<2>) -> Tensor<3>, inputs: [Tensor<1>; 4]| {
                let [x, gate, up, down] = inputs;
                let wide = |x: Tensor<1>| x.reshape([d_model, d_ff]) * 0.5;
                form(x.reshape([batch, seq, d_model]), wide(gate), wide(up), down.reshape([d_ff, d_model]))
                    .reshape([-1])
            };
            agree_with_gradients(&[&x, &gate, &up, &down], |x| apply(gated_mlp, x), |x| apply(plain, x));
        }
    }

    #[test]
    fn gradients_are_the_same_whichever_are_asked_for() {
        every_subset_of_gradients(&[&[2, 7, 5], &[5, 6], &[5, 6], &[6, 5]], |[x, gate, up, down]| {
            let (x, [gate, up]) = (x.reshape([2, 7, 5]), [gate, up].map(|x| x.reshape([5, 6])));
            gated_mlp(x, gate, up, down.reshape([6, 5])).reshape([-1])
        });
    }
}
