//! WAV files as log-mel images, one folder a class.

use std::path::PathBuf;

use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::log_mel::{LogMel, LogMelConfig};
use super::wav;
use crate::batches::{Content, Example};
use crate::examples::Found;
use crate::examples::class_folders::{ClassFolders, Read};
use crate::files::OnBad;
use crate::problem::{Problem, shown, within};
use crate::source::Source;
use crate::{Data, DataError, Opening};

/// `[data.wav_folder]`: WAV files in folders that are named for their classes, PCM of 8 to 32 bits or floats; several channels are
/// averaged. Audio is read from its beginning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WavFolderConfig {
    /// The folder with a folder for each class.
    pub path: PathBuf,
    /// Such a folder to validate on. Default: a share of the others, validation.fraction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_path: Option<PathBuf>,
    /// Samples per second that every file must have: none is resampled.
    pub sample_rate: u32,
    /// How audio becomes images.
    #[serde(default)]
    pub log_mel: LogMelConfig,
    /// What is done with a file that is damaged, cut off, of another kind or of another sample rate: "error" (default), or
    /// "skip", which counts and names what it leaves out.
    #[serde(default, skip_serializing_if = "crate::problem::is_default")]
    pub on_bad_file: OnBad,
}

impl Source for WavFolderConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        within("sample_rate", self.sample_rate, 1000..=384_000)?;
        self.log_mel.validate(self.sample_rate)
    }

    fn paths(&self) -> Vec<String> {
        shown([&self.path].into_iter().chain(&self.validation_path))
    }

    fn shape(&self) -> Option<InputShape> {
        Some(self.log_mel.shape())
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let log_mel = LogMel::new(&self.log_mel, self.sample_rate);
        let (mut hash, mut cut, mut streamed) = (blake3::Hasher::new(), 0, 0);
        let folders = ClassFolders {
            name: opening.name,
            path: &self.path,
            validation_path: self.validation_path.as_ref(),
            endings: &["wav"],
            on_bad_file: self.on_bad_file,
        };
        let Read { classes, items, to_train, left_out } = folders.read(|bytes, label| {
            let audio = self.checked(wav::read(bytes)?)?;
            cut += usize::from(audio.samples.len() > self.log_mel.samples());
            streamed += usize::from(audio.streamed);
            hash.update(&label.to_le_bytes());
            audio.samples.iter().for_each(|sample| {
                hash.update(&sample.to_le_bytes());
            });
            Ok(log_mel.image(&audio.samples))
        })?;
        let mut notes: Vec<String> = left_out.note().into_iter().collect();
        if streamed > 0 {
            notes.push(format!(
                "{streamed} files do not say how long they are (written to a pipe): all up to their end is taken"
            ));
        }
        let seconds = self.log_mel.samples() as f64 / f64::from(self.sample_rate);
        let also = match cut {
            0 => String::new(),
            _ => format!("; {cut} are longer than the {seconds:.2} s of log_mel.n_frames: what is beyond is cut off"),
        };
        let found = Found {
            what: "WAV files".into(),
            shape: self.log_mel.shape(),
            labels: items.iter().map(|(_, label)| *label).collect(),
            to_train,
            classes,
            label_field: None,
            groups: Vec::new(),
            example: Box::new(move |at| {
                let (image, label) = &items[at];
                Ok(Example { content: Content::Numbers(image.clone()), label: *label, group: 0 })
            }),
            notes,
            hash,
        };
        found.open(&also, opening)
    }
}

impl WavFolderConfig {
    /// The audio, if it has as many samples a second as all must have.
    fn checked(&self, audio: wav::Audio) -> Result<wav::Audio, String> {
        match audio.sample_rate == self.sample_rate {
            true => Ok(audio),
            false => Err(format!(
                "{} samples per second, not {}: set data.wav_folder.sample_rate, or resample",
                audio.sample_rate, self.sample_rate
            )),
        }
    }
}
