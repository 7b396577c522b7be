//! Folders and files that are written whole or not at all, and whose commands, killed, are finished by being typed again.

use std::path::{Path, PathBuf};

use polyhead_training::run_folder::{RunLock, files::LOCK};

use super::must_not_exist;
use crate::console::talk;
use polyhead_recipe::Problems;
use polyhead_recipe::Recipe;
use polyhead_runs::Failure;

/// A folder that is filled beside its place and then renamed to it.
pub struct NewFolder {
    to: PathBuf,
    partial: PathBuf,
    /// Held while it is filled: another process of the same command waits for nothing, it is refused.
    lock: Option<RunLock>,
}

impl NewFolder {
    /// Begins a folder, over what a command that was killed left of it.
    ///
    /// # Errors
    /// If it exists, another process is filling it, or what is in its way is not ours.
    pub fn begin(to: &Path) -> Result<Self, Failure> {
        must_not_exist(to)?;
        let mut name = to.file_name().unwrap_or_default().to_os_string();
        name.push(".partial");
        let partial = to.with_file_name(name);
        let left = entries(&partial)?;
        if !left.is_empty() && !partial.join(LOCK).exists() {
            return Err(Failure::Run(format!(
                "{} is in the way, and was not left by an interrupted command: remove it, or name another place",
                partial.display()
            )));
        }
        let lock = RunLock::acquire(&partial)?;
        for path in left.iter().filter(|path| path.file_name().is_some_and(|name| name != LOCK)) {
            let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
            removed.map_err(|error| Failure::file("remove", path, error))?;
        }
        if !left.is_empty() {
            talk!("cleaned up after an interrupted command: {}", partial.display());
        }
        Ok(Self { to: to.to_owned(), partial, lock: Some(lock) })
    }

    /// Where it is filled.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Puts it in its place.
    ///
    /// # Errors
    /// If it cannot be renamed.
    pub fn finish(mut self) -> Result<(), Failure> {
        self.lock = None;
        std::fs::rename(&self.partial, &self.to).map_err(|error| Failure::file("create", &self.to, error))?;
        // Only now: without it, what a kill leaves would not be known as ours.
        let lock = self.to.join(LOCK);
        std::fs::remove_file(&lock).map_err(|error| Failure::file("remove", &lock, error))
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        // After `finish` there is none; after an error, best effort: the error is the one to report.
        if self.lock.take().is_some() {
            let _ = std::fs::remove_dir_all(&self.partial);
        }
    }
}

/// The contents of a folder, if there is one.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    match std::fs::read_dir(folder) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<_>>()
            .map_err(|error| Failure::file("read", folder, error)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(Failure::file("read", folder, error)),
    }
}

/// Removes what writers of single files left in a folder when they were killed: temporary files whose process is gone.
///
/// # Errors
/// If the folder cannot be read or a file not be removed.
pub fn sweep(folder: &Path) -> Result<(), Failure> {
    // Without /proc nobody can say who is alive: nothing is removed.
    if !Path::new("/proc/self").exists() {
        return Ok(());
    }
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    for path in entries(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let process = name.strip_prefix(".tmp-").and_then(|rest| rest.split_once('-')).map(|(process, _)| process);
        let gone = |process: &str| process.parse::<u32>().is_ok() && !Path::new("/proc").join(process).exists();
        if process.is_some_and(gone) && path.is_file() {
            std::fs::remove_file(&path).map_err(|error| Failure::file("remove", &path, error))?;
            talk!("cleaned up after an interrupted command: {}", path.display());
        }
    }
    Ok(())
}

/// Refuses a folder to write in which a recipe's data would be read from: every file in it would change the data.
///
/// # Errors
/// Names the folder and the key.
pub fn must_not_be_data(recipe: &Recipe, out: &Path) -> Result<(), Failure> {
    match recipe.data.would_read(out) {
        Some(source) => {
            let problem = format!(
                "{} is inside what data.{} reads (\"{source}\"): what is written there would become data; name a folder elsewhere \
                 with --out",
                out.display(),
                recipe.data.name()
            );
            Err(Problems::plain(problem).into())
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_folder_is_there_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let (to, partial) = (dir.path().join("model"), dir.path().join("model.partial"));
        // Killed: the lock goes with the process, the rest stays.
        std::fs::create_dir_all(partial.join("half")).unwrap();
        std::fs::write(partial.join(LOCK), "1\n").unwrap();
        let folder = NewFolder::begin(&to).unwrap();
        assert_eq!(entries(&partial).unwrap(), [partial.join(LOCK)]);
        assert!(NewFolder::begin(&to).err().unwrap().to_string().contains("being written by another"));
        std::fs::write(folder.path().join("file"), "whole").unwrap();
        folder.finish().unwrap();
        assert_eq!(entries(&to).unwrap(), [to.join("file")]);
        assert!(!partial.exists() && NewFolder::begin(&to).err().unwrap().to_string().contains("exists already"));
        // An error on the way leaves nothing, and what is not ours stays.
        let other = dir.path().join("other");
        drop(NewFolder::begin(&other).unwrap());
        assert_eq!(entries(dir.path()).unwrap(), std::slice::from_ref(&to));
        std::fs::create_dir(dir.path().join("other.partial")).unwrap();
        std::fs::write(dir.path().join("other.partial/thesis.txt"), "mine").unwrap();
        assert!(NewFolder::begin(&other).err().unwrap().to_string().contains("is in the way"));
    }

    #[test]
    fn temporary_files_of_the_dead_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let names = [format!(".tmp-{}-0", std::process::id()), ".tmp-4194999-3".into(), ".tmp-notes".into()];
        names.iter().for_each(|name| std::fs::write(dir.path().join(name), "").unwrap());
        sweep(dir.path()).unwrap();
        let left: Vec<bool> = names.iter().map(|name| dir.path().join(name).exists()).collect();
        assert_eq!(left, [true, !Path::new("/proc/self").exists(), true]);
    }
}
