//! `[data.jsonl]`: rows with a text in a field.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::open;
use super::rows::text_of;
use crate::files::{Search, Sides, for_each_row, sides};
use crate::problem::{Problem, require, some_path};
use crate::source::Source;
use crate::texts::{Documents, TakeText, TextDocument};
use crate::{Data, DataError, Opening};

/// `[data.jsonl]`: one document a row, of JSON lines, JSON arrays, or tables (.csv, .tsv) whose first row names the columns,
/// packed (.gz, .zst) or not; or of Parquet or Arrow.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JsonlConfig {
    /// Files, folders and patterns. Of a folder whose files are called train, validation and test, as those of the Hugging Face
    /// hub, train is trained on, validation is held out, and test is left out.
    pub paths: Vec<String>,
    /// The same, to validate on. Default: the validation files of folders, or a share of the others, validation.fraction.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation_paths: Vec<String>,
    /// The field, or the column, that holds the text. Default: "text".
    #[serde(default = "text_field")]
    pub field: String,
    /// Rows to read: those whose numbers keep all of these rules. Default: all.
    #[serde(default, rename = "where", skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<NumberRule>,
}

/// A rule for the number in a field, or in a column, of a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NumberRule {
    /// The field.
    pub field: String,
    /// It is larger than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub above: Option<f64>,
    /// It is this or more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_least: Option<f64>,
    /// It is smaller than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below: Option<f64>,
    /// It is this or less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_most: Option<f64>,
}

impl NumberRule {
    /// Whether a number keeps it.
    pub fn keeps(&self, number: f64) -> bool {
        self.above.is_none_or(|bound| number > bound)
            && self.at_least.is_none_or(|bound| number >= bound)
            && self.below.is_none_or(|bound| number < bound)
            && self.at_most.is_none_or(|bound| number <= bound)
    }

    /// Whether a row keeps it; tables have their numbers as text.
    fn keeps_row(&self, row: &Value) -> Result<bool, String> {
        let value = row.get(&self.field);
        let number = value.and_then(|value| value.as_f64().or_else(|| value.as_str()?.trim().parse().ok()));
        let number = number.ok_or_else(|| {
            let found = value.map_or("it is missing".to_owned(), |value| format!("it holds {value}"));
            format!("no number in field \"{}\" ({found}), for which data.jsonl.where has a rule", self.field)
        })?;
        Ok(self.keeps(number))
    }

    fn validate(&self) -> Result<(), Problem> {
        let Self { above, at_least, below, at_most, .. } = self;
        let bounds: Vec<f64> = [above, at_least, below, at_most].into_iter().flatten().copied().collect();
        require(!bounds.is_empty() && bounds.iter().all(|bound| !bound.is_nan()), "where", || {
            format!("where: the rule for \"{}\" has no bound: give above, at_least, below or at_most", self.field)
        })
    }
}

fn text_field() -> String {
    "text".into()
}

impl Source for JsonlConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        some_path(&self.paths)?;
        self.rules.iter().try_for_each(NumberRule::validate)
    }

    fn paths(&self) -> Vec<String> {
        [&self.paths[..], &self.validation_paths].concat()
    }

    fn documents(&self, _project_root: &Path) -> Result<Option<Documents>, DataError> {
        let Sides { train, validation, notes } = sides(&self.paths, &self.validation_paths)?;
        let rows = |files: Search| {
            let config = self.clone();
            Documents::counted("row", "jsonl", move |take| read_jsonl(&config, &files, take))
        };
        let documents = rows(train).noted(notes);
        Ok(Some(match validation {
            None => documents,
            Some(files) => documents.with_held_out(rows(files)),
        }))
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        open(self, opening)
    }
}

impl JsonlConfig {
    /// The text of a row; `None` where a rule leaves it out.
    fn text(&self, row: &Value) -> Result<Option<String>, String> {
        for rule in &self.rules {
            if !rule.keeps_row(row)? {
                return Ok(None);
            }
        }
        let text = text_of(row, &self.field).map_err(|problem| format!("{problem}; set data.jsonl.field"))?;
        Ok(Some(text.to_owned()))
    }
}

