//! The gated unit of LLaMA-like feed-forward layers (Shazeer 2020, arXiv 2002.05202).

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch, Flex};
use burn::tensor::{Tensor, activation};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::differentiable::{InputGrads, Wanted, fused};
use crate::scratch::{write_chunks, write_two_in_chunks};
use crate::shapes::assert_shapes;
use crate::{cpu, gpu, in_type, simd};

/// Elements of a task.
const CHUNK: usize = 1 << 14;

/// `silu(gate) * up`, element by element.
///
/// # Shapes
/// - gate, up, output: `[batch, seq, d_ff]`
///
/// # Panics
/// If the shapes differ.
pub fn swiglu(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    assert_shapes!("swiglu", gate, up; "gate and up must be of one shape": gate.dims() == up.dims());
    if cpu::fuses(&gate) || gpu::fuses(&gate) {
        let up = in_type(up, gate.dtype());
        return Tensor::from_dispatch(Dispatch::swiglu(gate.into_dispatch(), up.into_dispatch()));
    }
    plain(gate, up)
}

fn plain(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    activation::silu(gate) * up
}

fused!(Swiglu: swiglu(gate, up), run, back; gpu: gpu::elementwise::swiglu, gpu::elementwise::swiglu_back);

fn run(inputs: [FlexTensor; 2]) -> (FlexTensor, [FlexTensor; 2]) {
    let inputs = inputs.map(|input| input.to_contiguous());
    (forward(&inputs[0], &inputs[1]), inputs)
}

fn back([gate, up]: [FlexTensor; 2], y_grad: FlexTensor, wanted: Wanted<2>) -> InputGrads<Flex, 2> {
    backward(&gate, &up, &y_grad.to_contiguous(), wanted)
}

pub(crate) fn forward(gate: &FlexTensor, up: &FlexTensor) -> FlexTensor {
    let (gates, ups) = (cpu::values(gate), cpu::values(up));
    let inputs = (gates.par_chunks(CHUNK), ups.par_chunks(CHUNK)).into_par_iter();
    let (y, _) = write_chunks(gates.len(), CHUNK, inputs, |y, (gate, up)| (simd::swiglu(gate, up, y), ()));
    cpu::tensor(y, cpu::shape(gate))
}

pub(crate) fn backward(
    gate: &FlexTensor,
    up: &FlexTensor,
    y_grad: &FlexTensor,
    wanted: Wanted<2>,
) -> [Option<FlexTensor>; 2] {
    let shape = cpu::shape(gate);
    let (gates, ups, y_grads) = (cpu::values(gate), cpu::values(up), cpu::values(y_grad));
    let (len, tensor) = (gates.len(), |values| Some(cpu::tensor(values, shape.clone())));
    let inputs = (gates.par_chunks(CHUNK), ups.par_chunks(CHUNK), y_grads.par_chunks(CHUNK)).into_par_iter();
    match wanted {
        [false, false] => [None, None],
        [true, false] => {
            let write = simd::swiglu_back_to_gate;
            [tensor(write_chunks(len, CHUNK, inputs, |to, (gate, up, dy)| (write(gate, up, dy, to), ())).0), None]
        }
        [false, true] => {
            let write = simd::swiglu_back_to_up;
            [None, tensor(write_chunks(len, CHUNK, inputs, |to, (gate, _, dy)| (write(gate, dy, to), ())).0)]
        }
        [true, true] => {
            let write = simd::swiglu_backward;
            write_two_in_chunks(len, CHUNK, inputs, |of_gate, of_up, (gate, up, dy)| {
                write(gate, up, dy, of_gate, of_up)
            })
            .map(tensor)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agree_with_gradients, every_subset_of_gradients, leaf};

    #[test]
    fn fused_agrees_with_plain() {
        for shape in [[1, 1, 1], [3, 7, 5], [2, 129, 80], [1, 300, 64]] {
            let (gate, up) = (leaf(shape).reshape([-1]), leaf(shape).reshape([-1]));
            for swapped in [false, true] {
                let apply = |form: fn(Tensor<3>, Tensor<3>) -> Tensor<3>, [gate, up]: [Tensor<1>; 2]| {
                    let shaped = |x: Tensor<1>| match swapped {
                        false => x.reshape(shape),
                        true => x.reshape(shape).swap_dims(1, 2),
                    };
                    form(shaped(gate) * 4.0, shaped(up)).reshape([-1])
                };
                agree_with_gradients(&[&gate, &up], |x| apply(swiglu, x), |x| apply(plain, x));
            }
        }
    }

    #[test]
    fn gradients_are_the_same_whichever_are_asked_for() {
        every_subset_of_gradients(&[&[2, 129, 80], &[2, 129, 80]], |inputs| {
            let [gate, up] = inputs.map(|x| x.reshape([2, 129, 80]));
            swiglu(gate, up).reshape([-1])
        });
    }
}
