//! Generated images: one shape among clutter and noise. Settings say how hard it is.
//!
//! The shape is small and anywhere, so that a model has to find it, which is what pooling is for.

use polyhead_models::InputShape;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::examples::{Maker, generated};
use crate::problem::{Problem, within};
use crate::random::normal;
use crate::{Data, DataError, Opening, Source};

/// The classes, in order.
const SHAPES: [&str; 8] = ["disc", "square", "triangle", "cross", "ring", "star", "bar", "crescent"];

/// `[data.shapes]`: a grey image with one shape, of any place and turn, among clutter that is of no class: pieces of lines
/// and blots. Classes, in order: disc, square, triangle, cross, ring, star, bar, crescent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ShapesConfig {
    /// Height and width in pixels. Default: 32.
    pub size: usize,
    /// The first so many shapes, 2 to 8. Default: 8.
    pub n_classes: usize,
    /// Radius of the shape as a share of the image's side. Default: 0.2.
    pub radius: f64,
    /// How far the shape is turned to either side, at most, in degrees. Default: 20.
    pub turn: f64,
    /// Pieces of clutter. Default: 6.
    pub clutter: usize,
    /// Standard deviation of the noise on every pixel, where pixels go from -1 to 1. Default: 0.2.
    pub noise: f64,
    /// Share of the images whose background is as bright as its class's always is, a shortcut that gives the class away without the
    /// shape; in the others, a group of their own, it is as bright as another class's. Default: every background is drawn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shortcut: Option<f64>,
}

impl Default for ShapesConfig {
    fn default() -> Self {
        Self { size: 32, n_classes: 8, radius: 0.2, turn: 20.0, clutter: 6, noise: 0.2, shortcut: None }
    }
}

impl Source for ShapesConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        within("size", self.size, 8..=1024)?;
        within("n_classes", self.n_classes, 2..=SHAPES.len())?;
        within("radius", self.radius, 0.05..=0.5)?;
        within("turn", self.turn, 0.0..=180.0)?;
        within("clutter", self.clutter, 0..=1000)?;
        within("noise", self.noise, 0.0..=100.0)?;
        self.shortcut.map_or(Ok(()), |share| within("shortcut", share, 0.0..=1.0))
    }

    fn shape(&self) -> Option<InputShape> {
        Some(Maker::shape(self))
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        generated(self.clone(), opening.name, None, opening)
    }
}

impl Maker for ShapesConfig {
    fn shape(&self) -> InputShape {
        InputShape::Images { channels: 1, height: self.size, width: self.size }
    }

    fn classes(&self) -> Vec<String> {
        SHAPES[..self.n_classes].iter().map(|&name| name.to_owned()).collect()
    }

    fn groups(&self) -> Vec<String> {
        self.shortcut.map_or(Vec::new(), |_| ["the shortcut holds", "the shortcut misleads"].map(Into::into).into())
    }

    fn group(&self, _class: usize, rng: &mut ChaCha8Rng) -> usize {
        self.shortcut.map_or(0, |share| usize::from(rng.random::<f64>() >= share))
    }

    fn make(&self, class: usize, group: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
        let size = self.size as f32;
        let other = self.shortcut.map_or(0, |_| group * rng.random_range(1..self.n_classes));
        let mut between = |low: f32, high: f32| low + (high - low) * rng.random::<f32>();
        let ground = match self.shortcut {
            None => between(-0.8, 0.0),
            Some(_) => -0.8 * ((class + other) % self.n_classes) as f32 / (self.n_classes - 1) as f32,
        };
        let mut canvas = Canvas { size: self.size, pixels: vec![ground; self.size * self.size] };
        let radius = (self.radius as f32 * size * between(0.85, 1.15)).min(0.5 * size);
        let own = Place {
            centre: [0, 1].map(|_| between(radius.min(0.5 * size), (size - radius).max(0.5 * size))),
            turn: (self.turn as f32).to_radians() * between(-1.0, 1.0),
            radius,
        };
        for piece in 0..self.clutter {
            let place = Place {
                centre: [0, 1].map(|_| between(0.0, size)),
                turn: between(0.0, std::f32::consts::TAU),
                radius: 0.5 * radius * between(0.5, 1.0),
            };
            let colour = between(-0.2, 0.9);
            // A thin piece of a line, or a blot of two overlapping discs.
            match piece % 2 {
                0 => canvas.draw(&place, colour, |[x, y]| (x.abs() - 1.0).max(y.abs() - 0.18)),
                _ => canvas.draw(&place, colour, |[x, y]| length([x - 0.3, y]).min(length([x + 0.3, y - 0.2])) - 0.35),
            }
        }
        let colour = between(0.5, 1.0);
        canvas.draw(&own, colour, |point| outside(class, point));
        if self.noise > 0.0 {
            canvas.pixels.iter_mut().for_each(|pixel| *pixel += self.noise as f32 * normal(rng));
        }
        canvas.pixels
    }
}

/// Where something is drawn.
struct Place {
    centre: [f32; 2],
    turn: f32,
    radius: f32,
}

struct Canvas {
    size: usize,
    pixels: Vec<f32>,
}

impl Canvas {
    /// Draws where `outside`, a distance in units of the radius, is negative; its edge is half a pixel soft on either side.
    fn draw(&mut self, place: &Place, colour: f32, outside: impl Fn([f32; 2]) -> f32) {
        let (sin, cos) = place.turn.sin_cos();
        for (at, pixel) in self.pixels.iter_mut().enumerate() {
            let dx = (at % self.size) as f32 + 0.5 - place.centre[0];
            let dy = (at / self.size) as f32 + 0.5 - place.centre[1];
            let point = [(cos * dx + sin * dy) / place.radius, (cos * dy - sin * dx) / place.radius];
            let covered = (0.5 - outside(point) * place.radius).clamp(0.0, 1.0);
            *pixel += covered * (colour - *pixel);
        }
    }
}

/// How far a point lies outside of a shape of radius 1, roughly; negative inside.
fn outside(class: usize, [x, y]: [f32; 2]) -> f32 {
    let slab = |x: f32, y: f32, half_x: f32, half_y: f32| (x.abs() - half_x).max(y.abs() - half_y);
    match class {
        0 => length([x, y]) - 0.85,
        1 => slab(x, y, 0.75, 0.75),
        // Three half-planes, whose normals are a third of a turn apart.
        2 => (y - 0.5).max(0.866 * x - 0.5 * y - 0.5).max(-0.866 * x - 0.5 * y - 0.5),
        3 => slab(x, y, 0.95, 0.27).min(slab(x, y, 0.27, 0.95)),
        4 => (length([x, y]) - 0.68).abs() - 0.2,
        5 => length([x, y]) - (0.6 + 0.35 * (5.0 * y.atan2(x)).cos()),
        6 => slab(x, y, 1.0, 0.25),
        _ => (length([x, y]) - 0.9).max(0.75 - length([x - 0.5, y])),
    }
}

fn length([x, y]: [f32; 2]) -> f32 {
    (x * x + y * y).sqrt()
}
