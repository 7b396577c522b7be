//! Images of matrices, as PNG files: attention maps, weights.
//!
//! The colours are those of viridis (Smith and van der Walt, 2015, released under CC0): perceptually
//! uniform, readable without colour vision and in print. Weights that can be negative get two colours
//! that meet in white: ColorBrewer's blues and oranges (Brewer, 2003, Apache 2.0), which are told apart
//! without colour vision too. The same values give the same bytes.

use polyhead_models::Matrix;

/// An encoded image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Png {
    /// Pixels across.
    pub width: u32,
    /// Pixels down.
    pub height: u32,
    /// The PNG file.
    pub bytes: Vec<u8>,
}

/// How to draw a heat map.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Pixels across and down that one value takes. Default 8 (chosen by us).
    pub scale: u32,
    /// The values drawn darkest and brightest; values beyond are drawn as these. Default: the
    /// smallest and the largest finite value.
    pub range: Option<(f32, f32)>,
}

impl Default for Options {
    fn default() -> Self {
        Self { scale: 8, range: None }
    }
}

/// Why an image cannot be drawn.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The number of values and the shape disagree.
    #[error("an image of rows ({rows}) x cols ({cols}) takes as many values; there are {found}")]
    Shape {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
        /// How many values there are.
        found: usize,
    },
    /// There is nothing to draw.
    #[error("{what} is zero: an image needs at least one")]
    Empty {
        /// What there is none of.
        what: &'static str,
    },
    /// More pixels than anybody looks at.
    #[error("an image of {width} x {height} pixels is larger than {MAX_PIXELS} pixels: lower scale")]
    TooLarge {
        /// Pixels across.
        width: u64,
        /// Pixels down.
        height: u64,
    },
    /// The range is no range.
    #[error("range ({low}, {high}) must be two finite numbers, the first below the second")]
    Range {
        /// The value to draw darkest.
        low: f32,
        /// The value to draw brightest.
        high: f32,
    },
    /// The encoder failed.
    #[error("cannot encode the image: {0}")]
    Encode(String),
}

/// 64 million pixels (chosen by us): no mistake in a scale shall fill memory or disk.
const MAX_PIXELS: u64 = 1 << 26;
/// The longest side, in cells, of one map of a grid; larger maps are pooled (chosen by us).
const MAX_CELLS: usize = 256;
/// The longest side, in pixels, that smaller maps are magnified to (chosen by us).
const MAX_SIDE: usize = 400;
/// Between the maps of a grid, in pixels.
const GAP: usize = 2;

// An image is drawn in numbers of palette entries: 253 colours, nothing, the ground and the mark of NaN.
const COLOURS: u8 = 253;
const NOTHING: u8 = 253;
const GROUND: u8 = 254;
const NOT_FINITE: u8 = 255;

/// Draws `values` `[rows, cols]`, the first row on top; what is not finite is grey.
///
/// # Errors
/// If shape, scale or range are unusable.
pub fn heat_map(values: &[f32], rows: usize, cols: usize, options: &Options) -> Result<Png, ImageError> {
    check_shape(values, rows, cols)?;
    let range = range_or(options.range, std::iter::once(values))?;
    let mut canvas = Canvas::new(cols as u64 * u64::from(options.scale), rows as u64 * u64::from(options.scale))?;
    canvas.draw(values, cols, options.scale as usize, (0, 0), |value| entry(value, range));
    canvas.encode(&VIRIDIS)
}

/// A matrix with the darkest colour for 0, its cells as large as is comfortable to look at.
///
/// # Errors
/// If it has no cells, or not as many as stated.
pub fn matrix(matrix: &Matrix) -> Result<Png, ImageError> {
    let Matrix { rows, cols, values } = matrix;
    let largest = values.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
    let scale = (MAX_SIDE / rows.max(cols).max(&1)).clamp(1, 32) as u32;
    heat_map(values, *rows, *cols, &Options { range: Some((0.0, largest)), scale })
}

/// Which heads took part at which tokens: one row per head, one column per token, brighter where the head counted more.
///
/// # Shapes
/// - gates: `[heads, tokens]` row-major, what the outputs of heads were multiplied by; 0 where they were not computed
///
/// # Errors
/// If there are none, or not as many as stated.
pub fn head_gates(gates: &[f32], heads: usize, tokens: usize) -> Result<Png, ImageError> {
    let largest = gates.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
    let scale = (2048 / tokens.max(1)).clamp(1, 8) as u32;
    heat_map(gates, heads, tokens, &Options { range: Some((0.0, largest)), scale })
}

