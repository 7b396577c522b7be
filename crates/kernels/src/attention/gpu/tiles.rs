//! The two products that attention is made of, of one tile: 64 rows of one matrix with 64 rows of another, and what comes out of it with
//! the rows of a third.
//!
//! A cube has 128 units, 16 down and 8 across. What they read lies in shared memory as vectors of four numbers, in rows that
//! are one vector longer than they need be, so that neighbours read from different banks; what they add up stays in registers.

use cubecl::prelude::*;

/// Queries, and keys, of a tile.
pub(super) const TILE: usize = 64;
/// Units of a cube.
pub(super) const UNITS: usize = DOWN * ACROSS;
const DOWN: usize = 16;
const ACROSS: usize = 8;
/// Rows and columns of a tile that a unit computes, and groups of four columns.
pub(super) const ROWS: usize = TILE / DOWN;
pub(super) const GROUPS: usize = TILE / ACROSS / 4;
/// Products that a unit adds up.
pub(super) const SCORES: usize = ROWS * GROUPS * 4;

/// Vectors of a row's part that is in shared memory at a time, and of its place there.
const DEPTH: usize = 8;
const DEPTH_PLACE: usize = DEPTH + 1;
/// Vectors of a buffer of such parts.
pub(super) const PART: usize = TILE * DEPTH_PLACE;
/// Vectors of the place of a row of a tile, and of a tile.
pub(super) const TILE_PLACE: usize = TILE / 4 + 1;
pub(super) const WHOLE: usize = TILE * TILE_PLACE;

/// Four numbers that are read, written and multiplied together.
pub(super) type Four<F> = Vector<F, Const<4>>;

/// Rows of a head, from the first of a tile on, in vectors.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Rows {
    /// Where the first starts.
    pub start: usize,
    /// From one to the next.
    pub stride: usize,
    /// How many there are.
    pub count: usize,
    /// How wide they are.
    pub width: usize,
}

/// The rows of `tensor`, `[batch, heads, seq, width]`, of a head from `first` on.
#[cube]
pub(super) fn rows_of<F: Float>(tensor: &Tensor<Four<F>>, batch: usize, head: usize, first: usize) -> Rows {
    let start = batch * tensor.stride(0) + head * tensor.stride(1) + first * tensor.stride(2);
    rows(start, tensor.stride(2), tensor.shape(2) - first, tensor.shape(3))
}

/// The same of a tensor that is written.
#[cube]
pub(super) fn rows_of_output<F: Float>(tensor: &mut Tensor<Four<F>>, batch: usize, head: usize, first: usize) -> Rows {
    let start = batch * tensor.stride(0) + head * tensor.stride(1) + first * tensor.stride(2);
    rows(start, tensor.stride(2), tensor.shape(2) - first, tensor.shape(3))
}

/// From numbers in elements.
#[cube]
fn rows(start: usize, stride: usize, count: usize, width: usize) -> Rows {
    Rows { start: start / 4, stride: stride / 4, count, width: width / 4 }
}

/// The rows and columns of the tile that a unit computes: rows `down + 16 r`, columns `4 (across + 8 g) + j`.
#[cube]
pub(super) fn place() -> (usize, usize) {
    let unit = UNIT_POS as usize;
    (unit / ACROSS, unit % ACROSS)
}

/// `products[r, g, j] = left[row] · right[column]` for the unit's rows and columns. The buffers are written; who reads `left_part` or
/// `right_part` before has to be done with it, and is waited for.
#[cube]
pub(super) fn row_products<F: Float>(
    products: &mut Array<f32>,
    left: &[Four<F>],
    left_rows: Rows,
    right: &[Four<F>],
    right_rows: Rows,
    left_part: &mut Shared<[Four<f32>]>,
    right_part: &mut Shared<[Four<f32>]>,
) {
    let (down, across) = place();
    #[unroll]
    for index in 0..SCORES {
        products[index] = 0.0f32;
    }
    let mut from = 0usize;
    while from < left_rows.width {
        sync_cube();
        load_part(left, left_rows, from, left_part, false);
        load_part(right, right_rows, from, right_part, true);
        sync_cube();
        let steps = usize::min(left_rows.width - from, DEPTH.runtime());
        for at in 0..steps {
            let mut lefts = Array::<Four<f32>>::new(ROWS);
            #[unroll]
            for r in 0..ROWS {
                lefts[r] = left_part[(down + DOWN * r) * DEPTH_PLACE + at];
            }
            #[unroll]
            for g in 0..GROUPS {
                #[unroll]
                for j in 0..4usize {
                    // Columns are in the order that `load_part` gives them.
                    let column = right_part[(across + ACROSS * g + j * (TILE / 4)) * DEPTH_PLACE + at];
                    #[unroll]
                    for r in 0..ROWS {
                        let index = comptime!((r * GROUPS + g) * 4 + j);
                        #[unroll]
                        for lane in 0..4usize {
                            products[index] += lefts[r].extract(lane) * column.extract(lane);
                        }
                    }
                }
            }
        }
        from += DEPTH;
    }
}

