//! JSON as Python's `json.dumps` writes it with `ensure_ascii=False`, which chat templates print tools with.

use serde_json::Value;

/// `, ` and `: ` between parts; with an indent, one part a line.
pub(super) fn dumps(value: &Value, indent: Option<usize>) -> String {
    let mut out = String::new();
    write(value, indent, 0, &mut out);
    out
}

fn write(value: &Value, indent: Option<usize>, depth: usize, out: &mut String) {
    match value {
        Value::Array(items) => {
            let parts = items.iter().map(|item| (None, item)).collect::<Vec<_>>();
            list(['[', ']'], &parts, indent, depth, out);
        }
        Value::Object(fields) => {
            let parts = fields.iter().map(|(key, item)| (Some(key.as_str()), item)).collect::<Vec<_>>();
            list(['{', '}'], &parts, indent, depth, out);
        }
        other => out.push_str(&other.to_string()),
    }
}

fn list(
    [open, close]: [char; 2],
    parts: &[(Option<&str>, &Value)],
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
) {
    out.push(open);
    let line = |out: &mut String, depth: usize| {
        if let Some(width) = indent {
            out.push('\n');
            out.push_str(&" ".repeat(width * depth));
        }
    };
    for (index, (key, item)) in parts.iter().enumerate() {
        if index > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        line(out, depth + 1);
        if let Some(key) = key {
            out.push_str(&format!("{}: ", Value::from(*key)));
        }
        write(item, indent, depth + 1, out);
    }
    if !parts.is_empty() {
        line(out, depth);
    }
    out.push(close);
}
