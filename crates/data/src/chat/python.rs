//! Values as Python writes them: `str()`, `repr()` and `json.dumps`, with which chat templates print arguments and tools.

use std::fmt;
use std::sync::Arc;

use minijinja::value::{Object, ObjectRepr, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

/// Lists in lists may go as deep as this; chosen by us. JSON from files goes to 128.
const DEEPEST: usize = 200;

/// A number that MiniJinja keeps or prints otherwise than Python: a whole one of more than 128 bits, a float that Python writes
/// with an exponent, or one that is not finite.
#[derive(Debug)]
pub(super) struct Odd {
    text: String,
    json: String,
    whole: bool,
    zero: bool,
}

impl Odd {
    /// Whether it is an `int` of Python's.
    pub(super) fn is_whole(&self) -> bool {
        self.whole
    }

    /// What is left of it divided by 2; -1 where that is neither 0 nor 1.
    pub(super) fn rest_of_two(&self) -> i128 {
        let last = self.text.bytes().last().filter(u8::is_ascii_digit);
        last.filter(|_| self.whole).map_or(-1, |digit| i128::from((digit - b'0') % 2))
    }
}

impl Object for Odd {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn is_true(self: &Arc<Self>) -> bool {
        !self.zero
    }

    fn custom_cmp(self: &Arc<Self>, other: &minijinja::value::DynObject) -> Option<std::cmp::Ordering> {
        let other = other.downcast_ref::<Self>()?;
        Some((self.whole, &self.text).cmp(&(other.whole, &other.text)))
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A number as JSON spells it.
pub(super) fn number(literal: &str) -> Value {
    let is_float = literal.contains(['.', 'e', 'E', 'N', 'I']);
    if !is_float {
        return match literal.parse::<i64>() {
            Ok(small) => Value::from(small),
            Err(_) => literal.parse::<i128>().map_or_else(
                |_| {
                    let text = literal.to_owned();
                    Value::from_object(Odd { json: text.clone(), text, whole: true, zero: false })
                },
                Value::from,
            ),
        };
    }
    let value = match literal {
        "NaN" => f64::NAN,
        "Infinity" => f64::INFINITY,
        "-Infinity" => f64::NEG_INFINITY,
        other => other.parse().unwrap_or(f64::NAN),
    };
    let text = float(value);
    if value.is_finite() && !text.contains('e') {
        return Value::from(value);
    }
    Value::from_object(Odd { json: json_float(value), text, whole: false, zero: false })
}

/// `repr` of a float: the shortest digits that mean it, with an exponent from 1e16 and below 1e-4.
pub(super) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.into();
    }
    let shortest = format!("{value:e}");
    let Some((digits, exponent)) = shortest.split_once('e') else { return shortest };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = value.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// A float as JSON of Python's has it, and as [`number`] reads it.
pub(super) fn json_float(value: f64) -> String {
    match float(value).as_str() {
        "nan" => "NaN".into(),
        "inf" => "Infinity".into(),
        "-inf" => "-Infinity".into(),
        other => other.to_owned(),
    }
}

fn as_float(value: &Value) -> Option<f64> {
    (value.kind() == ValueKind::Number && !value.is_integer()).then(|| f64::try_from(value.clone()).ok()).flatten()
}

fn too_deep() -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("lists in lists go deeper than {DEEPEST}"))
}

/// `str` of a value.
pub(super) fn text(state: &State, value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None if value.is_undefined() => Ok(String::new()),
        None => {
            let mut out = String::new();
            write_repr(state, value, 0, &mut out)?;
            Ok(out)
        }
    }
}

/// `str` of a text, a number, true, false or none.
pub(super) fn simple(value: &Value) -> Result<String, Error> {
    match (value.as_str(), value.kind()) {
        (Some(text), _) => Ok(text.to_owned()),
        (_, ValueKind::Undefined) => Ok(String::new()),
        (_, kind @ (ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)) => {
            Err(Error::new(ErrorKind::InvalidOperation, format!("a text or a number belongs there, not a {kind}")))
        }
        _ => Ok(as_float(value).map_or_else(|| value.to_string(), float)),
    }
}