/// Vectors `from..from + 8` of the rows of a tile; zeros where there are none. As columns, every fourth lies beside the other, so
/// that units that compute four neighbours each read from different banks.
#[cube]
fn load_part<F: Float>(
    matrix: &[Four<F>],
    rows: Rows,
    from: usize,
    part: &mut Shared<[Four<f32>]>,
    #[comptime] columns: bool,
) {
    #[unroll]
    for turn in 0..comptime!(TILE * DEPTH / UNITS) {
        let index = UNIT_POS as usize + turn * UNITS;
        let (row, at) = (index / DEPTH, index % DEPTH);
        let mut value = Four::<f32>::new(0.0f32);
        if row < rows.count && from + at < rows.width {
            value = Four::<f32>::cast_from(matrix[rows.start + row * rows.stride + from + at]);
        }
        let place = if comptime!(columns) { row % 4 * (TILE / 4) + row / 4 } else { row };
        part[place * DEPTH_PLACE + at] = value;
    }
}

/// Writes what the unit computed of a tile.
#[cube]
pub(super) fn write_tile(products: &Array<f32>, tile: &mut Shared<[Four<f32>]>) {
    let (down, across) = place();
    #[unroll]
    for r in 0..ROWS {
        #[unroll]
        for g in 0..GROUPS {
            let mut four = Four::<f32>::new(0.0f32);
            #[unroll]
            for j in 0..4usize {
                four.insert(j, products[comptime!((r * GROUPS + g) * 4 + j)]);
            }
            tile[(down + DOWN * r) * TILE_PLACE + across + ACROSS * g] = four;
        }
    }
}

/// `sums[r, c] += tile[row] · matrix`, for the unit's rows and the vectors `across + 8 c` of the columns, of which there are `columns`. Who
/// writes the tile before is waited for.
#[cube]
pub(super) fn add_tile_product<F: Float>(
    sums: &mut Array<Four<f32>>,
    tile: &Shared<[Four<f32>]>,
    matrix: &[Four<F>],
    rows: Rows,
    part: &mut Shared<[Four<f32>]>,
    #[comptime] columns: usize,
) {
    let (down, across) = place();
    let wide = comptime!(columns * ACROSS);
    // As many rows as the buffer has room for.
    let together = comptime!(if wide * 64 <= PART {
        64
    } else if wide * 32 <= PART {
        32
    } else {
        16
    });
    for turn in 0..comptime!(TILE / together) {
        let first = turn * together;
        sync_cube();
        #[unroll]
        for load in 0..comptime!(together * wide / UNITS) {
            let index = UNIT_POS as usize + load * UNITS;
            let (row, column) = (index / wide, index % wide);
            let mut value = Four::<f32>::new(0.0f32);
            if first + row < rows.count && column < rows.width {
                value = Four::<f32>::cast_from(matrix[rows.start + (first + row) * rows.stride + column]);
            }
            part[index] = value;
        }
        sync_cube();
        for at in 0..comptime!(together / 4) {
            let mut lefts = Array::<Four<f32>>::new(ROWS);
            #[unroll]
            for r in 0..ROWS {
                lefts[r] = tile[(down + DOWN * r) * TILE_PLACE + first / 4 + at];
            }
            #[unroll]
            for j in 0..4usize {
                #[unroll]
                for c in 0..columns {
                    let right = part[(at * 4 + j) * wide + across + ACROSS * c];
                    #[unroll]
                    for r in 0..ROWS {
                        sums[comptime!(r * columns + c)] += Four::<f32>::new(lefts[r].extract(j)) * right;
                    }
                }
            }
        }
    }
}

/// Zeros for [`add_tile_product`].
#[cube]
pub(super) fn no_sums(#[comptime] columns: usize) -> Array<Four<f32>> {
    let mut sums = Array::<Four<f32>>::new(comptime!(ROWS * columns));
    #[unroll]
    for index in 0..comptime!(ROWS * columns) {
        sums[index] = Four::<f32>::new(0.0f32);
    }
    sums
}

/// Writes the sums of the unit's rows, those that there are.
#[cube]
pub(super) fn write_sums<F: Float>(
    sums: &Array<Four<f32>>,
    matrix: &mut [Four<F>],
    rows: Rows,
    #[comptime] columns: usize,
) {
    let (down, across) = place();
    #[unroll]
    for r in 0..ROWS {
        let row = down + DOWN * r;
        #[unroll]
        for c in 0..columns {
            let column = across + ACROSS * c;
            if row < rows.count && column < rows.width {
                matrix[rows.start + row * rows.stride + column] = Vector::cast_from(sums[comptime!(r * columns + c)]);
            }
        }
    }
}
