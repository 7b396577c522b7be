//! TensorBoard event files: scalars, histograms, text and images, written and read back.
//!
//! An event file is a sequence of records (`record.rs`), each one protocol-buffer message `Event`
//! (`message.rs`), as `tensorflow/core/lib/io/record_writer.h` and `tensorflow/core/util/event.proto`
//! define them. Values are written in the forms that TensorBoard has read since its first version
//! (`simple_value`, `histo`, `image`) and text as a string tensor of the plugin "text".
//!
//! Why not the crate `tensorboard-rs` (0.5.9): its `add_histogram`, `add_text` and `add_images` are
//! not written yet (they panic), it panics on I/O errors such as a full disk, does not buffer what it writes,
//! and cannot resume: a continued run would show the abandoned steps twice.
//!
//! **Resuming.** [`EventWriter::create`] with `purge_after = Some(s)` first rewrites the folder's
//! earlier event files (each atomically) without the events of steps greater than `s` and without
//! the torn record that a kill may have left, and then opens a new file. That file begins with a
//! session start at `s + 1`, which tells a TensorBoard that is already running to forget the rest.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::run_folder::{At, FileError};

mod histogram;
mod message;
mod read;
mod record;
mod resume;

pub use read::{Event, EventValue, read_events};

/// Pending bytes beyond which the writer writes without being asked to (chosen by us).
const BUFFER: usize = 1 << 18;

