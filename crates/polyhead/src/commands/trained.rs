//! Commands on a trained model: `eval`, `generate`, `export`, `logits`.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use burn::tensor::{Int, Tensor, TensorData};
use polyhead_attention::{Mask, Observe};
use polyhead_data::chat::{chat_template, end_of_answer};
use polyhead_data::{StreamDecoder, Tokenizer};
use polyhead_models::hf::{self, ExportOptions};
use polyhead_models::surgery;
use polyhead_models::weights::{Named, to_safetensors};
use polyhead_models::{ClassScore, Decoder, EvalTotals, Sampling};
use polyhead_training::evaluate::{Batches, evaluate};
use polyhead_training::run_folder::{atomic_write, atomic_write_with, files::TOKENIZER, files::WEIGHTS};

use super::must_not_exist;
use super::new_folder::NewFolder;
use crate::allowed::caller;
use crate::cli::GenerateArgs;
use crate::console::{harmless, print, progress, put, talk};
use polyhead_runs::Failure;
use polyhead_runs::classifier::{TrainedClassifier, open_classifier};
use polyhead_runs::data::{Source, Watched, changed_text};
use polyhead_runs::embedder::{TrainedEmbedder, open_embedder, paired};
use polyhead_runs::open_trained;
use polyhead_runs::pretrained::tokenizer_files;
use polyhead_runs::result::{ClassTable, GroupScore, NamedScore, Score};

/// Prints loss, bits per byte and accuracy on the held-out data, as JSON.
pub fn eval(checkpoint: &Path, batches: u64, device: Option<&str>) -> Result<(), Failure> {
    if let Some(embedder) = open_embedder(checkpoint, device, caller())? {
        return eval_embedder(&embedder, batches);
    }
    if let Some(classifier) = open_classifier(checkpoint, device, caller())? {
        return eval_classifier(&classifier, batches);
    }
    let trained = open_trained(checkpoint, device, caller())?;
    let opened = trained.data()?;
    tell_data(&trained.path, &opened.description, opened.text_hash.as_deref())?;
    let validation = Source(&opened.validation);
    let watched = Watched::first(&validation, batches, caller());
    let sums = evaluate(&trained.model, &watched, 0)?;
    if sums.targets == 0 {
        let problem =
            format!("{}: none of the held-out tokens is a target: there is nothing to measure", opened.description);
        return Err(Failure::Run(problem));
    }
    let result = serde_json::json!({
        "checkpoint": trained.path, "batches": watched.per_epoch(), "targets": sums.targets, "loss": sums.mean_loss(),
        "bits_per_byte": sums.bits_per_byte(), "accuracy": sums.accuracy(), "best_possible_loss": opened.floor,
    });
    put!("{result:#}")
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
    let mut result = serde_json::json!({ "checkpoint": trained.path, "loss": sums.evaluated().mean_loss() });
    for (name, value) in sums.retrieval().numbers() {
        result[name] = serde_json::json!(value);
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
    let mut result = serde_json::json!({ "checkpoint": trained.path, "examples": sums.examples() });
    for (part, value) in [("score", serde_json::to_value(Score::of(&sums))), ("classes", serde_json::to_value(table))] {
        result[part] = value.map_err(|error| Failure::Run(error.to_string()))?;
    }
    put!("{result:#}")
}

/// Continues a prompt on standard output.
pub fn generate(args: &GenerateArgs) -> Result<(), Failure> {
    if !(args.temperature >= 0.0 && args.top_p > 0.0 && args.top_p <= 1.0) {
        let problem = format!(
            "--temperature ({}) must be 0 or more, --top-p ({}) above 0 and up to 1",
            args.temperature, args.top_p
        );
        return Err(polyhead_recipe::Problems::plain(problem).into());
    }
    let trained = open_trained(&args.checkpoint, args.device.as_deref(), caller())?;
    let tokenizer = text_tokenizer(trained.tokenizer.as_ref(), &trained.path)?;
    let sampling = Sampling {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
    };
    let started = Instant::now();
    let prompt = if args.chat { chat_prompt(tokenizer, &args.prompt)? } else { plain_prompt(tokenizer, &args.prompt)? };
    let (count, _) = write_text(&trained.model, tokenizer, &prompt, &sampling)?;
    let rate = count as f64 / started.elapsed().as_secs_f64().max(1e-9);
    talk!("{count} tokens, {rate:.1} tokens/s");
    Ok(())
}

/// What a model goes on from.
pub struct Prompt<'a> {
    /// What a person sees of it.
    shown: &'a str,
    ids: Vec<u32>,
    /// Tokens that end the text.
    stops: Vec<u32>,
}

