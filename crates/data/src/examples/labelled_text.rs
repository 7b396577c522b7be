//! `[data.labelled_text]`: texts with their classes.

use std::collections::HashMap;

use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Found;
use crate::batches::{Content, Example};
use crate::documents::{LabelledFields, LabelledText, distinct_names, read_labelled_of};
use crate::files::{Search, Sides, sides};
use crate::problem::{Problem, some_path};
use crate::source::Source;
use crate::texts::FromFiles;
use crate::{Data, DataError, Opening};

/// `[data.labelled_text]`: texts with their classes, one a row: a line of JSON, an object in a JSON array, or a row of a table
/// (.csv, .tsv) whose first row names the columns, packed (.gz, .zst) or not; or a row of Parquet or Arrow. Texts longer than training.seq_len are cut.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelledTextConfig {
    /// Files, folders and patterns. Of a folder whose files are called train, validation and test, as those of the Hugging Face
    /// hub, train is trained on, validation is held out, and test is left out.
    pub paths: Vec<String>,
    /// Files to validate on. Default: the validation files of folders, or a share of the others, validation.fraction.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation_paths: Vec<String>,
    /// The field that holds the text. Default: "text".
    #[serde(default = "text")]
    pub text_field: String,
    /// The field that holds the class, as text or as a whole number. Default: "label".
    #[serde(default = "super::label")]
    pub label_field: String,
    /// The field that holds the group by which a model is asked to be equally good (loss.worst_group), as text or as a whole
    /// number. Default: no groups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_field: Option<String>,
}

fn text() -> String {
    "text".into()
}

impl Source for LabelledTextConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        some_path(&self.paths)
    }

    fn paths(&self) -> Vec<String> {
        [&self.paths[..], &self.validation_paths].concat()
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let (tokenizer, seq_len) = (opening.tokenizer, opening.options.seq_len);
        let Sides { train, validation, mut notes } = sides(&self.paths, &self.validation_paths)?;
        let FromFiles { items: mut rows, notes: own } = self.rows(&train)?;
        notes.extend(own);
        let to_train = rows.len();
        let classes = distinct_names(rows.iter().map(|row| &row.label));
        if let Some(files) = &validation {
            let FromFiles { items, notes: more } = self.rows(files)?;
            rows.extend(items);
            notes.extend(more);
        }
        let groups = distinct_names(rows.iter().filter_map(|row| row.group.as_ref()));
        let places: HashMap<&str, u32> = classes.iter().map(String::as_str).zip(0..).collect();
        let (mut hash, mut texts, mut cut) = (blake3::Hasher::new(), Vec::new(), 0);
        for LabelledText { name, text, label, group } in rows {
            for part in [&text, &label].into_iter().chain(&group) {
                hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
            }
            let label = places
                .get(label.as_str())
                .copied()
                .ok_or_else(|| unusable!("{name}: class \"{label}\" occurs in what is held out only"))?;
            let mut tokens = tokenizer.encode(&text)?;
            cut += usize::from(tokens.len() > seq_len);
            tokens.truncate(seq_len);
            if tokens.is_empty() {
                tokens.push(tokenizer.end_of_text().unwrap_or(0));
            }
            let group = groups.iter().position(|name| Some(name) == group.as_ref()).unwrap_or(0);
            texts.push(Example { content: Content::Tokens(tokens), label, group: group as u32 });
        }
        let also = if cut > 0 { format!("; {cut} cut to {seq_len} tokens") } else { String::new() };
        let found = Found {
            what: "labelled texts".into(),
            shape: InputShape::Tokens { vocab_size: tokenizer.vocab_size(), seq_len },
            labels: texts.iter().map(|text| text.label).collect(),
            to_train,
            classes,
            label_field: Some("label_field"),
            groups,
            example: Box::new(move |at| Ok(texts[at].clone())),
            notes,
            hash,
        };
        found.open(&also, opening)
    }
}

impl LabelledTextConfig {
    fn rows(&self, files: &Search) -> Result<FromFiles<LabelledText>, DataError> {
        let Self { text_field, label_field, group_field, .. } = self;
        read_labelled_of(files, LabelledFields { text: text_field, label: label_field, group: group_field.as_deref() })
    }
}
