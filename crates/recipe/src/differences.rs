//! Keys in which two recipes differ.

use serde::Serialize;

use crate::settings::Recipe;

/// Keys that may change when a run is resumed; all others decide what the run is.
pub const MAY_CHANGE: [&str; 12] = [
    "training.steps",
    "training.device",
    "training.tensor_cores",
    "training.products",
    "training.on_nonfinite",
    "training.max_skipped_steps",
    "parallel",
    "metrics",
    "checkpoint",
    "validation.interval",
    "validation.batches",
    "generation",
];

/// Keys in which two recipes differ, apart from those that may change: `key: before -> now`.
pub fn differences(before: &Recipe, now: &Recipe) -> Vec<String> {
    let mut all = all_differences(before, now);
    all.retain(|(path, _)| !may_change(path));
    in_lines(all)
}

/// What decides a run, key by key: numbers, texts, true or false. Lists are left out, and what a table does not name.
pub fn hyperparameters(recipe: &Recipe) -> Vec<(String, serde_json::Value)> {
    fn walk(path: &str, value: serde_json::Value, out: &mut Vec<(String, serde_json::Value)>) {
        match value {
            serde_json::Value::Object(table) => {
                for (key, value) in table {
                    walk(&if path.is_empty() { key } else { format!("{path}.{key}") }, value, out);
                }
            }
            serde_json::Value::Null | serde_json::Value::Array(_) => {}
            value => out.push((path.to_owned(), value)),
        }
    }
    let mut out = Vec::new();
    walk("", serde_json::to_value(recipe).unwrap_or_default(), &mut out);
    out.retain(|(path, _)| !may_change(path));
    out
}

/// Whether a key may change when a run is resumed.
fn may_change(path: &str) -> bool {
    MAY_CHANGE.iter().any(|key| path.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

/// Keys in which two tables differ: `key: before -> now`.
pub fn differences_of(before: &impl Serialize, now: &impl Serialize) -> Vec<String> {
    in_lines(all_differences(before, now))
}

fn in_lines(differences: Vec<Difference>) -> Vec<String> {
    differences.into_iter().map(|(path, [before, now])| format!("{path}: {before} -> {now}")).collect()
}

/// A key with what two tables say.
pub type Difference = (String, [String; 2]);

/// Every key in which two tables differ, with both values as they are written.
pub fn all_differences(before: &impl Serialize, now: &impl Serialize) -> Vec<Difference> {
    fn walk(path: &str, a: Option<&toml::Value>, b: Option<&toml::Value>, out: &mut Vec<Difference>) {
        if a == b {
            return;
        }
        if let (Some(toml::Value::Table(a)), Some(toml::Value::Table(b))) = (a, b) {
            let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                walk(&path, a.get(key), b.get(key), out);
            }
            return;
        }
        let show = |value: Option<&toml::Value>| value.map_or("(not set)".into(), ToString::to_string);
        out.push((path.to_owned(), [show(a), show(b)]));
    }
    let mut out = Vec::new();
    let (before, now) = (toml::Value::try_from(before).ok(), toml::Value::try_from(now).ok());
    walk("", before.as_ref(), now.as_ref(), &mut out);
    out
}
