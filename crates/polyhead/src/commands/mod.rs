//! The commands. Standard output is data, standard error is talk.

pub mod compare;
pub mod convert;
mod diff;
mod doctor;
pub mod embed;
mod eval;
pub mod features;
mod generate;
pub mod grow;
mod hallucination;
mod long_context;
mod ls;
mod new;
mod new_folder;
mod plan;
mod preview;
mod recipes;
mod reference;
pub mod score_context;
mod stages;
pub mod suite;
mod template_pairs;
mod tokenizer;
mod train;
mod trained;
pub mod tune;
pub mod upscale;

use std::path::Path;

use crate::allowed::allowed;
use crate::cli::{Command, RecipeArgs, TokenizerCommand};
use crate::console::{bytes, print, put, wants_json};
use crate::inspect;
use polyhead_experiments::{comparison, record};
use polyhead_recipe::Problems;
use polyhead_recipe::stages::Staged;
use polyhead_recipe::{self as recipe, Loaded, has_own_memory};
use polyhead_runs::Failure;
use polyhead_runs::device::memory_bytes;
use serde_json::json;

/// Does what was asked.
///
/// # Errors
/// If it cannot be done; see [`Failure`].
pub fn run(command: Command) -> Result<(), Failure> {
    if wants_json() && !has_json(&command) {
        return Err(
            Problems::plain("--json: this command prints no data that could be JSON: leave it out".into()).into()
        );
    }
    match command {
        Command::Train(args) => train::train(args),
        Command::New { folder } => new::new(&folder),
        Command::Ls { folder } => ls::ls(folder.as_deref()),
        Command::Cp { recipe, to } => recipes::cp(&recipe, &to),
        Command::Cat(args) => match staged(&args)? {
            Some(staged) => stages::cat(&args.recipe, &staged),
            None => recipes::cat(&load(&args)?),
        },
        Command::Validate(args) => {
            match (comparison::is_one(&args.recipe), staged(&args)?) {
                (true, _) if args.overrides.is_empty() => compare::validate(&args.recipe)?,
                (_, Some(staged)) => stages::validate(&args.recipe, &staged)?,
                _ => drop(load(&args)?),
            }
            match wants_json() {
                true => put!("{}", json!({ "file": args.recipe, "valid": true })),
                false => put!("{}: valid", args.recipe.display()),
            }
        }
        Command::Plan { mut recipe, no_probe, device } => {
            recipe.on(device.as_deref());
            match staged(&recipe)? {
                Some(staged) => stages::plan(&recipe.recipe, &staged, !no_probe),
                None => plan::plan(&load(&recipe)?, !no_probe),
            }
        }
        Command::Preview { recipe, rows, table, out } => {
            preview::preview(&load(&recipe)?, preview::PreviewOptions { rows: rows as usize, table, out })
        }
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Heads(command) => crate::heads::run(command),
        Command::Diff { runs } => diff::diff([&runs[0], &runs[1]]),
        Command::Compare(args) => compare::compare(&args),
        Command::Suite(args) => suite::suite(&args),
        Command::Results if wants_json() => put!("{:#}", json!(record::read_all()?)),
        Command::Results => print(format_args!("{}", record::replications()?)),
        Command::Eval(args) => match args.task.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ref tasks if args.file.is_some() && *tasks != ["template_pairs"] => {
                Err(Problems::plain("a file beside the model is for --task template_pairs: leave it out".into()).into())
            }
            [] if !args.text_file.is_empty() => eval::texts(&args),
            [] => eval::eval(&args),
            ["eigenscore"] => hallucination::eigenscore(&args),
            ["facts"] => hallucination::facts(&args),
            ["template_pairs"] => template_pairs::eval(&args),
            ref tasks if ["eigenscore", "facts", "template_pairs"].iter().any(|task| tasks.contains(task)) => {
                Err(Problems::plain("--task: eigenscore, facts and template_pairs are asked for alone".into()).into())
            }
            _ => long_context::eval(&args),
        },
        Command::Generate(args) => generate::generate(&args),
        Command::Chat(args) => generate::chat(&args),
        Command::Serve(args) => crate::serve::serve(&args),
        Command::Export { checkpoint, out, expanded, without_mask, native, adapter, device } => {
            let how = trained::Export { expanded, without_mask, native, adapter };
            trained::export((&checkpoint, device.as_deref()), &out, how)
        }
        Command::Convert(args) => convert::convert(&args),
        Command::Grow(args) => grow::grow(&args),
        Command::Features(args) => features::features(&args),
        Command::Embed(args) => embed::embed(&args),
        Command::Upscale(args) => upscale::upscale(&args),
        Command::Logits { checkpoint, tokens, text, out, intervention, device } => {
            let model = (checkpoint.as_path(), device.as_deref(), intervention.as_deref());
            trained::logits(model, &tokens, text.as_deref(), &out)
        }
        Command::Tune(command) => tune::tune(&command),
        Command::ScoreContext(args) => score_context::score_context(&args),
        Command::Doctor => doctor::doctor(),
        Command::Tokenizer(TokenizerCommand::Train { recipe, vocab_size, out }) => {
            tokenizer::train(&load(&recipe)?, vocab_size as usize, &out)
        }
        Command::Man { out } => {
            std::fs::create_dir_all(&out).map_err(|error| Failure::file("create", &out, error))?;
            let command = <crate::cli::Cli as clap::CommandFactory>::command();
            clap_mangen::generate_to(command, &out).map_err(|error| Failure::file("write", &out, error))
        }
        Command::Completions { shell } => {
            let mut command = <crate::cli::Cli as clap::CommandFactory>::command();
            // In memory first: the crate panics where writing fails.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command, "polyhead", &mut script);
            print(format_args!("{}", String::from_utf8_lossy(&script)))
        }
        Command::Reference { out: None } => print(format_args!("{}", reference::recipe_keys())),
        Command::Reference { out: Some(folder) } => reference::write(&folder),
        Command::Schema { kind } => print(format_args!("{}", reference::schema(kind)?)),
    }
}

