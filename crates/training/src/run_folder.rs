//! The folder of a run: one writer at a time, files that are either old or new, and a metrics log.
//!
//! * [`RunLock`] keeps a second training out of the folder. The operating system releases it when
//!   its process dies, however it dies, so a lock is never stale.
//! * [`atomic_write`] replaces a file so that a reader, or a restart after a kill, sees the old
//!   bytes or the new ones and nothing in between.
//! * [`MetricsLog`] is `metrics.jsonl`: one JSON object a line, appended; on resume what the
//!   abandoned end of the earlier run wrote is taken out again.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

pub mod files;
mod metrics_log;
pub use metrics_log::{MetricsLog, read_metrics};

/// What starts the names of unfinished files and folders. They never count as results.
pub(crate) const TEMPORARY: &str = ".tmp-";

/// An operation on one file or folder that the operating system refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {cause}{}", path.display(), way_out(cause))]
pub struct FileError {
    /// What was attempted, as a verb: "write", "rename".
    pub action: &'static str,
    /// The file or folder.
    pub path: PathBuf,
    /// The operating system's reason. Not an error source: the message already ends with it.
    pub cause: io::Error,
}

/// What a person can do about a reason that the system only names.
fn way_out(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::FileTooLarge => {
            "; the limit on the size of files (`ulimit -f`) or the file system is in the way: raise it, or write elsewhere (--out)"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; make room (older checkpoints, checkpoint.keep_latest_k), then the same command goes on"
        }
        _ => "",
    }
}

/// Adds to an I/O error what was attempted and where.
pub(crate) trait At<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, FileError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, FileError> {
        self.map_err(|cause| FileError { action, path: path.to_path_buf(), cause })
    }
}

/// Why a run folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunFolderError {
    /// The operating system refused an operation.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another training writes into the folder.
    #[error(
        "{} is being written by another run ({holder}): wait until it ends, stop it, or give this \
         run a folder of its own",
        run_dir.display()
    )]
    Locked {
        /// The contested folder.
        run_dir: PathBuf,
        /// Who holds it, as far as known: "process 1234".
        holder: String,
    },
}

/// The right to write into a run folder, held until dropped or until the process ends.
#[derive(Debug)]
pub struct RunLock {
    _file: Locked,
}

impl RunLock {
    /// Takes the lock of `run_dir`, creating the folder if need be.
    ///
    /// The file `.lock` stays after release: removing it would let two writers each lock their own.
    ///
    /// # Errors
    /// [`RunFolderError::Locked`] names the process that holds it.
    pub fn acquire(run_dir: &Path) -> Result<Self, RunFolderError> {
        fs::create_dir_all(run_dir).at("create", run_dir)?;
        let path = run_dir.join(files::LOCK);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).at("open", &path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(RunFolderError::Locked { run_dir: run_dir.to_path_buf(), holder: holder(&mut file) });
            }
            Err(TryLockError::Error(cause)) => return Err(cause).at("lock", &path)?,
        }
        file.set_len(0).at("write", &path)?;
        file.seek(SeekFrom::Start(0)).at("write", &path)?;
        writeln!(file, "{}", std::process::id()).at("write", &path)?;
        Ok(Self { _file: Locked(file) })
    }
}

/// A file that this process has locked, released when this is dropped.
///
/// Closing the file would not do: a process that is being started beside has it too until it executes its program, and the
/// lock with it.
#[derive(Debug)]
pub(crate) struct Locked(pub(crate) File);

impl Drop for Locked {
    fn drop(&mut self) {
        // What cannot be unlocked is released with the last copy.
        let _ = self.0.unlock();
    }
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    match file.take(32).read_to_string(&mut text) {
        Ok(_) if !text.trim().is_empty() => format!("process {}", text.trim()),
        _ => "an unknown process".to_string(),
    }
}

/// Replaces the contents of `path` with `bytes`, atomically and durably.
///
/// # Errors
/// If the file cannot be written, for example because the disk is full; the old file is then
/// untouched.
pub fn atomic_write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    atomic_write_with(path, |file| file.write_all(bytes))
}

/// [`atomic_write`] for contents that are produced piece by piece.
///
/// # Errors
/// As [`atomic_write`], and what `fill` says.
pub fn atomic_write_with(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), FileError> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let folder = folder_of(path);
    // The name of the target is left out on purpose: TensorBoard reads every file whose name
    // contains "tfevents", finished or not.
    let temporary =
        folder.join(format!("{TEMPORARY}{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    let written = File::create(&temporary).and_then(|file| {
        let mut buffered = io::BufWriter::new(file);
        fill(&mut buffered)?;
        buffered.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
    });
    let replaced = written.and_then(|()| fs::rename(&temporary, path));
    if replaced.is_err() {
        // Best effort: the first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    replaced.at("write", path)?;
    sync_folder(folder)
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes renames and new names in `folder` survive a power cut.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), FileError> {
    if !cfg!(unix) {
        return Ok(()); // elsewhere a folder cannot be opened as a file
    }
    match File::open(folder).and_then(|opened| opened.sync_all()) {
        // Some network file systems know no such operation; there is nothing better to do there.
        Err(cause) if matches!(cause.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        other => other.at("sync", folder),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::process::Command;

    #[test]
    fn a_second_handle_is_refused_with_the_holder_named_until_the_first_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let lock = RunLock::acquire(&run).unwrap();
        let message = RunLock::acquire(&run).unwrap_err().to_string();
        assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
        drop(lock);
        RunLock::acquire(&run).unwrap();
    }

    #[test]
    fn a_lock_ends_with_its_holder_though_a_process_being_started_has_the_file_too() {
        let dir = tempfile::tempdir().unwrap();
        let lock = RunLock::acquire(dir.path()).unwrap();
        let copy = lock._file.0.try_clone().unwrap();
        drop(lock);
        RunLock::acquire(dir.path()).unwrap();
        drop(copy);
    }

    /// What the process does that the test below starts: the same test, told a folder.
    fn lock_as_child(run: &str) {
        match RunLock::acquire(Path::new(run)) {
            Ok(_) => println!("child: locked"),
            Err(error) => println!("child: {error}"),
        }
    }

    #[test]
    fn a_second_process_is_refused() {
        if let Ok(run) = std::env::var("POLYHEAD_TEST_LOCKS") {
            return lock_as_child(&run);
        }
        let dir = tempfile::tempdir().unwrap();
        let child = || {
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["run_folder::tests::a_second_process_is_refused", "--exact", "--nocapture"])
                .env("POLYHEAD_TEST_LOCKS", dir.path())
                .output()
                .unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let lock = RunLock::acquire(dir.path()).unwrap();
        let refused = child();
        assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
        drop(lock);
        let taken = child();
        assert!(taken.contains("child: locked"), "{taken}");
        // The shorter or longer number of the process before must not shine through.
        RunLock::acquire(dir.path()).unwrap();
        let pid = fs::read_to_string(dir.path().join(".lock")).unwrap();
        assert_eq!(pid, format!("{}\n", std::process::id()));
    }

    #[test]
    fn atomic_write_replaces_and_a_failure_leaves_the_old_file_and_no_litter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("best.json");
        atomic_write(&path, b"old").unwrap();
        atomic_write(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        let failed = atomic_write_with(&path, |file| {
            file.write_all(b"half")?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        });
        let message = failed.unwrap_err().to_string();
        assert!(message.contains("best.json"), "{message}");
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
