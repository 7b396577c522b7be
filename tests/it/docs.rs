//! The documentation: generated pages are what the types say, links lead somewhere, recipes in it are valid, metrics are explained.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::world::{SMALL, World, project};

#[path = "../../benches/section.rs"]
mod section;

/// What `polyhead reference --out` writes is what is in the repository.
#[test]
fn generated_pages_are_up_to_date() {
    let world = World::new(SMALL);
    let files = world.succeeds(&["reference", "--out", "pages"]).0;
    for file in files.lines().map(Path::new) {
        let name = file.file_name().unwrap();
        let kept = std::fs::read_to_string(project().join("docs/src/reference").join(name)).unwrap_or_default();
        let made = String::from_utf8(world.read(file.to_str().unwrap())).unwrap();
        let line = made.lines().zip(kept.lines()).position(|(made, kept)| made != kept);
        assert!(made == kept, "{name:?}, line {line:?}: run `polyhead reference --out docs/src/reference`");
        assert!(!made.contains("not judged yet"), "a verdict is missing in recipes/results");
    }
    assert!(files.lines().count() >= 7, "{files}");
}

/// Measuring again must not erase what was measured by hand, or by other benchmarks.
#[test]
fn a_benchmark_rewrites_its_own_tables_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("RESULTS.md");
    let kept = std::fs::read_to_string(project().join("benches/RESULTS.md")).unwrap();
    std::fs::write(&file, &kept).unwrap();
    section::replace(&file, "side_by_side", "anew\n\n").unwrap();
    let (begin, end) = ("<!-- side_by_side -->\n", "<!-- end of side_by_side -->\n");
    let (head, tail) = (kept.split_once(begin).unwrap().0, kept.split_once(end).unwrap().1);
    assert!(tail.contains("## Two ranks beside two threads"));
    let once = format!("{head}{begin}anew\n{end}{tail}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), once);

    section::replace(&file, "other", "first").unwrap();
    section::replace(&file, "other", "second").unwrap();
    let other = "\n\n<!-- other -->\nsecond\n<!-- end of other -->\n";
    assert_eq!(std::fs::read_to_string(&file).unwrap(), format!("{}{other}", once.trim_end()));

    std::fs::write(&file, end).unwrap();
    let told = section::replace(&file, "side_by_side", "anew").unwrap_err().to_string();
    assert!(
        told.contains("RESULTS.md: <!-- side_by_side --> and <!-- end of side_by_side --> must come as a pair"),
        "{told}"
    );
    assert_eq!(std::fs::read_to_string(&file).unwrap(), end);
}

/// All Markdown files of the project.
fn markdown() -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![project().canonicalize().unwrap()]);
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && !path.is_symlink() && !["target", ".git", "shared"].contains(&name) {
                // Runs in checkpoints are no part of the project.
                if folder_of_runs(&path) { found.push(path.join("README.md")) } else { folders.push(path) }
            } else if name.ends_with(".md") {
                found.push(path);
            }
        }
    }
    assert!(found.len() > 50);
    found
}

fn folder_of_runs(path: &Path) -> bool {
    path.ends_with("checkpoints") && path.join("README.md").exists()
}

/// The text without code blocks and comments.
fn prose(text: &str) -> String {
    let mut code = false;
    let lines = text.lines().filter(|line| {
        let fence = line.trim_start().starts_with("```");
        code ^= fence;
        !code && !fence
    });
    lines.map(|line| format!("{line}\n")).collect()
}

/// The name of a heading in links, as mdBook and GitHub make it.
fn anchor(heading: &str) -> String {
    let plain = heading.trim().to_lowercase().replace(' ', "-");
    plain.chars().filter(|sign| sign.is_alphanumeric() || "_-".contains(*sign)).collect()
}

fn anchors(text: &str) -> BTreeSet<String> {
    let headings = prose(text);
    headings.lines().filter(|line| line.starts_with('#')).map(|line| anchor(line.trim_start_matches('#'))).collect()
}

/// The targets of links and pictures, without code in backticks.
fn links(text: &str) -> Vec<String> {
    let text = prose(text);
    let plain: String = text.split('`').step_by(2).collect();
    let rest = plain.split("](").skip(1);
    rest.filter_map(|rest| Some(rest.split_once(')')?.0.split(' ').next()?.to_owned())).collect()
}

