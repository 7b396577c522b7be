//! `polyhead export` and `logits`: a trained model for other software.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::path::Path;

use burn::tensor::{Int, Tensor, TensorData};
use polyhead_data::Tokenizer;
use polyhead_models::Pass;
use polyhead_models::hf::{self, ExportOptions};
use polyhead_models::intervention::Context;
use polyhead_models::surgery;
use polyhead_models::weights::{Named, to_safetensors};
use polyhead_runs::answer::stops;
use polyhead_runs::peft::adapter_files;
use polyhead_runs::pretrained::{Pretrained, tokenizer_files};
use polyhead_runs::{Failure, Trained, open_decoder};
use polyhead_training::run_folder::{atomic_write, atomic_write_with, files::WEIGHTS};

use super::must_not_exist;
use super::new_folder::NewFolder;
use crate::allowed::caller;
use crate::console::{progress, talk};

/// How a model is exported.
pub struct Export {
    /// Whether decoupled heads are repeated.
    pub expanded: bool,
    /// Whether a mask may be lost.
    pub without_mask: bool,
    /// Whether the class has to be one of transformers' own.
    pub native: bool,
    /// Whether low-rank pairs are written alone.
    pub adapter: bool,
}

/// Writes the model in Hugging Face's format: the whole folder, or nothing.
pub fn export((checkpoint, device): (&Path, Option<&str>), to: &Path, how: Export) -> Result<(), Failure> {
    // What a finished export of the same left is compared below; anything else is refused before work is done.
    if !hf::files::is_folder(to) {
        must_not_exist(to)?;
    }
    let mut trained = open_decoder(checkpoint, device.or(Some("flex")), caller())?;
    if let Some(gate) = trained.model.gate().filter(|_| !how.without_mask) {
        let problem = format!(
            "{} is evaluated with a mask behind layer {} (mask_at_eval), which Hugging Face's format has no place for: \
             --without-mask writes the weights alone, which compute something else",
            trained.path.display(),
            gate.after_layer
        );
        return Err(polyhead_recipe::Problems::plain(problem).into());
    }
    if trained.model.intervention().is_some() {
        talk!("warning: {} is used with an intervention, which is not written", trained.path.display());
    }
    if how.adapter {
        return export_adapter(&trained, to);
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

/// Writes the low-rank pairs of a run for PEFT, with its tokenizer: the whole folder, or nothing.
fn export_adapter(trained: &Trained, to: &Path) -> Result<(), Failure> {
    let mut files = adapter_files(&Pretrained::open(&trained.path, caller())?, caller())?;
    files.extend(trained.tokenizer.iter().flat_map(tokenizer_files));
    must_not_exist(to)?;
    let folder = NewFolder::begin(to)?;
    for (name, bytes) in &files {
        atomic_write(&folder.path().join(name), bytes)?;
    }
    folder.finish()?;
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    talk!("wrote {} to {}", names.join(", "), to.display());
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
    (checkpoint, device, intervention): (&Path, Option<&str>, Option<&Path>),
    tokens: &[u32],
    text: Option<&str>,
    out: &Path,
) -> Result<(), Failure> {
    let trained = open_decoder(checkpoint, device, caller())?.intervened(intervention)?;
    let vocab = trained.model.vocab_size();
    let known = trained.model.config().rows(vocab);
    let tokens = match text {
        None => tokens.to_vec(),
        Some(text) => trained.text_tokenizer()?.encode_prompt(text)?,
    };
    if tokens.is_empty() {
        return Err(polyhead_recipe::Problems::plain("--text is no token long: give a longer one".into()).into());
    }
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= known) {
        return Err(polyhead_recipe::Problems::plain(format!(
            "--tokens: id {id} is not below the vocabulary ({known})"
        ))
        .into());
    }
    let ids: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
    let input = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, tokens.len()]), &trained.model.device());
    let context = Context { rows: 1, tokens: &tokens, roles: &[], prompt: tokens.len(), ..Context::default() };
    trained.check_phases()?.iter().for_each(|note| talk!("note: {note}"));
    trained.check_spans(&context, tokens.len())?;
    let mask = trained.model.mask_of_text();
    let hidden = trained.model.pass(input, Pass { context: Some(context), ..Pass::new(&mask) }).hidden;
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
