//! What a run writes down beside its checkpoints: `metrics.jsonl`, TensorBoard's files, `curve.svg`. None of it is worth a run:
//! what cannot be written is told once, kept, and tried again.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use polyhead_models::EvalTotals;
use serde_json::{Value, json};

use super::Logged;
use crate::image::matrix;
use crate::procedure::{Shown, StepReport};
use crate::run_folder::MetricsLog;
use crate::tensorboard::EventWriter;
use crate::{TrainError, curve};

/// The logs of a run.
pub(crate) struct Record {
    run_dir: PathBuf,
    /// Rank 0 alone has logs.
    metrics: Option<MetricsLog>,
    pub(crate) events: Option<EventWriter>,
    notes: Vec<String>,
    told: BTreeSet<String>,
}

impl Record {
    /// No logs: those of another rank than 0.
    pub(super) fn none(run_dir: &Path) -> Self {
        let (notes, told) = (Vec::new(), BTreeSet::new());
        Self { run_dir: run_dir.to_owned(), metrics: None, events: None, notes, told }
    }

    /// Opens the logs: those of a new run, or of one that goes on behind a step.
    ///
    /// # Errors
    /// If `metrics.jsonl` cannot be read or written; nothing is lost then.
    pub(super) fn open(
        run_dir: &Path,
        tensorboard: bool,
        resumed: Option<u64>,
        (recipe, hyperparameters): (&str, &[(String, Value)]),
    ) -> Result<Self, TrainError> {
        let metrics = MetricsLog::open(run_dir, resumed)?;
        let notes = metrics.damaged().into_iter().map(|line| format!("warning: {line}")).collect();
        let mut record = Self { notes, metrics: Some(metrics), ..Self::none(run_dir) };
        if tensorboard {
            match EventWriter::create(run_dir, resumed) {
                Ok(events) => record.events = Some(events),
                Err(error) => record.heed(Err(error.into())),
            }
        }
        if let Some(events) = record.events.as_mut().filter(|_| resumed.is_none()) {
            let written = events.text("recipe", 0, &format!("```toml\n{recipe}\n```"));
            let written = written.and_then(|()| events.hyperparameters(hyperparameters));
            record.heed(written.map_err(Into::into));
        }
        Ok(record)
    }

    /// Notes for whoever watches, each once.
    pub(super) fn note(&mut self, note: String) {
        if self.told.insert(note.clone()) {
            self.notes.push(note);
        }
    }

    /// What there is to tell since the last time.
    pub(super) fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// Keeps in mind what could not be written.
    pub(crate) fn heed(&mut self, written: Result<(), TrainError>) {
        if let Err(error) = written {
            self.note(format!("warning: {error}; the run goes on"));
        }
    }