fn write_repr(state: &State, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
    if depth > DEEPEST {
        return Err(too_deep());
    }
    state.consume_fuel(1)?;
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::String => quoted(value.as_str().unwrap_or_default(), out),
        ValueKind::Number => match as_float(value) {
            Some(value) => out.push_str(&float(value)),
            None => out.push_str(&value.to_string()),
        },
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.is_tuple();
            out.push(if tuple { '(' } else { '[' });
            let mut count = 0;
            for item in value.try_iter()?.checked() {
                out.push_str(if count > 0 { ", " } else { "" });
                write_repr(state, &item?, depth + 1, out)?;
                count += 1;
            }
            out.push_str(if tuple && count == 1 { "," } else { "" });
            out.push(if tuple { ')' } else { ']' });
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                write_repr(state, &key, depth + 1, out)?;
                out.push_str(": ");
                write_repr(state, &value.get_item(&key)?, depth + 1, out)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// A string in the quotes that Python chooses.
fn quoted(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for sign in text.chars() {
        let code = u32::from(sign);
        match sign {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            sign if sign == quote => out.extend(['\\', sign]),
            sign if printable(sign) => out.push(sign),
            _ if code < 0x100 => out.push_str(&format!("\\x{code:02x}")),
            _ if code < 0x1_0000 => out.push_str(&format!("\\u{code:04x}")),
            _ => out.push_str(&format!("\\U{code:08x}")),
        }
    }
    out.push(quote);
}

/// What Python calls printable: Rust's own table for its debug output has the same classes.
fn printable(sign: char) -> bool {
    if sign.is_ascii() {
        return !sign.is_ascii_control();
    }
    // Behind another sign: alone, Rust would escape signs that combine, too.
    let mut pair = String::from("a");
    pair.push(sign);
    !pair.escape_debug().any(|shown| shown == '\\')
}

/// The arguments of `json.dumps` that transformers' `tojson` takes.
#[derive(Debug, Default)]
pub(super) struct Dumps {
    pub(super) ensure_ascii: bool,
    /// What each level is set off with; `None` for one line.
    pub(super) indent: Option<String>,
    /// Between items, and behind keys.
    pub(super) separators: Option<(String, String)>,
    pub(super) sort_keys: bool,
}

impl Dumps {
    /// The JSON of a value.
    pub(super) fn write(&self, state: &State, value: &Value) -> Result<String, Error> {
        let separators = self.separators.as_ref().map(|(item, key)| (item.as_str(), key.as_str()));
        let (item, key) = separators.unwrap_or((if self.indent.is_some() { "," } else { ", " }, ": "));
        let mut out = String::new();
        self.value((state, value), 0, (item, key), &mut out)?;
        Ok(out)
    }

    fn value(
        &self,
        (state, value): (&State, &Value),
        depth: usize,
        between: (&str, &str),
        out: &mut String,
    ) -> Result<(), Error> {
        if depth > DEEPEST {
            return Err(too_deep());
        }
        state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Number => match as_float(value) {
                Some(value) => out.push_str(&json_float(value)),
                None => out.push_str(&value.to_string()),
            },
            ValueKind::Seq | ValueKind::Iterable => {
                out.push('[');
                let mut count = 0;
                for item in value.try_iter()?.checked() {
                    self.next(count, depth, between.0, out);
                    self.value((state, &item?), depth + 1, between, out)?;
                    count += 1;
                }
                self.close(count, depth, ']', out);
            }
            ValueKind::Map => self.map((state, value), depth, between, out)?,
            _ => match value.downcast_object_ref::<Odd>() {
                Some(odd) => out.push_str(&odd.json),
                None => {
                    let problem = format!("tojson: {} is nothing that JSON has", value.kind());
                    return Err(Error::new(ErrorKind::BadSerialization, problem));
                }
            },
        }
        Ok(())
    }

    fn map(
        &self,
        (state, value): (&State, &Value),
        depth: usize,
        between: (&str, &str),
        out: &mut String,
    ) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.sort_keys {
            if keys.iter().any(|key| (key.kind() == ValueKind::String) != (keys[0].kind() == ValueKind::String)) {
                let problem = "tojson: keys of several kinds cannot be sorted";
                return Err(Error::new(ErrorKind::InvalidOperation, problem));
            }
            keys.sort();
        }
        out.push('{');
        for (index, key) in keys.iter().enumerate() {
            self.next(index, depth, between.0, out);
            match key.kind() {
                ValueKind::String => self.string(key.as_str().unwrap_or_default(), out),
                ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                    out.push('"');
                    self.value((state, key), depth, between, out)?;
                    out.push('"');
                }
                other => {
                    let problem = format!("tojson: a key that is a {other}");
                    return Err(Error::new(ErrorKind::BadSerialization, problem));
                }
            }
            out.push_str(between.1);
            self.value((state, &value.get_item(key)?), depth + 1, between, out)?;
        }
        self.close(keys.len(), depth, '}', out);
        Ok(())
    }

    /// Goes on to item number `index`.
    fn next(&self, index: usize, depth: usize, between: &str, out: &mut String) {
        out.push_str(if index > 0 { between } else { "" });
        if let Some(indent) = &self.indent {
            out.push('\n');
            (0..=depth).for_each(|_| out.push_str(indent));
        }
    }

    fn close(&self, count: usize, depth: usize, bracket: char, out: &mut String) {
        if let Some(indent) = self.indent.as_ref().filter(|_| count > 0) {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
        out.push(bracket);
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for sign in text.chars() {
            match sign {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                sign if sign < ' ' || (self.ensure_ascii && !(' '..='~').contains(&sign)) => {
                    for half in sign.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{half:04x}"));
                    }
                }
                sign => out.push(sign),
            }
        }
        out.push('"');
    }
}
