//! Layers of TOML: parsed with the place of every key, merged into one table.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use polyhead_data::MIXTURE;
use serde::de::DeserializeOwned;
use toml_edit::{Document, Item, TableLike, Value};

use crate::nearest::{is_recipe, nearest, nearest_path, recipes_below};
use crate::problem::{Problem, Problems, in_words};

/// Tables of which exactly one stands for the choice: a layer that names another one replaces it.
const ONE_OF: [&str; 23] = [
    "data",
    "tokenizer",
    "procedure",
    "optimizer",
    "model.decoder.rope_scaling",
    "model.decoder.attention",
    "model.decoder.attention.*.lambda_init",
    "model.decoder.attention.*.router",
    "model.decoder.attention.*.allocation",
    "model.classifier",
    "model.classifier.*.attention",
    "model.classifier.*.attention.*.lambda_init",
    "model.classifier.*.attention.*.router",
    "model.classifier.*.attention.*.allocation",
    "model.classifier.*.pooling",
    "model.classifier.*.mixer",
    "model.embedder.pooling",
    "model.classifier.*.mixer.attention.mechanism",
    "model.super_resolution.mixer",
    "model.super_resolution.mixer.attention",
    "model.super_resolution.mixer.attention.*.lambda_init",
    "model.super_resolution.mixer.attention.*.router",
    "model.super_resolution.mixer.attention.*.allocation",
];

/// The name of layers that were typed.
const COMMAND_LINE: &str = "command line";
/// The name of layers that tell a stage where it starts from.
pub const STAGES: &str = "stages";

/// One source of keys.
#[derive(Clone)]
pub struct Layer {
    /// The file's name, or `command line`.
    pub name: String,
    /// Its text.
    pub text: Arc<str>,
    // Shared by all parts of a file, of which there may be thousands.
    document: Arc<Document<String>>,
    values: toml::Table,
    /// Where in the document the values stand: not at the top for a [`part`](Layer::part).
    prefix: Vec<String>,
}

/// Parses a file.
///
/// # Errors
/// Points at what is no TOML.
pub fn parse_layer(name: &str, text: &str) -> Result<Layer, Problem> {
    let document = Document::parse(text.to_owned());
    let document = document.map_err(|e| Problem::in_text(name, text, e.span(), e.message().to_owned()))?;
    let values = text.parse::<toml::Table>();
    let values = values.map_err(|e| Problem::in_text(name, text, e.span(), e.message().to_owned()))?;
    Ok(Layer { name: name.to_owned(), text: text.into(), document: Arc::new(document), values, prefix: Vec::new() })
}

/// What may have been meant by a recipe that is not there: one with such a name beside it, or below the folder `recipes`.
fn meant(path: &Path) -> String {
    let known = recipes_below(Path::new("recipes"));
    let stem = |path: &Path| path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let named = |name: &str| known.iter().find(|path| stem(path) == name).cloned();
    let alike = || named(&nearest(&stem(path), known.iter().map(|path| stem(path)))?);
    match named(&stem(path)).or_else(|| nearest_path(path, is_recipe)).or_else(alike) {
        Some(near) if !path.exists() => format!("did you mean {}?", near.display()),
        _ => "recipes are files that end in .toml; `polyhead ls` lists those at hand".to_owned(),
    }
}

/// The text of a recipe's file.
///
/// # Errors
/// If there is none, or it is no text, with the line where it is none.
pub fn read_file(path: &Path) -> Result<String, Problems> {
    let bytes = std::fs::read(path)
        .map_err(|error| Problems::plain(format!("recipe {}: {error}\n  hint: {}", path.display(), meant(path))))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let bytes = error.into_bytes();
        let text = String::from_utf8_lossy(&bytes[..at]).into_owned() + "\u{fffd}";
        let message = format!("byte {:#04x} is not valid UTF-8: recipes are UTF-8 text", bytes[at]);
        Problems(vec![Problem::in_text(&path.display().to_string(), &text, Some(at..at), message)])
    })
}

/// The file's layer.
///
/// # Errors
/// If it cannot be read or is no TOML.
pub fn read_layer(path: &Path) -> Result<Layer, Problems> {
    let text = read_file(path)?;
    Ok(parse_layer(&path.display().to_string(), &text)?)
}

