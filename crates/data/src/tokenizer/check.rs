//! What is looked at in a tokenizer.json before the tokenizers library reads it: what would make it panic, take all memory
//! or never end, or give other tokens each time.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

/// The first id that is not allowed: more than any vocabulary has, and whole in f32. Chosen by us.
pub(super) const IDS: u64 = 1 << 24;
/// Characters of a pattern, and of what it is replaced by; chosen by us.
const LONGEST: usize = 10_000;
/// What the counted repetitions of a pattern multiply to at most: each is written out before it is matched. Chosen by us.
const REPETITIONS: u64 = 100_000;

/// A tokenizer.json that the library may read, and what was changed about it, in words.
///
/// # Errors
/// The key, its value and the rule.
pub(super) fn check(text: &str) -> Result<(Value, Vec<String>), String> {
    let mut json: Value = serde_json::from_str(text).map_err(|error| format!("not a valid tokenizer.json: {error}"))?;
    if !json.is_object() || !json["model"].is_object() {
        return Err("not a valid tokenizer.json: it has no table `model`".into());
    }
    for part in ["normalizer", "pre_tokenizer", "decoder"] {
        check_part(&json[part], part)?;
    }
    check_ids(&json)?;
    let vocab = &json["model"]["vocab"];
    if let Some(at) = vocab.as_array().and_then(|all| all.iter().position(|piece| piece[0] == "")) {
        return Err(format!("model.vocab.{at} is an empty token: it would match everywhere"));
    }
    let mut notes = Vec::new();
    let dropout = json["model"]["dropout"].as_f64().filter(|&dropout| dropout != 0.0);
    if let Some(dropout) = dropout {
        json["model"]["dropout"] = Value::Null;
        notes.push(format!(
            "model.dropout ({dropout}) of tokenizer.json is switched off: with it a text would have other tokens each time"
        ));
    }
    Ok((json, notes))
}

/// A normalizer, pre-tokenizer or decoder, and those inside it.
fn check_part(part: &Value, path: &str) -> Result<(), String> {
    for key in ["normalizers", "pretokenizers", "decoders"] {
        for (at, inner) in part[key].as_array().into_iter().flatten().enumerate() {
            check_part(inner, &format!("{path}.{key}.{at}"))?;
        }
    }
    let pattern = &part["pattern"];
    for (kind, text) in ["String", "Regex"].into_iter().filter_map(|kind| Some((kind, pattern[kind].as_str()?))) {
        let place = format!("{path}.pattern.{kind}");
        if text.is_empty() {
            return Err(format!("{place} is empty: it would match everywhere"));
        }
        let length = text.chars().count();
        if length > LONGEST {
            return Err(format!("{place} is {length} characters long; {LONGEST} are allowed"));
        }
        if kind == "Regex" {
            check_repetitions(text).map_err(|problem| format!("{place} {problem}"))?;
        }
    }
    for key in ["content", "replacement", "prepend", "suffix", "prefix"] {
        let length = part[key].as_str().map_or(0, |text| text.chars().count());
        if length > LONGEST {
            return Err(format!("{path}.{key} is {length} characters long; {LONGEST} are allowed"));
        }
    }
    if part["type"] == "FixedLength" && part["length"].as_u64() == Some(0) {
        return Err(format!("{path}.length (0) must be at least 1"));
    }
    if part["type"] == "Precompiled" {
        check_charsmap(part["precompiled_charsmap"].as_str().unwrap_or_default(), path)?;
    }
    Ok(())
}

/// Refuses patterns such as `(a{1000}){1000}`, which are written out before they are matched.
fn check_repetitions(pattern: &str) -> Result<(), String> {
    let mut all = 1u64;
    for part in pattern.split('{').skip(1) {
        let Some((counts, _)) = part.split_once('}') else { continue };
        let largest = counts.split(',').map(str::trim).filter_map(|count| count.parse::<u64>().ok()).max();
        all = all.saturating_mul(largest.unwrap_or(1).max(1));
    }
    if all > REPETITIONS { Err(format!("repeats {all} times in all; {REPETITIONS} are allowed")) } else { Ok(()) }
}

/// Refuses a table of characters whose first four bytes give a length that is not there.
fn check_charsmap(base64: &str, path: &str) -> Result<(), String> {
    let broken = |problem: &str| Err(format!("{path}.precompiled_charsmap {problem}"));
    let bytes = STANDARD.decode(base64).unwrap_or_default();
    let Some((length, rest)) = bytes.split_first_chunk::<4>() else {
        return broken("is not base64 of 4 bytes or more");
    };
    let (length, there) = (u32::from_le_bytes(*length) as usize, rest.len());
    match length > there || !length.is_multiple_of(4) {
        true => broken(&format!("begins with a table of {length} bytes, and {there} follow")),
        false => Ok(()),
    }
}

/// Refuses ids that no model has a row for.
fn check_ids(json: &Value) -> Result<(), String> {
    let check = |path: String, id: &Value| match id.as_u64() {
        Some(id) if id < IDS => Ok(()),
        _ => Err(format!("{path} ({id}) must be 0 or more and below {IDS}")),
    };
    for (at, token) in json["added_tokens"].as_array().into_iter().flatten().enumerate() {
        check(format!("added_tokens.{at}.id"), &token["id"])?;
    }
    for (token, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        check(format!("model.vocab.{token:?}"), id)?;
    }
    let listed = json["model"]["vocab"].as_array().map_or(0, Vec::len) as u64;
    if listed > IDS {
        return Err(format!("model.vocab has {listed} tokens; {IDS} are allowed"));
    }
    Ok(())
}

/// The ids that a post-processor adds, each with where it stands.
pub(super) fn added_by_processor(part: &Value, path: &str, found: &mut Vec<(String, u64)>) {
    for (at, inner) in part["processors"].as_array().into_iter().flatten().enumerate() {
        added_by_processor(inner, &format!("{path}.processors.{at}"), found);
    }
    for (name, token) in part["special_tokens"].as_object().into_iter().flatten() {
        let ids = token["ids"].as_array().into_iter().flatten().filter_map(Value::as_u64);
        found.extend(ids.map(|id| (format!("{path}.special_tokens.{name}.ids"), id)));
    }
    for key in ["sep", "cls"] {
        found.extend(part[key][1].as_u64().map(|id| (format!("{path}.{key}"), id)));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lengths_of_tables_are_read_from_base64() {
        // 4 bytes of length, little-endian, then as many as that.
        assert_eq!(check_charsmap("BAAAAAECAwQ=", "n"), Ok(())); // 4, then 1 2 3 4
        assert!(check_charsmap("/////wECAwQ=", "n").unwrap_err().contains("a table of 4294967295 bytes, and 4 follow"));
        assert!(check_charsmap("CAAAAAECAwQ=", "n").unwrap_err().contains("a table of 8 bytes"));
        assert!(check_charsmap("", "n").unwrap_err().contains("not base64"));
    }

    #[test]
    fn repetitions_of_real_patterns_are_few() {
        assert_eq!(check_repetitions(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s]+|\s+(?!\S)"), Ok(()));
        assert!(check_repetitions("((a{1000}){1000}){1000}").unwrap_err().contains("1000000000 times"));
    }
}
