//! `polyhead preview`: the tokens that a model would see, and which of them it learns to predict.

use std::io::Write;

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};
use polyhead_data::{StreamDecoder, Tokenizer};
use polyhead_models::IGNORE;

use crate::assemble;
use crate::console::{harmless, put, talk};
use crate::recipe::Loaded;
use crate::report::Failure;

const LEARNT: Style = AnsiColor::Green.on_default();
const IGNORED: Style = Style::new().dimmed();
const HEADING: Style = Style::new().bold();

/// Some rows of the first batches.
#[derive(Debug, Clone, Copy)]
pub struct PreviewOptions {
    /// How many.
    pub rows: usize,
    /// One line per position, even on a terminal.
    pub table: bool,
}

struct Row<'a> {
    tokens: &'a [u32],
    /// What is to be predicted at each position, or [`IGNORE`].
    targets: &'a [i64],
    documents: Option<&'a [u32]>,
}

/// Shows rows: as coloured text where colours can be shown, as a table everywhere else.
pub fn preview(loaded: &Loaded, options: PreviewOptions) -> Result<(), Failure> {
    let opened = assemble::resolve(loaded)?.data(&mut |_, _| {})?;
    let tokenizer = opened.tokenizer.as_ref();
    talk!("data: {}", opened.description);
    let coloured = !options.table && AutoStream::choice(&std::io::stdout()) != ColorChoice::Never;
    if coloured {
        let mut stderr = AutoStream::auto(std::io::stderr());
        let _ = writeln!(
            stderr,
            "{LEARNT}what the model learns to predict{LEARNT:#}, {IGNORED}what it only reads{IGNORED:#}"
        );
    } else {
        talk!("each line: position, document, token, and what is to be predicted (- where nothing is)");
    }
    let rows_per_batch = loaded.recipe.training.batch_size;
    for batch_index in 0..options.rows.div_ceil(rows_per_batch) {
        let batch = opened.train.batch(batch_index as u64)?;
        let first = batch_index * rows_per_batch;
        for row in 0..rows_per_batch.min(options.rows - first) {
            let range = row * batch.seq..(row + 1) * batch.seq;
            let shown = Row {
                tokens: &batch.tokens[range.clone()],
                targets: &batch.targets[range.clone()],
                documents: batch.documents.as_ref().map(|documents| &documents[range]),
            };
            match coloured {
                true => paint(first + row, &shown, tokenizer)?,
                false => tabulate(first + row, &shown, tokenizer)?,
            }
        }
    }
    Ok(())
}

fn tabulate(number: usize, row: &Row<'_>, tokenizer: Option<&Tokenizer>) -> Result<(), Failure> {
    let name = |id: u32| match tokenizer {
        Some(tokenizer) => format!("{id} {:?}", tokenizer.token_text(id)),
        None => id.to_string(),
    };
    put!("row {number}")?;
    for (position, (&token, &target)) in row.tokens.iter().zip(row.targets).enumerate() {
        let document = row.documents.map_or("-".into(), |documents| documents[position].to_string());
        let target = if target == IGNORE { "-".into() } else { name(target as u32) };
        put!("{position:>6} {document:>3}  {:<24} -> {target}", name(token))?;
    }
    Ok(())
}

fn paint(number: usize, row: &Row<'_>, tokenizer: Option<&Tokenizer>) -> Result<(), Failure> {
    let learnt = row.targets.iter().filter(|&&target| target != IGNORE).count();
    let documents = match row.documents {
        Some([first, .., last]) => format!(", {} document(s)", last - first + 1),
        _ => String::new(),
    };
    let mut text = format!(
        "{HEADING}row {number}{HEADING:#}: {learnt} of {} positions are learnt from{documents}\n",
        row.tokens.len()
    );
    for (is_learnt, piece) in pieces(row, tokenizer) {
        let style = if is_learnt { LEARNT } else { IGNORED };
        text.push_str(&format!("{style}{piece}{style:#}"));
    }
    let mut stdout = AutoStream::auto(std::io::stdout());
    writeln!(stdout, "{text}").and_then(|()| stdout.flush()).map_err(Failure::output)
}

/// The row's text in order, each piece with whether it is learnt. What is predicted at a position stands behind it: it is
/// the next token, except in data that asks for something else.
fn pieces(row: &Row<'_>, tokenizer: Option<&Tokenizer>) -> Vec<(bool, String)> {
    let mut pieces: Vec<(bool, String)> = Vec::new();
    let bytes = tokenizer.map(Tokenizer::token_bytes);
    let mut stream = tokenizer.map(StreamDecoder::new);
    let mut add = |learnt: bool, id: u32| {
        let text = match (tokenizer, &mut stream) {
            (Some(tokenizer), _) if bytes.as_ref().is_some_and(|bytes| bytes.get(id as usize) == Some(&0)) => {
                tokenizer.token_text(id)
            }
            (_, Some(stream)) => stream.push(id).map_or(String::new(), |text| harmless(&text)),
            _ => format!("{id} "),
        };
        match pieces.last_mut() {
            Some((same, piece)) if *same == learnt => piece.push_str(&text),
            _ => pieces.push((learnt, text)),
        }
    };
    for position in 0..=row.tokens.len() {
        let asked = position.checked_sub(1).map(|before| row.targets[before]).filter(|&target| target != IGNORE);
        let asked = asked.map(|target| target as u32);
        let token = row.tokens.get(position).copied().filter(|&token| Some(token) != asked);
        token.into_iter().for_each(|token| add(false, token));
        asked.into_iter().for_each(|target| add(true, target));
    }
    pieces
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_learnt_is_told_from_what_is_read() {
        let tokenizer = Tokenizer::bytes();
        let tokens: Vec<u32> = "aé\u{1b}b".bytes().map(u32::from).chain([256, 99]).collect();
        let mut targets: Vec<i64> = tokens[1..].iter().map(|&id| i64::from(id)).chain([100]).collect();
        targets[5] = IGNORE; // across the end of the first text
        let row = Row { tokens: &tokens, targets: &targets, documents: None };
        let shown = pieces(&row, Some(&tokenizer));
        let expected = [(false, "a"), (true, "é\\u{1b}b<|endoftext|>"), (false, "c"), (true, "d")];
        assert_eq!(shown, expected.map(|(learnt, text)| (learnt, text.to_owned())));
    }

    #[test]
    fn an_answer_that_is_not_the_next_token_stands_beside_it() {
        let row = Row { tokens: &[1, 2, 3], targets: &[IGNORE, 7, IGNORE], documents: None };
        let expected = [(false, "1 2 3 "), (true, "7 ")];
        assert_eq!(pieces(&row, None), expected.map(|(learnt, text)| (learnt, text.to_owned())));
    }
}