/// Parses `key=value` from the command line; a value that is no TOML is taken as text.
///
/// # Errors
/// If there is no `=`, or the key is no key.
pub fn parse_override(text: &str) -> Result<Layer, Problem> {
    const NAME: &str = COMMAND_LINE;
    let Some((key, value)) = text.split_once('=') else {
        let message = format!("`{text}` is no override: write key=value, such as training.steps=100");
        return Err(Problem::in_text(NAME, text, None, message));
    };
    parse_layer(NAME, text).or_else(|error| {
        let quoted = format!("{key}={}", toml::Value::String(value.trim().to_owned()));
        let looks_like_toml = value.trim_start().starts_with(['[', '{', '"', '\'']);
        if looks_like_toml { Err(error) } else { parse_layer(NAME, &quoted).map_err(|_| error) }
    })
}

impl Layer {
    /// Takes the recipe's `extends` out, if it has one.
    pub fn take_extends(&mut self) -> Result<Option<String>, Problems> {
        match self.values.remove("extends") {
            None => Ok(None),
            Some(toml::Value::String(base)) => Ok(Some(base)),
            Some(other) => {
                let message = format!("extends must be the path of a recipe as text, found {}", other.type_str());
                let span = self.find(&["extends"]).map(|(span, _)| span);
                Err(Problems(vec![Problem::in_text(&self.name, &self.text, span, message)]))
            }
        }
    }

    /// Takes a key out, as a layer of its own, if it is there.
    pub fn take(&mut self, key: &str) -> Option<Layer> {
        let value = self.values.remove(key)?;
        Some(self.with(toml::Table::from_iter([(key.to_owned(), value)]), self.prefix.clone()))
    }

    /// The same source with other values, which stand behind a prefix.
    fn with(&self, values: toml::Table, prefix: Vec<String>) -> Layer {
        Layer { name: self.name.clone(), text: self.text.clone(), document: self.document.clone(), values, prefix }
    }

    /// Whether it is a file, and not what was typed or what a stage is told.
    pub fn is_file(&self) -> bool {
        ![COMMAND_LINE, STAGES].contains(&self.name.as_str())
    }

    /// The values, without places.
    pub fn values(&self) -> &toml::Table {
        &self.values
    }

    /// A table inside this layer as a layer of its own, whose keys stand where they stand. Empty where there is no such
    /// table.
    pub fn part(&self, prefix: &[&str]) -> Layer {
        let mut table = Some(&self.values);
        let mut item = None;
        for part in prefix {
            item = match part.parse::<usize>() {
                Ok(at) => item.and_then(|list: &toml::Value| list.get(at)),
                Err(_) => table.and_then(|table| table.get(*part)),
            };
            table = item.and_then(toml::Value::as_table);
        }
        let prefix = self.prefix.iter().cloned().chain(prefix.iter().map(|part| (*part).to_owned())).collect();
        self.with(table.cloned().unwrap_or_default(), prefix)
    }

    /// Where the longest known beginning of a path stands, and how many of its parts that is.
    pub fn find(&self, path: &[&str]) -> Option<(Range<usize>, usize)> {
        let inside = self.prefix.len();
        let path: Vec<&str> = self.prefix.iter().map(String::as_str).chain(path.iter().copied()).collect();
        let (span, depth) = self.find_from_top(&path)?;
        (depth > inside || inside == 0).then_some((span, depth.saturating_sub(inside)))
    }

    fn find_from_top(&self, path: &[&str]) -> Option<(Range<usize>, usize)> {
        let mut table: &dyn TableLike = self.document.as_table();
        let mut found = None;
        let mut depth = 0;
        while let Some((key, item)) = path.get(depth).and_then(|part| table.get_key_value(part)) {
            depth += 1;
            found = key.span().or_else(|| item.span()).map(|span| (span, depth)).or(found);
            // Of a list of tables, that of the number which follows.
            let at = path.get(depth).and_then(|part| part.parse::<usize>().ok());
            let (element, span): (Option<&dyn TableLike>, _) = match (item, at) {
                (Item::ArrayOfTables(list), Some(at)) => {
                    let table = list.get(at);
                    (table.map(|table| table as &dyn TableLike), table.and_then(toml_edit::Table::span))
                }
                (Item::Value(Value::Array(list)), Some(at)) => {
                    let table = list.get(at).and_then(Value::as_inline_table);
                    (table.map(|table| table as &dyn TableLike), table.and_then(toml_edit::InlineTable::span))
                }
                (other, _) => (other.as_table_like(), None),
            };
            let Some(next) = element else { break };
            if at.is_some() && matches!(item, Item::ArrayOfTables(_) | Item::Value(Value::Array(_))) {
                depth += 1;
                found = span.map(|span| (span, depth)).or(found);
            }
            table = next;
        }
        found
    }
}

