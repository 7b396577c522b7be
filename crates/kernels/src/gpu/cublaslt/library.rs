//! NVIDIA's library, which is looked for when it is first asked for, and what it has of its own on a device: a stream, a workspace,
//! the algorithms that it chose.
//!
//! Order. CubeCL queues kernels on streams that it does not give away. So the library's stream waits for all that the device's context was
//! given before a product, and everything that the context is given later waits for the product, by two events
//! (`cuCtxRecordEvent`, `cuCtxWaitEvent`, of CUDA 12.5). It happens in `Client::exclusive`, on the thread that hands CubeCL's work to the
//! driver, so that nothing is handed over in between.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt::Display;
use std::sync::Arc;

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::Client;
use cubecl::server::Handle;
use cubecl_cuda::CudaRuntime;
use cubecl_runtime::runtime::Runtime;
use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::{CUcontext, CUevent, CUresult, culib};
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr};

use crate::gpu::gemm::{Gemm, Operand};

/// Bytes that the library may take beside the matrices: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;
/// The largest alignment that algorithms ask for, in bytes.
const ALIGNMENT: u64 = 256;
/// Products add up in f32, and in the same order each time: parts of a sum are added in f32 too, and not by whoever comes first.
const SUMS_OF_PARTS: u32 = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;

thread_local! {
    /// By number of the device: on the thread that hands over its work.
    static LIBRARIES: RefCell<HashMap<usize, Result<Library, String>>> = RefCell::default();
}

/// Opens the library on the device of this number, if it is not open.
///
/// # Errors
/// If the library is not there, or the driver lacks something.
pub(super) fn find(client: &Client, device: usize) -> Result<(), String> {
    exclusive(client, || on(device, |library| library.as_ref().map(|_| ()).map_err(String::clone)))
}

/// Writes the product of the tensors to `product`, as `gemm` says; gives false if the library has no algorithm for it, or is not there.
///
/// # Panics
/// If the tensors are smaller than `gemm` says, or the device fails.
pub(super) fn multiply(device: usize, gemm: Gemm, [left, right, product]: [&CubeTensor; 3]) -> bool {
    let (client, dtype) = (&product.client, product.dtype);
    assert!([left.dtype, right.dtype] == [dtype; 2], "a product of {:?} and {:?}", left.dtype, right.dtype);
    // Of the first operand, the second and the product, as `gemm` has them.
    let handles = [right, left, product].map(|tensor| tensor.handle.clone());
    let multiplied = exclusive(client, move || {
        on(device, |library| match library {
            Ok(library) => library.multiply(client, Call { gemm, dtype, alignments: [0; 3] }, handles),
            Err(_) => Ok(false),
        })
    });
    multiplied.unwrap_or_else(|problem| panic!("a product through cuBLASLt fails: {problem}"))
}

/// Runs `task` on the thread that hands the device's work over.
fn exclusive<T: Send + 'static>(client: &Client, task: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    client.exclusive(task).map_err(|problem| format!("{problem:?}"))?
}

/// Hands `task` the library on the device of this number, or why it cannot be opened.
fn on<T>(device: usize, task: impl FnOnce(&mut Result<Library, String>) -> T) -> T {
    LIBRARIES.with_borrow_mut(|libraries| task(libraries.entry(device).or_insert_with(|| Library::open(device))))
}

/// A product that the library chooses an algorithm for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Call {
    gemm: Gemm,
    dtype: DType,
    /// Of the first operand, the second and the product, in bytes.
    alignments: [u32; 3],
}

/// What the library needs for a product, made once for each of them and kept as long as the process.
#[derive(Clone, Copy)]
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    /// Of the first operand, the second and the product.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// `cuCtxRecordEvent` and `cuCtxWaitEvent`.
type OfContext = unsafe extern "C" fn(CUcontext, CUevent) -> CUresult;

/// The library on a device.
struct Library {
    handle: sys::cublasLtHandle_t,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    workspace: CudaSlice<u8>,
    /// What a product waits for, and what waits for a product.
    events: [CudaEvent; 2],
    record: OfContext,
    wait: OfContext,
    /// None where the library has no algorithm.
    plans: HashMap<Call, Option<Plan>>,
}