/// Why events cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum TensorboardError {
    /// The operating system refused an operation.
    #[error(transparent)]
    File(#[from] FileError),
    /// A value has no name.
    #[error("tag is empty: name the value, for example loss/train")]
    EmptyTag,
    /// The bytes of an image are something else.
    #[error("the bytes of image {tag} are not a PNG file: encode the image first")]
    NotPng {
        /// The image's tag.
        tag: String,
    },
    /// Something that must be an event file is not one.
    #[error("{} is not a TensorBoard event file: {reason}", path.display())]
    NotEvents {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// One event file being written.
///
/// Events are kept in memory until [`flush`](Self::flush), until 256 KiB have come together, or
/// until the writer is dropped. After an error nothing is lost or torn: what could not be written
/// stays pending, and the next flush goes on where the last one stopped.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
    pending: Vec<u8>,
}

impl EventWriter {
    /// Opens a new event file in `dir`, creating the folder if need be.
    ///
    /// `purge_after = Some(s)` continues a run from step `s`: earlier files keep the events of
    /// steps up to and including `s`. `None` starts a run from nothing: earlier event files
    /// of the folder are removed.
    ///
    /// # Errors
    /// If an earlier file cannot be rewritten or the new one cannot be made.
    pub fn create(dir: &Path, purge_after: Option<u64>) -> Result<Self, TensorboardError> {
        fs::create_dir_all(dir).at("create", dir)?;
        let earlier = resume::purge(dir, purge_after)?;
        // TensorBoard reads files in the order of their names, so a new one must sort last, even
        // if the clock was set back or the run was restarted within the second.
        let seconds = match earlier {
            Some(newest) => newest.saturating_add(1).max(now() as u64),
            None => now() as u64,
        };
        let name = format!("events.out.tfevents.{seconds:010}.polyhead.{}", std::process::id());
        let path = dir.join(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&path).at("create", &path)?;
        let mut writer = Self { path, file, pending: Vec::new() };
        writer.push(&message::file_version(now()))?;
        if let Some(step) = purge_after {
            writer.push(&message::session_start(now(), step.saturating_add(1)))?;
        }
        writer.flush()?;
        Ok(writer)
    }

    /// The event file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds one number.
    ///
    /// # Errors
    /// An empty tag; a full buffer that cannot be written.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f32) -> Result<(), TensorboardError> {
        self.value(tag, step, message::scalar(value))
    }

    /// Adds one number with words about it, which TensorBoard shows beside its curve.
    ///
    /// # Errors
    /// As for [`scalar`](Self::scalar).
    pub fn described_scalar(&mut self, tag: &str, step: u64, value: f32, about: &str) -> Result<(), TensorboardError> {
        self.value(tag, step, message::scalar(value).described(about))
    }

    /// Adds the distribution of `values`, in TensorFlow's exponential buckets.
    ///
    /// NaN and infinities are left out; their number is returned and, where it is not zero, also
    /// written as the scalar `<tag>/non_finite`. Without any finite value no histogram is written.
    ///
    /// # Errors
    /// As for [`scalar`](Self::scalar).
    pub fn histogram(&mut self, tag: &str, step: u64, values: &[f32]) -> Result<usize, TensorboardError> {
        let histogram = histogram::Histogram::of(values);
        if histogram.num > 0.0 {
            self.value(tag, step, message::histogram(&histogram))?;
        }
        let non_finite = values.len() - histogram.num as usize;
        if non_finite > 0 {
            self.scalar(&format!("{tag}/non_finite"), step, non_finite as f32)?;
        }
        Ok(non_finite)
    }

    /// Adds a text, which TensorBoard renders as Markdown.
    ///
    /// # Errors
    /// As for [`scalar`](Self::scalar).
    pub fn text(&mut self, tag: &str, step: u64, markdown: &str) -> Result<(), TensorboardError> {
        self.value(tag, step, message::text(markdown))
    }

    /// Tells the plugin "hparams" what decides this run: a row of its table of runs. Values are numbers, texts, true or false.
    ///
    /// # Errors
    /// As for [`scalar`](Self::scalar).
    pub fn hyperparameters(&mut self, values: &[(String, serde_json::Value)]) -> Result<(), TensorboardError> {
        self.value(message::SESSION_START_TAG, 0, message::hyperparameters(values, now()))
    }

    /// Adds a PNG file of `width` x `height` pixels.
    ///
    /// # Errors
    /// As for [`scalar`](Self::scalar), and if `png` does not begin as a PNG file does.
    pub fn image_png(
        &mut self,
        tag: &str,
        step: u64,
        width: u32,
        height: u32,
        png: &[u8],
    ) -> Result<(), TensorboardError> {
        if !png.starts_with(b"\x89PNG\r\n\x1a\n") {
            return Err(TensorboardError::NotPng { tag: tag.into() });
        }
        self.value(tag, step, message::image(width, height, png))
    }

    /// Hands all pending events to the operating system: a killed process then loses none.
    ///
    /// To be called before a checkpoint is committed, or a resumed run lacks the events between.
    ///
    /// # Errors
    /// If the file cannot be written, for example because the disk is full.
    pub fn flush(&mut self) -> Result<(), TensorboardError> {
        let mut done = 0;
        let outcome = loop {
            if done == self.pending.len() {
                break Ok(());
            }
            match self.file.write(&self.pending[done..]) {
                Ok(0) => break Err(std::io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(cause) if cause.kind() == std::io::ErrorKind::Interrupted => {}
                Err(cause) => break Err(cause),
            }
        };
        self.pending.drain(..done);
        Ok(outcome.at("write", &self.path)?)
    }

    /// [`flush`](Self::flush), and makes the events survive a power cut.
    ///
    /// # Errors
    /// As for [`flush`](Self::flush).
    pub fn sync(&mut self) -> Result<(), TensorboardError> {
        self.flush()?;
        Ok(self.file.sync_data().at("sync", &self.path)?)
    }

    fn value(&mut self, tag: &str, step: u64, value: message::Value) -> Result<(), TensorboardError> {
        if tag.is_empty() {
            return Err(TensorboardError::EmptyTag);
        }
        self.push(&message::summary(now(), step, tag, value))
    }

    fn push(&mut self, message: &[u8]) -> Result<(), TensorboardError> {
        record::append(&mut self.pending, message);
        if self.pending.len() >= BUFFER {
            self.flush()?;
        }
        Ok(())
    }
}

impl Drop for EventWriter {
    fn drop(&mut self) {
        // Nobody is left to tell about an error; whoever needs to know calls `flush`.
        let _ = self.flush();
    }
}

/// Seconds since 1970, what TensorBoard calls wall time.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

#[cfg(test)]
mod tests;