#[test]
fn links_lead_somewhere() {
    let book = project().join("docs/src").canonicalize().unwrap();
    let mut broken = Vec::new();
    for page in markdown() {
        let text = std::fs::read_to_string(&page).unwrap();
        for link in links(&text).into_iter().filter(|link| !link.contains("://") && !link.starts_with("mailto:")) {
            let (path, heading) = link.split_once('#').unwrap_or((&link, ""));
            let target = if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            let is_there = target.canonicalize().is_ok_and(|target| {
                // The site has only what is in the book.
                let inside = !page.starts_with(&book) || target.starts_with(&book);
                let text = std::fs::read_to_string(&target).unwrap_or_default();
                inside && (heading.is_empty() || anchors(&text).contains(heading))
            });
            if !is_there {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
    assert_eq!(links("a [b](c.md#d) `[x](y)`\n```text\n[e](f)\n```\n"), ["c.md#d"]);
    assert_eq!(anchor(" Runs in `stages`, a.b_c"), "runs-in-stages-ab_c");
}

/// Every page is in the table of contents, and every mechanism and procedure has a page.
#[test]
fn every_page_is_listed_and_every_method_has_one() {
    let book = project().join("docs/src").canonicalize().unwrap();
    let summary = std::fs::read_to_string(book.join("SUMMARY.md")).unwrap();
    let listed: BTreeSet<PathBuf> = links(&summary).iter().map(|link| book.join(link)).collect();
    for page in markdown().into_iter().filter(|page| page.starts_with(&book) && !page.ends_with("SUMMARY.md")) {
        assert!(listed.contains(&page), "{} is not in SUMMARY.md", page.display());
    }
    let keys = World::new(SMALL).succeeds(&["reference"]).0;
    for (prefix, folder) in [("model.decoder.attention.", "mechanisms"), ("procedure.", "procedures")] {
        let mut names: BTreeSet<&str> = BTreeSet::new();
        names.extend(
            keys.lines().filter_map(|line| line.strip_prefix(&format!("| `{prefix}"))?.split(['.', '`']).next()),
        );
        assert!(names.len() >= 4);
        for name in names {
            assert!(book.join(folder).join(format!("{name}.md")).exists(), "docs/src/{folder} has no page {name}.md");
        }
    }
}

/// Pages that errors and help name are there: `(docs: TITLE)`.
#[test]
fn pages_that_errors_name_are_there() {
    let summary = std::fs::read_to_string(project().join("docs/src/SUMMARY.md")).unwrap();
    let (mut named, mut folders) = (BTreeSet::new(), vec![project().join("crates")]);
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                for rest in text.split("(docs: ").skip(1).filter(|rest| rest.starts_with(char::is_uppercase)) {
                    named.extend(rest.split(')').next().unwrap().split(", ").map(str::to_owned));
                }
            }
        }
    }
    assert!(named.contains("GPUs") && named.len() >= 8, "{named:?}");
    for title in named {
        assert!(
            summary.contains(&format!("[{title}](")),
            "an error names the page {title:?}, which is not in SUMMARY.md"
        );
    }
}

/// What each method is, its equations, a picture, its recipe keys, what it costs, where paper and code differ, what we found, and a command.
#[test]
fn pages_of_methods_have_all_parts() {
    let mut count = 0;
    for folder in ["mechanisms", "procedures"] {
        for entry in std::fs::read_dir(project().join("docs/src").join(folder)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap();
            if name == "index" {
                continue;
            }
            let page = std::fs::read_to_string(&path).unwrap();
            let picture = format!("](../images/methods/{name}.svg)");
            let parts = [
                "```text",
                &picture,
                "```toml",
                "](../reference/",
                "**Cost.**",
                "**Paper and code.**",
                "**Replication.**",
                "```sh",
            ];
            let missing: Vec<&str> = parts.into_iter().filter(|part| !page.contains(part)).collect();
            assert!(missing.is_empty(), "{}: no {missing:?}", path.display());
            let drawn = std::fs::read_to_string(project().join(format!("docs/src/images/methods/{name}.svg"))).unwrap();
            let about = page.split(&picture).next().unwrap().rsplit("![").next().unwrap();
            assert!(
                !about.is_empty() && drawn.contains("role=\"img\" aria-label="),
                "{name}: a picture says what it shows"
            );
            count += 1;
        }
    }
    assert!(count >= 25, "{count}");
}

