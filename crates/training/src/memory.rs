//! How much memory the process has used, and how much there is.

/// The largest resident set so far, in bytes; `None` where the system does not tell.
pub fn peak_memory_bytes() -> Option<u64> {
    read("/proc/self/status", "VmHWM:")
}

/// What can be allocated before the system runs out or a limit of the process is met, in bytes; `None` where nothing tells.
pub fn available_memory_bytes() -> Option<u64> {
    let of_system = read("/proc/meminfo", "MemAvailable:");
    // `ulimit -v`, as clusters set it.
    let limit = number("/proc/self/limits", "Max address space");
    let of_process = limit.map(|limit| limit.saturating_sub(read("/proc/self/status", "VmSize:").unwrap_or(0)));
    [of_system, of_process, of_container()].into_iter().flatten().min()
}

/// What the control group of the process leaves: the limit of a container, in either version of its files. Files that the
/// system keeps in memory make room for whoever needs it.
fn of_container() -> Option<u64> {
    let groups = [
        ["memory.max", "memory.current", "memory.stat"],
        ["memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"],
    ];
    groups.into_iter().find_map(|[limit, used, stat]| {
        let read = |name: &str, key: &str| number(&format!("/sys/fs/cgroup/{name}"), key);
        let (limit, used) = (read(limit, "")?, read(used, "")?);
        let files = ["inactive_file ", "active_file "].iter().filter_map(|key| read(stat, key)).sum();
        Some(limit.saturating_sub(used.saturating_sub(files)))
    })
}

/// A number of kibibytes, in bytes.
fn read(file: &str, key: &str) -> Option<u64> {
    Some(number(file, key)? * 1024)
}

/// The number behind a key of a file; `None` where there is none, or it is a word such as `unlimited`.
fn number(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}
