//! Files for tests.

#![allow(clippy::unwrap_used)]
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::texts::TextDocument;

/// A folder that goes with the test.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    /// An empty one.
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// A file in it, in a folder of its own where the name has one.
    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

/// Bytes as gzip packs them.
pub(crate) fn gzip(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    packed.write_all(bytes.as_ref()).unwrap();
    packed.finish().unwrap()
}

/// Texts without names.
pub(crate) fn texts(texts: impl Iterator<Item = String>) -> Vec<TextDocument> {
    texts.map(|text| TextDocument { name: String::new(), text }).collect()
}
