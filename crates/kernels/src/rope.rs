//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::differentiable::{Wanted, differentiable};
use crate::scratch::{write_chunks, write_rows};
use crate::shapes::assert_shapes;
use crate::{cpu, gpu, in_type, simd};

/// The layout of the pairs of channels that are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum RopeLayout {
    /// Pairs (i, i + d/2): GPT-NeoX, LLaMA, everything in Hugging Face transformers.
    #[default]
    RotateHalf,
    /// Pairs (2i, 2i + 1): GPT-J, and the published code of the Differential Transformer.
    Interleaved,
}

/// Rotates pair `i` of every head by the angle of its position.
///
/// # Shapes
/// - x, output: `[batch, n_heads, seq, head_dim]`, head_dim even
/// - cos, sin: `[seq, head_dim / 2]`, which get no gradient
///
/// # Panics
/// If the shapes are others.
pub fn rope(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>, layout: RopeLayout) -> Tensor<4> {
    let [_, _, seq, head_dim] = x.dims();
    assert_shapes!("rope", x, cos, sin;
        "head_dim, the last size of x, must be even": head_dim.is_multiple_of(2),
        "cos must be [seq, head_dim / 2]": cos.dims() == [seq, head_dim / 2],
        "sin must be [seq, head_dim / 2]": sin.dims() == [seq, head_dim / 2],
    );
    if cpu::fuses(&x) || gpu::fuses(&x) {
        let [cos, sin] = [cos, sin].map(|table| in_type(table, DType::F32));
        let turned = Dispatch::rope(x.into_dispatch(), cos.into_dispatch(), sin.into_dispatch(), layout);
        return Tensor::from_dispatch(turned);
    }
    plain(x, cos, sin, layout)
}

fn plain(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>, layout: RopeLayout) -> Tensor<4> {
    let dtype = x.dtype();
    // Turned in f32: bf16 has no digits for the angles of late positions.
    let x = in_type(x, DType::F32);
    let [batch, n_heads, seq, head_dim] = x.dims();
    let half = head_dim / 2;
    let (first, second) = match layout {
        RopeLayout::RotateHalf => (x.clone().narrow(3, 0, half), x.narrow(3, half, half)),
        RopeLayout::Interleaved => {
            let pairs = x.reshape([batch * n_heads, seq, half, 2]);
            let part = |i| pairs.clone().narrow(3, i, 1).reshape([batch, n_heads, seq, half]);
            (part(0), part(1))
        }
    };
    let cos = cos.unsqueeze::<4>(); // [1, 1, seq, half]
    let sin = sin.unsqueeze::<4>();
    let rotated_first = first.clone() * cos.clone() - second.clone() * sin.clone();
    let rotated_second = second * cos + first * sin;
    let rotated = match layout {
        RopeLayout::RotateHalf => Tensor::cat(vec![rotated_first, rotated_second], 3),
        RopeLayout::Interleaved => {
            Tensor::stack::<5>(vec![rotated_first, rotated_second], 4).reshape([batch, n_heads, seq, head_dim])
        }
    };
    in_type(rotated, dtype)
}

#[backend_extension(Flex, Cube: cfg(feature = "gpu"), Autodiff)]
trait Rotary: Backend {
    fn rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        layout: RopeLayout,
    ) -> FloatTensor<Self>;
}

impl Rotary for Flex {
    fn rope(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, layout: RopeLayout) -> FlexTensor {
        turn(x, &cos.to_contiguous(), &sin.to_contiguous(), layout, 1.0)
    }
}

impl<C: CheckpointStrategy> Rotary for Autodiff<Flex, C> {
    fn rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        layout: RopeLayout,
    ) -> FloatTensor<Self> {
        let tables = [cos, sin].map(|table| table.into_primitive().to_contiguous());
        let run = |[x]: [FlexTensor; 1], _: Wanted<1>| {
            let y = turn(x, &tables[0], &tables[1], layout, 1.0);
            (y, (tables, layout), ())
        };
        // The inverse of a rotation is its transpose.
        let back = |([cos, sin], layout): ([FlexTensor; 2], RopeLayout), y_grad: FlexTensor, [of_x]: Wanted<1>| {
            [of_x.then(|| turn(y_grad, &cos, &sin, layout, -1.0))]
        };
        differentiable::<Flex, C, _, _, 1>([x], run, back).0
    }
}

#[cfg(feature = "gpu")]
impl Rotary for burn::backend::Cube {
    fn rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        layout: RopeLayout,
    ) -> FloatTensor<Self> {
        gpu::rope::turn(x, &gpu::rope::tables([cos, sin]), layout, 1.0)
    }
}

