//! What a person may have meant by a name that is not there.

use std::path::{Path, PathBuf};

/// Names that are less alike (Jaro-Winkler) are not suggested; chosen by us.
const ALIKE: f64 = 0.82;

/// The name most like `typed`, if any is like it.
pub fn nearest<T: AsRef<str>>(typed: &str, names: impl IntoIterator<Item = T>) -> Option<T> {
    let alike = names.into_iter().map(|name| (strsim::jaro_winkler(typed, name.as_ref()), name));
    alike.filter(|(alike, _)| *alike > ALIKE).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, name)| name)
}

/// The same of names that are to be kept.
pub fn nearest_name(typed: &str, names: &[&str]) -> Option<String> {
    nearest(typed, names.iter().copied()).map(str::to_owned)
}

/// The path beside `typed`, or in one of the folders there, whose name is most like its own.
pub fn nearest_path(typed: &Path, valid: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let folder = typed.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    let beside = folder.read_dir().ok()?.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| valid(path));
    // Endings, which are the same in most of them, say nothing.
    let name = |path: &Path| Some(path.file_stem()?.to_str()?.to_owned());
    let paths: Vec<(String, PathBuf)> = beside.filter_map(|path| Some((name(&path)?, path))).collect();
    let found = nearest(&name(typed)?, paths.iter().map(|(name, _)| name))?;
    let path = paths.iter().find(|(name, _)| name == found).map(|(_, path)| path)?;
    Some(path.strip_prefix(".").unwrap_or(path).to_owned())
}

/// The recipes below a folder, in order. Folders that cannot be read have none.
pub fn recipes_below(folder: &Path) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        for path in folder.read_dir().into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())) {
            if path.is_dir() && !path.is_symlink() {
                folders.push(path);
            } else if is_recipe(&path) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Whether a file may be a recipe, by its name.
pub fn is_recipe(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "toml")
}
