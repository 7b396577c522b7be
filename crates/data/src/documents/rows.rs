//! Texts in the fields of rows: alone, with labels, or in pairs.

use serde_json::Value;

use crate::DataError;
use crate::files::{self, Search, rows_of};
use crate::texts::FromFiles;

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

/// Reads rows that hold a text and a label, and a group if asked, in fields of these names.
///
/// # Errors
/// If a pattern matches nothing, or a row lacks one of them.
pub fn read_labelled(paths: &[String], fields: LabelledFields) -> Result<FromFiles<LabelledText>, DataError> {
    read_labelled_of(&rows_of(paths)?, fields)
}

/// The same of files that were found.
pub(crate) fn read_labelled_of(files: &Search, fields: LabelledFields) -> Result<FromFiles<LabelledText>, DataError> {
    let mut texts = Vec::new();
    let columns: Vec<&str> = [fields.text, fields.label].into_iter().chain(fields.group).collect();
    let notes = for_each_row(files, &columns, |name, row| {
        let text = text_of(row, fields.text)
            .map_err(|problem| format!("{problem}; text_field names another field"))?
            .to_owned();
        let label = name_of(row, "label", fields.label)?;
        let group = fields.group.map(|field| name_of(row, "group", field)).transpose()?;
        texts.push(LabelledText { name, text, label, group });
        Ok(())
    })?;
    Ok(FromFiles { items: texts, notes })
}

/// Texts that belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairedText {
    /// Where they come from.
    pub name: String,
    /// A query, a document that belongs to it, and perhaps one that does not.
    pub parts: Vec<String>,
}

/// Reads rows that hold a query, a document that belongs to it and, all or none of them, one that does not, in fields of
/// these names.
///
/// # Errors
/// If a pattern matches nothing, or a row lacks what the others have.
pub fn read_pairs(
    paths: &[String],
    [query, positive, negative]: [&str; 3],
) -> Result<FromFiles<PairedText>, DataError> {
    let mut pairs: Vec<PairedText> = Vec::new();
    let notes = for_each_row(&rows_of(paths)?, &[query, positive, negative], |name, row| {
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
    Ok(FromFiles { items: pairs, notes })
}

/// A text with each of two attributes, and two options that may follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Where it comes from.
    pub name: String,
    /// The text with each attribute.
    pub prompts: [String; 2],
    /// What may follow.
    pub options: [String; 2],
}

/// What stands in a template where the attribute comes.
const PLACE: &str = "{}";

/// Reads rows that hold a "template" with the place `{}`, two "attributes" that come there, and two "options" that may follow.
///
/// # Errors
/// If a pattern matches nothing, or a row lacks one of them.
pub fn read_templates(paths: &[String]) -> Result<FromFiles<Template>, DataError> {
    let mut templates = Vec::new();
    let notes = for_each_row(&rows_of(paths)?, &["template", "attributes", "options"], |name, row| {
        let text = text_of(row, "template")?;
        if !text.contains(PLACE) {
            return Err(format!("template \"{text}\" has no {PLACE}, where the attributes come"));
        }
        let attributes = two_of(row, "attributes")?;
        let options = two_of(row, "options")?;
        if let Some(empty) = options.iter().find(|option| option.trim().is_empty()) {
            return Err(format!("field \"options\" holds \"{empty}\", of which nothing is likely or not"));
        }
        let prompts = attributes.map(|attribute| text.replace(PLACE, &attribute));
        if prompts.iter().any(|prompt| prompt.trim().is_empty()) {
            return Err("template and attribute leave no text in front of the options".into());
        }
        templates.push(Template { name, prompts, options });
        Ok(())
    })?;
    Ok(FromFiles { items: templates, notes })
}

/// The two different texts in a field of a row.
fn two_of(row: &Value, field: &str) -> Result<[String; 2], String> {
    match row.get(field).and_then(Value::as_array).map(Vec::as_slice) {
        Some([Value::String(a), Value::String(b)]) if a != b => Ok([a.clone(), b.clone()]),
        _ => Err(format!("no two different texts in field \"{field}\" ({})", found(row, field))),
    }
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
pub(super) fn text_of<'a>(row: &'a Value, field: &str) -> Result<&'a str, String> {
    row.get(field)
        .and_then(Value::as_str)
        .ok_or_else(|| format!("no text in field \"{field}\" ({})", found(row, field)))
}

