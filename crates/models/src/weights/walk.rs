//! Walks over the parameters of a module, each with its name: the names of the fields from the module down, joined by dots.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

/// What is done with each parameter.
pub trait ParameterVisitor {
    /// Called for every parameter, in the order of fields.
    fn visit<const D: usize>(&mut self, name: String, param: &Param<Tensor<D>>);
}

/// What becomes of each parameter.
pub trait ParameterMapper {
    /// Called for every parameter, in the order of fields.
    fn map<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>>;
}

/// Visits every parameter, and gives the visitor back.
pub fn visit_parameters<M: Module, V: ParameterVisitor>(module: &M, visitor: V) -> V {
    let mut walk = Walk { path: Vec::new(), with: visitor };
    module.visit(&mut walk);
    walk.with
}

/// The module with every parameter mapped, and the mapper.
pub fn map_parameters<M: Module, P: ParameterMapper>(module: M, mapper: P) -> (M, P) {
    let mut walk = Walk { path: Vec::new(), with: mapper };
    (module.map(&mut walk), walk.with)
}

/// Keeps the path of fields; the variants of an enum are no part of it.
struct Walk<W> {
    path: Vec<String>,
    with: W,
}

macro_rules! keeps_path {
    () => {
        fn enter_module(&mut self, name: &str, container: &str) {
            if !container.starts_with("Enum:") {
                self.path.push(name.to_owned());
            }
        }

        fn exit_module(&mut self, _name: &str, container: &str) {
            if !container.starts_with("Enum:") {
                self.path.pop();
            }
        }
    };
}

impl<V: ParameterVisitor> ModuleVisitor for Walk<V> {
    keeps_path!();

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.with.visit(self.path.join("."), param);
    }
}

impl<P: ParameterMapper> ModuleMapper for Walk<P> {
    keeps_path!();

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.with.map(self.path.join("."), param)
    }
}
