//! Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): a part of a model as one operation that keeps its input
//! alone. Its backward runs the part again, with a graph of its own, and asks that graph for the gradients.
//!
//! Burn has a strategy of the kind (`BalancedCheckpointing`), which recomputes single cheap operations. It keeps the inputs
//! of every product and of every operation with a backward of its own, and so nearly all that a layer keeps.

use std::sync::Arc;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, BackendTensor, Dispatch, DispatchKindConversion, DispatchTensor, DispatchTensorKind, Flex,
    backend_extension,
};
use burn::tensor::Tensor;

/// A tensor that gradients end at, such as a parameter.
#[derive(Debug, Clone, Copy)]
pub struct Leaf(NodeId);

impl Leaf {
    /// `tensor` as such, if it requires a gradient.
    pub fn of<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        if !tensor.is_require_grad() {
            return None;
        }
        let DispatchTensorKind::Autodiff(kind) = tensor.clone().into_dispatch().kind else { return None };
        match *kind {
            DispatchTensorKind::Flex(tensor) => Some(Self(tensor.as_autodiff().id())),
            #[cfg(feature = "ndarray")]
            DispatchTensorKind::NdArray(tensor) => Some(Self(tensor.as_autodiff().id())),
            #[cfg(feature = "gpu")]
            DispatchTensorKind::Cube(tensor) => Some(Self(tensor.as_autodiff().id())),
            DispatchTensorKind::Autodiff(_) => None,
        }
    }
}

/// The gradients of a part that was run again.
#[derive(Debug)]
pub struct PartGrads {
    input: DispatchTensor,
    leaves: Vec<(Leaf, DispatchTensor)>,
}

impl PartGrads {
    /// The gradient of the input.
    pub fn of_input<const D: usize>(grad: Tensor<D>) -> Self {
        Self { input: grad.into_dispatch(), leaves: Vec::new() }
    }

    /// Adds the gradient of a leaf.
    pub fn add<const D: usize>(&mut self, leaf: Leaf, grad: Tensor<D>) {
        self.leaves.push((leaf, grad.into_dispatch()));
    }
}

/// Runs a part again and gives its gradients, from that of its output, which is on a device without autodiff; so must they
/// be. It is told how deep in the graph its input was.
#[derive(Clone)]
pub struct Rerun(Arc<dyn Fn(Tensor<1>, usize) -> PartGrads + Send + Sync>);

impl Rerun {
    /// A part by what its backward does.
    pub fn new(run: impl Fn(Tensor<1>, usize) -> PartGrads + Send + Sync + 'static) -> Self {
        Self(Arc::new(run))
    }
}

impl std::fmt::Debug for Rerun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a part that is run again")
    }
}

/// `output`, which a part made of `input`, differentiable by running the part again. `input` must be tracked.
pub fn checkpointed<const D: usize>(input: Tensor<D>, output: Tensor<1>, rerun: Rerun) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::checkpointed(input.into_dispatch(), output.into_dispatch(), rerun))
}

#[backend_extension(Flex, NdArray: cfg(feature = "ndarray"), Cube: cfg(feature = "gpu"), Autodiff)]
trait Checkpointed: Backend {
    fn checkpointed(input: FloatTensor<Self>, output: FloatTensor<Self>, rerun: Rerun) -> FloatTensor<Self> {
        let _ = (input, rerun); // there is no backward
        output
    }
}

impl Checkpointed for Flex {}

#[cfg(feature = "ndarray")]
impl Checkpointed for burn::backend::NdArray {}

#[cfg(feature = "gpu")]
impl Checkpointed for burn::backend::Cube {}

impl<B, C> Checkpointed for Autodiff<B, C>
where
    B: Checkpointed,
    C: CheckpointStrategy,
    DispatchTensor: DispatchKindConversion<B>,
{
    fn checkpointed(input: FloatTensor<Self>, output: FloatTensor<Self>, rerun: Rerun) -> FloatTensor<Self> {
        let node = input.node();
        let output = output.into_primitive();
        match Step.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(rerun, output),
            OpsKind::UnTracked(step) => step.finish(output),
        }
    }
}

/// The backward as a step of Burn's graph.
#[derive(Debug)]
struct Step;

impl<B: Backend> Backward<B, 1> for Step
where
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = Rerun;

    fn backward(self, ops: Ops<Rerun, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let output_grad = DispatchTensor::from_backend(BackendTensor::<B>::Float(grads.consume::<B>(&ops.node)));
        let [parent] = ops.parents;
        let depth = parent.as_ref().map_or(0, |node| node.order);
        let PartGrads { input, leaves } = (ops.state.0)(Tensor::from_dispatch(output_grad), depth);
        if let Some(node) = parent {
            grads.register::<B>(node.id, primitive::<B>(input));
        }
        for (Leaf(id), grad) in leaves {
            grads.register::<B>(id, primitive::<B>(grad));
        }
    }
}

fn primitive<B: Backend>(tensor: DispatchTensor) -> FloatTensor<B>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    let tensor = DispatchTensor::try_into_backend(tensor);
    tensor.unwrap_or_else(|other| panic!("a gradient on another device than the output: {other}")).float()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{leaf, numbers};

    #[test]
    fn gradients_of_input_and_leaves_are_those_of_the_part() {
        let (x, w) = (leaf([6]), leaf([6]));
        let part = |x: Tensor<1>, w: Tensor<1>| (x.clone() * w).exp() + x;
        let whole = part(x.clone() * 2.0, w.clone());
        let want = (whole.clone() * whole).sum().backward();

        let input = x.clone() * 2.0;
        let (kept, weight) = (input.clone().inner(), w.clone().inner());
        let own = Leaf::of(&w).expect("a leaf");
        let output = part(Tensor::from_inner(kept.clone()), Tensor::from_inner(weight.clone()));
        let rerun = Rerun::new(move |grad, _| {
            let [x, w] = [&kept, &weight].map(|x| Tensor::<1>::from_inner(x.clone()).require_grad());
            let mut grads = (part(x.clone(), w.clone()) * Tensor::from_inner(grad)).sum().backward();
            let mut given = PartGrads::of_input(x.grad_remove(&mut grads).expect("of the input"));
            given.add(own, w.grad_remove(&mut grads).expect("of the weight"));
            given
        });
        let output = checkpointed(input, output, rerun);
        let got = (output.clone() * output).sum().backward();
        for leaf in [x, w] {
            let [got, want] = [&got, &want].map(|grads| numbers(leaf.grad(grads).expect("a gradient")));
            assert_eq!(got, want);
        }
    }

    #[test]
    fn what_requires_no_gradient_is_no_leaf() {
        assert!(Leaf::of(&leaf([2])).is_some());
        assert!(Leaf::of(&(leaf([2]) * 2.0)).is_none());
        assert!(Leaf::of(&leaf([2]).inner()).is_none());
    }
}
