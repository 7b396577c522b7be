//! Mutated recipes: refused with a place, or taken with every key that stands in them. Never a panic, never a key that is ignored.

use std::path::{Path, PathBuf};

use toml::Value;

use crate::case::{Case, Held, How, Tried, ensure};
use crate::random::Random;
use crate::{Kind, mutate, runs};

/// In seconds and MiB: what reading a recipe may take, and a plan, which reads its text, on a busy machine.
const SECONDS: u64 = 60;
const MEMORY: u64 = 1024;
/// Costs that one step may have to be tried: larger models are only planned.
const LARGEST: i64 = 64;

/// Recipes of the project and of the small runs, with one to three changes.
#[derive(Default)]
pub struct Recipes {
    bases: Vec<Base>,
    /// How many of them can be trained in a moment.
    small: usize,
}

/// A recipe that is changed.
struct Base {
    text: String,
    /// The command that reads it: `cat` for one recipe, which is resolved, so that every key takes part; `validate` for what
    /// consists of several.
    verb: &'static str,
}

/// What is known about a changed recipe.
struct Changed {
    text: Vec<u8>,
    /// The line of a key that exists nowhere.
    unknown: Option<usize>,
}

impl Kind for Recipes {
    fn name(&self) -> &'static str {
        "recipes"
    }

    fn prepare(&mut self, case: &mut Case) -> Held {
        for (name, recipe) in runs::recipes(4) {
            case.write(&format!("{name}.toml"), recipe)?;
            let text = case.run(&[0], &["cat", &format!("{name}.toml")])?.out;
            self.bases.push(Base { text, verb: "cat" });
        }
        for (data, more) in [
            ("data.markov.states=4", "optimizer.lion.lr=0.01"),
            ("data.needles.n_needles=2", "training.seq_len=32"),
            ("data.copy.vocab=8", "lr_scheduler.decay=linear"),
        ] {
            // A key that does not exist makes no base.
            let answer = case.run(&[0, 2], &["cat", "grouped.toml", data, more])?;
            self.bases.extend((answer.code == Some(0)).then_some(Base { text: answer.out, verb: "cat" }));
        }
        self.small = self.bases.len();
        for path in files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes").canonicalize()?)? {
            let answer = case.run(&[0, 2], &["cat", &path.to_string_lossy()])?;
            let raw = std::fs::read_to_string(&path)?;
            // Comparisons are not printed, and runs in stages are printed as several recipes.
            self.bases.push(match answer.code == Some(0) && !raw.contains("[[stage]]") {
                true => Base { text: answer.out, verb: "cat" },
                false => Base { text: anchored(&raw, &path), verb: "validate" },
            });
        }
        Ok(())
    }

    fn attack(&mut self, case: &mut Case) -> Held<Tried> {
        let which = if case.random.one_in(2) { self.small } else { self.bases.len() };
        let base = case.random.below(which);
        let Base { text, verb } = &self.bases[base];
        let changed = change(&mut case.random, text);
        case.write("mutated.toml", &changed.text)?;
        case.write("book.txt", runs::book())?;
        let how = How { seconds: SECONDS, memory: MEMORY, ..How::default() };
        if case.random.one_in(8) {
            let key = override_text(&mut case.random, text);
            case.run_as(&how, &["validate", "mutated.toml", &key])?.ends(&[0, 2])?;
            return Ok(Tried::Held);
        }
        let answer = case.run_as(&how, &[verb, "mutated.toml"])?.ends(&[0, 2])?;
        if let Some(line) = changed.unknown {
            let place = format!("mutated.toml:{line}:");
            ensure!(answer.code == Some(2), "the unknown key of line {line} is accepted");
            ensure!(answer.err.contains(&place), "{place} is not named: {}", answer.err);
        }
        if answer.code != Some(0) || *verb != "cat" {
            return Ok(Tried::Held);
        }
        // What was typed is what is meant: nothing is ignored.
        let typed = String::from_utf8_lossy(&changed.text).into_owned();
        if let (Ok(typed), Ok(meant)) = (typed.parse::<toml::Table>(), answer.out.parse::<toml::Table>()) {
            says(&Value::Table(meant), &Value::Table(typed), "")?;
        }
        let validated = case.run_as(&how, &["validate", "mutated.toml"])?.ends(&[0, 2])?;
        if validated.code == Some(0) && case.random.one_in(3) {
            case.run_as(&how, &["plan", "mutated.toml", "--no-probe"])?.ends(&[0, 1, 2])?;
        }
        // What is valid can be trained: a step of small models shows that.
        let value = typed.parse::<toml::Table>().map(Value::Table);
        let one = validated.code == Some(0) && base < self.small && value.is_ok_and(|value| is_small(&value, ""));
        if one && case.random.one_in(3) {
            let how = How { memory: 4 * MEMORY, ..how };
            let step = ["train", "mutated.toml", "training.steps=1", "lr_scheduler.warmup_steps=0", "--out", "run"];
            case.run_as(&how, &step)?.ends(&[0, 1, 2])?;
        }
        Ok(Tried::Held)
    }
}