/// The name in a field of a row: text, or a number as it is written.
pub(crate) fn name_of(row: &Value, what: &str, field: &str) -> Result<String, String> {
    match row.get(field) {
        Some(Value::String(name)) => Ok(name.clone()),
        Some(Value::Number(name)) if name.is_i64() || name.is_u64() => Ok(name.to_string()),
        _ => Err(format!(
            "no {what} in field \"{field}\" ({}): text or a whole number is expected; {what}_field names another field",
            found(row, field)
        )),
    }
}

/// What is where something else was expected.
fn found(row: &Value, field: &str) -> String {
    match (row.get(field), row.as_object()) {
        (Some(other), _) => format!("it holds {other}"),
        (None, Some(row)) => format!("the row has {}", row.keys().cloned().collect::<Vec<_>>().join(", ")),
        (None, None) => "the row is not an object".into(),
    }
}

/// Hands these fields of every row of files to `take`, with its place; what `take` finds wrong is reported with that place. Gives
/// what was not read, in words.
pub(crate) fn for_each_row(
    files: &Search,
    columns: &[&str],
    mut take: impl FnMut(String, &Value) -> Result<(), String>,
) -> Result<Vec<String>, DataError> {
    let left_out = files::for_each_row(files, columns, &mut |place, row| {
        let taken = row.value().and_then(|value| take(place.to_string(), &value));
        taken.map_err(|problem| place.wrong(problem))
    })?;
    Ok(left_out.note().into_iter().collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::Folder;

    #[test]
    fn pairs_have_a_wrong_document_all_or_none() {
        let dir = Folder::new();
        let read = |rows: &str| {
            let path = dir.write("pairs.jsonl", rows);
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
    fn templates_have_a_place_two_attributes_and_two_options() {
        let dir = Folder::new();
        let read = |row: &str| {
            let path = dir.write("templates.jsonl", row);
            read_templates(&[path.display().to_string()]).map_err(|error| error.to_string())
        };
        let row = |template: &str, attributes: &str, options: &str| {
            format!("{{\"template\": \"{template}\", \"attributes\": {attributes}, \"options\": {options}}}")
        };
        let [two, good] = ["[\"He\", \"She\"]", "[\" a nurse\", \" a smith\"]"];
        let found = read(&row("{} is", two, good)).unwrap().items;
        assert_eq!(found[0].prompts, ["He is", "She is"]);
        assert_eq!(found[0].options, [" a nurse", " a smith"]);
        for (bad, words) in [
            (row("He is", two, good), "templates.jsonl:1: template \"He is\" has no {}"),
            (row("{} is", "[\"He\"]", good), "no two different texts in field \"attributes\""),
            (row("{} is", "[\"He\", \"He\"]", good), "no two different texts in field \"attributes\""),
            (row("{} is", "[\"He\", \"She\", 3]", good), "no two different texts in field \"attributes\""),
            (row("{} is", two, "\"a nurse\""), "no two different texts in field \"options\""),
            (row("{} is", two, "[\" \", \"a\"]"), "field \"options\" holds \" \""),
            (row("{}", "[\"\", \"She\"]", good), "leave no text in front"),
        ] {
            let error = read(&bad).unwrap_err();
            assert!(error.contains(words), "{bad}: {error}");
        }
    }

    #[test]
    fn rows_of_parquet_are_labelled_text() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/rows/texts.parquet").to_owned();
        let read = |text| {
            let fields = LabelledFields { text, label: "label", group: None };
            read_labelled(std::slice::from_ref(&path), fields).map_err(|error| error.to_string())
        };
        let rows = read("text").unwrap().items;
        assert_eq!((rows.len(), rows[1].text.as_str(), rows[1].label.as_str()), (4, "zwei ü", "1"));
        let error = read("score").unwrap_err();
        assert!(
            error.contains("texts.parquet: row 1 (row group 0): no text in field \"score\" (it holds 0.5)"),
            "{error}"
        );
    }

    #[test]
    fn labels_are_text_or_numbers() {
        let dir = Folder::new();
        let read = |rows: &str| {
            let path = dir.write("rows.jsonl", rows);
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
