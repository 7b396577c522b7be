//! `polyhead reference` and `polyhead schema`: the pages of the documentation that are made from the types and the command line.

use std::path::Path;

use clap::CommandFactory;
use polyhead_experiments::{comparison, record, suite_runs, suites};
use polyhead_recipe::{reference, schema, stages};
use polyhead_runs::{Failure, result};
use polyhead_training::run_folder::atomic_write;
use serde_json::{Value, json};

use crate::cli::{Cli, SchemaKind};
use crate::console::put;

/// Columns of the help on the page of the command line.
const HELP_WIDTH: usize = 88;

/// Where the project keeps the generated pages.
const REFERENCE: &str = "docs/src/reference";

const RECIPE: &str = "\
Every key that a recipe may have, by its full name: as it is written on the command line (`key=value`), and as the path of
tables in the file. A key without a default has to be given. A misspelt key is an error that names the nearest valid one.
[Recipes](../concepts/recipes.md) says how they are put together.";

const COMPARISON: &str = "\
Every key of a comparison besides `extends`, which names the base recipe. [Comparisons](../concepts/comparisons.md) says what
they are for, with examples.";

const OBSERVATIONS: &str = "\
With `metrics.observe = true` every attention layer logs these numbers as `attention/layer_NN/<name>`, as means over its heads,
with histograms per head. [Metrics](metrics.md) explains the rest of the log.";

const COMMAND_LINE: &str = "\
The help of every command, as `--help` prints it. Standard output is data, standard error is talk; [exit codes](exit-codes.md)
tell scripts what happened.";

const SUITES_PAGE: &str = "\
Every [suite](../suites/index.md), where it differs from what was published, and what softmax attention reached. References are stored
in `recipes/results/suites` by `polyhead suite NAME --record`; `polyhead suite --check` runs a point of each again.";

const REPLICATIONS: &str = "\
What papers claim, and what our arms measured at equal budgets. Every number comes from a recorded file in `recipes/results`,
written by `polyhead compare recipes/compare/NAME.toml --record`; a person writes the verdicts. All of it ran on a CPU with 2
cores, with models of 6 thousand to 0.8 million parameters: a verdict is about that size. Means and standard deviations are over
seeds; intervals are 95 % of paired differences.";

/// The keys of recipes, as Markdown.
pub fn recipe_keys() -> String {
    let stages = "\nThe following keys are those of a [run in stages](../concepts/recipes.md#runs-in-stages).\n";
    format!("{}{stages}{}", reference::keys(schema::recipe()), reference::keys(&stages::schema()))
}

/// The JSON Schema of a kind of file.
///
/// # Errors
/// If it has no JSON form, which would be our mistake.
pub fn schema(kind: SchemaKind) -> Result<String, Failure> {
    let mut recipe = schema::recipe().clone();
    let schema = match kind {
        SchemaKind::Recipe => {
            let mut stages = stages::schema();
            move_entries(&mut stages, &mut recipe, "$defs");
            move_entries(&mut stages, &mut recipe, "properties");
            changes_of_recipes(&mut recipe, "#");
            reference::for_editors(recipe, "A recipe of Polyhead")
        }
        SchemaKind::Comparison => {
            let mut comparison = comparison::schema();
            move_entries(&mut recipe, &mut comparison, "$defs");
            changes_of_recipes(&mut comparison, "#/$defs/Recipe");
            comparison["$defs"]["Recipe"] = recipe;
            reference::for_editors(comparison, "A comparison of Polyhead")
        }
        SchemaKind::Suite => titled(suite_runs::result::schema(), "What a suite of Polyhead reached"),
        SchemaKind::Result => titled(result::schema(), "What a run of Polyhead reached"),
        SchemaKind::Record => titled(record::schema(), "What a comparison of Polyhead measured"),
    };
    let text = serde_json::to_string_pretty(&schema).map_err(|error| Failure::Run(error.to_string()))?;
    Ok(text + "\n")
}

/// Of a file that is written by us, in which nothing may be missing.
fn titled(mut schema: Value, title: &str) -> Value {
    schema["title"] = json!(title);
    schema
}

