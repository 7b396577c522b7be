//! Rows with named fields: lines of JSON, a JSON array, or a table (CSV, TSV) whose first row names the columns, packed or not;
//! or Parquet, or Arrow. Tables are known by how their names end, the others by their content.

use std::fmt::{Display, Formatter};
use std::io::{BufRead, Read};
use std::path::Path;

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::{LeftOut, Packed, Search, Table, arrow, ending, kind, parquet, search, without_mark};
use crate::DataError;
use crate::error::At;

/// How the names of files of rows end. Of a folder that has several of these kinds, the first is read.
const KINDS: [&[&str]; 4] = [&["jsonl", "ndjson"], &["parquet"], &["arrow"], &["csv", "tsv"]];

/// Where a row is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) path: &'a Path,
    /// From 1.
    pub(crate) line: usize,
    /// Of files that have rows and no lines: what part of the file it is in.
    pub(super) part: Option<Part>,
}

/// A part of a file: what it is called, and its number from 0.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part(pub &'static str, pub usize);

impl Display for Part {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.0, self.1)
    }
}

impl Place<'_> {
    /// Something is wrong with the row.
    pub(crate) fn wrong(self, problem: String) -> DataError {
        match self.part {
            None => DataError::Row { path: self.path.to_owned(), line: self.line, problem },
            Some(part) => unusable!("{self} ({part}): {problem}"),
        }
    }
}

impl Display for Place<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let separator = if self.part.is_some() { ": row " } else { ":" };
        write!(f, "{}{separator}{}", self.path.display(), self.line)
    }
}

/// A row as its file has it.
pub(crate) enum Row<'a> {
    /// JSON.
    Json(&'a [u8]),
    /// A row of a table.
    Fields(Value),
}

impl Row<'_> {
    /// The row's fields.
    ///
    /// # Errors
    /// If it is invalid JSON.
    pub(crate) fn value(self) -> Result<Value, String> {
        match self {
            Self::Fields(value) => Ok(value),
            Self::Json(json) => match super::not_text(json) {
                Some(what) if std::str::from_utf8(json).is_err() => Err(what),
                _ => serde_json::from_slice(json).map_err(|error| invalid(&error)),
            },
        }
    }
}

/// What serde_json says of a row; its own line would contradict that of the file.
pub(crate) fn invalid(error: &serde_json::Error) -> String {
    let problem = error.to_string();
    format!("column {}: invalid JSON: {}", error.column(), problem.split(" at line ").next().unwrap_or_default())
}

/// A file has none of the columns that are asked for.
pub(super) fn none_of(path: &Path, columns: &[&str], there: &[&str]) -> DataError {
    unusable!(
        "{} has none of the columns {}: it has {}; name them in the recipe",
        path.display(),
        columns.join(", "),
        there.join(", ")
    )
}

/// What takes rows, each with its place.
pub(super) type Take<'a> = dyn FnMut(Place<'_>, Row<'_>) -> Result<(), DataError> + 'a;

/// The files of rows that paths mean.
///
/// # Errors
/// If a pattern matches nothing or cannot be searched.
pub(crate) fn rows_of(paths: &[String]) -> Result<Search, DataError> {
    let mut found = search(paths, &KINDS)?;
    arrow::leave_out_caches(&mut found)?;
    Ok(found)
}

/// Hands every row of files to `take`; of Parquet and Arrow with these columns, or all if there are none here. Gives what was not read.
///
/// # Errors
/// If a file is broken, or `take` finds something wrong.
pub(crate) fn for_each_row(
    Search { files, left_out }: &Search,
    columns: &[&str],
    take: &mut Take<'_>,
) -> Result<LeftOut, DataError> {
    let mut left_out = left_out.clone();
    for path in files.keys() {
        let mut file = Packed::open(path)?;
        let head = if file.length().is_some() { file.content.fill_buf().at(path)? } else { &[] };
        if head.starts_with(b"PAR1") {
            parquet::rows(path, columns, take)?;
            continue;
        }
        if arrow::begins(head) {
            arrow::rows(path, file.content, columns, take)?;
            continue;
        }
        let mut rest = file.stream();
        let mut head = Vec::new();
        rest.by_ref().take(HEAD).read_to_end(&mut head).at(path)?;
        if head.is_empty() {
            left_out.add("empty", path);
        }
        if let Some(kind) = kind(&head) {
            return Err(unusable!("{} is {kind}", path.display()));
        }
        let head = without_mark(&head);
        let content = head.chain(rest);
        match ending(path).as_deref() {
            Some("csv" | "tsv") => table(content, path, take)?,
            _ if head.trim_ascii_start().starts_with(b"[") => array(content, path, take)?,
            _ => lines(content, path, take)?,
        }
    }
    Ok(left_out)
}

