//! Audio as an image: the logarithm of its energy over time and pitch.
//!
//! ```text
//! frames of n_fft samples, hop apart, under a Hann window  ->  |FFT|²  ->  triangles on the mel scale  ->  ln(· + 1e-6)
//!   ->  minus their mean, divided by their standard deviation, over the whole image
//! ```
//! The mel scale is HTK's, m = 2595 log10(1 + f/700), and triangles are of height 1, as torchaudio's are by default. The last
//! line is ours: loudness says nothing about a class.

use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::fourier::Fourier;
use crate::problem::{Problem, require, within};

/// Settings of a log-mel spectrogram. The defaults are chosen by us for short audio on small models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LogMelConfig {
    /// Samples of a frame, a power of two. Default: 256.
    pub n_fft: usize,
    /// Samples from one frame to the next. Default: 128.
    pub hop: usize,
    /// Bands: the height of the image. Default: 32.
    pub n_mels: usize,
    /// Frames: the width of the image. What is longer is cut, what is shorter filled up with silence. Default: 32.
    pub n_frames: usize,
}

impl Default for LogMelConfig {
    fn default() -> Self {
        Self { n_fft: 256, hop: 128, n_mels: 32, n_frames: 32 }
    }
}

impl LogMelConfig {
    /// Checks the settings, for audio of so many samples per second.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self, sample_rate: u32) -> Result<(), Problem> {
        require(self.n_fft.is_power_of_two(), "log_mel.n_fft", || {
            format!("log_mel.n_fft ({}) must be a power of two", self.n_fft)
        })?;
        within("log_mel.n_fft", self.n_fft, 16..=1 << 16)?;
        within("log_mel.hop", self.hop, 1..=1 << 16)?;
        within("log_mel.n_frames", self.n_frames, 1..=1 << 14)?;
        within("log_mel.n_mels", self.n_mels, 1..=self.n_fft / 2)?;
        let dead = |band: &Vec<f32>| band.iter().all(|&weight| weight == 0.0);
        let dead = self.bands(sample_rate).iter().filter(|band| dead(band)).count();
        require(dead == 0, "log_mel.n_mels", || {
            format!(
                "log_mel.n_mels ({}): {dead} of the bands fall between two frequencies that n_fft ({}) tells apart at \
                 {sample_rate} samples per second, and would stay black: fewer bands, or a larger n_fft",
                self.n_mels, self.n_fft
            )
        })
    }

    /// Triangles of height 1 on the mel scale, `[n_mels, n_fft / 2 + 1]`.
    fn bands(&self, sample_rate: u32) -> Vec<Vec<f32>> {
        let mel = |hertz: f64| 2595.0 * (1.0 + hertz / 700.0).log10();
        let highest = mel(f64::from(sample_rate) / 2.0);
        let edge = |at: usize| 700.0 * (10f64.powf(highest * at as f64 / (self.n_mels + 1) as f64 / 2595.0) - 1.0);
        let band = |m: usize| {
            let (low, middle, high) = (edge(m), edge(m + 1), edge(m + 2));
            let height = |bin: usize| {
                let hertz = bin as f64 * f64::from(sample_rate) / self.n_fft as f64;
                ((hertz - low) / (middle - low)).min((high - hertz) / (high - middle)).max(0.0) as f32
            };
            (0..self.n_fft / 2 + 1).map(height).collect()
        };
        (0..self.n_mels).map(band).collect()
    }

    /// Of an image.
    pub(super) fn shape(&self) -> InputShape {
        InputShape::Images { channels: 1, height: self.n_mels, width: self.n_frames }
    }

    /// Samples that an image shows.
    pub(super) fn samples(&self) -> usize {
        (self.n_frames - 1) * self.hop + self.n_fft
    }
}

/// Makes images of audio.
#[derive(Clone)]
pub(super) struct LogMel {
    config: LogMelConfig,
    fourier: Fourier,
    window: Vec<f32>,
    /// `[n_mels, n_fft / 2 + 1]`
    bands: Vec<Vec<f32>>,
}

impl LogMel {
    pub(super) fn new(config: &LogMelConfig, sample_rate: u32) -> Self {
        let n = config.n_fft;
        let hann = |i: usize| (std::f64::consts::PI * i as f64 / n as f64).sin().powi(2) as f32;
        Self {
            fourier: Fourier::new(n),
            window: (0..n).map(hann).collect(),
            bands: config.bands(sample_rate),
            config: config.clone(),
        }
    }