#[cfg(feature = "gpu")]
impl<C: CheckpointStrategy> Rotary for Autodiff<burn::backend::Cube, C> {
    fn rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        layout: RopeLayout,
    ) -> FloatTensor<Self> {
        use burn::backend::Cube;
        let tables = gpu::rope::tables([cos, sin].map(|table| table.into_primitive()));
        let run = |[x]: [FloatTensor<Cube>; 1], _: Wanted<1>| {
            let y = gpu::rope::turn(x, &tables, layout, 1.0);
            (y, (tables, layout), ())
        };
        let back = |(tables, layout), y_grad, [of_x]: Wanted<1>| {
            [of_x.then(|| gpu::rope::turn(y_grad, &tables, layout, -1.0))]
        };
        differentiable::<Cube, C, _, _, 1>([x], run, back).0
    }
}

/// Turns forward (`sign` 1) or back (-1); the result is laid out by position, as projections lay out their outputs.
fn turn(x: FlexTensor, cos: &FlexTensor, sin: &FlexTensor, layout: RopeLayout, sign: f32) -> FlexTensor {
    let x = cpu::row_major(x);
    let view = cpu::View::new(&x);
    let [batch, n_heads, seq, head_dim] = view.shape;
    let (cos, sin, half) = (cpu::values(cos), cpu::values(sin), head_dim / 2);
    let row = n_heads * head_dim;
    let len = batch * seq * row;
    let (y, _) = write_chunks(len, row, (0..len.div_ceil(row.max(1))).into_par_iter(), |y, row| {
        let (b, position) = (row / seq, row % seq);
        let (cos, sin) = (&cos[position * half..][..half], &sin[position * half..][..half]);
        let written = write_rows(y, head_dim, |head, y| {
            let x = view.row(b, head, position);
            match layout {
                RopeLayout::RotateHalf => simd::rotate_halves(x, cos, sin, sign, y),
                RopeLayout::Interleaved => simd::rotate_pairs(x, cos, sin, sign, y),
            }
        });
        (written, ())
    });
    cpu::tensor_by_position(y, view.shape)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comparison::{Tolerance, assert_tensors_close};
    use crate::testing::normal;
    use burn::tensor::Device;

    fn tables(seq: usize, half: usize, device: &Device) -> (Tensor<2>, Tensor<2>) {
        let angles: Vec<f32> = (0..seq * half).map(|i| (i / half) as f32 * 0.3 / (1 + i % half) as f32).collect();
        let angles = Tensor::<1>::from_floats(angles.as_slice(), device).reshape([seq, half]);
        (angles.clone().cos(), angles.sin())
    }

    #[test]
    fn layouts_differ_only_by_a_permutation_of_channels() {
        let device = Device::flex();
        let (cos, sin) = tables(5, 3, &device);
        let x = normal([2, 2, 5, 6], &device);
        let to_halves = Tensor::<1, burn::tensor::Int>::from_ints([0, 2, 4, 1, 3, 5], &device);
        let interleaved = rope(x.clone(), cos.clone(), sin.clone(), RopeLayout::Interleaved);
        let halves = rope(x.select(3, to_halves.clone()), cos, sin, RopeLayout::RotateHalf);
        assert_tensors_close("layouts", interleaved.select(3, to_halves), halves, Tolerance::absolute(1e-6));
    }

    #[test]
    fn rotation_keeps_lengths_and_position_zero() {
        let device = Device::flex();
        let (cos, sin) = tables(4, 2, &device);
        let x = normal([1, 3, 4, 4], &device);
        let y = rope(x.clone(), cos, sin, RopeLayout::RotateHalf);
        let norm = |t: Tensor<4>| t.square().sum_dim(3);
        assert_tensors_close("lengths", norm(y.clone()), norm(x.clone()), Tolerance::absolute(1e-5));
        y.narrow(2, 0, 1).into_data().assert_eq(&x.narrow(2, 0, 1).into_data(), true);
    }

    #[test]
    fn fused_agrees_with_plain() {
        for (batch, n_heads, seq, head_dim) in [(1, 1, 1, 2), (3, 2, 7, 6), (2, 1, 129, 80), (1, 4, 63, 64)] {
            let (cos, sin) = tables(seq, head_dim / 2, &Device::flex());
            let x = crate::testing::leaf([batch * seq * n_heads * head_dim]);
            for layout in [RopeLayout::RotateHalf, RopeLayout::Interleaved] {
                let apply = |form: fn(Tensor<4>, Tensor<2>, Tensor<2>, RopeLayout) -> Tensor<4>, x: Tensor<1>| {
                    let by_position = x.reshape([batch, seq, n_heads, head_dim]).swap_dims(1, 2);
                    form(by_position, cos.clone(), sin.clone(), layout).reshape([-1])
                };
                crate::testing::agree_with_gradients(&[&x], |[x]| apply(rope, x), |[x]| apply(plain, x));
            }
        }
    }
}
