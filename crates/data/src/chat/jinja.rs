//! The environment that templates run in: MiniJinja, made to write what Jinja2 writes under transformers, and bounded, as
//! templates come with folders from anywhere.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

use super::dates::Day;
use super::methods;
use super::python::{self, Dumps, Odd};

/// Around what a `{% generation %}` block wrote. Private code points of Unicode, which no text holds by rights.
pub(super) const MARKS: [char; 2] = ['\u{F0E0A}', '\u{F0E0B}'];
/// Parts of a value that a template keeps; chosen by us.
const LARGEST: usize = 1_000_000;

/// An environment that knows what transformers' knows.
pub(super) fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(methods::call);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(|out, state, value| match value.as_str() {
        Some(text) => Ok(out.write_str(text)?),
        None => Ok(out.write_str(&python::text(state, value)?)?),
    });
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    filters(&mut environment);
    tests(&mut environment);
    Ok(environment)
}

/// Lets templates ask for today's date: that of `day`.
pub(super) fn tell_day(environment: &mut Environment<'static>, day: Day) {
    environment.add_function("strftime_now", move |format: String| {
        day.format(&format).map_err(|problem| Error::new(ErrorKind::InvalidOperation, problem))
    });
}

fn filters(environment: &mut Environment<'static>) {
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |state: &State, value: Value| match value.as_str() {
        Some(_) => Ok(value),
        None => python::text(state, &value).map(Value::from),
    });
    environment.add_filter("trim", |state: &State, text: Value, signs: Option<String>| {
        let text = python::text(state, &text)?;
        let cut = |sign: char| signs.as_ref().map_or_else(|| methods::blank(sign), |signs| signs.contains(sign));
        Ok::<_, Error>(text.trim_matches(cut).to_owned())
    });
    environment.add_filter("join", join);
    environment.add_filter("list", |value: Value| match value.kind() {
        ValueKind::None => Err(refused("none is not a list")),
        _ => Ok(Value::from(value.try_iter()?.checked().collect::<Result<Vec<Value>, Error>>()?)),
    });
    for name in ["default", "d"] {
        environment.add_filter(name, |value: Value, other: Option<Value>, falsy: Option<bool>, named: Kwargs| {
            let other = other.or(named.get("default_value")?).unwrap_or_else(|| Value::from(""));
            let falsy = falsy.or(named.get("boolean")?).unwrap_or(false);
            named.assert_all_used()?;
            Ok::<_, Error>(if value.is_undefined() || (falsy && !value.is_true()) { other } else { value })
        });
    }
    environment.add_filter("int", |value: Value, other: Option<Value>, base: Option<u32>, named: Kwargs| {
        let other = other.or(named.get("default")?).unwrap_or_else(|| Value::from(0));
        let base = base.or(named.get("base")?).unwrap_or(10);
        named.assert_all_used()?;
        Ok::<_, Error>(whole(&value, base).unwrap_or(other))
    });
    environment.add_filter("float", |value: Value, other: Option<Value>, named: Kwargs| {
        let other = other.or(named.get("default")?).unwrap_or_else(|| Value::from(0.0));
        named.assert_all_used()?;
        let text = python::simple(&value)?;
        let read = match value.kind() {
            ValueKind::Bool => Some(Value::from(f64::from(u8::from(value.is_true())))),
            _ => text.trim().replace('_', "").parse::<f64>().ok().map(|read| python::number(&python::json_float(read))),
        };
        Ok::<_, Error>(read.unwrap_or(other))
    });
    for name in ["escape", "e", "forceescape"] {
        environment.add_filter(name, |value: Value| {
            let text = python::simple(&value)?;
            let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            Ok::<_, Error>(Value::from_safe_string(text.replace('\'', "&#39;").replace('"', "&#34;")))
        });
    }
    environment.add_filter("generation", |text: String| format!("{}{text}{}", MARKS[0], MARKS[1]));
    environment.add_filter("kept", |state: &State, value: Value| {
        bounded(state, &value)?;
        match (value.kind(), value.len()) {
            (ValueKind::Iterable, Some(_)) => {
                Ok(Value::from(value.try_iter()?.checked().collect::<Result<Vec<Value>, Error>>()?))
            }
            _ => Ok(value),
        }
    });
    environment.add_filter("indent", indent);
    environment.add_filter("wordcount", |text: String| {
        text.split(|sign: char| !(sign.is_alphanumeric() || sign == '_')).filter(|word| !word.is_empty()).count()
    });
}

