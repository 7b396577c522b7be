//! Documents of text: from files, from JSON lines.

use std::path::Path;

use burn_dataset::Dataset;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files::{LeftOut, Search, read_file, search, without_mark};
use crate::html::html_to_text;
use crate::sniff::{not_text, structured};
use crate::{DataError, encoding};

/// Endings that count as text when a folder is named.
const TEXT_ENDINGS: [&str; 12] = ["txt", "md", "rst", "html", "htm", "rs", "py", "toml", "json", "tex", "c", "h"];
/// Endings that count as rows of JSON when a folder is named.
const ROW_ENDINGS: [&str; 2] = ["jsonl", "ndjson"];

/// A text with its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextDocument {
    /// Where it comes from.
    pub name: String,
    /// The text.
    pub text: String,
}

/// Documents as a Burn dataset.
#[derive(Debug, Clone, Default)]
pub struct Texts(pub Vec<TextDocument>);

impl Dataset<TextDocument, DataError> for Texts {
    fn get(&self, index: usize) -> Result<TextDocument, DataError> {
        Ok(self.0[index].clone())
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

/// `[data.text]`: text files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextConfig {
    /// Files, folders (searched to the bottom for text files) and patterns such as "books/*.txt". One document a file;
    /// HTML is stripped.
    pub paths: Vec<String>,
    /// What is text: "prose" (default) refuses files that are JSON rows, JSON files or tables by their content, and leaves
    /// them out where they are found in a folder; "any" takes all that is UTF-8, such as a corpus of source code.
    #[serde(default, skip_serializing_if = "Syntax::is_default")]
    pub syntax: Syntax,
}

/// What counts as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Syntax {
    /// Whatever is no data: no JSON, no tables.
    #[default]
    Prose,
    /// All that is UTF-8.
    Any,
}

impl Syntax {
    fn is_default(&self) -> bool {
        *self == Self::Prose
    }
}

/// What was read from files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FromFiles<T> {
    /// In the order of the files.
    pub items: Vec<T>,
    /// What was left out or changed, with counts.
    pub notes: Vec<String>,
}

/// `[data.jsonl]`: one document a line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JsonlConfig {
    /// Files, folders and patterns.
    pub paths: Vec<String>,
    /// The field that holds the text. Default: "text".
    #[serde(default = "text_field")]
    pub field: String,
}

fn text_field() -> String {
    "text".into()
}

/// Reads text files.
///
/// # Errors
/// If a pattern matches nothing, a file that is named cannot be read as text, or nothing is left.
pub fn read_text(config: &TextConfig) -> Result<FromFiles<TextDocument>, DataError> {
    let Search { files, mut left_out } = search(&config.paths, &TEXT_ENDINGS)?;
    let (mut documents, mut marked) = (Vec::new(), 0);
    for (path, named) in files {
        let bytes = read_file(&path)?;
        marked += usize::from(without_mark(&bytes).len() < bytes.len());
        let text = match text_of_file(&bytes, &path, config.syntax) {
            Ok(text) => text,
            Err((what, instead)) if named => {
                let instead = instead.map_or(String::new(), |instead| format!(": {instead}"));
                return Err(DataError::Unusable(format!("{} is {what}{instead}", path.display())));
            }
            Err((what, instead)) => {
                let instead = instead.map_or(String::new(), |instead| format!(", which is no prose: {instead}"));
                left_out.add(&format!("{what}{instead}"), &path);
                continue;
            }
        };
        if text.is_empty() {
            left_out.add("empty", &path);
            continue;
        }
        let html = path.extension().is_some_and(|ending| ending == "html" || ending == "htm");
        let text = if html { html_to_text(text) } else { text.to_owned() };
        documents.push(TextDocument { name: path.display().to_string(), text });
    }
    let mark = (marked > 0).then(|| format!("{marked} files begin with a byte order mark, which is not learned"));
    let notes: Vec<String> = left_out.note().into_iter().chain(mark).collect();
    match documents.is_empty() {
        true => {
            Err(DataError::Unusable(format!("data.text: the files hold no text to learn from; {}", notes.join("; "))))
        }
        false => Ok(FromFiles { items: documents, notes }),
    }
}