/// Bytes at the beginning that tell what a file is, and bytes in which a value over several lines is looked for; chosen by us.
const HEAD: u64 = 1 << 16;
const ONE_VALUE: u64 = 1 << 26;

fn lines(mut content: impl BufRead, path: &Path, take: &mut Take<'_>) -> Result<(), DataError> {
    let mut line = Vec::new();
    let Some(first) = next_line(&mut content, &mut line, 0, path)? else { return Ok(()) };
    let mut after = Vec::new();
    if serde_json::from_slice::<IgnoredAny>(&line).is_err() {
        content.by_ref().take(ONE_VALUE).read_to_end(&mut after).at(path)?;
        if serde_json::from_slice::<IgnoredAny>(&[&line[..], &after].concat()).is_ok() {
            return Err(unusable!(
                "{} is one JSON value over several lines: rows are one object a line, or a JSON array of objects (`jq` \
                 makes one: jq '.data' for the field \"data\")",
                path.display()
            ));
        }
    }
    let mut content = after.as_slice().chain(content);
    let mut number = Some(first);
    while let Some(at) = number {
        take(Place { path, line: at, part: None }, Row::Json(line.strip_suffix(b"\n").unwrap_or(&line)))?;
        number = next_line(&mut content, &mut line, at, path)?;
    }
    Ok(())
}

/// Reads the next line that is not blank, and gives its number; the one before it was number `at`.
fn next_line(
    content: &mut impl BufRead,
    line: &mut Vec<u8>,
    mut at: usize,
    path: &Path,
) -> Result<Option<usize>, DataError> {
    loop {
        line.clear();
        if content.read_until(b'\n', line).at(path)? == 0 {
            return Ok(None);
        }
        at += 1;
        if !line.trim_ascii().is_empty() {
            return Ok(Some(at));
        }
    }
}

/// Hands over the elements of an array one by one; what is wrong inside of one is found by who reads it.
fn array(mut content: impl BufRead, path: &Path, take: &mut Take<'_>) -> Result<(), DataError> {
    let mut scan = ArrayScan { line: 1, ..ArrayScan::default() };
    loop {
        let bytes = content.fill_buf().at(path)?;
        if bytes.is_empty() {
            break;
        }
        let count = bytes.len();
        for &byte in bytes {
            scan.push(byte, path, take)?;
        }
        content.consume(count);
    }
    match scan.closed {
        true => Ok(()),
        false => {
            let place = Place { path, line: scan.line, part: None };
            Err(place.wrong("the JSON array has no end: is the file cut off?".into()))
        }
    }
}

/// Where in an array a reader is.
#[derive(Default)]
struct ArrayScan {
    depth: usize,
    line: usize,
    quoted: bool,
    escaped: bool,
    /// The line of the element that is not at its end yet, and what of it there is.
    first: Option<usize>,
    element: Vec<u8>,
    closed: bool,
    after_comma: bool,
}

impl ArrayScan {
    fn push(&mut self, byte: u8, path: &Path, take: &mut Take<'_>) -> Result<(), DataError> {
        let line = self.line;
        let wrong = |problem: &str| Err(Place { path, line, part: None }.wrong(problem.to_owned()));
        if !self.quoted && !byte.is_ascii_whitespace() {
            if self.closed {
                return wrong("there is more after the end of the JSON array: give one array, or one object a line");
            }
            let ends = self.depth == 1 && matches!(byte, b',' | b']');
            match self.first.take() {
                Some(line) if ends => {
                    take(Place { path, line, part: None }, Row::Json(self.element.trim_ascii_end()))?;
                    self.element.clear();
                }
                None if ends && (byte == b',' || self.after_comma) => {
                    return wrong("an element of the JSON array is missing");
                }
                None if self.depth >= 1 && !ends => self.first = Some(line),
                other => self.first = other,
            }
            self.after_comma = ends && byte == b',';
        }
        if self.first.is_some() {
            self.element.push(byte);
        }
        match byte {
            b'\n' => self.line += 1,
            _ if self.escaped => self.escaped = false,
            b'\\' if self.quoted => self.escaped = true,
            b'"' => self.quoted = !self.quoted,
            b'[' | b'{' if !self.quoted => self.depth += 1,
            b']' | b'}' if !self.quoted => {
                self.depth -= 1;
                self.closed = self.depth == 0;
            }
            _ => {}
        }
        Ok(())
    }
}

