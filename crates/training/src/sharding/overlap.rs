//! Gradients on their way to their owners while the backward pass goes on: data parallelism in buckets, as PyTorch's
//! ([arXiv 2006.15704](https://arxiv.org/abs/2006.15704)).
//!
//! The pass hands a layer's gradients to a thread as soon as it has gone through the layer. The thread reads them to the host and exchanges
//! them; until it has ended, it alone talks to other ranks. All ranks send all buckets in the same order, so that the layers that a pass does
//! not reach, and a rank without a pass, send theirs too: with what there is, after the backward. A gradient that comes later than its
//! layer's others, as that of a weight that is not read as it is, leaves with the rest.

use std::panic::resume_unwind;
use std::sync::mpsc::{Sender, channel};

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Gradients, Tensor};
use polyhead_kernels::GradsSoFar;

use super::{Bucket, Owned};
use crate::gradients::Sum;
use crate::in_backward::{Hooked, InBackward, TakeGrad, of_layer};
use crate::ranks::Ranks;

/// The gradients of a pass that have not left.
pub(crate) struct Leaving<M> {
    model: M,
    /// Those of backward passes before.
    earlier: GradientsParams,
    /// The layers whose buckets have not left: those below this one.
    layers: usize,
    to_thread: Sender<GradientsParams>,
}

/// Exchanges all buckets, while `run` hands out and leaves behind what they are made of.
pub(super) fn send<M: Module>(
    mut owned: Owned<'_, M>,
    ranks: &Ranks<'_>,
    run: impl FnOnce(Sender<GradientsParams>) -> Leaving<M>,
) {
    std::thread::scope(|scope| {
        let (to_thread, received) = channel();
        let thread = scope.spawn(move || {
            Bucket::all(owned.layers).zip(received).for_each(|(bucket, grads)| owned.exchange(bucket, &grads));
        });
        run(to_thread).send_rest();
        ranks.timed(|_| thread.join()).unwrap_or_else(|panic| resume_unwind(panic));
    });
}

impl<M: Module> Leaving<M> {
    /// Before the first bucket.
    pub(super) fn new(model: &M, earlier: GradientsParams, layers: usize, to_thread: Sender<GradientsParams>) -> Self {
        Self { model: model.clone(), earlier, layers, to_thread }
    }

    /// Runs a backward pass, in which layers leave.
    pub(super) fn in_backward(self, hooked: Hooked<Self>, backward: impl FnOnce() -> Gradients) -> Self
    where
        M: 'static,
    {
        let (leaving, grads) = hooked.run(self, backward);
        leaving.with(grads)
    }

    /// With what a backward pass has left.
    pub(super) fn with(mut self, grads: Gradients) -> Self {
        let mut sum = Sum::default();
        sum.add_params(self.earlier, &self.model);
        sum.add(grads, &self.model);
        self.earlier = sum.finish();
        self
    }

    fn send_rest(mut self) {
        for layer in (0..self.layers).rev() {
            let bucket = of_layer(&self.model, layer, &mut self.earlier);
            self.send(bucket);
        }
        let rest = std::mem::take(&mut self.earlier);
        self.send(rest);
    }

    /// Where the thread has panicked, whoever joins it meets that.
    fn send(&self, bucket: GradientsParams) {
        let _ = self.to_thread.send(bucket);
    }
}

impl<M: Module + 'static> InBackward for Leaving<M> {
    /// A layer that comes before one above it leaves after the pass.
    fn after_layer(mut self, layer: usize, grads: &mut GradsSoFar<'_>) -> Self {
        if layer + 1 == self.layers {
            let bucket = of_layer(&self.model, layer, &mut Total { earlier: &mut self.earlier, grads });
            self.layers = layer;
            self.send(bucket);
        }
        self
    }
}

/// Gradients of this pass with what earlier ones have added up to.
struct Total<'a, 'b> {
    earlier: &'a mut GradientsParams,
    grads: &'a mut GradsSoFar<'b>,
}

impl TakeGrad for Total<'_, '_> {
    fn take_grad<const D: usize>(&mut self, param: &Param<Tensor<D>>) -> Option<Tensor<D>> {
        let grad = self.grads.take_grad(param)?;
        Some(match self.earlier.take_grad(param) {
            Some(earlier) => earlier + grad,
            None => grad,
        })
    }
}

#[cfg(test)]
mod tests;
