//! How images are augmented in training; validation images never are.

use polyhead_models::InputShape;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problem::{Problem, within};
use crate::random::{mix, normal};

/// `[augmentation]`: how images are augmented in training. Default: not at all.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AugmentConfig {
    /// Images are moved by up to so many pixels down and across; what comes in is black. Default: 0.
    pub crop: usize,
    /// Every second image, by chance, is mirrored left to right. Default: false.
    pub flip: bool,
    /// Standard deviation of noise on every pixel, where pixels go from -1 to 1. Default: 0.
    pub noise: f64,
}

impl AugmentConfig {
    /// Whether nothing is changed.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self) -> Result<(), Problem> {
        within("crop", self.crop, 0..=4096)?;
        within("noise", self.noise, 0.0..=100.0)
    }

    /// Augments an image as the seed, its epoch and its index decide.
    pub(crate) fn apply(&self, pixels: &mut Vec<f32>, shape: InputShape, (seed, epoch, index): (u64, u64, u64)) {
        let InputShape::Images { channels, height, width } = shape else { return };
        let mut rng = ChaCha8Rng::seed_from_u64(mix(mix(seed, epoch), index));
        let most = self.crop as i64;
        let [down, across] = [0, 1].map(|_| rng.random_range(-most..=most));
        let mirrored = rng.random_range(0..2u32) == 1 && self.flip;
        if (down, across) != (0, 0) || mirrored {
            let mut moved = vec![-1.0; pixels.len()];
            for (plane, source) in moved.chunks_mut(height * width).zip(pixels.chunks(height * width)) {
                for y in 0..height {
                    for x in 0..width {
                        let from_x = if mirrored { width - 1 - x } else { x } as i64 + across;
                        let from_y = y as i64 + down;
                        if (0..height as i64).contains(&from_y) && (0..width as i64).contains(&from_x) {
                            plane[y * width + x] = source[from_y as usize * width + from_x as usize];
                        }
                    }
                }
            }
            debug_assert_eq!(moved.len(), channels * height * width);
            *pixels = moved;
        }
        if self.noise > 0.0 {
            pixels.iter_mut().for_each(|pixel| *pixel += self.noise as f32 * normal(&mut rng));
        }
    }
}
