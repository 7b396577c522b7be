//! Making an operation with two outputs differentiable. Burn's graph knows operations with one: here each output is a node that leaves
//! its gradient for the node of the operation, which the backward reaches after both of them.

use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend};

use crate::differentiable::{InputGrads, Wanted};

/// The gradients of the outputs; none for an output that nobody used.
pub(crate) type OutputGrads<B> = [Option<FloatTensor<B>>; 2];

/// A backward: from the state that the forward kept, the gradients of the outputs, and the inputs whose gradient is wanted.
pub(crate) type BackwardOfTwo<B, K, const N: usize> = fn(K, OutputGrads<B>, Wanted<N>) -> InputGrads<B, N>;

/// Runs `forward` on the inputs' values; it gives the outputs and what the backward needs. `backward` is called once, if anybody asks for
/// the gradient of an input.
pub(crate) fn differentiable<B, C, K, const N: usize>(
    inputs: [FloatTensor<Autodiff<B, C>>; N],
    forward: impl FnOnce([FloatTensor<B>; N]) -> ([FloatTensor<B>; 2], K),
    backward: BackwardOfTwo<B, K, N>,
) -> [FloatTensor<Autodiff<B, C>>; 2]
where
    B: Backend,
    C: CheckpointStrategy,
    K: Clone + Send + std::fmt::Debug + 'static,
{
    let nodes = inputs.each_ref().map(|input| input.node());
    let (outputs, kept) = forward(inputs.map(|input| input.into_primitive()));
    let left = Left::<B>::default();
    let value = outputs[0].clone(); // which a node has, though nobody reads it
    let operation = match (Operation::<B, K, N> { backward }).prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(step) => step.finish((kept, left.clone()), value),
        OpsKind::UnTracked(step) => step.finish(value),
    };
    let [first, second] = outputs;
    [(0, first), (1, second)].map(|(index, output)| {
        match Output.prepare::<C>([operation.node()]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish((index, left.clone()), output),
            OpsKind::UnTracked(step) => step.finish(output),
        }
    })
}

/// Where outputs leave their gradients.
type Left<B> = Arc<Mutex<OutputGrads<B>>>;

/// The step of an output.
#[derive(Debug)]
struct Output;

impl<B: Backend> Backward<B, 1> for Output {
    type State = (usize, Left<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (index, left) = ops.state;
        left.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(grads.consume::<B>(&ops.node));
    }
}

/// The step of the operation.
struct Operation<B: Backend, K, const N: usize> {
    backward: BackwardOfTwo<B, K, N>,
}

impl<B: Backend, K, const N: usize> std::fmt::Debug for Operation<B, K, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the backward of two outputs of {N} inputs that keeps {}", std::any::type_name::<K>())
    }
}

impl<B, K, const N: usize> Backward<B, N> for Operation<B, K, N>
where
    B: Backend,
    K: Clone + Send + std::fmt::Debug + 'static,
{
    type State = (K, Left<B>);

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (kept, left) = ops.state;
        let output_grads = std::mem::take(&mut *left.lock().unwrap_or_else(PoisonError::into_inner));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let input_grads = (self.backward)(kept, output_grads, wanted);
        for (parent, grad) in ops.parents.into_iter().zip(input_grads) {
            debug_assert_eq!(parent.is_some(), grad.is_some(), "the gradients that are wanted, and no others");
            if let (Some(node), Some(grad)) = (parent, grad) {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::ops::FloatTensorOps;
    use burn::backend::{Dispatch, Flex, backend_extension};
    use burn::tensor::Tensor;
    use burn_flex::FlexTensor;

    use super::*;
    use crate::testing::{agree_with_gradients, leaf};

    #[backend_extension(Flex, Autodiff)]
    trait SumAndProduct: Backend {
        fn sum_and_product(a: FloatTensor<Self>, b: FloatTensor<Self>) -> (FloatTensor<Self>, FloatTensor<Self>);
    }

    impl SumAndProduct for Flex {
        fn sum_and_product(a: FlexTensor, b: FlexTensor) -> (FlexTensor, FlexTensor) {
            let [sum, product] = forward([a, b]).0;
            (sum, product)
        }
    }

    impl<C: CheckpointStrategy> SumAndProduct for Autodiff<Flex, C> {
        fn sum_and_product(a: FloatTensor<Self>, b: FloatTensor<Self>) -> (FloatTensor<Self>, FloatTensor<Self>) {
            let [sum, product] = differentiable::<Flex, C, _, 2>([a, b], forward, backward);
            (sum, product)
        }
    }

    fn forward([a, b]: [FlexTensor; 2]) -> ([FlexTensor; 2], [FlexTensor; 2]) {
        ([Flex::float_add(a.clone(), b.clone()), Flex::float_mul(a.clone(), b.clone())], [a, b])
    }

    fn backward(inputs: [FlexTensor; 2], [sum, product]: OutputGrads<Flex>, wanted: Wanted<2>) -> InputGrads<Flex, 2> {
        let [a, b] = inputs;
        let mut others = [b, a].into_iter();
        wanted.map(|wanted| {
            let through = product.clone().zip(others.next()).map(|(grad, other)| Flex::float_mul(grad, other));
            let grad = match (sum.clone(), through) {
                (Some(sum), Some(through)) => Some(Flex::float_add(sum, through)),
                (sum, through) => sum.or(through),
            };
            grad.filter(|_| wanted)
        })
    }

    fn both(a: Tensor<1>, b: Tensor<1>) -> [Tensor<1>; 2] {
        let (sum, product) = Dispatch::sum_and_product(a.into_dispatch(), b.into_dispatch());
        [Tensor::from_dispatch(sum), Tensor::from_dispatch(product)]
    }

    #[test]
    fn gradients_are_those_of_the_outputs_that_are_used() {
        type Use = fn([Tensor<1>; 2]) -> Tensor<1>;
        let uses: [Use; 4] = [
            |[sum, product]| sum.exp() * product,
            |[sum, _]| sum.square(),
            |[_, product]| product.exp(),
            // One of them deep in what the other is used for.
            |[sum, product]| ((product.clone() * product).exp().log() + sum).exp(),
        ];
        let (a, b) = (leaf([6]), leaf([6]));
        for used in uses {
            // Not leaves themselves: what is before the operation gets its gradients too.
            let inputs = |a: Tensor<1>, b: Tensor<1>| (a.clone() * 0.5, (b * a).sin());
            agree_with_gradients(
                &[&a, &b],
                |[a, b]| {
                    let (a, b) = inputs(a, b);
                    used(both(a, b))
                },
                |[a, b]| {
                    let (a, b) = inputs(a, b);
                    used([a.clone() + b.clone(), a * b])
                },
            );
        }
    }

    #[test]
    fn an_input_without_gradient_gets_none() {
        let (a, b) = (leaf([4]), leaf([4]));
        let [sum, product] = both(a.clone(), b.clone().detach());
        let grads = (sum * product).sum().backward();
        assert!(a.grad(&grads).is_some());
        assert!(b.grad(&grads).is_none());
        let [sum, _] = both(a.detach(), b.detach());
        assert!(!sum.is_require_grad());
    }
}