/// A text that the model continues, behind the token that begins texts, where the tokenizer puts one. Where there is no
/// text, the model starts one.
pub fn plain_prompt<'a>(tokenizer: &Tokenizer, text: &'a str) -> Result<Prompt<'a>, Failure> {
    let mut ids = tokenizer.encode_prompt(text)?;
    if ids.is_empty() {
        ids.push(tokenizer.end_of_text().unwrap_or(0));
    }
    Ok(Prompt { shown: text, ids, stops: tokenizer.end_of_text().into_iter().collect() })
}

/// What a user says, which the model answers.
fn chat_prompt<'a>(tokenizer: &Tokenizer, text: &str) -> Result<Prompt<'a>, Failure> {
    if tokenizer.chat_template().is_none() {
        let problem = "--chat: the model has no chat template: it has not been fine-tuned on conversations";
        return Err(polyhead_recipe::Problems::plain(problem.into()).into());
    }
    let template = chat_template("chat template", "tokenizer", tokenizer)?;
    let refused = |problem: String| Failure::Run(format!("the chat template refuses the prompt: {problem}"));
    let rendered = template.prompt(&[serde_json::json!({ "role": "user", "content": text })]).map_err(refused)?;
    let ids = tokenizer.encode_template(&rendered)?.into_iter().map(|(id, _)| id).collect();
    Ok(Prompt { shown: "", ids, stops: stops(tokenizer)? })
}

/// The tokens after which a model has said what it has to say: the end of a text, and that of an answer in its chat template,
/// where it is a token of its own.
fn stops(tokenizer: &Tokenizer) -> Result<Vec<u32>, Failure> {
    let mut stops: Vec<u32> = tokenizer.end_of_text().into_iter().collect();
    if tokenizer.chat_template().is_some() {
        let end = end_of_answer(&chat_template("chat template", "tokenizer", tokenizer)?, tokenizer)?;
        stops.extend(end.filter(|id| !stops.contains(id)));
    }
    Ok(stops)
}

/// Writes a prompt and what the model makes of it to standard output, as it comes. Gives how many tokens came, and the text.
pub fn write_text(
    model: &Decoder,
    tokenizer: &Tokenizer,
    prompt: &Prompt<'_>,
    sampling: &Sampling,
) -> Result<(usize, String), Failure> {
    let on_terminal = std::io::stdout().is_terminal();
    let show = |text: &str| match on_terminal {
        true => print(format_args!("{}", harmless(text))),
        false => print(format_args!("{text}")),
    };
    show(prompt.shown)?;
    let (mut stream, mut written, mut all) = (StreamDecoder::new(tokenizer), Ok(()), prompt.shown.to_owned());
    let new = polyhead_models::generate(model, &prompt.ids, sampling, tokenizer.end_of_text(), |token| {
        if prompt.stops.contains(&token) {
            return ControlFlow::Break(());
        }
        written = stream.push(token).map_or(Ok(()), |text| {
            all.push_str(&text);
            show(&text)
        });
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    written?;
    put!("")?;
    Ok((new.len(), all))
}

/// The tokenizer of a model that needs one for what is asked of it.
///
/// # Errors
/// If it has none.
pub fn text_tokenizer<'a>(tokenizer: Option<&'a Tokenizer>, path: &Path) -> Result<&'a Tokenizer, Failure> {
    let problem =
        || format!("{} has no tokenizer: it learned generated data, or its {TOKENIZER} is missing", path.display());
    tokenizer.ok_or_else(|| Failure::Run(problem()))
}

/// How a model is exported.
pub struct Export {
    /// Whether decoupled heads are repeated.
    pub expanded: bool,
    /// Whether a mask may be lost.
    pub without_mask: bool,
    /// Whether the class has to be one of transformers' own.
    pub native: bool,
}

