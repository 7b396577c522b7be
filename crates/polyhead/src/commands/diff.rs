//! `polyhead diff`: two runs side by side, by what they were told, where they ran and what they reached.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::console::{put, say, wants_json};
use polyhead_recipe::Problems;
use polyhead_recipe::{self as recipe, Recipe};
use polyhead_runs::Failure;
use polyhead_runs::result;
use polyhead_training::run_folder::files::RECIPE;

/// Longer values are cut in the middle columns; chosen by us.
const WIDTH: usize = 36;

/// A run as far as its folder tells.
struct Run {
    recipe: Recipe,
    environment: Vec<(String, String)>,
    numbers: Vec<(String, f64)>,
}

/// Prints how two runs differ.
pub fn diff(paths: [&Path; 2]) -> Result<(), Failure> {
    let [a, b] = [read(paths[0])?, read(paths[1])?];
    let differences = recipe::all_differences(&a.recipe, &b.recipe);
    if wants_json() {
        let environment = |run: &Run| run.environment.iter().cloned().collect::<BTreeMap<_, _>>();
        let numbers = |run: &Run| run.numbers.iter().cloned().collect::<BTreeMap<_, _>>();
        let (environments, measured) = ([&a, &b].map(environment), [&a, &b].map(numbers));
        return put!(
            "{:#}",
            json!({ "runs": paths, "recipe": differences, "environments": environments, "measured": measured })
        );
    }
    let names = paths.map(|path| path.display().to_string());
    line("", &names[0], &names[1], "")?;
    put!("\nrecipe")?;
    for (key, [before, now]) in &differences {
        line(key, before, now, "")?;
    }
    if differences.is_empty() {
        put!("  the same")?;
    }
    put!("\nenvironment")?;
    both(&a.environment, &b.environment, |name, values| {
        let [a, b] = values.map(|value| value.map_or("(unknown)", String::as_str));
        line(name, a, b, if a == b { "" } else { "differs" })
    })?;
    put!("\nmeasured")?;
    both(&a.numbers, &b.numbers, |name, values| {
        let shown = values.map(|value| value.map_or("–".to_owned(), |value| number(*value, 6)));
        let change = match values {
            [Some(a), Some(b)] if a != b => {
                format!("{}{}{}", if b > a { "+" } else { "" }, number(b - a, 3), better(name, b - a))
            }
            _ => String::new(),
        };
        line(name, &shown[0], &shown[1], &change)
    })
}

/// Numbers that are better when they are smaller, by the end of their names.
const SMALLER: [&str; 7] =
    ["loss", "bits_per_byte", "perplexity", "calibration_error", "seconds", "peak_memory_bytes", "kv_bytes_per_token"];
/// Numbers that are better when they are larger.
const LARGER: [&str; 4] = ["accuracy", "f1", "recall", "tokens_per_second"];

/// Which side is better, where the name of a number says so.
fn better(name: &str, difference: f64) -> &'static str {
    let is = |names: &[&str]| names.iter().any(|end| name.ends_with(end));
    let right = match (is(&SMALLER), is(&LARGER)) {
        (true, _) => difference < 0.0,
        (_, true) => difference > 0.0,
        _ => return "",
    };
    if right { "  right is better" } else { "  left is better" }
}

fn read(path: &Path) -> Result<Run, Failure> {
    let file = path.join(RECIPE);
    let text = std::fs::read_to_string(&file).map_err(|error| {
        let hint = "name the folders of two runs; `ls checkpoints` shows yours";
        Failure::from(Problems::plain(format!("{}: {error}\n  hint: {hint}", file.display())))
    })?;
    let recipe = toml::from_str(&text).map_err(|error| Failure::Run(format!("{}: {error}", file.display())))?;
    let result = match result::read(path)? {
        Some(result) => serde_json::to_value(result).map_err(|error| Failure::Run(error.to_string()))?,
        None => last_numbers(&result::history(path, say)?),
    };
    let mut numbers = Vec::new();
    collect(&result, "", &mut numbers);
    let environment = result["environment"].as_object().into_iter().flatten();
    let environment = environment.map(|(name, value)| (name.clone(), value.to_string().replace('"', ""))).collect();
    Ok(Run { recipe, environment, numbers })
}

/// The last value of every number that a run which has not finished logged.
fn last_numbers(history: &[Value]) -> Value {
    let mut last = serde_json::Map::new();
    for (key, value) in history.iter().filter_map(Value::as_object).flatten() {
        if value.is_number() && !key.ends_with("_bits") {
            last.insert(key.clone(), value.clone());
        }
    }
    Value::Object(last)
}

/// All numbers, by dotted names.
fn collect(value: &Value, path: &str, out: &mut Vec<(String, f64)>) {
    for (key, value) in value.as_object().into_iter().flatten().filter(|(key, _)| *key != "environment") {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match value.as_f64() {
            Some(number) => out.push((path, number)),
            None => collect(value, &path, out),
        }
    }
}

/// Every name that either list has, with the values of both.
fn both<T>(
    a: &[(String, T)],
    b: &[(String, T)],
    mut tell: impl FnMut(&str, [Option<&T>; 2]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let find = |list: &'_ [(String, T)], name: &str| list.iter().position(|(other, _)| other == name);
    for (name, value) in a {
        tell(name, [Some(value), find(b, name).map(|at| &b[at].1)])?;
    }
    for (name, value) in b.iter().filter(|(name, _)| find(a, name).is_none()) {
        tell(name, [None, Some(value)])?;
    }
    Ok(())
}

fn line(name: &str, a: &str, b: &str, note: &str) -> Result<(), Failure> {
    let cut = |text: &str| match text.chars().count() > WIDTH {
        true => format!("…{}", text.chars().skip(text.chars().count() - WIDTH + 1).collect::<String>()),
        false => text.to_owned(),
    };
    put!("  {name:<44} {:>WIDTH$}  {:>WIDTH$}  {note}", cut(a), cut(b))
}

/// A number with so many significant digits; whole ones are not rounded.
fn number(value: f64, digits: usize) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        return format!("{value:.0}");
    }
    let magnitude = value.abs().log10().floor();
    match (-5.0..15.0).contains(&magnitude) {
        true => format!("{value:.*}", (digits as f64 - 1.0 - magnitude).max(0.0) as usize),
        false => format!("{value:.*e}", digits - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::{better, number};

    #[test]
    fn numbers_have_significant_digits() {
        for (value, digits, shown) in [
            (1.359_912_3, 6, "1.35991"),
            (0.001_234_567, 3, "0.00123"),
            (-0.000_045_67, 3, "-0.0000457"),
            (1.234e-7, 3, "1.23e-7"),
            (123_456.78, 3, "123457"),
            (2000.0, 3, "2000"),
            (f64::NAN, 3, "NaN"),
        ] {
            assert_eq!(number(value, digits), shown);
        }
    }

    #[test]
    fn the_better_side_follows_from_the_name() {
        assert_eq!(better("validation.loss", -0.1), "  right is better");
        assert_eq!(better("validation.macro_f1", -0.1), "  left is better");
        assert_eq!(better("tokens_per_second", 5.0), "  right is better");
        assert_eq!(better("parameters", 5.0), "");
    }
}
