//! Files in folders that are named for their classes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::DataError;
use crate::error::At;
use crate::files::{LeftOut, OnBad, Search, read_file, search};

/// Which files are read, and what happens to bad ones.
pub(super) struct ClassFolders<'a> {
    /// The source's name.
    pub(super) name: &'static str,
    /// The folder with a folder for each class.
    pub(super) path: &'a Path,
    /// Such a folder to validate on.
    pub(super) validation_path: Option<&'a PathBuf>,
    /// How the names of files end.
    pub(super) endings: &'a [&'a str],
    pub(super) on_bad_file: OnBad,
}

/// What was read of them.
pub(super) struct Read<T> {
    /// The names of the classes.
    pub(super) classes: Vec<String>,
    /// Each file, with its class.
    pub(super) items: Vec<(T, u32)>,
    /// So many at the beginning are to train on.
    pub(super) to_train: usize,
    pub(super) left_out: LeftOut,
}

impl ClassFolders<'_> {
    /// Reads all files by `decode`, which gets each with its class.
    ///
    /// # Errors
    /// If there are fewer than two classes, or a bad file that is not to be skipped: its name and the way out.
    pub(super) fn read<T>(
        &self,
        mut decode: impl FnMut(&[u8], u32) -> Result<T, String>,
    ) -> Result<Read<T>, DataError> {
        let ClassFiles { classes, files, mut left_out } = class_files(self.path, self.endings, None)?;
        let mut sides = vec![files];
        if let Some(path) = self.validation_path {
            let more = class_files(path, self.endings, Some(&classes))?;
            left_out.extend(more.left_out);
            sides.push(more.files);
        }
        let (mut items, mut ends) = (Vec::new(), Vec::new());
        for files in sides {
            for (path, label) in files {
                let item = decode(&read_file(&path)?, label);
                let item = self.on_bad_file.settle(item, (&path, self.name), &mut left_out)?;
                items.extend(item.map(|item| (item, label)));
            }
            ends.push(items.len());
        }
        if ends.len() == 2 && ends[1] == ends[0] {
            let (left_out, name) = (left_out.note().unwrap_or_default(), self.name);
            return Err(unusable!("data.{name}: no file of validation_path can be read; {left_out}"));
        }
        Ok(Read { classes, items, to_train: ends[0], left_out })
    }
}

/// Classes and their files.
struct ClassFiles {
    /// Their names.
    classes: Vec<String>,
    /// Files with the class of each.
    files: Vec<(PathBuf, u32)>,
    /// What is not read.
    left_out: LeftOut,
}

/// Classes with their files: the folders inside of a folder, sorted by name.
///
/// # Errors
/// If there are fewer than two, one holds no such file, or one is not `known`, where they are known.
fn class_files(folder: &Path, endings: &[&str], known: Option<&[String]>) -> Result<ClassFiles, DataError> {
    let unusable = |problem: String| DataError::in_file(folder, problem);
    let (mut names, mut left_out) = (BTreeSet::new(), LeftOut::default());
    for entry in std::fs::read_dir(folder).at(folder)? {
        let path = entry.at(folder)?.path();
        let name = path.file_name().unwrap_or_default();
        if name.to_string_lossy().starts_with('.') {
            left_out.add("hidden", &path);
        } else if !path.is_dir() {
            left_out.add("in no folder of a class", &path);
        } else if let Some(name) = name.to_str() {
            names.insert(name.to_owned());
        } else {
            return Err(unusable(format!("the folder {name:?} has a name that is not UTF-8: rename it")));
        }
    }
    let found = || names.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
    let classes = match known {
        Some(known) => known.to_vec(),
        None if names.len() < 2 => {
            return Err(unusable(format!(
                "holds {} folders, and each is a class: two are needed (found: {})",
                names.len(),
                if names.is_empty() { "none".into() } else { found() }
            )));
        }
        None => names.iter().cloned().collect(),
    };
    let mut files = Vec::new();
    for name in names {
        let label = classes.iter().position(|class| *class == name);
        let label = label.ok_or_else(|| unusable(format!("class `{name}` is not among those to train on")))?;
        let inside = search(&[folder.join(&name).display().to_string()], &[endings])?;
        let Search { files: more, left_out: besides } = inside;
        files.extend(more.into_keys().map(|path| (path, label as u32)));
        left_out.extend(besides);
    }
    Ok(ClassFiles { classes, files, left_out })
}
