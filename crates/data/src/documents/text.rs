//! `[data.text]`: text files.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::html::html_to_text;
use super::open;
use crate::files::{Packed, Search, ending, not_text, search, structured, without_mark};
use crate::problem::{Problem, some_path};
use crate::source::Source;
use crate::texts::{Documents, TakeText, TextDocument};
use crate::{Data, DataError, Opening};

/// Endings that count as text when a folder is named.
const TEXT_ENDINGS: [&str; 12] = ["txt", "md", "rst", "html", "htm", "rs", "py", "toml", "json", "tex", "c", "h"];

/// `[data.text]`: text files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextConfig {
    /// Files, folders (searched to the bottom for text files) and patterns such as "books/*.txt". One document a file;
    /// HTML is stripped; packed files (.gz, .zst) are unpacked.
    pub paths: Vec<String>,
    /// The same, to validate on. Default: a share of the others, validation.fraction.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation_paths: Vec<String>,
    /// What is text: "prose" (default) refuses files that are JSON rows, JSON files or tables by their content, and leaves
    /// them out where they are found in a folder; "any" takes all that is UTF-8, such as a corpus of source code.
    #[serde(default, skip_serializing_if = "crate::problem::is_default")]
    pub syntax: Syntax,
}

/// What counts as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Syntax {
    /// Text, not JSON or tables.
    #[default]
    Prose,
    /// All that is UTF-8.
    Any,
}

impl Source for TextConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        some_path(&self.paths)
    }

    fn paths(&self) -> Vec<String> {
        [&self.paths[..], &self.validation_paths].concat()
    }

    fn documents(&self, _project_root: &Path) -> Result<Option<Documents>, DataError> {
        let files = |paths: &[String]| -> Result<Documents, DataError> {
            let (found, syntax) = (text_files(paths)?, self.syntax);
            Ok(Documents::counted("text file", "text", move |take| read_text(&found, syntax, take)))
        };
        let documents = files(&self.paths)?;
        Ok(Some(match self.validation_paths.is_empty() {
            true => documents,
            false => documents.with_held_out(files(&self.validation_paths)?),
        }))
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        open(self, opening)
    }
}

/// The text files that paths mean.
///
/// # Errors
/// If a pattern matches nothing or cannot be searched.
pub(super) fn text_files(paths: &[String]) -> Result<Search, DataError> {
    search(paths, &[&TEXT_ENDINGS])
}

/// Hands over the texts of files, and gives what was left out or changed.
///
/// # Errors
/// If a file that is named cannot be read as text, or nothing is left.
pub(super) fn read_text(
    Search { files, left_out }: &Search,
    syntax: Syntax,
    take: &mut TakeText<'_>,
) -> Result<Vec<String>, DataError> {
    let (mut taken, mut marked, mut left_out) = (0, 0, left_out.clone());
    for (path, &named) in files {
        let bytes = Packed::read(path)?;
        marked += usize::from(without_mark(&bytes).len() < bytes.len());
        let text = match text_of_file(&bytes, path, syntax) {
            Ok(text) => text,
            Err((what, instead)) if named => {
                let instead = instead.map_or(String::new(), |instead| format!(": {instead}"));
                return Err(unusable!("{} is {what}{instead}", path.display()));
            }
            Err((what, instead)) => {
                let instead = instead.map_or(String::new(), |instead| format!(", which is not prose: {instead}"));
                left_out.add(&format!("{what}{instead}"), path);
                continue;
            }
        };
        if text.is_empty() {
            left_out.add("empty", path);
            continue;
        }
        let html = matches!(ending(path).as_deref(), Some("html" | "htm"));
        let text = if html { html_to_text(text) } else { text.to_owned() };
        taken += 1;
        take(TextDocument { name: path.display().to_string(), text })?;
    }
    let mark = (marked > 0).then(|| format!("{marked} files begin with a byte order mark, which is left out"));
    let notes: Vec<String> = left_out.note().into_iter().chain(mark).collect();
    match taken {
        0 => Err(unusable!("data.text: the files hold no text to train on; {}", notes.join("; "))),
        _ => Ok(notes),
    }
}