/// The text of a file, or what it is instead and what reads that.
fn text_of_file<'a>(bytes: &'a [u8], path: &Path, syntax: Syntax) -> Result<&'a str, (String, Option<String>)> {
    let no_text = |bytes| not_text(bytes).map_or(Ok(()), |what| Err((what, None)));
    no_text(bytes)?;
    let text = std::str::from_utf8(without_mark(bytes)).map_err(|error| (format!("not UTF-8 ({error})"), None))?;
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase());
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

/// Reads JSON lines.
///
/// # Errors
/// If a pattern matches nothing, or a line is no object with the field.
pub fn read_jsonl(config: &JsonlConfig) -> Result<FromFiles<TextDocument>, DataError> {
    let mut documents = Vec::new();
    let left_out = for_each_row(&config.paths, |name, row| {
        let text = text_of(row, &config.field).map_err(|problem| format!("{problem}; set data.jsonl.field"))?;
        documents.push(TextDocument { name, text: text.to_owned() });
        Ok(())
    })?;
    Ok(FromFiles { items: documents, notes: left_out.note().into_iter().collect() })
}

/// A text with what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelledText {
    /// Where it comes from.
    pub name: String,
    /// The text.
    pub text: String,
    /// The name of its class; a number as it is written.
    pub label: String,
    /// The name of its group, where groups were asked for.
    pub group: Option<String>,
}

/// The fields of a row of labelled text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LabelledFields<'a> {
    /// The text.
    pub text: &'a str,
    /// Its class.
    pub label: &'a str,
    /// Its group, where groups are asked for.
    pub group: Option<&'a str>,
}

/// Reads JSON lines that hold a text and a label, and a group if asked, in fields of these names.
///
/// # Errors
/// If a pattern matches nothing, or a line lacks one of them.
pub fn read_labelled(paths: &[String], fields: LabelledFields) -> Result<FromFiles<LabelledText>, DataError> {
    let mut texts = Vec::new();
    let left_out = for_each_row(paths, |name, row| {
        let text = text_of(row, fields.text)
            .map_err(|problem| format!("{problem}; text_field names another field"))?
            .to_owned();
        let label = name_of(row, "label", fields.label)?;
        let group = fields.group.map(|field| name_of(row, "group", field)).transpose()?;
        texts.push(LabelledText { name, text, label, group });
        Ok(())
    })?;
    Ok(FromFiles { items: texts, notes: left_out.note().into_iter().collect() })
}

/// Texts that belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairedText {
    /// Where they come from.
    pub name: String,
    /// A query, a document that belongs to it, and perhaps one that does not.
    pub parts: Vec<String>,
}

/// Reads JSON lines that hold a query, a document that belongs to it and, all or none of them, one that does not, in fields of
/// these names.
///
/// # Errors
/// If a pattern matches nothing, or a line lacks what the others have.
pub fn read_pairs(
    paths: &[String],
    [query, positive, negative]: [&str; 3],
) -> Result<FromFiles<PairedText>, DataError> {
    let mut pairs: Vec<PairedText> = Vec::new();
    let left_out = for_each_row(paths, |name, row| {
        let mut parts = vec![text_of(row, query)?.to_owned(), text_of(row, positive)?.to_owned()];
        if row.get(negative).is_some() {
            parts.push(text_of(row, negative)?.to_owned());
        }
        match pairs.first() {
            Some(first) if first.parts.len() != parts.len() => {
                Err(format!("field \"{negative}\" is there in some rows only: give it in all or in none"))
            }
            _ => {
                pairs.push(PairedText { name, parts });
                Ok(())
            }
        }
    })?;
    Ok(FromFiles { items: pairs, notes: left_out.note().into_iter().collect() })
}

/// All names that occur: numbers by their size, then the others by their letters.
pub fn distinct_names<'a>(names: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut names: Vec<String> = names.cloned().collect();
    // First, so that as few as there are classes are parsed.
    names.sort_unstable();
    names.dedup();
    names.sort_by_cached_key(|name| name.parse::<i64>().map_or((1, 0), |number| (0, number)));
    names
}