/// Hands over the texts of rows, and gives what was left out.
///
/// # Errors
/// If a file is broken, a row is not an object with the field, or no row is left.
fn read_jsonl(config: &JsonlConfig, files: &Search, take: &mut TakeText<'_>) -> Result<Vec<String>, DataError> {
    let (mut taken, mut left_out) = (0, 0);
    let columns: Vec<&str> = config.rules.iter().map(|rule| &*rule.field).chain([&*config.field]).collect();
    let unread = for_each_row(files, &columns, &mut |place, row| {
        let text = row.value().and_then(|row| config.text(&row)).map_err(|problem| place.wrong(problem))?;
        let Some(text) = text else {
            left_out += 1;
            return Ok(());
        };
        taken += 1;
        take(TextDocument { name: place.to_string(), text })
    })?;
    if taken == 0 && left_out > 0 {
        return Err(unusable!(
            "data.jsonl.where leaves none of {left_out} rows: loosen its rules, or name other paths"
        ));
    }
    let ruled_out = (left_out > 0).then(|| format!("{left_out} rows left out by data.jsonl.where"));
    Ok(unread.note().into_iter().chain(ruled_out).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::{Folder, gzip};

    fn config(path: &Path) -> JsonlConfig {
        JsonlConfig {
            paths: vec![path.display().to_string()],
            validation_paths: Vec::new(),
            field: "text".into(),
            rules: Vec::new(),
        }
    }

    /// The texts, and what was left out.
    fn read_jsonl(config: &JsonlConfig) -> Result<(Vec<String>, Vec<String>), DataError> {
        let (texts, contents) = config.documents(Path::new(""))?.unwrap().read_all()?;
        Ok((texts.into_iter().map(|document| document.text).collect(), contents.notes))
    }

    #[test]
    fn rows_that_are_packed_or_of_another_encoding_are_named() {
        let dir = Folder::new();
        for (bytes, name) in [(&b"\xff\xfe{\0"[..], "UTF-16"), (b"{\xe9", ":1: not UTF-8 (byte 0xe9 at 1; Latin-1")] {
            let error = read_jsonl(&config(&dir.write("rows.jsonl", bytes))).unwrap_err().to_string();
            assert!(error.contains("rows.jsonl") && error.contains(name), "{error}");
        }
        let packed = dir.write("rows.jsonl", gzip("{\"text\": \"a\"}\n"));
        assert_eq!(read_jsonl(&config(&packed)).unwrap().0, ["a"]);
    }

    #[test]
    fn rows_are_chosen_by_their_numbers() {
        let dir = Folder::new();
        let rows = "text,likes,tokens\njunk,501,29\nplain,500,101\nlong,900,30\nshort,501,100\n";
        let rule =
            |field: &str, above, below| NumberRule { field: field.into(), above, at_least: None, below, at_most: None };
        let rules = vec![rule("likes", Some(500.0), None), rule("tokens", None, Some(30.0))];
        let config = JsonlConfig { rules, ..config(&dir.write("rows.csv", rows)) };
        let (texts, notes) = read_jsonl(&config).unwrap();
        assert_eq!(texts, ["junk"]);
        assert_eq!(notes, ["3 rows left out by data.jsonl.where"]);
        let message = |rule: NumberRule| {
            let config = JsonlConfig { rules: vec![rule], ..config.clone() };
            config
                .validate(8)
                .map_err(|error| error.problem)
                .and(read_jsonl(&config).map_err(|error| error.to_string()))
        };
        assert!(message(rule("likes", None, None)).unwrap_err().contains("has no bound"));
        assert!(message(rule("likes", Some(5000.0), None)).unwrap_err().contains("leaves none of 4 rows"));
        let error = message(rule("text", Some(0.0), None)).unwrap_err();
        assert!(
            error.contains("rows.csv") && error.contains("no number in field \"text\" (it holds \"junk\")"),
            "{error}"
        );
    }

    #[test]
    fn a_malformed_row_is_named_by_line() {
        let dir = Folder::new();
        let path = dir.write("rows.jsonl", "{\"text\": \"one\"}\n\n{\"body\": \"two\"}\n");
        let error = read_jsonl(&config(&path)).unwrap_err().to_string();
        assert!(error.contains("rows.jsonl:3") && error.contains("body"), "{error}");
    }
}
