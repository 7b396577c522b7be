//! [`crate::attention()`] in tiles (FlashAttention-2, Dao 2023, arXiv 2307.08691): no matrix of scores exists, forward or backward, so that
//! memory grows with the length of the sequence.
//!
//! The mask is a range of keys for every query, and the mean of these for every tile of queries: tiles that nobody sees are never
//! computed. The backward makes the weights again, once for the gradients of the queries and once for those of keys and
//! values; heads that are shared get theirs from every query head, added up at the end. What ranges do not say, biases
//! and widths above 128 are left to blocks of queries (`attention/blocks.rs`).
//!
//! The kernels are written twice: for the units of any GPU (`kernels.rs`), and for tensor cores, where there are some (`tensor_cores.rs`).

// Burn passes the tensors of an operation on one by one.
#![allow(clippy::too_many_arguments)]

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, Cube, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{DType, Int, Shape, Tensor, TensorData};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::{AddressType, CubeCount, CubeDim};

use super::{AttentionOptions, HeadMap};
use crate::differentiable::{InputGrads, Wanted, differentiable};
use crate::gpu::launch::{self, Lanes, addresses, by_position, cubes, element, empty, in_vectors, shared_memory};
use crate::in_type;
use crate::mask::Visible;

mod kernels;
mod tensor_cores;
mod tiles;

use kernels::Form;
use tiles::{TILE, UNITS};

/// The widest heads: more do not fit the registers of a unit.
const WIDEST: usize = 128;
/// The fewest queries: tiles of 64 waste their time on less, and with few cubes at once a long cache is read faster by products.
/// Chosen by us.
const FEWEST: usize = 16;
/// Bytes of shared memory that a cube takes at most.
const SHARED: usize = 29 << 10;

/// Whether this call goes through tiles.
pub(crate) fn takes([q, k, v]: [&Tensor<4>; 3], visible: &Visible, options: &AttentionOptions<'_>) -> bool {
    let widths = [q.dims()[3], v.dims()[3]];
    crate::gpu::fuses(q)
        && [k.dtype(), v.dtype()] == [q.dtype(); 2]
        && q.dims()[2] >= FEWEST
        && widths.iter().all(|width| width.is_multiple_of(4) && *width <= WIDEST)
        && options.bias.is_none()
        && !visible.in_pieces()
        && shared_memory(q) >= SHARED
}

/// `[batch, query heads, queries, value width]`. See [`crate::attention()`].
pub(crate) fn attention([q, k, v]: [Tensor<4>; 3], visible: &Visible, options: &AttentionOptions<'_>) -> Tensor<4> {
    let device = q.device();
    let (heads, key_heads, value_heads) = (q.dims()[1], k.dims()[1], v.dims()[1]);
    let maps = [options.keys.of(heads, key_heads), options.values.of(heads, value_heads)];
    let call = Call {
        scale: options.scale_for(&q) as f32,
        cap: options.softcap.map(|cap| cap as f32),
        sunk: options.sinks.is_some(),
        maps: [options.keys.clone(), options.values.clone()],
        plan_row: visible.plan_row(TILE),
    };
    let plan = plan(&maps, visible);
    let plan = Tensor::<1, Int>::from_data(TensorData::new(plan.clone(), [plan.len()]), (&device, DType::I32));
    let sinks = options.sinks.clone().map(|sinks| in_type(sinks, DType::F32));
    let sinks = sinks.unwrap_or_else(|| Tensor::zeros([1], (&device, DType::F32)));
    Tensor::from_dispatch(Dispatch::tiled_attention(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        sinks.into_dispatch(),
        plan.into_dispatch(),
        call,
    ))
}

/// What a kernel is told of heads and mask: for every query head its key head and its value head; then, for every row of the batch that has a
/// mask of its own, the range of keys of every tile of queries, and of every query.
fn plan([keys, values]: &[Vec<usize>; 2], visible: &Visible) -> Vec<i32> {
    let heads = keys.iter().zip(values).flat_map(|(&key, &value)| [key as i32, value as i32]);
    heads.chain(visible.in_tiles(TILE)).collect()
}

/// The settings of a call.
#[derive(Debug, Clone, PartialEq)]
struct Call {
    scale: f32,
    cap: Option<f32>,
    /// Whether `sinks` are some.
    sunk: bool,
    /// Of keys, of values.
    maps: [HeadMap; 2],
    /// Numbers of the plan from one row of the batch to the next; 0 where all share them.
    plan_row: usize,
}

/// Tiled attention as an operation of Burn's dispatching backend.
#[backend_extension(Cube, Autodiff)]
trait TiledAttention: Backend {
    /// # Shapes
    /// As in [`crate::attention()`]; sinks: `[heads]`, plan: as `plan` makes it.
    fn tiled_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        plan: IntTensor<Self>,
        call: Call,
    ) -> FloatTensor<Self>;
}

impl TiledAttention for Cube {
    fn tiled_attention(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        sinks: CubeTensor,
        plan: CubeTensor,
        call: Call,
    ) -> CubeTensor {
        forward([q, k, v, sinks], plan, call).0
    }
}

