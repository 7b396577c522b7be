//! Files that the paths of a recipe mean: files, folders and patterns. Whatever is found and not read is counted and named.

mod arrow;
mod packed;
mod parquet;
mod rows;
mod sniff;
mod splits;
mod table;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use glob::Pattern;
use polyhead_models::{irregular, open_regular};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::DataError;
use crate::error::At;

pub(crate) use packed::{Packed, ending};
pub(crate) use rows::{Place, Row, for_each_row, invalid, rows_of};
pub(crate) use sniff::{kind, not_text, structured};
pub(crate) use splits::{Sides, sides};
pub(crate) use table::Table;

/// What is done with a file or a row that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnBad {
    /// It ends the run.
    #[default]
    Error,
    /// It is left out and counted.
    Skip,
}

impl OnBad {
    /// What was read of a file of `data.NAME`; `None` where it is left out, which is counted.
    ///
    /// # Errors
    /// If it could not be read and is not to be left out: the file, what is wrong with it, and the way out.
    pub(crate) fn settle<T>(
        self,
        read: Result<T, String>,
        (path, name): (&Path, &str),
        left_out: &mut LeftOut,
    ) -> Result<Option<T>, DataError> {
        match (read, self) {
            (Ok(item), _) => Ok(Some(item)),
            (Err(problem), Self::Skip) => {
                left_out.add(&format!("that could not be read: {problem}"), path);
                Ok(None)
            }
            (Err(problem), Self::Error) => {
                let way_out = format!("replace it, or set data.{name}.on_bad_file = \"skip\"");
                Err(DataError::in_file(path, format!("{problem}; {way_out}")))
            }
        }
    }
}

/// Files that were found and are not read, by why.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LeftOut(BTreeMap<String, (usize, Vec<String>)>);

impl LeftOut {
    /// So many files of a kind are named; of the others only their number is given.
    const NAMED: usize = 3;

    /// Counts a file. `why` goes on after a number: "2 that end in .pdf".
    pub(crate) fn add(&mut self, why: &str, path: &Path) {
        let (count, names) = self.0.entry(why.to_owned()).or_default();
        *count += 1;
        if names.len() < Self::NAMED {
            names.push(path.display().to_string());
        }
    }

    /// Adds what another search left out.
    pub(crate) fn extend(&mut self, other: Self) {
        for (why, (more, others)) in other.0 {
            let (count, names) = self.0.entry(why).or_default();
            *count += more;
            names.extend(others);
            names.truncate(Self::NAMED);
        }
    }

    /// In words, if there is anything: "left out: 2 that end in .pdf (a.pdf, b.pdf)".
    pub(crate) fn note(&self) -> Option<String> {
        let part = |(why, (count, names)): (&String, &(usize, Vec<String>))| {
            let more = if *count > names.len() { ", ..." } else { "" };
            format!("{count} {why} ({}{more})", names.join(", "))
        };
        (!self.0.is_empty()).then(|| format!("left out: {}", self.0.iter().map(part).collect::<Vec<_>>().join("; ")))
    }
}

/// What paths mean.
#[derive(Debug, Default)]
pub(crate) struct Search {
    /// Files, sorted, each once, with whether it was named itself (not only found in a folder).
    pub(crate) files: BTreeMap<PathBuf, bool>,
    /// What else was in the folders.
    pub(crate) left_out: LeftOut,
}

/// Files that patterns mean; of folders those of a kind, by how their names end: of the first kind that there are files of.
///
/// # Errors
/// If one matches nothing or cannot be searched.
pub(crate) fn search(patterns: &[String], kinds: &[&[&str]]) -> Result<Search, DataError> {
    if patterns.is_empty() {
        return Err(unusable!("paths is empty: name at least one file, folder or pattern"));
    }
    let mut all = Search::default();
    for pattern in patterns {
        // Counted apart: another pattern may have found the same files before.
        let mut found = Search::default();
        for path in matches(pattern)? {
            if path.is_dir() {
                for endings in kinds {
                    let mut inside = Search::default();
                    walk(&path, endings, &mut inside)?;
                    if !inside.files.is_empty() || kinds.last() == Some(endings) {
                        found.files.extend(inside.files);
                        found.left_out.extend(inside.left_out);
                        break;
                    }
                }
            } else {
                found.files.insert(path, true);
            }
        }
        if found.files.is_empty() {
            let here = std::env::current_dir().unwrap_or_default();
            let besides = found.left_out.note().map_or(String::new(), |note| format!("; {note}"));
            let problem = match Path::new(pattern).is_dir() {
                true => format!(
                    "the folder \"{pattern}\" holds no file that ends in {}{besides}",
                    kinds.concat().join(", ")
                ),
                false => format!("\"{pattern}\" matches no file (looked from {}){besides}", here.display()),
            };
            return Err(DataError::Unusable(problem));
        }
        for (path, named) in found.files {
            *all.files.entry(path).or_default() |= named;
        }
        all.left_out.extend(found.left_out);
    }
    Ok(all)
}

