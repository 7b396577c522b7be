//! Work during a backward pass: the gradients of each layer are taken as soon as the pass has gone through it, before those of the layer
//! below are made. [`updating`] updates the layer by them, [`sharding`](crate::sharding) sends them to their owners.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Gradients, Tensor};
use polyhead_kernels::{BackwardHook, GradsSoFar};
use polyhead_models::weights::{ParameterVisitor, layer_of, visit_parameters};

pub(crate) mod updating;

/// What works while a backward pass goes on.
pub(crate) trait InBackward: Send + 'static {
    /// The pass has gone through this layer, whose parameters have their gradients.
    fn after_layer(self, layer: usize, grads: &mut GradsSoFar<'_>) -> Self;
}

/// The hook of a forward pass: made before it, and at work in its backward pass.
pub(crate) struct Hooked<W>(Arc<Mutex<Option<W>>>);

impl<W: InBackward> Hooked<W> {
    /// A hook that has no work yet.
    pub(crate) fn new() -> Self {
        Self(Arc::default())
    }

    /// What the model of the forward pass is to call.
    pub(crate) fn hook(&self) -> BackwardHook {
        let held = self.0.clone();
        BackwardHook::new(move |layer, grads| {
            let mut held = lock(&held);
            *held = held.take().map(|work| work.after_layer(layer, grads));
        })
    }

    /// Runs the backward pass. Gives what has worked in it, and the gradients that are left.
    pub(crate) fn run(self, work: W, backward: impl FnOnce() -> Gradients) -> (W, Gradients) {
        *lock(&self.0) = Some(work);
        let grads = backward();
        let work = lock(&self.0).take().expect("hooks leave it there");
        (work, grads)
    }
}

/// After a panic in the backward pass the graph may stay, and keep its hooks.
impl<W> Drop for Hooked<W> {
    fn drop(&mut self) {
        lock(&self.0).take();
    }
}

fn lock<W>(held: &Mutex<Option<W>>) -> MutexGuard<'_, Option<W>> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the gradient of a parameter is taken from.
pub(crate) trait TakeGrad {
    fn take_grad<const D: usize>(&mut self, param: &Param<Tensor<D>>) -> Option<Tensor<D>>;
}

impl TakeGrad for GradsSoFar<'_> {
    fn take_grad<const D: usize>(&mut self, param: &Param<Tensor<D>>) -> Option<Tensor<D>> {
        self.take(&param.val())
    }
}

impl TakeGrad for GradientsParams {
    fn take_grad<const D: usize>(&mut self, param: &Param<Tensor<D>>) -> Option<Tensor<D>> {
        self.remove(param.id)
    }
}

/// Takes the gradients of a layer's parameters.
pub(crate) fn of_layer<M: Module>(model: &M, layer: usize, grads: &mut impl TakeGrad) -> GradientsParams {
    struct Take<'a, G>(usize, &'a mut G, GradientsParams);
    impl<G: TakeGrad> ParameterVisitor for Take<'_, G> {
        fn visit<const D: usize>(&mut self, name: String, param: &Param<Tensor<D>>) {
            if layer_of(&name) == Some(self.0)
                && let Some(grad) = self.1.take_grad(param)
            {
                self.2.register::<D>(param.id, grad);
            }
        }
    }
    visit_parameters(model, Take(layer, grads, GradientsParams::new())).2
}
