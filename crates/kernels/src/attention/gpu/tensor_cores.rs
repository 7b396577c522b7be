//! The same kernels on the tensor cores of NVIDIA's GPUs: CUDA C++ (`crates/kernels/src/cuda`), which NVRTC compiles when one first
//! runs.
//!
//! They read the same plan and keep the same state as the portable ones, so that the two can be laid beside each other. Every number that is
//! known at run time comes in a buffer of words behind the tensors. Shared memory is fixed when they are compiled, at 36 KiB at most.

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::CubeDevice;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::attributes::BufferIOAttr;
use cubecl::ir::features::MmaConfig;
use cubecl::ir::settings::Dim3;
use cubecl::ir::{UIntKind, metadata::Info};
use cubecl::prelude::*;
use cubecl::server::{KernelArguments, MetadataBindingInfo};

use super::{Call, Kept, WIDEST};
use crate::gpu::launch::element;

/// Threads of a block, `THREADS` in `cuda/tiles.cuh`.
const THREADS: u32 = 128;
/// Queries or keys of a block, where a warp has one sixteen of them.
const TILE: usize = 64;

/// Whether this call runs on tensor cores: operands of 16 bits whose heads are sixteens wide, scores without a cap, on a card with the instructions
/// (compute capability 8.0), in a build with NVRTC, unless [`crate::use_tensor_cores`] said otherwise.
pub(super) fn take(q: &CubeTensor, v: &CubeTensor, call: &Call) -> bool {
    let widths = [q, v].map(|x| x.shape()[3]);
    cfg!(feature = "cuda-nvrtc")
        && crate::gpu::tensor_cores_wanted()
        && matches!(q.dtype, DType::F16 | DType::BF16)
        && widths.iter().all(|width| width.is_multiple_of(16) && (16..=WIDEST).contains(width))
        && call.cap.is_none()
        && call.scale > 0.0
        && multiply(q)
}

/// Whether the device has `mma.m16n8k16` for this type, and with it `cp.async`.
fn multiply(x: &CubeTensor) -> bool {
    let (operand, sum) = (element(x), f32::elem_type_native());
    let shape = MmaConfig { a_type: operand, b_type: operand, cd_type: sum, m: 16, n: 8, k: 16 };
    matches!(x.device, CubeDevice::Cuda(_)) && x.client.properties().features.matmul.mma.contains(&shape)
}

/// Output and logs of the sums, into those of `kept`.
pub(super) fn attend(kept: &Kept) {
    let kernel = Kernel::of(Entry::Attend, kept);
    let words = words(kept, [None; 4]);
    let inputs = [&kept.q, &kept.k, &kept.v, &kept.sinks, &kept.plan];
    kernel.launch(
        kept,
        kept.q.shape()[2].div_ceil(TILE * kernel.sixteens),
        &inputs,
        &[&kept.out, &kept.log_sums],
        words,
    );
}

pub(super) fn back_to_queries(kept: &Kept, out_grad: &CubeTensor, means: &CubeTensor, q_grad: &CubeTensor) {
    let words = words(kept, [Some(out_grad), Some(q_grad), None, None]);
    let inputs = [&kept.q, &kept.k, &kept.v, out_grad, &kept.log_sums, means, &kept.plan];
    Kernel::of(Entry::BackToQueries, kept).launch(kept, kept.q.shape()[2].div_ceil(TILE), &inputs, &[q_grad], words);
}

pub(super) fn back_to_keys(kept: &Kept, out_grad: &CubeTensor, means: &CubeTensor, grads: [&CubeTensor; 2]) {
    let words = words(kept, [Some(out_grad), None, Some(grads[0]), Some(grads[1])]);
    let inputs = [&kept.q, &kept.k, &kept.v, out_grad, &kept.log_sums, means, &kept.plan];
    Kernel::of(Entry::BackToKeys, kept).launch(kept, kept.k.shape()[2].div_ceil(TILE), &inputs, &grads, words);
}

/// `Call` of `cuda/tiles.cuh`; `more` are the gradients of output, queries, keys and values, as far as there are any.
fn words(kept: &Kept, more: [Option<&CubeTensor>; 4]) -> Vec<u64> {
    let [_, heads, queries, _] = kept.q.shape().dims::<4>();
    let sizes = [heads, queries, kept.k.shape()[2], kept.call.plan_row, usize::from(kept.call.sunk)];
    let strides = |tensor: Option<&CubeTensor>| tensor.map_or([0; 3], |x| [0, 1, 2].map(|axis| x.meta.strides()[axis]));
    let tensors = [&kept.q, &kept.k, &kept.v, &kept.out].map(Some).into_iter().chain(more);
    let sizes = sizes.into_iter().map(|size| size as u64);
    sizes
        .chain([f64::from(kept.call.scale).to_bits()])
        .chain(tensors.flat_map(strides).map(|stride| stride as u64))
        .collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Entry {
    Attend,
    BackToQueries,
    BackToKeys,
}

/// A kernel for heads of such widths and operands of such a type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Kernel {
    entry: Entry,
    width: usize,
    value_width: usize,
    dtype: DType,
    /// Sixteens of queries of a warp, in the forward.
    sixteens: usize,
}

