//! Whether files that are written would be read as data, and whether there are files to read.

use std::path::{Component, Path, PathBuf};

use glob::{MatchOptions, Pattern};

use crate::DataConfig;
use crate::files::matches;

/// Names of what is written into run folders, by which a pattern may take them for data.
const WRITTEN: [&str; 8] = [
    "recipe.toml",
    "metrics.jsonl",
    "result.json",
    "best.json",
    "curve.svg",
    "step-000001/data.json",
    "step-000001/model.safetensors",
    "step-000001/recipe.toml",
];

impl DataConfig {
    /// The path or pattern by which files that are written into `folder` would be read as data, if there is one: they would
    /// change the data while a model trains on it.
    pub fn would_read(&self, folder: &Path) -> Option<String> {
        let folder = real(folder);
        self.source().paths().into_iter().find(|source| reads(source, &folder))
    }

    /// The first path or pattern of its files that nothing is at, if there is one.
    pub fn missing(&self) -> Option<String> {
        self.source().paths().into_iter().find(|source| matches(source).is_ok_and(|found| found.is_empty()))
    }
}

fn reads(source: &str, folder: &Path) -> bool {
    if Path::new(source).exists() {
        return Path::new(source).is_dir() && folder.starts_with(real(Path::new(source)));
    }
    // What precedes the first sign of a pattern is a path, and may lead over links.
    let is_sign = |part: &Component| part.as_os_str().to_string_lossy().contains(['*', '?', '[']);
    let parts: Vec<Component> = Path::new(source).components().collect();
    let signs = parts.iter().position(is_sign).unwrap_or(parts.len());
    let base = real(&parts[..signs].iter().collect::<PathBuf>());
    let rest: PathBuf = parts[signs..].iter().collect();
    let pattern = format!("{}/{}", Pattern::escape(&base.display().to_string()), rest.display());
    let Ok(pattern) = Pattern::new(&pattern) else { return false };
    let options = MatchOptions { require_literal_separator: true, ..MatchOptions::new() };
    let matches = |path: &Path| pattern.matches_path_with(path, options);
    // A folder that matches is searched to the bottom.
    folder.ancestors().any(matches) || WRITTEN.iter().any(|name| matches(&folder.join(name)))
}

/// The path without links, of which only the beginning has to exist.
fn real(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let exists = path.ancestors().find_map(|above| Some((above, above.canonicalize().ok()?)));
    match exists {
        Some((above, real)) => real.join(path.strip_prefix(above).unwrap_or(&path)).components().collect(),
        None => path,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn folders_that_would_become_data_are_known() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        std::fs::create_dir_all(dir.path().join("data/inner")).unwrap();
        std::fs::write(dir.path().join("data/a.txt"), "a").unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink("data", dir.path().join("link")).unwrap();
        for (source, out, read) in [
            ("data", "data/run", true),
            ("data", "data", true),
            ("data", "data/inner/run/", true),
            ("data", "data-run", false),
            ("data", "run", false),
            ("data/a.txt", "data/run", false),
            ("data/a.txt", "data/a.txt", false),
            ("data/*", "data/run", true),
            ("data/*.txt", "data/run", false),
            ("data/**/*.txt", "data/run", false),
            ("data/**/*.json*", "data/run", true),
            ("data/*/*.toml", "data/run", true),
            ("none/*", "data/run", false),
            #[cfg(unix)]
            ("data", "link/run", true),
            #[cfg(unix)]
            ("link/*", "data/run", true),
        ] {
            let data: DataConfig =
                serde_json::from_value(serde_json::json!({"text": {"paths": [at(source)]}})).unwrap();
            assert_eq!(data.would_read(Path::new(&at(out))).is_some(), read, "{source} and {out}");
        }
        let folder = serde_json::json!({"image_folder": {"path": at("data"), "size": [2, 2]}});
        let data: DataConfig = serde_json::from_value(folder).unwrap();
        assert_eq!(data.would_read(Path::new(&at("data/run"))), Some(at("data")));
    }
}