/// Draws one attention map `[rows, cols]` per head, tiled row by row in a grid as square as can be.
///
/// All share one scale of colours, from 0 to the largest weight: viridis, or where a mechanism has
/// negative weights blue for them above 0 and orange for those below. Colours go with the square root of
/// a weight, because most are far below the largest; a weight of exactly 0, as of a hidden key, is left
/// white. Maps of more than 256 rows or columns are shrunk, each cell showing the weight of largest
/// magnitude that it covers, so that narrow lines do not vanish.
///
/// # Errors
/// If there is no map or one of them has another shape.
pub fn attention_grid(maps: &[Vec<f32>], rows: usize, cols: usize) -> Result<Png, ImageError> {
    if maps.is_empty() {
        return Err(ImageError::Empty { what: "maps" });
    }
    for map in maps {
        check_shape(map, rows, cols)?;
    }
    let (low, high) = extent(maps.iter().map(Vec::as_slice));
    let (signed, largest) = (low < 0.0, high.max(-low));
    let Grid { across, factor, scale } = Grid::of(maps.len(), rows.max(cols));
    let (rows_shown, cols_shown) = (rows.div_ceil(factor), cols.div_ceil(factor));
    let down = maps.len().div_ceil(across);
    let side = |count: usize, cells: usize| (count * (cells * scale + GAP) - GAP) as u64;
    let mut canvas = Canvas::new(side(across, cols_shown), side(down, rows_shown))?;
    for (index, map) in maps.iter().enumerate() {
        let corner = (index % across * (cols_shown * scale + GAP), index / across * (rows_shown * scale + GAP));
        let shown = pool(map, cols, factor);
        canvas.draw(&shown, cols_shown, scale, corner, |weight| weight_entry(weight, largest, signed));
    }
    canvas.encode(ramp(signed))
}

/// How [`attention_grid`] tiles its maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Maps in a row.
    pub across: usize,
    /// Rows and columns of a map that one cell of the image stands for: 1 where maps are not shrunk.
    pub factor: usize,
    /// Pixels across and down that a cell takes.
    pub scale: usize,
}

impl Grid {
    /// Of so many maps, whose longer side has so many rows or columns.
    pub fn of(maps: usize, longest: usize) -> Self {
        let factor = longest.div_ceil(MAX_CELLS).max(1);
        let scale = (MAX_SIDE / longest.div_ceil(factor).max(1)).clamp(1, 16);
        Self { across: (1..=maps).find(|n| n * n >= maps).unwrap_or(1), factor, scale }
    }

    /// Where cell `at` (from 0) of map `map` of a row or a column of maps has its middle, in pixels from the image's edge.
    pub fn middle(&self, map: usize, at: usize, cells: usize) -> f64 {
        (map * (cells * self.scale + GAP)) as f64 + (at as f64 + 0.5) * self.scale as f64
    }
}

/// The colours of [`attention_grid`], from the smallest weight to the largest, at equal distances of the square root of a
/// weight's size: from 0 on, or where there are negative weights from the largest negative one on.
pub fn ramp(signed: bool) -> &'static [[u8; 3]] {
    if signed { &ORANGE_TO_BLUE } else { &VIRIDIS }
}

fn check_shape(values: &[f32], rows: usize, cols: usize) -> Result<(), ImageError> {
    match (rows, cols) {
        (0, _) => Err(ImageError::Empty { what: "rows" }),
        (_, 0) => Err(ImageError::Empty { what: "cols" }),
        _ if rows.checked_mul(cols) == Some(values.len()) => Ok(()),
        _ => Err(ImageError::Shape { rows, cols, found: values.len() }),
    }
}

/// The smallest and the largest finite value.
fn extent<'a>(maps: impl Iterator<Item = &'a [f32]>) -> (f32, f32) {
    maps.flatten()
        .filter(|value| value.is_finite())
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), value| (low.min(*value), high.max(*value)))
}

fn range_or<'a>(range: Option<(f32, f32)>, maps: impl Iterator<Item = &'a [f32]>) -> Result<(f32, f32), ImageError> {
    match range {
        Some((low, high)) if low.is_finite() && high.is_finite() && low < high => Ok((low, high)),
        Some((low, high)) => Err(ImageError::Range { low, high }),
        None => Ok(extent(maps)),
    }
}

/// Shrinks a map by `factor` in both directions, keeping of each block the value of largest
/// magnitude; a block with a value that is not finite is not finite.
fn pool(map: &[f32], cols: usize, factor: usize) -> Vec<f32> {
    let larger = |a: f32, b: f32| match (a.is_finite(), b.is_finite()) {
        (true, true) if b.abs() > a.abs() => b,
        (true, false) => b,
        _ => a,
    };
    map.chunks(cols * factor)
        .flat_map(|band| {
            let starts = (0..cols).step_by(factor);
            starts.map(move |start| {
                let end = (start + factor).min(cols);
                let rows = band.chunks(cols);
                rows.flat_map(|row| &row[start..end]).copied().fold(0.0, larger)
            })
        })
        .collect()
}

struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<u8>, // [height, width] numbers of palette entries
}

