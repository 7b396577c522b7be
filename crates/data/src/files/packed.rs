//! Files that may be packed by gzip or Zstandard, unpacked piece by piece: what is read is bounded by what is expected, not by
//! what comes.

use std::fs::File;
use std::io::{BufRead, BufReader, Error, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::{not_text, open_file};
use crate::DataError;
use crate::error::At;

/// How names of packed files end.
const ENDINGS: [&str; 3] = ["gz", "zst", "zstd"];
/// Unpacked, a file may be this many times as large as it is, and so many bytes more; chosen by us. Text packs to a tenth.
const RATIO: u64 = 100;
const AT_LEAST: u64 = 64 << 20;

/// A file, unpacked where it is packed.
pub(crate) struct Packed {
    /// Its content from the beginning on.
    pub(crate) content: Box<dyn BufRead>,
    /// How long the file is.
    size: u64,
    packed: bool,
}

impl Packed {
    /// Opens a file.
    ///
    /// # Errors
    /// If it cannot be read, or is no file on a disk.
    pub(crate) fn open(path: &Path) -> Result<Self, DataError> {
        const BUFFER: usize = 1 << 16;
        let file = open_file(path)?;
        let size = file.metadata().at(path)?.len();
        let mut bytes: BufReader<File> = BufReader::with_capacity(BUFFER, file);
        let head = bytes.fill_buf().at(path)?;
        let (gzip, zstandard) = (head.starts_with(b"\x1F\x8B"), head.starts_with(b"\x28\xB5\x2F\xFD"));
        let content: Box<dyn BufRead> = match (gzip, zstandard) {
            (true, _) => Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(bytes))),
            (_, true) => Box::new(BufReader::with_capacity(BUFFER, Zstandard::new(bytes))),
            _ => Box::new(bytes),
        };
        Ok(Self { content, size, packed: gzip || zstandard })
    }

    /// How long its content is, where it is not packed.
    pub(crate) fn length(&self) -> Option<u64> {
        (!self.packed).then_some(self.size)
    }

    /// Up to so many bytes.
    pub(crate) fn up_to(&mut self, most: u64, path: &Path) -> Result<Vec<u8>, DataError> {
        let mut all = Vec::new();
        let read = self.content.by_ref().take(most).read_to_end(&mut all);
        read.map_err(|cause| if self.packed { broken(&cause) } else { cause }).at(path)?;
        Ok(all)
    }

    /// All bytes.
    ///
    /// # Errors
    /// As of [`stream`](Self::stream).
    pub(crate) fn read(path: &Path) -> Result<Vec<u8>, DataError> {
        let mut bytes = Vec::new();
        Self::open(path)?.stream().read_to_end(&mut bytes).at(path)?;
        Ok(bytes)
    }

    /// Its content, piece by piece. Reading it fails where the file is broken, or unpacks to far more than text does.
    pub(crate) fn stream(self) -> Box<dyn BufRead> {
        match self.packed {
            false => self.content,
            true => {
                let left = RATIO.saturating_mul(self.size).saturating_add(AT_LEAST);
                Box::new(Unpacked { content: self.content, left })
            }
        }
    }

    /// What its first bytes are, where they are no text.
    pub(crate) fn not_text(&mut self, path: &Path) -> Result<Option<String>, DataError> {
        let head = self.content.fill_buf().at(path)?;
        // A letter may be cut where the buffer ends.
        let whole = std::str::from_utf8(head).map_or_else(
            |error| match error.error_len() {
                None => error.valid_up_to(),
                Some(_) => head.len(),
            },
            str::len,
        );
        Ok(not_text(&head[..whole]))
    }
}

/// What is unpacked, as much as a file of text may hold.
struct Unpacked {
    content: Box<dyn BufRead>,
    left: u64,
}

impl BufRead for Unpacked {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        let bytes = self.content.fill_buf().map_err(|cause| broken(&cause))?;
        match bytes.is_empty() || self.left > 0 {
            true => Ok(bytes),
            false => Err(Error::other(format!(
                "it unpacks to more than {RATIO} times its size: unpack it first, if it is meant so"
            ))),
        }
    }

    fn consume(&mut self, amount: usize) {
        self.left = self.left.saturating_sub(amount as u64);
        self.content.consume(amount);
    }
}

impl Read for Unpacked {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let bytes = self.fill_buf()?;
        let amount = bytes.len().min(into.len());
        into[..amount].copy_from_slice(&bytes[..amount]);
        self.consume(amount);
        Ok(amount)
    }
}

fn broken(cause: &Error) -> Error {
    Error::new(cause.kind(), format!("it cannot be unpacked ({cause}): pack or download it again"))
}

/// How a file's name ends, in small letters, without what says that it is packed: "jsonl" of rows.jsonl.gz.
pub(crate) fn ending(path: &Path) -> Option<String> {
    let of = |path: &Path| Some(path.extension()?.to_string_lossy().to_lowercase());
    let last = of(path)?;
    if ENDINGS.contains(&last.as_str()) { of(Path::new(path.file_stem()?)).or(Some(last)) } else { Some(last) }
}

/// What Zstandard packed, frame after frame; the decoder knows single ones.
pub(super) struct Zstandard<R> {
    source: R,
    decoder: FrameDecoder,
}

impl<R: BufRead> Zstandard<R> {
    pub(super) fn new(source: R) -> Self {
        Self { source, decoder: FrameDecoder::new() }
    }
}

impl<R: BufRead> Read for Zstandard<R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        while self.decoder.can_collect() == 0 {
            if !self.decoder.is_finished() {
                let blocks = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.source, blocks).map_err(Error::other)?;
                continue;
            }
            // None before the first frame.
            if self
                .decoder
                .get_checksum_from_data()
                .is_some_and(|sum| self.decoder.get_calculated_checksum() != Some(sum))
            {
                return Err(Error::other("its checksum is wrong"));
            }
            if self.source.fill_buf()?.is_empty() {
                return Ok(0);
            }
            match self.decoder.reset(&mut self.source) {
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    std::io::copy(&mut self.source.by_ref().take(length.into()), &mut std::io::sink())?;
                }
                other => other.map_err(Error::other)?,
            }
        }
        self.decoder.read(into)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    #[test]
    fn frames_follow_each_other_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt.zst");
        let text = "Ownership is a set of rules. ".repeat(20_000);
        let frame = compress_to_vec(text.as_bytes(), CompressionLevel::Fastest);
        let skipped = b"\x50\x2A\x4D\x18\x03\0\0\0abc";
        std::fs::write(&path, [&frame[..], skipped, &frame].concat()).unwrap();
        assert_eq!(Packed::read(&path).unwrap(), text.repeat(2).as_bytes());
        let mut altered = frame.clone();
        let last = altered.len() - 1;
        altered[last] ^= 1; // of the checksum
        for broken in [&frame[..frame.len() / 2], &altered] {
            std::fs::write(&path, broken).unwrap();
            let error = Packed::read(&path).unwrap_err().to_string();
            assert!(error.contains("a.txt.zst: it cannot be unpacked"), "{error}");
        }
        for (name, found) in [("a.JSONL.gz", "jsonl"), ("a.b.zst", "b"), ("a.gz", "gz"), ("a.txt", "txt")] {
            assert_eq!(ending(Path::new(name)).as_deref(), Some(found));
        }
    }
}