/// Whether a command prints data that is JSON, or becomes JSON with `--json`; others write files, talk, or print pages.
fn has_json(command: &Command) -> bool {
    use Command::*;
    !matches!(
        command,
        New { .. }
            | Cp { .. }
            | Chat(_)
            | Serve(_)
            | Export { .. }
            | Features(_)
            | Upscale(_)
            | Logits { .. }
            | Tokenizer(_)
            | Man { .. }
            | Completions { .. }
            | Reference { .. }
    )
}

fn load(args: &RecipeArgs) -> Result<Loaded, Failure> {
    Ok(recipe::load(&args.recipe, &args.overrides)?)
}

fn staged(args: &RecipeArgs) -> Result<Option<Staged>, Failure> {
    Ok(polyhead_recipe::stages::read(&args.recipe, &args.overrides)?)
}

/// Refuses what does not fit the memory of this machine or of its GPU, before it is tried: the system would end the process without a
/// word.
fn check_memory(device: &str, needed: u64, what: &str, hint: &str) -> Result<(), Failure> {
    let available = memory_bytes(device).unwrap_or(u64::MAX);
    let place = if has_own_memory(device) { format!(" on {device}") } else { String::new() };
    match needed <= available || allowed().too_little_memory {
        true => Ok(()),
        false => Err(Failure::Run(format!(
            "{what} takes about {} of memory, and {} are available{place}\n  hint: {hint}; --ignore-memory tries all the same (docs: Runs)",
            bytes(needed),
            bytes(available)
        ))),
    }
}

/// Refuses to write over what is there.
fn must_not_exist(path: &Path) -> Result<(), Failure> {
    match path.exists() {
        true => Err(Failure::Run(format!("{} exists already; name another place", path.display()))),
        false => Ok(()),
    }
}
