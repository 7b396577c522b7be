//! `[data.feature_table]`: rows of numbers with their classes.

use std::collections::HashMap;

use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Found;
use crate::batches::{Content, Example};
use crate::documents::{distinct_names, for_each_row, name_of};
use crate::files::{Search, Sides, sides};
use crate::problem::{Problem, require, some_path};
use crate::source::Source;
use crate::{Data, DataError, Opening};

/// `[data.feature_table]`: rows of numbers with their classes, of a table (.csv, .tsv), of Parquet or Arrow, or of JSON, packed
/// (.gz, .zst) or not. A column holds a number, or a list of them; a single one may hold a list for each layer of a frozen encoder. The numbers are
/// taken as they are, and kept in memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FeatureTableConfig {
    /// Files, folders and patterns. Of a folder whose files are called train, validation and test, as those of the Hugging Face
    /// hub, train is trained on, validation is held out, and test is left out.
    pub paths: Vec<String>,
    /// Files to validate on. Default: the validation files of folders, or a share of the others, validation.fraction.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation_paths: Vec<String>,
    /// The columns that hold features, in this order. Default: all but label_field, as the first row has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
    /// The column that holds the class, as text or as a whole number. Default: "label".
    #[serde(default = "super::label")]
    pub label_field: String,
}

impl Source for FeatureTableConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        some_path(&self.paths)?;
        require(!self.columns.contains(&self.label_field), "columns", || {
            format!("columns names \"{}\", which label_field takes for the class", self.label_field)
        })
    }

    fn paths(&self) -> Vec<String> {
        [&self.paths[..], &self.validation_paths].concat()
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let Sides { train, validation, mut notes } = sides(&self.paths, &self.validation_paths)?;
        let mut table = Table::default();
        notes.extend(self.read(&train, &mut table)?);
        let to_train = table.labels.len();
        let classes = distinct_names(table.labels.iter());
        table.known = Some(classes.clone());
        if let Some(files) = &validation {
            notes.extend(self.read(files, &mut table)?);
        }
        let Table { columns, values, labels: names, layers, dim, .. } = table;
        let places: HashMap<&str, u32> = classes.iter().map(String::as_str).zip(0..).collect();
        let labels: Vec<u32> = names.iter().map(|name| places[name.as_str()]).collect();
        let mut hash = blake3::Hasher::new();
        for part in columns.iter().chain(&names) {
            hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        for value in &values {
            hash.update(&value.to_le_bytes());
        }
        let (of_examples, size) = (labels.clone(), layers * dim);
        let example = move |at: usize| {
            let content = Content::Numbers(values[at * size..(at + 1) * size].to_vec());
            Ok(Example { content, label: of_examples[at], group: 0 })
        };
        let found = Found {
            what: format!("rows of {} ({})", in_words(layers, dim), columns.join(", ")),
            shape: InputShape::Features { layers, dim },
            labels,
            to_train,
            classes,
            label_field: Some("label_field"),
            groups: Vec::new(),
            example: Box::new(example),
            notes,
            hash,
        };
        found.open("", opening)
    }
}

fn in_words(layers: usize, dim: usize) -> String {
    if layers == 1 { format!("{dim} features") } else { format!("features of {layers} layers of {dim} numbers") }
}

/// What was read so far.
#[derive(Default)]
struct Table {
    columns: Vec<String>,
    /// `[rows, layers, dim]`
    values: Vec<f32>,
    labels: Vec<String>,
    /// The classes of what is trained on, once all of it has been read.
    known: Option<Vec<String>>,
    layers: usize,
    dim: usize,
}

impl FeatureTableConfig {
    /// Adds the rows of files; gives what was not read, in words.
    fn read(&self, files: &Search, table: &mut Table) -> Result<Vec<String>, DataError> {
        let asked: Vec<&str> = match self.columns.is_empty() {
            true => Vec::new(),
            false => self.columns.iter().chain([&self.label_field]).map(String::as_str).collect(),
        };
        for_each_row(files, &asked, |_, row| self.add(row, table))
    }

