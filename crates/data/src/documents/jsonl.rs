//! `[data.jsonl]`: rows with a text in a field.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::open;
use super::rows::{for_each_row, text_of};
use crate::problem::{Problem, some_path};
use crate::source::Source;
use crate::texts::{Documents, FromFiles, TextDocument};
use crate::{Data, DataError, Opening};

/// `[data.jsonl]`: one document a row, of JSON lines, JSON arrays, or tables (.csv, .tsv) whose first row names the columns,
/// packed (.gz, .zst) or not; or of Parquet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JsonlConfig {
    /// Files, folders and patterns.
    pub paths: Vec<String>,
    /// The field, or the column, that holds the text. Default: "text".
    #[serde(default = "text_field")]
    pub field: String,
}

fn text_field() -> String {
    "text".into()
}

impl Source for JsonlConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        some_path(&self.paths)
    }

    fn paths(&self) -> Vec<String> {
        self.paths.clone()
    }

    fn documents(&self, _project_root: &Path) -> Result<Option<Documents>, DataError> {
        Documents::counted(read_jsonl(self)?, "row", "jsonl").map(Some)
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        open(self, opening)
    }
}

/// Reads the texts of rows.
///
/// # Errors
/// If a pattern matches nothing, or a row is not an object with the field.
fn read_jsonl(config: &JsonlConfig) -> Result<FromFiles<TextDocument>, DataError> {
    let mut documents = Vec::new();
    let notes = for_each_row(&config.paths, &[&config.field], |name, row| {
        let text = text_of(row, &config.field).map_err(|problem| format!("{problem}; set data.jsonl.field"))?;
        documents.push(TextDocument { name, text: text.to_owned() });
        Ok(())
    })?;
    Ok(FromFiles { items: documents, notes })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::{Folder, gzip};

    fn config(path: &Path) -> JsonlConfig {
        JsonlConfig { paths: vec![path.display().to_string()], field: "text".into() }
    }

    fn texts(all: &FromFiles<TextDocument>) -> Vec<&str> {
        all.items.iter().map(|document| document.text.as_str()).collect()
    }

    #[test]
    fn rows_that_are_packed_or_of_another_encoding_are_named() {
        let dir = Folder::new();
        for (bytes, name) in [(&b"\xff\xfe{\0"[..], "UTF-16"), (b"{\xe9", ":1: not UTF-8 (byte 0xe9 at 1; Latin-1")] {
            let error = read_jsonl(&config(&dir.write("rows.jsonl", bytes))).unwrap_err().to_string();
            assert!(error.contains("rows.jsonl") && error.contains(name), "{error}");
        }
        let packed = dir.write("rows.jsonl", gzip("{\"text\": \"a\"}\n"));
        assert_eq!(texts(&read_jsonl(&config(&packed)).unwrap()), ["a"]);
    }

    #[test]
    fn a_malformed_row_is_named_by_line() {
        let dir = Folder::new();
        let path = dir.write("rows.jsonl", "{\"text\": \"one\"}\n\n{\"body\": \"two\"}\n");
        let error = read_jsonl(&config(&path)).unwrap_err().to_string();
        assert!(error.contains("rows.jsonl:3") && error.contains("body"), "{error}");
    }
}