fn table(content: impl BufRead, path: &Path, take: &mut Take<'_>) -> Result<(), DataError> {
    let mut table = Table::new(path, content, &mut csv::ReaderBuilder::new(), usize::MAX);
    let Some((first, headings)) = table.next_record()? else { return Ok(()) };
    let place = |line: usize| Place { path, line, part: None };
    let names = || headings.iter();
    let twice = names().enumerate().find(|(at, name)| names().take(*at).any(|other| other == *name));
    if let Some((_, name)) = twice {
        return Err(place(first).wrong(format!("two columns are called \"{name}\": rename one")));
    }
    let mut multi_line = None;
    while let Some((line, record)) = table.next_record()? {
        multi_line = record.iter().any(|cell| cell.contains('\n')).then_some(line);
        let cells = names().zip(&record).map(|(name, cell)| (name.to_owned(), Value::from(cell)));
        take(place(line), Row::Fields(Value::Object(cells.collect::<Map<_, _>>())))?;
    }
    // A quote that is never closed swallows the rest of the file.
    match multi_line {
        Some(line) if !table.quotes_close() => {
            Err(place(line).wrong("a quote that is opened here is never closed".into()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::Folder;

    /// The rows of a file, each with its line; or the error.
    fn read(name: &str, content: &[u8]) -> Result<Vec<(usize, Value)>, String> {
        let dir = Folder::new();
        let path = dir.write(name, content);
        let mut rows = Vec::new();
        let mut take = |place: Place<'_>, row: Row<'_>| {
            rows.push((place.line, row.value().map_err(|problem| place.wrong(problem))?));
            Ok(())
        };
        for_each_row(&rows_of(&[path.display().to_string()]).unwrap(), &[], &mut take)
            .map_err(|error| error.to_string())?;
        Ok(rows)
    }

    #[test]
    fn arrays_and_lines_and_tables_are_the_same_rows() {
        let rows = |name: &str, content: &str| read(name, content.as_bytes()).unwrap();
        let object = |text: &str, label: &str| serde_json::json!({ "text": text, "label": label });
        let expected = [object("a, \"b\"]\n{", "x"), object("c", "")];
        let [first, second] = expected.each_ref().map(Value::to_string);
        let pretty = serde_json::to_string_pretty(&expected).unwrap();
        for (name, content, lines) in [
            ("r.jsonl", format!("{first}\n\n{second}\n"), [1, 3]),
            ("r.json", format!(" [{first},\n{second} ]\n"), [1, 2]),
            ("r.json", pretty, [2, 6]),
            ("r.csv", "\u{feff}text,label\r\n\"a, \"\"b\"\"]\n{\",x\r\nc,\r\n".to_owned(), [2, 4]),
            ("r.csv", "text;label\n\"a, \"\"b\"\"]\n{\";x\nc;\n".to_owned(), [2, 4]),
            ("r.TSV", "text\tlabel\n\"a, \"\"b\"\"]\n{\"\tx\nc\t".to_owned(), [2, 4]),
        ] {
            let found = rows(name, &content);
            assert_eq!(found.iter().map(|(_, row)| row.clone()).collect::<Vec<_>>(), expected, "{content}");
            assert_eq!(found.iter().map(|(line, _)| *line).collect::<Vec<_>>(), lines, "{content}");
        }
        assert_eq!(rows("r.json", "[]"), []);
        assert_eq!(rows("r.json", "[ [1], \"]\", 2]").len(), 3);
    }

    #[test]
    fn what_is_broken_is_named_by_line() {
        for (name, content, words) in [
            ("r.json", &b"[{\"a\": 1},\n{\"a\": 2}"[..], "r.json:2: the JSON array has no end"),
            ("r.json", b"[{\"a\": 1},\n]", "r.json:2: an element of the JSON array is missing"),
            ("r.json", b"[1]\n[2]", "r.json:2: there is more after the end"),
            ("r.json", b"[{\"a\": 1},\n{\"a\" 2}]", "r.json:2: column 6: invalid JSON"),
            ("r.json", b"{\n \"data\": [1]\n}", "r.json is one JSON value over several lines"),
            ("r.jsonl", b"{}\n{\"a\": \"\xe9\"}", "r.jsonl:2: not UTF-8 (byte 0xe9 at 7; Latin-1"),
            ("r.csv", b"a,b\n1,2\n3\n", "r.csv:3: 1 cells, and 2 columns are named"),
            ("r.csv", b"a,a\n1,2\n", "r.csv:1: two columns are called \"a\""),
            ("r.csv", b"a,b\n1,2\n3,\"4\n5,6\n", "r.csv:3: a quote that is opened here is never closed"),
            ("r.csv", b"a,b\n1,caf\xe9\n", "r.csv:2: not UTF-8 (byte 0xe9"),
        ] {
            let error = read(name, content).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        assert_eq!(read("r.csv", b"a,b\n3,1.5\" disk\n").unwrap().len(), 1, "a quote inside of a cell is a sign");
    }
}
