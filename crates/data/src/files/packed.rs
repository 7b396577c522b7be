//! Files that may be packed with gzip, unpacked piece by piece: what is read is bounded by what is expected, not by what comes.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use super::{not_text, open_file};
use crate::DataError;
use crate::error::At;

/// A file, unpacked where it is packed.
pub(crate) struct Packed {
    /// Its content from the beginning on.
    pub(crate) content: Box<dyn BufRead>,
    /// How long it is, where it is not packed.
    pub(crate) length: Option<u64>,
}

impl Packed {
    /// Opens a file.
    ///
    /// # Errors
    /// If it cannot be read, or is no file on a disk.
    pub(crate) fn open(path: &Path) -> Result<Self, DataError> {
        let file = open_file(path)?;
        let length = file.metadata().at(path)?.len();
        let mut bytes: BufReader<File> = BufReader::with_capacity(1 << 16, file);
        Ok(match bytes.fill_buf().at(path)?.starts_with(&[0x1f, 0x8b]) {
            true => {
                let content = Box::new(BufReader::with_capacity(1 << 16, MultiGzDecoder::new(bytes)));
                Self { content, length: None }
            }
            false => Self { content: Box::new(bytes), length: Some(length) },
        })
    }

    /// Up to so many bytes.
    pub(crate) fn up_to(&mut self, most: u64, path: &Path) -> Result<Vec<u8>, DataError> {
        let mut all = Vec::new();
        self.content.by_ref().take(most).read_to_end(&mut all).at(path)?;
        Ok(all)
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
