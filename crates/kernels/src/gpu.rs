//! Operations with kernels of their own on GPUs, written in CubeCL, which makes CUDA, WGSL, SPIR-V and Metal of them.
//!
//! Operands are f32, f16 or bf16; what is added up is f32. Reductions go through shared memory, and through planes (warps)
//! where a device has them. Sizes are numbers at run time, widths of heads and the like are known when a kernel is compiled.

use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{Device, Tensor};

#[cfg(feature = "gpu")]
pub(crate) mod cross_entropy;
#[cfg(feature = "gpu")]
pub(crate) mod cublaslt;
#[cfg(feature = "gpu")]
pub(crate) mod elementwise;
#[cfg(any(test, feature = "cuda-nvrtc"))]
pub(crate) mod gemm;
#[cfg(feature = "gpu")]
pub(crate) mod launch;
#[cfg(feature = "gpu")]
pub(crate) mod rms_norm;
#[cfg(feature = "gpu")]
pub(crate) mod rope;
#[cfg(feature = "gpu")]
pub(crate) mod squares;

/// Whether tensors like this one go through kernels of our own: floats of 16 or 32 bits on a GPU. The one place that decides it, as
/// [`crate::cpu::fuses`] is for the CPU.
#[cfg(feature = "gpu")]
pub(crate) fn fuses<const D: usize>(tensor: &Tensor<D>) -> bool {
    use burn::backend::DispatchDevice;
    takes(tensor.dtype()) && matches!(tensor.device().inner().as_dispatch(), DispatchDevice::Cube(_))
}

/// Whether those kernels read and write numbers of this type.
#[cfg(feature = "gpu")]
pub(crate) fn takes(dtype: burn::tensor::DType) -> bool {
    use burn::tensor::DType;
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// There is none without the feature `gpu`.
#[cfg(not(feature = "gpu"))]
pub(crate) fn fuses<const D: usize>(_: &Tensor<D>) -> bool {
    false
}

/// Whether linear maps of tensors like this one are multiplied by a library in place of Burn: on NVIDIA's GPUs, where it was asked for.
#[cfg(feature = "gpu")]
pub(crate) fn multiplies<const D: usize>(x: &Tensor<D>) -> bool {
    cublaslt::multiplies(x)
}

/// There is none without the feature `gpu`.
#[cfg(not(feature = "gpu"))]
pub(crate) fn multiplies<const D: usize>(_: &Tensor<D>) -> bool {
    false
}

static TENSOR_CORES: AtomicBool = AtomicBool::new(true);

/// Whether attention may run on tensor cores, where the device has them: true unless said otherwise. For comparing the kernels that use
/// them with the portable ones; counts for the whole process, from the next forward on.
pub fn use_tensor_cores(wanted: bool) {
    TENSOR_CORES.store(wanted, Ordering::Relaxed);
}

/// What [`use_tensor_cores`] said last.
pub fn tensor_cores_wanted() -> bool {
    TENSOR_CORES.load(Ordering::Relaxed)
}

static CUBLASLT: AtomicBool = AtomicBool::new(false);

/// Whether products of linear maps on NVIDIA's GPUs go through cuBLASLt in place of Burn's kernels, where the library is found: false unless
/// said otherwise. Counts for the whole process, from the next forward on.
pub fn use_cublaslt(wanted: bool) {
    CUBLASLT.store(wanted, Ordering::Relaxed);
}

/// What [`use_cublaslt`] said last.
pub fn cublaslt_wanted() -> bool {
    CUBLASLT.load(Ordering::Relaxed)
}

/// Whether products on this device can go through cuBLASLt.
///
/// # Errors
/// If this build, the device, its driver or the machine's libraries lack something, with the way out.
#[cfg(feature = "cuda-nvrtc")]
pub fn find_cublaslt(device: &Device) -> Result<(), String> {
    cublaslt::find(device)
}

/// There is none without the feature `cuda-nvrtc`.
#[cfg(not(feature = "cuda-nvrtc"))]
pub fn find_cublaslt(_: &Device) -> Result<(), String> {
    Err("this binary was built without it; build with `cargo build --release --features cuda-nvrtc` (docs: GPUs)"
        .into())
}
