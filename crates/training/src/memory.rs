//! How much memory the process has used, and how much there is.

/// The largest resident set so far, in bytes; `None` where the system does not tell.
pub fn peak_memory_bytes() -> Option<u64> {
    read("/proc/self/status", "VmHWM:")
}

/// What can be allocated before the system runs out, in bytes; `None` where it does not tell.
pub fn available_memory_bytes() -> Option<u64> {
    read("/proc/meminfo", "MemAvailable:")
}

fn read(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024)
}