/// Refuses what has too many parts, each counted as often as it is there: a list that holds another twice is small in memory, and
/// endless to write once that is done again and again.
fn bounded(state: &State, value: &Value) -> Result<(), Error> {
    let (mut left, mut count) = (vec![value.clone()], 0);
    while let Some(value) = left.pop() {
        let parts = match value.kind() {
            ValueKind::Seq | ValueKind::Map => value.len(),
            ValueKind::Iterable => value.len(),
            _ => None,
        };
        let Some(parts) = parts else { continue };
        count += 1 + parts;
        if count > LARGEST {
            return Err(refused("a value grows to more than a million parts"));
        }
        state.consume_fuel(1 + parts as u64 / 16)?;
        for item in value.try_iter()?.checked() {
            let item = item?;
            left.push(if value.kind() == ValueKind::Map { value.get_item(&item)? } else { item });
        }
    }
    Ok(())
}

fn refused(problem: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem)
}

/// `int(x)` of Python, where a text may be a float's, too.
fn whole(value: &Value, base: u32) -> Option<Value> {
    if value.is_integer() || value.downcast_object_ref::<Odd>().is_some_and(Odd::is_whole) {
        return Some(value.clone());
    }
    if value.kind() == ValueKind::Bool {
        return Some(Value::from(i64::from(value.is_true())));
    }
    let text = python::simple(value).ok()?;
    let text = text.trim().replace('_', "");
    if value.kind() == ValueKind::String && (2..=36).contains(&base) {
        let (sign, digits) = text.strip_prefix('-').map_or(("", text.as_str()), |digits| ("-", digits));
        let digits = match base {
            16 => digits.trim_start_matches("0x").trim_start_matches("0X"),
            8 => digits.trim_start_matches("0o"),
            2 => digits.trim_start_matches("0b"),
            _ => digits,
        };
        if let Ok(read) = i128::from_str_radix(&format!("{sign}{digits}"), base) {
            return Some(Value::from(read));
        }
    }
    let read = text.parse::<f64>().ok().filter(|read| read.abs() < 1e38)?;
    Some(Value::from(read.trunc() as i128))
}

/// Lines behind the first (or all) set off; of blank ones only if asked.
fn indent(
    text: Value,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    named: Kwargs,
) -> Result<String, Error> {
    let width = width.or(named.get("width")?).unwrap_or_else(|| Value::from(4));
    let first = first.or(named.get("first")?).unwrap_or(false);
    let blank = blank.or(named.get("blank")?).unwrap_or(false);
    named.assert_all_used()?;
    let set_off = match (width.as_str(), i64::try_from(width.clone())) {
        (Some(text), _) if text.len() <= 1000 => text.to_owned(),
        (None, Ok(width)) if width <= 1000 => " ".repeat(width.max(0) as usize),
        _ => return Err(refused("indent: up to 1000 spaces, or a text, belong there")),
    };
    let text = python::simple(&text)? + "\n";
    let mut lines = methods::lines(&text, false).into_iter();
    let mut out = if first { set_off.clone() } else { String::new() };
    out.push_str(lines.next().unwrap_or_default());
    for line in lines {
        out.push('\n');
        out.push_str(if line.is_empty() && !blank { "" } else { &set_off });
        out.push_str(line);
    }
    Ok(out)
}