impl Library {
    fn open(device: usize) -> Result<Self, String> {
        // SAFETY: libraries of NVIDIA's are loaded and nothing in them is called.
        if !unsafe { sys::is_culib_present() } {
            return Err("libcublasLt is not found: it comes with CUDA's toolkit and with PyTorch, and LD_LIBRARY_PATH names its \
                        folder"
                .into());
        }
        // The context that CubeCL's own work is in: there is one primary context of a device.
        let context = CudaContext::new(device).map_err(words)?;
        let stream = context.new_stream().map_err(words)?;
        Ok(Self {
            handle: result::create_handle().map_err(words)?,
            workspace: stream.alloc_zeros(WORKSPACE).map_err(words)?,
            events: [context.new_event(None).map_err(words)?, context.new_event(None).map_err(words)?],
            record: of_context(c"cuCtxRecordEvent")?,
            wait: of_context(c"cuCtxWaitEvent")?,
            plans: HashMap::new(),
            context,
            stream,
        })
    }

    /// See [`multiply`]; `tensors` are those of `call`, whose alignments are filled in here.
    fn multiply(&mut self, client: &Client, call: Call, tensors: [Handle; 3]) -> Result<bool, String> {
        let mut found = Vec::with_capacity(3);
        for tensor in tensors {
            let resource = client.get_resource::<<CudaRuntime as Runtime>::Server>(tensor);
            // Held until everything later waits for the product, so that the memory stays what it is.
            found.push(resource.map_err(|problem| format!("a tensor cannot be reached: {problem:?}"))?);
        }
        let places: Vec<_> = found.iter().map(|found| (found.resource().ptr, found.resource().size)).collect();
        let operands = [call.gemm.first, call.gemm.second, call.gemm.product];
        for (operand, (_, bytes)) in operands.iter().zip(&places) {
            let needed = (operand.span() * call.dtype.size()) as u64;
            assert!(needed <= *bytes, "a matrix of {needed} bytes in a tensor of {bytes}");
        }
        let alignments = std::array::from_fn(|index| alignment(places[index].0));
        let Some(plan) = self.plan(Call { alignments, ..call })? else { return Ok(false) };
        let [first, second, product] = std::array::from_fn(|index| places[index].0);
        let [before, after] = &self.events;
        let (workspace, _in_use) = self.workspace.device_ptr(&self.stream);
        let [one, zero] = [1.0f32, 0.0];
        let [first_layout, second_layout, layout] = plan.layouts;
        // SAFETY: the context and the event are alive, and the event belongs to the context.
        unsafe { (self.record)(self.context.cu_ctx(), before.cu_event()) }.result().map_err(words)?;
        self.stream.wait(before).map_err(words)?;
        // SAFETY: the plan was made by this library for matrices of this shape, type and alignment, each of which lies within memory of its
        // own that lives until the product is done: it is held here, and whoever gets it later waits for the product. Nobody else has the
        // product's memory, whose old values are not read (zero times them). The workspace is used on this stream alone. The factors
        // are read before the call returns.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                first as *const c_void,
                first_layout,
                second as *const c_void,
                second_layout,
                product as *const c_void,
                layout,
                product as *mut c_void,
                layout,
                &plan.algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                self.stream.cu_stream().cast(),
            )
        }
        .map_err(words)?;
        after.record(&self.stream).map_err(words)?;
        // SAFETY: as above.
        unsafe { (self.wait)(self.context.cu_ctx(), after.cu_event()) }.result().map_err(words)?;
        Ok(true)
    }

    fn plan(&mut self, call: Call) -> Result<Option<Plan>, String> {
        if let Some(plan) = self.plans.get(&call) {
            return Ok(*plan);
        }
        let plan = self.planned(call)?;
        self.plans.insert(call, plan);
        Ok(plan)
    }

    fn planned(&self, Call { gemm, dtype, alignments }: Call) -> Result<Option<Plan>, String> {
        use sys::cublasLtMatmulDescAttributes_t::{CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB};
        use sys::cublasLtMatmulPreferenceAttributes_t as Wish;

        let element = match dtype {
            DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
            DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
            DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
            other => return Err(format!("no products of {other:?}")),
        };
        let layout = |operand: Operand| {
            let Operand { rows, columns, stride, .. } = operand;
            result::create_matrix_layout(element, rows as u64, columns as u64, stride as i64).map_err(words)
        };
        let layouts = [layout(gemm.first)?, layout(gemm.second)?, layout(gemm.product)?];
        // Not TF32, whose numbers have 11 bits.
        let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let operation = result::create_matmul_desc(sums, sys::cudaDataType_t::CUDA_R_32F).map_err(words)?;
        for (attribute, operand) in
            [(CUBLASLT_MATMUL_DESC_TRANSA, gemm.first), (CUBLASLT_MATMUL_DESC_TRANSB, gemm.second)]
        {
            let transposed = i32::from(operand.transposed); // CUBLAS_OP_T and CUBLAS_OP_N
            // SAFETY: the operation was just made, and the attribute is of 32 bits.
            unsafe {
                result::set_matmul_desc_attribute(
                    operation,
                    attribute,
                    (&raw const transposed).cast(),
                    size_of::<i32>(),
                )
            }
            .map_err(words)?;
        }
        let wishes = result::create_matmul_pref().map_err(words)?;
        let [first, second, product] = alignments;
        for (wish, value) in [
            (Wish::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, SUMS_OF_PARTS),
            (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, first),
            (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, second),
            (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, product),
            (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, product),
        ] {
            // SAFETY: the wishes were just made, and these are of 32 bits.
            unsafe { result::set_matmul_pref_attribute(wishes, wish, (&raw const value).cast(), size_of::<u32>()) }
                .map_err(words)?;
        }
        let (wish, value) = (Wish::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE);
        // SAFETY: this one is of 64 bits.
        unsafe { result::set_matmul_pref_attribute(wishes, wish, (&raw const value).cast(), size_of::<usize>()) }
            .map_err(words)?;
        let [a, b, c] = layouts;
        // SAFETY: all of these were just made by this library.
        let chosen = unsafe { result::get_matmul_algo_heuristic(self.handle, operation, a, b, c, c, wishes) };
        // SAFETY: made above, and used no more.
        unsafe { result::destroy_matmul_pref(wishes) }.map_err(words)?;
        match chosen {
            Ok(chosen) => Ok(Some(Plan { operation, layouts, algorithm: chosen.algo })),
            Err(result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(problem) => Err(words(problem)),
        }
    }
}

