//! [`crate::rms_norm`] and [`crate::add_rms_norm`]: a row is added, normalised and cast by neighbouring units, forward and backward; the
//! gradient of the weight is added up down the columns, in parts.

// A kernel is told everything one by one.
#![allow(clippy::too_many_arguments)]

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Cube, TensorMetadata};
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::launch::{Lanes, UNITS, addresses, cubes, element, element_of, empty, reduce_row, vector};
use crate::differentiable::{InputGrads, Wanted};
use crate::precision::cast;

/// Rows that a unit adds up at least, and cubes that share the rows at most: enough for any card, and few parts to add up. Chosen by us.
const ROWS: usize = 32;
const CUBES: usize = 1024;

/// What the backward needs.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    /// What was normalised.
    x: CubeTensor,
    weight: CubeTensor,
    /// Per row the reciprocal of its root mean square.
    inverses: CubeTensor,
}

impl Kept {
    /// The type of what was normalised.
    pub(crate) fn dtype(&self) -> DType {
        self.x.dtype
    }
}

pub(crate) fn forward([x, weight]: [CubeTensor; 2], eps: f32) -> (CubeTensor, Kept) {
    let dtype = x.dtype;
    normalise([x, weight], None, eps, dtype)
}

/// Gradients of x and of the weight.
pub(crate) fn backward(kept: Kept, y_grad: CubeTensor, [of_x, of_weight]: Wanted<2>) -> InputGrads<Cube, 2> {
    let y_grad = into_contiguous(y_grad);
    let x_grad = of_x.then(|| back_to_x(&kept, &y_grad, None, None).0);
    [x_grad, of_weight.then(|| back_to_weight(&kept, &y_grad))]
}

/// The sum of x and what is written to it, if anything is, and its norm as `dtype`.
pub(crate) fn add_and_normalise(
    inputs: [CubeTensor; 2],
    written: Option<CubeTensor>,
    eps: f32,
    dtype: DType,
) -> ([CubeTensor; 2], Kept) {
    let (y, kept) = normalise(inputs, written, eps, dtype);
    ([kept.x.clone(), y], kept)
}

/// Gradients of x, of the weight, and of what was written, which was of type `narrow`, from those of the sum and of its norm.
pub(crate) fn back_through_sum(
    kept: Kept,
    [sum_grad, y_grad]: [Option<CubeTensor>; 2],
    [of_x, of_weight, of_written]: Wanted<3>,
    narrow: DType,
) -> InputGrads<Cube, 3> {
    let [sum_grad, y_grad] = [sum_grad, y_grad].map(|grad| grad.map(into_contiguous));
    let x = &kept.x;
    let (x_grad, written_grad) = match (&y_grad, sum_grad) {
        (Some(y_grad), others) if of_x || of_written => {
            let narrow = Some(narrow).filter(|&narrow| of_written && narrow != x.dtype);
            let (x_grad, narrowed) = back_to_x(&kept, y_grad, others, narrow);
            (Some(x_grad.clone()), narrowed.or(Some(x_grad)))
        }
        (_, alone) => (alone.clone(), alone.filter(|_| of_written).map(|grad| cast::<Cube>(grad, narrow))),
    };
    let weight_grad = of_weight.then(|| match &y_grad {
        Some(y_grad) => back_to_weight(&kept, y_grad),
        None => Cube::float_zeros(kept.weight.shape(), &x.device, DType::F32.into()),
    });
    [x_grad.filter(|_| of_x), weight_grad, written_grad.filter(|_| of_written)]
}

/// The norm as `dtype`, of x or of its sum with `written`, which is kept.
fn normalise(inputs: [CubeTensor; 2], written: Option<CubeTensor>, eps: f32, dtype: DType) -> (CubeTensor, Kept) {
    let ([x, weight], written) = (inputs.map(into_contiguous), written.map(into_contiguous));
    let (rows, channels) = sizes(&x);
    let (y, inverses) = (empty(&x, x.shape(), dtype), empty(&x, [rows], DType::F32));
    let sum = written.as_ref().map(|_| empty(&x, x.shape(), x.dtype));
    if rows * channels > 0 {
        let client = x.client.clone();
        let (vector, lanes) = (vector(channels), Lanes::of(&client, channels / vector(channels)));
        let types = [element(&x), element(written.as_ref().unwrap_or(&x)), element(&y)];
        // Safe: a unit reads and writes rows below `rows`, vectors below `vectors`.
        unsafe {
            add_and_normalise_rows::launch_unchecked(
                &client,
                cubes(&client, rows.div_ceil(lanes.rows() as usize)),
                CubeDim::new_1d(UNITS),
                addresses(&[&x, &weight, &y]),
                vector,
                x.clone().into_buffer_arg(),
                written.map(|written| written.into_buffer_arg()).into(),
                weight.clone().into_buffer_arg(),
                sum.clone().map(|sum| sum.into_buffer_arg()).into(),
                y.clone().into_buffer_arg(),
                inverses.clone().into_buffer_arg(),
                rows,
                channels / vector,
                eps,
                lanes.row,
                lanes.plane,
                types,
            );
        }
    }
    (y, Kept { x: sum.unwrap_or(x), weight, inverses })
}

