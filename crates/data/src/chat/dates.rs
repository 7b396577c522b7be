//! The day that templates get when they ask for today's: a fixed one, so that a run can be repeated.

use chrono::{NaiveDate, NaiveTime};

/// A day, at midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Day(NaiveDate);

/// Given to templates that ask for today's date, unless a recipe sets another; chosen by us.
pub(super) const DEFAULT: &str = "2025-01-01";

/// Codes of `strftime` that chrono writes as C and Python write them in the C locale.
const CODES: &str = "YCymdejBbhAawuUWVGgHMSIklpPDFTRrcxXnt%";

impl Day {
    /// Reads `2025-01-31`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let day = NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?;
        // It would read 2025-1-31 and +2025-01-31, too.
        (day.to_string() == text && !text.starts_with('0')).then_some(Self(day))
    }

    /// As `strftime` of C and Python writes it in the C locale.
    ///
    /// # Errors
    /// If the format has a code that is none.
    pub(super) fn format(self, format: &str) -> Result<String, String> {
        let (mut out, mut signs) = (String::new(), format.chars());
        while let Some(sign) = signs.next() {
            if sign != '%' {
                out.push(sign);
                continue;
            }
            let code = signs.next();
            // `%-d`: without the zero or space that fills up.
            let (bare, code) = if code == Some('-') { (true, signs.next()) } else { (false, code) };
            let piece = match code {
                Some('f') => "000000".into(),
                Some('z' | 'Z') => String::new(),
                Some(code) if CODES.contains(code) => {
                    self.0.and_time(NaiveTime::MIN).format(&format!("%{code}")).to_string()
                }
                _ => return Err(format!("strftime_now: the format \"{format}\" has a code that is not known")),
            };
            let trimmed = piece.trim_start_matches(['0', ' ']);
            out.push_str(match bare {
                true if trimmed.is_empty() => "0",
                true => trimmed,
                false => &piece,
            });
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Values of Python's `datetime.strftime`.
    #[test]
    fn days_are_written_as_python_writes_them() {
        const ALL: &str = "%Y %y %m %d %e %-d %-m %j %B %b %A %a %w %u %U %W %V %G %H:%M:%S %I %p %D %F %c %%";
        for (day, expected) in [
            (
                "2024-07-26",
                "2024 24 07 26 26 26 7 208 July Jul Friday Fri 5 5 29 30 30 2024 00:00:00 12 AM 07/26/24 2024-07-26 Fri Jul 26 \
                 00:00:00 2024 %",
            ),
            (
                "2025-01-01",
                "2025 25 01 01  1 1 1 001 January Jan Wednesday Wed 3 3 00 00 01 2025 00:00:00 12 AM 01/01/25 2025-01-01 Wed \
                 Jan  1 00:00:00 2025 %",
            ),
            (
                "2000-02-29",
                "2000 00 02 29 29 29 2 060 February Feb Tuesday Tue 2 2 09 09 09 2000 00:00:00 12 AM 02/29/00 2000-02-29 Tue \
                 Feb 29 00:00:00 2000 %",
            ),
            (
                "2021-01-03",
                "2021 21 01 03  3 3 1 003 January Jan Sunday Sun 0 7 01 00 53 2020 00:00:00 12 AM 01/03/21 2021-01-03 Sun Jan  \
                 3 00:00:00 2021 %",
            ),
        ] {
            assert_eq!(Day::parse(day).unwrap().format(ALL).unwrap(), expected);
        }
        let day = Day::parse(DEFAULT).unwrap();
        assert!(day.format("%Q").is_err() && day.format("a%").is_err());
        for wrong in ["2025-02-29", "+2025-01-01", "2025-13-01", "2025-1-1", "today", "2025-00-10", "2025-01-01T00"] {
            assert_eq!(Day::parse(wrong), None, "{wrong}");
        }
    }
}
