//! Saving: a hidden folder that becomes a checkpoint in one rename.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{CheckpointError, FORMAT_VERSION, FileEntry, Manifest, folder_name, is_plain, retention, verify};
use crate::run_folder::files::MANIFEST;
use crate::run_folder::{At, TEMPORARY, sync_folder};

/// A checkpoint that is being written. Dropped without [`commit`](Draft::commit), it leaves nothing.
#[derive(Debug)]
pub struct Draft {
    run_dir: PathBuf,
    step: u64,
    folder: PathBuf,
    // By name. `None`: somebody else writes the file; it is hashed on commit.
    files: BTreeMap<String, Option<FileEntry>>,
    committed: bool,
}

/// The moments of a commit between which the state on disk differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    FilesSynced,
    ManifestWritten,
    OldSetAside,
    Renamed,
    OldRemoved,
}

impl Draft {
    /// Begins the checkpoint of `step` in `run_dir`, creating the folder if need be.
    ///
    /// # Errors
    /// If the hidden folder cannot be made.
    pub fn begin(run_dir: &Path, step: u64) -> Result<Self, CheckpointError> {
        fs::create_dir_all(run_dir).at("create", run_dir)?;
        let folder = run_dir.join(format!("{TEMPORARY}{}", folder_name(step)));
        if folder.exists() {
            // What a killed process left; nobody else writes here.
            fs::remove_dir_all(&folder).at("remove", &folder)?;
        }
        fs::create_dir(&folder).at("create", &folder)?;
        Ok(Self { run_dir: run_dir.to_path_buf(), step, folder, files: BTreeMap::new(), committed: false })
    }

    /// Writes one file.
    ///
    /// # Errors
    /// If the name is no plain file name or the file cannot be written.
    pub fn file(&mut self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.file_with(name, |out| out.write_all(bytes))
    }

    /// [`file`](Self::file) for contents that are made piece by piece: hashed as they are written, never held as a whole.
    /// Gives what `fill` gives.
    ///
    /// # Errors
    /// As for [`file`](Self::file), and what `fill` says.
    pub fn file_with<T>(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut dyn Write) -> io::Result<T>,
    ) -> Result<T, CheckpointError> {
        let path = self.path(name)?;
        let file = BufWriter::new(File::create(&path).at("create", &path)?);
        let mut out = Hashed { file, hasher: blake3::Hasher::new() };
        let given = fill(&mut out).at("write", &path)?;
        let (bytes, blake3) = (out.hasher.count(), out.hasher.finalize().to_string());
        let file = out.file.into_inner().map_err(io::IntoInnerError::into_error).at("write", &path)?;
        file.sync_all().at("sync", &path)?;
        self.files.insert(name.to_string(), Some(FileEntry { name: name.to_string(), bytes, blake3 }));
        Ok(given)
    }

    /// Where to write the file `name`, for a writer that wants a path. It must exist on commit.
    ///
    /// # Errors
    /// If the name is no plain file name.
    pub fn path(&mut self, name: &str) -> Result<PathBuf, CheckpointError> {
        if !is_plain(name) {
            return Err(CheckpointError::BadName { name: name.into() });
        }
        self.files.insert(name.to_string(), None);
        Ok(self.folder.join(name))
    }

    /// Makes the draft the checkpoint of its step and returns its folder. A checkpoint of the same
    /// step is replaced.
    ///
    /// # Errors
    /// If a promised file is missing or something cannot be written; the run folder is then as it
    /// was before.
    pub fn commit(self, info: serde_json::Value) -> Result<PathBuf, CheckpointError> {
        self.commit_watched(info, &mut |_| {})
    }

    /// [`commit`](Self::commit), telling `reached` after each stage.
    pub(super) fn commit_watched(
        mut self,
        info: serde_json::Value,
        reached: &mut dyn FnMut(Stage),
    ) -> Result<PathBuf, CheckpointError> {
        let mut files = Vec::new();
        for (name, written) in &self.files {
            files.push(match written {
                Some(entry) => entry.clone(),
                None => entry_of(&self.folder, name)?,
            });
        }
        reached(Stage::FilesSynced);
        let manifest = Manifest {
            format_version: FORMAT_VERSION,
            step: self.step,
            created: now_utc(),
            polyhead_version: env!("CARGO_PKG_VERSION").to_string(),
            info,
            files,
        };
        let text = verify::seal(&manifest);
        write_synced(&self.folder.join(MANIFEST), text.as_bytes())?;
        sync_folder(&self.folder)?;
        reached(Stage::ManifestWritten);

        let target = self.run_dir.join(folder_name(self.step));
        let aside = retention::set_aside(&target)?;
        reached(Stage::OldSetAside);
        if let Err(cause) = fs::rename(&self.folder, &target) {
            if let Some(aside) = aside {
                let _ = fs::rename(aside, &target);
            }
            return Err(cause).at("rename", &self.folder)?;
        }
        self.committed = true;
        sync_folder(&self.run_dir)?;
        reached(Stage::Renamed);
        if let Some(aside) = aside {
            // The new checkpoint counts whether or not the old one goes; the next start tidies up.
            let _ = retention::discard(&aside);
        }
        reached(Stage::OldRemoved);
        Ok(target)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.committed {
            // A failed save must not keep a full disk full.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// Hashes what goes through it to a file.
struct Hashed {
    file: BufWriter<File>,
    hasher: blake3::Hasher,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let mut file = File::create(path).at("create", path)?;
    file.write_all(bytes).at("write", path)?;
    Ok(file.sync_all().at("sync", path)?)
}

/// Syncs and hashes a file that somebody else wrote.
fn entry_of(folder: &Path, name: &str) -> Result<FileEntry, CheckpointError> {
    let path = folder.join(name);
    if !path.is_file() {
        return Err(CheckpointError::Missing { path });
    }
    // Opened for writing, because some systems sync only such files.
    let file = OpenOptions::new().read(true).write(true).open(&path).at("open", &path)?;
    file.sync_all().at("sync", &path)?;
    let (bytes, blake3) = verify::hash(&file).at("read", &path)?;
    Ok(FileEntry { name: name.to_string(), bytes, blake3 })
}

/// This moment in UTC: "2026-01-31T23:59:59Z".
pub fn now_utc() -> String {
    utc(SystemTime::now())
}

/// A moment as RFC 3339 writes it, in whole seconds.
pub(super) fn utc(moment: SystemTime) -> String {
    let seconds = moment.duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    // Days to a date, counting years from March so that the leap day comes last:
    // "civil_from_days" of Howard Hinnant, chrono-Compatible Low-Level Date Algorithms.
    let days = seconds / 86_400 + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}