fn move_entries(from: &mut Value, to: &mut Value, key: &str) {
    if let (Some(Value::Object(from)), Some(to)) = (from.get_mut(key), to[key].as_object_mut()) {
        to.append(from);
    }
}

/// The tables named `recipe`, which change keys of a recipe, get its schema.
fn changes_of_recipes(schema: &mut Value, reference: &str) {
    match schema {
        Value::Object(map) => {
            if let Some(changes) = map.get_mut("properties").and_then(|properties| properties.get_mut("recipe")) {
                *changes = json!({"description": changes["description"], "$ref": reference});
            }
            map.values_mut().for_each(|value| changes_of_recipes(value, reference));
        }
        Value::Array(list) => list.iter_mut().for_each(|value| changes_of_recipes(value, reference)),
        _ => {}
    }
}

/// The help of every command, as Markdown.
fn command_line() -> String {
    let mut out = String::new();
    let mut root = Cli::command().term_width(HELP_WIDTH);
    root.build();
    help(&mut root, &mut out);
    out
}

fn help(command: &mut clap::Command, out: &mut String) {
    let name = command.get_bin_name().unwrap_or("polyhead").to_owned();
    out.push_str(&format!("\n## {name}\n\n```text\n{}\n```\n", command.render_long_help().to_string().trim_end()));
    for inner in command.get_subcommands_mut().filter(|inner| inner.get_name() != "help") {
        help(inner, out);
    }
}

/// Suites with their stored references, as Markdown.
fn suites_page() -> Result<String, Failure> {
    let stored = suite_runs::result::references()?;
    let mut out = String::new();
    for suite in &suites::SUITES {
        out.push_str(&format!("\n## {}\n\n{}. {}.\n", suite.name, capital(suite.about), suite.paper));
        if !suite.differs.is_empty() {
            let lines: Vec<String> = suite.differs.iter().map(|words| format!("- {words}")).collect();
            out.push_str(&format!("\nDiffers from what was published:\n\n{}\n", lines.join("\n")));
        }
        if let Some((_, result)) = stored.iter().find(|(_, result)| result.suite == suite.name) {
            out.push_str(&format!("\nSoftmax attention, seed {}:\n\n{}", result.seed, result.table()));
        }
    }
    Ok(out)
}

fn capital(words: &str) -> String {
    let mut signs = words.chars();
    signs.next().into_iter().flat_map(char::to_uppercase).chain(signs).collect()
}

/// Writes every generated file of the documentation.
///
/// # Errors
/// If a file cannot be written, or a record cannot be read.
pub fn write(folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder).map_err(|error| Failure::file("create", folder, error))?;
    let page = |title: &str, about: &str, body: String| {
        format!(
            "# {title}\n\n<!-- Made by `polyhead reference --out {REFERENCE}`: change the types, not this page. -->\n\n{about}\n{body}"
        )
    };
    let pages = [
        ("recipe.md", page("Recipe keys", RECIPE, recipe_keys())),
        ("comparison.md", page("Comparison keys", COMPARISON, reference::keys(&comparison::schema()))),
        ("observations.md", page("What attention layers log", OBSERVATIONS, reference::observations())),
        ("command-line.md", page("Command line", COMMAND_LINE, command_line())),
        ("suites.md", page("Suites and their references", SUITES_PAGE, suites_page()?)),
        ("replications.md", page("Replications", REPLICATIONS, record::replications()?)),
        ("recipe.schema.json", schema(SchemaKind::Recipe)?),
        ("comparison.schema.json", schema(SchemaKind::Comparison)?),
        ("suite.schema.json", schema(SchemaKind::Suite)?),
        ("result.schema.json", schema(SchemaKind::Result)?),
        ("record.schema.json", schema(SchemaKind::Record)?),
    ];
    for (name, text) in pages {
        let path = folder.join(name);
        atomic_write(&path, text.as_bytes())?;
        put!("{}", path.display())?;
    }
    Ok(())
}
