//! Features as the layers of an encoder would give them, of samples that do not keep still: their level and scale wander
//! from layer to layer, and impulses hit single numbers. What a gate that damps outliers can gain is set by dials.
//!
//! ```text
//! x_l = s_l (a_l P_class,l + noise e) + b_l + impulses          for the layers l of a sample
//! s_l = s_{l-1} (1 + drift u),   b_l = b_{l-1} + drift e,       u from U(-1, 1), e from about N(0, 1)
//! ```
//! The prototypes P and the amplitudes a_l, from U(0.25, 1), are the seed's; everything else is drawn for each sample.
//! The paper has no such set: impulses and drift are what its prose holds its gate to be good at (arXiv 2401.11143).

use polyhead_models::InputShape;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Maker, generated};
use crate::problem::{Problem, require, within};
use crate::synthetic::EPOCH;
use crate::{Data, DataError, Opening, Source};

/// Numbers of a sample at most, so that a mistake in a size is an error and does not fill memory.
const MOST_NUMBERS: usize = 1 << 22;

/// `[data.layer_features]`: generated features of layers, `[n_layers, dim]` a sample, that tell a class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LayerFeaturesConfig {
    /// Layers. Default: 9.
    pub n_layers: usize,
    /// Numbers of a layer. Default: 36.
    pub dim: usize,
    /// Classes. Default: 8.
    pub n_classes: usize,
    /// Different samples to learn from; 0 never shows one twice. Default: 2000.
    pub train_samples: u64,
    /// Standard deviation of the noise that is there always, beside prototypes of standard deviation 1. Default: 2.0.
    pub noise: f64,
    /// Share of numbers that an impulse hits. Default: 0.05.
    pub impulse_rate: f64,
    /// How large impulses are: they are drawn from about N(0, impulse_size²). Default: 10.0.
    pub impulse_size: f64,
    /// How far scale and level wander from layer to layer; 0 to 0.9. Default: 0.2.
    pub drift: f64,
}

impl Default for LayerFeaturesConfig {
    fn default() -> Self {
        Self {
            n_layers: 9,
            dim: 36,
            n_classes: 8,
            train_samples: 2000,
            noise: 2.0,
            impulse_rate: 0.05,
            impulse_size: 10.0,
            drift: 0.2,
        }
    }
}

impl Source for LayerFeaturesConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        let Self { n_layers, dim, n_classes, train_samples, .. } = *self;
        require(n_layers > 0, "n_layers", || "n_layers (0) must be at least 1".into())?;
        require(dim > 0, "dim", || "dim (0) must be at least 1".into())?;
        within("n_classes", n_classes, 2..=1 << 16)?;
        let numbers = n_layers.saturating_mul(dim).saturating_mul(n_classes);
        require(numbers <= MOST_NUMBERS, "dim", || {
            format!("n_layers * dim * n_classes = {numbers} must be at most {MOST_NUMBERS}")
        })?;
        require(train_samples <= EPOCH, "train_samples", || {
            format!("train_samples ({train_samples}) must be at most {EPOCH}; 0 stands for samples without end")
        })?;
        within("noise", self.noise, 0.0..=1e6)?;
        within("impulse_size", self.impulse_size, 0.0..=1e6)?;
        within("impulse_rate", self.impulse_rate, 0.0..=1.0)?;
        within("drift", self.drift, 0.0..=0.9)
    }

    fn repeats(&self) -> bool {
        self.train_samples > 0
    }

    fn shape(&self) -> Option<InputShape> {
        Some(InputShape::Features { layers: self.n_layers, dim: self.dim })
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let what = format!("features of {} layers of {} numbers", self.n_layers, self.dim);
        let samples = Some(self.train_samples).filter(|&samples| samples > 0);
        generated(self.encoder(opening.options.seed), &what, samples, opening)
    }
}

