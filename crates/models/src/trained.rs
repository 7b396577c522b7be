//! Which parameters are learnt.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;

use crate::Decoder;
use crate::weights::Path;

/// The model in which only the parameters are learnt whose names `learnt` accepts; a parameter that is not learnt already
/// stays so. What is not learnt requires no gradient: no backward pass computes one, no optimiser moves it, and it counts
/// in no norm.
pub fn train_only(model: Decoder, learnt: impl Fn(&str) -> bool) -> Decoder {
    struct Choose<F>(Path, F);
    impl<F: Fn(&str) -> bool> ModuleMapper for Choose<F> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.0.exit(container);
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if (self.1)(&self.0.name()) { param } else { param.set_require_grad(false) }
        }
    }
    model.map(&mut Choose(Path::default(), learnt))
}
