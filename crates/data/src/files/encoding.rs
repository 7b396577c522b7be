//! What kind of file this is, where text is expected: UTF-8, or something else by its name.

use std::io::Read;
use std::path::Path;

use super::{open_regular, read_file};
use crate::DataError;
use crate::error::At;

/// Unpacked, a file may be this many times as large as it is, and so many bytes more; chosen by us. Text packs to a tenth.
const RATIO: u64 = 100;
const AT_LEAST: u64 = 64 << 20;

/// What a file is that is not text in UTF-8, where its beginning tells.
pub(crate) fn kind(bytes: &[u8]) -> Option<&'static str> {
    let starts = |with: &[u8]| bytes.starts_with(with);
    let zeros = |from: usize| bytes.iter().take(64).skip(from).step_by(2).all(|&byte| byte == 0);
    Some(match bytes {
        _ if starts(b"\xFF\xFE\0\0") || starts(b"\0\0\xFE\xFF") => {
            "UTF-32 text, not UTF-8 (iconv -f UTF-32 -t UTF-8 converts it)"
        }
        _ if starts(b"\xFF\xFE") || starts(b"\xFE\xFF") => {
            "UTF-16 text, not UTF-8 (iconv -f UTF-16 -t UTF-8 converts it)"
        }
        _ if bytes.len() >= 4 && zeros(1) && !zeros(0) => {
            "UTF-16 text, not UTF-8 (iconv -f UTF-16LE -t UTF-8 converts it)"
        }
        _ if bytes.len() >= 4 && zeros(0) && !zeros(1) => {
            "UTF-16 text, not UTF-8 (iconv -f UTF-16BE -t UTF-8 converts it)"
        }
        _ if starts(b"\x1F\x8B") => "a packed file (gzip -d unpacks it)",
        _ if starts(b"\x28\xB5\x2F\xFD") => "a packed file (zstd -d unpacks it)",
        _ if starts(b"BZh") => "a packed file (bzip2 -d unpacks it)",
        _ if starts(b"\xFD7zXZ\0") => "a packed file (xz -d unpacks it)",
        _ if starts(b"PK\x03\x04") => "a ZIP archive (unzip unpacks it)",
        _ if starts(b"PAR1") => {
            "a Parquet table (write it as JSON lines, with pandas: to_json(orient=\"records\", lines=True))"
        }
        _ if starts(b"ARROW1") => "an Arrow table (write it as JSON lines)",
        _ => return None,
    })
}

/// A file of JSON lines; one that gzip has packed is unpacked.
///
/// # Errors
/// If it cannot be read, or is something else than text: what.
pub(crate) fn read_rows(path: &Path) -> Result<Vec<u8>, DataError> {
    let bytes = read_file(path)?;
    let bytes = if bytes.starts_with(b"\x1F\x8B") { unpacked(&bytes, path)? } else { bytes };
    match kind(&bytes) {
        Some(kind) => Err(DataError::Unusable(format!("{} is {kind}", path.display()))),
        None => Ok(bytes),
    }
}

fn unpacked(bytes: &[u8], path: &Path) -> Result<Vec<u8>, DataError> {
    let most = RATIO * bytes.len() as u64 + AT_LEAST;
    let mut out = Vec::new();
    let mut packed = flate2::read::MultiGzDecoder::new(bytes).take(most + 1);
    packed.read_to_end(&mut out).at(path)?;
    match out.len() as u64 > most {
        true => Err(DataError::Unusable(format!(
            "{} unpacks to more than {RATIO} times its size: unpack it first, if it is meant so",
            path.display()
        ))),
        false => Ok(out),
    }
}

/// A small file of text.
///
/// # Errors
/// If it cannot be read, or is something else than UTF-8: what.
pub(crate) fn read_text(path: &Path) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    open_regular(path)?.read_to_end(&mut bytes)?;
    String::from_utf8(bytes).map_err(|error| {
        let kind = kind(error.as_bytes()).map_or("not valid UTF-8".to_owned(), |kind| format!("it is {kind}"));
        std::io::Error::new(std::io::ErrorKind::InvalidData, kind)
    })
}
