//! Folders of sounds: WAV files, one folder a class, as log-mel pictures.

use std::path::PathBuf;
use std::sync::Arc;

use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::image_folder::{ClassFiles, class_files};
use super::log_mel::{LogMel, LogMelConfig};
use super::{AugmentConfig, Classes, Content, Example, ExampleSet, Labelled, divide, loader, wav};
use crate::files::{OnBadFile, read_file};
use crate::loader::Order;
use crate::synthetic::Problem;
use crate::{DataError, OpenOptions};

/// `[data.wav_folder]`: WAV files in folders that are named for their classes, PCM of 8 to 32 bits or floats; several channels are
/// averaged. Sounds are shown from their beginning on.
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
    /// How sounds become pictures.
    #[serde(default)]
    pub log_mel: LogMelConfig,
    /// What is done with a file that is damaged, cut off, of another kind or of another sample rate: "error" (default), or
    /// "skip", which counts and names what it leaves out.
    #[serde(default, skip_serializing_if = "OnBadFile::is_default")]
    pub on_bad_file: OnBadFile,
}

impl WavFolderConfig {
    /// Checks the settings without touching a file.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self) -> Result<(), Problem> {
        if !(1000..=384_000).contains(&self.sample_rate) {
            return Err(("sample_rate", format!("sample_rate ({}) must be 1000 to 384000", self.sample_rate)));
        }
        self.log_mel.validate(self.sample_rate)
    }

    /// The sound, if it has as many samples a second as all must have.
    fn checked(&self, sound: wav::Sound) -> Result<wav::Sound, String> {
        match sound.sample_rate == self.sample_rate {
            true => Ok(sound),
            false => Err(format!(
                "{} samples per second, not {}: set data.wav_folder.sample_rate, or resample",
                sound.sample_rate, self.sample_rate
            )),
        }
    }
}

/// Sounds as pictures, in memory.
struct Sounds {
    pictures: Arc<Vec<Example>>,
    indices: Vec<u32>,
    shape: InputShape,
}

impl ExampleSet for Sounds {
    fn shape(&self) -> InputShape {
        self.shape
    }

    fn per_epoch(&self) -> u64 {
        self.indices.len() as u64
    }

    fn example(&self, index: u64) -> Result<Example, DataError> {
        Ok(self.pictures[self.indices[index as usize] as usize].clone())
    }
}

pub(super) fn open(
    config: &WavFolderConfig,
    augment: &AugmentConfig,
    options: &OpenOptions,
) -> Result<Labelled, DataError> {
    let log_mel = LogMel::new(&config.log_mel, config.sample_rate);
    let ClassFiles { classes, files, mut left_out } = class_files(&config.path, &["wav"], None)?;
    let mut sides = vec![files];
    if let Some(path) = &config.validation_path {
        let more = class_files(path, &["wav"], Some(&classes))?;
        left_out.extend(more.left_out);
        sides.push(more.files);
    }
    let (mut hash, mut pictures, mut cut, mut streamed) = (blake3::Hasher::new(), Vec::new(), 0, 0);
    let mut learned = 0;
    for files in sides {
        learned = pictures.len();
        for (path, label) in files {
            let sound =
                match (wav::read(&read_file(&path)?).and_then(|sound| config.checked(sound)), config.on_bad_file) {
                    (Ok(sound), _) => sound,
                    (Err(problem), OnBadFile::Skip) => {
                        left_out.add(&format!("that could not be read: {problem}"), &path);
                        continue;
                    }
                    (Err(problem), OnBadFile::Error) => {
                        let way_out = "replace it, or set data.wav_folder.on_bad_file = \"skip\"";
                        return Err(DataError::Unusable(format!("{}: {problem}; {way_out}", path.display())));
                    }
                };
            cut += usize::from(sound.samples.len() > config.log_mel.samples());
            streamed += usize::from(sound.streamed);
            hash.update(&label.to_le_bytes());
            sound.samples.iter().for_each(|sample| {
                hash.update(&sample.to_le_bytes());
            });
            pictures.push(Example { content: Content::Numbers(log_mel.picture(&sound.samples)), label, group: 0 });
        }
    }
    let [train, validation] = match config.validation_path.is_some() {
        true => [(0..learned as u32).collect(), (learned as u32..pictures.len() as u32).collect()],
        false => divide(pictures.len(), options.validation_fraction)?,
    };
    if train.is_empty() || validation.is_empty() {
        let left_out = left_out.note().unwrap_or_default();
        return Err(DataError::Unusable(format!("data.wav_folder: no file is left on one side; {left_out}")));
    }
    let labels = pictures.iter().map(|example| example.label);
    let mut notes: Vec<String> = left_out.note().into_iter().collect();
    if streamed > 0 {
        notes.push(format!(
            "{streamed} files do not say how long they are (written to a pipe): all up to their end is taken"
        ));
    }
    notes.extend(Classes { names: &classes, data: "wav_folder", field: None }.check(labels)?);
    let mut counts = vec![0; classes.len()];
    train.iter().for_each(|&index: &u32| counts[pictures[index as usize].label as usize] += 1);
    let mut description = format!(
        "WAV files of {} classes: {} for training, {} for validation",
        classes.len(),
        train.len(),
        validation.len()
    );
    if cut > 0 {
        let seconds = config.log_mel.samples() as f64 / f64::from(config.sample_rate);
        description +=
            &format!("; {cut} are longer than the {seconds:.2} s of log_mel.n_frames: what is beyond is cut off");
    }
    let (pictures, shape) = (Arc::new(pictures), config.log_mel.shape());
    let set = |indices| Arc::new(Sounds { pictures: pictures.clone(), indices, shape });
    Ok(Labelled {
        train: loader(set(train), Some(augment), options, Order::Shuffled),
        validation: loader(set(validation), None, options, Order::Once),
        classes,
        counts,
        groups: Vec::new(),
        tokenizer: None,
        description,
        notes,
        text_hash: Some(hash.finalize().to_hex().to_string()),
    })
}
