//! The shapes of a call, checked before anything is computed: the fused operations read memory by them.

use burn::tensor::{Bool, Tensor};

use crate::{SelectedRows, Targets};

/// A value with a shape that a message can name.
pub(crate) trait Shaped {
    /// The sizes.
    fn shape(&self) -> Vec<usize>;
}

impl<const D: usize> Shaped for Tensor<D> {
    fn shape(&self) -> Vec<usize> {
        self.dims().to_vec()
    }
}

impl<const D: usize> Shaped for Tensor<D, Bool> {
    fn shape(&self) -> Vec<usize> {
        self.dims().to_vec()
    }
}

impl Shaped for SelectedRows {
    fn shape(&self) -> Vec<usize> {
        SelectedRows::shape(self).to_vec()
    }
}

impl Shaped for Targets {
    fn shape(&self) -> Vec<usize> {
        vec![self.len()]
    }
}

impl<T: Shaped> Shaped for std::sync::Arc<T> {
    fn shape(&self) -> Vec<usize> {
        T::shape(self)
    }
}

impl<T: Shaped> Shaped for &T {
    fn shape(&self) -> Vec<usize> {
        T::shape(self)
    }
}

/// Panics unless every rule holds; the message names the operation, the rule that is broken, and each input with its
/// shape.
macro_rules! assert_shapes {
    ($operation:literal, $($input:ident),+; $($rule:literal: $holds:expr),+ $(,)?) => {
        let shapes = || {
            [$(format!("{} {:?}", stringify!($input), $crate::shapes::Shaped::shape(&$input))),+].join(", ")
        };
        $(assert!($holds, "{}: {}; {}", $operation, $rule, shapes());)+
    };
}
pub(crate) use assert_shapes;

/// Whether a tensor of these sizes holds for the full ones: where it has one row or head, for all.
pub(crate) fn spreads(sizes: [usize; 4], full: [usize; 4]) -> bool {
    (0..2).all(|axis| sizes[axis] == full[axis] || sizes[axis] == 1) && sizes[2..] == full[2..]
}