impl LayerFeaturesConfig {
    /// What a seed makes samples of.
    fn encoder(&self, seed: u64) -> Encoder {
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x6C61_7965_7273);
        let amplitudes: Vec<f32> = (0..self.n_layers).map(|_| rng.random_range(0.25..1.0)).collect();
        let prototypes = (0..self.n_classes * self.n_layers * self.dim).map(|_| normal(&mut rng)).collect();
        Encoder { config: self.clone(), amplitudes, prototypes }
    }
}

/// What makes the features.
#[derive(Debug, Clone)]
struct Encoder {
    config: LayerFeaturesConfig,
    /// `[layers]`
    amplitudes: Vec<f32>,
    /// `[classes, layers, dim]`
    prototypes: Vec<f32>,
}

impl Maker for Encoder {
    fn shape(&self) -> InputShape {
        InputShape::Features { layers: self.config.n_layers, dim: self.config.dim }
    }

    fn classes(&self) -> Vec<String> {
        (0..self.config.n_classes).map(|class| class.to_string()).collect()
    }

    fn make(&self, class: usize, _group: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
        let LayerFeaturesConfig { n_layers, dim, noise, impulse_rate, impulse_size, drift, .. } = self.config;
        let [noise, rate, size, drift] = [noise, impulse_rate, impulse_size, drift].map(|value| value as f32);
        let prototype = &self.prototypes[class * n_layers * dim..][..n_layers * dim];
        let (mut scale, mut level) = (1.0, 0.0);
        let mut values = Vec::with_capacity(n_layers * dim);
        for (layer, amplitude) in prototype.chunks(dim).zip(&self.amplitudes) {
            scale *= 1.0 + drift * rng.random_range(-1.0..1.0f32);
            level += drift * normal(rng);
            for own in layer {
                let value = scale * (amplitude * own + noise * normal(rng)) + level;
                // Both are drawn always: another rate changes which numbers are hit, and nothing else.
                let (hit, impulse) = (rng.random::<f32>(), normal(rng));
                values.push(if hit < rate { value + size * impulse } else { value });
            }
        }
        values
    }
}

