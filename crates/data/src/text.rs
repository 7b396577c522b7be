//! Documents of text: from files, from JSON lines.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn_dataset::Dataset;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::At;
use crate::html::html_to_text;
use crate::{DataError, encoding};

/// Endings that count as text when a folder is named.
const TEXT_ENDINGS: [&str; 12] = ["txt", "md", "rst", "html", "htm", "rs", "py", "toml", "json", "tex", "c", "h"];

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
/// If a pattern matches nothing, or a file that is named cannot be read as UTF-8.
pub fn read_text(config: &TextConfig) -> Result<Vec<TextDocument>, DataError> {
    let mut documents = Vec::new();
    for (path, named) in expand(&config.paths, &TEXT_ENDINGS)? {
        let bytes = std::fs::read(&path).at(&path)?;
        let kind = encoding::kind(&bytes);
        let Ok(text) = String::from_utf8(bytes) else {
            if named {
                let kind = kind.unwrap_or("no UTF-8 text");
                return Err(DataError::Unusable(format!("{} is {kind}", path.display())));
            }
            continue;
        };
        let html = path.extension().is_some_and(|ending| ending == "html" || ending == "htm");
        let text = if html { html_to_text(&text) } else { text };
        documents.push(TextDocument { name: path.display().to_string(), text });
    }
    Ok(documents)
}

