//! Texts with their classes, one a line of JSON.

use std::collections::HashMap;
use std::sync::Arc;

use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Classes, Content, Example, ExampleSet, Labelled, divide, loader};
use crate::loader::Order;
use crate::synthetic::Problem;
use crate::text::{FromFiles, LabelledFields, LabelledText, distinct_names, read_labelled};
use crate::{DataError, OpenOptions, Tokenizer};

/// `[data.labelled_text]`: texts with their classes, one a line of JSON. Texts longer than training.seq_len are cut.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelledTextConfig {
    /// Files, folders and patterns.
    pub paths: Vec<String>,
    /// Files to validate on. Default: a share of the others, validation.fraction.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation_paths: Vec<String>,
    /// The field that holds the text. Default: "text".
    #[serde(default = "text")]
    pub text_field: String,
    /// The field that holds the class, as text or as a whole number. Default: "label".
    #[serde(default = "label")]
    pub label_field: String,
    /// The field that holds the group by which a model is asked to be equally good (loss.worst_group), as text or as a whole
    /// number. Default: no groups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_field: Option<String>,
}

fn text() -> String {
    "text".into()
}

fn label() -> String {
    "label".into()
}

impl LabelledTextConfig {
    /// Checks the settings without touching a file.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self) -> Result<(), Problem> {
        match self.paths.is_empty() {
            true => Err(("paths", "paths is empty: name at least one file, folder or pattern".into())),
            false => Ok(()),
        }
    }

    fn rows(&self, paths: &[String]) -> Result<FromFiles<LabelledText>, DataError> {
        let Self { text_field, label_field, group_field, .. } = self;
        read_labelled(paths, LabelledFields { text: text_field, label: label_field, group: group_field.as_deref() })
    }
}

/// Texts as tokens.
struct Texts {
    texts: Arc<Vec<Example>>,
    indices: Vec<u32>,
    shape: InputShape,
}

impl ExampleSet for Texts {
    fn shape(&self) -> InputShape {
        self.shape
    }

    fn per_epoch(&self) -> u64 {
        self.indices.len() as u64
    }

    fn example(&self, index: u64) -> Result<Example, DataError> {
        Ok(self.texts[self.indices[index as usize] as usize].clone())
    }
}

pub(super) fn open(
    config: &LabelledTextConfig,
    tokenizer: &Tokenizer,
    options: &OpenOptions,
) -> Result<Labelled, DataError> {
    let FromFiles { items: rows, mut notes } = config.rows(&config.paths)?;
    let held_out = match config.validation_paths.is_empty() {
        true => Vec::new(),
        false => {
            let FromFiles { items, notes: more } = config.rows(&config.validation_paths)?;
            notes.extend(more);
            items
        }
    };
    let classes = distinct_names(rows.iter().map(|row| &row.label));
    let groups = distinct_names(rows.iter().chain(&held_out).filter_map(|row| row.group.as_ref()));
    let places: HashMap<&str, u32> = classes.iter().map(String::as_str).zip(0..).collect();
    // Of what is learned from: a class that occurs among what is validated on only is refused below.
    let labels = rows.iter().filter_map(|row| places.get(row.label.as_str()).copied());
    notes.extend(Classes { names: &classes, data: "labelled_text", field: Some("label_field") }.check(labels)?);
    let (learned, seq_len) = (rows.len(), options.seq_len);
    let (mut hash, mut texts, mut cut) = (blake3::Hasher::new(), Vec::new(), 0);
    for LabelledText { text, label, group, .. } in rows.into_iter().chain(held_out) {
        for part in [&text, &label].into_iter().chain(&group) {
            hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        let class = places.get(label.as_str()).copied().ok_or_else(|| {
            DataError::Unusable(format!("data.labelled_text: class \"{label}\" occurs among what is validated on only"))
        })?;
        let mut tokens = tokenizer.encode(&text)?;
        cut += usize::from(tokens.len() > seq_len);
        tokens.truncate(seq_len);
        if tokens.is_empty() {
            tokens.push(tokenizer.end_of_text().unwrap_or(0));
        }
        let group = groups.iter().position(|name| Some(name) == group.as_ref()).unwrap_or(0);
        texts.push(Example { content: Content::Tokens(tokens), label: class, group: group as u32 });
    }
    let [train, validation] = match texts.len() > learned {
        true => [(0..learned as u32).collect(), (learned as u32..texts.len() as u32).collect()],
        false => divide(learned, options.validation_fraction)?,
    };
    let mut counts = vec![0; classes.len()];
    train.iter().for_each(|&index| counts[texts[index as usize].label as usize] += 1);
    let description = format!(
        "labelled texts of {} classes: {} for training, {} for validation{}",
        classes.len(),
        train.len(),
        validation.len(),
        if cut > 0 { format!("; {cut} cut to {seq_len} tokens") } else { String::new() }
    );
    let shape = InputShape::Tokens { vocab_size: tokenizer.vocab_size(), seq_len };
    let texts = Arc::new(texts);
    let set = |indices| Arc::new(Texts { texts: texts.clone(), indices, shape });
    Ok(Labelled {
        train: loader(set(train), None, options, Order::Shuffled),
        validation: loader(set(validation), None, options, Order::Once),
        classes,
        counts,
        groups,
        tokenizer: Some(tokenizer.clone()),
        description,
        notes,
        text_hash: Some(hash.finalize().to_hex().to_string()),
    })
}
