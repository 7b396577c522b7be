//! The quickstart's text: the English of the Rust documentation that rustup installs, or the project's own text.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::html::html_to_text;
use super::text::{read_text, text_files};
use super::{Syntax, open};
use crate::error::At;
use crate::files::{Search, walk};
use crate::texts::{Documents, TextDocument};
use crate::{Data, DataError, Opening, Source};

/// The books among the documentation, which are prose; the API pages are ten times as much and mostly signatures.
const BOOKS: &str =
    "book reference nomicon rust-by-example cargo edition-guide rustc rustdoc embedded-book error_codes clippy";
/// Folders of translations.
const TRANSLATIONS: [&str; 4] = ["es", "ja", "ko", "zh"];
/// Pages that repeat others or hold no text.
const NO_PROSE: [&str; 4] = ["print.html", "toc.html", "404.html", "SUMMARY.html"];
/// Shorter pages are redirects.
const SHORTEST_PAGE: usize = 200;

/// The Rust documentation has no settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RustDocsConfig {}

impl Source for RustDocsConfig {
    fn documents(&self, project_root: &Path) -> Result<Option<Documents>, DataError> {
        read_rust_docs(project_root).map(Some)
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        open(self, opening)
    }
}

/// The documents.
///
/// # Errors
/// If neither the documentation nor the project's own text can be read.
fn read_rust_docs(project_root: &Path) -> Result<Documents, DataError> {
    if let Some((root, version)) = installed() {
        let documents = books(&root)?;
        if !documents.is_empty() {
            let bytes: usize = documents.iter().map(|document| document.text.len()).sum();
            let size = bytes as f64 / 1e6;
            let words = format!("the Rust documentation of {version} ({size:.1} MB, {} pages)", documents.len());
            return Ok(Documents::described(words, documents));
        }
    }
    own_text(project_root).map(|(texts, words)| Documents::described(words, texts))
}

/// The project's own text and source.
fn own_text(project_root: &Path) -> Result<(Vec<TextDocument>, String), DataError> {
    let paths = ["README.md", "crates", "recipes", "tests"].map(|name| project_root.join(name));
    let paths: Vec<String> = paths.iter().filter(|path| path.exists()).map(|path| path.display().to_string()).collect();
    if paths.is_empty() {
        let problem = "the Rust documentation is not installed (rustup component add rust-docs), and this is not the \
            project's folder, whose own text would serve: set data.text.paths";
        return Err(DataError::Unusable(problem.into()));
    }
    let mut documents = Vec::new();
    read_text(&text_files(&paths)?, Syntax::Any, &mut |document| {
        documents.push(document);
        Ok(())
    })?;
    let words = format!(
        "Polyhead's own text and source ({} files), as the Rust documentation is not installed (rustup component add \
         rust-docs)",
        documents.len()
    );
    Ok((documents, words))
}

/// The folder of the HTML and the toolchain's version, if the component is there.
fn installed() -> Option<(PathBuf, String)> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let ask = |argument: &[&str]| {
        let output = Command::new(&rustc).args(argument).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let root = Path::new(&ask(&["--print", "sysroot"])?).join("share/doc/rust/html");
    let version = ask(&["--version"])?.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    root.is_dir().then_some((root, version))
}

/// All pages of the books, stripped; two at a time.
fn books(root: &Path) -> Result<Vec<TextDocument>, DataError> {
    let mut found = Search::default();
    for book in BOOKS.split(' ').map(|book| root.join(book)).filter(|book| book.is_dir()) {
        walk(&book, &["html"], &mut found)?;
    }
    let prose = |path: &PathBuf| {
        let mut parts = path.strip_prefix(root).unwrap_or(path).iter().filter_map(|part| part.to_str());
        !parts.any(|part| TRANSLATIONS.contains(&part) || NO_PROSE.contains(&part))
    };
    let pages: Vec<PathBuf> = found.files.into_keys().filter(prose).collect();
    let strip = |path: &PathBuf| -> Result<Option<TextDocument>, DataError> {
        let html = String::from_utf8_lossy(&std::fs::read(path).at(path)?).into_owned();
        if html.contains("http-equiv=\"refresh\"") {
            return Ok(None);
        }
        let text = html_to_text(&html);
        let name = path.strip_prefix(root).unwrap_or(path).display().to_string();
        Ok((text.len() >= SHORTEST_PAGE).then_some(TextDocument { name, text }))
    };
    let (first, second) = pages.split_at(pages.len() / 2);
    let strip_all = |pages: &[PathBuf]| pages.iter().filter_map(|page| strip(page).transpose()).collect();
    let (first, second): (Result<Vec<_>, _>, Result<Vec<_>, _>) = std::thread::scope(|scope| {
        let handle = scope.spawn(|| strip_all(first));
        let second = strip_all(second);
        (handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), second)
    });
    let mut documents = first?;
    documents.extend(second?);
    // A book's index.html is its first chapter again.
    let mut seen = HashSet::new();
    documents.retain(|document| seen.insert(blake3::hash(document.text.as_bytes())));
    Ok(documents)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn pages_are_stripped_and_redirects_left_out() {
        let root = tempfile::tempdir().unwrap();
        let book = root.path().join("book");
        std::fs::create_dir_all(book.join("ja")).unwrap();
        std::fs::create_dir_all(book.join("fn")).unwrap();
        let page = |body: &str| format!("<html><body><main><p>{body}</p></main></body></html>");
        let long = "Ownership is a set of rules that govern how a program manages memory. ".repeat(5);
        std::fs::write(book.join("ch04.html"), page(&long)).unwrap();
        std::fs::write(book.join("print.html"), page(&long)).unwrap();
        std::fs::write(book.join("short.html"), page("too short")).unwrap();
        std::fs::write(book.join("ja/ch04.html"), page(&long)).unwrap();
        std::fs::write(book.join("fn/closures.html"), page(&format!("Closures. {long}"))).unwrap();
        std::fs::write(book.join("index.html"), page(&long)).unwrap(); // the first chapter again
        let documents = books(root.path()).unwrap();
        assert_eq!(
            documents.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(),
            ["book/ch04.html", "book/fn/closures.html"]
        );
    }

    #[test]
    fn without_documentation_the_project_reads_itself() {
        let root = tempfile::tempdir().unwrap();
        assert!(own_text(root.path()).unwrap_err().to_string().contains("rustup component add rust-docs"));
        std::fs::create_dir_all(root.path().join("crates/one/src")).unwrap();
        std::fs::write(root.path().join("README.md"), "Read me.").unwrap();
        std::fs::write(root.path().join("crates/one/src/lib.rs"), "//! Source.").unwrap();
        let (documents, words) = own_text(root.path()).unwrap();
        assert_eq!(documents.iter().map(|d| d.text.as_str()).collect::<Vec<_>>(), ["Read me.", "//! Source."]);
        assert!(words.contains("2 files") && words.contains("not installed"), "{words}");
    }
}
