//! `polyhead preview`: the tokens that a model would see, and which of them it learns to predict; of examples with classes a
//! sheet of images.

use std::io::Write;
use std::path::{Path, PathBuf};

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};
use polyhead_data::{ImageSet, Labelled, Modality, Opened, Paired, StreamDecoder, Tokenizer};
use polyhead_models::super_resolution::COLOURS;
use polyhead_models::{Classifier, Decoder, Embedder, Examples, IGNORE, Inputs, Role, SuperResolution};
use polyhead_training::image::{Sheet, sheet};
use polyhead_training::run_folder::atomic_write;
use serde_json::{Value, json};

use crate::allowed::caller;
use crate::console::{self, harmless, is_quiet, put, reading, talk, wants_json};
use polyhead_recipe::Loaded;
use polyhead_recipe::ModelConfig;
use polyhead_runs::Failure;
use polyhead_runs::kind::Kind;
use polyhead_runs::resolve::resolve;

const TARGET: Style = AnsiColor::Green.on_default();
const IGNORED: Style = Style::new().dimmed();
const SYSTEM: Style = AnsiColor::Magenta.on_default();
const USER: Style = AnsiColor::Cyan.on_default();
const TOOL: Style = AnsiColor::Yellow.on_default();
const ANSWER: Style = AnsiColor::Green.on_default().dimmed();
const HEADING: Style = Style::new().bold();

/// Some rows of the first batches.
#[derive(Debug, Clone)]
pub struct PreviewOptions {
    /// How many.
    pub rows: usize,
    /// One line per position, even on a terminal.
    pub table: bool,
    /// Where a sheet of images is written.
    pub out: PathBuf,
}

struct Row<'a> {
    tokens: &'a [u32],
    /// What is to be predicted at each position, or [`IGNORE`].
    targets: &'a [i64],
    documents: Option<&'a [u32]>,
    roles: Option<&'a [Role]>,
}

/// How a piece of a row is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shade {
    Target,
    Read(Option<Role>),
}

impl Shade {
    fn style(self) -> Style {
        match self {
            Self::Target => TARGET,
            Self::Read(Some(Role::System)) => SYSTEM,
            Self::Read(Some(Role::User | Role::Question)) => USER,
            Self::Read(Some(Role::Tool)) => TOOL,
            Self::Read(Some(Role::Assistant)) => ANSWER,
            Self::Read(_) => IGNORED,
        }
    }
}

/// Shows rows: as coloured text where colours can be shown, as a table everywhere else.
pub fn preview(loaded: &Loaded, options: PreviewOptions) -> Result<(), Failure> {
    let (resolved, read) = (resolve(loaded, caller())?, &mut reading);
    match &resolved.recipe.model {
        ModelConfig::Decoder { .. } => tokens(loaded, &Decoder::open(&resolved, read)?, options),
        ModelConfig::Classifier { .. } => examples(&Classifier::open(&resolved, read)?, options),
        ModelConfig::Embedder(_) => pairs(&Embedder::open(&resolved, read)?, options),
        ModelConfig::SuperResolution(_) => pictures(&SuperResolution::open(&resolved, read)?, options),
    }
}

/// Shows rows of tokens.
fn tokens(loaded: &Loaded, opened: &Opened, options: PreviewOptions) -> Result<(), Failure> {
    let tokenizer = opened.tokenizer.as_ref();
    talk!("data: {}", opened.description);
    opened.notes.iter().for_each(|note| talk!("note: {note}"));
    let coloured = !options.table && !wants_json() && AutoStream::choice(&std::io::stdout()) != ColorChoice::Never;
    if wants_json() || is_quiet() {
        // Without a legend: JSON names its parts.
    } else if coloured {
        let mut stderr = AutoStream::auto(std::io::stderr());
        let mut legend =
            format!("{TARGET}what the model learns to predict{TARGET:#}, {IGNORED}what it only reads{IGNORED:#}");
        if loaded.recipe.data.modality() == Modality::Chat {
            legend.push_str(&format!(
                ": {SYSTEM}system{SYSTEM:#}, {USER}user{USER:#}, {TOOL}tool{TOOL:#}, {ANSWER}answers that are not \
                 learned{ANSWER:#}"
            ));
        }
        let _ = writeln!(stderr, "{legend}");
    } else {
        talk!("each line: position, document, role, token, and what is to be predicted (- where nothing is)");
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
                documents: batch.documents.as_ref().map(|documents| &documents[range.clone()]),
                roles: batch.roles.as_ref().map(|roles| &roles[range]),
            };
            match (wants_json(), coloured) {
                (true, _) => put!("{}", as_json(first + row, &shown, tokenizer))?,
                (_, true) => paint(first + row, &shown, tokenizer)?,
                (_, false) => tabulate(first + row, &shown, tokenizer)?,
            }
        }
    }
    Ok(())
}

/// Images of a row of a sheet.
const ACROSS: usize = 8;

