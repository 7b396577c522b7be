//! Texts with their classes, one a line of JSON.

use std::collections::BTreeSet;
use std::sync::Arc;

use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Content, Example, ExampleSet, Labelled, divide, loader};
use crate::error::At;
use crate::synthetic::Problem;
use crate::text::expand;
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

    /// Texts with the names of their classes.
    fn rows(&self, paths: &[String]) -> Result<Vec<(String, String)>, DataError> {
        let mut rows = Vec::new();
        for (path, _) in expand(paths, &["jsonl", "ndjson"])? {
            let content = String::from_utf8(std::fs::read(&path).at(&path)?)
                .map_err(|_| DataError::Unusable(format!("{} is no UTF-8 text", path.display())))?;
            for (index, line) in content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
                let wrong = |problem: String| DataError::Row { path: path.clone(), line: index + 1, problem };
                let row: serde_json::Value =
                    serde_json::from_str(line).map_err(|error| wrong(format!("no JSON: {error}")))?;
                let text = row[&self.text_field].as_str().ok_or_else(|| {
                    wrong(format!("no text in field \"{}\"; set data.labelled_text.text_field", self.text_field))
                })?;
                let label = match &row[&self.label_field] {
                    serde_json::Value::String(label) => label.clone(),
                    serde_json::Value::Number(label) if label.is_i64() || label.is_u64() => label.to_string(),
                    _ => {
                        let (field, rule) = (&self.label_field, "a class is text or a whole number");
                        return Err(wrong(format!(
                            "no class in field \"{field}\" ({rule}); set data.labelled_text.label_field"
                        )));
                    }
                };
                rows.push((text.to_owned(), label));
            }
        }
        Ok(rows)
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
    let rows = config.rows(&config.paths)?;
    let held_out = match config.validation_paths.is_empty() {
        true => Vec::new(),
        false => config.rows(&config.validation_paths)?,
    };
    let classes = sorted(rows.iter().map(|(_, label)| label.clone()).collect());
    if classes.len() < 2 {
        let problem = format!("data.labelled_text: the texts have {} class: two are needed", classes.len());
        return Err(DataError::Unusable(problem));
    }
    let (learnt, seq_len) = (rows.len(), options.seq_len);
    let (mut hash, mut texts, mut cut) = (blake3::Hasher::new(), Vec::new(), 0);
    for (text, label) in rows.into_iter().chain(held_out) {
        for part in [&text, &label] {
            hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        let class = classes.iter().position(|class| *class == label).ok_or_else(|| {
            DataError::Unusable(format!("data.labelled_text: class \"{label}\" occurs among what is validated on only"))
        })?;
        let mut tokens = tokenizer.encode(&text)?;
        cut += usize::from(tokens.len() > seq_len);
        tokens.truncate(seq_len);
        if tokens.is_empty() {
            tokens.push(tokenizer.end_of_text().unwrap_or(0));
        }
        texts.push(Example { content: Content::Tokens(tokens), label: class as u32 });
    }
    let [train, validation] = match texts.len() > learnt {
        true => [(0..learnt as u32).collect(), (learnt as u32..texts.len() as u32).collect()],
        false => divide(learnt, options.validation_fraction)?,
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
        train: loader(set(train), None, options, true),
        validation: loader(set(validation), None, options, false),
        classes,
        counts,
        tokenizer: Some(tokenizer.clone()),
        description,
        text_hash: Some(hash.finalize().to_hex().to_string()),
    })
}

/// Each name once; numbers by their size, and before text.
fn sorted(names: BTreeSet<String>) -> Vec<String> {
    let mut names: Vec<String> = names.into_iter().collect();
    names.sort_by_key(|name| (name.parse::<i64>().map_or((1, 0), |number| (0, number)), name.clone()));
    names
}
