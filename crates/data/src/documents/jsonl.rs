//! `[data.jsonl]`: rows with a text in a field.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rows::{for_each_row, text_of};
use super::{Documents, FromFiles, TextDocument};
use crate::source::{Problem, Source, some_path};
use crate::{Data, DataError, Modality, Opening, Yields};

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
    const YIELDS: Yields = Yields::Tokens;
    const MODALITY: Modality = Modality::Text;

    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        some_path(&self.paths)
    }

    fn paths(&self) -> Vec<String> {
        self.paths.clone()
    }

    fn documents(&self, _project_root: &Path) -> Option<Result<Documents, DataError>> {
        Some(read_jsonl(self).and_then(|read| Documents::counted(read, "row", "jsonl")))
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        Documents::counted(read_jsonl(self)?, "row", opening.name)?.open(opening)
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

    fn texts(all: &FromFiles<TextDocument>) -> Vec<&str> {
        all.items.iter().map(|document| document.text.as_str()).collect()
    }

    #[test]
    fn rows_that_are_packed_or_of_another_encoding_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let config = JsonlConfig { paths: vec![path.display().to_string()], field: "text".into() };
        for (bytes, name) in [(&b"\xff\xfe{\0"[..], "UTF-16"), (b"{\xe9", ":1: not UTF-8 (byte 0xe9 at 1; Latin-1")] {
            std::fs::write(&path, bytes).unwrap();
            let error = read_jsonl(&config).unwrap_err().to_string();
            assert!(error.contains("rows.jsonl") && error.contains(name), "{error}");
        }
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut packed, b"{\"text\": \"a\"}\n").unwrap();
        std::fs::write(&path, packed.finish().unwrap()).unwrap();
        assert_eq!(texts(&read_jsonl(&config).unwrap()), ["a"]);
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
}
