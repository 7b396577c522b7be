//! Being told that a backward pass has gone through a part of a model, whose parameters have their gradients then.
//!
//! Burn knows no hooks of gradients such as PyTorch's `register_post_accumulate_grad_hook`. It works off operations from the deepest up,
//! so that an operation on what a part reads comes after all operations of the part that depend on it.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;

/// The gradients in the middle of a backward pass.
pub struct GradsSoFar<'a>(&'a mut Gradients);

impl GradsSoFar<'_> {
    /// Takes what has been added up for a parameter: all of it, if the operations that read it are of parts that are done, and read
    /// besides what the part reads. On the device without autodiff.
    pub fn take<const D: usize>(&mut self, parameter: &Tensor<D>) -> Option<Tensor<D>> {
        if !parameter.is_require_grad() {
            return None;
        }
        Dispatch::grad_remove(&parameter.clone().into_dispatch(), self.0).map(Tensor::from_dispatch)
    }
}

/// What is called with the number of a part and the gradients.
#[derive(Clone)]
pub struct BackwardHook(Arc<Run>);

type Run = dyn Fn(usize, &mut GradsSoFar<'_>) + Send + Sync;

impl BackwardHook {
    /// A hook by what it does. It must not run a backward pass, nor anything that is recorded for one.
    pub fn new(run: impl Fn(usize, &mut GradsSoFar<'_>) + Send + Sync + 'static) -> Self {
        Self(Arc::new(run))
    }
}

impl std::fmt::Debug for BackwardHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a hook of the backward pass")
    }
}

/// `x`, which a part is about to read. The hook is called once the backward pass has gone through what is made of it.
pub fn on_backward<const D: usize>(x: Tensor<D>, part: usize, hook: &BackwardHook) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::on_backward(x.into_dispatch(), part, hook.clone()))
}

#[backend_extension(Flex, NdArray: cfg(feature = "ndarray"), Cube: cfg(feature = "gpu"), Autodiff)]
trait OnBackward: Backend {
    fn on_backward(x: FloatTensor<Self>, part: usize, hook: BackwardHook) -> FloatTensor<Self> {
        let _ = (part, hook); // there is no backward
        x
    }
}

impl OnBackward for Flex {}

#[cfg(feature = "ndarray")]
impl OnBackward for burn::backend::NdArray {}

#[cfg(feature = "gpu")]
impl OnBackward for burn::backend::Cube {}

impl<B: OnBackward, C: CheckpointStrategy> OnBackward for Autodiff<B, C> {
    fn on_backward(x: FloatTensor<Self>, part: usize, hook: BackwardHook) -> FloatTensor<Self> {
        let node = x.node();
        let x = x.into_primitive();
        match Step.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish((part, hook), x),
            OpsKind::UnTracked(step) => step.finish(x),
        }
    }
}

/// The backward as a step of Burn's graph.
#[derive(Debug)]
struct Step;

impl<B: Backend> Backward<B, 1> for Step {
    type State = (usize, BackwardHook);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        if let [Some(node)] = ops.parents {
            grads.register::<B>(node.id, grad);
        }
        let (part, BackwardHook(run)) = ops.state;
        run(part, &mut GradsSoFar(grads));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use super::*;
    use crate::testing::{leaf, numbers};

    /// Two parts, of a parameter each, and one parameter that both read: when a hook is called, its part's parameter has its gradient,
    /// and that of the part before has none yet.
    #[test]
    fn the_gradients_of_a_part_are_there_when_its_hook_is_called() {
        let (x, first, second) = (leaf([6]), leaf([6]), leaf([6]));
        let part = |x: Tensor<1>, weight: &Tensor<1>| (x.clone() * weight.clone()).exp() + x;
        let plain = part(part(x.clone().sin(), &first), &second).sum().backward();
        let found = Arc::new(Mutex::new(Vec::new()));
        let (leaves, told) = ([first.clone(), second.clone()], found.clone());
        let hook = BackwardHook::new(move |part, grads| {
            let taken = leaves.each_ref().map(|leaf| grads.take(leaf).map(numbers));
            told.lock().unwrap_or_else(PoisonError::into_inner).push((part, taken));
        });
        let hidden = part(on_backward(x.clone().sin(), 1, &hook), &first);
        let mut grads = part(on_backward(hidden, 2, &hook), &second).sum().backward();
        let of = |leaf: &Tensor<1>| numbers(leaf.grad(&plain).expect("a gradient"));
        let found = std::mem::take(&mut *found.lock().unwrap_or_else(PoisonError::into_inner));
        assert_eq!(found, [(2, [None, Some(of(&second))]), (1, [Some(of(&first)), None])]);
        assert_eq!(x.grad_remove(&mut grads).map(numbers), Some(of(&x)));
        assert!(first.grad(&grads).is_none() && second.grad(&grads).is_none());
    }

    #[test]
    fn without_a_gradient_nothing_is_called() {
        let hook = BackwardHook::new(|_, _| panic!("called"));
        let (x, weight) = (leaf([3]), leaf([3]));
        let constant = Tensor::from_inner(x.clone().inner());
        let grads = (on_backward(constant, 0, &hook) * weight.clone()).sum().backward();
        assert!(weight.grad(&grads).is_some());
        assert_eq!(numbers(on_backward(x.clone().inner(), 0, &hook)), numbers(x));
    }
}
