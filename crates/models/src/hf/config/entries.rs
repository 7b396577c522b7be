//! The keys of a JSON file of settings: each once, and every complaint with the key it is about.

use std::fmt;

use serde::de::{DeserializeOwned, Deserializer, Error, MapAccess, Visitor};
use serde_json::{Map, Value};

/// Characters of a text that are shown around a mistake; chosen by us.
const SHOWN: usize = 60;

/// The keys of a JSON object, with their values.
///
/// # Errors
/// If the text is not a JSON object, or has a key twice.
pub(in crate::hf) fn read(text: &str) -> Result<Map<String, Value>, String> {
    struct Keys;
    impl<'de> Visitor<'de> for Keys {
        type Value = Map<String, Value>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut keys = Map::new();
            while let Some((key, value)) = map.next_entry::<String, Value>()? {
                if keys.contains_key(&key) {
                    return Err(A::Error::custom(format!("{key} is there twice: keep one of them")));
                }
                keys.insert(key, value);
            }
            Ok(keys)
        }
    }
    let mut reader = serde_json::Deserializer::from_str(text);
    let keys = reader.deserialize_map(Keys).and_then(|keys| reader.end().map(|()| keys));
    keys.map_err(|error| match excerpt(text, error.line(), error.column()) {
        Some(around) => format!("{error}: {around}"),
        None => error.to_string(),
    })
}

/// What stands around a place of a text, from the last comma or brace on, for files that are one line.
fn excerpt(text: &str, line: usize, column: usize) -> Option<String> {
    let line = text.lines().nth(line.checked_sub(1)?)?;
    let end = (0..=column.min(line.len())).rev().find(|&at| line.is_char_boundary(at))?;
    let mut before = line[..end].char_indices().filter(|&(at, sign)| at + 1 < end && [',', '{'].contains(&sign));
    let start = before.next_back().map_or(0, |(at, _)| at + 1);
    let around: String = line[start..].chars().take(SHOWN).collect();
    let around = around.trim().trim_end_matches(',');
    (!around.is_empty()).then(|| format!("`{around}`"))
}

/// Keys as settings.
///
/// # Errors
/// Names the key that is missing or has a value of the wrong type.
pub(in crate::hf) fn typed<T: DeserializeOwned>(keys: &Map<String, Value>) -> Result<T, String> {
    typed_by(keys, |keys| T::deserialize(keys))
}

/// A [`serde_path_to_error`] deserializer of borrowed keys.
type Tracked<'a, 'b> = serde_path_to_error::Deserializer<'a, 'b, &'a Map<String, Value>>;

/// Keys as what `read` makes of them.
///
/// # Errors
/// As [`typed`].
pub(super) fn typed_by<'a, T>(
    keys: &'a Map<String, Value>,
    read: impl FnOnce(Tracked<'a, '_>) -> Result<T, serde_json::Error>,
) -> Result<T, String> {
    let mut track = serde_path_to_error::Track::new();
    read(Tracked::new(keys, &mut track)).map_err(|error| {
        let key = track.path().to_string();
        let words = error.to_string();
        let words = [("usize", "a whole number, 0 or more"), ("f64", "a number"), ("a boolean", "true or false")]
            .iter()
            .find_map(|(theirs, ours)| {
                Some(format!("{}expected {ours}", words.strip_suffix(&format!("expected {theirs}"))?))
            })
            .unwrap_or(words);
        // A missing key is named by the words; its path is that of the table around.
        if key == "." { words } else { format!("{key}: {words}") }
    })
}
