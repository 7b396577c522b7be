//! [`crate::swiglu`] and [`crate::adamw`]: one kernel each where Burn's operations take a dozen, every number read and written once.

// A kernel is told everything one by one.
#![allow(clippy::too_many_arguments)]

use burn::backend::{Cube, TensorMetadata};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::launch::{UNITS, addresses, cubes, element, empty, vector};
use crate::AdamwStep;
use crate::differentiable::{InputGrads, Wanted};

/// `silu(gate) * up`, and what its backward needs.
pub(crate) fn swiglu(inputs: [CubeTensor; 2]) -> (CubeTensor, [CubeTensor; 2]) {
    let [gate, up] = inputs.map(into_contiguous);
    let y = empty(&gate, gate.shape(), gate.dtype);
    let len = gate.shape().num_elements();
    if len > 0 {
        // Safe: a unit reads and writes one vector below `vectors`.
        unsafe {
            gated::launch_unchecked(
                &gate.client,
                cubes(&gate.client, (len / vector(len)).div_ceil(UNITS as usize)),
                CubeDim::new_1d(UNITS),
                addresses(&[&gate]),
                vector(len),
                gate.clone().into_buffer_arg(),
                up.clone().into_buffer_arg(),
                y.clone().into_buffer_arg(),
                len / vector(len),
                element(&gate),
            );
        }
    }
    (y, [gate, up])
}

/// Gradients of gate and up.
pub(crate) fn swiglu_back(
    [gate, up]: [CubeTensor; 2],
    y_grad: CubeTensor,
    [of_gate, of_up]: Wanted<2>,
) -> InputGrads<Cube, 2> {
    let y_grad = into_contiguous(y_grad);
    let len = gate.shape().num_elements();
    let [gate_grad, up_grad] = [&gate, &up].map(|x| empty(x, x.shape(), x.dtype));
    if len > 0 {
        // Safe: as in the forward.
        unsafe {
            gated_back::launch_unchecked(
                &gate.client,
                cubes(&gate.client, (len / vector(len)).div_ceil(UNITS as usize)),
                CubeDim::new_1d(UNITS),
                addresses(&[&gate]),
                vector(len),
                gate.clone().into_buffer_arg(),
                up.into_buffer_arg(),
                y_grad.into_buffer_arg(),
                gate_grad.clone().into_buffer_arg(),
                up_grad.clone().into_buffer_arg(),
                len / vector(len),
                element(&gate),
            );
        }
    }
    [of_gate.then_some(gate_grad), of_up.then_some(up_grad)]
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn gated<F: Float, N: Size>(
    gate: &[Vector<F, N>],
    up: &[Vector<F, N>],
    y: &mut [Vector<F, N>],
    vectors: usize,
    #[define(F)] _dtype: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at < vectors {
        let (gate, up) = (Vector::<f32, N>::cast_from(gate[at]), Vector::<f32, N>::cast_from(up[at]));
        y[at] = Vector::cast_from(gate * sigmoid(gate) * up);
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn gated_back<F: Float, N: Size>(
    gate: &[Vector<F, N>],
    up: &[Vector<F, N>],
    y_grad: &[Vector<F, N>],
    gate_grad: &mut [Vector<F, N>],
    up_grad: &mut [Vector<F, N>],
    vectors: usize,
    #[define(F)] _dtype: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at < vectors {
        let (gate, up) = (Vector::<f32, N>::cast_from(gate[at]), Vector::<f32, N>::cast_from(up[at]));
        let grad = Vector::<f32, N>::cast_from(y_grad[at]);
        let open = sigmoid(gate);
        let one = Vector::<f32, N>::new(1.0f32);
        gate_grad[at] = Vector::cast_from(grad * up * open * (one + gate * (one - open)));
        up_grad[at] = Vector::cast_from(grad * gate * open);
    }
}

#[cube]
fn sigmoid<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let one = Vector::<f32, N>::new(1.0f32);
    one / (one + (Vector::<f32, N>::new(0.0f32) - x).exp())
}

/// The parameter and its moments after the update, in place unless somebody else still holds the old ones.
pub(crate) fn adamw(
    value: CubeTensor,
    grad: CubeTensor,
    moments: [CubeTensor; 2],
    step: AdamwStep,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let own = |x: CubeTensor| {
        let x = into_contiguous(x);
        if x.can_mut() { x } else { x.copy() }
    };
    let (value, [first, second], grad) = (own(value), moments.map(own), into_contiguous(grad));
    let len = value.shape().num_elements();
    if len > 0 {
        // Safe: a unit reads and writes one vector below `vectors`.
        unsafe {
            update::launch_unchecked(
                &value.client,
                cubes(&value.client, (len / vector(len)).div_ceil(UNITS as usize)),
                CubeDim::new_1d(UNITS),
                addresses(&[&value]),
                vector(len),
                value.clone().into_buffer_arg(),
                grad.into_buffer_arg(),
                first.clone().into_buffer_arg(),
                second.clone().into_buffer_arg(),
                len / vector(len),
                step.grad_scale as f32,
                step.rate as f32,
                step.keep as f32,
                step.beta1 as f32,
                (1.0 - step.beta1) as f32,
                step.beta2 as f32,
                (1.0 - step.beta2) as f32,
                (1.0 / step.correction) as f32,
                step.eps as f32,
            );
        }
    }
    (value, first, second)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn update<N: Size>(
    value: &mut [Vector<f32, N>],
    grad: &[Vector<f32, N>],
    first: &mut [Vector<f32, N>],
    second: &mut [Vector<f32, N>],
    vectors: usize,
    grad_scale: f32,
    rate: f32,
    keep: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    correction: f32,
    eps: f32,
) {
    let at = ABSOLUTE_POS;
    if at < vectors {
        let grad = grad[at] * Vector::new(grad_scale);
        let mean = first[at] * Vector::new(beta1) + grad * Vector::new(rest1);
        let square = second[at] * Vector::new(beta2) + grad * grad * Vector::new(rest2);
        let direction = mean / (square.sqrt() * Vector::new(correction) + Vector::new(eps));
        value[at] = value[at] * Vector::new(keep) - direction * Vector::new(rate);
        first[at] = mean;
        second[at] = square;
    }
}
