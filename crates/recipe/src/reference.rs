//! The reference of keys, as Markdown and as a JSON Schema for editors: both are made from the types and their documentation.

use std::collections::{BTreeMap, BTreeSet};

use polyhead_attention::AttentionConfig;
use serde_json::{Map, Value, json};

use crate::schema::variants;

/// Tables with at least this many keys get a section of their own; chosen by us.
const OWN_SECTION: usize = 4;

/// The keys of a schema as Markdown: a section for each larger table, every key by its full name. A table that is valid in
/// several places is described where it comes first, and linked from the others.
pub fn keys(root: &Value) -> String {
    let mut shared = BTreeMap::new();
    count_references(root, &mut shared);
    let shared = shared.into_iter().filter(|(_, count)| *count > 1).map(|(name, _)| name).collect();
    let mut pages = Pages { root, shared, described: BTreeMap::new(), sections: Vec::new() };
    let top = pages.open("");
    pages.rows(root, "", top);
    let mut out = String::new();
    for Section { path, about, rows } in pages.sections.iter().filter(|section| !section.rows.is_empty()) {
        if !path.is_empty() {
            out.push_str(&format!("\n## {path}\n\n{about}\n\n"));
        }
        out.push_str(&format!("| key | type | meaning |\n|---|---|---|\n{rows}"));
    }
    out
}

/// The numbers that layers of each mechanism log, as Markdown.
pub fn observations() -> String {
    let mut out = String::new();
    for (mechanism, rows) in AttentionConfig::observed() {
        out.push_str(&format!("\n## {mechanism}\n\n| name | meaning |\n|---|---|\n"));
        rows.iter().for_each(|row| out.push_str(&format!("| `{}` | {row} |\n", row.name)));
    }
    out
}

/// The link to a section of the page that [`keys`] makes.
pub fn anchor(path: &str) -> String {
    path.chars().filter(|sign| sign.is_alphanumeric() || "_-".contains(*sign)).collect::<String>().to_lowercase()
}

/// How often each definition is referred to.
fn count_references<'a>(value: &'a Value, counts: &mut BTreeMap<&'a str, usize>) {
    match value {
        Value::Object(map) => {
            if let Some(name) = map.get("$ref").and_then(Value::as_str) {
                *counts.entry(name).or_default() += 1;
            }
            map.values().for_each(|value| count_references(value, counts));
        }
        Value::Array(list) => list.iter().for_each(|value| count_references(value, counts)),
        _ => {}
    }
}

struct Section {
    path: String,
    about: String,
    rows: String,
}

/// The sections so far, in the order of the schema.
struct Pages<'a> {
    root: &'a Value,
    /// Definitions that several places refer to.
    shared: BTreeSet<&'a str>,
    /// Where each of them is described.
    described: BTreeMap<&'a str, String>,
    sections: Vec<Section>,
}

impl<'a> Pages<'a> {
    fn open(&mut self, path: &str) -> usize {
        self.sections.push(Section { path: path.to_owned(), about: String::new(), rows: String::new() });
        self.sections.len() - 1
    }

    /// Writes the keys of a table, with the tables inside it, into the section `at`.
    fn rows(&mut self, schema: &'a Value, path: &str, at: usize) {
        for variant in variants(self.root, schema) {
            for (key, property) in variant.get("properties").and_then(Value::as_object).into_iter().flatten() {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let words = property.get("description").or_else(|| variant.get("description")).and_then(Value::as_str);
                let words = words.unwrap_or_default().replace('\n', " ").replace('|', "\\|");
                let row = self.sections[at].rows.len();
                let link = self.inside(property, &path, &words, at);
                let line = format!("| `{path}` | {} | {words}{link} |\n", type_name(self.root, property));
                self.sections[at].rows.insert_str(row, &line);
            }
        }
    }

    /// Describes what is inside a key, here or in a section of its own; gives the link to that section.
    fn inside(&mut self, schema: &'a Value, path: &str, about: &str, at: usize) -> String {
        let variants = variants(self.root, schema);
        // Where one table may stand instead of a list of them, it is described once.
        if !variants.iter().any(|variant| variant.get("properties").is_some()) {
            let items = variants.iter().find_map(|variant| variant.get("items"));
            return items.map_or(String::new(), |items| self.inside(items, &format!("{path}[]"), about, at));
        }
        let keys: usize =
            variants.iter().filter_map(|variant| variant.get("properties")?.as_object()).map(Map::len).sum();
        let names: Vec<&str> =
            references(self.root, schema).into_iter().filter(|name| self.shared.contains(name)).collect();
        if let Some(first) = names.iter().find_map(|name| self.described.get(name)) {
            return format!(" Keys: as [{first}](#{}).", anchor(first));
        }
        if keys == 0 || names.is_empty() && keys < OWN_SECTION && path.contains('.') {
            self.rows(schema, path, at);
            return String::new();
        }
        self.described.extend(names.into_iter().map(|name| (name, path.to_owned())));
        let own = self.open(path);
        self.sections[own].about = about.to_owned();
        self.rows(schema, path, own);
        format!(" [Keys](#{}).", anchor(path))
    }
}

/// The definitions that a key refers to, directly or through one that only refers on.
fn references<'a>(root: &'a Value, schema: &'a Value) -> Vec<&'a str> {
    let mut found = Vec::new();
    if let Some(name) = schema.get("$ref").and_then(Value::as_str) {
        found.push(name);
        let inner = name.strip_prefix('#').and_then(|pointer| root.pointer(pointer));
        found.extend(inner.into_iter().flat_map(|inner| references(root, inner)));
    }
    let alternatives =
        ["oneOf", "anyOf", "allOf"].into_iter().filter_map(|word| schema.get(word)?.as_array()).flatten();
    found.extend(alternatives.flat_map(|schema| references(root, schema)));
    found
}

fn type_name(root: &Value, property: &Value) -> String {
    let mut names: Vec<String> = Vec::new();
    for variant in variants(root, property) {
        let constants = variant.get("enum").and_then(Value::as_array).cloned();
        let constants = constants.or_else(|| variant.get("const").map(|value| vec![value.clone()]));
        match (constants, variant.get("type")) {
            (Some(values), _) => names.extend(values.iter().map(|value| format!("`{value}`"))),
            (None, Some(Value::String(name))) if name == "object" => names.push("table".into()),
            (None, Some(Value::String(name))) => names.push(name.clone()),
            (None, Some(Value::Array(types))) => {
                names.extend(types.iter().filter_map(Value::as_str).filter(|name| *name != "null").map(Into::into));
            }
            _ => {}
        }
    }
    names.retain(|name| name != "null");
    names.dedup();
    names.join(" or ")
}

/// A schema as editors take it: the file may extend another one, so that no key is required.
pub fn for_editors(mut schema: Value, title: &str) -> Value {
    not_required(&mut schema, false);
    schema["title"] = json!(title);
    schema["properties"]["extends"] =
        json!({"type": "string", "description": "The file below this one: keys here replace keys there."});
    schema
}

/// Nothing is required, but for the keys that tell alternatives apart.
fn not_required(value: &mut Value, alternative: bool) {
    match value {
        Value::Object(map) => {
            if !alternative {
                map.remove("required");
            }
            for (key, value) in map {
                let alternatives = ["oneOf", "anyOf"].contains(&key.as_str());
                match value {
                    Value::Array(list) => list.iter_mut().for_each(|value| not_required(value, alternatives)),
                    value => not_required(value, false),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|value| not_required(value, false)),
        _ => {}
    }
}