/// transformers' `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn to_json(state: &State, value: Value, places: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    const NAMES: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let wrong = |problem: String| Error::new(ErrorKind::InvalidOperation, format!("tojson: {problem}"));
    if places.len() > NAMES.len() {
        return Err(wrong(format!("{} arguments, where it has {}", places.len(), NAMES.join(", "))));
    }
    if let Some(other) = named.args().find(|name| !NAMES.contains(name)) {
        return Err(wrong(format!("no argument {other}: it has {}", NAMES.join(", "))));
    }
    let of = |index: usize| -> Result<Option<Value>, Error> {
        let (place, name) = (places.get(index).cloned(), named.get::<Option<Value>>(NAMES[index])?);
        if place.is_some() && name.is_some() {
            return Err(wrong(format!("{} is given twice", NAMES[index])));
        }
        Ok(place.or(name).filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let indent = match of(1)? {
        None => None,
        Some(value) => Some(match (value.as_str(), i64::try_from(value.clone())) {
            (Some(text), _) if text.len() <= 100 => text.to_owned(),
            (None, Ok(width)) if width <= 100 => " ".repeat(width.max(0) as usize),
            _ => return Err(wrong(format!("an indent of {value}, where up to 100 spaces, or a text, belong"))),
        }),
    };
    let separators = match of(2)? {
        None => None,
        Some(value) => {
            let parts: Vec<Value> = value.try_iter().map(|parts| parts.collect()).unwrap_or_default();
            match parts.iter().map(Value::as_str).collect::<Vec<_>>()[..] {
                [Some(item), Some(key)] if value.as_str().is_none() => Some((item.to_owned(), key.to_owned())),
                _ => return Err(wrong("separators are two texts: between items, and behind keys".into())),
            }
        }
    };
    let yes = |index| of(index).map(|value| value.is_some_and(|value| value.is_true()));
    let dumps = Dumps { ensure_ascii: yes(0)?, indent, separators, sort_keys: yes(3)? };
    dumps.write(state, &value).map(Value::from_safe_string)
}

/// Items as text, a text between them; `attribute` picks what is joined.
fn join(state: &State, value: Value, between: Option<Value>, named: Kwargs) -> Result<String, Error> {
    let named_between: Option<Value> = named.get("d")?;
    let attribute: Option<Value> = named.get("attribute")?;
    named.assert_all_used()?;
    let between = between.or(named_between).map_or_else(|| Ok(String::new()), |value| python::simple(&value))?;
    let items = match attribute {
        Some(attribute) => {
            let path = Kwargs::from_iter([("attribute", attribute)]);
            state_map(state, value, path)?
        }
        None => value,
    };
    if items.is_none() {
        return Err(Error::new(ErrorKind::InvalidOperation, "none cannot be joined"));
    }
    let mut out = String::new();
    for (index, item) in items.try_iter()?.checked().enumerate() {
        let item = python::text(state, &item?)?;
        state.consume_fuel((between.len() + item.len()) as u64 / 64)?;
        out.push_str(if index > 0 { &between } else { "" });
        out.push_str(&item);
    }
    Ok(out)
}

fn state_map(state: &State, value: Value, named: Kwargs) -> Result<Value, Error> {
    let mut inner = state.env().empty_state();
    inner.apply_filter("map", &[value, Value::from(named)])
}

fn tests(environment: &mut Environment<'static>) {
    let odd = |value: &Value| value.downcast_object_ref::<Odd>().map(Odd::is_whole);
    let sized = |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined)
            || value.kind() == ValueKind::Iterable
    };
    environment.add_test("iterable", move |value: &Value| sized(value));
    environment.add_test("sequence", move |value: &Value| sized(value));
    environment.add_test("number", move |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool) || odd(value).is_some()
    });
    environment.add_test("integer", move |value: &Value| value.is_integer() || odd(value) == Some(true));
    environment.add_test("callable", |value: &Value| {
        value.kind() == ValueKind::Undefined
            || (value.kind() == ValueKind::Plain && value.downcast_object_ref::<Odd>().is_none())
    });
    for (name, rest) in [("odd", 1), ("even", 0)] {
        environment.add_test(name, move |value: Value| -> Result<bool, Error> {
            if let Some(odd) = value.downcast_object_ref::<Odd>() {
                return Ok(odd.rest_of_two() == rest);
            }
            match (value.kind(), f64::try_from(value.clone()), i128::try_from(value.clone())) {
                (_, _, Ok(whole)) => Ok(whole.rem_euclid(2) == rest),
                (ValueKind::Number, Ok(float), _) => Ok(float.rem_euclid(2.0) == rest as f64),
                _ => Err(refused("odd and even are asked of numbers")),
            }
        });
    }
    environment.add_test("float", move |value: &Value| {
        (value.kind() == ValueKind::Number && !value.is_integer()) || odd(value) == Some(false)
    });
}