impl Kernel {
    fn of(entry: Entry, kept: &Kept) -> Self {
        let [width, value_width] = [&kept.q, &kept.v].map(|x| x.shape()[3]);
        // More do not fit the registers of a thread.
        let sixteens = if width + value_width <= 128 { 2 } else { 1 };
        Self { entry, width, value_width, dtype: kept.q.dtype, sixteens }
    }

    /// Queues it for `blocks` tiles of every query head of every row of the batch.
    fn launch(self, kept: &Kept, blocks: usize, inputs: &[&CubeTensor], outputs: &[&CubeTensor], words: Vec<u64>) {
        let [batch, heads, ..] = kept.q.shape().dims::<4>();
        let buffers = inputs.iter().map(|input| (input, BufferIOAttr::ReadOnly));
        let buffers = buffers.chain(outputs.iter().map(|output| (output, BufferIOAttr::WriteOnly)));
        let arguments = buffers.fold(KernelArguments::new(), |arguments, (tensor, io)| {
            arguments.with_buffer_io(tensor.handle.clone().binding(), io)
        });
        let count = CubeCount::Static(blocks as u32, heads as u32, batch as u32);
        kept.q.client.launch(Box::new(self), count, arguments.with_info(MetadataBindingInfo::custom(words)));
    }

    /// Its name and its text.
    fn text(self) -> (&'static str, &'static str) {
        match self.entry {
            Entry::Attend => ("attend", include_str!("../../cuda/attend.cu")),
            Entry::BackToQueries => ("back_to_queries", include_str!("../../cuda/back_to_queries.cu")),
            Entry::BackToKeys => ("back_to_keys", include_str!("../../cuda/back_to_keys.cu")),
        }
    }
}

impl KernelMetadata for Kernel {
    /// Caches on disk know the program that filled them, and with it the text.
    fn id(&self) -> KernelId {
        KernelId::new::<Self>().cube_dim(Dim3::new_1d(THREADS)).info(*self)
    }

    fn address_type(&self) -> ElemType {
        ElemType::UInt(UIntKind::U64)
    }
}

impl CubeKernel for Kernel {
    /// Nothing: the text is what is compiled.
    fn define(&self) -> KernelDefinition {
        let settings = KernelSettings::new(Dim3::new_1d(THREADS), ExecutionMode::Unchecked, AddressType::U64);
        KernelDefinition { body: Scope::root(settings.clone()), settings, info: Info::default() }
    }

    fn source(&self) -> Option<PrecompiledSource> {
        let Self { width, value_width, dtype, sixteens, .. } = self;
        let (name, text) = self.text();
        let element = if *dtype == DType::F16 { "f16" } else { "bf16" };
        let head = format!(
            "#define WIDTH {width}\n#define VALUE_WIDTH {value_width}\n#define ELEMENT \"{element}\"\n\
             #define SIXTEENS {sixteens}\n"
        );
        let parts = [&head, include_str!("../../cuda/device.cuh"), include_str!("../../cuda/tiles.cuh"), text];
        Some(PrecompiledSource { source: parts.join("\n"), entrypoint_name: name.to_owned(), lang: "cuda" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_complete_and_has_the_kernel_that_is_launched() {
        for entry in [Entry::Attend, Entry::BackToQueries, Entry::BackToKeys] {
            let kernel = Kernel { entry, width: 64, value_width: 128, dtype: DType::BF16, sixteens: 1 };
            let PrecompiledSource { source, entrypoint_name, lang } = kernel.source().expect("a text");
            assert_eq!(lang, "cuda");
            assert_eq!(source.matches("extern \"C\" __global__").count(), 1);
            assert!(source.contains(&format!(") {entrypoint_name}(")), "no kernel {entrypoint_name}");
            assert!(source.starts_with("#define WIDTH 64\n#define VALUE_WIDTH 128\n#define ELEMENT \"bf16\"\n"));
            // NVRTC knows no folder of ours.
            assert!(!source.contains("#include"));
        }
    }
}
