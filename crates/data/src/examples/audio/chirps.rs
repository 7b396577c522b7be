//! Generated audio: chirps and tones in noise, as log-mel images.

use polyhead_models::InputShape;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::log_mel::{LogMel, LogMelConfig};
use crate::examples::{Maker, generated};
use crate::problem::{Problem, within};
use crate::random::normal;
use crate::{Data, DataError, Opening, Source};

const SAMPLE_RATE: u32 = 8000;
/// The classes, in order.
const SOUNDS: [&str; 8] =
    ["tone", "rising", "falling", "rise_and_fall", "warble", "tremolo", "two_tones", "two_crossing"];

/// `[data.chirps]`: audio of 8000 samples a second with noise, as a log-mel image. Classes, in order: tone, rising, falling,
/// rise_and_fall, warble (its pitch swings), tremolo (its loudness does), two_tones, two_crossing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ChirpsConfig {
    /// The first so many kinds of audio, 2 to 8. Default: 8.
    pub n_classes: usize,
    /// Standard deviation of the noise, where samples go from -1 to 1. Default: 0.5.
    pub noise: f64,
    /// Clicks per second on average: impulses that are louder than the rest. Default: 0.
    pub clicks: f64,
    /// How audio becomes images.
    pub log_mel: LogMelConfig,
}

impl Default for ChirpsConfig {
    fn default() -> Self {
        Self { n_classes: 8, noise: 0.5, clicks: 0.0, log_mel: LogMelConfig::default() }
    }
}

impl Source for ChirpsConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        within("n_classes", self.n_classes, 2..=SOUNDS.len())?;
        within("noise", self.noise, 0.0..=1000.0)?;
        within("clicks", self.clicks, 0.0..=1000.0)?;
        self.log_mel.validate(SAMPLE_RATE)
    }

    fn shape(&self) -> Option<InputShape> {
        Some(self.log_mel.shape())
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        generated(Chirps::new(self), opening.name, None, opening)
    }
}

/// What makes the audio.
#[derive(Clone)]
pub(super) struct Chirps {
    config: ChirpsConfig,
    log_mel: LogMel,
}

impl Chirps {
    pub(super) fn new(config: &ChirpsConfig) -> Self {
        Self { config: config.clone(), log_mel: LogMel::new(&config.log_mel, SAMPLE_RATE) }
    }

    fn audio(&self, class: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
        let count = self.config.log_mel.samples();
        let mut between = |low: f32, high: f32| low + (high - low) * rng.random::<f32>();
        let low = 300.0 * between(0.0, 1.8).exp(); // 300 to 1800 Hz, evenly in pitch
        let (high, swing) = (low * between(1.6, 2.2), between(4.0, 9.0));
        let (start, length) = (between(0.0, 0.25), between(0.6, 0.75));
        let whole = count as f32 / SAMPLE_RATE as f32;
        let mut phases = [0f32; 2];
        let mut samples = Vec::with_capacity(count);
        for i in 0..count {
            let at = (i as f32 / count as f32 - start) / length; // 0 to 1 while it sounds
            if !(0.0..=1.0).contains(&at) {
                samples.push(0.0);
                continue;
            }
            let wave = (std::f32::consts::TAU * swing * at * length * whole).sin();
            let bent = |share: f32| low + (high - low) * share;
            let (pitches, loudness) = match class {
                0 => ([low, 0.0], 1.0),
                1 => ([bent(at), 0.0], 1.0),
                2 => ([bent(1.0 - at), 0.0], 1.0),
                3 => ([bent(1.0 - (2.0 * at - 1.0).abs()), 0.0], 1.0),
                4 => ([low * (1.0 + 0.2 * wave), 0.0], 1.0),
                5 => ([low, 0.0], 0.5 + 0.5 * wave),
                6 => ([low, high], 0.5),
                _ => ([bent(at), bent(1.0 - at)], 0.5),
            };
            let mut value = 0.0;
            for (phase, pitch) in phases.iter_mut().zip(pitches).filter(|(_, pitch)| *pitch > 0.0) {
                *phase = (*phase + pitch / SAMPLE_RATE as f32).fract();
                value += (std::f32::consts::TAU * *phase).sin();
            }
            let fade = (20.0 * at.min(1.0 - at)).min(1.0);
            samples.push(value * loudness * fade);
        }
        samples
    }
}

impl Maker for Chirps {
    fn shape(&self) -> InputShape {
        self.config.log_mel.shape()
    }

    fn classes(&self) -> Vec<String> {
        SOUNDS[..self.config.n_classes].iter().map(|&name| name.to_owned()).collect()
    }

    fn make(&self, class: usize, _group: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
        let mut samples = self.audio(class, rng);
        let click = self.config.clicks as f32 / SAMPLE_RATE as f32;
        for sample in &mut samples {
            *sample += self.config.noise as f32 * normal(rng);
            if rng.random::<f32>() < click {
                *sample += 10.0 * normal(rng);
            }
        }
        self.log_mel.image(&samples)
    }
}
