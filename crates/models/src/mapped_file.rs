//! Files that are mapped into memory: what is not asked for is never read, and nothing is kept twice.
//!
//! Such a file may be replaced (written under another name, then renamed) while it is in use, but not cut: where its end was
//! inside of a page, zeros come back, and beyond that the system ends the process with SIGBUS. So its length is looked at
//! each time that bytes are asked for. That leaves the moment between looking and reading; for it the binary has a handler,
//! which asks [`mapped_file_at`] what to name.

use std::fs::{File, FileType};
use std::io::{Error, ErrorKind, Result};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use memmap2::Mmap;

/// A file mapped into memory, to be read.
#[derive(Debug)]
pub struct MappedFile {
    map: Mmap,
    file: File,
    place: Option<&'static Place>,
}

impl MappedFile {
    /// Maps a file.
    ///
    /// # Errors
    /// If it cannot be opened or mapped.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_regular(path)?;
        // SAFETY: the map is only read, as bytes, of which every pattern is one. What others do to the file is looked at in
        // `bytes`, and what comes of it later stops the process; who writes other bytes into a file that is in use changes
        // numbers, as with any program that maps its data.
        let map = unsafe { Mmap::map(&file) }?;
        let place = Place::take(&map, path);
        Ok(Self { map, file, place })
    }

    /// Bytes when it was opened.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether there was no byte.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Some of its bytes.
    ///
    /// # Errors
    /// If there are not so many, or the file is shorter by now.
    pub fn bytes(&self, range: Range<usize>) -> Result<&[u8]> {
        let (left, len) = (self.file.metadata()?.len(), self.map.len());
        if left < len as u64 {
            let problem = format!(
                "it became shorter while it was in use: {left} of {len} bytes are left. Files that are in use may be replaced \
                 (write another, then rename it), not cut"
            );
            return Err(Error::new(ErrorKind::UnexpectedEof, problem));
        }
        let beyond = || Error::new(ErrorKind::UnexpectedEof, format!("it has {len} bytes; {range:?} were asked for"));
        self.map.get(range.clone()).ok_or_else(beyond)
    }

    /// Says that some bytes are not needed any more, so that they do not count as memory of the process. Whoever asks for them
    /// again gets them again.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if range.start < range.end && range.end <= self.map.len() {
            // SAFETY: the map is shared with the file and never written, so that the pages that are dropped come back from the
            // file as they were.
            let dropped = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
            };
            // Advice: whether it was taken changes no value.
            let _ = dropped;
        }
    }

    /// All of its bytes.
    ///
    /// # Errors
    /// If the file is shorter by now.
    pub fn all(&self) -> Result<&[u8]> {
        self.bytes(0..self.map.len())
    }
}

/// What a file is that is not on a disk.
pub fn irregular(kind: FileType) -> Option<&'static str> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        for (is, what) in [
            (kind.is_fifo(), "named pipe"),
            (kind.is_socket(), "socket"),
            (kind.is_char_device() || kind.is_block_device(), "device"),
        ] {
            if is {
                return Some(what);
            }
        }
    }
    kind.is_dir().then_some("folder")
}

/// Opens a file on a disk.
///
/// # Errors
/// If there is none, or it is a pipe, a socket, a device or a folder, as reading it may never end.
pub fn open_regular(path: &Path) -> Result<File> {
    match irregular(path.metadata()?.file_type()) {
        Some(what) => Err(Error::other(format!("it is a {what}: only files are read; save what it gives in one"))),
        None => File::open(path),
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            place.start.store(FREE, Ordering::Release);
        }
    }
}

/// Where a file is mapped: a row of a table that a signal handler may read at any moment, so without locks.
#[derive(Debug)]
struct Place {
    /// [`FREE`], [`TAKEN`] or the address of the first byte.
    start: AtomicUsize,
    len: AtomicUsize,
    /// Never freed, because a handler may be reading it: some bytes for each file that is opened.
    name: AtomicPtr<String>,
}

const FREE: usize = 0;
const TAKEN: usize = 1;
/// More files than any model has; one beyond is without a name should it be cut.
static PLACES: [Place; 256] = [const {
    Place { start: AtomicUsize::new(FREE), len: AtomicUsize::new(0), name: AtomicPtr::new(std::ptr::null_mut()) }
}; 256];

impl Place {
    fn take(map: &Mmap, path: &Path) -> Option<&'static Self> {
        let free =
            |place: &&Self| place.start.compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed).is_ok();
        let place = PLACES.iter().find(free)?;
        // As it can be shown: a handler cannot make control characters harmless.
        let shown = |letter: char| match letter.is_control() {
            true => letter.escape_default().to_string(),
            false => letter.to_string(),
        };
        let name: String = path.display().to_string().chars().map(shown).collect();
        place.len.store(map.len(), Ordering::Relaxed);
        place.name.store(Box::leak(Box::new(name)), Ordering::Relaxed);
        place.start.store(map.as_ptr() as usize, Ordering::Release);
        Some(place)
    }
}

/// The name of the file that is mapped at an address. Fit for signal handlers: it reads atomic numbers and nothing else.
pub fn mapped_file_at(address: usize) -> Option<&'static str> {
    let holds = |place: &&Place| {
        let start = place.start.load(Ordering::Acquire);
        start > TAKEN && (start..start.saturating_add(place.len.load(Ordering::Relaxed))).contains(&address)
    };
    let name = PLACES.iter().find(holds)?.name.load(Ordering::Relaxed);
    // SAFETY: null, or a name that was leaked before the place's start was stored, and that nobody ever changes or frees.
    unsafe { name.as_ref() }.map(String::as_str)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_that_became_shorter_is_noticed_before_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("numbers");
        std::fs::write(&path, [7; 100]).unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        assert_eq!((mapped.bytes(98..100).unwrap(), mapped.len()), (&[7, 7][..], 100));
        assert!(mapped.bytes(90..101).unwrap_err().to_string().contains("it has 100 bytes; 90..101 were asked for"));
        // Inside of a page: the system would give zeros.
        File::options().write(true).open(&path).unwrap().set_len(50).unwrap();
        let told = mapped.bytes(60..70).unwrap_err().to_string();
        assert!(told.contains("it became shorter while it was in use: 50 of 100 bytes are left"), "{told}");
    }

    #[test]
    fn addresses_have_the_name_of_their_file_while_it_is_mapped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a name of its own");
        std::fs::write(&path, [7; 100]).unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        let first = mapped.all().unwrap().as_ptr() as usize;
        let name = |address: usize| mapped_file_at(address).filter(|name| name.ends_with("a name of its own"));
        assert_eq!(
            [first - 1, first, first + 99, first + 100].map(|at| name(at).is_some()),
            [false, true, true, false]
        );
        drop(mapped);
        assert_eq!(name(first), None);
    }
}