    fn add(&self, row: &Value, table: &mut Table) -> Result<(), String> {
        let label = name_of(row, "label", &self.label_field)?;
        if table.known.as_ref().is_some_and(|known| !known.contains(&label)) {
            return Err(format!("class \"{label}\" occurs in what is held out only"));
        }
        if table.labels.is_empty() {
            let fields = row.as_object().into_iter().flat_map(|row| row.keys());
            let others = || fields.filter(|name| **name != self.label_field).cloned().collect();
            table.columns = if self.columns.is_empty() { others() } else { self.columns.clone() };
        }
        let before = table.values.len();
        let mut layers = 1;
        for column in &table.columns {
            let value = row.get(column).unwrap_or(&Value::Null);
            match value.as_array().filter(|items| items.first().is_some_and(Value::is_array)) {
                Some(items) if table.columns.len() == 1 => {
                    layers = items.len();
                    items.iter().try_for_each(|item| add_numbers(item, column, &mut table.values))?;
                }
                _ => add_numbers(value, column, &mut table.values)?,
            }
        }
        let count = table.values.len() - before;
        if table.labels.is_empty() {
            (table.layers, table.dim) = (layers, count / layers);
        }
        if count == 0 {
            return Err(format!("no column with features beside \"{}\", which holds the class", self.label_field));
        }
        if layers != table.layers || count != layers * table.dim {
            return Err(format!(
                "it holds {count} numbers in {layers} layers, the first row {} in {}: all rows hold as many",
                table.layers * table.dim,
                table.layers
            ));
        }
        table.labels.push(label);
        Ok(())
    }
}

