//! The one place that names a kind of device.

use burn::tensor::Device;
use polyhead_recipe::DEVICES;

/// The device of that name, without autodiff. Never Burn's default device, which prefers a GPU that may not be there.
///
/// # Errors
/// If the backend is not compiled in, or has no device.
pub fn open(name: &str) -> Result<Device, String> {
    match name {
        "flex" => Ok(Device::flex()),
        #[cfg(feature = "ndarray")]
        #[allow(deprecated)] // kept for comparing numbers
        "ndarray" => Ok(Device::ndarray()),
        #[cfg(feature = "cuda")]
        "cuda" => {
            // Without a driver the first operation would panic on the device's thread; asking for the list does not.
            if Device::enumerate(burn::tensor::DeviceType::Cuda).is_empty() {
                return Err("device cuda: no CUDA device found (is a driver installed?); training.device = \"flex\" uses the CPU".into());
            }
            Ok(Device::cuda(0))
        }
        known if DEVICES.contains(&known) => Err(format!(
            "device {known}: this binary was built without it; build with `cargo build --release --features {known}`, or use flex"
        )),
        other => Err(format!("device {other}: must be one of {}", DEVICES.join(", "))),
    }
}

/// Names of the devices that this binary can use here.
pub fn usable() -> Vec<&'static str> {
    DEVICES.into_iter().filter(|name| open(name).is_ok()).collect()
}
