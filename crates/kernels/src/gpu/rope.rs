//! [`crate::rope`]: reads heads as they lie, and writes them by position, as projections do.

// A kernel is told everything one by one.
#![allow(clippy::too_many_arguments)]

use burn::backend::TensorMetadata;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::launch::{UNITS, addresses, by_position, cubes, element, in_vectors};
use crate::RopeLayout;

/// Turns forward (`sign` 1) or back (-1).
pub(crate) fn turn(x: CubeTensor, tables: &[CubeTensor; 2], layout: RopeLayout, sign: f32) -> CubeTensor {
    let [batch, heads, seq, head_dim] = x.shape().dims::<4>();
    let (half, interleaved) = (head_dim / 2, layout == RopeLayout::Interleaved);
    // Pairs that a unit turns: those of neighbouring channels lie in one place, and are turned one by one.
    let together = if !interleaved && half.is_multiple_of(4) { 4 } else { 1 };
    let x = if together == 4 { in_vectors(x, 4) } else { x };
    let y = by_position(&x, [batch, heads, seq, head_dim]);
    let [cos, sin] = tables;
    let turns = batch * heads * seq * half / together;
    if turns > 0 {
        // Safe: a unit reads and writes one vector of pairs below `turns`, in places that shape and strides give.
        unsafe {
            rotate::launch_unchecked(
                &x.client,
                cubes(&x.client, turns.div_ceil(UNITS as usize)),
                CubeDim::new_1d(UNITS),
                addresses(&[&x, &y]),
                together,
                x.clone().into_tensor_arg(),
                cos.clone().into_buffer_arg(),
                sin.clone().into_buffer_arg(),
                y.clone().into_tensor_arg(),
                turns,
                sign,
                interleaved,
                element(&x),
            );
        }
    }
    y
}

/// Angles as [`turn`] reads them.
pub(crate) fn tables(tables: [CubeTensor; 2]) -> [CubeTensor; 2] {
    tables.map(into_contiguous)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn rotate<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    cos: &[Vector<f32, N>],
    sin: &[Vector<f32, N>],
    y: &mut Tensor<Vector<F, N>>,
    turns: usize,
    sign: f32,
    #[comptime] interleaved: bool,
    #[define(F)] _dtype: ElemType,
) {
    let turn = ABSOLUTE_POS;
    if turn < turns {
        let wide = N::value();
        let (heads, seq, half) = (x.shape(1), x.shape(2), x.shape(3) / 2 / wide);
        let (channel, row) = (turn % half, turn / half);
        let (head, row) = (row % heads, row / heads);
        let (position, batch) = (row % seq, row / seq);
        // Distances of the two of a pair, and of one pair from the next.
        let apart = if comptime!(interleaved) { 1usize.runtime() } else { half };
        let next = if comptime!(interleaved) { 2usize } else { 1usize };
        let from = (batch * x.stride(0) + head * x.stride(1) + position * x.stride(2)) / wide;
        let to = (batch * y.stride(0) + head * y.stride(1) + position * y.stride(2)) / wide;
        let across = x.stride(3);
        let first = Vector::<f32, N>::cast_from(x[from + channel * next * across]);
        let second = Vector::<f32, N>::cast_from(x[from + (channel * next + apart) * across]);
        let angle = position * half + channel;
        let (cos, sin) = (cos[angle], sin[angle] * Vector::new(sign));
        y[to + channel * next] = Vector::cast_from(first * cos - second * sin);
        y[to + channel * next + apart] = Vector::cast_from(second * cos + first * sin);
    }
}