/// The text in a field of a row.
fn text_of<'a>(row: &'a Value, field: &str) -> Result<&'a str, String> {
    row.get(field)
        .and_then(Value::as_str)
        .ok_or_else(|| format!("no text in field \"{field}\" ({})", found(row, field)))
}

/// The name in a field of a row: text, or a number as it is written.
fn name_of(row: &Value, what: &str, field: &str) -> Result<String, String> {
    match row.get(field) {
        Some(Value::String(name)) => Ok(name.clone()),
        Some(Value::Number(name)) if name.is_i64() || name.is_u64() => Ok(name.to_string()),
        _ => Err(format!(
            "no {what} in field \"{field}\" ({}): text or a whole number is expected; {what}_field names another field",
            found(row, field)
        )),
    }
}

/// What stands where something else was expected.
fn found(row: &Value, field: &str) -> String {
    match (row.get(field), row.as_object()) {
        (Some(other), _) => format!("it holds {other}"),
        (None, Some(row)) => format!("the row has {}", row.keys().cloned().collect::<Vec<_>>().join(", ")),
        (None, None) => "the row is no object".into(),
    }
}

/// Tells `take` of every row of files of JSON lines, with its place; what `take` finds wrong is told with that place. Gives what
/// was not read.
fn for_each_row(
    paths: &[String],
    mut take: impl FnMut(String, &Value) -> Result<(), String>,
) -> Result<LeftOut, DataError> {
    let Search { files, mut left_out } = search(paths, &ROW_ENDINGS)?;
    for path in files.into_keys() {
        let content = encoding::read_rows(&path)?;
        if content.is_empty() {
            left_out.add("empty", &path);
        }
        let content = std::str::from_utf8(without_mark(&content)).map_err(|error| {
            let what = not_text(&content).unwrap_or_else(|| error.to_string());
            DataError::Unusable(format!("{} is {what}: rows of JSON are read", path.display()))
        })?;
        for (index, line) in content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let row = |problem: String| DataError::Row { path: path.clone(), line: index + 1, problem };
            let value: Value = serde_json::from_str(line).map_err(|error| {
                // Its own "line 1" would contradict ours.
                let (problem, column) = (error.to_string(), error.column());
                row(format!("column {column}: no JSON: {}", problem.split(" at line ").next().unwrap_or_default()))
            })?;
            take(format!("{}:{}", path.display(), index + 1), &value).map_err(row)?;
        }
    }
    Ok(left_out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn prose(paths: &[&Path]) -> TextConfig {
        TextConfig { paths: paths.iter().map(|path| path.display().to_string()).collect(), syntax: Syntax::Prose }
    }

    fn texts(all: &FromFiles<TextDocument>) -> Vec<&str> {
        all.items.iter().map(|document| document.text.as_str()).collect()
    }

    #[test]
    fn lines_of_html_may_be_alike() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("page.html");
        std::fs::write(&path, "<p>cats &amp; dogs &amp; mice</p>\n".repeat(20)).unwrap();
        let read = read_text(&prose(&[&path])).unwrap();
        assert!(texts(&read)[0].contains("cats & dogs & mice"), "{:?}", texts(&read));
    }

    #[test]
    fn what_is_no_prose_is_refused_by_name_and_left_out_of_folders_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
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
            "1 JSON rows, which is no prose: data.jsonl",
            "1 empty (",
            "latin.txt",
            "1 files begin with a byte order mark",
        ] {
            assert!(notes.contains(part), "no {part} in {notes}");
        }
        for (path, reader) in [(&rows, "data.jsonl"), (&info, "to_json"), (&latin, "Latin-1"), (&table, "csv_images")] {
            let error = read_text(&prose(&[path])).unwrap_err().to_string();
            assert!(error.contains(&path.display().to_string()) && error.contains(reader), "{error}");
        }
        let any = TextConfig { syntax: Syntax::Any, ..prose(&[&rows, &info, &table]) };
        assert_eq!(read_text(&any).unwrap().items.len(), 3);
        assert!(read_text(&TextConfig { syntax: Syntax::Any, ..prose(&[&latin]) }).is_err());
    }

    #[test]
    fn rows_that_are_packed_or_of_another_encoding_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let config = JsonlConfig { paths: vec![path.display().to_string()], field: "text".into() };
        for (bytes, name) in [(&b"\xff\xfe{\0"[..], "UTF-16"), (b"{\xe9", "Latin-1")] {
            std::fs::write(&path, bytes).unwrap();
            let error = read_jsonl(&config).unwrap_err().to_string();
            assert!(error.contains("rows.jsonl is ") && error.contains(name), "{error}");
        }
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut packed, b"{\"text\": \"a\"}\n").unwrap();
        std::fs::write(&path, packed.finish().unwrap()).unwrap();
        assert_eq!(texts(&read_jsonl(&config).unwrap()), ["a"]);
    }

    #[test]
    fn folders_and_patterns_are_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &[u8]| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("b.txt", b"second");
        write("a/x.MD", b"first");
        write("a/binary.txt", &[0xff, 0xfe]);
        write("picture.png", b"no text");
        let all = read_text(&prose(&[dir.path()])).unwrap();
        assert_eq!(texts(&all), ["first", "second"]);
        assert!(all.notes[0].contains("1 that end in .png (") && all.notes[0].contains("1 UTF-16"), "{:?}", all.notes);
        let pattern = format!("{}/*.csv", dir.path().display());
        let error = read_text(&prose(&[Path::new(&pattern)])).unwrap_err().to_string();
        assert!(error.contains(&pattern), "{error}");
    }

    #[test]
    fn a_file_that_several_patterns_mean_is_read_once() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("part[1]");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("a.txt"), "only").unwrap();
        let all = read_text(&prose(&[&folder, &folder.join("a.txt")])).unwrap();
        assert_eq!(texts(&all), ["only"]);
        let pattern = dir.path().join("*/*.txt");
        let again = read_text(&prose(&[&pattern, &pattern])).unwrap();
        assert_eq!(again, all);
    }

    #[test]
    fn a_malformed_row_is_named_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, "{\"text\": \"one\"}\n\n{\"body\": \"two\"}\n").unwrap();
        let config = JsonlConfig { paths: vec![path.display().to_string()], field: "text".into() };
        let error = read_jsonl(&config).unwrap_err().to_string();
        assert!(error.contains("rows.jsonl:3") && error.contains("body"), "{error}");
    }

    #[test]
    fn pairs_have_a_wrong_document_all_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        let read = |rows: &str| {
            std::fs::write(&path, rows).unwrap();
            read_pairs(&[path.display().to_string()], ["query", "positive", "negative"])
        };
        let two = "{\"query\": \"q\", \"positive\": \"p\"}";
        let three = "{\"query\": \"q\", \"positive\": \"p\", \"negative\": \"n\"}";
        assert_eq!(read(two).unwrap().items[0].parts, ["q", "p"]);
        assert_eq!(read(three).unwrap().items[0].parts, ["q", "p", "n"]);
        let error = read(&format!("{three}\n{two}")).unwrap_err().to_string();
        assert!(error.contains("pairs.jsonl:2") && error.contains("all or in none"), "{error}");
        assert!(read("{\"query\": \"q\"}").unwrap_err().to_string().contains("no text in field \"positive\""));
    }

    #[test]
    fn labels_are_text_or_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let read = |rows: &str| {
            std::fs::write(&path, rows).unwrap();
            let fields = LabelledFields { text: "text", label: "class", group: None };
            read_labelled(&[path.display().to_string()], fields)
        };
        let rows = read("{\"text\": \"one\", \"class\": \"a\"}\n{\"text\": \"two\", \"class\": 3}\n").unwrap();
        let found: Vec<[&str; 2]> = rows.items.iter().map(|row| [row.text.as_str(), row.label.as_str()]).collect();
        assert_eq!(found, [["one", "a"], ["two", "3"]]);
        for row in ["{\"text\": \"one\"}", "{\"text\": \"one\", \"class\": null}"] {
            let error = read(row).unwrap_err().to_string();
            assert!(error.contains("rows.jsonl:1: no label in field \"class\""), "{error}");
        }
    }
}
