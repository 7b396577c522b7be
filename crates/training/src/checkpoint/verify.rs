//! Whether a checkpoint is what was saved.

use std::collections::HashSet;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{CheckpointError, FORMAT_VERSION, FileEntry, Manifest, is_plain, step_of};
use crate::run_folder::At;
use crate::run_folder::files::{MANIFEST, OPTIMIZER};

/// The manifest as it is in the file: it ends with a hash of its own text, in which the digits
/// of that hash are zeros.
#[derive(Serialize, Deserialize)]
struct Sealed {
    #[serde(flatten)]
    manifest: Manifest,
    manifest_blake3: String,
}

const NO_SEAL: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// The text of `manifest.json`.
pub(super) fn seal(manifest: &Manifest) -> String {
    let sealed = Sealed { manifest: manifest.clone(), manifest_blake3: NO_SEAL.to_string() };
    // Only maps with keys that are no strings cannot be written, and a manifest has none.
    let text = format!("{:#}\n", serde_json::json!(sealed));
    let hash = blake3::hash(text.as_bytes()).to_string();
    match text.rfind(NO_SEAL) {
        Some(at) => format!("{}{hash}{}", &text[..at], &text[at + NO_SEAL.len()..]),
        None => text,
    }
}

/// Checks every file of the checkpoint at `path` against the manifest.
///
/// Files that the manifest does not name are ignored.
///
/// # Errors
/// What is wrong first, and with which file: missing, truncated, altered.
pub fn verify(path: &Path) -> Result<Manifest, CheckpointError> {
    let manifest = read_manifest(path)?;
    manifest.files.iter().try_for_each(|entry| check(path, entry))?;
    Ok(manifest)
}

/// [`verify`] for whoever uses the model and does not train on: of the optimizer's state, which is twice as large as the model,
/// the length is checked alone.
///
/// # Errors
/// As for [`verify`].
pub fn verify_usable(path: &Path) -> Result<Manifest, CheckpointError> {
    let manifest = read_manifest(path)?;
    let check = |entry: &FileEntry| match entry.name == OPTIMIZER {
        true => open(path, entry).map(drop),
        false => check(path, entry),
    };
    manifest.files.iter().try_for_each(check)?;
    Ok(manifest)
}

/// The bytes of one file of the checkpoint at `path`, checked against the manifest.
///
/// # Errors
/// As for [`verify`], but only about the manifest and this file; also if there is no such file.
pub fn read_file(path: &Path, name: &str) -> Result<Vec<u8>, CheckpointError> {
    let entry = entry_of(path, name)?;
    let mut bytes = Vec::new();
    open(path, &entry)?.read_to_end(&mut bytes).at("read", &path.join(name))?;
    let hashed = (bytes.len() as u64, blake3::hash(&bytes).to_string());
    compare(path, &entry, hashed)?;
    Ok(bytes)
}

/// [`read_file`] without keeping the bytes: for files that are read piece by piece afterwards.
///
/// # Errors
/// As for [`read_file`].
pub fn check_file(path: &Path, name: &str) -> Result<(), CheckpointError> {
    check(path, &entry_of(path, name)?)
}

fn check(path: &Path, entry: &FileEntry) -> Result<(), CheckpointError> {
    let (file, at) = (open(path, entry)?, path.join(&entry.name));
    let seen = file.metadata().ok().and_then(|file| Seen::of(at.clone(), &entry.blake3, &file));
    if seen.as_ref().is_some_and(Seen::before) {
        return Ok(());
    }
    compare(path, entry, hash(&file).at("read", &at)?)?;
    seen.into_iter().for_each(Seen::remember);
    Ok(())
}

/// A file whose hash was compared: a command that asks several times about a checkpoint hashes it once.
#[derive(PartialEq, Eq, Hash)]
struct Seen {
    path: PathBuf,
    blake3: String,
    bytes: u64,
    changed: SystemTime,
}

static SEEN: Mutex<Option<HashSet<Seen>>> = Mutex::new(None);

impl Seen {
    /// `None` where it changed so recently that its time of change need not tell the next change: file systems count in
    /// steps, which are at most so long.
    fn of(path: PathBuf, blake3: &str, file: &Metadata) -> Option<Self> {
        const STEP: Duration = Duration::from_secs(2);
        let changed = changed(file)?;
        let settled = SystemTime::now().duration_since(changed).is_ok_and(|age| age > STEP);
        settled.then(|| Self { path, blake3: blake3.to_owned(), bytes: file.len(), changed })
    }

    fn before(&self) -> bool {
        SEEN.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|seen| seen.contains(self))
    }

    fn remember(self) {
        SEEN.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().insert(self);
    }
}

