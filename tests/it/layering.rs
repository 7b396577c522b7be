//! The invariants of the architecture that a program can check.

use crate::world::project;

/// From the lowest floor to the highest.
const CRATES: [&str; 10] =
    ["kernels", "attention", "models", "data", "evaluation", "training", "recipe", "runs", "experiments", "polyhead"];

fn manifest(krate: &str) -> toml::Table {
    std::fs::read_to_string(project().join("crates").join(krate).join("Cargo.toml")).unwrap().parse().unwrap()
}

fn sources(krate: &str) -> Vec<(String, String)> {
    let mut folders = vec![project().join("crates").join(krate).join("src")];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push((path.display().to_string(), std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found
}

#[test]
fn kernels_and_attention_depend_on_burn_and_arithmetic_only() {
    for (krate, allowed) in [
        ("kernels", vec!["burn", "burn-flex", "gemm", "rand_chacha", "rayon", "serde"]),
        ("attention", vec!["burn", "serde", "polyhead-kernels"]),
    ] {
        for (name, dependency) in manifest(krate)["dependencies"].as_table().unwrap() {
            let optional = dependency.get("optional").and_then(toml::Value::as_bool) == Some(true);
            assert!(optional || allowed.contains(&name.as_str()), "{krate} depends on {name}");
        }
    }
}

#[test]
fn arrows_point_down() {
    for (height, krate) in CRATES.iter().enumerate() {
        for name in manifest(krate)["dependencies"].as_table().unwrap().keys() {
            if let Some(other) = name.strip_prefix("polyhead-") {
                let below = CRATES.iter().position(|known| *known == other).unwrap() < height;
                assert!(
                    below && !matches!((*krate, other), ("training" | "evaluation", "data")),
                    "{krate} depends on {other}"
                );
            }
        }
    }
}

#[test]
fn libraries_neither_print_nor_name_devices_nor_read_toml() {
    for krate in CRATES.into_iter().filter(|krate| *krate != "polyhead") {
        let reads_toml = ["recipe", "runs", "experiments"].contains(&krate);
        for (path, text) in sources(krate) {
            let code = text.split("#[cfg(test)]").next().unwrap();
            for forbidden in ["println!", "eprint", "process::exit", "Device::default", "Device::cuda", "toml::"] {
                let tests = ["tests.rs", "laws.rs", "backends.rs", "runs/src/device.rs"]
                    .iter()
                    .any(|name| path.ends_with(name))
                    || (forbidden == "toml::" && reads_toml);
                assert!(tests || !code.contains(forbidden), "{path} contains {forbidden}");
            }
        }
    }
}

#[test]
fn nothing_panics_where_nobody_reads() {
    for (path, text) in sources("polyhead") {
        for forbidden in [" println!", "eprint", " print!"] {
            assert!(!text.contains(forbidden), "{path} contains {forbidden}: use talk!, put! or console::print");
        }
    }
}

#[test]
fn numbers_are_drawn_in_one_place() {
    for krate in CRATES.into_iter().filter(|krate| *krate != "data") {
        for (path, text) in sources(krate) {
            for forbidden in ["Tensor::random", ".random_like(", "device.seed(", ".device().seed("] {
                assert!(!text.contains(forbidden), "{path} draws with Burn's generator ({forbidden})");
            }
        }
    }
}

/// The text of a source file without its comments and its tests.
fn code_of(text: &str) -> String {
    let code = text.split("#[cfg(test)]").next().unwrap();
    code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// Whether `text` has `name` as a word of its own: `data.json` is not in `data.jsonl`.
fn names(text: &str, name: &str) -> bool {
    // `x().lock` is a method.
    let part = |c: char| c.is_alphanumeric() || "_)".contains(c);
    text.match_indices(name).any(|(at, _)| !text[..at].ends_with(part) && !text[at + name.len()..].starts_with(part))
}

/// The names of files that a source file owns: the values of its constants.
fn owned(file: &str) -> Vec<String> {
    let text = std::fs::read_to_string(project().join(file)).unwrap();
    let value = |line: &str| Some(line.split_once(": &str = \"")?.1.trim_end_matches("\";").to_owned());
    text.lines().filter_map(value).collect()
}

#[test]
fn files_are_named_by_their_owners() {
    let of_runs = owned("crates/training/src/run_folder/files.rs");
    let of_hugging_face = owned("crates/models/src/hf/files.rs");
    assert!(of_runs.len() > 10 && of_hugging_face.len() > 5, "{of_runs:?} {of_hugging_face:?}");
    // The tokenizer is what writes and reads the files of tokenizers, and what explains formats names them.
    for krate in CRATES.into_iter().filter(|krate| *krate != "data") {
        for (path, text) in sources(krate) {
            let test = ["tests.rs", "/files.rs"].iter().any(|ending| path.ends_with(ending));
            for name in of_runs.iter().chain(&of_hugging_face).filter(|_| !test) {
                let its_own = of_hugging_face.contains(name) && path.contains("models/src/hf/");
                assert!(
                    its_own || !names(&code_of(&text), name),
                    "{path} spells {name}: use the constant of its owner"
                );
            }
        }
    }
}

/// The file of a crate that a path in its code leads to: the one of the longest known beginning.
fn file_of(files: &[String], module: &[&str]) -> Option<String> {
    (1..=module.len()).rev().find_map(|length| {
        let name = module[..length].join("/");
        files.iter().find(|file| **file == name).cloned()
    })
}

/// Which file of a crate uses which others by `crate::` or `super::`, files named by their paths without `.rs` and `/mod`; tests are left
/// out, in files of their own too.
fn uses(krate: &str) -> Vec<(String, String)> {
    let root = project().join("crates").join(krate).join("src").display().to_string() + "/";
    let name = |path: &str| path.trim_start_matches(&root).trim_end_matches(".rs").trim_end_matches("/mod").to_owned();
    let mut sources = sources(krate);
    sources.retain(|(path, _)| !path.ends_with("/tests.rs"));
    let files: Vec<String> = sources.iter().map(|(path, _)| name(path)).collect();
    let mut found = Vec::new();
    for (path, text) in &sources {
        let (from, code) = (name(path), text.split("#[cfg(test)]").next().unwrap());
        let here: Vec<&str> = if from == "lib" || from == "main" { Vec::new() } else { from.split('/').collect() };
        for statement in code.split(';').filter_map(|part| part.split_once("use ").map(|(_, rest)| rest.trim())) {
            let base: Vec<&str> = match statement.split("::").next() {
                Some("crate") => Vec::new(),
                Some("super") => here[..here.len().saturating_sub(1)].to_vec(),
                _ => continue,
            };
            let rest = statement.split_once("::").map_or("", |(_, rest)| rest);
            // Of `a::{b, c}` both are looked up; of `a::b` the whole.
            let (stem, leaves) = rest.split_once('{').unwrap_or((rest, ""));
            let leaves =
                leaves.trim_end_matches('}').split(',').map(|leaf| leaf.trim().split("::").next().unwrap_or(""));
            for leaf in std::iter::once("").chain(leaves) {
                let parts = stem.split("::").chain([leaf]).map(str::trim).filter(|part| !part.is_empty());
                let module: Vec<&str> = base.iter().copied().chain(parts).collect();
                if let Some(to) = file_of(&files, &module).filter(|to| *to != from) {
                    found.push((from.clone(), to));
                }
            }
        }
    }
    found.sort();
    found.dedup();
    found
}

/// Files that use each other in a circle; a file and its own parts, in the folder of its name, count as one.
#[test]
fn no_files_use_each_other_in_a_circle() {
    for krate in CRATES {
        let whole = |file: &str| file.split('/').next().unwrap().to_owned();
        let mut edges: Vec<(String, String)> = uses(krate)
            .into_iter()
            .map(|(from, to)| match krate {
                // Its folders are topics, not parts of a file.
                "polyhead" if !whole(&from).is_empty() => (from, to),
                _ => (whole(&from), whole(&to)),
            })
            .filter(|(from, to)| {
                from != to && !from.starts_with(&format!("{to}/")) && !to.starts_with(&format!("{from}/"))
            })
            .collect();
        // What uses nothing, or is used by nothing, is in no circle.
        loop {
            let before = edges.len();
            let all = edges.clone();
            edges.retain(|(from, to)| all.iter().any(|(a, _)| a == to) && all.iter().any(|(_, b)| b == from));
            if edges.len() == before {
                break;
            }
        }
        assert!(edges.is_empty(), "{krate}: files use each other in a circle: {edges:?}");
    }
}
