//! Folders of sounds: WAV files, one folder a class, as log-mel pictures.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hound::{SampleFormat, WavReader};
use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::image_folder::labelled_files;
use super::log_mel::{LogMel, LogMelConfig};
use super::{AugmentConfig, Content, Example, ExampleSet, Labelled, divide, loader};
use crate::loader::Order;
use crate::synthetic::Problem;
use crate::{DataError, OpenOptions};

/// `[data.wav_folder]`: WAV files in folders that are named for their classes, of whole numbers or f32; several channels are
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
    let (classes, mut files) = labelled_files(&config.path, &["wav"], None)?;
    let learnt = files.len();
    if let Some(path) = &config.validation_path {
        files.extend(labelled_files(path, &["wav"], Some(&classes))?.1);
    }
    let (mut hash, mut pictures, mut cut) = (blake3::Hasher::new(), Vec::new(), 0);
    for (path, label) in files {
        let samples = read(&path, config.sample_rate)?;
        cut += usize::from(samples.len() > config.log_mel.samples());
        hash.update(&label.to_le_bytes());
        samples.iter().for_each(|sample| {
            hash.update(&sample.to_le_bytes());
        });
        pictures.push(Example { content: Content::Numbers(log_mel.picture(&samples)), label, group: 0 });
    }
    let [train, validation] = match pictures.len() > learnt {
        true => [(0..learnt as u32).collect(), (learnt as u32..pictures.len() as u32).collect()],
        false => divide(learnt, options.validation_fraction)?,
    };
    let mut counts = vec![0; classes.len()];
    train.iter().for_each(|&index| counts[pictures[index as usize].label as usize] += 1);
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
        text_hash: Some(hash.finalize().to_hex().to_string()),
    })
}

/// A file's samples, from -1 to 1.
fn read(path: &Path, sample_rate: u32) -> Result<Vec<f32>, DataError> {
    let unusable = |problem: String| DataError::Unusable(format!("{}: {problem}", path.display()));
    let mut reader = WavReader::open(path).map_err(|error| unusable(error.to_string()))?;
    let spec = reader.spec();
    if spec.sample_rate != sample_rate {
        let problem = format!("{} samples per second, not {sample_rate}", spec.sample_rate);
        return Err(unusable(format!("{problem}: set data.wav_folder.sample_rate, or resample")));
    }
    let all: Result<Vec<f32>, hound::Error> = match spec.sample_format {
        SampleFormat::Float => reader.samples::<f32>().collect(),
        SampleFormat::Int => {
            let full = (1u64 << (spec.bits_per_sample - 1)) as f32;
            reader.samples::<i32>().map(|sample| Ok(sample? as f32 / full)).collect()
        }
    };
    let all = all.map_err(|error| unusable(error.to_string()))?;
    if let Some(at) = all.iter().position(|sample| !sample.is_finite()) {
        return Err(unusable(format!("sample {at} is {}", all[at])));
    }
    let channels = usize::from(spec.channels);
    Ok(all.chunks(channels).map(|frame| frame.iter().sum::<f32>() / channels as f32).collect())
}