/// Writes the model in Hugging Face's format: the whole folder, or nothing.
pub fn export((checkpoint, device): (&Path, Option<&str>), to: &Path, how: Export) -> Result<(), Failure> {
    // What a finished export of the same left is compared below; anything else is refused before work is done.
    if !hf::files::is_folder(to) {
        must_not_exist(to)?;
    }
    let mut trained = open_trained(checkpoint, device.or(Some("flex")), caller())?;
    if let Some(gate) = trained.model.gate().filter(|_| !how.without_mask) {
        let problem = format!(
            "{} is evaluated with a mask behind layer {} (mask_at_eval), which Hugging Face's format has no place for: \
             --without-mask writes the weights alone, which compute something else",
            trained.path.display(),
            gate.after_layer
        );
        return Err(polyhead_recipe::Problems::plain(problem).into());
    }
    if how.expanded {
        trained.model = surgery::expanded(&trained.model)?;
    }
    let tokenizer = trained.tokenizer.as_ref();
    let options = ExportOptions {
        max_positions: trained.max_positions,
        begin_of_text: tokenizer.and_then(Tokenizer::begin_of_text),
        end_of_text: tokenizer.and_then(Tokenizer::end_of_text),
        pad: tokenizer.map(Tokenizer::pad),
        native: how.native,
    };
    let exported = hf::export(&trained.model, options).map_err(|error| Failure::Run(error.to_string()))?;
    let mut files = exported.files.clone();
    if let Some(tokenizer) = &trained.tokenizer {
        let stops = stops(tokenizer)?;
        if stops.len() > 1
            && let Some((_, bytes)) = files.iter_mut().find(|(name, _)| name == hf::files::GENERATION_CONFIG)
        {
            let broken = |error: serde_json::Error| Failure::Run(format!("{}: {error}", hf::files::GENERATION_CONFIG));
            let mut config: serde_json::Value = serde_json::from_slice(bytes).map_err(broken)?;
            config["eos_token_id"] = serde_json::json!(stops);
            *bytes = format!("{config:#}\n").into_bytes();
        }
        files.extend(tokenizer_files(tokenizer));
    }
    let same = |(name, bytes): &(String, Vec<u8>)| std::fs::read(to.join(name)).is_ok_and(|there| there == *bytes);
    if to.exists() && files.iter().all(same) && holds(&to.join(WEIGHTS), &exported) {
        talk!("{} holds this export already, whole", to.display());
        return Ok(());
    }
    let folder = NewFolder::begin(to)?;
    for (name, bytes) in &files {
        atomic_write(&folder.path().join(name), bytes)?;
    }
    atomic_write_with(&folder.path().join(WEIGHTS), |out| {
        exported.write_weights(&mut Counted { out, written: 0, all: exported.bytes() })
    })?;
    folder.finish()?;
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).chain([WEIGHTS]).collect();
    talk!("wrote {} to {}", names.join(", "), to.display());
    hf::notes(&trained.model, options).iter().for_each(|note| talk!("note: {note}"));
    Ok(())
}

/// Tells how much of so many bytes has been written.
struct Counted<'a> {
    out: &'a mut dyn Write,
    written: u64,
    all: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.written += written as u64;
        progress("exporting", self.written, self.all);
        Ok(written)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// Whether a file holds the weights of an export, and nothing else.
fn holds(path: &Path, exported: &hf::Exported) -> bool {
    /// Compares what is written with a file, piece by piece.
    struct Compared(BufReader<File>, Vec<u8>);
    impl Write for Compared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.1.resize(bytes.len(), 0);
            self.0.read_exact(&mut self.1)?;
            if self.1 == bytes { Ok(bytes.len()) } else { Err(ErrorKind::InvalidData.into()) }
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let Ok(file) = File::open(path) else { return false };
    let mut compared = Compared(BufReader::new(file), Vec::new());
    exported.write_weights(&mut compared).is_ok() && compared.0.fill_buf().is_ok_and(<[u8]>::is_empty)
}

/// Writes the logits of tokens, or of a text.
pub fn logits(
    (checkpoint, device): (&Path, Option<&str>),
    tokens: &[u32],
    text: Option<&str>,
    out: &Path,
) -> Result<(), Failure> {
    let trained = open_trained(checkpoint, device, caller())?;
    let vocab = trained.model.vocab_size();
    let tokens = match text {
        None => tokens.to_vec(),
        Some(text) => text_tokenizer(trained.tokenizer.as_ref(), &trained.path)?.encode_prompt(text)?,
    };
    if tokens.is_empty() {
        return Err(polyhead_recipe::Problems::plain("--text is no token long: give a longer one".into()).into());
    }
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= vocab) {
        return Err(polyhead_recipe::Problems::plain(format!(
            "--tokens: id {id} is not below the vocabulary ({vocab})"
        ))
        .into());
    }
    let ids: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
    let input = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, tokens.len()]), &trained.model.device());
    let hidden = trained.model.forward(input, &Mask::causal(), None, Observe::Nothing).hidden;
    let logits = trained.model.logits(hidden);
    let shape = logits.dims().to_vec();
    let named = [
        Named { name: "logits".into(), shape, values: logits.into_data().iter::<f32>().collect() },
        // Exact in f32 below 2^24, more ids than any vocabulary has.
        Named {
            name: "tokens".into(),
            shape: vec![1, tokens.len()],
            values: tokens.iter().map(|&id| id as f32).collect(),
        },
    ];
    atomic_write(out, &to_safetensors(&named, &[])?)?;
    talk!("wrote {} tokens x {vocab} logits to {}", tokens.len(), out.display());
    Ok(())
}
