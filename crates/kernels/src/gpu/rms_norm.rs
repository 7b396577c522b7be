//! [`crate::rms_norm`]: a row is normalised by neighbouring units, forward and backward; the gradient of the weight is added up down
//! the columns, in parts.

// A kernel is told everything one by one.
#![allow(clippy::too_many_arguments)]

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Cube, TensorMetadata};
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::launch::{Lanes, UNITS, addresses, cubes, element, empty, reduce_row, vector};
use crate::differentiable::{InputGrads, Wanted};

/// Rows that a unit adds up at least, and cubes that share the rows at most: enough for any card, and few parts to add up. Chosen by us.
const ROWS: usize = 32;
const CUBES: usize = 1024;

/// What the backward needs: x, the weight, and per row the reciprocal of its root mean square.
pub(crate) type Kept = (CubeTensor, CubeTensor, CubeTensor);

pub(crate) fn forward(inputs: [CubeTensor; 2], eps: f32) -> (CubeTensor, Kept) {
    let [x, weight] = inputs.map(into_contiguous);
    let (rows, channels) = sizes(&x);
    let (y, inverses) = (empty(&x, x.shape(), x.dtype), empty(&x, [rows], DType::F32));
    if rows * channels > 0 {
        let client = x.client.clone();
        let (vector, lanes) = (vector(channels), Lanes::of(&client, channels / vector(channels)));
        // Safe: a unit reads and writes rows below `rows`, vectors below `vectors`.
        unsafe {
            normalise::launch_unchecked(
                &client,
                cubes(&client, rows.div_ceil(lanes.rows() as usize)),
                CubeDim::new_1d(UNITS),
                addresses(&[&x, &weight, &y]),
                vector,
                x.clone().into_buffer_arg(),
                weight.clone().into_buffer_arg(),
                y.clone().into_buffer_arg(),
                inverses.clone().into_buffer_arg(),
                rows,
                channels / vector,
                eps,
                lanes.row,
                lanes.plane,
                element(&x),
            );
        }
    }
    (y, (x, weight, inverses))
}

/// Gradients of x and of the weight.
pub(crate) fn backward(
    (x, weight, inverses): Kept,
    y_grad: CubeTensor,
    [of_x, of_weight]: Wanted<2>,
) -> InputGrads<Cube, 2> {
    let y_grad = into_contiguous(y_grad);
    let x_grad = of_x.then(|| back_to_x(&x, &weight, &inverses, &y_grad));
    [x_grad, of_weight.then(|| back_to_weight(&x, &inverses, &y_grad))]
}

fn back_to_x(x: &CubeTensor, weight: &CubeTensor, inverses: &CubeTensor, y_grad: &CubeTensor) -> CubeTensor {
    let (rows, channels) = sizes(x);
    let x_grad = empty(x, x.shape(), x.dtype);
    if rows * channels > 0 {
        let (vector, lanes) = (vector(channels), Lanes::of(&x.client, channels / vector(channels)));
        // Safe: as in the forward.
        unsafe {
            normalise_back::launch_unchecked(
                &x.client,
                cubes(&x.client, rows.div_ceil(lanes.rows() as usize)),
                CubeDim::new_1d(UNITS),
                addresses(&[x, weight, y_grad]),
                vector,
                x.clone().into_buffer_arg(),
                weight.clone().into_buffer_arg(),
                inverses.clone().into_buffer_arg(),
                y_grad.clone().into_buffer_arg(),
                x_grad.clone().into_buffer_arg(),
                rows,
                channels / vector,
                lanes.row,
                lanes.plane,
                element(x),
            );
        }
    }
    x_grad
}

fn back_to_weight(x: &CubeTensor, inverses: &CubeTensor, y_grad: &CubeTensor) -> CubeTensor {
    let (rows, channels) = sizes(x);
    let vectors = channels / vector(channels);
    // Units of a cube: columns beside each other, and rows of parts.
    let columns = (vectors as u32).next_power_of_two().min(UNITS);
    let down = (UNITS / columns) as usize;
    let across = vectors.div_ceil(columns as usize);
    let blocks = rows.div_ceil(ROWS * down).clamp(1, CUBES.div_ceil(across.max(1)));
    let parts = empty(x, [blocks * down, channels], DType::F32);
    if channels > 0 {
        // Safe: a unit reads rows below `rows`, vectors below `vectors`, and writes a part of its own.
        unsafe {
            weight_back::launch_unchecked(
                &x.client,
                CubeCount::Static(across as u32, blocks as u32, 1),
                CubeDim::new_2d(columns, down as u32),
                addresses(&[x, y_grad, &parts]),
                vector(channels),
                x.clone().into_buffer_arg(),
                inverses.clone().into_buffer_arg(),
                y_grad.clone().into_buffer_arg(),
                parts.clone().into_buffer_arg(),
                rows,
                vectors,
                element(x),
            );
        }
    }
    Cube::float_reshape(Cube::float_sum_dim(parts, 0), Shape::new([channels]))
}