/// With the paths of its base and of other recipes from the root on.
fn anchored(text: &str, path: &Path) -> String {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let base = format!("extends = \"{}/", folder.display());
    text.replace("extends = \"", &base).replace(" \"../", &format!(" \"{}/../", folder.display()))
}

/// All recipes of a folder, in an order that does not change.
fn files(folder: &Path) -> Held<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(files(&path)?),
            false => found.extend(path.extension().is_some_and(|ending| ending == "toml").then_some(path)),
        }
    }
    found.sort();
    Ok(found)
}

/// Whether no number of it makes a step expensive; seeds and what is counted in steps do not.
fn is_small(value: &Value, key: &str) -> bool {
    match value {
        Value::Table(table) => table.iter().all(|(key, value)| is_small(value, key)),
        Value::Array(items) => items.iter().all(|item| is_small(item, key)),
        Value::Integer(number) => *number <= LARGEST || ["seed", "interval", "log_freq", "d_ff"].contains(&key),
        _ => true,
    }
}

const VALUES: [&str; 26] = [
    "-1",
    "0",
    "1",
    "2",
    "3",
    "7",
    "1000003",
    "4294967296",
    "9223372036854775807",
    "-9223372036854775808",
    "18446744073709551616",
    "1e308",
    "-1e308",
    "1e-320",
    "nan",
    "inf",
    "-inf",
    "0.5",
    "1.5",
    "\"x\"",
    "''",
    "[]",
    "{}",
    "true",
    "1979-05-27",
    "[[1], \"a\"]",
];

/// Bytes that texts do not have, or seldom.
const ODD: [&[u8]; 8] =
    [b"\xff", b"\0", b"\x1b[31m", b"\xc3", b"\xef\xbb\xbf", b"\r", "\u{202e}".as_bytes(), "\u{7f}".as_bytes()];

fn change(random: &mut Random, base: &str) -> Changed {
    let mut lines: Vec<String> = base.lines().map(Into::into).collect();
    if random.one_in(4) {
        return misspelt(random, lines);
    }
    for _ in 0..1 + random.below(3) {
        line(random, &mut lines);
    }
    let mut text = lines.join("\n").into_bytes();
    if random.one_in(8) {
        let at = random.below(text.len() + 1);
        text.splice(at..at, random.pick(&ODD).iter().copied());
    } else if random.one_in(16) {
        text = mutate::bytes(random, &text);
    }
    Changed { text, unknown: None }
}

