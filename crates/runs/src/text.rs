//! Numbers, durations and arguments as text.

use std::time::Duration;

/// `1:02:03` or `2:03`.
pub fn clock(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

/// `12,345`
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}

/// `1.2 GiB`
pub fn bytes(number: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let power = (0..units.len()).rev().find(|&power| number >= 1 << (10 * power)).unwrap_or(0);
    let value = number as f64 / (1u64 << (10 * power)) as f64;
    if power == 0 { format!("{number} B") } else { format!("{value:.1} {}", units[power]) }
}

/// As it is typed into a shell.
pub fn quoted(argument: &str) -> String {
    let plain = |sign: char| sign.is_ascii_alphanumeric() || "=._-/:,+".contains(sign);
    if argument.chars().all(plain) { argument.to_owned() } else { format!("'{}'", argument.replace('\'', "'\\''")) }
}