/// The text of a file, or what it is instead and what reads that.
fn text_of_file<'a>(bytes: &'a [u8], path: &Path, syntax: Syntax) -> Result<&'a str, (String, Option<String>)> {
    let no_text = |bytes| not_text(bytes).map_or(Ok(()), |what| Err((what, None)));
    no_text(bytes)?;
    let text = std::str::from_utf8(without_mark(bytes)).map_err(|error| (format!("not UTF-8 ({error})"), None))?;
    let ending = ending(path);
    let is = |endings: [&str; 2]| ending.as_ref().is_some_and(|ending| endings.contains(&ending.as_str()));
    // Lines of HTML may well be alike: its tags are taken out later.
    let looked_at = syntax == Syntax::Prose && !is(["html", "htm"]);
    match looked_at.then(|| structured(text, is(["csv", "tsv"]))).flatten() {
        Some(found) => Err((
            found.what.to_owned(),
            Some(format!("{}; data.text.syntax = \"any\" learns it as it is", found.instead)),
        )),
        None => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::{Folder, gzip};

    fn prose(paths: &[&Path]) -> TextConfig {
        TextConfig {
            paths: paths.iter().map(|path| path.display().to_string()).collect(),
            validation_paths: Vec::new(),
            syntax: Syntax::Prose,
        }
    }

    /// The texts, and what was left out.
    #[derive(Debug, PartialEq)]
    struct Read {
        items: Vec<String>,
        notes: Vec<String>,
    }

    fn read_text(config: &TextConfig) -> Result<Read, DataError> {
        let mut items = Vec::new();
        let notes = super::read_text(&text_files(&config.paths)?, config.syntax, &mut |document| {
            items.push(document.text);
            Ok(())
        })?;
        Ok(Read { items, notes })
    }

    fn texts(all: &Read) -> Vec<&str> {
        all.items.iter().map(String::as_str).collect()
    }

    #[test]
    fn lines_of_html_may_be_alike() {
        let dir = Folder::new();
        let path = dir.write("page.html", "<p>cats &amp; dogs &amp; mice</p>\n".repeat(20));
        let read = read_text(&prose(&[&path])).unwrap();
        assert!(texts(&read)[0].contains("cats & dogs & mice"), "{:?}", texts(&read));
    }

    #[test]
    fn what_is_no_prose_is_refused_by_name_and_left_out_of_folders_by_name() {
        let dir = Folder::new();
        let write = |name: &str, bytes: &[u8]| dir.write(name, bytes);
        let rows = write("rows.txt", b"{\"text\": \"a\"}\n{\"text\": \"b\"}\n");
        let info = write("dataset_info.json", b"{\"features\": {}}");
        let latin = write("latin.txt", b"caf\xe9");
        let table = write("t.csv", b"a,b\n1,2\n");
        let config = prose(&[dir.path()]);
        let error = read_text(&config).unwrap_err().to_string();
        for part in ["hold no text", "rows.txt", "dataset_info.json", "latin.txt", "not UTF-8", ".csv"] {
            assert!(error.contains(part), "no {part} in {error}");
        }
        write("empty.txt", b"");
        write("book.txt", b"\xef\xbb\xbfIt was a dark night.");
        let read = read_text(&config).unwrap();
        assert_eq!(texts(&read), ["It was a dark night."]);
        let notes = read.notes.join("; ");
        for part in [
            "1 JSON rows, which is not prose: data.jsonl",
            "1 empty (",
            "latin.txt",
            "1 files begin with a byte order mark",
        ] {
            assert!(notes.contains(part), "no {part} in {notes}");
        }
        for (path, reader) in
            [(&rows, "data.jsonl"), (&info, "to_json"), (&latin, "Latin-1"), (&table, "data.jsonl (field")]
        {
            let error = read_text(&prose(&[path])).unwrap_err().to_string();
            assert!(error.contains(&path.display().to_string()) && error.contains(reader), "{error}");
        }
        let any = TextConfig { syntax: Syntax::Any, ..prose(&[&rows, &info, &table]) };
        assert_eq!(read_text(&any).unwrap().items.len(), 3);
        assert!(read_text(&TextConfig { syntax: Syntax::Any, ..prose(&[&latin]) }).is_err());
    }

    #[test]
    fn packed_texts_are_unpacked() {
        let dir = Folder::new();
        dir.write("a.html.gz", gzip("<p>a &amp; b</p>\n"));
        let zstandard = ruzstd::encoding::compress_to_vec(&b"plain"[..], ruzstd::encoding::CompressionLevel::Fastest);
        dir.write("b.txt.zst", zstandard);
        dir.write("c.zip.gz", "");
        let read = read_text(&prose(&[dir.path()])).unwrap();
        assert_eq!(texts(&read), ["a & b\n", "plain"]);
        assert!(read.notes[0].contains("1 that end in .gz"), "{:?}", read.notes);
    }

    #[test]
    fn folders_and_patterns_are_read_in_order() {
        let dir = Folder::new();
        dir.write("b.txt", "second");
        dir.write("a/x.MD", "first");
        dir.write("a/binary.txt", [0xff, 0xfe]);
        dir.write("picture.png", "no text");
        let all = read_text(&prose(&[dir.path()])).unwrap();
        assert_eq!(texts(&all), ["first", "second"]);
        assert!(all.notes[0].contains("1 that end in .png (") && all.notes[0].contains("1 UTF-16"), "{:?}", all.notes);
        let pattern = format!("{}/*.csv", dir.path().display());
        let error = read_text(&prose(&[Path::new(&pattern)])).unwrap_err().to_string();
        assert!(error.contains(&pattern), "{error}");
    }

    #[test]
    fn a_file_that_several_patterns_mean_is_read_once() {
        let dir = Folder::new();
        let file = dir.write("part[1]/a.txt", "only");
        let all = read_text(&prose(&[&dir.path().join("part[1]"), &file])).unwrap();
        assert_eq!(texts(&all), ["only"]);
        let pattern = dir.path().join("*/*.txt");
        let again = read_text(&prose(&[&pattern, &pattern])).unwrap();
        assert_eq!(again, all);
    }
}