/// One key becomes one that exists nowhere.
fn misspelt(random: &mut Random, mut lines: Vec<String>) -> Changed {
    // Tables of free keys, and texts of several lines, have no unknown keys.
    let is_key = |line: &String| {
        let key = line.split('=').next().unwrap_or_default().trim();
        line.contains(" = ") && !line.starts_with(' ') && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    let free = lines.iter().any(|line| line.contains("template_variables") || line.contains("\"\"\""));
    let keys: Vec<usize> = (0..lines.len()).filter(|&at| is_key(&lines[at])).collect();
    let Some(&at) = keys.get(random.below(keys.len())).filter(|_| !free) else {
        return Changed { text: lines.join("\n").into_bytes(), unknown: None };
    };
    let (key, value) =
        lines[at].split_once(" = ").map(|(key, value)| (key.to_owned(), value.to_owned())).unwrap_or_default();
    let cut = random.below(key.len());
    let new = match random.below(4) {
        0 => format!("{key}zq"),
        1 => format!("zq_{key}"),
        2 => key.to_uppercase() + "Q",
        _ => format!("{}zq{}", &key[..cut], &key[cut..]),
    };
    lines[at] = format!("{new} = {value}");
    Changed { text: lines.join("\n").into_bytes(), unknown: Some(at + 1) }
}

/// One change of lines.
fn line(random: &mut Random, lines: &mut Vec<String>) {
    if lines.is_empty() {
        return lines.push("x = 1".into());
    }
    let (at, other) = (random.below(lines.len()), random.below(lines.len()));
    let key = lines[at].split(" =").next().unwrap_or_default().to_owned();
    let headers: Vec<usize> = (0..lines.len()).filter(|&at| lines[at].starts_with('[')).collect();
    let header = headers.get(random.below(headers.len())).copied();
    match (random.below(16), header) {
        (0, _) => drop(lines.remove(at)),
        (1, _) => lines[at] = lines[at].chars().rev().collect(),
        (2..=5, _) => lines[at] = format!("{key} = {}", random.pick(&VALUES)),
        (6, _) => lines.swap(at, other),
        (7, _) => lines.insert(at, lines[other].clone()),
        (8, _) => lines[at] = lines[at].replacen(['0', '1', '2', '4'], &random.below(10).to_string(), 1),
        (9, _) => lines[at] = lines[at].replacen(['a', 'e', 's'], "q", 1),
        (10, Some(header)) => drop(lines.remove(header)),
        (11, Some(header)) => lines.push(lines[header].clone()),
        (12, Some(header)) => lines[header] = lines[header].replace('[', "[[").replace(']', "]]"),
        (13, _) => lines.insert(
            0,
            random
                .pick(&[
                    "extends = \"mutated.toml\"",
                    "extends = \".\"",
                    "extends = \"/dev/null\"",
                    "extends = 3",
                    "extends = \"\"",
                    "extends = \"a\\u0000b\"",
                ])
                .to_string(),
        ),
        (14, _) => {
            let (n, text) = (10usize.pow(1 + random.below(5) as u32), &key);
            let long = match random.below(6) {
                0 => format!("{text} = {}1{}", "[".repeat(n), "]".repeat(n)),
                1 => format!("{text} = {}1{}", "{a = ".repeat(n), "}".repeat(n)),
                2 => format!("{} = 1", vec!["a"; n].join(".")),
                3 => format!("[{}]", vec!["a"; n].join(".")),
                4 => format!("{text} = \"{}\"", "x".repeat(n)),
                _ => format!("{text} = {}", "9".repeat(n)),
            };
            lines.insert(at, long);
        }
        _ => {
            let number = random.pick(&mutate::NUMBERS).to_string();
            lines[at] = format!("{key} = {number}");
        }
    }
}

/// A change on the command line.
fn override_text(random: &mut Random, base: &str) -> String {
    let keys: Vec<&str> = base.lines().filter_map(|line| line.split_once(" = ")).map(|(key, _)| key).collect();
    let key = (*random.pick(&[
        "training.steps",
        "model.decoder.d_model",
        "data",
        "debug",
        "a.b.c",
        "",
        "..",
        "extends",
        "stage",
    ]))
    .to_owned();
    let key =
        if random.one_in(4) { keys.get(random.below(keys.len())).map_or(key, |key| key.to_string()) } else { key };
    let n = 10usize.pow(1 + random.below(4) as u32);
    match random.below(8) {
        0 => format!("{key}={}", "[".repeat(n)),
        1 => format!("{key}={}1{}", "[".repeat(n), "]".repeat(n)),
        2 => format!("{}=1", vec!["a"; n].join(".")),
        3 => format!("{key}={}{}", "{a = ".repeat(n), "}".repeat(n)),
        4 => key,
        5 => format!("{key}={}", "x".repeat(n)),
        _ => format!("{key}={}", random.pick(&VALUES)),
    }
}

/// Holds if every value of `typed` stands in `meant`; a whole number may have become a fraction.
fn says(meant: &Value, typed: &Value, place: &str) -> Held {
    match (meant, typed) {
        (Value::Table(meant), Value::Table(typed)) => typed.iter().try_for_each(|(key, value)| {
            let place = format!("{place}.{key}");
            match meant.get(key) {
                Some(meant) => says(meant, value, &place),
                // What it extends is in what is printed.
                None if place == ".extends" => Ok(()),
                None => Err(crate::case::Broken(format!("the key {place} was ignored"))),
            }
        }),
        (Value::Array(meant), Value::Array(typed)) if meant.len() == typed.len() => {
            meant.iter().zip(typed).try_for_each(|(meant, typed)| says(meant, typed, place))
        }
        (Value::Float(meant), Value::Integer(typed)) => {
            ensure!(*meant == *typed as f64, "{place}: {typed} became {meant}");
            Ok(())
        }
        (Value::Float(meant), Value::Float(typed)) if meant.is_nan() && typed.is_nan() => Ok(()),
        _ => {
            ensure!(meant == typed, "{place}: {typed} became {meant}");
            Ok(())
        }
    }
}
