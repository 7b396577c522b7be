//! A linear map of every position, with the rows of the whole batch as one product.
//!
//! Burn's own multiplies batch by batch where it takes that to be better; on the CPU it is not: the weight is then packed
//! once per row of the batch.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Tensor, module};
use burn_flex::FlexTensor;

use crate::cpu::{self, Matrix};
use crate::in_type;

/// `x · weight + bias`, in the type of x
///
/// # Shapes
/// - x: `[.., d_input]`, weight: `[d_input, d_output]`, bias: `[d_output]`
/// - output: `[.., d_output]`
pub fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    if !cpu::fuses(&x) {
        let dtype = x.dtype();
        return module::linear(x, in_type(weight, dtype), bias.map(|bias| in_type(bias, dtype)));
    }
    let y = Tensor::<D>::from_dispatch(Dispatch::linear_map(x.into_dispatch(), weight.into_dispatch()));
    match bias {
        Some(bias) => y + bias.unsqueeze::<D>(),
        None => y,
    }
}

#[backend_extension(Flex, Autodiff)]
trait LinearMap: Backend {
    fn linear_map(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl LinearMap for Flex {
    fn linear_map(x: FlexTensor, weight: FlexTensor) -> FlexTensor {
        forward(&x.to_contiguous(), &weight)
    }
}

impl<C: CheckpointStrategy> LinearMap for Autodiff<Flex, C> {
    fn linear_map(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Step;
        impl Backward<Flex, 2> for Step {
            type State = [FlexTensor; 2];

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let y_grad = grads.consume::<Flex>(&ops.node).to_contiguous();
                let ([x, weight], [x_node, weight_node]) = (ops.state, ops.parents);
                if let Some(node) = x_node {
                    let mut x_grad = cpu::room(x.layout().num_elements());
                    back_to_input(&y_grad, &weight, &mut x_grad, false);
                    grads.register::<Flex>(node.id, cpu::tensor(x_grad, x.layout().shape().to_vec()));
                }
                if let Some(node) = weight_node {
                    grads.register::<Flex>(node.id, back_to_weight(&x, &y_grad));
                }
            }
        }
        let ((x, x_node), (weight, weight_node)) = (x.into_parts(), weight.into_parts());
        let x = x.to_contiguous();
        let y = forward(&x, &weight);
        match Step.prepare::<C>([x_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish([x, weight], y),
            OpsKind::UnTracked(step) => step.finish(y),
        }
    }
}

/// `x · weight` for a contiguous x, `[.., d_input]`.
pub(crate) fn forward(x: &FlexTensor, weight: &FlexTensor) -> FlexTensor {
    let [d_input, d_output] = cpu::sizes(weight);
    let all = cpu::values(x);
    let rows = all.len() / d_input.max(1);
    let mut y = cpu::room(rows * d_output);
    let to = cpu::Destination { start: y.as_mut_ptr(), rows: d_output, add: false, parallel: true };
    let left = Matrix::by_rows(all.as_ptr(), d_input);
    // SAFETY: y is `[rows, d_output]`, and nobody else has it.
    unsafe { cpu::product([rows, d_input, d_output], left, Matrix::new(weight), 1.0, to) };
    let mut shape = x.layout().shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = d_output;
    }
    cpu::tensor(y, shape)
}

/// `x_grad (+)= y_grad · weightᵀ`
pub(crate) fn back_to_input(y_grad: &FlexTensor, weight: &FlexTensor, x_grad: &mut [f32], add: bool) {
    let [d_input, d_output] = cpu::sizes(weight);
    let all = cpu::values(y_grad);
    let rows = all.len() / d_output.max(1);
    assert_eq!(x_grad.len(), rows * d_input);
    let to = cpu::Destination { start: x_grad.as_mut_ptr(), rows: d_input, add, parallel: true };
    let left = Matrix::by_rows(all.as_ptr(), d_output);
    // SAFETY: x_grad is `[rows, d_input]`, and nobody else has it.
    unsafe { cpu::product([rows, d_output, d_input], left, Matrix::new(weight).transposed(), 1.0, to) };
}

/// `xᵀ · y_grad`
pub(crate) fn back_to_weight(x: &FlexTensor, y_grad: &FlexTensor) -> FlexTensor {
    let last = |tensor: &FlexTensor| tensor.layout().shape().last().copied().unwrap_or(1);
    let (d_input, d_output) = (last(x), last(y_grad));
    let (all, grads) = (cpu::values(x), cpu::values(y_grad));
    let rows = all.len() / d_input.max(1);
    let mut weight_grad = cpu::room(d_input * d_output);
    let to = cpu::Destination { start: weight_grad.as_mut_ptr(), rows: d_output, add: false, parallel: true };
    let left = Matrix::by_rows(all.as_ptr(), d_input).transposed();
    // SAFETY: the gradient is `[d_input, d_output]`, and nobody else has it.
    unsafe { cpu::product([d_input, rows, d_output], left, Matrix::by_rows(grads.as_ptr(), d_output), 1.0, to) };
    cpu::tensor(weight_grad, [d_input, d_output])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agree_with_gradients, leaf};

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
                    // Not as positions lie: seq before batch.
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
}