impl Canvas {
    fn new(width: u64, height: u64) -> Result<Self, ImageError> {
        if width == 0 || height == 0 {
            return Err(ImageError::Empty { what: "scale" });
        }
        if width.checked_mul(height).is_none_or(|n| n > MAX_PIXELS) {
            return Err(ImageError::TooLarge { width, height });
        }
        let (width, height) = (width as usize, height as usize);
        Ok(Self { width, height, pixels: vec![GROUND; width * height] })
    }

    /// Draws `values` `[rows, cols]` with the upper left corner at `(x, y)`.
    fn draw(&mut self, values: &[f32], cols: usize, scale: usize, (x, y): (usize, usize), entry: impl Fn(f32) -> u8) {
        for (row, values) in values.chunks(cols).enumerate() {
            for line in 0..scale {
                let start = (y + row * scale + line) * self.width + x;
                let line = &mut self.pixels[start..start + cols * scale];
                for (cell, value) in line.chunks_mut(scale).zip(values) {
                    cell.fill(entry(*value));
                }
            }
        }
    }

    fn encode(&self, colours: &[[u8; 3]]) -> Result<Png, ImageError> {
        let failed = |error: png::EncodingError| ImageError::Encode(error.to_string());
        let (width, height) = (self.width as u32, self.height as u32);
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(png::ColorType::Indexed);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_palette(palette(colours));
        let mut writer = encoder.write_header().map_err(failed)?;
        writer.write_image_data(&self.pixels).map_err(failed)?;
        writer.finish().map_err(failed)?;
        Ok(Png { width, height, bytes })
    }
}

/// The palette entry of a value; all values equal are drawn in the darkest colour.
fn entry(value: f32, (low, high): (f32, f32)) -> u8 {
    if !value.is_finite() {
        return NOT_FINITE;
    }
    // In f64, because high - low of two f32 may be infinite.
    let (value, low, high) = (f64::from(value), f64::from(low), f64::from(high));
    let position = if high > low { ((value - low) / (high - low)).clamp(0.0, 1.0) } else { 0.0 };
    (position * f64::from(COLOURS - 1)).round() as u8
}

/// The palette entry of an attention weight.
fn weight_entry(weight: f32, largest: f32, signed: bool) -> u8 {
    if !weight.is_finite() {
        return NOT_FINITE;
    }
    if weight == 0.0 {
        return NOTHING;
    }
    let root = f64::from(weight.abs() / largest).sqrt().copysign(weight.into());
    let position = if signed { 0.5 + 0.5 * root } else { root };
    (position * f64::from(COLOURS - 1)).round() as u8
}

/// Viridis at 16 equal distances; between them the colours are interpolated.
const VIRIDIS: [[u8; 3]; 16] = [
    [0x44, 0x01, 0x54],
    [0x48, 0x1a, 0x6c],
    [0x47, 0x2f, 0x7d],
    [0x41, 0x44, 0x87],
    [0x39, 0x56, 0x8c],
    [0x31, 0x68, 0x8e],
    [0x2a, 0x78, 0x8e],
    [0x23, 0x88, 0x8e],
    [0x1f, 0x98, 0x8b],
    [0x22, 0xa8, 0x84],
    [0x35, 0xb7, 0x79],
    [0x54, 0xc5, 0x68],
    [0x7a, 0xd1, 0x51],
    [0xa5, 0xdb, 0x36],
    [0xd2, 0xe2, 0x1b],
    [0xfd, 0xe7, 0x25],
];

/// Oranges, the darkest first, then white, then blues.
const ORANGE_TO_BLUE: [[u8; 3]; 9] = [
    [0x7f, 0x27, 0x04],
    [0xd9, 0x48, 0x01],
    [0xfd, 0x8d, 0x3c],
    [0xfd, 0xd0, 0xa2],
    [0xff, 0xff, 0xff],
    [0xc6, 0xdb, 0xef],
    [0x6b, 0xae, 0xd6],
    [0x21, 0x71, 0xb5],
    [0x08, 0x30, 0x6b],
];

fn palette(colours: &[[u8; 3]]) -> Vec<u8> {
    let mut palette = Vec::with_capacity(256 * 3);
    let segments = colours.len() - 1;
    for colour in 0..usize::from(COLOURS) {
        // Whole numbers: the same bytes on every machine.
        let steps = usize::from(COLOURS) - 1;
        let (left, part) = (colour * segments / steps, colour * segments % steps);
        let right = (left + 1).min(segments);
        for (a, b) in colours[left].iter().zip(&colours[right]) {
            let mixed = usize::from(*a) * (steps - part) + usize::from(*b) * part;
            palette.push(((mixed + steps / 2) / steps) as u8);
        }
    }
    palette.extend([0xff, 0xff, 0xff]); // nothing
    palette.extend([0xd8, 0xd8, 0xd8]); // the ground
    palette.extend([0x80, 0x80, 0x80]); // not finite
    palette
}

mod sheet;

pub use sheet::{Sheet, coloured, sheet};

#[cfg(test)]
mod tests;