/// Reads JSON lines.
///
/// # Errors
/// If a pattern matches nothing, or a line is no object with the field.
pub fn read_jsonl(config: &JsonlConfig) -> Result<Vec<TextDocument>, DataError> {
    let mut documents = Vec::new();
    for_each_row(&config.paths, |name, row| {
        let text = text_of(row, &config.field).map_err(|problem| format!("{problem}; set data.jsonl.field"))?;
        documents.push(TextDocument { name, text: text.to_owned() });
        Ok(())
    })?;
    Ok(documents)
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
pub fn read_labelled(paths: &[String], fields: LabelledFields) -> Result<Vec<LabelledText>, DataError> {
    let mut texts = Vec::new();
    for_each_row(paths, |name, row| {
        let text = text_of(row, fields.text)
            .map_err(|problem| format!("{problem}; text_field names another field"))?
            .to_owned();
        let label = name_of(row, "label", fields.label)?;
        let group = fields.group.map(|field| name_of(row, "group", field)).transpose()?;
        texts.push(LabelledText { name, text, label, group });
        Ok(())
    })?;
    Ok(texts)
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
pub fn read_pairs(paths: &[String], [query, positive, negative]: [&str; 3]) -> Result<Vec<PairedText>, DataError> {
    let mut pairs: Vec<PairedText> = Vec::new();
    for_each_row(paths, |name, row| {
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
    Ok(pairs)
}

/// All names that occur: numbers by their size, then the others by their letters.
pub fn distinct_names<'a>(names: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut names: Vec<String> = names.cloned().collect();
    names.sort_by_key(|name| (name.parse::<i64>().map_or((1, 0), |number| (0, number)), name.clone()));
    names.dedup();
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

/// Tells `take` of every row of files of JSON lines, with its place; what `take` finds wrong is told with that place.
fn for_each_row(paths: &[String], mut take: impl FnMut(String, &Value) -> Result<(), String>) -> Result<(), DataError> {
    for (path, _) in expand(paths, &["jsonl", "ndjson"])? {
        let content = encoding::read_rows(&path)?;
        let Ok(content) = std::str::from_utf8(without_mark(&content)) else {
            return Err(DataError::Unusable(format!("{} is no UTF-8 text", path.display())));
        };
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
    Ok(())
}

/// A file without the byte order mark that some programs write before UTF-8.
pub(crate) fn without_mark(content: &[u8]) -> &[u8] {
    content.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(content)
}

/// Files that patterns mean, sorted, each once, with whether it was named itself (not only found in a folder).
pub(crate) fn expand(patterns: &[String], endings: &[&str]) -> Result<BTreeMap<PathBuf, bool>, DataError> {
    if patterns.is_empty() {
        return Err(DataError::Unusable("paths is empty: name at least one file, folder or pattern".into()));
    }
    let mut found = BTreeMap::new();
    for pattern in patterns {
        // Counted apart from `found`: another pattern may have found the same files before.
        let mut matched = BTreeMap::new();
        for path in matches(pattern)? {
            if path.is_dir() {
                walk(&path, endings, &mut matched)?;
            } else {
                matched.insert(path, true);
            }
        }
        if matched.is_empty() {
            let here = std::env::current_dir().unwrap_or_default();
            let problem = match Path::new(pattern).is_dir() {
                true => format!("the folder \"{pattern}\" holds no file that ends in {}", endings.join(", ")),
                false => format!("\"{pattern}\" matches no file (looked from {})", here.display()),
            };
            return Err(DataError::Unusable(problem));
        }
        for (path, named) in matched {
            *found.entry(path).or_default() |= named;
        }
    }
    Ok(found)
}

/// The paths that one pattern means. A path that exists means itself, even where its name holds signs of a pattern.
fn matches(pattern: &str) -> Result<Vec<PathBuf>, DataError> {
    if Path::new(pattern).exists() {
        return Ok(vec![pattern.into()]);
    }
    let paths = glob::glob(pattern).map_err(|e| DataError::Unusable(format!("pattern \"{pattern}\": {e}")))?;
    paths.map(|path| path.map_err(|e| DataError::File { path: e.path().to_owned(), cause: e.into() })).collect()
}

/// All files below `folder` with one of the endings, in small letters or capitals; hidden ones, `target` and links to folders (which may lead in a
/// circle) are left out.
fn walk(folder: &Path, endings: &[&str], found: &mut BTreeMap<PathBuf, bool>) -> Result<(), DataError> {
    for entry in std::fs::read_dir(folder).at(folder)? {
        let path = entry.at(folder)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') || name == "target" {
            continue;
        }
        if path.is_dir() {
            if !path.is_symlink() {
                walk(&path, endings, found)?;
            }
        } else if path.extension().is_some_and(|ending| endings.iter().any(|known| ending.eq_ignore_ascii_case(known)))
        {
            found.insert(path, false);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

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
        let all = read_text(&TextConfig { paths: vec![dir.path().display().to_string()] }).unwrap();
        assert_eq!(all.iter().map(|d| d.text.as_str()).collect::<Vec<_>>(), ["first", "second"]);
        let pattern = format!("{}/*.csv", dir.path().display());
        let error = read_text(&TextConfig { paths: vec![pattern.clone()] }).unwrap_err().to_string();
        assert!(error.contains(&pattern), "{error}");
    }

    #[test]
    fn a_file_that_several_patterns_mean_is_read_once() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("part[1]");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("a.txt"), "only").unwrap();
        let paths = vec![folder.display().to_string(), folder.join("a.txt").display().to_string()];
        let all = read_text(&TextConfig { paths }).unwrap();
        assert_eq!(all.iter().map(|d| d.text.as_str()).collect::<Vec<_>>(), ["only"]);
        let pattern = format!("{}/*/*.txt", dir.path().display());
        let again = read_text(&TextConfig { paths: vec![pattern.clone(), pattern] }).unwrap();
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
        assert_eq!(read(two).unwrap()[0].parts, ["q", "p"]);
        assert_eq!(read(three).unwrap()[0].parts, ["q", "p", "n"]);
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
        let found: Vec<[&str; 2]> = rows.iter().map(|row| [row.text.as_str(), row.label.as_str()]).collect();
        assert_eq!(found, [["one", "a"], ["two", "3"]]);
        for row in ["{\"text\": \"one\"}", "{\"text\": \"one\", \"class\": null}"] {
            let error = read(row).unwrap_err().to_string();
            assert!(error.contains("rows.jsonl:1: no label in field \"class\""), "{error}");
        }
    }
}
