//! `polyhead eval`: the loss of a trained model on its held-out data, or on a text.

use std::path::Path;

use polyhead_data::{DataConfig, Syntax, TextConfig};
use polyhead_evaluation::perplexity::{Windows, text_loss};
use polyhead_models::{Batch, ClassScore, EvalTotals, Evaluated};
use polyhead_recipe::Problems;
use polyhead_runs::classifier::{TrainedClassifier, open_classifier};
use polyhead_runs::data::{Source, Watched, changed_text};
use polyhead_runs::decoder::set_scores;
use polyhead_runs::embedder::{TrainedEmbedder, open_embedder, paired};
use polyhead_runs::intervention::Rows;
use polyhead_runs::result::{ClassTable, GroupScore, NamedScore, Score};
use polyhead_runs::super_resolution::{TrainedSuperResolution, image_set, open_super_resolution};
use polyhead_runs::{Failure, open_decoder, open_trained};
use polyhead_training::evaluate::{Batches, evaluate};
use serde_json::json;

use crate::allowed::{caller, user};
use crate::cli::EvalArgs;
use crate::console::{progress, put, talk};
use crate::probe::check_rows;

/// Tokens that are read at a time where nothing is said; chosen by us.
const WINDOW: usize = 1024;

/// Prints the loss of a decoder on texts, as JSON.
pub fn texts(args: &EvalArgs) -> Result<(), Failure> {
    let trained = open_trained(&args.checkpoint, args.device.as_deref(), user())?;
    let trained = trained.intervened(args.intervention.as_deref())?;
    let tokenizer = trained.text_tokenizer()?;
    let window = args.window.unwrap_or(trained.max_positions.min(WINDOW));
    let stride = args.stride.unwrap_or(window.div_ceil(2));
    if stride > window {
        let problem = format!("--stride ({stride}) must be at most --window ({window}), or tokens would be left out");
        return Err(Problems::plain(problem).into());
    }
    if window > trained.max_positions {
        let most = trained.max_positions;
        talk!("warning: --window ({window}) is longer than the {most} positions that the model was made for");
    }
    let config = TextConfig { paths: args.text_file.clone(), validation_paths: Vec::new(), syntax: Syntax::Prose };
    let documents = DataConfig::Text(config).documents(Path::new("."))?;
    let (texts, documents) = documents.read_all()?;
    documents.notes.iter().for_each(|note| talk!("note: {note}"));
    let (bytes, note) = tokenizer.token_bytes_of(texts.iter().map(|document| document.text.as_str()));
    note.iter().for_each(|note| talk!("note: {note}"));
    let encode = |document: &polyhead_data::TextDocument| tokenizer.encode_whole(&document.text);
    let tokens = texts.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
    let read: usize = tokens.iter().map(Vec::len).sum();
    talk!("data: {}: {read} tokens, windows of {window} every {stride}", documents.description);
    let windows = Windows { window, stride };
    if trained.model.intervention().is_some() {
        let rows: Vec<Batch> = tokens.iter().flat_map(|text| windows.of(text)).collect();
        check_rows(&trained, "windows", &rows)?;
    }
    let sums = text_loss(&trained.model, &tokens, windows, bytes.as_deref(), &mut |done, all| {
        progress("evaluating", done, all)
    });
    if sums.targets == 0 {
        let problem = format!("{} hold one token each at most: there is nothing to predict", documents.description);
        return Err(Failure::Run(problem));
    }
    let loss = sums.mean_loss();
    put!(
        "{:#}",
        json!({ "checkpoint": trained.path, "texts": tokens.len(), "tokens": read, "window": window, "stride": stride,
        "targets": sums.targets, "loss": loss, "perplexity": loss.exp(), "bits_per_byte": sums.bits_per_byte(),
        "accuracy": sums.accuracy() })
    )
}

/// Prints loss, bits per byte and accuracy on the held-out data, as JSON.
pub fn eval(args: &EvalArgs) -> Result<(), Failure> {
    let (checkpoint, batches, device) = (args.checkpoint.as_path(), args.batches, args.device.as_deref());
    if let Some(embedder) = open_embedder(checkpoint, device, caller())? {
        return no_intervention(args).and_then(|()| eval_embedder(&embedder, batches));
    }
    if let Some(trained) = open_super_resolution(checkpoint, device, caller())? {
        return no_intervention(args).and_then(|()| eval_super_resolution(&trained, batches));
    }
    if let Some(classifier) = open_classifier(checkpoint, device, caller())? {
        return no_intervention(args).and_then(|()| eval_classifier(&classifier, batches));
    }
    let trained = open_decoder(checkpoint, device, user())?.intervened(args.intervention.as_deref())?;
    let opened = trained.data()?;
    tell_data(&trained.path, &opened.description, opened.text_hash.as_deref())?;
    let validation = Source(&opened.validation);
    let watched = Watched::first(&validation, batches, caller());
    let batch = |at| -> Result<Batch, Failure> { Ok(opened.validation.batch(at)?) };
    let notes = trained.check_rows(&Rows {
        called: "held-out rows",
        batches: watched.per_epoch(),
        batch: &batch,
        generates: false,
    })?;
    notes.iter().for_each(|note| talk!("note: {note}"));
    let totals = evaluate(&trained.model, &watched, 0)?;
    let sums = totals.all;
    if sums.targets == 0 {
        let problem =
            format!("{}: none of the held-out tokens is a target: there is nothing to measure", opened.description);
        return Err(Failure::Run(problem));
    }
    let mut result = json!({
        "checkpoint": trained.path, "batches": watched.per_epoch(), "targets": sums.targets, "loss": sums.mean_loss(),
        "bits_per_byte": sums.bits_per_byte(), "accuracy": sums.accuracy(), "best_possible_loss": opened.floor,
    });
    for (source, sums) in &totals.sources {
        result["sources"][source] = json!({ "targets": sums.targets, "loss": sums.mean_loss() });
    }
    let sets = set_scores(&trained.model, &opened.validation)?;
    if !sets.is_empty() {
        result["sets"] = serde_json::to_value(sets).map_err(|error| Failure::Run(error.to_string()))?;
    }
    put!("{result:#}")
}