impl<C: CheckpointStrategy> TiledAttention for Autodiff<Cube, C> {
    fn tiled_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        plan: IntTensor<Self>,
        call: Call,
    ) -> FloatTensor<Self> {
        let run = |inputs: [CubeTensor; 4], _: Wanted<4>| {
            let (out, kept) = forward(inputs, plan, call);
            (out, kept, ())
        };
        differentiable::<Cube, C, _, _, 4>([q, k, v, sinks], run, backward).0
    }
}

/// What the backward needs.
#[derive(Debug, Clone)]
struct Kept {
    q: CubeTensor,
    k: CubeTensor,
    v: CubeTensor,
    sinks: CubeTensor,
    plan: CubeTensor,
    out: CubeTensor,
    /// `[batch, heads, queries]`
    log_sums: CubeTensor,
    call: Call,
    /// Whether the kernels are those for tensor cores.
    tensor_cores: bool,
}

impl Kept {
    /// Neighbours that its kernels read at once.
    fn vector(tensor_cores: bool) -> usize {
        if tensor_cores { 8 } else { 4 }
    }

    fn form(&self) -> Form {
        // A unit has every eighth vector of four.
        let columns = |x: &CubeTensor| x.shape()[3].div_ceil(32);
        Form {
            width: columns(&self.q),
            value_width: columns(&self.v),
            capped: self.call.cap.is_some(),
            sunk: self.call.sunk,
        }
    }

    /// Cubes for tiles of so many rows of each query head.
    fn cubes(&self, rows: usize) -> CubeCount {
        let [batch, heads, ..] = self.q.shape().dims::<4>();
        CubeCount::Static(rows.div_ceil(TILE) as u32, heads as u32, batch as u32)
    }

    fn addresses(&self) -> AddressType {
        addresses(&[&self.q, &self.k, &self.v, &self.out])
    }
}

fn forward([q, k, v, sinks]: [CubeTensor; 4], plan: CubeTensor, call: Call) -> (CubeTensor, Kept) {
    let tensor_cores = tensor_cores::take(&q, &v, &call);
    let [q, k, v] = [q, k, v].map(|x| in_vectors(x, Kept::vector(tensor_cores)));
    let [batch, heads, queries, _] = q.shape().dims::<4>();
    let out = by_position(&q, [batch, heads, queries, v.shape()[3]]);
    let log_sums = empty(&q, [batch, heads, queries], DType::F32);
    let kept = Kept { q, k, v, sinks: into_contiguous(sinks), plan, out, log_sums, call, tensor_cores };
    if tensor_cores {
        tensor_cores::attend(&kept);
        return (kept.out.clone(), kept);
    }
    // Safe: rows and columns are compared with the sizes of their tensors, ranges and heads are those of `plan`.
    unsafe {
        kernels::attend::launch_unchecked(
            &kept.q.client,
            kept.cubes(queries),
            CubeDim::new_1d(UNITS as u32),
            kept.addresses(),
            kept.q.clone().into_tensor_arg(),
            kept.k.clone().into_tensor_arg(),
            kept.v.clone().into_tensor_arg(),
            kept.sinks.clone().into_buffer_arg(),
            kept.plan.clone().into_buffer_arg(),
            kept.out.clone().into_tensor_arg(),
            kept.log_sums.clone().into_buffer_arg(),
            kept.call.scale,
            kept.call.cap.unwrap_or(1.0),
            kept.call.plan_row,
            kept.form(),
            element(&kept.q),
        );
    }
    (kept.out.clone(), kept)
}

fn backward(kept: Kept, out_grad: CubeTensor, [of_q, of_k, of_v, of_sinks]: Wanted<4>) -> InputGrads<Cube, 4> {
    let out_grad = in_vectors(out_grad, Kept::vector(kept.tensor_cores));
    let means = mean_grads(&kept, &out_grad);
    let q_grad = of_q.then(|| back_to_queries(&kept, &out_grad, &means));
    let (k_grad, v_grad) = match of_k || of_v {
        true => {
            let (k_grad, v_grad) = back_to_keys(&kept, &out_grad, &means);
            let [of_keys, of_values] = &kept.call.maps;
            (of_k.then(|| gathered(k_grad, of_keys, &kept.k)), of_v.then(|| gathered(v_grad, of_values, &kept.v)))
        }
        false => (None, None),
    };
    let sink_grad = (of_sinks && kept.call.sunk).then(|| {
        let heads = kept.q.shape()[1];
        let sinks = Cube::float_reshape(kept.sinks.clone(), Shape::new([1, heads, 1]));
        let weights = Cube::float_exp(Cube::float_sub(sinks, kept.log_sums.clone()));
        let grads = Cube::float_neg(Cube::float_mul(weights, means));
        Cube::float_reshape(Cube::float_sum_dim(Cube::float_sum_dim(grads, 2), 0), Shape::new([heads]))
    });
    [q_grad, k_grad, v_grad, sink_grad]
}

