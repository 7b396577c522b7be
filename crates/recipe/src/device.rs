//! The names of `training.device`: a kind of device, and which one of the kind.

/// The kinds of device. All but "flex" exist where they are compiled in.
pub const DEVICES: [&str; 6] = ["flex", "ndarray", "cuda", "wgpu", "vulkan", "metal"];

/// What `training.device` may say, in words.
pub const DEVICE_NAMES: &str =
    "flex (or cpu), ndarray, cuda, cuda:N, wgpu, wgpu:N, wgpu:cpu, vulkan, vulkan:N, metal or metal:N";

/// Which device of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The one that the driver puts first.
    First,
    /// The GPU of this number, counted from 0 as `polyhead doctor` lists them.
    Nth(usize),
    /// The processor, through a driver that draws in software.
    Software,
}

/// The device that a name means: "cpu" is Burn's backend for it.
pub fn device_name(name: &str) -> &str {
    if name == "cpu" { "flex" } else { name }
}

/// The kind and number that a name gives: `cuda:1`, `wgpu:cpu`.
///
/// # Errors
/// If there is no such kind, or the kind has no such devices.
pub fn parse_device(name: &str) -> Result<(&str, Which), String> {
    let (kind, which) = name.split_once(':').map_or((name, None), |(kind, which)| (kind, Some(which)));
    let wrong = || format!("device {name:?} must be one of {DEVICE_NAMES}");
    if !DEVICES.contains(&kind) {
        return Err(wrong());
    }
    let numbered = !matches!(kind, "flex" | "ndarray");
    match which {
        None => Ok((kind, Which::First)),
        // Through SPIR-V, which "vulkan" means, products crash Mesa's software driver.
        Some("cpu") if kind == "wgpu" => Ok((kind, Which::Software)),
        Some(digits) if numbered && digits.bytes().all(|digit| digit.is_ascii_digit()) => {
            digits.parse().map(|number| (kind, Which::Nth(number))).map_err(|_| wrong())
        }
        Some(_) => Err(wrong()),
    }
}

/// Whether a device of this name has memory of its own, so that the machine's says nothing about what fits.
pub fn has_own_memory(name: &str) -> bool {
    parse_device(name).is_ok_and(|(kind, which)| !matches!(kind, "flex" | "ndarray") && which != Which::Software)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_give_a_kind_and_a_number() {
        assert_eq!(parse_device("flex"), Ok(("flex", Which::First)));
        assert_eq!(parse_device("cuda:1"), Ok(("cuda", Which::Nth(1))));
        assert_eq!(parse_device("wgpu"), Ok(("wgpu", Which::First)));
        assert_eq!(parse_device("wgpu:cpu"), Ok(("wgpu", Which::Software)));
        let wrong = [
            "",
            "gpu",
            "CUDA",
            "cuda:",
            "cuda:-1",
            "cuda:+1",
            "cuda:one",
            "cuda:0x1",
            "cuda:cpu",
            "metal:cpu",
            "vulkan:cpu",
            "flex:0",
            "ndarray:0",
            "wgpu:0:1",
            "wgpu: 0",
            "cuda:99999999999999999999999",
        ];
        for name in wrong {
            let error = parse_device(name).expect_err(name);
            assert!(error.contains("wgpu:cpu") && error.contains(name), "{error}");
        }
    }

    #[test]
    fn a_software_driver_takes_the_machines_memory() {
        assert!(has_own_memory("cuda:3") && has_own_memory("wgpu"));
        assert!(!has_own_memory("wgpu:cpu") && !has_own_memory("flex") && !has_own_memory("nonsense"));
    }
}