/// Refuses an intervention where the model is no decoder.
fn no_intervention(args: &EvalArgs) -> Result<(), Failure> {
    match &args.intervention {
        Some(path) => Err(Problems::plain(format!(
            "--intervention {}: interventions are for decoders, and {} is none",
            path.display(),
            args.checkpoint.display()
        ))
        .into()),
        None => Ok(()),
    }
}

/// Says what a model is evaluated on; warns where that is no longer what it was trained on.
fn tell_data(checkpoint: &Path, description: &str, text_hash: Option<&str>) -> Result<(), Failure> {
    talk!("data: {description}");
    if let Some(problem) = changed_text(checkpoint, text_hash)? {
        talk!("warning: {problem}: some of what is held out now may have been learned");
    }
    Ok(())
}

/// The same for an embedder: how well queries find their documents.
fn eval_embedder(trained: &TrainedEmbedder, batches: u64) -> Result<(), Failure> {
    let paired = paired(&trained.recipe)?;
    tell_data(&trained.path, &paired.description, Some(&paired.text_hash))?;
    let sums = evaluate(&trained.model, &Watched::first(&Source(&paired.validation), batches, caller()), 0)?;
    let mut result = json!({ "checkpoint": trained.path, "loss": sums.evaluated().mean_loss() });
    for (name, value) in sums.retrieval().numbers() {
        result[name] = json!(value);
    }
    put!("{result:#}")
}

/// The same for a network that enlarges images: how near they are to the true ones, by it and by a bicubic filter.
fn eval_super_resolution(trained: &TrainedSuperResolution, batches: u64) -> Result<(), Failure> {
    let images = image_set(&trained.recipe)?;
    tell_data(&trained.path, &images.description, images.text_hash.as_deref())?;
    let sums = evaluate(&trained.model, &Watched::first(&Source(&images.validation), batches, caller()), 0)?;
    let Evaluated { targets, .. } = sums.evaluated();
    let mut result = json!({ "checkpoint": trained.path, "images": targets, "loss": sums.evaluated().mean_loss() });
    for (name, value) in sums.named() {
        result[name] = json!(value);
    }
    put!("{result:#}")
}

/// The same for a classifier, with how well each class is told.
fn eval_classifier(trained: &TrainedClassifier, batches: u64) -> Result<(), Failure> {
    let labelled = trained.data()?;
    tell_data(&trained.path, &labelled.description, labelled.text_hash.as_deref())?;
    let sums = evaluate(&trained.model, &Watched::first(&Source(&labelled.validation), batches, caller()), 0)?;
    let table = ClassTable::of(&sums, &labelled.classes, &labelled.groups);
    let line = |name: &str, cells: [String; 4]| {
        let [examples, precision, recall, f1] = cells;
        talk!("{name:<24} {examples:>9} {precision:>10} {recall:>8} {f1:>8}");
    };
    line("class", ["examples", "precision", "recall", "f1"].map(Into::into));
    for NamedScore { name, score } in &table.scores {
        let ClassScore { examples, precision, recall, f1, .. } = *score;
        let shares = [precision, recall, f1].map(|share| format!("{share:.3}"));
        let [precision, recall, f1] = shares;
        line(name, [examples.to_string(), precision, recall, f1]);
    }
    if !table.groups.is_empty() {
        talk!("{:<24} {:>9} {:>10}", "group", "examples", "accuracy");
    }
    for GroupScore { name, examples, accuracy } in &table.groups {
        talk!("{name:<24} {examples:>9} {accuracy:>10.3}");
    }
    let mut result = json!({ "checkpoint": trained.path, "examples": sums.examples() });
    for (part, value) in [("score", serde_json::to_value(Score::of(&sums))), ("classes", serde_json::to_value(table))] {
        result[part] = value.map_err(|error| Failure::Run(error.to_string()))?;
    }
    put!("{result:#}")
}
