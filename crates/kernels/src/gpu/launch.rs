//! What every kernel needs: tensors of results, numbers of cubes, a sum over the units that share a row.

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Cube, DispatchDevice};
use burn::tensor::{DType, Shape, Tensor, bf16, f16};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::Client;
use cubecl::features::Plane;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::CubeCountSelection;

/// Units of a cube.
pub(crate) const UNITS: u32 = 256;

/// The type of a tensor's elements in a kernel.
pub(crate) fn element(tensor: &CubeTensor) -> ElemType {
    element_of(tensor.dtype)
}

/// The same of numbers of that type.
pub(crate) fn element_of(dtype: DType) -> ElemType {
    match dtype {
        DType::I32 => i32::elem_type_native(),
        DType::I64 => i64::elem_type_native(),
        DType::F32 => f32::elem_type_native(),
        DType::F16 => f16::elem_type_native(),
        DType::BF16 => bf16::elem_type_native(),
        other => panic!("no kernel of ours takes {other:?}: `gpu::fuses` lets floats of 16 and 32 bits through"),
    }
}

/// The type of addresses that reaches everything in these tensors.
pub(crate) fn addresses(tensors: &[&CubeTensor]) -> AddressType {
    tensors.iter().map(|tensor| tensor.required_address_type()).max().unwrap_or_default()
}

/// Bytes of shared memory of a cube, on the device of `tensor`.
pub(crate) fn shared_memory<const D: usize>(tensor: &Tensor<D>) -> usize {
    match tensor.device().inner().as_dispatch() {
        DispatchDevice::Cube(device) => device.client().properties().hardware.max_shared_memory_size,
        _ => 0,
    }
}

/// A contiguous tensor without values, on the device of `like`.
pub(crate) fn empty(like: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    burn_cubecl::ops::numeric::empty_device_contiguous_dtype(client, device, shape.into(), dtype)
}

/// The tensor with rows that start at whole vectors of so many numbers; copies only where it has to.
pub(crate) fn in_vectors(tensor: CubeTensor, numbers: usize) -> CubeTensor {
    let strides = tensor.meta.strides();
    let fits = strides[3] == 1 && (0..3).all(|axis| strides[axis].is_multiple_of(numbers));
    let starts = (tensor.handle.offset_start.unwrap_or(0) as usize).is_multiple_of(numbers * tensor.elem_size());
    if fits && starts && !tensor.meta.is_tiled() { tensor } else { into_contiguous(tensor) }
}

/// An empty tensor `[batch, heads, seq, width]` laid out as `[batch, seq, heads, width]`: joining its heads costs no copy.
pub(crate) fn by_position(like: &CubeTensor, [batch, heads, seq, width]: [usize; 4]) -> CubeTensor {
    Cube::float_swap_dims(empty(like, [batch, seq, heads, width], like.dtype), 1, 2)
}

/// Channels that a unit reads at once: 4 where rows are multiples of it.
pub(crate) fn vector(channels: usize) -> usize {
    if channels.is_multiple_of(4) { 4 } else { 1 }
}

/// At least so many cubes, in as many dimensions as the device needs for them.
pub(crate) fn cubes(client: &Client, count: usize) -> CubeCount {
    let count = u32::try_from(count).unwrap_or_else(|_| panic!("{count} cubes are more than a kernel can have"));
    CubeCountSelection::new(client, count).cube_count()
}

/// How the units of a cube share rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Lanes {
    /// Units of a row: a power of two.
    pub row: u32,
    /// Units of a plane; 0 where sums go through shared memory.
    pub plane: u32,
}

impl Lanes {
    /// For rows of so many vectors.
    pub(crate) fn of(client: &Client, vectors: usize) -> Self {
        let hardware = &client.properties().hardware;
        let row = (vectors as u32).next_power_of_two().clamp(8, UNITS);
        let sizes = (hardware.plane_size_min, hardware.plane_size_max);
        let planes = client.properties().features.plane.contains(Plane::Ops) && sizes.0 == sizes.1 && sizes.0 <= row;
        Self { row, plane: if planes { sizes.0 } else { 0 } }
    }

    /// Rows of a cube.
    pub(crate) fn rows(self) -> u32 {
        UNITS / self.row
    }
}

/// The sum of `value` over the `row` units of a row, or the largest; all of them get it. Every unit of the cube has to call it; `shared` has
/// a number per unit and can be used again after a `sync_cube`.
#[cube]
pub(crate) fn reduce_row(
    value: f32,
    shared: &mut Shared<[f32]>,
    #[comptime] row: u32,
    #[comptime] plane: u32,
    #[comptime] largest: bool,
) -> f32 {
    let unit = UNIT_POS as usize;
    let first = UNIT_POS - UNIT_POS % row;
    if comptime!(plane == 0) {
        shared[unit] = value;
        sync_cube();
        #[unroll]
        for halving in 0..comptime!(row.ilog2()) {
            let reach = comptime!(row >> (halving + 1));
            if UNIT_POS % row < reach {
                shared[unit] = both(shared[unit], shared[unit + reach as usize], largest);
            }
            sync_cube();
        }
        shared[first as usize]
    } else {
        let part = if comptime!(largest) { plane_max(value) } else { plane_sum(value) };
        if comptime!(row == plane) {
            part
        } else {
            shared[unit] = part;
            sync_cube();
            let mut all = shared[first as usize];
            #[unroll]
            for index in 1..comptime!(row / plane) {
                all = both(all, shared[(first + index * plane) as usize], largest);
            }
            all
        }
    }
}

#[cube]
fn both(a: f32, b: f32, #[comptime] largest: bool) -> f32 {
    if comptime!(largest) { f32::max(a, b) } else { a + b }
}
