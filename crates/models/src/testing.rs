//! What the tests of several models share.

use burn::module::{Module, Param};
use burn::tensor::{Gradients, Tensor};

use crate::weights::{ParameterVisitor, visit_parameters};

/// Every parameter that is learned has a finite gradient that is not all zero; how many there are.
pub(crate) fn reach_every_parameter<M: Module>(module: &M, grads: &Gradients) -> usize {
    struct Check<'a>(&'a Gradients, usize);
    impl ParameterVisitor for Check<'_> {
        fn visit<const D: usize>(&mut self, name: String, param: &Param<Tensor<D>>) {
            if !param.val().is_require_grad() {
                return;
            }
            let grad = param.val().grad(self.0).unwrap_or_else(|| panic!("{name} has no gradient"));
            let values: Vec<f32> = grad.into_data().iter::<f32>().collect();
            assert!(values.iter().all(|g| g.is_finite()), "the gradient of {name} is not finite");
            assert!(values.iter().any(|&g| g != 0.0), "the gradient of {name} is zero");
            self.1 += 1;
        }
    }
    visit_parameters(module, Check(grads, 0)).1
}