/// About N(0, 1), within ±6: the sum of twelve uniform numbers. Whole numbers until the last step, so that every machine
/// draws the same.
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let parts = |word: u64| (0..4).map(move |part| (word >> (16 * part)) & 0xFFFF);
    let sum: u64 = (0..3).flat_map(|_| parts(rng.random::<u64>())).sum();
    (sum as f32 + 6.0) / 65536.0 - 6.0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::batches::{Content, Samples};
    use crate::examples::generated::Drawn;
    use crate::synthetic::Side;

    fn drawn(config: &str, seed: u64, side: Side) -> Drawn<Encoder> {
        let config: LayerFeaturesConfig = serde_json::from_str(config).unwrap();
        config.validate(0).unwrap();
        Drawn { task: config.encoder(seed), seed, side, samples: EPOCH }
    }

    fn row(set: &Drawn<Encoder>, index: u64) -> (Vec<f32>, u32) {
        let example = set.sample(0, index).unwrap();
        let Content::Numbers(values) = example.content else { panic!("no numbers") };
        (values, example.label)
    }

    /// Share of samples whose nearest prototype, as they are without noise, is that of their class.
    fn recognized(config: &str) -> f64 {
        let set = drawn(config, 1, Side::Train);
        let Encoder { config, amplitudes, prototypes } = &set.task;
        let clean = |class: &[f32]| -> Vec<f32> {
            class.chunks(config.dim).zip(amplitudes).flat_map(|(own, a)| own.iter().map(move |x| a * x)).collect()
        };
        let clean: Vec<Vec<f32>> = prototypes.chunks(config.n_layers * config.dim).map(clean).collect();
        let right = (0..200).filter(|index| {
            let (values, label) = row(&set, *index);
            let away = |class: &Vec<f32>| class.iter().zip(&values).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
            let nearest = (0..clean.len()).min_by(|a, b| away(&clean[*a]).total_cmp(&away(&clean[*b]))).unwrap();
            nearest == label as usize
        });
        right.count() as f64 / 200.0
    }

    #[test]
    fn a_sample_is_a_function_of_seed_side_and_index() {
        let sides = [Side::Train, Side::Validation(9), Side::Tracking(9)];
        for index in 0..9 {
            let rows = sides.map(|side| row(&drawn("{}", 3, side), index));
            assert_eq!(rows[0], row(&drawn("{}", 3, Side::Train), index));
            assert_ne!(rows[0], row(&drawn("{}", 4, Side::Train), index), "the seed decides");
            assert!(rows[0].0 != rows[1].0 && rows[1].0 != rows[2].0 && rows[0].0 != rows[2].0, "sides are disjoint");
            assert!(rows[0].0.len() == 9 * 36 && rows[0].1 == index as u32 % 8);
        }
    }

    #[test]
    fn dials_make_it_harder() {
        let clean = recognized(r#"{"noise": 0.0, "impulse_rate": 0.0, "drift": 0.0}"#);
        let [still, hit, wandering] = [
            r#"{"impulse_rate": 0.0, "drift": 0.0}"#,
            r#"{"impulse_rate": 0.2, "drift": 0.0}"#,
            r#"{"impulse_rate": 0.0, "drift": 0.9}"#,
        ]
        .map(recognized);
        assert!(
            clean == 1.0 && still > 0.9 && hit < still - 0.1 && wandering < still - 0.1,
            "{still} {hit} {wandering}"
        );
    }

    #[test]
    fn impulses_hit_their_share_and_change_nothing_else() {
        let [a, b] = ["0.0", "0.1"].map(|rate| {
            let set = drawn(&format!(r#"{{"impulse_rate": {rate}}}"#), 5, Side::Train);
            (0..40).flat_map(|index| row(&set, index).0).collect::<Vec<_>>()
        });
        let hit = a.iter().zip(&b).filter(|(a, b)| a != b).count() as f64 / a.len() as f64;
        assert!((hit - 0.1).abs() < 0.01, "{hit}");
    }

    // A recipe and a seed mean the same samples for ever.
    #[test]
    fn samples_never_change_between_versions() {
        let set = drawn("{}", 3, Side::Train);
        let mut hash = blake3::Hasher::new();
        for index in 0..9 {
            for value in row(&set, index).0 {
                hash.update(&value.to_bits().to_le_bytes());
            }
        }
        assert_eq!(&hash.finalize().to_hex()[..16], "6d13c161c5052dc0");
    }

    #[test]
    fn the_sum_of_uniform_numbers_is_nearly_normal() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let draws: Vec<f64> = (0..20_000).map(|_| f64::from(normal(&mut rng))).collect();
        let moment = |power: i32| draws.iter().map(|x| x.powi(power)).sum::<f64>() / draws.len() as f64;
        assert!(moment(1).abs() < 0.02 && (moment(2) - 1.0).abs() < 0.03 && (moment(4) - 2.9).abs() < 0.2);
    }

    #[test]
    fn a_value_is_refused_by_its_name() {
        for (json, field) in [
            (r#"{"n_layers": 0}"#, "n_layers"),
            (r#"{"dim": 0}"#, "dim"),
            (r#"{"dim": 18446744073709551615}"#, "dim"),
            (r#"{"n_classes": 1}"#, "n_classes"),
            (r#"{"noise": -1.0}"#, "noise"),
            (r#"{"impulse_rate": 1.5}"#, "impulse_rate"),
            (r#"{"impulse_size": 1e300}"#, "impulse_size"),
            (r#"{"drift": 1.0}"#, "drift"),
            (r#"{"train_samples": 18446744073709551615}"#, "train_samples"),
        ] {
            let config: LayerFeaturesConfig = serde_json::from_str(json).unwrap();
            let error = config.validate(0).unwrap_err();
            assert!(error.field == field && error.problem.contains(field), "{json}: {error}");
        }
    }
}
