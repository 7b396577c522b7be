//! GPUs, through Burn's CubeCL backends: which there are, and whether they work.
//!
//! Burn's own constructors always succeed; without a driver the first operation then panics on a thread of its own. Here the list
//! of devices is asked first and the first kernel runs under guard, so that what is missing is an error with a way out.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::{CubeDevice, DispatchDevice};
use burn::tensor::{Device, DeviceType, Tensor};
use polyhead_recipe::Which;

/// Whether this binary has the backend.
pub(super) fn is_compiled_in(kind: &str) -> bool {
    device_type(kind).is_some()
}

fn device_type(kind: &str) -> Option<DeviceType> {
    match kind {
        #[cfg(feature = "cuda")]
        "cuda" => Some(DeviceType::Cuda),
        #[cfg(feature = "wgpu")]
        "wgpu" => Some(DeviceType::Wgpu),
        #[cfg(feature = "vulkan")]
        "vulkan" => Some(DeviceType::Vulkan),
        #[cfg(feature = "metal")]
        "metal" => Some(DeviceType::Metal),
        _ => None,
    }
}

/// See [`super::open`].
pub(super) fn open(kind: &str, which: Which, name: &str) -> Result<Device, String> {
    let (gpus, software) = devices(kind)?;
    let found = match which {
        Which::First => gpus.first(),
        Which::Nth(number) => gpus.get(number),
        Which::Software if cfg!(feature = "vulkan") => {
            return Err(format!(
                "device {name}: this binary was built with --features vulkan, and products through SPIR-V crash Mesa's software \
                 driver; build with --features wgpu, or use flex"
            ));
        }
        Which::Software => software.first(),
    };
    let device = found.ok_or_else(|| missing(kind, which, name, gpus.len(), software.len()))?.clone();
    works(&device, name).map(|()| device)
}

/// The names of all devices of a kind; that of the kind alone where there is none.
pub(super) fn names(kind: &str) -> Vec<String> {
    let (gpus, software) = devices(kind).unwrap_or_default();
    let software = software.iter().filter(|_| kind == "wgpu").map(|_| format!("{kind}:cpu")).take(1);
    let all: Vec<String> = (0..gpus.len()).map(|number| format!("{kind}:{number}")).chain(software).collect();
    if all.is_empty() { vec![kind.to_owned()] } else { all }
}

/// GPUs of a kind, and software drivers that run on the processor. Discrete GPUs come before integrated ones.
fn devices(kind: &str) -> Result<(Vec<Device>, Vec<Device>), String> {
    let Some(of_kind) = device_type(kind) else { return Ok(Default::default()) };
    let all = guarded(|| Device::enumerate(of_kind).into_vec());
    let all =
        all.map_err(|problem| format!("device {kind}: the driver cannot be asked for its devices ({problem})"))?;
    let (software, mut gpus): (Vec<_>, Vec<_>) = all.into_iter().partition(|device| rank(device) == SOFTWARE);
    gpus.sort_by_key(rank);
    Ok((gpus, software))
}

const SOFTWARE: usize = usize::MAX;

/// How a device stands among those of its kind; those of one rank keep the driver's order.
fn rank(device: &Device) -> usize {
    match device.as_dispatch() {
        #[cfg(feature = "wgpu")]
        DispatchDevice::Cube(CubeDevice::Wgpu(device)) => {
            use burn::backend::WgpuDeviceKind;
            match device.kind {
                WgpuDeviceKind::DiscreteGpu(_) => 0,
                WgpuDeviceKind::IntegratedGpu(_) => 1,
                WgpuDeviceKind::Cpu => SOFTWARE,
                _ => 2,
            }
        }
        _ => 0,
    }
}

fn missing(kind: &str, which: Which, name: &str, gpus: usize, software: usize) -> String {
    let driver = match kind {
        "cuda" => "NVIDIA's driver",
        "metal" => "macOS on a Mac with a GPU",
        _ => "a Vulkan driver (on Debian: mesa-vulkan-drivers, or NVIDIA's own)",
    };
    let way_out = "training.device = \"flex\" uses the processor";
    match (which, gpus) {
        (Which::Software, _) => format!(
            "device {name}: no software driver found (on Debian: apt-get install mesa-vulkan-drivers); {way_out}"
        ),
        (_, 0) if software > 0 => format!(
            "device {name}: no GPU found, only a software driver that runs on the processor: wgpu:cpu, for tests, is slow; {way_out}"
        ),
        (_, 0) => format!("device {name}: no {} device found; it needs {driver}; {way_out}", kind.to_uppercase()),
        (_, 1) => format!("device {name}: there is one {kind} device, {kind}:0"),
        (_, gpus) => format!("device {name}: there are {gpus} {kind} devices, {kind}:0 to {kind}:{}", gpus - 1),
    }
}

/// What is known of devices that have run a kernel, by name.
static TRIED: Mutex<BTreeMap<String, Result<(), String>>> = Mutex::new(BTreeMap::new());

/// Whether the device runs a kernel; asked once in a process.
fn works(device: &Device, name: &str) -> Result<(), String> {
    let mut tried = TRIED.lock().unwrap_or_else(PoisonError::into_inner);
    tried.entry(name.to_owned()).or_insert_with(|| first_kernel(device, name)).clone()
}

fn first_kernel(device: &Device, name: &str) -> Result<(), String> {
    let sum = guarded(|| (Tensor::<1>::ones([4], device) * 2.0).into_data().iter::<f32>().sum::<f32>());
    let problem = match sum {
        Ok(8.0) => return Ok(()),
        Ok(wrong) => format!("2 + 2 + 2 + 2 gives {wrong} there"),
        Err(problem) => problem,
    };
    let lower = problem.to_lowercase();
    let hint = if lower.contains("nvrtc") {
        "kernels are compiled by NVRTC: install libnvrtc and CUDA's headers, or build with --features cuda"
    } else if lower.contains("memory") {
        "other programs may hold its memory: `nvidia-smi` lists them"
    } else {
        "the driver may be older than CUDA 12 or Vulkan 1.2, or belong to another card; `polyhead doctor` tries all devices"
    };
    Err(format!(
        "device {name}: its first kernel fails ({problem}); {hint}; training.device = \"flex\" uses the processor"
    ))
}

/// What `call` gives, or the first panic of any thread in words: Burn runs devices on threads of their own, whose panics say
/// what is wrong, and the caller's only that they ended. Nothing is printed meanwhile.
fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    let said = Arc::new(Mutex::new(Vec::new()));
    let before = take_hook();
    set_hook(Box::new({
        let said = said.clone();
        move |panic: &PanicHookInfo<'_>| {
            let words =
                panic.payload_as_str().unwrap_or("no reason given").lines().next().unwrap_or_default().to_owned();
            said.lock().unwrap_or_else(PoisonError::into_inner).push(words);
        }
    }));
    let result = catch_unwind(AssertUnwindSafe(call));
    set_hook(before);
    let said = said.lock().unwrap_or_else(PoisonError::into_inner).first().cloned();
    result.map_err(|_| said.unwrap_or_else(|| "no reason given".into()))
}

/// See [`super::product`].
pub(super) fn product(device: &Device) -> Option<String> {
    cube(device).map(|device| device.client().properties().identity.name.clone())
}

/// All memory of the GPU, where its driver tells.
pub(super) fn memory_bytes(device: &Device) -> Option<u64> {
    cube(device)?.client().properties().memory.max_memory()
}

fn cube(device: &Device) -> Option<CubeDevice> {
    match device.clone().inner().as_dispatch() {
        DispatchDevice::Cube(device) => Some(device.clone()),
        _ => None,
    }
}
