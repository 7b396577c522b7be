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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_arguments_as_people_read_them() {
        let clocks = [59, 61, 3600].map(|seconds| clock(Duration::from_secs(seconds)));
        assert_eq!(clocks, ["0:59", "1:01", "1:00:00"]);
        assert_eq!([0, 999, 1_000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0, 1023, 1024, 5 << 30].map(bytes), ["0 B", "1023 B", "1.0 KiB", "5.0 GiB"]);
        assert_eq!(quoted("a/b=1"), "a/b=1");
        assert_eq!(quoted("it's here"), "'it'\\''s here'");
    }
}
