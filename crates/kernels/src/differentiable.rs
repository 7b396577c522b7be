//! One way of making an operation of N tensors differentiable, for all that have a backward of their own.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend};

/// For each input, whether anybody wants its gradient.
pub(crate) type Wanted<const N: usize> = [bool; N];

/// The gradients of the inputs that are wanted; the others are not computed.
pub(crate) type InputGrads<B, const N: usize> = [Option<FloatTensor<B>>; N];

/// A backward: from the state that the forward kept, the gradient of the output, and the inputs whose gradient is wanted.
pub(crate) type BackwardOf<B, K, const N: usize> = fn(K, FloatTensor<B>, Wanted<N>) -> InputGrads<B, N>;

/// Runs `forward` on the inputs' values; it gives the output, what the backward needs, and what else it has to say, which
/// has no gradient. `backward` is called if anybody asks for the gradient of an input.
pub(crate) fn differentiable<B, C, K, X, const N: usize>(
    inputs: [FloatTensor<Autodiff<B, C>>; N],
    forward: impl FnOnce([FloatTensor<B>; N], Wanted<N>) -> (FloatTensor<B>, K, X),
    backward: BackwardOf<B, K, N>,
) -> (FloatTensor<Autodiff<B, C>>, X)
where
    B: Backend,
    C: CheckpointStrategy,
    K: Clone + Send + std::fmt::Debug + 'static,
{
    let wanted = inputs.each_ref().map(|input| input.is_tracked());
    let nodes = inputs.each_ref().map(|input| input.node());
    let (output, kept, more) = forward(inputs.map(|input| input.into_primitive()), wanted);
    let output = match (Step { backward }).prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(step) => step.finish(kept, output),
        OpsKind::UnTracked(step) => step.finish(output),
    };
    (output, more)
}

/// The backward of an operation as a step of Burn's graph.
struct Step<B: Backend, K, const N: usize> {
    backward: BackwardOf<B, K, N>,
}

impl<B: Backend, K, const N: usize> std::fmt::Debug for Step<B, K, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the backward of an operation of {N} inputs that keeps {}", std::any::type_name::<K>())
    }
}

impl<B, K, const N: usize> Backward<B, N> for Step<B, K, N>
where
    B: Backend,
    K: Clone + Send + std::fmt::Debug + 'static,
{
    type State = K;

    fn backward(self, ops: Ops<K, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let output_grad = grads.consume::<B>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let input_grads = (self.backward)(ops.state, output_grad, wanted);
        for (parent, grad) in ops.parents.into_iter().zip(input_grads) {
            debug_assert_eq!(parent.is_some(), grad.is_some(), "the gradients that are wanted, and no others");
            if let (Some(node), Some(grad)) = (parent, grad) {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

/// Makes an operation of some tensors, and perhaps of something else, for the CPU backend and its tape: `$run` takes the inputs in
/// order and gives the output with what the backward needs, `$backward` is a [`BackwardOf`] that, or of what `$keep` makes of it for the
/// gradients that are wanted. Behind `gpu:` the same two for GPUs, where they have kernels of their own.
macro_rules! fused {
    (
        $Trait:ident: $name:ident($($input:ident),+ $(; $more:ident: $More:ty)?), $run:expr, $backward:expr $(, $keep:expr)?
    ) => {
        #[burn::backend::backend_extension(Flex, Autodiff)]
        trait $Trait: burn::backend::Backend {
            fn $name($($input: FloatTensor<Self>,)+ $($more: $More)?) -> FloatTensor<Self>;
        }

        $crate::differentiable::fused! {
            @on Flex, $Trait: $name($($input),+ $(; $more: $More)?), $run, $backward $(, $keep)?
        }
    };
    (
        $Trait:ident: $name:ident($($input:ident),+ $(; $more:ident: $More:ty)?), $run:expr, $backward:expr $(, $keep:expr)?;
        gpu: $gpu_run:expr, $gpu_backward:expr $(, $gpu_keep:expr)?
    ) => {
        #[burn::backend::backend_extension(Flex, Cube: cfg(feature = "gpu"), Autodiff)]
        trait $Trait: burn::backend::Backend {
            fn $name($($input: FloatTensor<Self>,)+ $($more: $More)?) -> FloatTensor<Self>;
        }

        $crate::differentiable::fused! {
            @on Flex, $Trait: $name($($input),+ $(; $more: $More)?), $run, $backward $(, $keep)?
        }
        #[cfg(feature = "gpu")]
        $crate::differentiable::fused! {
            @on burn::backend::Cube, $Trait: $name($($input),+ $(; $more: $More)?), $gpu_run, $gpu_backward
            $(, $gpu_keep)?
        }
    };
    // On one backend.
    (
        @on $On:ty, $Trait:ident: $name:ident($($input:ident),+ $(; $more:ident: $More:ty)?), $run:expr, $backward:expr
        $(, $keep:expr)?
    ) => {
        impl $Trait for $On {
            fn $name($($input: FloatTensor<Self>,)+ $($more: $More)?) -> FloatTensor<Self> {
                $run([$($input),+] $(, $more)?).0
            }
        }

        impl<C> $Trait for Autodiff<$On, C>
        where
            C: burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy,
        {
            fn $name($($input: FloatTensor<Self>,)+ $($more: $More)?) -> FloatTensor<Self> {
                const N: usize = [$(stringify!($input)),+].len();
                let run = |inputs: [FloatTensor<$On>; N], _wanted: [bool; N]| {
                    let (output, kept) = $run(inputs $(, $more)?);
                    $(let kept = ($keep)(kept, _wanted);)?
                    (output, kept, ())
                };
                $crate::differentiable::differentiable::<$On, C, _, _, N>([$($input),+], run, $backward).0
            }
        }
    };
}
pub(crate) use fused;
