//! Generated images of repeated patterns: what a network can learn to enlarge, because the same is elsewhere in the image.

use std::f32::consts::TAU;
use std::sync::Arc;

use polyhead_models::InputShape;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::batches::{ImageLoader, ImageSet, LoaderOptions, Order, Samples};
use crate::problem::{Problem, within};
use crate::synthetic::Side;
use crate::{Data, DataError, Opening, Source};

/// Points along each side of a pixel whose mean it is.
const POINTS: usize = 3;

/// `[data.patterns]`: coloured images of overlapping pieces, each with a pattern of its own: stripes, checks, rings, dots or waves, of
/// two colours, any direction and any period.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PatternsConfig {
    /// Height and width in pixels. Default: 64.
    pub size: usize,
    /// Pieces. Default: 5.
    pub pieces: usize,
    /// The shortest period of a pattern in pixels; the longest is six times as long. Default: 4.
    pub period: f64,
}

impl Default for PatternsConfig {
    fn default() -> Self {
        Self { size: 64, pieces: 5, period: 4.0 }
    }
}

impl Source for PatternsConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        within("size", self.size, 8..=1024)?;
        within("pieces", self.pieces, 1..=1000)?;
        within("period", self.period, 1.0..=1024.0)
    }

    fn shape(&self) -> Option<InputShape> {
        Some(InputShape::Images { channels: 3, height: self.size, width: self.size })
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let options = opening.options;
        let loader = |side, order| {
            let drawn = Arc::new(Drawn { config: self.clone(), seed: options.seed, side });
            ImageLoader::new(drawn, [self.size; 2], LoaderOptions::of(options, order))
        };
        let Self { size, pieces, .. } = self;
        Ok(Data::Images(Box::new(ImageSet {
            train: loader(Side::Train, Order::Endless),
            validation: loader(Side::Validation(options.validation_samples.max(1)), Order::Once),
            description: format!(
                "generated: images of {size} x {size} pixels with {pieces} patterns, new ones without end"
            ),
            notes: Vec::new(),
            text_hash: None,
        })))
    }
}

/// Generated images of one side.
struct Drawn {
    config: PatternsConfig,
    seed: u64,
    side: Side,
}

impl Samples<Vec<f32>> for Drawn {
    fn per_epoch(&self) -> u64 {
        self.side.per_epoch()
    }

    fn sample(&self, _epoch: u64, index: u64) -> Result<Vec<f32>, DataError> {
        let mut rng = self.side.rng(self.seed, index);
        let pieces: Vec<Piece> = (0..self.config.pieces).map(|_| Piece::draw(&self.config, &mut rng)).collect();
        Ok(painted(&pieces, self.config.size))
    }
}

/// The pattern of a piece.
#[derive(Debug, Clone, Copy)]
enum Pattern {
    Stripes,
    Checks,
    Rings,
    Dots,
    Waves,
}

/// A piece of an image: a disc with a pattern.
struct Piece {
    centre: [f32; 2],
    radius: f32,
    pattern: Pattern,
    /// Sine and cosine of its direction.
    turn: (f32, f32),
    period: f32,
    colours: [[f32; 3]; 2],
}

impl Piece {
    fn draw(config: &PatternsConfig, rng: &mut ChaCha8Rng) -> Self {
        let size = config.size as f32;
        let mut between = |low: f32, high: f32| low + (high - low) * rng.random::<f32>();
        Self {
            centre: [between(0.0, size), between(0.0, size)],
            radius: size * between(0.15, 0.5),
            pattern: match between(0.0, 5.0) as usize {
                0 => Pattern::Stripes,
                1 => Pattern::Checks,
                2 => Pattern::Rings,
                3 => Pattern::Dots,
                _ => Pattern::Waves,
            },
            turn: between(0.0, TAU).sin_cos(),
            period: config.period as f32 * between(1.0, 6.0),
            colours: [0, 1].map(|_| [0, 1, 2].map(|_| between(0.0, 1.0))),
        }
    }

    fn covers(&self, [x, y]: [f32; 2]) -> bool {
        (x - self.centre[0]).hypot(y - self.centre[1]) < self.radius
    }

    /// The colour at a point.
    fn colour(&self, [x, y]: [f32; 2]) -> [f32; 3] {
        let (sin, cos) = self.turn;
        let (dx, dy) = ((x - self.centre[0]) / self.period, (y - self.centre[1]) / self.period);
        let [u, v] = [cos * dx + sin * dy, cos * dy - sin * dx];
        let half = |at: f32| at.rem_euclid(1.0) < 0.5;
        let share = match self.pattern {
            Pattern::Stripes => f32::from(u8::from(half(u))),
            Pattern::Checks => f32::from(u8::from(half(u) != half(v))),
            Pattern::Rings => f32::from(u8::from(half(u.hypot(v)))),
            Pattern::Dots => f32::from(u8::from((u.rem_euclid(1.0) - 0.5).hypot(v.rem_euclid(1.0) - 0.5) < 0.3)),
            Pattern::Waves => 0.5 + 0.5 * (TAU * u).sin(),
        };
        let [a, b] = self.colours;
        [0, 1, 2].map(|colour| a[colour] + share * (b[colour] - a[colour]))
    }
}

/// `[3, size, size]`: the last piece on top, the first without an end.
fn painted(pieces: &[Piece], size: usize) -> Vec<f32> {
    let mut planes = vec![0.0; 3 * size * size];
    for at in 0..size * size {
        for point in 0..POINTS * POINTS {
            let [x, y] = [(at % size, point % POINTS), (at / size, point / POINTS)]
                .map(|(pixel, part)| pixel as f32 + (part as f32 + 0.5) / POINTS as f32);
            let piece = pieces.iter().skip(1).rev().find(|piece| piece.covers([x, y])).unwrap_or(&pieces[0]);
            for (colour, value) in piece.colour([x, y]).into_iter().enumerate() {
                planes[colour * size * size + at] += value / (POINTS * POINTS) as f32;
            }
        }
    }
    planes
}