/// When a file was last changed, which nobody can set back.
#[cfg(unix)]
fn changed(file: &Metadata) -> Option<SystemTime> {
    use std::os::unix::fs::MetadataExt;
    let since = Duration::new(u64::try_from(file.ctime()).ok()?, u32::try_from(file.ctime_nsec()).ok()?);
    SystemTime::UNIX_EPOCH.checked_add(since)
}

#[cfg(not(unix))]
fn changed(_: &Metadata) -> Option<SystemTime> {
    None
}

/// What the manifest says about a file.
fn entry_of(path: &Path, name: &str) -> Result<FileEntry, CheckpointError> {
    let manifest = read_manifest(path)?;
    let names = || manifest.files.iter().map(|entry| entry.name.as_str()).collect::<Vec<_>>().join(", ");
    let no_such = || CheckpointError::NoSuchFile { path: path.to_path_buf(), name: name.to_string(), holds: names() };
    manifest.files.iter().find(|entry| entry.name == name).cloned().ok_or_else(no_such)
}

/// The manifest of the checkpoint at `path`, known to be as it was written.
pub(super) fn read_manifest(path: &Path) -> Result<Manifest, CheckpointError> {
    let manifest_path = path.join(MANIFEST);
    let bytes = match fs::read(&manifest_path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            return Err(CheckpointError::NoManifest { path: path.to_path_buf() });
        }
        read => read.at("read", &manifest_path)?,
    };
    let bad = |reason: String| CheckpointError::BadManifest { path: manifest_path.clone(), reason };
    let text = str::from_utf8(&bytes).map_err(|_| bad("it is not text".into()))?;
    let value: serde_json::Value = serde_json::from_str(text).map_err(|error| bad(error.to_string()))?;
    // The seal first: if it holds, another version is another version and not damage.
    let found = value["manifest_blake3"].as_str().unwrap_or_default();
    let at = text.rfind(found).filter(|_| found.len() == NO_SEAL.len());
    let at = at.ok_or_else(|| bad("it holds no hash of itself".into()))?;
    let unsealed = format!("{}{NO_SEAL}{}", &text[..at], &text[at + NO_SEAL.len()..]);
    if blake3::hash(unsealed.as_bytes()).to_string() != found {
        return Err(bad("altered: its hash differs".into()));
    }
    let version = value["format_version"].as_u64().unwrap_or(0);
    if version != u64::from(FORMAT_VERSION) {
        return Err(CheckpointError::Format { path: manifest_path, found: version });
    }
    let Sealed { manifest, .. } = serde_json::from_value(value).map_err(|error| bad(error.to_string()))?;
    if let Some(entry) = manifest.files.iter().find(|entry| !is_plain(&entry.name)) {
        return Err(bad(format!("{:?} is no plain file name", entry.name)));
    }
    if step_of(path).is_some_and(|step| step != manifest.step) {
        return Err(CheckpointError::WrongStep { path: path.to_path_buf(), found: manifest.step });
    }
    Ok(manifest)
}

/// Opens a file of the checkpoint after a look at its length, so that hashing is not in vain.
fn open(folder: &Path, entry: &FileEntry) -> Result<File, CheckpointError> {
    let path = folder.join(&entry.name);
    let file = match File::open(&path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            return Err(CheckpointError::Missing { path });
        }
        opened => opened.at("read", &path)?,
    };
    let length = file.metadata().at("read", &path)?.len();
    compare_length(folder, entry, length)?;
    Ok(file)
}

fn compare_length(folder: &Path, entry: &FileEntry, found: u64) -> Result<(), CheckpointError> {
    let path = folder.join(&entry.name);
    let expected = entry.bytes;
    match found.cmp(&expected) {
        std::cmp::Ordering::Less => Err(CheckpointError::Truncated { path, found, expected }),
        std::cmp::Ordering::Greater => {
            Err(CheckpointError::Altered { path, reason: format!("{found} bytes instead of {expected}") })
        }
        std::cmp::Ordering::Equal => Ok(()),
    }
}

fn compare(folder: &Path, entry: &FileEntry, (length, hash): (u64, String)) -> Result<(), CheckpointError> {
    compare_length(folder, entry, length)?;
    if hash != entry.blake3 {
        return Err(CheckpointError::Altered {
            path: folder.join(&entry.name),
            reason: "its hash differs".to_string(),
        });
    }
    Ok(())
}

/// The length and the hash of what `reader` yields.
pub(super) fn hash(reader: impl Read) -> io::Result<(u64, String)> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(reader)?;
    Ok((hasher.count(), hasher.finalize().to_string()))
}