/// The paths that one pattern means. A path that exists means itself, even where its name holds signs of a pattern.
///
/// Part by part, not by `glob::glob`: that one follows links to folders in circles, and never ends where `**` meets two of them.
pub(crate) fn matches(pattern: &str) -> Result<Vec<PathBuf>, DataError> {
    if Path::new(pattern).exists() {
        return Ok(vec![pattern.into()]);
    }
    let compiled = |text: &str| Pattern::new(text).map_err(|error| unusable!("pattern \"{pattern}\": {error}"));
    compiled(pattern)?;
    let parts: Vec<Component> = Path::new(pattern).components().collect();
    let mut found = vec![PathBuf::new()];
    for (at, part) in parts.iter().enumerate() {
        let last = at + 1 == parts.len();
        let name = part.as_os_str().to_string_lossy();
        found = match part {
            // At the end: the folder, which is searched to the bottom.
            Component::Normal(_) if name == "**" && last => found,
            Component::Normal(_) if name == "**" => folders_below(found)?,
            Component::Normal(_) if name.contains(['*', '?', '[']) => entries(found, &compiled(&name)?)?,
            other => {
                let joined = found.into_iter().map(|folder| folder.join(other));
                joined.filter(|path| path.symlink_metadata().is_ok()).collect()
            }
        };
        if !last {
            found.retain(|path| path.is_dir());
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

fn named_here(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() { Path::new(".") } else { folder }
}

/// What is in folders under a name that fits.
fn entries(folders: Vec<PathBuf>, name: &Pattern) -> Result<Vec<PathBuf>, DataError> {
    let mut found = Vec::new();
    for folder in folders {
        let here = named_here(&folder);
        for entry in std::fs::read_dir(here).at(here)? {
            let own = entry.at(here)?.file_name();
            if name.matches(&own.to_string_lossy()) {
                found.push(folder.join(own));
            }
        }
    }
    Ok(found)
}

/// The folders and all folders below them, behind links too, but each real folder once: however links lead, there is an end.
fn folders_below(folders: Vec<PathBuf>) -> Result<Vec<PathBuf>, DataError> {
    let (mut seen, mut found) = (HashSet::new(), Vec::new());
    let (mut waiting, mut linked) = (folders, BTreeSet::new());
    // Real folders first: what can be reached without a link is named without one.
    while let Some(folder) = waiting.pop().or_else(|| linked.pop_first()) {
        let here = named_here(&folder);
        if !seen.insert(here.canonicalize().at(here)?) {
            continue;
        }
        for entry in std::fs::read_dir(here).at(here)? {
            let entry = entry.at(here)?;
            let (kind, path) = (entry.file_type().at(here)?, folder.join(entry.file_name()));
            if kind.is_dir() {
                waiting.push(path);
            } else if kind.is_symlink() && path.is_dir() {
                linked.insert(path);
            }
        }
        found.push(folder);
    }
    Ok(found)
}

/// All files below `folder` with one of the endings, in small letters or capitals. Left out are hidden ones, links to folders
/// (which may lead in a circle), and folders of outputs that a program can make again, which say so by a CACHEDIR.TAG.
pub(crate) fn walk(folder: &Path, endings: &[&str], search: &mut Search) -> Result<(), DataError> {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).at(&folder)? {
            let entry = entry.at(&folder)?;
            let path = entry.path();
            if entry.file_name().to_string_lossy().starts_with('.') {
                search.left_out.add("hidden", &path);
                continue;
            }
            let mut kind = entry.file_type().at(&path)?;
            if kind.is_symlink() {
                match path.metadata() {
                    Ok(behind) if behind.is_dir() => {
                        search.left_out.add("links to folders", &path);
                        continue;
                    }
                    Ok(behind) => kind = behind.file_type(),
                    // Reading it tells that it leads nowhere.
                    Err(_) => {}
                }
            }
            // The last part counts too: "gz" may be all there is.
            let last = path.extension().map(|ending| ending.to_string_lossy().to_lowercase());
            let fits = || [ending(&path), last.clone()].iter().flatten().any(|own| endings.contains(&own.as_str()));
            if kind.is_dir() {
                match path.join("CACHEDIR.TAG").exists() {
                    true => search.left_out.add("folders marked as a cache (CACHEDIR.TAG)", &path),
                    false => folders.push(path),
                }
            } else if let Some(what) = irregular(kind) {
                search.left_out.add(&format!("that is a {what}, not a file,"), &path);
            } else if fits() {
                search.files.insert(path, false);
            } else {
                let why = last.map_or("without an ending".into(), |ending| format!("that end in .{ending}"));
                search.left_out.add(&why, &path);
            }
        }
    }
    Ok(())
}

/// Opens a file on a disk.
///
/// # Errors
/// If there is none, or it is a pipe, a socket, a device or a folder.
pub(crate) fn open_file(path: &Path) -> Result<File, DataError> {
    open_regular(path).at(path)
}

/// All bytes of a file on a disk.
///
/// # Errors
/// As [`open_file`].
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>, DataError> {
    let mut bytes = Vec::new();
    open_file(path)?.read_to_end(&mut bytes).at(path)?;
    Ok(bytes)
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

/// A file without the byte order mark that some programs write before UTF-8.
pub(crate) fn without_mark(content: &[u8]) -> &[u8] {
    content.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(content)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::Folder;

    /// A folder with these files.
    fn folder(files: &[&str]) -> Folder {
        let dir = Folder::new();
        files.iter().for_each(|name| drop(dir.write(name, "x")));
        dir
    }

    /// What a pattern in the folder finds, by name.
    fn found(dir: &Path, pattern: &str) -> Vec<String> {
        let paths = matches(&dir.join(pattern).display().to_string()).unwrap();
        paths.iter().map(|path| path.strip_prefix(dir).unwrap().display().to_string()).collect()
    }

    #[test]
    fn patterns_mean_what_they_mean_to_the_glob_crate() {
        let dir = folder(&["a.txt", "b.md", "s/c.txt", "s/t/d.txt", "s/.h.txt", "u[1]/e.txt", "a1/x", "a2/x"]);
        let patterns = ["*.txt", "**/*.txt", "s/**/*.txt", "*/*.txt", "a[12]/x", "?1/x", "**/t/*", "none/*", "a.txt/*"];
        for pattern in patterns {
            let theirs = glob::glob(&dir.path().join(pattern).display().to_string()).unwrap();
            let theirs = theirs.map(|path| path.unwrap().strip_prefix(dir.path()).unwrap().display().to_string());
            let (mut theirs, mut ours) = (theirs.collect::<Vec<_>>(), found(dir.path(), pattern));
            theirs.sort();
            ours.sort();
            assert_eq!(ours, theirs, "{pattern}");
        }
        assert_eq!(found(dir.path(), "s/**"), ["s"]);
        assert!(matches("a**b").unwrap_err().to_string().contains("pattern \"a**b\""));
    }

    #[cfg(unix)]
    #[test]
    fn links_to_folders_above_come_to_an_end() {
        let dir = folder(&["s/a.txt", "other/b.txt"]);
        for (to, link) in [("..", "s/up"), (".", "s/self"), ("../other", "s/other"), ("s", "first")] {
            std::os::unix::fs::symlink(to, dir.path().join(link)).unwrap();
        }
        assert_eq!(found(dir.path(), "**/*.txt"), ["other/b.txt", "s/a.txt"]);
        assert_eq!(found(dir.path(), "first/**/a.txt"), ["first/a.txt"]);
        let found = search(&[dir.path().display().to_string()], &[&["txt"]]).unwrap();
        assert_eq!(found.files.len(), 2);
        assert!(found.left_out.note().unwrap().contains("4 links to folders ("), "{:?}", found.left_out);
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_file_is_refused_and_never_waited_for() {
        let dir = folder(&["a.txt"]);
        let socket = dir.path().join("s.txt");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let found = search(&[dir.path().display().to_string()], &[&["txt"]]).unwrap();
        assert_eq!(found.files.len(), 1);
        assert!(found.left_out.note().unwrap().contains("1 that is a socket"), "{:?}", found.left_out);
        for (path, what) in [(socket.as_path(), "socket"), (Path::new("/dev/zero"), "device"), (dir.path(), "folder")] {
            let error = read_file(path).unwrap_err().to_string();
            assert!(error.contains(&format!("is a {what}")), "{error}");
        }
    }

    #[test]
    fn what_is_left_out_is_counted_and_named() {
        let dir = folder(&["a.txt", "b.PDF", "c.pdf", "d.pdf", "e.pdf", "plain", ".hidden", "target/x.txt", "o/y.txt"]);
        std::fs::write(dir.path().join("o/CACHEDIR.TAG"), "").unwrap();
        let found = search(&[dir.path().display().to_string()], &[&["txt"]]).unwrap();
        assert_eq!(found.files.len(), 2, "a folder that is but called target is read: {:?}", found.files);
        let note = found.left_out.note().unwrap();
        for part in
            ["4 that end in .pdf (", ", ...)", "1 without an ending (", "1 hidden (", "1 folders marked as a cache ("]
        {
            assert!(note.contains(part), "no {part} in {note}");
        }
    }
}
