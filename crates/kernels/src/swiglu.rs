//! The gated unit of LLaMA-like feed-forward layers (Shazeer 2020, arXiv 2002.05202).

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Tensor, activation};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::{cpu, simd};

/// Elements of a task.
const CHUNK: usize = 1 << 14;

/// `silu(gate) * up`, element by element.
///
/// # Shapes
/// - gate, up, output: `[batch, seq, d_ff]`
pub fn swiglu(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    if cpu::fuses(&gate) {
        return Tensor::from_dispatch(Dispatch::swiglu(gate.into_dispatch(), up.into_dispatch()));
    }
    plain(gate, up)
}

fn plain(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    activation::silu(gate) * up
}

#[backend_extension(Flex, Autodiff)]
trait Swiglu: Backend {
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl Swiglu for Flex {
    fn swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        forward(&gate.to_contiguous(), &up.to_contiguous())
    }
}

impl<C: CheckpointStrategy> Swiglu for Autodiff<Flex, C> {
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Step;
        impl Backward<Flex, 2> for Step {
            type State = (FlexTensor, FlexTensor);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let y_grad = grads.consume::<Flex>(&ops.node).to_contiguous();
                let both = backward(&ops.state.0, &ops.state.1, &y_grad);
                for (parent, grad) in ops.parents.into_iter().zip(both) {
                    if let Some(node) = parent {
                        grads.register::<Flex>(node.id, grad);
                    }
                }
            }
        }
        let ((gate, gate_node), (up, up_node)) = (gate.into_parts(), up.into_parts());
        let (gate, up) = (gate.to_contiguous(), up.to_contiguous());
        let y = forward(&gate, &up);
        match Step.prepare::<C>([gate_node, up_node]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish((gate, up), y),
            OpsKind::UnTracked(step) => step.finish(y),
        }
    }
}

pub(crate) fn forward(gate: &FlexTensor, up: &FlexTensor) -> FlexTensor {
    let (gates, ups) = (cpu::values(gate), cpu::values(up));
    let mut y = cpu::room(gates.len());
    let chunks = (y.par_chunks_mut(CHUNK), gates.par_chunks(CHUNK), ups.par_chunks(CHUNK)).into_par_iter();
    chunks.for_each(|(y, gate, up)| simd::swiglu(gate, up, y));
    cpu::tensor(y, gate.layout().shape().to_vec())
}

pub(crate) fn backward(gate: &FlexTensor, up: &FlexTensor, y_grad: &FlexTensor) -> [FlexTensor; 2] {
    let (gates, ups, y_grads) = (cpu::values(gate), cpu::values(up), cpu::values(y_grad));
    let (mut gate_grad, mut up_grad) = (cpu::room(gates.len()), cpu::room(gates.len()));
    let results = gate_grad.par_chunks_mut(CHUNK).zip(up_grad.par_chunks_mut(CHUNK));
    let inputs = (gates.par_chunks(CHUNK), ups.par_chunks(CHUNK), y_grads.par_chunks(CHUNK)).into_par_iter();
    results.zip(inputs).for_each(|((gate_grad, up_grad), (gate, up, y_grad))| {
        simd::swiglu_backward(gate, up, y_grad, gate_grad, up_grad);
    });
    let shape = gate.layout().shape().to_vec();
    [cpu::tensor(gate_grad, shape.clone()), cpu::tensor(up_grad, shape)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agree_with_gradients, leaf};

    #[test]
    fn fused_agrees_with_plain() {
        for shape in [[1, 1, 1], [3, 7, 5], [2, 129, 80], [1, 300, 64]] {
            let (gate, up) = (leaf(shape).reshape([-1]), leaf(shape).reshape([-1]));
            for swapped in [false, true] {
                let apply = |form: fn(Tensor<3>, Tensor<3>) -> Tensor<3>, [gate, up]: [Tensor<1>; 2]| {
                    let shaped = |x: Tensor<1>| match swapped {
                        false => x.reshape(shape),
                        true => x.reshape(shape).swap_dims(1, 2),
                    };
                    form(shaped(gate) * 4.0, shaped(up)).reshape([-1])
                };
                agree_with_gradients(&[&gate, &up], |x| apply(swiglu, x), |x| apply(plain, x));
            }
        }
    }
}
