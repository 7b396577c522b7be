//! A part of a file of results that a benchmark writes anew.

use std::fs;
use std::io;
use std::path::Path;

/// Puts `text` between the marks of `kind` in `file`, whose other parts stay; at its end where there are none.
///
/// # Errors
/// Where the file cannot be read or written, is not UTF-8, or has a mark without the other.
pub fn replace(file: &Path, kind: &str, text: &str) -> io::Result<()> {
    let before = match fs::read_to_string(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        read => read?,
    };
    let (begin, end) = (format!("<!-- {kind} -->\n"), format!("<!-- end of {kind} -->\n"));
    let section = format!("{begin}{}\n{end}", text.trim_end());
    let after = match (before.find(&begin), before.find(&end)) {
        (Some(from), Some(to)) if from < to => format!("{}{section}{}", &before[..from], &before[to + end.len()..]),
        (None, None) if before.is_empty() => section,
        (None, None) => format!("{}\n\n{section}", before.trim_end()),
        _ => {
            let problem =
                format!("{}: {} and {} must come as a pair", file.display(), begin.trim_end(), end.trim_end());
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
    };
    fs::write(file, after)
}