/// A function of the driver's that takes a context and an event. It is looked up, because drivers and bindings before CUDA 12.5 have none.
fn of_context(name: &std::ffi::CStr) -> Result<OfContext, String> {
    // SAFETY: the driver is loaded, and `cuda.h` declares both functions of this type.
    let found = unsafe { culib().get::<OfContext>(name.to_bytes_with_nul()) };
    found
        .map(|function| *function)
        .map_err(|_| format!("the driver has no {}: it is older than CUDA 12.5", name.to_string_lossy()))
}

/// The largest power of two that an address is a multiple of, up to what algorithms ask for.
fn alignment(address: u64) -> u32 {
    (1 << address.trailing_zeros().min(ALIGNMENT.trailing_zeros())) as u32
}

fn words(problem: impl Display) -> String {
    problem.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_as_aligned_as_its_last_bits_say() {
        let addresses = [0x7f00_0000, 0x7f00_0080, 0x7f00_0002, 0x7f00_0030, 0x7f00_0001];
        assert_eq!(addresses.map(alignment), [256, 128, 2, 16, 1]);
    }

    /// Where the library or the driver is not there; the library is asked for first.
    #[test]
    fn what_is_missing_is_told_with_where_it_comes_from() {
        // SAFETY: as in `Library::open`.
        let (library, driver) = unsafe { (sys::is_culib_present(), cudarc::driver::sys::is_culib_present()) };
        let problem = || on(0, |library| library.as_ref().err().cloned());
        if !library {
            let problem = problem().expect("no library");
            assert!(problem.contains("libcublasLt is not found") && problem.contains("LD_LIBRARY_PATH"), "{problem}");
        } else if driver {
            assert_eq!(problem(), None);
        }
    }
}