/// The gradient of what was normalised, `others` added to it, and the same once more in the type `narrow`.
fn back_to_x(
    Kept { x, weight, inverses }: &Kept,
    y_grad: &CubeTensor,
    others: Option<CubeTensor>,
    narrow: Option<DType>,
) -> (CubeTensor, Option<CubeTensor>) {
    let (rows, channels) = sizes(x);
    let x_grad = empty(x, x.shape(), x.dtype);
    let narrowed = narrow.map(|dtype| empty(x, x.shape(), dtype));
    if rows * channels > 0 {
        let (vector, lanes) = (vector(channels), Lanes::of(&x.client, channels / vector(channels)));
        let types = [element(x), element(y_grad), element_of(narrow.unwrap_or(x.dtype))];
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
                others.map(|others| others.into_buffer_arg()).into(),
                x_grad.clone().into_buffer_arg(),
                narrowed.clone().map(|narrowed| narrowed.into_buffer_arg()).into(),
                rows,
                channels / vector,
                lanes.row,
                lanes.plane,
                types,
            );
        }
    }
    (x_grad, narrowed)
}

fn back_to_weight(Kept { x, inverses, .. }: &Kept, y_grad: &CubeTensor) -> CubeTensor {
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
                [element(x), element(y_grad)],
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
fn add_and_normalise_rows<F: Float, W: Float, Y: Float, N: Size>(
    x: &[Vector<F, N>],
    written: ComptimeOption<&[Vector<W, N>]>,
    weight: &[Vector<f32, N>],
    mut sum: ComptimeOption<&mut [Vector<F, N>]>,
    y: &mut [Vector<Y, N>],
    inverses: &mut [f32],
    rows: usize,
    vectors: usize,
    eps: f32,
    #[comptime] lanes: u32,
    #[comptime] plane: u32,
    #[define(F, W, Y)] _types: [ElemType; 3],
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
            let value = total(x, &written, start + at);
            squares += value * value;
            at += lanes_wide;
        }
    }
    let squares = reduce_row(squares.vector_sum(), &mut shared, lanes, plane, false);
    if row < rows {
        let channels = f32::cast_from(vectors * N::value());
        let inverse = 1.0f32 / (squares / channels + eps).sqrt();
        let mut at = lane;
        while at < vectors {
            let value = total(x, &written, start + at);
            #[comptime]
            if let ComptimeOption::Some(sum) = &mut sum {
                sum[start + at] = Vector::cast_from(value);
            }
            y[start + at] = Vector::cast_from(value * Vector::new(inverse) * weight[at]);
            at += lanes_wide;
        }
        if lane == 0 {
            inverses[row] = inverse;
        }
    }
}

/// What is normalised: the sum as it is kept, rounded to its type.
#[cube]
fn total<F: Float, W: Float, N: Size>(
    x: &[Vector<F, N>],
    written: &ComptimeOption<&[Vector<W, N>]>,
    at: usize,
) -> Vector<f32, N> {
    let value = Vector::<f32, N>::cast_from(x[at]);
    #[comptime]
    match written {
        ComptimeOption::Some(written) => {
            let value = value + Vector::<f32, N>::cast_from(written[at]);
            Vector::<f32, N>::cast_from(Vector::<F, N>::cast_from(value))
        }
        ComptimeOption::None => value,
    }
}

/// With `n = x / rms`: `(w y' - n mean(w y' n)) / rms`, and `others`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn normalise_back<F: Float, Y: Float, W: Float, N: Size>(
    x: &[Vector<F, N>],
    weight: &[Vector<f32, N>],
    inverses: &[f32],
    y_grad: &[Vector<Y, N>],
    others: ComptimeOption<&[Vector<F, N>]>,
    x_grad: &mut [Vector<F, N>],
    mut narrowed: ComptimeOption<&mut [Vector<W, N>]>,
    rows: usize,
    vectors: usize,
    #[comptime] lanes: u32,
    #[comptime] plane: u32,
    #[define(F, Y, W)] _types: [ElemType; 3],
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
    let products = reduce_row(products.vector_sum(), &mut shared, lanes, plane, false);
    if row < rows {
        let channels = f32::cast_from(vectors * N::value());
        let slope = products * inverse * inverse / channels;
        let mut at = lane;
        while at < vectors {
            let value = Vector::<f32, N>::cast_from(x[start + at]);
            let grad = Vector::<f32, N>::cast_from(y_grad[start + at]) * weight[at];
            let mut grad = (grad - value * Vector::new(slope)) * Vector::new(inverse);
            #[comptime]
            if let ComptimeOption::Some(others) = &others {
                grad += Vector::<f32, N>::cast_from(others[start + at]);
            }
            x_grad[start + at] = Vector::cast_from(grad);
            #[comptime]
            if let ComptimeOption::Some(narrowed) = &mut narrowed {
                narrowed[start + at] = Vector::cast_from(grad);
            }
            at += lanes_wide;
        }
    }
}

/// A unit adds up a column of its rows: every so many-th, so that neighbours read what lies together.
#[cube(launch_unchecked, address_type = "dynamic")]
fn weight_back<F: Float, Y: Float, N: Size>(
    x: &[Vector<F, N>],
    inverses: &[f32],
    y_grad: &[Vector<Y, N>],
    parts: &mut [Vector<f32, N>],
    rows: usize,
    vectors: usize,
    #[define(F, Y)] _types: [ElemType; 2],
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