/// `[batch, heads, queries]`: the mean gradient of a row's weights.
fn mean_grads(kept: &Kept, out_grad: &CubeTensor) -> CubeTensor {
    let [batch, heads, queries, width] = kept.out.shape().dims::<4>();
    let (client, rows) = (&kept.out.client, batch * heads * queries);
    let lanes = Lanes::of(client, width / 4);
    let means = empty(&kept.q, [batch, heads, queries], DType::F32);
    // Safe: rows and columns are compared with the sizes of their tensors.
    unsafe {
        kernels::multiply_rows::launch_unchecked(
            client,
            cubes(client, rows.div_ceil(lanes.rows() as usize)),
            CubeDim::new_1d(launch::UNITS),
            kept.addresses(),
            kept.out.clone().into_tensor_arg(),
            out_grad.clone().into_tensor_arg(),
            means.clone().into_buffer_arg(),
            rows,
            lanes.row,
            lanes.plane,
            element(&kept.out),
        );
    }
    means
}

fn back_to_queries(kept: &Kept, out_grad: &CubeTensor, means: &CubeTensor) -> CubeTensor {
    let q_grad = by_position(&kept.q, kept.q.shape().dims::<4>());
    if kept.tensor_cores {
        tensor_cores::back_to_queries(kept, out_grad, means, &q_grad);
        return q_grad;
    }
    // Safe: as in the forward.
    unsafe {
        kernels::back_to_queries::launch_unchecked(
            &kept.q.client,
            kept.cubes(kept.q.shape()[2]),
            CubeDim::new_1d(UNITS as u32),
            kept.addresses(),
            kept.q.clone().into_tensor_arg(),
            kept.k.clone().into_tensor_arg(),
            kept.v.clone().into_tensor_arg(),
            out_grad.clone().into_tensor_arg(),
            kept.log_sums.clone().into_buffer_arg(),
            means.clone().into_buffer_arg(),
            kept.plan.clone().into_buffer_arg(),
            q_grad.clone().into_tensor_arg(),
            kept.call.scale,
            kept.call.cap.unwrap_or(1.0),
            kept.call.plan_row,
            kept.form(),
            element(&kept.q),
        );
    }
    q_grad
}

/// Gradients of keys and values, `[batch, query heads, keys, width]`.
fn back_to_keys(kept: &Kept, out_grad: &CubeTensor, means: &CubeTensor) -> (CubeTensor, CubeTensor) {
    let [batch, heads, ..] = kept.q.shape().dims::<4>();
    let of = |x: &CubeTensor| by_position(x, [batch, heads, x.shape()[2], x.shape()[3]]);
    let (k_grad, v_grad) = (of(&kept.k), of(&kept.v));
    if kept.tensor_cores {
        tensor_cores::back_to_keys(kept, out_grad, means, [&k_grad, &v_grad]);
        return (k_grad, v_grad);
    }
    // Safe: as in the forward.
    unsafe {
        kernels::back_to_keys::launch_unchecked(
            &kept.q.client,
            kept.cubes(kept.k.shape()[2]),
            CubeDim::new_1d(UNITS as u32),
            kept.addresses(),
            kept.q.clone().into_tensor_arg(),
            kept.k.clone().into_tensor_arg(),
            kept.v.clone().into_tensor_arg(),
            out_grad.clone().into_tensor_arg(),
            kept.log_sums.clone().into_buffer_arg(),
            means.clone().into_buffer_arg(),
            kept.plan.clone().into_buffer_arg(),
            k_grad.clone().into_tensor_arg(),
            v_grad.clone().into_tensor_arg(),
            kept.call.scale,
            kept.call.cap.unwrap_or(1.0),
            kept.call.plan_row,
            kept.form(),
            element(&kept.q),
        );
    }
    (k_grad, v_grad)
}

/// The sum over the query heads that read each head of `like`.
fn gathered(grad: CubeTensor, map: &HeadMap, like: &CubeTensor) -> CubeTensor {
    let [batch, shared, seq, width] = like.shape().dims::<4>();
    let heads = grad.shape()[1];
    match map {
        HeadMap::Even if heads == shared => grad,
        HeadMap::Even => {
            let by_position = Cube::float_swap_dims(grad, 1, 2);
            let split = Cube::float_reshape(by_position, Shape::new([batch, seq, shared, heads / shared, width]));
            let sum = Cube::float_reshape(Cube::float_sum_dim(split, 3), Shape::new([batch, seq, shared, width]));
            Cube::float_swap_dims(sum, 1, 2)
        }
        HeadMap::Each(map) => {
            let heads_of = |own: usize| (0..heads).filter(move |&head| map[head] == own);
            let one = |head: usize| {
                let slices = [0..batch, head..head + 1, 0..seq, 0..width].map(burn::tensor::Slice::from);
                Cube::float_slice(grad.clone(), &slices)
            };
            let nothing = || Cube::float_zeros(Shape::new([batch, 1, seq, width]), &like.device(), like.dtype.into());
            let sums = (0..shared).map(|own| heads_of(own).map(one).reduce(Cube::float_add).unwrap_or_else(nothing));
            Cube::float_cat(sums.collect(), 1)
        }
    }
}
