//! A linear map with a low-rank addition (LoRA: Hu et al. 2021, arXiv 2106.09685) as one operation: the addition is added up
//! inside the products, forwards and backwards, and what only a gradient that nobody wants needs is not kept.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch, Flex};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::differentiable::{InputGrads, Wanted, fused};
use crate::linear::{add_back_to_input, add_forward, back_to_input, back_to_weight, forward, linear};
use crate::shapes::assert_shapes;
use crate::weight::as_weight;
use crate::{cpu, simd};

/// `x · weight + scale (x · a) · b`, in the type of x
///
/// # Shapes
/// - x: `[.., d_input]`, weight: `[d_input, d_output]`, a: `[d_input, rank]`, b: `[rank, d_output]`
/// - output: `[.., d_output]`
///
/// # Panics
/// If the shapes are others.
pub fn adapted_linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    [a, b]: [Tensor<2>; 2],
    scale: f64,
) -> Tensor<D> {
    let ([d_input, d_output], [_, rank]) = (weight.dims(), a.dims());
    assert_shapes!("adapted_linear", x, weight, a, b;
        "weight must have a row per channel of x": x.dims()[D - 1] == d_input,
        "a must have a row per channel of x": a.dims()[0] == d_input,
        "b must lead from the channels of a to those of weight": b.dims() == [rank, d_output],
    );
    if !cpu::fuses(&x) {
        return plain(x, weight, [a, b], scale);
    }
    let [weight, a, b] = [weight, a, b].map(|factor| as_weight(factor).into_dispatch());
    Tensor::from_dispatch(Dispatch::adapted_linear(x.into_dispatch(), weight, a, b, scale as f32))
}

fn plain<const D: usize>(x: Tensor<D>, weight: Tensor<2>, [a, b]: [Tensor<2>; 2], scale: f64) -> Tensor<D> {
    let low = linear(x.clone(), a, None) * scale;
    linear(x, weight, None) + linear(low, b, None)
}

fused!(
    AdaptedLinear: adapted_linear(x, weight, a, b; scale: f32),
    run,
    backward,
    |kept: Kept, [of_x, of_weight, of_a, of_b]: Wanted<4>| Kept {
        x: kept.x.filter(|_| of_weight || of_a),
        weight: kept.weight.filter(|_| of_x),
        a: kept.a.filter(|_| of_x),
        b: kept.b.filter(|_| of_x || of_a),
        low: kept.low.filter(|_| of_b),
        ..kept
    }
);

/// The values kept for the backward, each where a gradient that is wanted needs it.
#[derive(Debug, Clone)]
struct Kept {
    x: Option<FlexTensor>,
    weight: Option<FlexTensor>,
    a: Option<FlexTensor>,
    b: Option<FlexTensor>,
    /// `scale x · a`
    low: Option<FlexTensor>,
    scale: f32,
}

fn run([x, weight, a, b]: [FlexTensor; 4], scale: f32) -> (FlexTensor, Kept) {
    let x = x.to_contiguous();
    let [weight, a, b] = [weight, a, b].map(cpu::not_backwards);
    let (mut y, mut low) = (forward(&x, &weight), forward(&x, &a));
    simd::scale(low.storage_mut::<f32>(), scale);
    add_forward(&mut y, &low, &b);
    (y, Kept { x: Some(x), weight: Some(weight), a: Some(a), b: Some(b), low: Some(low), scale })
}

/// Gradients of x, the weight, a and b.
fn backward(kept: Kept, y_grad: FlexTensor, [of_x, of_weight, of_a, of_b]: Wanted<4>) -> InputGrads<Flex, 4> {
    let Kept { x, weight, a, b, low, scale } = kept;
    let y_grad = y_grad.to_contiguous();
    let low_grad = b.filter(|_| of_x || of_a).map(|b| {
        let mut low_grad = back_to_input(&y_grad, &b);
        simd::scale(low_grad.storage_mut::<f32>(), scale);
        low_grad
    });
    let x_grad = weight.zip(a).zip(low_grad.as_ref()).filter(|_| of_x).map(|((weight, a), low_grad)| {
        let mut x_grad = back_to_input(&y_grad, &weight);
        add_back_to_input(&mut x_grad, low_grad, &a);
        x_grad
    });
    let of = |wanted: bool, x: Option<&FlexTensor>, grad: Option<&FlexTensor>| {
        x.zip(grad).filter(|_| wanted).map(|(x, grad)| back_to_weight(x, grad))
    };
    [
        x_grad,
        of(of_weight, x.as_ref(), Some(&y_grad)),
        of(of_a, x.as_ref(), low_grad.as_ref()),
        of(of_b, low.as_ref(), Some(&y_grad)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agree_with_gradients, every_subset_of_gradients, leaf};

    #[test]
    fn fused_agrees_with_plain() {
        for (batch, seq, d_input, d_output, rank) in [(1, 1, 1, 1, 1), (3, 7, 5, 2, 3), (2, 129, 16, 80, 8)] {
            let x = leaf([batch * seq * d_input]);
            let (weight, a, b) = (leaf([d_input * d_output]), leaf([d_input * rank]), leaf([rank * d_output]));
            for transposed in [false, true] {
                let apply = |form: fn(Tensor<3>, Tensor<2>, [Tensor<2>; 2], f64) -> Tensor<3>, x: [Tensor<1>; 4]| {
                    let [x, weight, a, b] = x;
                    let weight = match transposed {
                        false => weight.reshape([d_input, d_output]),
                        true => weight.reshape([d_output, d_input]).transpose(),
                    };
                    // Not in the order of positions: seq before batch.
                    let x = x.reshape([seq, batch, d_input]).swap_dims(0, 1);
                    form(x, weight, [a.reshape([d_input, rank]), b.reshape([rank, d_output])], 0.7).reshape([-1])
                };
                let inputs = [&x, &weight, &a, &b];
                agree_with_gradients(&inputs, |x| apply(adapted_linear, x), |x| apply(plain, x));
            }
        }
    }

    #[test]
    fn gradients_are_the_same_whichever_are_asked_for() {
        every_subset_of_gradients(&[&[2, 7, 5], &[5, 6], &[5, 3], &[3, 6]], |[x, weight, a, b]| {
            let pair = [a.reshape([5, 3]), b.reshape([3, 6])];
            adapted_linear(x.reshape([2, 7, 5]), weight.reshape([5, 6]), pair, 0.7).reshape([-1])
        });
    }
}
