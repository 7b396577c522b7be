//! The invariants of the house that a program can check.

use crate::world::project;

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
    let order = ["kernels", "attention", "models", "data", "training", "polyhead"];
    for (height, krate) in order.iter().enumerate() {
        for name in manifest(krate)["dependencies"].as_table().unwrap().keys() {
            if let Some(other) = name.strip_prefix("polyhead-") {
                let below = order.iter().position(|known| *known == other).unwrap() < height;
                assert!(below && (*krate, other) != ("training", "data"), "{krate} depends on {other}");
            }
        }
    }
}

#[test]
fn libraries_neither_print_nor_name_devices_nor_read_toml() {
    for krate in ["kernels", "attention", "models", "data", "training"] {
        for (path, text) in sources(krate) {
            let code = text.split("#[cfg(test)]").next().unwrap();
            for forbidden in ["println!", "process::exit", "Device::default", "Device::cuda", "toml::"] {
                let tests = ["tests.rs", "laws.rs", "backends.rs"].iter().any(|name| path.ends_with(name));
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
    for krate in ["kernels", "attention", "models", "training", "polyhead"] {
        for (path, text) in sources(krate) {
            for forbidden in ["Tensor::random", ".random_like(", "device.seed(", ".device().seed("] {
                assert!(!text.contains(forbidden), "{path} draws with Burn's generator ({forbidden})");
            }
        }
    }
}
