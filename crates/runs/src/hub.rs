//! Models by their names on the Hugging Face hub, in the cache that Hugging Face's own tools fill: a folder
//! `models--org--name` for each, with `refs` (which commit a branch or tag is), `snapshots` (the files of a commit, links) and
//! `blobs` (what they contain).

use std::fmt;
use std::path::{Path, PathBuf};

use polyhead_models::hf;

use crate::error::Failure;

/// A model on the hub: `org/name`, or `org/name@revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// `org/name`
    pub name: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

/// The branch that is meant where no revision is given.
pub const MAIN: &str = "main";

/// The longest name that the hub allows.
const LONGEST: usize = 96;

impl Reference {
    /// What a text names; `None` where it can only be a path. It is not looked up.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, revision) = text.split_once('@').unwrap_or((text, MAIN));
        let (org, own) = name.split_once('/')?;
        let plain = |text: &str| {
            let first = text.starts_with(|sign: char| sign.is_ascii_alphanumeric() || sign == '_');
            let sign = |sign: char| sign.is_ascii_alphanumeric() || "._-".contains(sign);
            first && !text.contains("..") && text.chars().all(sign)
        };
        let fits = plain(org) && plain(own) && name.len() <= LONGEST && revision.split('/').all(plain);
        fits.then(|| Self { name: name.to_owned(), revision: revision.to_owned() })
    }

    /// The folder of its files in a cache, if it is there and whole.
    ///
    /// # Errors
    /// If the cache is damaged, or a download was not finished: names the file and the way out.
    pub fn cached(&self, cache: &Path) -> Result<Option<PathBuf>, Failure> {
        let home = self.folder(cache);
        let (named, of_commit) = (home.join("refs").join(&self.revision), home.join("snapshots").join(&self.revision));
        let snapshot = match std::fs::read_to_string(&named) {
            Ok(commit) => {
                let commit = commit.trim();
                if commit.is_empty() || !commit.chars().all(|sign| sign.is_ascii_alphanumeric()) {
                    let problem = "must contain the hash of a commit";
                    return Err(Failure::Run(format!("{}: {problem}: {}", named.display(), self.again())));
                }
                home.join("snapshots").join(commit)
            }
            Err(_) if of_commit.is_dir() => of_commit,
            Err(_) => return Ok(None),
        };
        let missing = |name: &str| Failure::Run(format!("{}: {name} is missing: {}", snapshot.display(), self.again()));
        if !hf::files::is_folder(&snapshot) {
            return Err(missing(hf::files::CONFIG));
        }
        for entry in std::fs::read_dir(&snapshot)?.flatten() {
            if !entry.path().exists() {
                let problem = "is a link to a blob that is not there";
                return Err(Failure::Run(format!("{} {problem}: {}", entry.path().display(), self.again())));
            }
        }
        match hf::missing_weights(&snapshot).map_err(Failure::Run)? {
            Some(name) => Err(missing(&name)),
            None => Ok(Some(snapshot)),
        }
    }

    /// Where a cache keeps it, if it does.
    pub fn folder(&self, cache: &Path) -> PathBuf {
        cache.join(format!("models--{}", self.name.replace('/', "--")))
    }

    /// What completes it.
    fn again(&self) -> String {
        format!(
            "the model is not whole in the cache; --download, or `hf download {}`, fetches what is missing",
            self.name
        )
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            MAIN => write!(f, "{}", self.name),
            revision => write!(f, "{}@{revision}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        let of = |text| Reference::parse(text).map(|found| (found.name, found.revision));
        let some = |name: &str, revision: &str| Some((name.to_owned(), revision.to_owned()));
        assert_eq!(of("org/name"), some("org/name", "main"));
        assert_eq!(of("a-b/c.d_e@v1.0"), some("a-b/c.d_e", "v1.0"));
        assert_eq!(of("org/name@refs/pr/3"), some("org/name", "refs/pr/3"));
        let long = format!("org/{}", "x".repeat(93));
        let paths =
            ["name", "/org/name", "./name", "../name", "a/b/c", "org/../x", "org/a..b", "org/name@../x", "o rg/x", ""];
        for path in paths.into_iter().chain([long.as_str(), "org/name@", "org/na\u{e9}"]) {
            assert_eq!(of(path), None, "{path}");
        }
        assert_eq!(Reference::parse("org/name@main").unwrap().to_string(), "org/name");
    }

    #[test]
    fn a_model_is_found_by_branch_or_commit() {
        let cache = tempfile::tempdir().unwrap();
        let home = cache.path().join("models--org--name");
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let snapshot = home.join("snapshots").join(commit);
        let find = |text: &str| Reference::parse(text).unwrap().cached(cache.path());
        assert_eq!(find("org/name").unwrap(), None);
        for folder in [home.join("refs/refs/pr"), home.join("blobs"), snapshot.clone()] {
            std::fs::create_dir_all(folder).unwrap();
        }
        std::fs::write(home.join("refs/main"), commit).unwrap();
        std::fs::write(home.join("refs/refs/pr/3"), format!("{commit}\n")).unwrap();
        let unfinished = find("org/name").unwrap_err().to_string();
        assert!(
            unfinished.contains("config.json is missing") && unfinished.contains("hf download org/name"),
            "{unfinished}"
        );
        std::fs::write(home.join("blobs/b"), "{}").unwrap();
        std::os::unix::fs::symlink("../../blobs/b", snapshot.join("config.json")).unwrap();
        assert!(find("org/name").unwrap_err().to_string().contains("model.safetensors is missing"));
        let index = r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
        std::fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();
        std::fs::write(snapshot.join("one.safetensors"), "").unwrap();
        assert!(find("org/name").unwrap_err().to_string().contains("two.safetensors is missing"));
        std::fs::write(snapshot.join("two.safetensors"), "").unwrap();
        for text in ["org/name", "org/name@refs/pr/3", &format!("org/name@{commit}")] {
            assert_eq!(find(text).unwrap().as_ref(), Some(&snapshot), "{text}");
        }
        assert_eq!(find("org/name@v2").unwrap(), None);
        assert_eq!(find("org/other").unwrap(), None);
        std::os::unix::fs::symlink("../../blobs/gone", snapshot.join("model.safetensors")).unwrap();
        assert!(find("org/name").unwrap_err().to_string().contains("model.safetensors is a link to a blob"));
        std::fs::write(home.join("refs/main"), "../../../etc").unwrap();
        assert!(find("org/name").unwrap_err().to_string().contains("the hash of a commit"));
    }
}
