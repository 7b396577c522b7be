//! The gated feed-forward layer (Shazeer 2020, arXiv 2002.05202) as one operation: what lies between its products is made
//! again in the backward instead of being kept, and the gradient of the input is added up inside the products.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Tensor, module};
use burn_flex::FlexTensor;

use crate::linear::{self, back_to_input, back_to_weight};
use crate::{cpu, in_type, swiglu};

/// `(silu(x · gate) * (x · up)) · down`
///
/// # Shapes
/// - x, output: `[batch, seq, d_model]`
/// - gate, up: `[d_model, d_ff]`, down: `[d_ff, d_model]`
pub fn gated_mlp(x: Tensor<3>, gate: Tensor<2>, up: Tensor<2>, down: Tensor<2>) -> Tensor<3> {
    if !cpu::fuses(&x) {
        return plain(x, gate, up, down);
    }
    let [x, gate, up, down] = [x.into_dispatch(), gate.into_dispatch(), up.into_dispatch(), down.into_dispatch()];
    Tensor::from_dispatch(Dispatch::gated_mlp(x, gate, up, down))
}

fn plain(x: Tensor<3>, gate: Tensor<2>, up: Tensor<2>, down: Tensor<2>) -> Tensor<3> {
    let dtype = x.dtype();
    let linear = |x: Tensor<3>, weight| module::linear(x, in_type(weight, dtype), None);
    linear(swiglu::swiglu(linear(x.clone(), gate), linear(x, up)), down)
}

#[backend_extension(Flex, Autodiff)]
trait GatedMlp: Backend {
    fn gated_mlp(
        x: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

impl GatedMlp for Flex {
    fn gated_mlp(x: FlexTensor, gate: FlexTensor, up: FlexTensor, down: FlexTensor) -> FlexTensor {
        let x = x.to_contiguous();
        linear::forward(&swiglu::forward(&linear::forward(&x, &gate), &linear::forward(&x, &up)), &down)
    }
}

impl<C: CheckpointStrategy> GatedMlp for Autodiff<Flex, C> {
    fn gated_mlp(
        x: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Step;
        impl Backward<Flex, 4> for Step {
            type State = Kept;

            fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
                let y_grad = grads.consume::<Flex>(&ops.node).to_contiguous();
                for (parent, grad) in ops.parents.into_iter().zip(backward(ops.state, &y_grad)) {
                    if let Some(node) = parent {
                        grads.register::<Flex>(node.id, grad);
                    }
                }
            }
        }
        let ((x, x_node), (gate, gate_node)) = (x.into_parts(), gate.into_parts());
        let ((up, up_node), (down, down_node)) = (up.into_parts(), down.into_parts());
        let x = x.to_contiguous();
        let (gated, upped) = (linear::forward(&x, &gate), linear::forward(&x, &up));
        let y = linear::forward(&swiglu::forward(&gated, &upped), &down);
        match Step.prepare::<C>([x_node, gate_node, up_node, down_node]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(Kept { x, weights: [gate, up, down], gated, upped }, y),
            OpsKind::UnTracked(step) => step.finish(y),
        }
    }
}

/// What the backward needs.
#[derive(Debug, Clone)]
struct Kept {
    x: FlexTensor,
    /// Gate, up, down.
    weights: [FlexTensor; 3],
    /// `x · gate`
    gated: FlexTensor,
    /// `x · up`
    upped: FlexTensor,
}

/// Gradients of x, gate, up and down.
fn backward(kept: Kept, y_grad: &FlexTensor) -> [FlexTensor; 4] {
    let Kept { x, weights: [gate, up, down], gated, upped } = kept;
    let down_grad = back_to_weight(&swiglu::forward(&gated, &upped), y_grad);
    let mut inner_grad = cpu::room(gated.layout().num_elements());
    back_to_input(y_grad, &down, &mut inner_grad, false);
    let inner_grad = cpu::tensor(inner_grad, gated.layout().shape().to_vec());
    let [gated_grad, upped_grad] = swiglu::backward(&gated, &upped, &inner_grad);
    let mut x_grad = cpu::room(x.layout().num_elements());
    back_to_input(&gated_grad, &gate, &mut x_grad, false);
    back_to_input(&upped_grad, &up, &mut x_grad, true);
    let (gate_grad, up_grad) = (back_to_weight(&x, &gated_grad), back_to_weight(&x, &upped_grad));
    [cpu::tensor(x_grad, x.layout().shape().to_vec()), gate_grad, up_grad, down_grad]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agree_with_gradients, leaf};

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
}
