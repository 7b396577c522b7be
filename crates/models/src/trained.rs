//! Which parameters are learned.

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};

use crate::adapters::is_pair;
use crate::intervention::is_intervention_tensor;
use crate::weights::{ParameterMapper, ParameterVisitor, map_parameters, visit_parameters};

/// The model in which only the parameters are learned whose names `learned` accepts; a parameter that is not learned already
/// stays so. What is not learned requires no gradient: no backward pass computes one, no optimiser moves it, and it counts
/// in no norm.
pub fn train_only<M: Module>(model: M, learned: impl Fn(&str) -> bool) -> M {
    struct Choose<F>(F);
    impl<F: Fn(&str) -> bool> ParameterMapper for Choose<F> {
        fn map<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if (self.0)(&name) { param } else { param.set_require_grad(false) }
        }
    }
    map_parameters(model, Choose(learned)).0
}

/// Whether a parameter of a decoder is beside its weights: a half of a low-rank pair, or a tensor of its intervention.
pub fn is_beside_weights(parameter: &str) -> bool {
    is_pair(parameter) || is_intervention_tensor(parameter)
}

/// A parameter without its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Field names from the model down, joined by dots.
    pub name: String,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// Whether it is learned.
    pub trainable: bool,
    /// The type of its numbers.
    pub dtype: DType,
}

impl Parameter {
    /// How many bytes it has.
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.size()
    }

    /// How many elements it has.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// All parameters of a model, in the order of its fields.
pub fn parameters<M: Module>(model: &M) -> Vec<Parameter> {
    struct Collect(Vec<Parameter>);
    impl ParameterVisitor for Collect {
        fn visit<const D: usize>(&mut self, name: String, param: &Param<Tensor<D>>) {
            let (shape, value) = (param.dims().to_vec(), param.val());
            self.0.push(Parameter { name, shape, trainable: value.is_require_grad(), dtype: value.dtype() });
        }
    }
    visit_parameters(model, Collect(Vec::new())).0
}
