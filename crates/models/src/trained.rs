//! Which parameters are learned.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

use crate::weights::Path;

/// The model in which only the parameters are learned whose names `learned` accepts; a parameter that is not learned already
/// stays so. What is not learned requires no gradient: no backward pass computes one, no optimiser moves it, and it counts
/// in no norm.
pub fn train_only<M: Module>(model: M, learned: impl Fn(&str) -> bool) -> M {
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
    model.map(&mut Choose(Path::default(), learned))
}

/// A parameter without its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Field names from the model down, joined by dots.
    pub name: String,
    /// How many numbers it holds.
    pub numbers: usize,
    /// Whether it is learned.
    pub trainable: bool,
}

/// All parameters of a model, in the order of its fields.
pub fn parameters<M: Module>(model: &M) -> Vec<Parameter> {
    struct Collect(Path, Vec<Parameter>);
    impl ModuleVisitor for Collect {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.0.exit(container);
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let (name, numbers) = (self.0.name(), param.dims().iter().product());
            self.1.push(Parameter { name, numbers, trainable: param.val().is_require_grad() });
        }
    }
    let mut collect = Collect(Path::default(), Vec::new());
    model.visit(&mut collect);
    collect.1
}