    /// Adds a line to the log.
    pub(super) fn line(&mut self, line: &serde_json::Value) {
        let appended = self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.append(line));
        self.heed(appended.map_err(Into::into));
    }

    /// Adds numbers to a line of the log, and to the events, whose groups are few: all of these are in `validation`.
    pub(super) fn numbers(&mut self, mut line: serde_json::Value, step: u64, numbers: &[(String, f64)]) {
        for (name, value) in numbers {
            line[name] = json!(value);
        }
        self.line(&line);
        self.write_events(|events| {
            for (name, value) in numbers {
                events.scalar(&validation_tag(name), step, *value as f32)?;
            }
            Ok(())
        });
    }

    /// Writes to the events, where there are any, and hands them to the system.
    pub(crate) fn write_events(&mut self, write: impl FnOnce(&mut EventWriter) -> Result<(), TrainError>) {
        let Some(events) = self.events.as_mut() else { return };
        let written = write(events).and_then(|()| Ok(events.flush()?));
        self.heed(written);
    }

    pub(super) fn step(&mut self, logged: &Logged, report: &StepReport) {
        let penalty = report.penalty;
        let Logged { step, loss, bits_per_byte, grad_norm, lr, tokens_per_second, memory, skipped, .. } = *logged;
        let mut line = json!({
            "step": step, "loss": loss, "loss_bits": loss.to_bits(), "bits_per_byte": bits_per_byte, "penalty": penalty,
            "grad_norm": grad_norm, "learning_rate": lr, "tokens_per_second": tokens_per_second, "memory": memory,
            "skipped": skipped,
        });
        for (name, value) in &report.measured {
            line[name] = json!(value);
        }
        self.line(&line);
        self.write_events(|events| {
            let mut scalar = |tag: &str, value: f64| events.scalar(tag, step, value as f32);
            scalar("loss/train", loss)?;
            scalar("optimizer/grad_norm", grad_norm)?;
            scalar("optimizer/learning_rate", lr)?;
            scalar("system/tokens_per_second", tokens_per_second)?;
            for (tag, value) in [("loss/train_bits_per_byte", bits_per_byte), ("loss/penalty", penalty)] {
                if let Some(value) = value {
                    scalar(tag, value)?;
                }
            }
            for (name, value) in &report.measured {
                scalar(&tag("procedure", name), *value)?;
            }
            if let Some(memory) = memory {
                scalar("system/peak_memory_bytes", memory as f64)?;
            }
            for (name, shown) in &report.shown {
                let tag = tag("procedure", name);
                match shown {
                    Shown::Histogram(values) => {
                        events.histogram(&tag, step, values)?;
                    }
                    Shown::Image(png) => events.image_png(&tag, step, png.width, png.height, &png.bytes)?,
                }
            }
            Ok(())
        });
    }

    pub(super) fn validation(&mut self, step: u64, sums: &impl EvalTotals, measured: &[(String, f64)]) {
        let told = sums.evaluated();
        let (loss, bits, accuracy) = (told.mean_loss(), told.bits_per_byte(), told.accuracy());
        let line = json!({
            "step": step, "validation_loss": loss, "validation_loss_bits": loss.to_bits(),
            "validation_bits_per_byte": bits, "validation_accuracy": accuracy, "validation_targets": told.targets,
        });
        let mut numbers: Vec<(String, f64)> =
            sums.numbers().iter().map(|(name, value)| (name.to_string(), *value)).collect();
        numbers.extend(sums.of_parts());
        numbers.extend_from_slice(measured);
        self.numbers(line, step, &numbers);
        self.write_events(|events| {
            events.scalar("loss/validation", step, loss as f32)?;
            events.scalar("validation/accuracy", step, accuracy as f32)?;
            if let Some(bits) = bits {
                events.scalar("loss/validation_bits_per_byte", step, bits as f32)?;
            }
            for (name, shown) in sums.matrices() {
                let png = matrix(&shown)?;
                events.image_png(&validation_tag(name), step, png.width, png.height, &png.bytes)?;
            }
            Ok(())
        });
    }

    /// Makes everything survive a power cut; to be called before a checkpoint is committed.
    pub(super) fn sync(&mut self) {
        let synced = self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.flush().and_then(|()| metrics.sync()));
        self.heed(synced.map_err(Into::into));
        let synced = self.events.as_mut().map_or(Ok(()), EventWriter::sync);
        self.heed(synced.map_err(Into::into));
    }

    /// The image of the losses.
    pub(super) fn draw(&mut self) {
        if self.metrics.is_some() {
            let drawn = curve::draw(&self.run_dir);
            self.heed(drawn);
        }
    }

    /// Why a log is not complete at the end, where one is not.
    pub(super) fn missing(&mut self) -> Option<String> {
        let metrics = self.metrics.as_mut().and_then(|metrics| metrics.flush().err()).map(|error| error.to_string());
        metrics.or_else(|| self.events.as_mut()?.flush().err().map(|error| error.to_string()))
    }
}

/// Where TensorBoard shows what was measured with a validation: `macro_f1/validation` becomes `validation/macro_f1`.
fn validation_tag(name: &str) -> String {
    tag("validation", name.strip_suffix("/validation").unwrap_or(name))
}

/// A name in its group of TensorBoard; losses have one of their own.
fn tag(group: &str, name: &str) -> String {
    if name.starts_with("loss/") { name.to_owned() } else { format!("{group}/{name}") }
}