    /// `[n_mels, n_frames]`, the highest pitch on top.
    pub(super) fn image(&self, samples: &[f32]) -> Vec<f32> {
        let image = self.logarithms(samples);
        let n = image.len() as f64;
        let mean = image.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let variance = image.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
        let scale = 1.0 / variance.sqrt().max(1e-6);
        image.iter().map(|&x| ((f64::from(x) - mean) * scale) as f32).collect()
    }

    /// The same before the last line.
    fn logarithms(&self, samples: &[f32]) -> Vec<f32> {
        let LogMelConfig { n_fft, hop, n_mels, n_frames } = self.config;
        let mut image = vec![0.0; n_mels * n_frames];
        let mut frame = vec![0.0; n_fft];
        for at in 0..n_frames {
            for (i, value) in frame.iter_mut().enumerate() {
                *value = samples.get(at * hop + i).copied().unwrap_or(0.0) * self.window[i];
            }
            let energies = self.fourier.energies(&frame);
            for (band, weights) in self.bands.iter().enumerate() {
                let energy: f32 = weights.iter().zip(&energies).map(|(weight, energy)| weight * energy).sum();
                image[(n_mels - 1 - band) * n_frames + at] = (energy + 1e-6).ln();
            }
        }
        image
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// transformers' audio_utils (tests/golden/log_mel) computes in f64.
    #[test]
    fn logarithms_are_those_of_transformers() {
        #[derive(Deserialize)]
        struct Case {
            sample_rate: u32,
            #[serde(flatten)]
            config: LogMelConfig,
            samples: Vec<f32>,
            /// Band by band, the lowest first.
            logarithms: Vec<Vec<f32>>,
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/log_mel/values.json");
        let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_eq!(cases.len(), 3);
        for Case { sample_rate, config, samples, logarithms } in cases {
            config.validate(sample_rate).unwrap();
            let image = LogMel::new(&config, sample_rate).logarithms(&samples);
            // In amplitudes and to eight roundings of f32, a few for each sum: what is far below the largest has no more digits.
            let amplitude = |logarithm: f32| (logarithm / 2.0).exp();
            let largest = logarithms.iter().flatten().fold(0f32, |most, &x| most.max(amplitude(x)));
            let near = |got, want| (amplitude(got) - amplitude(want)).abs() < 5e-7 * largest;
            for (got, want) in image.chunks(config.n_frames).rev().zip(&logarithms) {
                assert!(got.iter().zip(want).all(|(&got, &want)| near(got, want)), "{got:?} {want:?}");
            }
        }
    }

    #[test]
    fn bands_that_would_stay_black_are_refused() {
        let error = LogMelConfig::default().validate(44_100).unwrap_err();
        assert!(error.field == "log_mel.n_mels" && error.problem.contains("a larger n_fft"), "{error}");
        LogMelConfig { n_fft: 1024, ..Default::default() }.validate(44_100).unwrap();
    }

    #[test]
    fn a_tone_lights_the_band_of_its_pitch_and_loudness_does_not_matter() {
        let config = LogMelConfig::default();
        let log_mel = LogMel::new(&config, 8000);
        let tone = |hertz: f32, loudness: f32| -> Vec<f32> {
            let turn = std::f32::consts::TAU * hertz / 8000.0;
            (0..config.samples()).map(|i| loudness * (turn * i as f32).sin()).collect()
        };
        let brightest = |image: &[f32]| {
            let column: Vec<f32> = image.chunks(32).map(|row| row[16]).collect();
            (0..32).max_by(|&a, &b| column[a].total_cmp(&column[b])).unwrap_or(0)
        };
        let mel = |hertz: f64| 2595.0 * (1.0 + hertz / 700.0).log10();
        for hertz in [600.0, 1500.0, 3000.0] {
            let image = log_mel.image(&tone(hertz, 0.5));
            // Band m has its middle at (m + 1)/33 of the scale; the highest is on top.
            let band = (mel(f64::from(hertz)) / mel(4000.0) * 33.0 - 1.0).round() as usize;
            assert!(brightest(&image).abs_diff(31 - band) <= 1, "{hertz}: {} {band}", brightest(&image));
            let mean = image.iter().sum::<f32>() / 1024.0;
            assert!(mean.abs() < 1e-4);
        }
        let silence = log_mel.image(&[]);
        assert!(silence.iter().all(|x| x.abs() < 1e-3));
    }
}
