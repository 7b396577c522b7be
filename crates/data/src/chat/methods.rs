//! Methods of Python's strings, lists and dictionaries that MiniJinja's own compatibility lacks or has otherwise.

use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

/// A width that a text may be filled up to; chosen by us. Python has no limit.
const WIDEST: usize = 10_000;

/// Calls a method of a value that brings none itself.
pub(super) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let own = match value.kind() {
        ValueKind::String => string(state, value.as_str().unwrap_or_default(), method, args)?,
        ValueKind::Seq | ValueKind::Iterable => list(value, method, args)?,
        ValueKind::Map if method == "copy" => Some(value.clone()),
        _ => None,
    };
    match own {
        Some(value) => Ok(value),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn wrong(problem: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem)
}

/// What Python takes for white space, which Rust does but for four separators.
pub(super) fn blank(sign: char) -> bool {
    sign.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&sign)
}

fn list(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    if method != "index" {
        return Ok(None);
    }
    let (what,): (&Value,) = from_args(args)?;
    let at = value.try_iter()?.position(|item| item == *what);
    at.map(|at| Some(Value::from(at))).ok_or_else(|| wrong(format!("{what} is not in the list")))
}

/// An argument by its place or its name.
fn argument<T>(args: &[Value], place: usize, named: &Kwargs, name: &str) -> Result<Option<T>, Error>
where
    for<'a> Option<T>: minijinja::value::ArgType<'a, Output = Option<T>>,
{
    match args.get(place) {
        Some(value) => from_args::<(Option<T>,)>(std::slice::from_ref(value)).map(|(value,)| value),
        None => named.get(name),
    }
}

fn string(state: &State, text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let strings = |pieces: Vec<&str>| Value::from(pieces.into_iter().map(Value::from).collect::<Vec<_>>());
    Ok(Some(match method {
        "split" | "rsplit" => {
            let (places, named): (&[Value], Kwargs) = arguments(args)?;
            let separator: Option<String> = argument(places, 0, &named, "sep")?;
            let most: Option<i64> = argument(places, 1, &named, "maxsplit")?;
            named.assert_all_used()?;
            let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
            match separator.as_deref() {
                Some("") => return Err(wrong("split: the separator is empty".into())),
                Some(separator) => strings(divided(text, separator, most, method == "rsplit")),
                None => strings(words(text, most, method == "rsplit")),
            }
        }
        "splitlines" => {
            let (places, named): (&[Value], Kwargs) = arguments(args)?;
            let keep: Option<bool> = argument(places, 0, &named, "keepends")?;
            named.assert_all_used()?;
            strings(lines(text, keep.unwrap_or(false)))
        }
        "strip" | "lstrip" | "rstrip" => {
            let (signs,): (Option<&str>,) = from_args(args)?;
            let cut = |sign: char| signs.map_or_else(|| blank(sign), |signs| signs.contains(sign));
            Value::from(match method {
                "strip" => text.trim_matches(cut),
                "lstrip" => text.trim_start_matches(cut),
                _ => text.trim_end_matches(cut),
            })
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let first = method == "partition";
            let found = if first { text.split_once(separator) } else { text.rsplit_once(separator) };
            Value::from(Tuple::from(match (found, first) {
                (Some((before, behind)), _) => [before, separator, behind].map(Value::from),
                (None, true) => [text, "", ""].map(Value::from),
                (None, false) => ["", "", text].map(Value::from),
            }))
        }
        "index" | "rindex" => {
            let (what,): (&str,) = from_args(args)?;
            let found = if method == "index" { text.find(what) } else { text.rfind(what) };
            let at = found.ok_or_else(|| wrong(format!("{method}: the text does not hold {what:?}")))?;
            Value::from(text[..at].chars().count())
        }
        "startswith" | "endswith" if args.len() > 1 => {
            let (what, start, end): (Value, Option<i64>, Option<i64>) = from_args(args)?;
            let length = text.chars().count() as i64;
            let at = |place: i64| (if place < 0 { (length + place).max(0) } else { place.min(length) }) as usize;
            let (start, end) = (at(start.unwrap_or(0)), at(end.unwrap_or(length)));
            let part: String = text.chars().take(end).skip(start).collect();
            return Ok(Some(begins_or_ends(&part, method, what)?));
        }
        "center" | "ljust" | "rjust" | "zfill" => Value::from(filled(text, method, args)?),
        "expandtabs" => Value::from(tabs(text, args)?),
        "removeprefix" => {
            let (part,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(part).unwrap_or(text))
        }
        "removesuffix" => {
            let (part,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(part).unwrap_or(text))
        }
        "swapcase" => {
            let swap = |sign: char| -> String {
                if sign.is_uppercase() { sign.to_lowercase().collect() } else { sign.to_uppercase().collect() }
            };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "casefold" => Value::from(text.to_lowercase().replace('ß', "ss")),
        "isdecimal" => Value::from(!text.is_empty() && text.chars().all(|sign| sign.is_ascii_digit())),
        "isidentifier" => {
            let word = |sign: char| sign == '_' || sign.is_alphanumeric();
            Value::from(text.chars().all(word) && text.starts_with(|sign: char| word(sign) && !sign.is_numeric()))
        }
        "isspace" => Value::from(!text.is_empty() && text.chars().all(blank)),
        "title" => Value::from(title(text)),
        "join" => {
            let (parts,): (&Value,) = from_args(args)?;
            let mut out = String::new();
            for (index, part) in parts.try_iter()?.checked().enumerate() {
                let part = part?;
                let problem = || wrong(format!("join: item {index} is a {}, where texts belong", part.kind()));
                let part = part.as_str().ok_or_else(problem)?;
                state.consume_fuel((text.len() + part.len()) as u64 / 64)?;
                out.push_str(if index > 0 { text } else { "" });
                out.push_str(part);
            }
            Value::from(out)
        }
        "format" => {
            bounded(text)?;
            return Ok(None);
        }
        _ => return Ok(None),
    }))
}

/// Positional arguments and named ones.
fn arguments(args: &[Value]) -> Result<(&[Value], Kwargs), Error> {
    match args.split_last() {
        Some((last, before)) if last.is_kwargs() => Ok((before, Kwargs::try_from(last.clone())?)),
        _ => Ok((args, Kwargs::from_iter(std::iter::empty::<(&str, Value)>()))),
    }
}

fn begins_or_ends(text: &str, method: &str, what: Value) -> Result<Value, Error> {
    let ends = |part: &str| if method == "startswith" { text.starts_with(part) } else { text.ends_with(part) };
    match what.as_str() {
        Some(part) => Ok(Value::from(ends(part))),
        None => Ok(Value::from(what.try_iter()?.any(|part| part.as_str().is_some_and(ends)))),
    }
}

fn divided<'a>(text: &'a str, separator: &str, most: usize, from_end: bool) -> Vec<&'a str> {
    let pieces = most.saturating_add(1);
    if !from_end {
        return text.splitn(pieces, separator).collect();
    }
    let mut found: Vec<&str> = text.rsplitn(pieces, separator).collect();
    found.reverse();
    found
}

