//! What a model is looked at with: rows of its data or texts, layers and heads that were chosen, and the folder of the result.

use std::path::{Path, PathBuf};

use polyhead_models::Batch;
use polyhead_recipe::Problems;
use polyhead_runs::intervention::Rows;
use polyhead_runs::{Failure, Trained, open_trained};

use crate::allowed::caller;
use crate::console::talk;

/// A trained model to look inside of.
///
/// # Errors
/// If it cannot be opened.
pub fn open(path: &Path, device: Option<&str>) -> Result<Trained, Failure> {
    Ok(open_trained(path, device, caller())?.unguided(caller()))
}

/// The texts that were given, a row each, or else held-out rows of the data that the model learned from.
///
/// # Errors
/// If a text is too short or too long, or there is neither; or if none has a span of the model's intervention.
pub fn probe(trained: &Trained, texts: &[String], rows: u32) -> Result<Vec<Batch>, Failure> {
    let rows = rows_of(trained, texts, rows)?;
    check_rows(trained, if texts.is_empty() { "held-out rows" } else { "texts" }, &rows)?;
    Ok(rows)
}

/// Refuses rows of which none has a span of the model's intervention; tells of each span that some of them lack.
///
/// # Errors
/// Names the span.
pub fn check_rows(trained: &Trained, called: &str, rows: &[Batch]) -> Result<(), Failure> {
    let batch = |at: u64| Ok(rows[at as usize].clone());
    let notes = trained.check_rows(&Rows { called, batches: rows.len() as u64, batch: &batch, generates: false })?;
    notes.iter().for_each(|note| talk!("note: {note}"));
    Ok(())
}

fn rows_of(trained: &Trained, texts: &[String], rows: u32) -> Result<Vec<Batch>, Failure> {
    if texts.is_empty() {
        let batch = trained.data()?.validation.batch(0)?;
        return Ok((0..batch.batch.min(rows as usize)).map(|row| batch.row(row)).collect());
    }
    let Some(tokenizer) = &trained.tokenizer else {
        let problem = format!("--text: {} learned generated data, not text; leave it out", trained.path.display());
        return Err(Problems::plain(problem).into());
    };
    let one = |text: &String| -> Result<Batch, Failure> {
        let tokens = tokenizer.encode_prompt(text)?;
        let refused =
            |rule: String| Err(Problems::plain(format!("--text is {} tokens long{rule}", tokens.len())).into());
        match tokens.len() {
            0 | 1 => refused(": give two or more".into()),
            long if long > trained.max_positions => {
                refused(format!(", the model was made for {}", trained.max_positions))
            }
            _ => Ok(Batch::text(tokens)),
        }
    };
    texts.iter().map(one).collect()
}

/// What a token is called: the text that it stands for; where that is none of its own, as half a character is, its spelling in the
/// vocabulary; without a tokenizer its id.
pub fn word(trained: &Trained, id: u32) -> String {
    let Some(tokenizer) = &trained.tokenizer else { return id.to_string() };
    match tokenizer.decode(&[id]) {
        text if text.is_empty() || text.contains('\u{fffd}') => tokenizer.token_text(id),
        text => text,
    }
}

/// What was chosen of `count`, or all of them.
///
/// # Errors
/// If there is no such one.
pub fn choose(option: &str, chosen: &[usize], count: usize) -> Result<Vec<usize>, Failure> {
    match chosen.iter().find(|&&at| at >= count) {
        Some(at) => Err(Problems::plain(format!("{option}: {at} is not below {count}, how many there are")).into()),
        None if chosen.is_empty() => Ok((0..count).collect()),
        None => Ok(chosen.to_vec()),
    }
}

/// The folder of results, made where it is missing: the one that was named, or `kind` beside the checkpoints of a run, which stay as
/// they are.
///
/// # Errors
/// If it cannot be made.
pub fn folder(named: Option<&Path>, checkpoint: &Path, kind: &str) -> Result<PathBuf, Failure> {
    let beside = || {
        let name = checkpoint.file_name().unwrap_or("model".as_ref());
        checkpoint.parent().unwrap_or(Path::new(".")).join(kind).join(name)
    };
    let out = named.map_or_else(beside, Path::to_owned);
    std::fs::create_dir_all(&out).map_err(|error| Failure::file("create", &out, error))?;
    Ok(out)
}
