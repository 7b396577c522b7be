//! `polyhead new`: a folder with a recipe, a comparison and a text, ready to be trained.

use std::path::Path;

use polyhead_runs::Failure;

use super::new_folder::NewFolder;
use crate::console::{put, talk};

/// The files of a project. Their order is the one in which a person reads them.
const FILES: [(&str, &str); 4] = [
    ("README.md", include_str!("new/README.md")),
    ("pretrain.toml", include_str!("new/pretrain.toml")),
    ("compare.toml", include_str!("new/compare.toml")),
    ("data/sample.txt", include_str!("new/sample.txt")),
];

/// Makes a project.
///
/// # Errors
/// If the folder exists, or cannot be written.
pub fn new(folder: &Path) -> Result<(), Failure> {
    let made = NewFolder::begin(folder)?;
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    for (file, text) in FILES {
        let path = made.path().join(file);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|error| Failure::file("create", parent, error))?;
        }
        std::fs::write(&path, text.replace("{name}", &name)).map_err(|error| Failure::file("write", &path, error))?;
    }
    made.finish()?;
    for (file, _) in FILES {
        put!("{}", folder.join(file).display())?;
    }
    talk!("next: cd {} && polyhead train pretrain.toml --out run", folder.display());
    Ok(())
}
