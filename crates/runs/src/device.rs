//! The one place that opens a device.

use burn::tensor::Device;
use polyhead_kernels::{find_cublaslt, use_cublaslt, use_tensor_cores};
use polyhead_models::Precision;
use polyhead_recipe::{DEVICES, device_name, has_own_memory, parse_device};
use polyhead_training::available_memory_bytes;
use polyhead_training::config::{Products, TrainingConfig};

#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod gpu;

/// The device of that name, without autodiff. Never Burn's default device, which prefers a GPU that may not be there.
///
/// # Errors
/// If there is no such name, the backend is not compiled in, or it has no such device that works.
pub fn open(name: &str) -> Result<Device, String> {
    let name = device_name(name);
    match parse_device(name)? {
        ("flex", _) => Ok(Device::flex()),
        #[cfg(feature = "ndarray")]
        #[allow(deprecated)] // kept for comparing numbers
        ("ndarray", _) => Ok(Device::ndarray()),
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        (kind, which) if gpu::is_compiled_in(kind) => gpu::open(kind, which, name),
        (kind, _) => Err(format!(
            "device {name}: this binary was built without it; build with `cargo build --release --features {kind}` (docs: GPUs), or use \
             flex"
        )),
    }
}

/// The device of that name for a model whose products run in `precision`.
///
/// # Errors
/// As [`open`], and if the device does not compute in that type.
pub fn open_for(name: &str, precision: Precision) -> Result<Device, String> {
    let device = open(name)?;
    match device.supports_dtype(precision.dtype()) {
        true => Ok(device),
        false => Err(format!(
            "training.precision = \"{}\": device {name}{} does not compute in it; \"f32\" works everywhere",
            precision.name(),
            product(&device).map_or(String::new(), |product| format!(" ({product})")),
        )),
    }
}

/// The device that `[training]` names, of the rank of this number on its machine where there are several. What the table says about
/// kernels counts for the whole process from here on.
///
/// # Errors
/// As [`open_for`], and if products are to go through a library that is not there.
pub fn open_for_training(training: &TrainingConfig, rank: Option<usize>) -> Result<Device, String> {
    let name = rank.map_or_else(|| training.device.clone(), |rank| of_rank(&training.device, rank));
    let device = open_for(&name, training.precision)?;
    let by_library = training.products == Products::Cublaslt;
    if by_library {
        find_cublaslt(&device).map_err(|problem| {
            format!("training.products = \"cublaslt\" on device {name}: {problem}; \"burn\" works on every device")
        })?;
    }
    use_cublaslt(by_library);
    use_tensor_cores(training.tensor_cores);
    Ok(device)
}

/// The device of the rank of this number on its machine: where the name is that of a kind of GPU, each rank has one of its own, as long
/// as there are enough.
#[allow(unused_variables)] // without a GPU backend there is nothing to divide
fn of_rank(name: &str, rank: usize) -> String {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if let Ok((kind, polyhead_recipe::Which::First)) = parse_device(device_name(name))
        && gpu::is_compiled_in(kind)
    {
        let all = gpu::names(kind);
        return all.get(rank % all.len().max(1)).cloned().unwrap_or_else(|| name.to_owned());
    }
    name.to_owned()
}

/// What the device calls itself, where it is a GPU: "NVIDIA H100".
#[allow(unused_variables)] // without a GPU backend there is nothing to ask
pub fn product(device: &Device) -> Option<String> {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    return gpu::product(device);
    #[cfg(not(any(feature = "cuda", feature = "wgpu")))]
    None
}

/// Memory that a run on the device of that name can have, in bytes: what the machine has left or, of a GPU, all of its own;
/// `None` where nothing tells.
pub fn memory_bytes(name: &str) -> Option<u64> {
    if !has_own_memory(name) {
        return available_memory_bytes();
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    return open(name).ok().as_ref().and_then(gpu::memory_bytes);
    #[cfg(not(any(feature = "cuda", feature = "wgpu")))]
    None
}

/// Whether this binary was built with the backend of a kind of device.
fn is_built_in(kind: &str) -> bool {
    match kind {
        "flex" => true,
        "ndarray" => cfg!(feature = "ndarray"),
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        _ => gpu::is_compiled_in(kind),
        #[cfg(not(any(feature = "cuda", feature = "wgpu")))]
        _ => false,
    }
}

/// A device that was asked for: its name, and what it calls itself or why it cannot be used.
pub type Found = (String, Result<Option<String>, String>);

/// What this binary can run on here.
pub struct Devices {
    /// Every device of the kinds that were built in, with what it calls itself or why it cannot be used.
    pub found: Vec<Found>,
    /// Kinds that were not built in, which are the names of features, too.
    pub not_built_in: Vec<&'static str>,
}

/// Looks for devices of every kind.
pub fn all() -> Devices {
    let (built_in, not_built_in): (Vec<&str>, Vec<&str>) = DEVICES.into_iter().partition(|kind| is_built_in(kind));
    let of_kind = |kind: &str| match kind {
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        kind if gpu::is_compiled_in(kind) => gpu::names(kind),
        kind => vec![kind.to_owned()],
    };
    let found = |name: String| {
        let device = open(&name).map(|device| product(&device));
        (name, device)
    };
    Devices { found: built_in.into_iter().flat_map(of_kind).map(found).collect(), not_built_in }
}

#[cfg(test)]
mod tests {
    use polyhead_kernels::{cublaslt_wanted, tensor_cores_wanted};

    use super::*;

    fn training(more: &str) -> TrainingConfig {
        toml::from_str(&format!("steps = 1\nbatch_size = 1\n{more}")).expect("settings")
    }

    /// One test, because the choices count for the whole process.
    #[test]
    fn what_a_recipe_says_about_kernels_reaches_them() {
        for (more, wanted) in [("tensor_cores = false", false), ("", true), ("tensor_cores = true", true)] {
            open_for_training(&training(more), None).expect("a device");
            assert_eq!(tensor_cores_wanted(), wanted, "{more}");
        }
        let problem = open_for_training(&training("products = \"cublaslt\""), None).expect_err("no library");
        assert!(problem.contains("training.products = \"cublaslt\" on device flex: "), "{problem}");
        assert!(problem.contains("cuda") && problem.contains("\"burn\" works on every device"), "{problem}");
        assert!(!cublaslt_wanted(), "a run that does not begin changes nothing");
    }
}
