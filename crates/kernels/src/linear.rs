//! A linear map of every position, with the rows of the whole batch as one product.
//!
//! Burn's own multiplies batch by batch where it takes that to be better; on the CPU it is not: the weight is then packed
//! once per row of the batch.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch, Flex};
use burn::tensor::{Tensor, module};
use burn_flex::FlexTensor;

use crate::differentiable::{InputGrads, Wanted, fused};
use crate::matrix::{Matrix, MatrixMut};
use crate::product::product;
use crate::shapes::assert_shapes;
use crate::weight::{Weight, as_weight};
use crate::{cpu, gpu, in_type};

/// `x · weight + bias`, in the type of x; a weight of bf16 stands for the f32 of the same values
///
/// # Shapes
/// - x: `[.., d_input]`, weight: `[d_input, d_output]`, bias: `[d_output]`
/// - output: `[.., d_output]`
///
/// # Panics
/// If the shapes are others.
pub fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    assert_shapes!("linear", x, weight; "weight must have a row per channel of x": x.dims()[D - 1] == weight.dims()[0]);
    if let Some(bias) = &bias {
        assert_shapes!("linear", x, weight, bias;
            "bias must have a value per column of weight": bias.dims()[0] == weight.dims()[1]);
    }
    let dtype = x.dtype();
    let weight = match (cpu::fuses(&x), gpu::multiplies(&x)) {
        (true, _) => as_weight(weight),
        (_, true) => in_type(weight, dtype),
        _ => return module::linear(x, in_type(weight, dtype), bias.map(|bias| in_type(bias, dtype))),
    };
    let y = map(x, weight);
    match bias {
        Some(bias) => y + in_type(bias, dtype).unsqueeze::<D>(),
        None => y,
    }
}

/// `x · weight` as one operation.
pub(crate) fn map<const D: usize>(x: Tensor<D>, weight: Tensor<2>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::linear_map(x.into_dispatch(), weight.into_dispatch()))
}

fused!(
    LinearMap: linear_map(x, weight), run, backward, keep;
    gpu: gpu::cublaslt::forward, gpu::cublaslt::backward, keep
);

/// Each is needed for the gradient of the other.
fn keep<T>([x, weight]: [T; 2], [of_x, of_weight]: Wanted<2>) -> [Option<T>; 2] {
    [of_weight.then_some(x), of_x.then_some(weight)]
}

fn run([x, weight]: [FlexTensor; 2]) -> (FlexTensor, [FlexTensor; 2]) {
    let inputs = [x.to_contiguous(), cpu::not_backwards(weight)];
    (forward(&inputs[0], &inputs[1]), inputs)
}

fn backward(
    [x, weight]: [Option<FlexTensor>; 2],
    y_grad: FlexTensor,
    [of_x, of_weight]: Wanted<2>,
) -> InputGrads<Flex, 2> {
    let y_grad = y_grad.to_contiguous();
    let (x, weight) = (x.filter(|_| of_weight), weight.filter(|_| of_x));
    [weight.map(|weight| back_to_input(&y_grad, &weight)), x.map(|x| back_to_weight(&x, &y_grad))]
}

/// `x · weight` for a contiguous x, `[.., d_input]`.
pub(crate) fn forward(x: &FlexTensor, weight: &FlexTensor) -> FlexTensor {
    let weight = Weight::of(weight);
    let y = product(cpu::matrix(x), weight).parallel().values();
    cpu::tensor(y, with_last(cpu::shape(x), weight.sizes()[1]))
}

/// `y += x · weight`, for a contiguous x and y
pub(crate) fn add_forward(y: &mut FlexTensor, x: &FlexTensor, weight: &FlexTensor) {
    add_product(y, cpu::matrix(x), Weight::of(weight));
}

/// `y_grad · weightᵀ`
pub(crate) fn back_to_input(y_grad: &FlexTensor, weight: &FlexTensor) -> FlexTensor {
    let weight = Weight::of(weight);
    let x_grad = product(cpu::matrix(y_grad), weight.transposed()).parallel().values();
    cpu::tensor(x_grad, with_last(cpu::shape(y_grad), weight.sizes()[0]))
}

/// `x_grad += y_grad · weightᵀ`
pub(crate) fn add_back_to_input(x_grad: &mut FlexTensor, y_grad: &FlexTensor, weight: &FlexTensor) {
    add_product(x_grad, cpu::matrix(y_grad), Weight::of(weight).transposed());
}

fn add_product(sum: &mut FlexTensor, left: Matrix<'_>, right: Weight<'_>) {
    let sizes = [left.sizes()[0], right.sizes()[1]];
    let mut sum = MatrixMut::new(sum.storage_mut::<f32>(), sizes, sizes[1]);
    product(left, right).parallel().add_to(&mut sum);
}

/// `xᵀ · y_grad`
pub(crate) fn back_to_weight(x: &FlexTensor, y_grad: &FlexTensor) -> FlexTensor {
    let (x, y_grad) = (cpu::matrix(x), cpu::matrix(y_grad));
    let weight_grad = product(x.transposed(), y_grad).parallel().values();
    cpu::tensor(weight_grad, [x.sizes()[1], y_grad.sizes()[1]])
}

fn with_last(mut shape: Vec<usize>, last: usize) -> Vec<usize> {
    if let Some(size) = shape.last_mut() {
        *size = last;
    }
    shape
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agree_with_gradients, every_subset_of_gradients, leaf};

    #[test]
    fn fused_agrees_with_burn() {
        for (batch, seq, d_input, d_output) in [(1, 1, 1, 1), (3, 7, 5, 2), (2, 129, 16, 80), (1, 63, 64, 64)] {
            let (x, bias) = (leaf([batch * seq * d_input]), leaf([d_output]));
            let weight = leaf([d_input * d_output]);
            for transposed in [false, true] {
                let shaped = |[x, weight, bias]: [Tensor<1>; 3]| {
                    let weight = match transposed {
                        false => weight.reshape([d_input, d_output]),
                        true => weight.reshape([d_output, d_input]).transpose(),
                    };
                    // Not in the order of positions: seq before batch.
                    (x.reshape([seq, batch, d_input]).swap_dims(0, 1), weight, Some(bias))
                };
                agree_with_gradients(
                    &[&x, &weight, &bias],
                    |inputs| {
                        let (x, weight, bias) = shaped(inputs);
                        linear(x, weight, bias).reshape([-1])
                    },
                    |inputs| {
                        let (x, weight, bias) = shaped(inputs);
                        module::linear(x, weight, bias).reshape([-1])
                    },
                );
            }
        }
    }

    #[test]
    fn gradients_are_the_same_whichever_are_asked_for() {
        every_subset_of_gradients(&[&[2, 7, 5], &[5, 6]], |[x, weight]| {
            linear(x.reshape([2, 7, 5]), weight.reshape([5, 6]), None).reshape([-1])
        });
    }
}