/// A mistake about a dotted key: shown where the last layer that has it (or the longest beginning of it) has it.
pub fn at(layers: &[Layer], path: &str, message: String) -> Problem {
    let parts: Vec<&str> = path.split(['.', '[', ']']).filter(|part| !part.is_empty()).collect();
    let best = layers.iter().rev().filter_map(|layer| layer.find(&parts).map(|found| (layer, found)));
    // Among equally long beginnings the last layer wins: max_by_key keeps the last, and the layers come reversed.
    let best = best.collect::<Vec<_>>().into_iter().rev().max_by_key(|(_, (_, depth))| *depth);
    match best {
        Some((layer, (span, _))) => Problem::in_text(&layer.name, &layer.text, Some(span), message),
        // What is missing altogether is missing in the file that was named: the last one, as overrides come behind.
        None => match layers.iter().rev().find(|layer| layer.is_file()).or(layers.last()) {
            Some(layer) => Problem::in_text(&layer.name, &layer.text, None, message),
            None => Problem::plain(message),
        },
    }
}

/// What a table says, read as what it is to be; a mistake is shown in the layers that the table was made of.
///
/// # Errors
/// If a value has another type.
pub fn read_as<T: DeserializeOwned>(values: toml::Table, layers: &[Layer]) -> Result<T, Problems> {
    serde_path_to_error::deserialize(toml::Value::Table(values)).map_err(|error| {
        let path = error.path().to_string();
        at(layers, &path, in_words(&error.into_inner().to_string())).into()
    })
}

/// One table out of all layers, later ones over earlier ones.
pub fn merge(layers: &[Layer]) -> toml::Table {
    let mut merged = toml::Table::new();
    for layer in layers {
        merge_into(&mut merged, layer.values(), "");
    }
    merged
}

fn merge_into(base: &mut toml::Table, over: &toml::Table, path: &str) {
    if is_choice(path) && !over.is_empty() {
        base.retain(|key, _| over.contains_key(key) || is_mixture(path, over) && MIXTURE.contains(&key));
    }
    // A folder with trained weights brings its own settings. The other way round nothing is dropped: whoever changes a
    // setting of trained weights has to hear that they do not fit, not to get fresh ones.
    if path == "model" && over.contains_key("pretrained") {
        base.remove("decoder");
    }
    for kind in ["classifier", "embedder", "super_resolution"] {
        // Another kind of model than the one below starts from nothing that was said of that.
        if path == "model" && over.contains_key(kind) && !base.contains_key(kind) {
            base.clear();
        }
    }
    for (key, value) in over {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match (base.get_mut(key), value) {
            (Some(toml::Value::Table(base)), toml::Value::Table(over)) => merge_into(base, over, &path),
            (Some(toml::Value::Array(base)), toml::Value::Table(over)) if all_within(base, over) => {
                merge_items(base, over, &path);
            }
            _ => {
                base.insert(key.clone(), value.clone());
            }
        }
    }
}

/// Whether a table's keys are all places of a list, as in `data.source.0.weight`.
fn all_within(list: &[toml::Value], over: &toml::Table) -> bool {
    !over.is_empty() && over.keys().all(|key| key.parse::<usize>().is_ok_and(|at| at < list.len()))
}

fn merge_items(list: &mut [toml::Value], over: &toml::Table, path: &str) {
    for (key, value) in over {
        let Some(item) = key.parse().ok().and_then(|at: usize| list.get_mut(at)) else { continue };
        match (item, value) {
            (toml::Value::Table(base), toml::Value::Table(over)) => merge_into(base, over, &format!("{path}.{key}")),
            (item, value) => *item = value.clone(),
        }
    }
}

/// Whether these are keys of a mixture, which are one choice together.
fn is_mixture(path: &str, table: &toml::Table) -> bool {
    path == "data" && table.keys().all(|key| MIXTURE.contains(&&**key))
}