/// Lists examples with their classes; where they can be seen, as a sheet of images.
fn examples(labelled: &Labelled, options: PreviewOptions) -> Result<(), Failure> {
    talk!("data: {}", labelled.description);
    labelled.notes.iter().for_each(|note| talk!("note: {note}"));
    let count = match labelled.tokenizer {
        Some(_) => options.rows,
        None => options.rows * ACROSS,
    };
    let mut all: Vec<Examples> = Vec::new();
    for position in 0.. {
        let batch = labelled.train.batch(position)?;
        all.extend((0..batch.len()).map(|index| batch.row(index)));
        if all.len() >= count {
            break;
        }
    }
    all.truncate(count);
    let class = |example: &Examples| {
        let class = &labelled.classes[example.labels[0] as usize];
        labelled.groups.get(example.groups[0] as usize).map_or(class.clone(), |group| format!("{class} ({group})"))
    };
    let (mut images, mut size) = (Vec::new(), [0; 3]);
    for example in &all {
        match &example.inputs {
            Inputs::Images { pixels, channels, height, width } => {
                images.push(pixels.as_slice());
                size = [*channels, *height, *width];
            }
            Inputs::Features { values, layers, dim } => {
                images.push(values.as_slice());
                size = [1, *layers, *dim];
            }
            Inputs::Tokens { tokens, lengths, .. } => {
                let ids = &tokens[..lengths[0] as usize];
                let text = labelled.tokenizer.as_ref().map_or(String::new(), |tokenizer| {
                    let mut stream = StreamDecoder::new(tokenizer);
                    ids.iter().filter_map(|&id| stream.push(id)).collect()
                });
                match wants_json() {
                    true => put!("{}", json!({ "class": class(example), "text": text }))?,
                    false => put!("{}\t{}", class(example), harmless(&text).replace('\n', " "))?,
                }
            }
        }
    }
    if images.is_empty() {
        return Ok(());
    }
    for (row, examples) in all.chunks(ACROSS).enumerate() {
        let classes: Vec<String> = examples.iter().map(class).collect();
        match wants_json() {
            true => put!("{}", json!({ "row": row, "classes": classes }))?,
            false => put!("row {row}: {}", classes.join(", "))?,
        }
    }
    let [channels, height, width] = size;
    write_sheet(&images, Sheet { channels, height, width, across: ACROSS }, &options.out)?;
    talk!("wrote {} images to {}", images.len(), options.out.display());
    Ok(())
}

fn write_sheet(images: &[&[f32]], layout: Sheet, out: &Path) -> Result<(), Failure> {
    let png = sheet(images, layout).map_err(|error| Failure::Run(error.to_string()))?;
    Ok(atomic_write(out, &png.bytes)?)
}

/// A sheet of images without classes.
fn pictures(set: &ImageSet, options: PreviewOptions) -> Result<(), Failure> {
    talk!("data: {}", set.description);
    set.notes.iter().for_each(|note| talk!("note: {note}"));
    let (count, [height, width]) = (options.rows * ACROSS, set.train.size());
    let mut all = Vec::new();
    for position in 0.. {
        let pixels = set.train.batch(position)?.pixels;
        all.extend(pixels.chunks(COLOURS * height * width).map(<[f32]>::to_vec));
        if all.len() >= count {
            break;
        }
    }
    let images: Vec<&[f32]> = all.iter().take(count).map(Vec::as_slice).collect();
    write_sheet(&images, Sheet { channels: COLOURS, height, width, across: ACROSS }, &options.out)?;
    talk!("wrote {} images to {}", images.len(), options.out.display());
    Ok(())
}

/// Pairs side by side: features of layers by channels, a query beside what belongs to it.
fn pairs(paired: &Paired, options: PreviewOptions) -> Result<(), Failure> {
    talk!("data: {}", paired.description);
    let batch = paired.train.batch(0)?;
    let size = batch.layers * batch.dim;
    let shown = options.rows.min(batch.len()) * batch.parts;
    let images: Vec<&[f32]> = batch.values.chunks(size).take(shown).collect();
    let layout = Sheet { channels: 1, height: batch.layers, width: batch.dim, across: batch.parts };
    write_sheet(&images, layout, &options.out)?;
    let parts = ["query", "positive", "negative"][..batch.parts].join(", ");
    talk!(
        "wrote {} rows to {}: {parts}, {} layers by {} channels",
        shown / batch.parts,
        options.out.display(),
        batch.layers,
        batch.dim
    );
    Ok(())
}

/// A row as one line of JSON; nothing is to be predicted where a target is null.
fn as_json(number: usize, row: &Row<'_>, tokenizer: Option<&Tokenizer>) -> Value {
    let texts = |ids: &[u32]| {
        tokenizer.map(|tokenizer| ids.iter().map(|&id| tokenizer.token_text(id)).collect::<Vec<String>>())
    };
    let targets = row.targets.iter().map(|&target| (target != IGNORE).then_some(target));
    let roles =
        row.roles.map(|roles| roles.iter().map(|role| format!("{role:?}").to_lowercase()).collect::<Vec<String>>());
    json!({
        "row": number, "tokens": row.tokens, "texts": texts(row.tokens), "targets": targets.collect::<Vec<_>>(),
        "documents": row.documents, "roles": roles,
    })
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
        let role =
            row.roles.map_or(String::new(), |roles| format!("{:<10}", format!("{:?}", roles[position]).to_lowercase()));
        put!("{position:>6} {document:>3}  {role}{:<24} -> {target}", name(token))?;
    }
    Ok(())
}