/// Every recipe and every comparison that a page shows is valid: a whole one, or changes of the quickstart.
#[test]
fn recipes_in_the_documentation_are_valid() {
    let world = World::new(SMALL);
    std::os::unix::fs::symlink(project().join("recipes").canonicalize().unwrap(), world.dir.path().join("recipes"))
        .unwrap();
    let mut count = 0;
    for page in markdown().into_iter().filter(|page| page.to_str().unwrap().contains("/docs/src/")) {
        let text = std::fs::read_to_string(&page).unwrap();
        for block in text.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()) {
            let whole = ["extends", "[model.decoder]\n", "[model.classifier", "[model.super_resolution"]
                .iter()
                .any(|start| block.starts_with(start));
            let whole = whole || block.starts_with("title");
            let recipe =
                if whole { block.to_owned() } else { format!("extends = \"recipes/quickstart.toml\"\n{block}") };
            std::fs::write(world.dir.path().join("shown.toml"), &recipe).unwrap();
            let output = world.run(&["validate", "shown.toml"]);
            let err = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{}:\n{recipe}\n{err}", page.display());
            count += 1;
        }
    }
    assert!(count > 15, "{count}");
}

/// Everything that a run logs is explained.
#[test]
fn what_runs_log_is_explained() {
    let read = |name: &str| std::fs::read_to_string(project().join("docs/src/reference").join(name)).unwrap();
    let metrics = read("metrics.md");
    let first = metrics.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    let mut names = BTreeSet::new();
    for name in first.filter(|name| *name != "metrics.jsonl`") {
        assert!(names.insert(name), "metrics.md explains {name} twice");
    }
    let explained = metrics.clone() + &read("observations.md");
    let world = World::new(SMALL);
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    let facts = project().join("recipes/hallucination/facts_neuron_dropout.toml");
    let short = [
        "training.steps=4",
        "training.batch_size=2",
        "validation.batches=1",
        "model.decoder.d_model=16",
        "model.decoder.d_ff=32",
        "data.facts.n_entities=4",
        "procedure.neuron_dropout.interval=1",
        "lr_scheduler.warmup_steps=1",
        "metrics.log_freq=1",
    ];
    world.succeeds(&[&["train", facts.to_str().unwrap(), "--out", "facts"][..], &short].concat());
    for run in ["run", "facts"] {
        let lines = String::from_utf8(world.read(&format!("{run}/metrics.jsonl"))).unwrap();
        let lines = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let logged = lines.flat_map(|line| line.as_object().unwrap().keys().cloned().collect::<Vec<_>>());
        let tags: Vec<String> = world.events(run).into_iter().map(|event| event.tag).collect();
        assert!(tags.iter().any(|tag| tag.starts_with("_hparams_/")), "no row in HPARAMS: {tags:?}");
        let shown: Vec<String> =
            tags.into_iter().filter(|tag| !tag.is_empty() && !tag.starts_with("_hparams_/")).collect();
        // TensorBoard sorts groups by their names: losses come first, and a page of groups is none.
        let groups: BTreeSet<&str> = shown.iter().filter_map(|tag| Some(tag.split_once('/')?.0)).collect();
        assert!(groups.first() == Some(&"loss") && groups.len() <= 7, "{groups:?}");
        for name in logged.chain(shown.clone()) {
            let group = ["model/", "procedure/", "validation/"].iter().find_map(|group| name.strip_prefix(group));
            let name = group.unwrap_or(&name);
            let of_layer = name.strip_prefix("attention/layer_").and_then(|rest| rest.split_once('/'));
            let known = of_layer.map_or(name, |(_, own)| own);
            let known = if name.starts_with("weights/") { "weights/" } else { known.trim_end_matches("_per_head") };
            let is_known = ["`", "/"].iter().any(|before| explained.contains(&format!("{before}{known}")));
            assert!(is_known, "{name} is not in docs/src/reference/metrics.md");
        }
    }
}
