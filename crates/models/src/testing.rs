//! What the tests of several models share.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor};

use crate::weights::Path;

/// Every parameter has a finite gradient that is not all zero; how many there are.
pub(crate) fn reach_every_parameter<M: Module>(module: &M, grads: &Gradients) -> usize {
    struct Check<'a>(Path, &'a Gradients, usize);
    impl ModuleVisitor for Check<'_> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.0.exit(container);
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let name = self.0.name();
            let grad = param.val().grad(self.1).unwrap_or_else(|| panic!("{name} has no gradient"));
            let values: Vec<f32> = grad.into_data().iter::<f32>().collect();
            assert!(values.iter().all(|g| g.is_finite()), "the gradient of {name} is not finite");
            assert!(values.iter().any(|&g| g != 0.0), "the gradient of {name} is zero");
            self.2 += 1;
        }
    }
    let mut check = Check(Path::default(), grads, 0);
    module.visit(&mut check);
    check.2
}
