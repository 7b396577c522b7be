//! Gradients of a whole model: added up over forward passes, and measured by their global norm.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Gradients, Tensor};
use polyhead_kernels::SumsOfSquares;

/// The sum of the gradients of several backward passes.
pub struct Sum<M> {
    sum: GradientsAccumulator<M>,
}

impl<M: Module> Default for Sum<M> {
    fn default() -> Self {
        Self { sum: GradientsAccumulator::new() }
    }
}

impl<M: Module> Sum<M> {
    /// Adds one backward pass.
    pub fn add(&mut self, grads: Gradients, model: &M) {
        self.add_params(GradientsParams::from_grads(grads, model), model);
    }

    /// Adds gradients by parameter.
    pub(crate) fn add_params(&mut self, grads: GradientsParams, model: &M) {
        self.sum.accumulate(model, grads);
    }

    /// The sum.
    pub fn finish(mut self) -> GradientsParams {
        self.sum.grads()
    }
}

/// The gradients of what is to be minimised, `[1]`.
pub(crate) fn backward(objective: Tensor<1>) -> Gradients {
    tracing::info_span!("backward").in_scope(|| objective.backward())
}

/// The Euclidean norm over all parameters, as `torch.nn.utils.clip_grad_norm_` takes it (Burn's own norm clipping is per
/// tensor). Not finite if any gradient is not.
pub fn global_norm<M: Module>(grads: &GradientsParams, model: &M) -> f64 {
    squares(grads, model).into_iter().flatten().fold(0.0, |sum, square| sum + square).sqrt()
}

/// By parameter, in the order of fields: the sum of the squares of its gradient, where it has one. One read from the device.
pub(crate) fn squares<M: Module>(grads: &GradientsParams, model: &M) -> Vec<Option<f64>> {
    struct Squares<'a>(&'a GradientsParams, SumsOfSquares, Vec<Option<usize>>);
    impl ModuleVisitor for Squares<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let grad = self.0.get::<D>(param.id);
            self.2.push(grad.map(|grad| self.1.add(grad)));
        }
    }
    let mut squares = Squares(grads, SumsOfSquares::default(), Vec::new());
    model.visit(&mut squares);
    let sums = squares.1.read();
    squares.2.iter().map(|place| place.map(|at| sums[at])).collect()
}

/// What `torch.nn.utils.clip_grad_norm_` multiplies gradients of this norm by; a `max_norm` of 0 clips nothing.
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 }
}
