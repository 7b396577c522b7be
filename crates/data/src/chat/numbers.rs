//! JSON as Python reads it: whole numbers of any size, floats to the last bit, `NaN` and infinities. A number that serde_json
//! would change is kept as a text with a mark before it, until a template gets it.

use std::borrow::Cow;

use minijinja::Value;
use serde_json::Value as Json;

use super::python;
use crate::files::invalid;

/// Before a number that is kept as text. A private code point of Unicode, which no text holds by rights.
const MARK: char = '\u{F0E0E}';

/// A value of JSON, with numbers as Python has them.
pub(super) fn parse(line: &[u8]) -> Result<Json, String> {
    let line = kept(line)?;
    serde_json::from_slice(&line).map_err(|error| invalid(&error))
}

/// The same JSON, in which numbers that would be changed are marked texts.
fn kept(line: &[u8]) -> Result<Cow<'_, [u8]>, String> {
    let mut mark = [0; 4];
    let mark: &[u8] = MARK.encode_utf8(&mut mark).as_bytes();
    let (mut out, mut copied, mut at) = (Vec::new(), 0, 0);
    let mut inside = false;
    while at < line.len() {
        match line[at] {
            b'\\' if inside => at += 1,
            b'"' => inside = !inside,
            first if inside && first == mark[0] && line[at..].starts_with(mark) => {
                return Err("a text holds the code point U+F0E0E, which marks numbers here".into());
            }
            b'-' | b'0'..=b'9' | b'N' | b'I' if !inside => {
                let length = line[at..].iter().take_while(|&&byte| is_part(byte)).count();
                let literal = std::str::from_utf8(&line[at..at + length]).unwrap_or_default();
                if changes(literal) {
                    out.extend_from_slice(&line[copied..at]);
                    if literal == "-0" {
                        out.push(b'0');
                    } else {
                        out.push(b'"');
                        out.extend_from_slice(mark);
                        out.extend_from_slice(literal.as_bytes());
                        out.push(b'"');
                    }
                    copied = at + length;
                }
                at += length.max(1) - 1;
            }
            _ => {}
        }
        at += 1;
    }
    if copied == 0 {
        return Ok(Cow::Borrowed(line));
    }
    out.extend_from_slice(&line[copied..]);
    Ok(Cow::Owned(out))
}

fn is_part(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.')
}

/// Whether serde_json would read this number as another one, or not at all. What is no number is left to it.
fn changes(literal: &str) -> bool {
    if matches!(literal, "NaN" | "Infinity" | "-Infinity" | "-0") {
        return true;
    }
    let digits = literal.strip_prefix('-').unwrap_or(literal);
    let whole = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if digits.len() > 1 && digits.starts_with('0') && digits.as_bytes()[1].is_ascii_digit() {
        return false;
    }
    if whole {
        return literal.parse::<i64>().is_err() && literal.parse::<u64>().is_err();
    }
    let (mantissa, exponent) = digits.split_once(['e', 'E']).unwrap_or((digits, "0"));
    let shape = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let (front, behind) = mantissa.split_once('.').unwrap_or((mantissa, "0"));
    if !shape(front) || !shape(behind) || !shape(exponent.trim_start_matches(['+', '-'])) {
        return false;
    }
    // Up to 15 digits and small powers of ten are exact in its way of reading, too.
    mantissa.len() > 16 || exponent.parse::<i32>().map_or(true, |exponent| exponent.abs() > 6)
}

/// The number that a marked text keeps.
pub(super) fn literal(text: &str) -> Option<&str> {
    text.strip_prefix(MARK)
}

/// A value of JSON for a template.
pub(super) fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(yes) => Value::from(*yes),
        Json::Number(number) => python::number(&number.to_string()),
        Json::String(text) => literal(text).map_or_else(|| Value::from(text.as_str()), python::number),
        Json::Array(items) => Value::from(items.iter().map(value).collect::<Vec<_>>()),
        Json::Object(fields) => Value::from_pairs(fields.iter().map(|(key, item)| (key.as_str(), value(item)))),
    }
}
