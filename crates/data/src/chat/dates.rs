//! The day that templates get when they ask for today's: a fixed one, so that a run can be repeated.

/// A day of the Gregorian calendar, at midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Day {
    year: i64,
    month: usize,
    day: i64,
}

/// Given to templates that ask for today's date, unless a recipe sets another; chosen by us.
pub(super) const DEFAULT: &str = "2025-01-01";

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Day {
    /// Reads `2025-01-31`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split('-').collect();
        let [year, month, day] = parts[..] else { return None };
        let digits = |part: &str, count: usize| part.len() == count && part.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(year, 4) || !digits(month, 2) || !digits(day, 2) {
            return None;
        }
        let (year, month, day) = (year.parse().ok()?, month.parse().ok()?, day.parse().ok()?);
        let this = Self { year, month, day };
        ((1..=12).contains(&month) && year > 0 && (1..=this.length()).contains(&day)).then_some(this)
    }

    fn leap(year: i64) -> bool {
        (year % 4 == 0 && year % 100 != 0) || year % 400 == 0
    }

    /// Days of its month.
    fn length(self) -> i64 {
        [31, if Self::leap(self.year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][self.month - 1]
    }

    /// Of the year, from 1.
    fn ordinal(self) -> i64 {
        let before = (1..self.month).map(|month| Self { month, ..self }.length());
        before.sum::<i64>() + self.day
    }

    /// 0 is Sunday.
    fn weekday(self) -> i64 {
        let years = self.year - 1;
        (365 * years + years / 4 - years / 100 + years / 400 + self.ordinal()).rem_euclid(7)
    }

    /// Its year and week by ISO 8601.
    fn iso(self) -> (i64, i64) {
        let from_monday = (self.weekday() + 6) % 7;
        let week = (self.ordinal() - 1 - from_monday + 10) / 7;
        let weeks = |year: i64| {
            let first = Self { year, month: 1, day: 1 }.weekday();
            if first == 4 || (first == 3 && Self::leap(year)) { 53 } else { 52 }
        };
        match week {
            0 => (self.year - 1, weeks(self.year - 1)),
            week if week > weeks(self.year) => (self.year + 1, 1),
            week => (self.year, week),
        }
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
            let (bare, code) = match code {
                Some('-') => (true, signs.next()),
                code => (false, code),
            };
            let piece = code.and_then(|code| self.piece(code));
            let piece =
                piece.ok_or_else(|| format!("strftime_now: the format \"{format}\" has a code that is not known"))?;
            let trimmed = piece.trim_start_matches(['0', ' ']);
            out.push_str(match bare {
                true if trimmed.is_empty() => "0",
                true => trimmed,
                false => &piece,
            });
        }
        Ok(out)
    }

    fn piece(self, code: char) -> Option<String> {
        let Self { year, month, day } = self;
        let (weekday, ordinal) = (self.weekday(), self.ordinal());
        let (month_name, day_name) = (MONTHS[month - 1], DAYS[weekday as usize]);
        let week = |first: i64| (ordinal + 6 - (weekday - first).rem_euclid(7)) / 7;
        let (iso_year, iso_week) = self.iso();
        let combined = |format: &str| self.format(format).ok();
        Some(match code {
            'Y' => year.to_string(),
            'C' => format!("{:02}", year / 100),
            'y' => format!("{:02}", year % 100),
            'm' => format!("{month:02}"),
            'd' => format!("{day:02}"),
            'e' => format!("{day:>2}"),
            'j' => format!("{ordinal:03}"),
            'B' => month_name.into(),
            'b' | 'h' => month_name[..3].into(),
            'A' => day_name.into(),
            'a' => day_name[..3].into(),
            'w' => weekday.to_string(),
            'u' => (if weekday == 0 { 7 } else { weekday }).to_string(),
            'U' => format!("{:02}", week(0)),
            'W' => format!("{:02}", week(1)),
            'V' => format!("{iso_week:02}"),
            'G' => iso_year.to_string(),
            'g' => format!("{:02}", iso_year % 100),
            'H' | 'M' | 'S' => "00".into(),
            'I' => "12".into(),
            'k' => " 0".into(),
            'l' => "12".into(),
            'p' => "AM".into(),
            'P' => "am".into(),
            'f' => "000000".into(),
            'z' | 'Z' => String::new(),
            'D' | 'x' => combined("%m/%d/%y")?,
            'F' => combined("%Y-%m-%d")?,
            'T' | 'X' => combined("%H:%M:%S")?,
            'R' => combined("%H:%M")?,
            'r' => combined("%I:%M:%S %p")?,
            'c' => combined("%a %b %e %H:%M:%S %Y")?,
            'n' => "\n".into(),
            't' => "\t".into(),
            '%' => "%".into(),
            _ => return None,
        })
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
        for wrong in ["2025-02-29", "2025-13-01", "2025-1-1", "today", "2025-00-10", "2025-01-01T00"] {
            assert_eq!(Day::parse(wrong), None, "{wrong}");
        }
    }
}