fn paint(number: usize, row: &Row<'_>, tokenizer: Option<&Tokenizer>) -> Result<(), Failure> {
    let learned = row.targets.iter().filter(|&&target| target != IGNORE).count();
    let documents = count_documents(row).map_or(String::new(), |count| format!(", {count} document(s)"));
    let mut text = format!(
        "{HEADING}row {number}{HEADING:#}: {learned} of {} positions are learned from{documents}\n",
        row.tokens.len()
    );
    for (shade, piece) in pieces(row, tokenizer) {
        let style = shade.style();
        text.push_str(&format!("{style}{piece}{style:#}"));
    }
    let mut stdout = AutoStream::auto(std::io::stdout());
    writeln!(stdout, "{text}").and_then(|()| stdout.flush()).map_err(console::output)
}

/// How many documents a row holds, where it tells. What pads it is none.
fn count_documents(row: &Row<'_>) -> Option<usize> {
    let padding = |at: usize| row.roles.is_some_and(|roles| roles[at] == Role::Padding);
    let mut documents: Vec<u32> =
        row.documents?.iter().enumerate().filter(|(at, _)| !padding(*at)).map(|(_, &document)| document).collect();
    documents.dedup();
    Some(documents.len())
}

/// The row's text in order, each piece with whether it is learned. What is predicted at a position stands behind it: it is
/// the next token, except in data that asks for something else.
fn pieces(row: &Row<'_>, tokenizer: Option<&Tokenizer>) -> Vec<(Shade, String)> {
    let mut pieces: Vec<(Shade, String)> = Vec::new();
    let bytes = tokenizer.map(Tokenizer::token_bytes);
    let mut stream = tokenizer.map(StreamDecoder::new);
    let mut add = |shade: Shade, id: u32| {
        let text = match (tokenizer, &mut stream) {
            (Some(tokenizer), _) if bytes.as_ref().is_some_and(|bytes| bytes.get(id as usize) == Some(&0)) => {
                harmless(&tokenizer.token_text(id)).into_owned()
            }
            (_, Some(stream)) => stream.push(id).map_or(String::new(), |text| harmless(&text).into_owned()),
            _ => format!("{id} "),
        };
        match pieces.last_mut() {
            Some((same, piece)) if *same == shade => piece.push_str(&text),
            _ => pieces.push((shade, text)),
        }
    };
    for position in 0..=row.tokens.len() {
        let asked = position.checked_sub(1).map(|before| row.targets[before]).filter(|&target| target != IGNORE);
        let asked = asked.map(|target| target as u32);
        let token = row.tokens.get(position).copied().filter(|&token| Some(token) != asked);
        let role = row.roles.and_then(|roles| roles.get(position)).copied();
        // A row is padded with one token: once is enough.
        let again = position > 0 && row.roles.is_some_and(|roles| roles[position - 1] == Role::Padding);
        token.filter(|_| !again).into_iter().for_each(|token| add(Shade::Read(role), token));
        asked.into_iter().for_each(|target| add(Shade::Target, target));
    }
    pieces
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TARGET: Shade = Shade::Target;
    const READ: Shade = Shade::Read(None);

    #[test]
    fn what_is_learned_is_told_from_what_is_read() {
        let tokenizer = Tokenizer::bytes();
        let tokens: Vec<u32> = "aé\u{1b}b".bytes().map(u32::from).chain([256, 99]).collect();
        let mut targets: Vec<i64> = tokens[1..].iter().map(|&id| i64::from(id)).chain([100]).collect();
        targets[5] = IGNORE; // across the end of the first text
        let row = Row { tokens: &tokens, targets: &targets, documents: None, roles: None };
        let shown = pieces(&row, Some(&tokenizer));
        let expected = [(READ, "a"), (TARGET, "é\\u{1b}b<|endoftext|>"), (READ, "c"), (TARGET, "d")];
        assert_eq!(shown, expected.map(|(shade, text)| (shade, text.to_owned())));
    }

    #[test]
    fn padding_is_no_document() {
        let roles = [Role::User, Role::Assistant, Role::Padding];
        let row =
            |documents, roles| Row { tokens: &[1, 2, 3], targets: &[IGNORE; 3], documents: Some(documents), roles };
        assert_eq!(count_documents(&row(&[0, 0, 1], Some(&roles))), Some(1));
        assert_eq!(count_documents(&row(&[0, 1, 2], Some(&roles))), Some(2));
        assert_eq!(count_documents(&row(&[4, 5, 6], None)), Some(3));
    }

    #[test]
    fn an_answer_that_is_not_the_next_token_stands_beside_it() {
        let row = Row { tokens: &[1, 2, 3], targets: &[IGNORE, 7, IGNORE], documents: None, roles: None };
        let expected = [(READ, "1 2 3 "), (TARGET, "7 ")];
        assert_eq!(pieces(&row, None), expected.map(|(shade, text)| (shade, text.to_owned())));
    }
}