/// Runs of anything but white space; behind `most` of them what is left.
fn words(text: &str, most: usize, from_end: bool) -> Vec<&str> {
    let (mut out, mut rest) = (Vec::new(), text.trim_matches(blank));
    while !rest.is_empty() {
        let cut = if from_end { rest.rfind(blank) } else { rest.find(blank) };
        let Some(at) = cut.filter(|_| out.len() < most) else {
            out.push(rest);
            break;
        };
        if from_end {
            out.push(rest[at..].trim_start_matches(blank));
            rest = rest[..at].trim_end_matches(blank);
        } else {
            out.push(&rest[..at]);
            rest = rest[at..].trim_start_matches(blank);
        }
    }
    if from_end {
        out.reverse();
    }
    out
}

/// Lines at every line end that Python knows.
pub(super) fn lines(text: &str, keep: bool) -> Vec<&str> {
    let ends = |sign: char| {
        matches!(
            sign,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}' | '\u{1d}' | '\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let (mut out, mut rest) = (Vec::new(), text);
    while let Some(at) = rest.find(ends) {
        let length =
            if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(1, char::len_utf8) };
        out.push(if keep { &rest[..at + length] } else { &rest[..at] });
        rest = &rest[at + length..];
    }
    if !rest.is_empty() {
        out.push(rest);
    }
    out
}

/// Letters behind anything but a letter as capitals, the others small.
fn title(text: &str) -> String {
    let (mut out, mut inside) = (String::with_capacity(text.len()), false);
    for sign in text.chars() {
        if inside {
            out.extend(sign.to_lowercase());
        } else {
            out.extend(sign.to_uppercase());
        }
        inside = sign.is_alphabetic();
    }
    out
}

fn filled(text: &str, method: &str, args: &[Value]) -> Result<String, Error> {
    let (width, fill): (i64, Option<&str>) = from_args(args)?;
    let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
    if width > WIDEST {
        return Err(wrong(format!("{method}: a width of {width}, where {WIDEST} is the most")));
    }
    let fill = fill.unwrap_or(" ");
    if fill.chars().count() != 1 {
        return Err(wrong(format!("{method}: one character fills up, not {fill:?}")));
    }
    let missing = width.saturating_sub(text.chars().count());
    let some = |count: usize| fill.repeat(count);
    Ok(match method {
        "ljust" => text.to_owned() + &some(missing),
        "rjust" => some(missing) + text,
        "zfill" => {
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", "0".repeat(missing))
        }
        _ => {
            let left = missing / 2 + (missing & width & 1);
            some(left) + text + &some(missing - left)
        }
    })
}

fn tabs(text: &str, args: &[Value]) -> Result<String, Error> {
    let (size,): (Option<i64>,) = from_args(args)?;
    let size = usize::try_from(size.unwrap_or(8).max(0)).unwrap_or(0);
    if size > 100 {
        return Err(wrong(format!("expandtabs: tabs of {size}, where 100 is the most")));
    }
    let (mut out, mut column) = (String::new(), 0);
    for sign in text.chars() {
        match sign {
            '\t' => {
                let count = if size == 0 { 0 } else { size - column % size };
                (0..count).for_each(|_| out.push(' '));
                column += count;
            }
            '\n' | '\r' => {
                out.push(sign);
                column = 0;
            }
            _ => {
                out.push(sign);
                column += 1;
            }
        }
    }
    Ok(out)
}

/// Refuses widths and precisions of a format that would fill memory.
pub(super) fn bounded(format: &str) -> Result<(), Error> {
    let digits = format.split(|sign: char| !sign.is_ascii_digit());
    match digits.filter(|run| !run.is_empty()).find(|run| run.parse::<usize>().map_or(true, |width| width > WIDEST)) {
        Some(width) => Err(wrong(format!("format: a width of {width}, where {WIDEST} is the most"))),
        None => Ok(()),
    }
}