/// Rows and channels.
fn sizes(x: &CubeTensor) -> (usize, usize) {
    let shape = x.shape();
    let channels = shape.iter().last().copied().unwrap_or(1);
    (shape.num_elements() / channels.max(1), channels)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn normalise<F: Float, N: Size>(
    x: &[Vector<F, N>],
    weight: &[Vector<f32, N>],
    y: &mut [Vector<F, N>],
    inverses: &mut [f32],
    rows: usize,
    vectors: usize,
    eps: f32,
    #[comptime] lanes: u32,
    #[comptime] plane: u32,
    #[define(F)] _dtype: ElemType,
) {
    let mut shared = Shared::<[f32]>::new_slice(UNITS as usize);
    let row = CUBE_POS * comptime!((UNITS / lanes) as usize) + (UNIT_POS / lanes) as usize;
    let lane = (UNIT_POS % lanes) as usize;
    let lanes_wide = comptime!(lanes as usize);
    let start = row * vectors;
    let mut squares = Vector::<f32, N>::new(0.0f32);
    if row < rows {
        let mut at = lane;
        while at < vectors {
            let value = Vector::<f32, N>::cast_from(x[start + at]);
            squares += value * value;
            at += lanes_wide;
        }
    }
    let sum = reduce_row(squares.vector_sum(), &mut shared, lanes, plane, false);
    if row < rows {
        let channels = f32::cast_from(vectors * N::value());
        let inverse = 1.0f32 / (sum / channels + eps).sqrt();
        let mut at = lane;
        while at < vectors {
            let value = Vector::<f32, N>::cast_from(x[start + at]);
            y[start + at] = Vector::cast_from(value * Vector::new(inverse) * weight[at]);
            at += lanes_wide;
        }
        if lane == 0 {
            inverses[row] = inverse;
        }
    }
}

/// With `n = x / rms`: `(w y' - n mean(w y' n)) / rms`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn normalise_back<F: Float, N: Size>(
    x: &[Vector<F, N>],
    weight: &[Vector<f32, N>],
    inverses: &[f32],
    y_grad: &[Vector<F, N>],
    x_grad: &mut [Vector<F, N>],
    rows: usize,
    vectors: usize,
    #[comptime] lanes: u32,
    #[comptime] plane: u32,
    #[define(F)] _dtype: ElemType,
) {
    let mut shared = Shared::<[f32]>::new_slice(UNITS as usize);
    let row = CUBE_POS * comptime!((UNITS / lanes) as usize) + (UNIT_POS / lanes) as usize;
    let lane = (UNIT_POS % lanes) as usize;
    let lanes_wide = comptime!(lanes as usize);
    let start = row * vectors;
    let mut products = Vector::<f32, N>::new(0.0f32);
    let mut inverse = 0.0f32;
    if row < rows {
        inverse = inverses[row];
        let mut at = lane;
        while at < vectors {
            let value = Vector::<f32, N>::cast_from(x[start + at]);
            products += Vector::<f32, N>::cast_from(y_grad[start + at]) * weight[at] * value;
            at += lanes_wide;
        }
    }
    let sum = reduce_row(products.vector_sum(), &mut shared, lanes, plane, false);
    if row < rows {
        let channels = f32::cast_from(vectors * N::value());
        let slope = sum * inverse * inverse / channels;
        let mut at = lane;
        while at < vectors {
            let value = Vector::<f32, N>::cast_from(x[start + at]);
            let grad = Vector::<f32, N>::cast_from(y_grad[start + at]) * weight[at];
            x_grad[start + at] = Vector::cast_from((grad - value * Vector::new(slope)) * Vector::new(inverse));
            at += lanes_wide;
        }
    }
}

/// A unit adds up a column of its rows: every so many-th, so that neighbours read what lies together.
#[cube(launch_unchecked, address_type = "dynamic")]
fn weight_back<F: Float, N: Size>(
    x: &[Vector<F, N>],
    inverses: &[f32],
    y_grad: &[Vector<F, N>],
    parts: &mut [Vector<f32, N>],
    rows: usize,
    vectors: usize,
    #[define(F)] _dtype: ElemType,
) {
    let column = (CUBE_POS_X * CUBE_DIM_X + UNIT_POS_X) as usize;
    let part = (CUBE_POS_Y * CUBE_DIM_Y + UNIT_POS_Y) as usize;
    let step = (CUBE_COUNT_Y * CUBE_DIM_Y) as usize;
    if column < vectors {
        let mut sum = Vector::<f32, N>::new(0.0f32);
        let mut row = part;
        while row < rows {
            let at = row * vectors + column;
            let value = Vector::<f32, N>::cast_from(x[at]) * Vector::new(inverses[row]);
            sum += value * Vector::cast_from(y_grad[at]);
            row += step;
        }
        parts[part * vectors + column] = sum;
    }
}