/// Adds the numbers of a column: one, or a list of them. In tables they are texts.
fn add_numbers(value: &Value, column: &str, to: &mut Vec<f32>) -> Result<(), String> {
    let number = match value {
        Value::Array(items) if items.iter().all(|item| !item.is_array()) => {
            return items.iter().try_for_each(|item| add_numbers(item, column, to));
        }
        Value::Number(number) => number.as_f64().map(|number| number as f32),
        Value::Bool(yes) => Some(f32::from(*yes)),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    to.push(number.filter(|number| number.is_finite()).ok_or_else(|| {
        format!("column \"{column}\" holds {value}, which is no number: data.feature_table.columns names those with features")
    })?);
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use polyhead_models::Inputs;

    use super::*;
    use crate::testing::Folder;
    use crate::{DataConfig, Labelled, OpenOptions, Tokenizer};

    fn open(table: Value) -> Result<Labelled, String> {
        let config: DataConfig = serde_json::from_value(serde_json::json!({ "feature_table": table })).unwrap();
        let options = OpenOptions { validation_fraction: 0.25, ..crate::tests::options(1, 7, 3) };
        config.open_examples(&Tokenizer::bytes(), &options).map_err(|error| error.to_string())
    }

    /// All rows to train on, sorted, with the names of their classes.
    fn rows(labelled: &Labelled) -> Vec<(Vec<String>, String)> {
        let mut all = Vec::new();
        for position in 0..labelled.train.batches_per_epoch() {
            let batch = labelled.train.batch(position).unwrap();
            let Inputs::Features { values, layers, dim } = batch.inputs else { panic!("no features") };
            let texts = values.chunks(layers * dim).map(|row| row.iter().map(f32::to_string).collect());
            all.extend(texts.zip(batch.labels.iter().map(|&label| labelled.classes[label as usize].clone())));
        }
        all.sort();
        all.dedup();
        all
    }

    fn shape_of(labelled: &Labelled) -> [usize; 2] {
        match labelled.train.batch(0).unwrap().inputs {
            Inputs::Features { layers, dim, .. } => [layers, dim],
            _ => panic!("no features"),
        }
    }

    fn row(numbers: [&str; 3], class: &str) -> (Vec<String>, String) {
        (numbers.map(str::to_owned).into(), class.to_owned())
    }

    #[test]
    fn tables_lists_and_layers_are_features() {
        let dir = Folder::new();
        let csv = dir.write("iris.csv", "a,label,b,c\n2.5,red,1,-3\n5,blue,4,6e-1\n 8 ,red,7,9\n");
        let held = dir.write("held.csv", "a,label,b,c\n0,red,0,0\n");
        let json = dir.write(
            "lists.jsonl",
            "{\"label\": 0, \"x\": [2.5, 1, -3]}\n{\"label\": 1, \"x\": [5, 4, 0.6]}\n{\"label\": 0, \"x\": [8, 7, 9]}\n",
        );
        let deep = dir.write(
            "deep.jsonl",
            "{\"label\": 0, \"x\": [[2.5], [1], [-3]]}\n{\"label\": 1, \"x\": [[5], [4], [0.6]]}\n{\"label\": 0, \"x\": [[8], [7], [9]]}\n",
        );
        let of = |path: &std::path::Path, more: Value| {
            let mut table = serde_json::json!({ "paths": [path], "validation_paths": [path] });
            table.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            open(table).unwrap()
        };
        let names = ["red", "blue", "red"];
        let expected = |names: [&str; 3]| {
            [(["2.5", "1", "-3"], 0), (["5", "4", "0.6"], 1), (["8", "7", "9"], 2)]
                .map(|(x, at)| row(x, names[at]))
                .to_vec()
        };
        let found = of(&csv, serde_json::json!({ "validation_paths": [held] }));
        assert_eq!((rows(&found), found.classes.clone()), (expected(names), vec!["blue".into(), "red".into()]));
        let found = of(&csv, serde_json::json!({ "columns": ["c", "b"] }));
        assert_eq!(rows(&found)[0].0, ["-3", "1"], "in the order of the recipe");
        for (path, shape) in [(&json, [1, 3]), (&deep, [3, 1])] {
            let found = of(path, serde_json::json!({}));
            assert_eq!((rows(&found), shape_of(&found)), (expected(["0", "1", "0"]), shape));
        }
    }

    #[test]
    fn what_is_no_number_is_named_with_its_row_and_column() {
        let dir = Folder::new();
        for (content, words) in [
            (
                "a,label\n1,x\n?,y\n",
                "t.csv:3: column \"a\" holds \"?\", which is no number: data.feature_table.columns",
            ),
            ("a,label\n1,x\nnan,y\n", "t.csv:3: column \"a\" holds \"nan\""),
            ("a,class\n1,x\n", "t.csv:2: no label in field \"label\" (the row has a, class)"),
            ("label\nx\n", "t.csv:2: no column with features"),
        ] {
            let path = dir.write("t.csv", content);
            let error = open(serde_json::json!({ "paths": [path] })).err().unwrap();
            assert!(error.contains(words), "{error}");
        }
        for (content, words) in [
            (
                "{\"label\": 0, \"x\": [1, 2]}\n{\"label\": 1, \"x\": [1]}\n",
                "t.jsonl:2: it holds 1 numbers in 1 layers, the first row 2",
            ),
            ("{\"label\": 0, \"x\": [1, null]}\n", "t.jsonl:1: column \"x\" holds null"),
            ("{\"label\": 0, \"x\": [[1], [2]], \"y\": 1}\n", "t.jsonl:1: column \"x\" holds [[1],[2]]"),
            ("{\"label\": 0, \"x\": 1}\n{\"label\": 1, \"y\": 1}\n", "t.jsonl:2: column \"x\" holds null"),
        ] {
            let path = dir.write("t.jsonl", content);
            let error = open(serde_json::json!({ "paths": [path] })).err().unwrap();
            assert!(error.contains(words), "{error}");
        }
        let (train, held) = (dir.write("t.csv", "a,label\n1,x\n2,y\n"), dir.write("held.csv", "a,label\n1,x\n2,z\n"));
        let error = open(serde_json::json!({ "paths": [train], "validation_paths": [held] })).err().unwrap();
        assert!(error.contains("held.csv:3: class \"z\" occurs in what is held out only"), "{error}");
    }
}