/// Tables that stand for a choice and hold several, with the names of those.
pub fn undecided(merged: &toml::Table) -> Vec<(String, Vec<String>)> {
    fn walk(table: &toml::Table, path: &str, found: &mut Vec<(String, Vec<String>)>) {
        if is_choice(path) && table.len() > 1 && !is_mixture(path, table) {
            found.push((path.to_owned(), table.keys().cloned().collect()));
        }
        for (key, value) in table {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            value.as_table().into_iter().for_each(|table| walk(table, &path, found));
        }
    }
    let mut found = Vec::new();
    walk(merged, "", &mut found);
    found
}

fn is_choice(path: &str) -> bool {
    let parts: Vec<&str> = path.split('.').collect();
    ONE_OF.iter().any(|known| {
        let known: Vec<&str> = known.split('.').collect();
        known.len() == parts.len() && known.iter().zip(&parts).all(|(a, b)| *a == "*" || a == b)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_later_choice_replaces_an_earlier_one() {
        let base = parse_layer("a", "[data.rust_docs]\n[training]\nsteps = 1\nseq_len = 2").unwrap();
        let over = parse_override("data.text.paths=[\"x\"]").unwrap();
        let steps = parse_override("training.steps=5").unwrap();
        let [bilevel, standard] =
            ["procedure.bilevel.rank=4", "procedure.standard={}"].map(|text| parse_override(text).unwrap());
        let merged = merge(&[base, over, steps, bilevel, standard]);
        assert_eq!(merged["procedure"].as_table().unwrap().keys().collect::<Vec<_>>(), ["standard"]);
        assert!(merged["data"].get("rust_docs").is_none() && merged["data"].get("text").is_some());
        assert_eq!(merged["training"]["steps"].as_integer(), Some(5));
        assert_eq!(merged["training"]["seq_len"].as_integer(), Some(2));
    }

    #[test]
    fn the_keys_of_a_mixture_are_one_choice_and_its_sources_are_changed_by_place() {
        let base = parse_layer("a", "[data]\nuntil = 5\n[[data.source]]\n[[data.source]]\nweight = 1").unwrap();
        let [second, until, text] = ["data.source.1.weight=3", "data.until=all_exhausted", "data.text.paths=[]"]
            .map(|text| parse_override(text).unwrap());
        let merged = merge(&[base.clone(), second, until]);
        assert!(undecided(&merged).is_empty());
        assert_eq!(merged["data"]["until"].as_str(), Some("all_exhausted"));
        let weight = |at: usize| merged["data"]["source"][at].get("weight").and_then(toml::Value::as_integer);
        assert_eq!((weight(0), weight(1)), (None, Some(3)));
        let merged = merge(&[base.clone(), text]);
        assert_eq!(merged["data"].as_table().unwrap().keys().collect::<Vec<_>>(), ["text"]);
        let beside = parse_layer("a", "[data]\nuntil = 5\n[data.copy]").unwrap();
        assert_eq!(undecided(&merge(&[beside])).len(), 1);
    }

    #[test]
    fn another_kind_of_model_replaces_the_first_and_a_setting_of_it_keeps_its_weights() {
        let decoder = parse_layer("a", "[model]\npretrained = \"x\"\n[model.decoder]\nd_model = 8").unwrap();
        let [kind, weights, width] = [
            "model.classifier.text_encoder.d_model=8",
            "model.pretrained=\"y\"",
            "model.classifier.text_encoder.d_model=4",
        ]
        .map(|text| parse_override(text).unwrap());
        let merged = merge(&[decoder, kind, weights, width]);
        let model = merged["model"].as_table().unwrap();
        assert!(!model.contains_key("decoder") && model["pretrained"].as_str() == Some("y"));
        assert_eq!(model["classifier"]["text_encoder"]["d_model"].as_integer(), Some(4));
    }

    #[test]
    fn two_choices_are_found_with_their_names() {
        let both = parse_layer("a", "[procedure.standard]\n[procedure.bilevel]\nrank = 4\n[data.copy]").unwrap();
        let found = undecided(&merge(&[both]));
        assert_eq!(found, [("procedure".to_owned(), vec!["standard".to_owned(), "bilevel".to_owned()])]);
    }

    #[test]
    fn words_need_no_quotes_on_the_command_line() {
        let layer = parse_override("training.device=cuda").unwrap();
        assert_eq!(layer.values()["training"]["device"].as_str(), Some("cuda"));
        assert!(parse_override("training.steps").is_err());
        assert!(parse_override("data.text.paths=[\"x\"").is_err());
    }
}
